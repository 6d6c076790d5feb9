"""The pieces of healing: the distance between outputs, the pressure on starved experts, schedules and splits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from latentize.distill import OutputLoss
from latentize.heal_job import RATE_PER_DISTANCE, cosine, is_evaluation, is_near, rate_for, split_batches
from latentize.heal_load import RoutingTap, pressure, starved_experts
from latentize.heal_plan import HealPlan
from latentize.heal_sensitivity import PLAIN, output_metrics
from latentize.moe import LatentMoE
from latentize.routing import route
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec


class Returns(nn.Module):
    """A model that reads ids through an embedding of `rows` rows and returns `width` columns, as `kind` says."""

    def __init__(self, rows: int, width: int, kind: str = "tensor") -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.kind = kind

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> object:
        value = self.embed(ids)
        if self.kind == "logits":
            return SimpleNamespace(logits=value)
        return {"tensor": value, "tuple": (value, None), "dict": {"ids": ids, "y": value}}[self.kind]


@pytest.mark.parametrize(
    ("rows", "width", "kind", "expected"),
    [
        (7, 7, "tensor", "kl"),
        (7, 5, "tensor", "mse"),
        (7, 5, "logits", "kl"),
        (7, 7, "tuple", "kl"),
        (7, 5, "dict", "mse"),
    ],
)
def test_logits_are_recognised(rows: int, width: int, kind: str, expected: str):
    ids = torch.arange(6).view(2, 3)
    assert OutputLoss.of(Returns(rows, width, kind), (ids,)).kind == expected


def test_a_float_model_is_matched_by_relative_error():
    assert OutputLoss.of(nn.Linear(4, 4), (torch.randn(2, 4),)).kind == "mse"


def test_kl_is_that_of_fp64_and_leaves_padding_out():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    wrong, whole = OutputLoss("kl").sums(a, b, {"attention_mask": mask})
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    expected = ((p * (p.log() - q.log())).sum(-1) * mask).sum()
    assert whole.item() == 3
    torch.testing.assert_close(wrong.double(), expected, rtol=1e-5, atol=1e-6)  # fp32 log-softmax over 5 classes


def test_relative_error_is_one_for_a_zero_output():
    b = torch.randn(4, 5)
    wrong, whole = OutputLoss("mse").sums(torch.zeros(4, 5), b, ())
    assert (wrong / whole).item() == pytest.approx(1.0)


def test_bf16_outputs_are_compared_in_fp32():
    a, b = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    wrong, _ = OutputLoss("mse").sums(a, b, ())
    assert wrong.dtype == torch.float32
    torch.testing.assert_close(wrong, (a.float() - b.float()).square().sum())


def router(**changes: object) -> RouterSpec:
    torch.manual_seed(1)
    return replace(RouterSpec(torch.randn(4, 6), top_k=2), **changes)  # type: ignore[arg-type]


def test_no_pressure_where_the_load_is_even():
    routing = route(torch.randn(32, 4), router())
    assert pressure([routing], router(), torch.full((4,), 0.25), 0.1) is None


@pytest.mark.parametrize(
    "changes", [{}, {"score": "sigmoid", "selection_bias": torch.zeros(4)}, {"order": "topk_first"}], ids=str
)
def test_pressure_raises_only_the_starved_expert(changes: dict[str, object]):
    torch.manual_seed(2)
    logits = torch.randn(64, 4)
    logits[:, 3] -= 4
    logits.requires_grad_(True)
    rule = router(**changes)
    push = pressure([route(logits, rule)], rule, torch.tensor([0.4, 0.3, 0.3, 0.0], dtype=torch.float64), 0.1)
    assert push is not None
    twice = pressure([route(logits, rule)] * 2, rule, torch.tensor([0.4, 0.3, 0.3, 0.0], dtype=torch.float64), 0.1)
    torch.testing.assert_close(twice, 2 * push)
    (gradient,) = torch.autograd.grad(push, logits)
    assert (gradient[:, 3] <= 0).all()
    assert gradient[:, 3].sum() < 0
    assert (gradient[:, :3] == 0).all()
    assert int((gradient[:, 3] < 0).sum()) == round(2 * 0.1 / 4 * 128)  # as many tokens as it lacks


@pytest.mark.parametrize(("counts", "expected"), [([10, 10, 10], 0), ([30, 30, 1], 1), ([0, 0, 9], 2), ([0, 0], 0)])
def test_starved_experts(counts: list[int], expected: int):
    assert starved_experts(counts, 0.1) == expected


def test_a_tap_counts_selections_and_lets_go():
    spec = MoESpec(router(), ExpertsSpec(torch.randn(4, 3, 6), torch.randn(4, 6, 3)))
    block = LatentMoE(spec)
    with RoutingTap({"b": block}) as tap:
        block(torch.randn(10, 6))
        block(torch.randn(5, 6))
        counts = tap.counts()["b"]
    assert int(counts.sum()) == 30
    assert not block.router._forward_hooks


def test_the_rate_warms_up_and_ends_near_zero():
    rates = [cosine(step, 100, 0.05) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4]
    assert rates[99] < 1e-3
    assert cosine(0, 1, 0.05) == 1.0


@pytest.mark.parametrize(("steps", "evaluations"), [(400, 10), (7, 10), (25, 4), (1, 10)])
def test_evaluations_are_spread_and_the_last_step_is_one(steps: int, evaluations: int):
    at = [step for step in range(1, steps + 1) if is_evaluation(step, steps, evaluations)]
    assert len(at) == min(steps, evaluations)
    assert at[-1] == steps


def test_batches_are_held_out_evenly_and_never_trained_on():
    data = [(torch.tensor(i),) for i in range(100)]
    train, held_out, notes = split_batches(data, HealPlan())
    assert [int(b[0]) for b in held_out] == [10, 30, 50, 70, 90]
    assert len(train) == 95
    assert not notes
    assert len(split_batches(data[:2], HealPlan())[1]) == 1


class TwoSteps(nn.Module):
    """An output that minds only the first of the block's directions."""

    def __init__(self, block: LatentMoE) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("reads", torch.tensor([[3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) @ self.reads.T


def test_the_metric_weighs_directions_as_the_output_minds_them():
    block = LatentMoE(MoESpec(router(), ExpertsSpec(torch.randn(4, 3, 6), torch.randn(4, 6, 3))))
    root = output_metrics(TwoSteps(block), {"b": block}, [(torch.randn(20, 6),)], seed=0)["b"].double()
    expected = torch.full((6,), PLAIN, dtype=torch.float64)
    expected[0] += (1 - PLAIN) * 6
    torch.testing.assert_close(root @ root.T, expected.diag(), rtol=1e-5, atol=1e-6)  # the root is kept in fp32


def test_a_block_that_no_gradient_reaches_is_measured_plainly():
    block = LatentMoE(MoESpec(router(), ExpertsSpec(torch.randn(4, 3, 6), torch.randn(4, 6, 3))))
    root = output_metrics(nn.Linear(6, 6), {"b": block}, [(torch.randn(20, 6),)], seed=0)["b"]
    assert torch.equal(root, torch.eye(6))


@pytest.mark.parametrize(
    ("loss", "expected"), [(10.0, 0.2), (0.0225, 0.15 * RATE_PER_DISTANCE), (0.0, 0.0), (math.nan, 0.2)]
)
def test_the_learning_rate_is_smaller_the_closer_the_student_is(loss: float, expected: float):
    assert rate_for(0.2, loss) == pytest.approx(expected)


def test_a_student_is_near_at_half_the_largest_rate():
    assert is_near(rate_for(0.2, (0.09 / RATE_PER_DISTANCE) ** 2), 0.2)
    assert not is_near(rate_for(0.2, (0.11 / RATE_PER_DISTANCE) ** 2), 0.2)
    assert not is_near(rate_for(0.2, math.nan), 0.2)
