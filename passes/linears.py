"""Products with constant matrices in a graph of torch.export: what the fusion passes read and write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

_LINEAR = torch.ops.aten.linear.default
_TO = torch.ops.aten.to.dtype
#: The same numbers in the same order under another shape.
VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


@dataclass(frozen=True)
class Linear:
    """A node `source @ weight.T`: `weight` is the module's parameter [out, in] under the name `target`."""

    node: fx.Node
    source: fx.Node
    target: str
    weight: Tensor


def linear_of(graph_module: fx.GraphModule, node: object) -> Linear | None:
    """What `node` multiplies, if it is a product without bias with a parameter that nothing else reads."""
    if not isinstance(node, fx.Node) or node.target is not _LINEAR or len(node.args) > 2 or node.kwargs:
        return None
    source, weight = (behind(arg) for arg in node.args)
    if source is None or weight is None or weight.op != "get_attr":
        return None
    tensor = attribute(graph_module, str(weight.target))
    readers = [user for user in _readers(graph_module, str(weight.target)) if user is not node]
    if not isinstance(tensor, nn.Parameter) or tensor.dim() != 2 or readers or _shared(graph_module, tensor):
        return None
    return Linear(node, source, str(weight.target), tensor)


def behind(node: object) -> fx.Node | None:
    """The node behind casts and views that change nothing; None for what is no node."""
    while isinstance(node, fx.Node) and is_idle(node):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def is_idle(node: fx.Node) -> bool:
    """Whether a node casts to the dtype, or reshapes to the shape, that its tensor has already."""
    given = value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    result = value(node)
    if given is None or result is None:
        return False
    if node.target is _TO:
        return given.dtype == result.dtype == node.args[1] and len(node.args) == 2
    return node.target in VIEWS and tuple(given.shape) == tuple(result.shape)


def value(node: fx.Node) -> Tensor | None:
    """What a node was captured to give, without its numbers."""
    known = node.meta.get("val")
    return known if isinstance(known, Tensor) else None


def writes_between(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> bool:
    """Whether anything from the first to the last of some nodes writes to memory that it was given."""
    places = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    first, last = min(places[node] for node in nodes), max(places[node] for node in nodes)
    return any(first <= place <= last and _writes(node) for node, place in places.items())


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    return node.op in ("call_module", "call_method") and not str(node.target).startswith("_guards")


def attribute(graph_module: fx.GraphModule, target: str) -> object:
    """What `get_attr` reads under a dotted name; None where nothing is."""
    found: object = graph_module
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def new_parameter(
    graph_module: fx.GraphModule, name: str, tensor: Tensor, before: fx.Node, *, learns: bool
) -> fx.Node:
    """A node before `before` that reads `tensor`, kept as a parameter under `name` with a number.

    `learns` says whether it asks for gradients.
    """
    number = 0
    while hasattr(graph_module, f"{name}_{number}"):
        number += 1
    graph_module.register_parameter(f"{name}_{number}", nn.Parameter(tensor.detach(), learns))
    with graph_module.graph.inserting_before(before):
        return graph_module.graph.get_attr(f"{name}_{number}")


def cleaned(graph_module: fx.GraphModule, replaced: list[str]) -> None:
    """Erase what nothing reads any more, the parameters named in `replaced` included, and compile the graph anew."""
    for node in reversed(graph_module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph_module.graph.erase_node(node)  # of tensors that the graph made itself
    graph_module.graph.eliminate_dead_code()
    for target in replaced:
        owner, _, name = target.rpartition(".")
        if not _readers(graph_module, target):
            delattr(graph_module.get_submodule(owner), name)
    graph_module.graph.lint()
    graph_module.recompile()


def _readers(graph_module: fx.GraphModule, target: str) -> list[fx.Node]:
    """The nodes that read a parameter, behind casts and views that do nothing."""
    readers: list[fx.Node] = []
    waiting = [node for node in graph_module.graph.nodes if node.op == "get_attr" and node.target == target]
    while waiting:
        for user in waiting.pop().users:
            if is_idle(user):
                waiting.append(user)
            elif user.target is not torch.ops.aten._assert_tensor_metadata.default:
                readers.append(user)
    return readers


def _shared(graph_module: fx.GraphModule, tensor: Tensor) -> bool:
    """Whether the module has the same memory under several names."""
    named = list(graph_module.named_parameters(remove_duplicate=False))
    return sum(other.data_ptr() == tensor.data_ptr() for _, other in named if other.numel()) > 1
