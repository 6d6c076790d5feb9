"""`LatentizePass`: the conversion as a pass of `torch.fx.passes.infra`, for a user's own list of passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils import _pytree as pytree

from latentize.blocks import Block
from latentize.errors import LatentizeError
from latentize.passes.linears import attribute
from latentize.recipe import Recipe

#: Length given to an axis of a placeholder whose size is symbolic and unknown.
_LENGTH = 16


class LatentizePass(PassBase):
    """Rewrites the MoE blocks of a `GraphModule` into LatentMoE.

    Args:
        recipe: what to make of them; `Recipe()` when None.
        args, kwargs: example inputs; made from the placeholders' metadata when None.
        calibration: an iterable of inputs (tuples of args or dicts of kwargs); without it the weights decide alone.

    Raises (when called):
        LatentizeError: the inputs are neither given nor can be made, or the recipe does not fit a block.
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        calibration: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe if recipe is not None else Recipe()
        self.args = args
        self.kwargs = kwargs
        self.calibration = calibration
        #: Blocks of the module that the pass was last called with.
        self.blocks: list[Block] = []

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the blocks of `graph_module`; `modified` is False when there was nothing to rewrite."""
        import latentize

        given = self.args is not None or self.kwargs is not None
        args, kwargs = (self.args or (), dict(self.kwargs or {})) if given else example_inputs(graph_module)
        result = latentize.convert(
            graph_module, args=args, kwargs=kwargs, recipe=self.recipe, calibration=self.calibration
        )
        self.blocks = result.blocks
        return PassResult(result.model, result.model is not graph_module)


def example_inputs(graph_module: fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the sizes and dtypes that a graph's placeholders are annotated with, seeded.

    Raises:
        LatentizeError: a placeholder has no metadata, as after `torch.fx.symbolic_trace`.
    """
    generator = torch.Generator().manual_seed(0)
    values = [_example(graph_module, node, generator) for node in graph_module.graph.nodes if node.op == "placeholder"]
    info = getattr(graph_module.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return tuple(values), {}
    restored = pytree.tree_unflatten(values, info.in_spec)
    if isinstance(restored, tuple) and len(restored) == 2 and isinstance(restored[1], dict):
        return tuple(restored[0]), dict(restored[1])
    return tuple(restored), {}


def _example(graph_module: fx.GraphModule, node: fx.Node, generator: torch.Generator) -> Any:
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None and ("val" in node.meta or node.args):
        return node.args[0] if node.args else None
    if not isinstance(value, Tensor):
        if isinstance(value, (int, float, bool)):
            return value
        raise LatentizeError(
            f"LatentizePass: placeholder {node.name!r} says nothing of its shape; "
            "give example inputs with LatentizePass(args=...)"
        )
    shape = [size if isinstance(size, int) else _hint(size) for size in value.shape]
    if value.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=value.device)
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(value.dtype).to(value.device)
    return torch.randint(0, _rows(graph_module, node), shape, generator=generator).to(value.dtype).to(value.device)


def _hint(size: Any) -> int:
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if hint is not None else _LENGTH


def _rows(graph_module: fx.GraphModule, node: fx.Node) -> int:
    """Rows of the smallest table that integers from this placeholder look up."""
    found = []
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user in seen or user.op not in {"call_function", "call_method", "call_module"}:
                continue
            seen.add(user)
            table = _table(graph_module, user)
            if table is not None:
                found.append(table)
            elif "val" not in user.meta or not getattr(user.meta["val"], "is_floating_point", lambda: True)():
                stack.append(user)
    return min(found, default=2)


def _table(graph_module: fx.GraphModule, user: fx.Node) -> int | None:
    if user.op == "call_module":
        module = graph_module.get_submodule(str(user.target))
        return module.num_embeddings if isinstance(module, torch.nn.Embedding) else None
    if "embedding" not in str(user.target) or not user.args or not isinstance(user.args[0], fx.Node):
        return None
    weight = user.args[0]
    if weight.op != "get_attr":
        return None
    table = attribute(graph_module, str(weight.target))
    assert isinstance(table, Tensor)
    return len(table)
