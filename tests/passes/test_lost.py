"""What code in and around the blocks does beside computing: it stays as it was, or `convert` says that it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from codings_base import swiglu_loop
from torch import Tensor, nn

import latentize
from latentize.errors import LatentizeError
from latentize.passes.averaged import Averaged
from latentize.passes.siblings import multiplied, renumbered
from latentize.reference import moe_forward
from latentize.spec import Groups

D, N, M, K = 16, 4, 24, 2
X = torch.randn(2, 20, D, generator=torch.Generator().manual_seed(0))
MORE = ("acc", "eff")


class Moe(nn.Module):
    """Returns (hidden states, selected experts)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(N, M, D) * D**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(N, D, M) * M**-0.5)
        self.register_buffer("load", torch.zeros(N))
        self.tilt = nn.Linear(D, N, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.router(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, D)
        weights, chosen = self.logits(flat).softmax(-1).topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        self.note(chosen)
        return swiglu_loop(flat, weights, chosen, self.gate, self.up, self.down).view(x.shape), chosen

    def note(self, chosen: Tensor) -> None:
        pass


class CountsWhenTrained(Moe):
    def note(self, chosen: Tensor) -> None:
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=N)


class CountsInAnotherBuffer(Moe):
    def note(self, chosen: Tensor) -> None:
        if self.training:
            self.load = self.load + torch.bincount(chosen.flatten(), minlength=N)


class CountsAlways(Moe):
    def note(self, chosen: Tensor) -> None:
        self.load += torch.bincount(chosen.flatten(), minlength=N)


class KeepsItsLoss(Moe):
    def note(self, chosen: Tensor) -> None:
        if self.training:
            self.loss = F.one_hot(chosen, N).float().mean((0, 1)).square().sum()


class TiltedWhenTrained(Moe):
    def logits(self, x: Tensor) -> Tensor:
        return self.router(x) + (self.tilt(x) if self.training else 0)


class NoisyWhenTrained(Moe):
    def logits(self, x: Tensor) -> Tensor:
        return self.router(x * torch.empty_like(x).uniform_(0.9, 1.1) if self.training else x)


class Net(nn.Module):
    def __init__(self, moe: type[Moe] = Moe) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.moe, self.head = nn.LayerNorm(D), moe(), nn.Linear(D, D)
        self.register_buffer("count", torch.zeros(N))

    def forward(self, x: Tensor) -> Any:
        out, chosen = self.moe(self.norm(x))
        return self.end(x, out, chosen)

    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        return self.head(x + out)


def first(chosen: Tensor) -> Tensor:
    return torch.bincount(chosen.flatten(), minlength=N)[:N]


class Returned(Net):
    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        return {"out": self.head(x + out), "load": first(chosen)}


class Counted(Net):
    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        self.count[:N] += first(chosen)
        return self.head(x + out)


class Kept(Net):
    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        self.loads = [int((chosen == e).sum()) for e in range(N)]
        return self.head(x + out)


class CountedWhenTrained(Net):
    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        if self.training:
            self.count += first(chosen)
        return self.head(x + out)


class BreaksWhenTrained(Net):
    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        if self.training:
            self.count += torch.bincount(chosen.flatten(), minlength=N)
        return self.head(x + out)


class Decides(Net):
    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        load = first(chosen)
        return self.head(x + out * (load.max() / load.sum()))


class All(Net):
    """Counts whatever experts there are, and keeps what does not depend on their number."""

    def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
        self.seen = chosen.shape[0]
        load = torch.bincount(chosen.flatten(), minlength=1)
        return {"out": self.head(x + out), "load": load, "chosen": chosen}


