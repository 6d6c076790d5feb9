"""Evaluation, agreement and block errors on models small enough to work out by hand or in fp64."""

import math

import pytest
import torch
from torch import nn

from latentize.compare import (
    Evaluation,
    Gate,
    block_errors,
    evaluate_pair,
    loss_gate,
    output_agreement,
    require,
)
from latentize.errors import GateError, LatentizeError
from latentize.load_balance import ExpertLoad, expert_load
from latentize.moe import LatentMoE
from latentize.reference import moe_forward, router_forward
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

D, M, N, K = 6, 5, 4, 2


def spec(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    experts = ExpertsSpec(up=randn(N, M, D), down=randn(N, D, M), gate=randn(N, M, D))
    return MoESpec(RouterSpec(randn(N, D), K, normalize="sum"), experts)


class TwoBlocks(nn.Module):
    """Two MoE blocks with a residual around each."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = LatentMoE(first), LatentMoE(second)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)

    @property
    def blocks(self):
        return {"first": self.first, "second": self.second}


class Logits(nn.Module):
    """Next-token scores of token ids."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return {"logits": self.table[ids]}


def batches(count=3):
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(2, 7, D, generator=generator),) for _ in range(count)]


def test_block_errors_are_those_of_the_reference_on_the_teachers_own_inputs():
    teacher, student = TwoBlocks(spec(0), spec(1)), TwoBlocks(spec(2), spec(3))
    found = block_errors(teacher.blocks, student.blocks, teacher, batches())
    x = torch.cat([batch[0] for batch in batches()]).flatten(0, 1).double()
    inputs = {"first": x, "second": x + moe_forward(spec(0).to(torch.float64), x)}
    for name, (a, b) in {"first": (0, 2), "second": (1, 3)}.items():
        theirs = moe_forward(spec(a).to(torch.float64), inputs[name])
        ours = moe_forward(spec(b).to(torch.float64), inputs[name])
        # fp32 forwards, summed in fp64: rounding only
        assert found[name] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-5)


def test_block_errors_of_the_same_block_are_zero_and_missing_students_are_skipped():
    teacher = TwoBlocks(spec(0), spec(1))
    assert block_errors(teacher.blocks, {"first": LatentMoE(spec(0))}, teacher, batches()) == {"first": 0.0}


def test_block_errors_leave_hooks_modes_and_gradients_as_found():
    teacher, student = TwoBlocks(spec(0), spec(1)).train(), TwoBlocks(spec(2), spec(3)).train()
    with torch.no_grad():
        block_errors(teacher.blocks, student.blocks, teacher, batches(1))
        assert not torch.is_grad_enabled()
    for model in (teacher, student):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())


def test_expert_load_counts_what_the_router_selects():
    model = TwoBlocks(spec(0), spec(1))
    load = expert_load(model, {"first": model.first}, batches())["first"]
    x = torch.cat([batch[0] for batch in batches()]).flatten(0, 1)
    expected = torch.bincount(router_forward(spec(0), x).indices.flatten(), minlength=N)
    assert list(load.counts) == expected.tolist()
    assert load.tokens == len(x)
    assert sum(load.counts) == len(x) * K


def test_an_even_load_and_a_load_of_one():
    even, single = ExpertLoad.of([5, 5, 5, 5], 10), ExpertLoad.of([20, 0, 0, 0], 20)
    assert (even.max_over_mean, even.min_over_mean, even.dead) == (1.0, 1.0, 0)
    assert even.entropy == pytest.approx(1.0, abs=1e-12)
    assert (single.max_over_mean, single.min_over_mean, single.entropy, single.dead) == (4.0, 0.0, 0.0, 3)
    assert ExpertLoad.of([0, 0], 0).dead == 2


def test_evaluate_pair_runs_both_in_eval_mode_from_the_same_random_state():
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"loss": torch.rand(()) + model.weight.sum().item()}

    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    result = evaluate_pair(a, b, evaluate)
    expected = (b.weight.sum() - a.weight.sum()).item()
    assert result.rewritten["loss"] - result.original["loss"] == pytest.approx(expected, abs=1e-6)
    assert seen == [(False, False)] * 2
    assert a.training


@pytest.mark.parametrize("returned", [None, {}, 1.5, {"loss": "low"}, {3: 1.0}])
def test_an_evaluate_that_returns_something_else_is_the_users_fault(returned):
    with pytest.raises(LatentizeError, match="expected a dict of names to numbers"):
        evaluate_pair(nn.Identity(), nn.Identity(), lambda model: returned)


