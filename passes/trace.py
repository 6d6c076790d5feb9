"""Capture a module as an FX graph of ATen calls that is valid for other lengths; find recorded values in its nodes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from latentize.passes.all_hit import EveryExpertHit
from latentize.passes.dead_code import eliminate_dead_code
from latentize.passes.double import widen

#: Calls that check something and compute nothing; they keep dead code alive.
_CHECKS = ("_assert", "sym_constrain", "_guards_fn", "assert_")


class CaptureError(Exception):
    """A module could not be captured as a graph; the message says why."""


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], experts: int = 0) -> fx.GraphModule:
    """Export a module with every axis of its inputs dynamic.

    Args:
        module: what to capture.
        args, kwargs: example inputs.
        experts: when given, code that asks which of so many experts got tokens is followed as if all had.

    Raises:
        CaptureError: its code depends on the values of its inputs in a way that export cannot follow.
    """
    from torch.fx.experimental import _config

    def dynamic(item: Any) -> Any:
        return dict.fromkeys(range(item.dim()), Dim.AUTO) if isinstance(item, Tensor) else None

    positional, keyword = pytree.tree_map(dynamic, (args, dict(kwargs)))
    named = inspect.signature(module.forward).bind(*positional, **keyword).arguments
    shapes = _spread(module, named)
    follow = EveryExpertHit(experts) if experts else contextlib.nullcontext()
    try:
        oblivious = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), oblivious, _without_cache(), quiet(), follow:
            program = torch.export.export(module, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
            graph = program.module(check_guards=False)
    except Exception as error:  # export raises many kinds
        raise CaptureError(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        ) from error
    assert isinstance(graph, fx.GraphModule)
    for name in ("train", "eval"):
        graph.__dict__.pop(name, None)
    return graph


def bound(template: fx.GraphModule, module: nn.Module) -> fx.GraphModule:
    """A captured graph with the parameters and buffers of another copy of the module it was captured from."""
    state: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = [*template.named_parameters(), *template.named_buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copying a graph's pytree specs warns of a class of torch's own
        graph = copy.deepcopy(template, {id(t): state[name] for name, t in own if name in state})
    if any(t.dtype == torch.float64 for t in state.values()):
        widen(graph)
        for name, buffer in graph.named_buffers():
            if name not in state and buffer.is_floating_point():
                buffer.data = buffer.data.double()
    return graph


def _without_cache() -> contextlib.AbstractContextManager[None]:
    """No cache of fake results: each expert's share of the tokens is a size of its own, so nothing is found in it."""
    import torch._dynamo.config  # loaded late: it takes seconds

    patch: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return patch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what export logs and prints of a failure, which is not one of ours, off the terminal."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch._subclasses.fake_tensor", "torch.export", "torch.fx.experimental.symbolic_shapes")
    ]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _spread(module: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with those caught by **kwargs spread out, as export wants its dynamic shapes."""
    kinds = {p.name: p.kind for p in inspect.signature(module.forward).parameters.values()}
    spread: dict[str, Any] = {}
    for name, value in named.items():
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            spread.update(value)
        else:
            spread[name] = value
    return spread


class _Values(fx.Interpreter):
    """Runs a graph and keeps what every node computed."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}
        self.parameters = {p.untyped_storage()._cdata for p in graph.parameters()}  # nothing writes to these

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = result
        if isinstance(result, Tensor):
            alike = result.untyped_storage()._cdata in self.parameters
            self.seen[n] = result.detach() if alike else result.detach().clone()
        return result


def node_values(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[fx.Node, Tensor]:
    """What every node of the graph computes on the given inputs, tensors only, in graph order."""
    flat = pytree.tree_leaves((args, dict(kwargs)))
    placeholders = sum(n.op == "placeholder" for n in graph.graph.nodes)
    runner = _Values(graph)
    with torch.no_grad():
        runner.run(*flat[:placeholders], enable_io_processing=False)
    return {n: v for n, v in runner.seen.items() if isinstance(v, Tensor)}


def matching(values: Mapping[fx.Node, Tensor], wanted: Tensor, tolerance: float) -> list[fx.Node]:
    """Nodes whose value holds the same numbers in the same order as `wanted`, the first computed first."""
    target = wanted.double().reshape(-1)
    size = float(target.norm())
    found = []
    for node, value in values.items():
        if value.numel() != target.numel() or value.dtype == torch.bool or value.is_complex():
            continue
        if value.is_floating_point() != wanted.is_floating_point():
            continue
        error = float((value.detach().double().reshape(-1) - target).norm())
        if error <= tolerance * max(size, 1e-30):
            found.append(node)
    return found


def strip_checks(graph: fx.Graph) -> None:
    """Remove the calls that check something and compute nothing, in place."""
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in {"call_function", "call_module"} and not node.users and any(c in name for c in _CHECKS):
            graph.erase_node(node)


def clean(graph: fx.GraphModule) -> None:
    """Remove checks, dead code, and the parameters and buffers that no node reads any more; recompile."""
    strip_checks(graph.graph)
    eliminate_dead_code(graph.graph)
    graph.graph.lint()
    graph.recompile()
    used = {str(n.target) for n in graph.graph.nodes if n.op in {"get_attr", "call_module"}}
    _drop_unused(graph, used)


def _drop_unused(graph: fx.GraphModule, used: Iterable[str]) -> None:
    wanted = tuple(used)

    def needed(name: str) -> bool:
        return any(name == u or name.startswith(f"{u}.") for u in wanted)

    for prefix, module in list(graph.named_modules()):
        for store in (module._parameters, module._buffers):
            for name in list(store):
                if not needed(f"{prefix}.{name}" if prefix else name):
                    del store[name]
    for prefix, module in sorted(graph.named_modules(), key=lambda item: -len(item[0])):
        for name, child in list(module._modules.items()):
            path = f"{prefix}.{name}" if prefix else name
            empty = child is None or not (any(True for _ in child.parameters()) or any(True for _ in child.buffers()))
            if empty and not needed(path) and not any(u.startswith(f"{path}.") for u in wanted):
                del module._modules[name]


def cut_at(graph: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """The graph with `node` as its only output, in place."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((node,),)
    if hasattr(graph.graph._codegen, "pytree_info"):
        info = graph.graph._codegen.pytree_info
        graph.graph._codegen.pytree_info = info._replace(out_spec=pytree.tree_structure(0))
    clean(graph)
    return graph
