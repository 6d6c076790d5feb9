"""The tokens of a sample as a block reads them in a changed model; and what a start makes of that."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from latentize import conversion
from latentize.moe import LatentMoE
from latentize.recipe import Recipe
from latentize.reread import reread
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec
from latentize.statistics import collect

D, M, N, K = 12, 8, 4, 2


def spec(seed: int) -> MoESpec:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    return MoESpec(RouterSpec(random(N, D), K, normalize="sum"), ExpertsSpec(random(N, M, D), random(N, D, M)))


class Net(nn.Module):
    """Its blocks run in the order of their numbers, backwards from how they are named."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.moes = nn.ModuleList(LatentMoE(spec(i)) for i in range(count))
        self.scale = 1.0

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        x = x * self.scale
        for moe in [*reversed(self.moes)] * repeat:
            x = x + moe(x)
        return x

    @property
    def named(self) -> dict[str, LatentMoE]:
        return {f"moes.{i}": moe for i, moe in enumerate(self.moes)}  # type: ignore[misc]


def batches(count: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [{"x": torch.randn(2, 30, D, generator=generator, dtype=torch.float64)} for _ in range(count)]


def samples(model: Net, max_tokens: int) -> dict[str, object]:
    return {k: v.sample for k, v in collect(model, model.named, batches(), max_tokens=max_tokens).items()}


@pytest.mark.parametrize("max_tokens", [70, 1000])
def test_an_unchanged_model_is_read_as_before(max_tokens: int) -> None:
    model = Net()
    kept = samples(model, max_tokens)
    readings = reread(model, model.named, batches(), kept)  # type: ignore[arg-type]
    assert readings.keys() == kept.keys()
    for name, reading in readings.items():
        assert torch.equal(reading.hidden, kept[name].hidden)  # type: ignore[attr-defined]
        assert reading.router_hidden is None


def test_a_changed_model_is_read_at_the_same_tokens() -> None:
    model = Net()
    kept = samples(model, 70)
    model.scale = 2.0
    reading = reread(model, model.named, batches(), kept)["moes.2"]  # type: ignore[arg-type]
    assert torch.equal(reading.hidden, 2.0 * kept["moes.2"].hidden)  # type: ignore[attr-defined]


def test_another_number_of_tokens_or_infinite_ones_give_no_reading() -> None:
    model = Net()
    kept = samples(model, 70)
    twice = [{**batch, "repeat": 2} for batch in batches()]
    assert reread(model, model.named, twice, kept) == {}  # type: ignore[arg-type]
    model.scale = float("inf")
    assert "moes.2" not in reread(model, model.named, batches(), kept)  # type: ignore[arg-type]


def test_blocks_start_in_the_order_in_which_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = watched_start(monkeypatch)
    assert [name for name, _ in seen] == ["moes.2", "moes.1", "moes.0"]
    assert seen[0][1] is None
    assert all(reading is not None for _, reading in seen[1:])


def test_few_stages_leave_later_blocks_of_a_stage_with_what_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "STAGES", 1)
    _, seen = watched_start(monkeypatch)
    assert [reading for _, reading in seen] == [None, None, None]


def test_blocks_that_will_be_healed_start_on_what_the_original_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = watched_start(monkeypatch, RECIPE.model_copy(update={"heal_steps": 4}))
    assert [reading for _, reading in seen] == [None, None, None]


def test_knowing_what_earlier_blocks_lost_brings_the_output_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        model = Net()
        survey = conversion.survey(model, (batches()[0]["x"],), {}, Recipe())
        prepared = conversion.prepare(model, survey.selected, RECIPE, batches(20))
        student = conversion.rewrite(model, survey.selected, conversion.start(prepared, RECIPE)).model
        with torch.no_grad():
            return sum(float((student(**b) - model(**b)).square().sum()) for b in batches(20))

    one_by_one = error()
    monkeypatch.setattr(conversion, "STAGES", 1)
    assert one_by_one < 0.99 * error()


RECIPE = Recipe(latent_dim=6, variant="fixed", heal_steps=0)


def watched_start(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe = RECIPE
) -> tuple[conversion.Prepared, list[tuple[str, object]]]:
    """A start, and the readings that each block was started with, in order."""
    model = Net()
    survey = conversion.survey(model, (batches()[0]["x"],), {}, Recipe())
    prepared = conversion.prepare(model, survey.selected, RECIPE, batches())
    seen: list[tuple[str, object]] = []
    original = conversion.initialise

    def spy(*args: object, **kwargs: object) -> MoESpec:
        seen.append((args[1].name, kwargs["reading"]))  # type: ignore[attr-defined]
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion, "initialise", spy)
    specs = conversion.start(prepared, recipe)
    assert list(specs) == list(prepared.plans)
    assert all(dataclasses.is_dataclass(value) for value in specs.values())
    return prepared, seen
