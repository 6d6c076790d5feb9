"""Prove a block of a graph by itself: its nodes are cut out, and what entered them becomes the cut's own input.

A graph may be reached with token ids or several tensors only, of which few hidden states can be made. The cut is tried
on the hidden states that the example gave it and on others, as a module of its own would be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from latentize.blocks import Probe
from latentize.passes import trace
from latentize.passes.dead_code import eliminate_dead_code
from latentize.passes.double import dtype_of
from latentize.passes.lift import Binding
from latentize.passes.probes import Inputs, Prober
from latentize.passes.rewrite import sharing_copy
from latentize.passes.scan import ModuleCall
from latentize.passes.shaken import Shaken
from latentize.passes.sites import GraphSite
from latentize.passes.verify import Candidate, verify


@dataclass(frozen=True)
class _Cut:
    """The nodes of a block as a graph of its own; its site there, and the nodes of the whole that became inputs."""

    graph: fx.GraphModule
    site: GraphSite
    inputs: tuple[str, ...]


def verify_cut(
    candidate: Candidate, shaken: Shaken, binding: Binding, inputs: Inputs
) -> tuple[tuple[Probe, ...], str]:
    """Compare a block of a graph with its canonical form on hidden states of every kind.

    Args:
        candidate: a graph site, and the module it is in.
        shaken: copy of the module in fp64 with randomised weights.
        binding: the lift.
        inputs: the call that the module was seen with.
    """
    site, template = candidate.site, candidate.template
    assert isinstance(site, GraphSite)
    whole = _graph(candidate.module, template)
    cut = _cut(whole, site)
    values = trace.node_values(_copied(whole), *_arguments(candidate.module, inputs))
    given = {node.name: value for node, value in values.items()}
    call = ModuleCall("", cut.graph, tuple(given[name] for name in cut.inputs), {})
    region = binding.region
    share = float(region.routed_rows().double().norm()) / max(float(region.output.tensor.double().norm()), 1e-300)
    alone = replace(candidate, module=cut.graph, site=cut.site, share=share, outputs=(0,), template=None)
    part = shaken.part(cut.graph, _cut(_graph(shaken.module, template), site).graph)
    return verify(alone, part, Prober(call, flexible=False))


def _graph(module: nn.Module, template: fx.GraphModule | None) -> fx.GraphModule:
    if template is not None:
        return trace.bound(template, module)
    assert isinstance(module, fx.GraphModule)
    return module


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    copy = sharing_copy(graph)
    assert isinstance(copy, fx.GraphModule)
    return copy


def _arguments(module: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    native = inputs.to(dtype_of(module))
    return native.args, native.kwargs


def _cut(whole: fx.GraphModule, site: GraphSite) -> _Cut:
    """The nodes between a block's inputs and its output; nothing is shared but parameters and buffers."""
    graph = _copied(whole)
    nodes = {node.name: node for node in graph.graph.nodes}
    first = next(iter(graph.graph.nodes))
    entered = dict.fromkeys((site.hidden, site.router_hidden, *site.rest))
    fresh: dict[str, fx.Node] = {}
    for name in entered:
        with graph.graph.inserting_before(first):
            fresh[name] = graph.graph.placeholder(f"cut_{len(fresh)}")
        nodes[name].replace_all_uses_with(fresh[name])
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    output.args = (nodes[site.output],)
    graph.graph.set_codegen(fx.graph.CodeGen())
    trace.strip_checks(graph.graph)
    eliminate_dead_code(graph.graph)
    names = {node.name: name for name, node in fresh.items()}
    inputs = []
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.graph.erase_node(node)
        elif node.op == "placeholder":
            inputs.append(names.get(node.name, node.name))
    graph.graph.lint()
    graph.recompile()
    renamed = replace(
        site, path=None, hidden=fresh[site.hidden].name, router_hidden=fresh[site.router_hidden].name,
        rest=tuple(fresh[name].name for name in site.rest), logits="", example=None, experts=0,
    )  # fmt: skip
    return _Cut(graph, renamed, tuple(inputs))
