"""Models that read their parameters in fp64 compute what copies in fp64 compute, and hold few of them in it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small_moe import Moe
from torch import nn

from latentize.passes.double import in_double
from latentize.passes.find import find_blocks
from latentize.passes.probes import Inputs
from latentize.passes.trace import capture
from latentize.passes.verify import run_double
from latentize.passes.widened import Widened


class Normed(nn.Module):
    """A tied projection, a buffer, a cast to fp32 and experts in a loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.moe, self.norm = nn.Linear(16, 16), Moe(), nn.LayerNorm(16)
        self.outer = nn.Linear(16, 16)
        self.outer.weight = self.inner.weight
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.outer(self.norm(x + self.moe(self.inner(x))).float()) + self.shift
        return result


class Listed(nn.Module):
    """A block behind layers that hold their parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.moe = nn.Linear(16, 16), nn.Linear(16, 16), Moe()
        self.weights = [self.first.weight, self.second.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for weight in self.weights:
            hidden = hidden @ weight.T
        result: torch.Tensor = x + self.moe(hidden)
        return result


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
GIVEN = Inputs("", (X,), {})


def test_it_computes_what_a_copy_in_fp64_computes() -> None:
    model = Normed().eval()
    (found,), (wanted,) = (run_double(m, GIVEN) for m in (Widened().copy(model), in_double(model)))
    assert found.dtype == torch.float64
    assert torch.equal(found, wanted)
    assert float((model(X).detach() - wanted).norm()) > 1e-9  # which fp32 does not


def test_captured_graphs_are_read_in_fp64_too() -> None:
    graph = capture(nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 4)).eval(), (X,), {})
    (found,), (wanted,) = (run_double(m, GIVEN) for m in (Widened().copy(graph), in_double(graph)))
    assert torch.equal(found, wanted)


def test_the_model_keeps_its_parameters_buffers_and_mode() -> None:
    model = Normed().train()
    copy = Widened().copy(model)
    run_double(copy, GIVEN)
    assert model.training
    assert not copy.training
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float32}
    assert all(one is other for one, other in zip(model.parameters(), copy.parameters(), strict=True))


def test_few_parameters_are_held_in_fp64() -> None:
    widened = Widened()
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(12))).eval()
    read: list[weakref.ref[torch.Tensor]] = []
    whole = widened.read

    def watched(parameter: torch.Tensor) -> torch.Tensor:
        read.append(weakref.ref(whole(parameter)))
        return whole(parameter)

    widened.read = watched  # type: ignore[method-assign]
    run_double(widened.copy(model), GIVEN)
    gc.collect()
    assert len(read) == 12
    assert sum(tensor() is not None for tensor in read) == Widened.KEPT


def test_a_module_that_cannot_be_read_so_is_compared_on_copies() -> None:
    model = Listed().eval()
    with pytest.raises(RuntimeError, match="dtype"):
        run_double(Widened().copy(model), GIVEN)
    (found,) = find_blocks(model, (X,))
    assert (found.block.status, found.block.reason) == ("moe", "")


def test_a_model_is_compared_without_a_copy_of_it_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_model: nn.Module) -> nn.Module:
        raise AssertionError("copied")

    monkeypatch.setattr("latentize.passes.together.in_double", refused)
    (found,) = find_blocks(Normed().eval(), (X,))
    assert (found.block.status, found.block.reason) == ("moe", "")
