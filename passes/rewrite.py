"""Put `LatentMoE` blocks in their places. Everything else is shared with the model that came in, or stays in place."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from latentize.errors import LatentizeError
from latentize.moe import LatentMoE
from latentize.passes import trace
from latentize.passes.boundaries import join, put, put_parts, put_whole
from latentize.passes.copying import deep_copy
from latentize.passes.sites import Fixed, GraphSite, PartsSite, Site, WholeSite, check_fixed


def replace_at(
    model: nn.Module,
    sites: Mapping[str, Site],
    modules: Mapping[str, LatentMoE],
    *,
    templates: Mapping[str, fx.GraphModule] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """The model with each named block replaced.

    Args:
        model: what to rewrite; left as it is unless `inplace`.
        sites: where each block sits, by block name.
        modules: what to put there, by block name; names without a site are an error.
        templates: graphs captured from the modules of graph sites already, by block name; captured anew where missing.
        inplace: rewrite `model` itself. A model that is one block is still returned anew.

    Returns:
        The rewritten model; parameters and buffers outside the blocks are the model's own.
    """
    if not modules:
        return model
    result = model if inplace else sharing_copy(model)
    graphs: dict[str, fx.GraphModule] = {}  # modules that became graphs here: further blocks go into the same one
    for number, (name, moe) in enumerate(modules.items()):
        site = sites[name]
        if isinstance(site, PartsSite):
            put_parts(result, site, moe, _prefix(result, site, moe))
        elif isinstance(site, WholeSite):
            result = put_whole(result, site, moe)
        elif site.path is None:
            assert isinstance(result, fx.GraphModule)
            splice(result, site, moe, number)
        else:
            known = graphs.get(site.path)
            if known is not None:
                splice(known, site, moe, number)
                continue
            module, template = _get(result, site.path), (templates or {}).get(name)
            captured = _capture(module, site) if template is None else trace.bound(template, module)
            splice(captured, site, moe, number)
            captured.training = module.training
            result, graphs[site.path] = put(result, site.path, captured), captured
            if site.fixed:
                _hold(captured, site.fixed)
    if isinstance(result, fx.GraphModule):
        trace.clean(result)
    return result


@dataclass(frozen=True)
class _Fixed:
    """A hook of a captured module: its graph holds for the numbers, words and Nones that it was captured with."""

    fixed: tuple[Fixed, ...]

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_fixed(self.fixed, args, kwargs, "a module with an MoE block")


def _hold(graph: fx.GraphModule, fixed: tuple[Fixed, ...]) -> None:
    """Hold a captured module, and copies of it, which lose the hooks of a graph, to the values of its arguments."""

    def copied(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
        made: fx.GraphModule = fx.GraphModule.__deepcopy__(self, memo)
        _hold(made, fixed)
        return made

    graph.register_forward_pre_hook(_Fixed(fixed), with_kwargs=True, prepend=True)
    type(graph).__deepcopy__ = copied  # type: ignore[method-assign]  # every graph has a class of its own


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules that shares its parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return deep_copy(model, memo)


def _get(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _prefix(model: nn.Module, site: PartsSite, moe: LatentMoE) -> nn.Module | None:
    """What the original router does to its input before its weight, as a graph."""
    if not site.router.prefix:
        return None
    original = _get(model, join(site.path, site.router.path))
    node, rank = site.router.prefix
    assert moe.router.weight is not None
    example = moe.router.weight.detach().new_ones((2,) * (int(rank) - 1) + (moe.router.weight.shape[1],))
    graph = trace.capture(original, (example,), {})
    return trace.cut_at(graph, next(n for n in graph.graph.nodes if n.name == node))


def encode_example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Arguments as JSON: tensors by shape and dtype. None when something else than plain constants is among them."""

    def encode(item: Any) -> Any:
        if isinstance(item, Tensor):
            return {"shape": list(item.shape), "dtype": str(item.dtype).removeprefix("torch.")}
        if item is None or isinstance(item, (bool, int, float, str)):
            return {"constant": item}
        raise TypeError

    try:
        return [[encode(a) for a in args], {k: encode(v) for k, v in kwargs.items()}]
    except TypeError:
        return None


