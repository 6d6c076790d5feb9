"""Predictions against what a conversion then measures: errors per block, loss of the model, widths under a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import latentize
from latentize import conversion
from latentize.forecast import Curve, Forecast
from latentize.plan import BlockPlan, make_plan
from latentize.recipe import Recipe

D, BATCHES = 32, 6


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Moe(nn.Module):
    """Two of six gated experts of eight neurons, renormalised softmax."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        self.router = nn.Parameter(random(6, D, seed=seed))
        self.gate = nn.Parameter(0.3 * random(6, 8, D, seed=seed + 1))
        self.up = nn.Parameter(0.3 * random(6, 8, D, seed=seed + 2))
        self.down = nn.Parameter(scale * random(6, D, 8, seed=seed + 3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = (x @ self.router.T).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(6):
            row, slot = torch.where(chosen == e)
            hidden = nn.functional.silu(x[row] @ self.gate[e].T) * (x[row] @ self.up[e].T)
            out = out.index_add(0, row, hidden @ self.down[e].T * weights[row, slot, None])
        return out


class Net(nn.Module):
    """Two MoE blocks with residuals, the first of which matters more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Moe(1, 0.03), Moe(11, 0.006)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def batches() -> list[tuple[Tensor]]:
    """Inputs whose directions differ in size, as hidden states' do."""
    scales = torch.logspace(0.5, -1, D)
    return [(random(512, D, seed=100 + i) * scales,) for i in range(BATCHES)]


@pytest.fixture(scope="module")
def prepared() -> conversion.Prepared:
    """Both blocks, tried at several widths."""
    model, data = Net().eval(), batches()
    survey = conversion.survey(model, data[0], {}, Recipe())
    assert len(survey.selected) == 2
    with conversion.workspace():
        return conversion.prepare(model, survey.selected, Recipe(variant="fixed"), data, sweep=True)


def start(prepared: conversion.Prepared, **fields: object) -> conversion.Rewritten:
    recipe = Recipe(**{"variant": "fixed", **fields})
    with conversion.workspace():
        again = conversion.prepare(
            prepared.model, prepared.selected, recipe, prepared.batches, statistics=prepared.statistics
        )
        return conversion.rewrite(prepared.model, prepared.selected, conversion.start(again, recipe))


@pytest.mark.parametrize("latent", [24, 16, 8, 4])
def test_block_errors_are_predicted_within_a_fifth(prepared, latent):
    student = start(prepared, latent_dim=latent)
    with conversion.workspace():
        measured = conversion.measure_errors(prepared.teacher, student, prepared.batches)
    for name, error in measured.items():
        assert prepared.forecast.curves[name].error_at(latent) == pytest.approx(error, rel=0.2)


def test_the_loss_is_predicted_from_the_gradients(prepared):
    student = start(prepared, latent_dim=16)
    with torch.no_grad():
        pairs = [(prepared.model(x), student.model(x)) for (x,) in prepared.batches]
    wrong = sum((b - a).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    losses = [curve.loss_at(16) for curve in prepared.forecast.curves.values()]
    assert prepared.forecast.together(sum(losses)) == pytest.approx(wrong.item(), rel=0.3)
    assert losses[0] > 3 * losses[1]


def test_curves_fall_to_nothing_at_the_full_width(prepared):
    for curve in prepared.forecast.curves.values():
        assert list(curve.errors) == sorted(curve.errors, reverse=True)
        assert curve.latent_dims[-1] == D
        assert (curve.errors[-1], curve.losses[-1]) == (0.0, 0.0)


def test_between_the_widths_that_were_tried_predictions_are_interpolated():
    curve = Curve((4, 8, 16), (0.5, 0.3, 0.0), (0.16, 0.04, 0.0))
    assert curve.error_at(6) == pytest.approx(0.4)
    assert curve.loss_at(6) == pytest.approx(0.3**2)
    assert (curve.error_at(2), curve.error_at(20)) == (0.5, 0.0)
    assert Curve((4, 8), (0.5, 0.0)).loss_at(4) is None


def replan(prepared: conversion.Prepared, **fields: object) -> dict[str, BlockPlan]:
    """Another recipe's plan on the same forecast."""
    return make_plan(prepared.teacher.specs, Recipe(**fields), prepared.statistics, prepared.forecast)


@pytest.mark.parametrize("budget", [{"bytes": 0.5}, {"flops": 0.8}, {"max_loss": 0.0005}], ids=lambda b: next(iter(b)))
def test_auto_spends_its_budget_where_the_loss_is(prepared, budget):
    first, second = replan(prepared, compression="auto", budget=budget).values()
    assert first.latent_dim > second.latent_dim
    share = {
        "bytes": (first.expert_bytes_after + second.expert_bytes_after) / (2 * first.expert_bytes_before),
        "flops": (first.flops_after + second.flops_after) / (2 * first.flops_before),
        "max_loss": first.predicted_loss + second.predicted_loss,
    }
    what, limit = next(iter(budget.items()))
    assert 0.8 * limit < share[what] <= limit * (1 + 1e-9)


def test_a_model_of_several_widths_is_converted_saved_and_loaded(prepared, tmp_path):
    recipe = Recipe(compression="auto", budget={"bytes": 0.5}, heal_steps=0)
    result = latentize.convert(prepared.model, prepared.batches[0], recipe=recipe, calibration=prepared.batches)
    assert len({plan.latent_dim for plan in result.plan.values()}) == 2
    for name, plan in result.plan.items():
        assert result.rewritten[name].spec.latent_dim == plan.latent_dim
    result.save(tmp_path / "out")
    again = latentize.load(tmp_path / "out", model=Net().eval())
    x = prepared.batches[0][0]
    assert torch.equal(again(x), result.model(x))


def test_auto_beats_one_width_at_the_same_bytes(prepared):
    auto = replan(prepared, compression="auto", budget={"bytes": 0.5})
    uniform = replan(prepared, latent_dim=D // 2, variant="fixed")
    for what in ("expert_bytes_after", "predicted_loss"):
        assert sum(getattr(plan, what) for plan in auto.values()) <= sum(getattr(p, what) for p in uniform.values())
    scores = []
    for plans in (auto, uniform):
        with conversion.workspace():
            specs = conversion.start(replace(prepared, plans=plans), Recipe())
            student = conversion.rewrite(prepared.model, prepared.selected, specs)
            pairs = [(student.model(x), prepared.model(x)) for (x,) in prepared.batches]
        scores.append(sum((a - b).square().sum().item() for a, b in pairs))
    assert scores[0] < scores[1]


def test_losses_add_up_as_they_were_measured_to():
    forecast = Forecast({}, ((0.01, 0.02), (0.1, 0.4)))
    assert forecast.together(0.005) == pytest.approx(0.01)
    assert forecast.together(0.1) == pytest.approx(0.4)
    assert 0.02 < forecast.together(0.03) < 0.4
    assert forecast.together(1.0) > 4.0
    for total in (1e-4, 0.02, 0.5):
        assert forecast.alone(forecast.together(total)) == pytest.approx(total)
    assert Forecast({}).together(0.3) == 0.3


def test_without_gradients_bytes_can_be_spent_but_no_loss_predicted(prepared):
    blind = {name: Curve(c.latent_dims, c.errors) for name, c in prepared.forecast.curves.items()}
    specs = prepared.teacher.specs
    plans = make_plan(specs, Recipe(compression="auto", budget={"bytes": 0.5}), None, Forecast(blind))
    assert all(plan.predicted_loss is None for plan in plans.values())
    with pytest.raises(latentize.LatentizeError, match=r"budget\.max_loss: first: no gradients"):
        make_plan(specs, Recipe(compression="auto", budget={"max_loss": 0.1}), None, Forecast(blind))