class WithDropoutBeside(nn.Module):
    """A model that is one module, whose dropout goes where it becomes a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.beside = Moe(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.inner.router(flat).softmax(-1).topk(K, -1)
        out = torch.zeros_like(flat)
        for e in range(N):
            row, slot = torch.where(chosen == e)
            h = F.silu(flat[row] @ self.inner.gate[e].T) * (flat[row] @ self.inner.up[e].T)
            out.index_add_(0, row, (h @ self.inner.down[e].T) * weights[row, slot, None])
        return out.view(x.shape) + F.dropout(self.beside(x), 0.2, self.training)


def warnings_of(model: nn.Module, variant: str = "acc") -> list[str]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = latentize.Recipe(compression=2, variant=variant, heal_steps=0)
    result = latentize.convert(model.eval(), args=(X,), recipe=recipe)
    assert [block.status for block in result.blocks] == ["moe"]
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    return [line for line in result.warnings if "no calibration data" not in line]


@pytest.mark.parametrize("variant", MORE)
@pytest.mark.parametrize(
    ("case", "what"),
    [(Returned, "the model's output['load']"), (Counted, "buffer 'count'"), (Kept, "attribute 'loads'")],
)
def test_numbers_that_count_on_the_number_of_experts_are_named(case: type[Net], what: str, variant: str) -> None:
    (line,) = warnings_of(case(), variant)
    assert line.startswith(f"{what} is computed by code that counts on the number of experts")
    assert warnings_of(case(), "fixed") == []


@pytest.mark.parametrize("variant", MORE)
def test_counts_of_training_mode_are_named_before_anyone_trains(variant: str) -> None:
    (line,) = warnings_of(CountedWhenTrained(), variant)
    assert line.startswith("in training mode buffer 'count' is computed by code that counts on the number of experts")
    (line,) = warnings_of(BreaksWhenTrained(), variant)
    assert line.startswith("in training mode the rewritten model does not run: RuntimeError: The size of tensor")
    assert warnings_of(BreaksWhenTrained(), "fixed") == []


@pytest.mark.parametrize("variant", MORE)
def test_an_output_that_would_be_another_function_is_refused(variant: str) -> None:
    model = Decides()
    with pytest.raises(LatentizeError, match="the model's output depends on how many experts there are"):
        warnings_of(model, variant)
    assert warnings_of(model, "fixed") == []


def test_numbers_that_grow_with_the_experts_are_none_to_be_told() -> None:
    assert warnings_of(All()) == []


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        (Moe, []),
        (CountsWhenTrained, ["moe: in training mode its forward changes moe.load; rewritten, it does not"]),
        (CountsInAnotherBuffer, ["moe: in training mode its forward changes moe.load; rewritten, it does not"]),
        (CountsAlways, ["moe: its forward changes moe.load; rewritten, it does not"]),
        (KeepsItsLoss, ["moe: in training mode its forward changes moe.loss; rewritten, it does not"]),
        (
            NoisyWhenTrained,
            ["moe: in training mode it draws random numbers (uniform); rewritten, it has no dropout or noise"],
        ),
    ],
)
def test_what_the_block_does_when_it_is_trained_is_named(case: type[Moe], lines: list[str]) -> None:
    assert warnings_of(Net(case), "fixed") == lines
    assert warnings_of(Net(case), "acc") == lines


def test_another_function_in_training_mode_is_named_with_its_parameters_and_error() -> None:
    (line,) = warnings_of(Net(TiltedWhenTrained))
    assert line.startswith("moe: in training mode it reads moe.tilt.weight (its output differs by ")
    assert line.endswith("rewritten, it computes in both modes what it does in evaluation")


def test_dropout_beside_the_routed_path_is_named_where_its_module_becomes_a_graph() -> None:
    (line,) = warnings_of(WithDropoutBeside())
    assert line.startswith(".: in training mode it draws random numbers (bernoulli)")
    assert line.endswith("rewritten, it has no dropout or noise around its routed path")


def test_what_surrounds_the_block_keeps_its_mode() -> None:
    class Outside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def end(self, x: Tensor, out: Tensor, chosen: Tensor) -> Any:
            if self.training:
                self.calls += 1
            return self.head(x + F.dropout(out, 0.5, self.training))

    model = Outside().eval()
    result = latentize.convert(model, args=(X,), recipe=latentize.Recipe(compression=2, heal_steps=0))
    assert [line for line in result.warnings if "no calibration data" not in line] == []
    converted = result.model
    assert torch.equal(converted(X), converted(X))
    converted.train()
    assert not torch.equal(converted(X), converted(X))
    assert int(converted.calls) == 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.3),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout1d(x, 0.3),
        lambda x: x + torch.empty_like(x).normal_(),
        lambda x: x + torch.empty_like(x).normal_(1.0, 2.0) - 1,
        lambda x: x * torch.empty_like(x).uniform_(0.9, 1.1),
        lambda x: x * torch.rand_like(x) * 2,
        lambda x: x + torch.randn_like(x),
        lambda x: x + torch.normal(0.0, 1.0, x.shape),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)) * 2,
        lambda x: x * torch.empty_like(x).exponential_(2.0) * 2,
    ],
)
def test_random_numbers_are_their_mean(draw: Any) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Averaged({}) as watch:
        found = draw(x)
    torch.testing.assert_close(found, x)
    assert len(watch.drawn) == 1


@pytest.mark.parametrize("groups", [None, Groups(2, 1)])
def test_renumbered_children_compute_the_same_with_other_numbers(groups: Groups | None) -> None:
    spec = latentize.inspect(Net().eval(), args=(X,))[0].spec
    assert spec is not None
    spec = spec.to(torch.float64)
    spec = replace(spec, router=replace(spec.router, groups=groups))
    flat = X.reshape(-1, D).double()
    with torch.no_grad():
        wanted = moe_forward(spec, flat)
        for factor in (2, 3):
            plain, other = multiplied(spec, factor), renumbered(spec, factor)
            torch.testing.assert_close(other(flat), wanted)
            counts = [torch.bincount(b.router(flat).indices.flatten(), minlength=factor * N) for b in (plain, other)]
            assert torch.equal(*(count.sort().values for count in counts))
            assert not torch.equal(counts[0][:N], counts[1][:N])


@dataclass
class Secret:
    """Sizes that may be kept and not be read."""

    experts: int = N

    def __getattribute__(self, name: str) -> Any:
        if name == "experts":
            raise RuntimeError("ask a layer")
        return super().__getattribute__(name)


class Guarded(Moe):
    """A block beside which lies what cannot be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = Secret()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count = getattr(self, "count", 0) + 1
        return super().forward(x)


def test_an_object_that_is_not_to_be_read_is_left_alone() -> None:
    result = latentize.convert(Guarded().eval(), (X,), recipe=latentize.Recipe(heal_steps=0))
    assert result.rewritten
    assert not [line for line in result.warnings if "was not seen" in line]


def test_what_cannot_be_looked_at_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise RuntimeError("an object of the model's own")

    monkeypatch.setattr("latentize.passes.lost_in_training", fails)
    result = latentize.convert(Moe().eval(), (X,), recipe=latentize.Recipe(heal_steps=0))
    assert result.rewritten
    (line,) = [line for line in result.warnings if "was not seen" in line]
    assert line.endswith("an object of the model's own")