def test_an_evaluate_that_changes_its_names_is_refused():
    names = iter(["loss", "error"])
    with pytest.raises(LatentizeError, match="the same names"):
        evaluate_pair(nn.Identity(), nn.Identity(), lambda model: {next(names): 1.0})


def test_output_agreement_of_scores_is_worked_out_in_fp64():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 5, generator=generator), torch.randn(16, 5, generator=generator)
    ids = torch.arange(16).view(2, 8)
    found = output_agreement(Logits(a), Logits(b), [(ids[:1],), {"ids": ids[1:]}])
    a, b = a.double(), b.double()
    divergence = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    assert found.positions == 16
    assert found.relative == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-12)
    assert found.max_abs == pytest.approx((b - a).abs().max().item(), rel=1e-12)
    assert found.cosine == pytest.approx((a * b).sum().item() / (a.norm() * b.norm()).item(), rel=1e-12)
    assert found.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-9)
    assert found.kl_p99 == found.kl_worst == pytest.approx(divergence.max().item(), rel=1e-9)
    assert found.top1 == (a.argmax(-1) == b.argmax(-1)).double().mean().item()


def test_outputs_that_are_no_scores_have_no_divergence():
    found = output_agreement(nn.Identity(), nn.Identity(), batches(1))
    assert (found.relative, found.max_abs, found.top1, found.kl_mean) == (0.0, 0.0, None, None)
    assert found.cosine == pytest.approx(1.0, abs=1e-12)


def test_an_output_that_is_not_a_number_is_not_hidden():
    found = output_agreement(nn.Identity(), _Nan(), batches(1))
    assert math.isnan(found.max_abs)
    assert math.isnan(found.relative)


class _Nan(nn.Module):
    def forward(self, x):
        x = x.clone()
        x.view(-1)[0] = math.nan
        return x


@pytest.mark.parametrize("other, message", [(nn.Flatten(), r"\[2, 42\]"), (nn.Linear(D, 3), r"\[2, 7, 3\]")])
def test_outputs_of_other_shapes_are_refused_with_both(other, message):
    with pytest.raises(LatentizeError, match=message):
        output_agreement(nn.Identity(), other, batches(1))


def test_no_batch_to_compare_on_is_said():
    with pytest.raises(LatentizeError, match="no batch"):
        output_agreement(nn.Identity(), nn.Identity(), [])


def test_the_loss_gate_judges_the_first_value_alone():
    evaluation = Evaluation({"loss": 2.0, "accuracy": 0.9}, {"loss": 2.01, "accuracy": 0.1})
    assert evaluation.rise == pytest.approx(0.005)
    assert loss_gate(evaluation, 0.01).passed
    failed = loss_gate(evaluation, 0.001)
    assert not failed.passed
    with pytest.raises(GateError, match=r"rise of loss is 0.005, allowed 0.001") as raised:
        require([loss_gate(evaluation, 0.01), failed])
    assert raised.value.exit_code == 4


def test_a_gate_on_a_value_that_is_not_a_number_fails():
    assert not Gate.of("error", math.nan, 1.0).passed
    assert not loss_gate(Evaluation({"loss": 1.0}, {"loss": math.nan}), 10.0).passed
    require([Gate.of("error", 1.0, 1.0)])


def test_a_gate_of_something_that_could_not_be_made_gives_no_advice_on_accuracy():
    with pytest.raises(GateError, match=r"gate failed: TensorRT engine: none\. The report says why$"):
        require([Gate.unmade("TensorRT engine"), Gate.of("error", 1.0, 1.0)])
    with pytest.raises(GateError, match=r"TensorRT engine: none; error is 2, allowed 1\. Lower the compression"):
        require([Gate.unmade("TensorRT engine"), Gate.of("error", 2.0, 1.0)])
    with pytest.raises(GateError, match=r"error is inf, allowed 0\. Lower the compression"):
        require([Gate.of("error", math.inf, 0.0)])


def test_advice_fits_the_gates_that_failed():
    off, lossy = Gate.of_agreement("ONNX against PyTorch", 2.0, 1.0), Gate.of("rise", 0.2, 0.1)
    with pytest.raises(GateError, match=r"ONNX against PyTorch is 2, allowed 1\. The report says by how much$"):
        require([off, Gate.of("rise", 0.1, 0.1)])
    with pytest.raises(GateError, match=r"allowed 1\. --tolerance allows more$"):
        require([off, off], "--tolerance allows more")
    with pytest.raises(GateError, match=r"allowed 0\.1\. The report says by how much\. Lower the compression"):
        require([off, lossy])
