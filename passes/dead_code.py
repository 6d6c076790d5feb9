"""Remove what a graph computes in vain, in-place writes included: a replaced loop over experts would else still run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Argument, fx
from torch._ops import OpOverload

#: Nodes that stay whatever reads them.
_KEPT = {"placeholder", "output"}


def eliminate_dead_code(graph: fx.Graph) -> bool:
    """Erase the nodes of `graph` that no output depends on, and say whether there were any.

    torch.fx keeps every in-place write, as it cannot see what the write is for. Here a write stays only when it reaches
    something that stays: a tensor from outside the graph, a node with another effect, or a reader of the same memory.
    Calls of methods, modules and functions outside ATen may do anything: torch.fx's word is taken for them.
    """
    memory = _memory(graph)
    sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, roots in memory.items():
        for root in roots:
            sharing[root].append(node)
    outside = {n for n in graph.nodes if n.op in {"placeholder", "get_attr"}}
    live = _reaching([n for n in graph.nodes if _has_effect(n, memory, outside)], memory, sharing)
    dead = [node for node in reversed(graph.nodes) if node not in live and node.op not in _KEPT]
    for node in dead:
        graph.erase_node(node)
    return bool(dead)


def _reaching(
    start: list[fx.Node], memory: dict[fx.Node, set[fx.Node]], sharing: dict[fx.Node, list[fx.Node]]
) -> set[fx.Node]:
    """The nodes that those in `start` depend on, through arguments or through writes to memory that they read."""
    live, stack = set(start), list(start)
    while stack:
        node = stack.pop()
        writers = [w for root in memory[node] for w in sharing[root] if _writes(w)]
        for needed in [*node.all_input_nodes, *writers]:
            if needed not in live:
                live.add(needed)
                stack.append(needed)
    return live


def _has_effect(node: fx.Node, memory: dict[fx.Node, set[fx.Node]], outside: set[fx.Node]) -> bool:
    if node.op in _KEPT:
        return True
    if not isinstance(node.target, OpOverload):
        return node.is_impure() or (node.op == "call_method" and str(node.target).endswith("_"))
    written = {root for target in _written(node) for root in memory[target]}
    if written:
        return bool(written & outside)
    return node.is_impure() and not _writes(node)


def _memory(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node the nodes whose memory its result may share; outside ATen it may share any argument's."""
    memory: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        roots = {root for source in _aliased(node) for root in memory[source]}
        memory[node] = roots or {node}
    return memory


def _aliased(node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes if node.op != "output" else []
    return [source for source, argument in _arguments(node) if argument.alias_info is not None]


def _written(node: fx.Node) -> list[fx.Node]:
    return [s for s, argument in _arguments(node) if argument.alias_info is not None and argument.alias_info.is_write]


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(_written(node))


def _arguments(node: fx.Node) -> Iterator[tuple[fx.Node, Argument]]:
    """Pairs of a node and the schema argument that it, or the list it stands in, is given for."""
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for source in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(source, fx.Node):
                yield source, argument
