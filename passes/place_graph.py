"""Find a lifted region's nodes in a graph of its module, by the values they compute."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from latentize.passes import trace
from latentize.passes.all_hit import assumptions
from latentize.passes.double import evaluating, in_fp64
from latentize.passes.fixed import fixed_arguments
from latentize.passes.lift import Binding
from latentize.passes.probes import Inputs
from latentize.passes.rewrite import encode_example, sharing_copy
from latentize.passes.sites import GraphSite, PartsSite, Site

#: Relative difference between a node's value and the recorded one; casts to fp32 inside a module cost it that much.
CLOSE = 1e-6


def capture_at(module: nn.Module, inputs: Inputs, experts: int = 0) -> fx.GraphModule:
    """A graph of a module, captured in its own dtype; `experts` as in `trace.capture`.

    Raises:
        CaptureError: the module cannot be captured.
    """
    native = inputs.to(None)
    return trace.capture(evaluating(sharing_copy(module)), native.args, native.kwargs, experts)


def graph_site(
    template: fx.GraphModule | None,
    randomised: nn.Module,
    inputs: Inputs,
    binding: Binding,
    experts: int = 0,
) -> GraphSite | None:
    """The nodes of the routed region in the graph of a module, or None when they cannot be told.

    Args:
        template: the graph captured from the module; None when the module is a graph itself.
        randomised: the fp64 copy that the lift was made on.
        inputs: the inputs that the lift was made on.
        binding: the lift.
        experts: number of experts that were all taken to be hit when the graph was captured; 0: none were.
    """
    if template is None:
        assert isinstance(randomised, fx.GraphModule)
        copied = sharing_copy(randomised)
        assert isinstance(copied, fx.GraphModule)
        captured = copied
    else:
        captured = trace.bound(template, randomised)
    assumed = assumptions(captured.graph) if experts else []
    trace.strip_checks(captured.graph)
    captured.recompile()
    with in_fp64():
        values = trace.node_values(captured, *_fresh(inputs))
    region = binding.region
    first = region.hidden_channels_first
    hidden = _nodes(values, region.hidden.tensor)
    seen = _nodes(values, region.head.projection.activation.tensor)
    output = _nodes(values, region.output.tensor)
    pair = _pair(values, hidden, output, region.width, channels_first=first)
    seen = [n for n in seen if values[n].shape[1 if first else -1] == region.head.router_input_rows().shape[1]]
    if pair is None or not seen:
        return None
    rest = [_nodes(values, term.tensor) for term in region.rest]
    if not all(rest):
        return None
    shape = values[pair[1]].shape
    terms = [next((n for n in nodes if _adds_to(values[n].shape, shape)), None) for nodes in rest]
    if any(t is None for t in terms):
        return None
    router = pair[0] if not binding.separate_router_input else seen[0]
    decided = _nodes(values, region.head.logits.tensor)
    if not all(_between(decided, node, pair[1]) for node in assumed):
        return None
    native = inputs.to(None)
    return GraphSite(
        None if template is None else "",
        pair[0].name,
        router.name,
        pair[1].name,
        tuple(t.name for t in terms if t is not None),
        _output_logits(decided),
        first,
        encode_example(native.args, native.kwargs),
        experts,
        () if template is None else fixed_arguments(region.head.recording.frames[0]),
    )


def _between(start: list[fx.Node], node: fx.Node, end: fx.Node) -> bool:
    """Whether a node depends on one of `start` and `end` is not among what it depends on."""
    seen, stack = {node}, [node]
    while stack:
        fresh = [n for n in stack.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return end not in seen and any(n in seen for n in start)


def finish_prefix(site: Site, randomised: nn.Module, binding: Binding) -> Site:
    """The site with the node named at which its router's own work on its input ends.

    Raises:
        CaptureError: the router cannot be captured.
    """
    if not isinstance(site, PartsSite) or not site.router.prefix:
        return site
    frame = next(f for f in binding.region.head.recording.frames if f.path == site.router.path)
    given = next(a for a in pytree.tree_leaves((frame.args, frame.kwargs)) if isinstance(a, Tensor))
    captured = trace.capture(randomised.get_submodule(site.router.path), (given.detach().clone(),), {})
    with in_fp64():
        values = trace.node_values(captured, (given.detach().clone(),), {})
    nodes = _nodes(values, binding.region.head.projection.activation.tensor)
    if not nodes:
        raise trace.CaptureError("the router's input is not found in its graph")
    return replace(site, router=replace(site.router, prefix=(nodes[0].name, str(given.dim()))))


def _fresh(inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    double = inputs.to(torch.float64)
    return double.args, double.kwargs


def _nodes(values: dict[fx.Node, Tensor], wanted: Tensor) -> list[fx.Node]:
    return trace.matching(values, wanted, CLOSE)


def _pair(
    values: dict[fx.Node, Tensor], hidden: list[fx.Node], output: list[fx.Node], width: int, *, channels_first: bool
) -> tuple[fx.Node, fx.Node] | None:
    """Hidden states and routed output of one shape, the last one computed first, so that all that uses it is caught."""
    axis = 1 if channels_first else -1
    for out in output:
        for entered in hidden:
            shape = values[entered].shape
            if shape == values[out].shape and len(shape) >= 2 and shape[axis] == width:
                return entered, out
    return None


def _adds_to(term: torch.Size, shape: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(term, shape) == shape)
    except RuntimeError:
        return False


def _output_logits(nodes: list[fx.Node]) -> str:
    """The node among `nodes` that the graph returns, if any."""
    for node in nodes:
        if any(user.op == "output" for user in node.users):
            return node.name
    return ""