def _capture(module: nn.Module, site: GraphSite) -> fx.GraphModule:
    if site.example is None:
        raise LatentizeError(
            f"block {site.path!r}: its arguments cannot be stored, so its graph cannot be rebuilt; "
            "load with model=... the original model converted again"
        )
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))

    def decode(item: Any) -> Any:
        if "constant" in item:
            return item["constant"]
        dtype = getattr(torch, item["dtype"])
        return torch.ones(item["shape"], dtype=like.dtype if dtype.is_floating_point else dtype, device=like.device)

    args, kwargs = site.example
    training = module.training
    module.eval()
    values = tuple(decode(a) for a in args), {k: decode(v) for k, v in kwargs.items()}
    graph = trace.capture(module, *values, site.experts)
    module.train(training)
    return graph


def splice(graph: fx.GraphModule, site: GraphSite, moe: LatentMoE, number: int) -> None:
    """Replace the nodes of a block in a graph, in place, by calls of the block's router and experts."""
    nodes = {n.name: n for n in graph.graph.nodes}
    missing = [n for n in (site.hidden, site.router_hidden, site.output, *site.rest) if n not in nodes]
    if missing:
        raise LatentizeError(
            f"graph node {missing[0]!r} of block {site.path or site.output!r} is not there: is this the same model?"
        )
    name = f"latent_moe_{number}"
    while hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, moe)
    output = nodes[site.output]
    with graph.graph.inserting_before(output):
        new, routing = _calls(graph.graph, site, nodes, name)
        output.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if site.logits:
        _swap_logits(graph.graph, nodes[site.logits], routing, channels_first=site.channels_first)
    trace.clean(graph)


def _calls(graph: fx.Graph, site: GraphSite, nodes: Mapping[str, fx.Node], name: str) -> tuple[fx.Node, fx.Node]:
    hidden, seen = nodes[site.hidden], nodes[site.router_hidden]

    def last(node: fx.Node) -> fx.Node:
        return graph.call_method("movedim", (node, 1, -1)) if site.channels_first else node

    def flat(node: fx.Node) -> fx.Node:
        return graph.call_method("flatten", (graph.call_method("unsqueeze", (node, 0)), 0, -2))

    wide = last(hidden)
    routing = graph.call_module(f"{name}.router", (flat(wide if seen is hidden else last(seen)),))
    weights = graph.call_function(operator.getitem, (routing, 1))
    indices = graph.call_function(operator.getitem, (routing, 2))
    routed = graph.call_module(f"{name}.experts", (flat(wide), indices, weights))
    result = graph.call_method("view_as", (routed, wide))
    if site.channels_first:
        result = graph.call_method("movedim", (result, -1, 1))
    for term in site.rest:
        result = graph.call_function(torch.add, (result, nodes[term]))
    return result, routing


def _swap_logits(graph: fx.Graph, logits: fx.Node, routing: fx.Node, *, channels_first: bool) -> None:
    """Let outputs that are the router's logits be the new router's, in the shape that the old ones had."""
    users = [user for user in logits.users if user.op == "output"]
    (output,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        old = graph.call_method("movedim", (logits, 1, -1)) if channels_first else logits
        shape = graph.call_function(getattr, (old, "shape"))
        leading = graph.call_function(operator.getitem, (shape, slice(None, -1)))
        fresh = graph.call_function(operator.getitem, (routing, 0))
        fresh = graph.call_method("unflatten", (fresh, 0, leading))
        fresh = graph.call_method("movedim", (fresh, -1, 1)) if channels_first else fresh
    for user in users:
        user.replace_input_with(logits, fresh)
