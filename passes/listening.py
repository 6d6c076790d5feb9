"""A copy of a model in which everything that a shared expert is known by runs as a module, so that hooks reach it.

Submodules do already. In captured graphs products with a parameter, sums and what the routed experts read become
modules here; nothing that is computed changes.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from latentize.moe import LatentExperts
from latentize.passes.linears import attribute
from latentize.passes.rewrite import sharing_copy

_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.add, operator.add, operator.iadd)
#: What `rewrite.splice` puts between the hidden states of a graph and the experts.
_VIEWS = ("flatten", "unsqueeze", "movedim")


class Product(nn.Module):
    """A product with a parameter, out of a graph."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return F.linear(x, self.weight, self.bias)


def listening(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the model's parameters and buffers. The same graphs give the same names."""
    copied = sharing_copy(model)
    for module in list(copied.modules()):
        if isinstance(module, fx.GraphModule):
            _open(module)
    for module in copied.modules():
        module.training = False
    return copied


def without_gradients(model: nn.Module) -> nn.Module:
    """The copy itself, its parameters exchanged for others of the same memory that ask for no gradients."""
    fixed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if type(parameter) is nn.Parameter and parameter.requires_grad:
                key = id(parameter)
                if key not in fixed:
                    fixed[key] = nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[name] = fixed[key]
    return model


def _open(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default:
            _open_product(graph, node)
        elif node.op == "call_function" and node.target in _SUMS:
            _pass_through(graph, node, f"sum_{node.name}")
        elif node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), LatentExperts):
            source = node.args[0]
            while isinstance(source, fx.Node) and source.op == "call_method" and source.target in _VIEWS:
                source = source.args[0]
            if isinstance(source, fx.Node):
                _pass_through(graph, source, f"hidden_{node.name}")
    graph.graph.lint()
    graph.recompile()


def _open_product(graph: fx.GraphModule, node: fx.Node) -> None:
    held: list[object] = [
        attribute(graph, str(a.target)) if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args
    ]
    weight, bias = held[1], held[2] if len(held) > 2 else None
    if node.kwargs or not isinstance(weight, nn.Parameter) or not (bias is None or isinstance(bias, nn.Parameter)):
        return
    name = _add(graph, f"product_{node.name}", Product(weight, bias))
    with graph.graph.inserting_before(node):
        node.replace_all_uses_with(graph.graph.call_module(name, (node.args[0],)))
    graph.graph.erase_node(node)


def _pass_through(graph: fx.GraphModule, node: fx.Node, name: str) -> None:
    after = node
    while node.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with graph.graph.inserting_after(after):
        passed = graph.graph.call_module(_add(graph, name, nn.Identity()), (node,))
    node.replace_all_uses_with(passed, delete_user_cb=lambda user: user is not passed)


def _add(graph: fx.GraphModule, name: str, module: nn.Module) -> str:
    full = f"latentize_{name}"
    while hasattr(graph, full):
        full += "_"
    graph.add_submodule(full, module)
    return full
