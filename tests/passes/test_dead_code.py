"""In-place writes are removed when nobody can see them, and kept when somebody can."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from latentize.passes.dead_code import eliminate_dead_code


class _Loop(nn.Module):
    """A sum over rows that is written in place, `write` deciding where, beside a plain result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(x)
        for column in range(2):
            row = torch.where(x[:, column] > 0)[0]
            out.index_add_(0, row, x[row] @ self.weight)
        return out, x * 2


class _Counts(_Loop):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count.add_(1)
        return super().forward(x)


class _Views(_Loop):
    """What is returned is read through another view than what is written."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(x)
        out.view(-1)[: x.shape[1]].add_(1)
        return x + 1, out.t()


def exported(module: nn.Module, keep: int | None = None) -> fx.GraphModule:
    """The module as a graph; with `keep`, the other result is replaced by the input, so that nothing needs it."""
    example = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    graph_module = torch.export.export(module, (example,), dynamic_shapes=({0: Dim.AUTO},), strict=False).module()
    for node in list(graph_module.graph.nodes):
        if "assert" in str(node.target) or "_guards" in str(node.target):
            graph_module.graph.erase_node(node)
    if keep is not None:
        output = next(n for n in graph_module.graph.nodes if n.op == "output")
        dead = output.args[0][1 - keep]
        given = next(n for n in graph_module.graph.nodes if n.op == "placeholder")
        output.replace_input_with(dead, given)
    graph_module.recompile()
    return graph_module


def operators(graph_module: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"}


def test_writes_that_nothing_reads_are_removed_with_what_they_need() -> None:
    graph_module = exported(_Loop(), keep=1)
    x = torch.randn(9, 4)
    graph_module.graph.eliminate_dead_code()
    assert "aten.index_add_.default" in operators(graph_module), "torch.fx alone removes it now: drop this room"
    assert eliminate_dead_code(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    assert operators(graph_module) == {"aten.mul.Tensor"}
    assert torch.equal(graph_module(x)[1], x * 2)


def test_writes_that_are_returned_stay() -> None:
    graph_module, x = exported(_Loop(), keep=0), torch.randn(9, 4)
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
    assert "aten.mul.Tensor" not in operators(graph_module)
    assert torch.equal(graph_module(x)[0], _Loop()(x)[0])


def test_writes_to_buffers_stay_though_nothing_reads_them() -> None:
    graph_module = exported(_Counts(), keep=1)
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
    graph_module(torch.randn(9, 4))
    assert graph_module.count.item() == 1
    assert "aten.index_add_.default" not in operators(graph_module)


def test_writes_through_one_view_stay_when_another_is_read() -> None:
    graph_module, x = exported(_Views()), torch.randn(9, 4)
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
    ours, expected = graph_module(x), _Views()(x)
    assert torch.equal(ours[1], expected[1])
    assert expected[1].sum() == x.shape[1]


def test_a_graph_without_dead_code_is_left_alone() -> None:
    graph_module = exported(_Loop())
    eliminate_dead_code(graph_module.graph)
    before = [n.name for n in graph_module.graph.nodes]
    assert not eliminate_dead_code(graph_module.graph)
    assert [n.name for n in graph_module.graph.nodes] == before


def test_methods_that_write_in_symbolic_traces_stay() -> None:
    class Method(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y.mul_(2)
            return y

    graph_module = fx.symbolic_trace(Method())
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
    assert torch.equal(graph_module(torch.ones(2)), torch.full((2,), 4.0))
