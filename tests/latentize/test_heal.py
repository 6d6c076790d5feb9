"""Healing of tiny trained-like models: what it improves, what it leaves alone, and how it ends when things go wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from latentize import heal as heal_module
from latentize.errors import LatentizeError, ResourceError
from latentize.heal import HealPlan, heal
from latentize.heal_state import STATE_FILE
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

VOCABULARY, HIDDEN, LATENT = 24, 16, 8
QUICK = HealPlan(block_steps=12, model_steps=24, block_tokens=64, block_rate=0.1, model_rate=0.1, held_out=0.2)


class TinyLM(nn.Module):
    def __init__(self, blocks: list[LatentMoE], head: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY) if head else nn.Identity()
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(self.dropout(self.norm(x)))
        return self.head(x)


def original_spec(seed: int, num_experts: int = 4, dtype: torch.dtype = torch.float32) -> MoESpec:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    router = RouterSpec(normal(num_experts, HIDDEN) * 2, top_k=2, normalize="sum")
    experts = ExpertsSpec(
        up=normal(num_experts, 12, HIDDEN), down=normal(num_experts, HIDDEN, 12), gate=normal(num_experts, 12, HIDDEN)
    )
    return MoESpec(router, experts)


def truncated(spec: MoESpec) -> MoESpec:
    """The spec with its first latent directions kept: a poor start on purpose."""
    basis = torch.eye(HIDDEN)[:LATENT].to(spec.experts.up.dtype)
    e = spec.experts
    assert e.gate is not None
    experts = replace(e, up=e.up @ basis.T, gate=e.gate @ basis.T, down=basis @ e.down)
    return replace(spec, experts=experts, latent=LatentSpec(basis.clone(), basis.T.clone()))


def pair(dtype: torch.dtype = torch.float32, head: bool = True, change: Callable[[MoESpec], MoESpec] | None = None):
    """(student, teacher, student blocks, teacher blocks); everything outside the blocks is shared."""
    torch.manual_seed(0)
    specs = [original_spec(seed, dtype=dtype) for seed in (1, 2)]
    teacher = TinyLM([LatentMoE(s.map_tensors(torch.clone)) for s in specs], head).to(dtype)
    student = copy.copy(teacher)
    student._modules = dict(teacher._modules)
    changed = [truncated(s) if change is None else change(truncated(s)) for s in specs]
    student.blocks = nn.ModuleList(LatentMoE(s.map_tensors(torch.clone)) for s in changed)
    names = [f"blocks.{i}" for i in range(2)]
    mine, its = (dict(zip(names, model.blocks, strict=True)) for model in (student, teacher))
    return student, teacher, mine, its


def batches(count: int = 10, length: int = 12) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randint(VOCABULARY, (4, length), generator=generator),) for _ in range(count)]


def weights(blocks: dict[str, LatentMoE]) -> dict[str, Tensor]:
    return {f"{b}.{n}": p.detach().clone() for b, m in blocks.items() for n, p in m.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_healing_brings_the_output_closer_and_says_by_how_much():
    models = pair()
    report = heal(*models, batches(), steps=QUICK, seed=0)
    assert report.loss_kind == "kl"
    assert report.loss_after < 0.5 * report.loss_before
    assert report.loss_after <= report.loss_after_blocks <= report.loss_before
    assert report.improved
    assert (report.block_steps, report.model_steps, report.early_stopped) == (12, 24, False)
    assert len(report.curve) == 24
    assert set(report.blocks) == {"blocks.0", "blocks.1"}
    for block in report.blocks.values():
        assert block.error_after_blocks < block.error_before
        assert sum(block.load_after.counts) == 2 * block.load_after.tokens
    held_out = report.held_out_curve[-1][1]
    assert held_out == pytest.approx(report.loss_after)


usable = heal_module._usable


def test_what_the_original_says_held_out_is_held_where_it_fits(monkeypatch: pytest.MonkeyPatch):
    outcomes, calls = [], []
    for most in (QUICK.activation_bytes, 0):
        monkeypatch.setattr(heal_module, "_usable", lambda *given, most=most: usable(*given[:3], most))
        student, teacher, mine, its = pair()
        count = [0]
        teacher.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        report = heal(student, teacher, mine, its, batches(), steps=QUICK, seed=0)
        outcomes.append((weights(mine), report.held_out_curve))
        calls.append(count[0])
    assert same(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]
    assert calls[1] - calls[0] == 2 * (QUICK.evaluations + 2)  # two batches, before either stage too


def test_a_bypass_is_trained_in_both_stages():
    def bypassed(spec: MoESpec) -> MoESpec:
        generator = torch.Generator().manual_seed(3)
        down, up = (0.2 * torch.randn(*shape, generator=generator) for shape in ((2, HIDDEN), (HIDDEN, 2)))
        return replace(spec, latent=replace(spec.latent, bypass_down=down, bypass_up=up))

    models = pair(change=bypassed)
    before, plan = weights(models[2]), replace(QUICK, model_steps=0)
    assert heal(*models, batches(), steps=plan, seed=0).improved
    middle = weights(models[2])
    assert heal(*models, batches(), steps=replace(QUICK, block_steps=0), seed=0).improved
    after = weights(models[2])
    names = [name for name in before if "bypass_" in name]
    assert len(names) == 4
    for name in names:
        assert not torch.equal(before[name], middle[name])
        assert not torch.equal(middle[name], after[name])


def test_reported_loss_is_that_of_the_weights_left_in_the_student():
    student, teacher, *blocks = pair()
    calibration = batches()
    report = heal(student, teacher, *blocks, calibration, steps=replace(QUICK, held_out=0.1), seed=0)
    student.eval(), teacher.eval()
    with torch.no_grad():
        a, b = (model(calibration[5][0]).log_softmax(-1).double() for model in (student, teacher))
    divergence = (b.exp() * (b - a)).sum(-1).mean().item()
    assert divergence == pytest.approx(report.loss_after, rel=1e-4)  # fp32 sums over 48 positions


def test_everything_outside_the_student_blocks_is_left_as_it_was():
    student, teacher, student_blocks, teacher_blocks = pair()
    student.train()
    student.dropout.eval()
    before = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    outside = {n: p.detach().clone() for n, p in student.named_parameters() if not n.startswith("blocks")}
    random = torch.get_rng_state()
    with torch.no_grad():
        report = heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=QUICK, seed=3)
        assert not torch.is_grad_enabled()
    assert report.improved
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, dict(teacher.named_parameters()))
    assert same(outside, {n: p for n, p in student.named_parameters() if not n.startswith("blocks")})
    assert student.training
    assert student.blocks[0].training
    assert not student.dropout.training
    assert all(p.grad is None and p.requires_grad for p in [*student.parameters(), *teacher.parameters()])
    assert not any(m._forward_hooks for m in [*student.modules(), *teacher.modules()])
    assert not torch.are_deterministic_algorithms_enabled()


def test_parameters_shared_with_the_teacher_are_trained_as_copies():
    student, teacher, student_blocks, teacher_blocks = pair()
    router = teacher.blocks[0].router.weight
    student.blocks[0].router.weight.data = router.data
    before = router.detach().clone()
    heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=QUICK, seed=0)
    assert torch.equal(router, before)
    assert not torch.equal(student.blocks[0].router.weight, before)


def test_a_teacher_of_views_is_read_contiguously_and_gets_its_views_back():
    straight = pair()
    strided = pair()
    views = []
    for block in strided[3].values():
        both = torch.cat([block.experts.gate.data, block.experts.up.data], 1)
        block.experts.gate.data, block.experts.up.data = both.split(12, 1)
        views += [block.experts.gate, block.experts.up]
    assert not any(p.is_contiguous() for p in views)
    places = [p.data_ptr() for p in views]
    heal(*straight, batches(), steps=QUICK, seed=0)
    heal(*strided, batches(), steps=QUICK, seed=0)
    assert same(weights(straight[2]), weights(strided[2]))
    assert [p.data_ptr() for p in views] == places


def test_zero_steps_change_nothing_and_are_measured():
    student, teacher, student_blocks, teacher_blocks = pair()
    before = weights(student_blocks)
    report = heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=HealPlan.chosen(0), seed=0)
    assert same(before, weights(student_blocks))
    assert report.loss_before == report.loss_after > 0
    assert not report.improved


@pytest.mark.parametrize(("asked", "blocks", "model"), [(None, 100, 400), (100, 25, 100), (1, 1, 1), (0, 0, 0)])
def test_chosen_steps(asked: int | None, blocks: int, model: int):
    plan = HealPlan.chosen(asked)
    assert (plan.block_steps, plan.model_steps) == (blocks, model)


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    results = []
    for seed in (5, 5, 6):
        student, teacher, student_blocks, teacher_blocks = pair()
        heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=QUICK, seed=seed)
        results.append(weights(student_blocks))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("interrupted_at", [1, 7, 12, 13, 30])
def test_interrupted_healing_resumes_to_the_identical_result(tmp_path: Path, interrupted_at: int):
    plan = replace(QUICK, save_seconds=0.0, activation_bytes=1)  # saved after every step, one batch of activations kept

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done == interrupted_at:
            raise KeyboardInterrupt

    straight = pair()
    expected = heal(*straight, batches(), steps=plan, seed=1)
    broken = pair()
    with pytest.raises(KeyboardInterrupt):
        heal(*broken, batches(), steps=plan, seed=1, progress=interrupt, checkpoint=tmp_path)
    assert not any(m._forward_hooks for m in broken[0].modules())
    resumed = pair()
    report = heal(*resumed, batches(), steps=plan, seed=1, checkpoint=tmp_path)
    assert same(weights(straight[2]), weights(resumed[2]))
    assert report.loss_after == expected.loss_after
    assert report.curve == expected.curve
    assert report.blocks == expected.blocks


def test_a_finished_checkpoint_is_not_trained_again(tmp_path: Path):
    first, second = pair(), pair()
    expected = heal(*first, batches(), steps=QUICK, seed=1, checkpoint=tmp_path)
    calls: list[int] = []

    def count(done: int, total: int, note: str = "") -> None:
        calls.append(done)

    report = heal(*second, batches(), steps=QUICK, seed=1, checkpoint=tmp_path, progress=count)
    assert not calls
    assert same(weights(first[2]), weights(second[2]))
    assert report.loss_after == expected.loss_after


def test_a_checkpoint_of_another_job_is_refused_and_the_field_named(tmp_path: Path):
    heal(*pair(), batches(), steps=QUICK, seed=1, checkpoint=tmp_path)
    with pytest.raises(LatentizeError, match="seed was 1 and is now 2"):
        heal(*pair(), batches(), steps=QUICK, seed=2, checkpoint=tmp_path)
    with pytest.raises(LatentizeError, match="batches was 10 and is now 9"):
        heal(*pair(), batches(9), steps=QUICK, seed=1, checkpoint=tmp_path)


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", [b"not a state", None])
def test_a_file_that_is_no_state_is_refused_and_nothing_in_it_is_run(tmp_path: Path, content: bytes | None, capsys):
    if content is None:
        torch.save({"fingerprint": Harmful()}, tmp_path / STATE_FILE)
    else:
        (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(LatentizeError, match="cannot be read as a healing state"):
        heal(*pair(), batches(), steps=QUICK, seed=1, checkpoint=tmp_path)
    assert "unpickled" not in capsys.readouterr().out


def test_a_learning_rate_that_diverges_leaves_the_start_or_better_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("latentize.heal_model.RATE_PER_DISTANCE", 1e9)
    student, teacher, student_blocks, teacher_blocks = pair()
    plan = replace(QUICK, block_steps=0, model_steps=40, model_rate=1e6, patience=2)
    report = heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=plan, seed=0)
    assert report.loss_after <= report.loss_before
    assert any("went back to the best weights" in note for note in report.notes)
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_healed_model_is_kept_only_where_it_is_better():
    """A student that equals its teacher cannot be improved: its weights come back bit for bit."""
    student, teacher, student_blocks, teacher_blocks = pair()
    for name, block in student_blocks.items():
        teacher_blocks[name].load_state_dict({}, strict=False)
        own = LatentMoE(teacher_blocks[name].spec.map_tensors(torch.clone))
        block.router, block.experts = own.router, own.experts
    before = weights(student_blocks)
    report = heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=QUICK, seed=0)
    assert report.loss_after == report.loss_before
    assert same(before, weights(student_blocks))
    assert any("no weights better" in note for note in report.notes)


def test_batches_with_non_finite_outputs_are_left_out_and_counted():
    calibration = [(ids.float(),) for (ids,) in batches()]

    def models():
        student, teacher, *blocks = pair()
        for model in (student, teacher):
            model.embed = FromFloat(teacher.embed)
        return student, teacher, *blocks

    class FromFloat(nn.Module):
        def __init__(self, embed: nn.Embedding) -> None:
            super().__init__()
            self.embed = embed

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids.nan_to_num().long()) + (ids - ids).unsqueeze(-1)

    for i in (2, 3):  # one held out, one trained on
        calibration[i][0][0, 0] = float("nan")
    report = heal(*models(), calibration, steps=QUICK, seed=0)
    assert report.improved
    assert any("1 held-out batches" in note for note in report.notes)
    assert any("3 steps were skipped" in note for note in report.notes)  # 24 steps over 8 batches


def test_non_finite_calibration_is_refused_before_training():
    student, teacher, student_blocks, teacher_blocks = pair()
    with torch.no_grad():
        teacher.embed.weight.fill_(float("nan"))
    with pytest.raises(LatentizeError, match="NaN or Inf"):
        heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=QUICK, seed=0)


def test_starved_experts_are_revived():
    def kill(spec: MoESpec) -> MoESpec:
        weight = spec.router.weight.clone()
        weight[3] = 0.0
        bias = torch.tensor([0.0, 0.0, 0.0, -2.0])
        return replace(spec, router=replace(spec.router, weight=weight, bias=bias))

    models = pair(change=kill)
    plan = replace(QUICK, block_steps=40, model_steps=20, block_rate=0.3)
    report = heal(*models, batches(), steps=plan, seed=0)
    for block in report.blocks.values():
        assert block.load_before.min_over_mean < 0.1
        assert block.load_after.min_over_mean >= 0.1
    assert report.loss_after < report.loss_before


def test_bf16_models_heal_through_fp32_masters():
    models = pair(torch.bfloat16)
    plan = replace(QUICK, block_rate=0.01, model_rate=0.01, model_steps=40)  # steps below the spacing of bf16
    report = heal(*models, batches(), steps=plan, seed=0)
    assert all(p.dtype == torch.bfloat16 for p in models[0].parameters())
    assert report.loss_after < 0.95 * report.loss_before


def test_outputs_that_are_no_logits_are_matched_by_relative_error():
    report = heal(*pair(head=False), batches(), steps=QUICK, seed=0)
    assert report.loss_kind == "mse"
    assert report.loss_after < report.loss_before


def test_batches_may_be_keyword_arguments():
    as_dicts = [{"ids": ids} for (ids,) in batches()]
    first, second = pair(), pair()
    a = heal(*first, batches(), steps=QUICK, seed=0)
    b = heal(*second, as_dicts, steps=QUICK, seed=0)
    assert a.loss_after == b.loss_after


def test_one_batch_is_trained_and_measured_on_and_noted():
    report = heal(*pair(), batches(1), steps=replace(QUICK, block_steps=2, model_steps=4), seed=0)
    assert any("both trained on and measured on" in note for note in report.notes)


def test_no_batch_and_unequal_blocks_are_the_callers_fault():
    student, teacher, student_blocks, teacher_blocks = pair()
    with pytest.raises(LatentizeError, match="no calibration batch"):
        heal(student, teacher, student_blocks, teacher_blocks, [], steps=QUICK, seed=0)
    del teacher_blocks["blocks.1"]
    with pytest.raises(LatentizeError, match=r"blocks\.1 are in only one"):
        heal(student, teacher, student_blocks, teacher_blocks, batches(), steps=QUICK, seed=0)


def test_out_of_memory_becomes_advice(monkeypatch: pytest.MonkeyPatch):
    models = pair()

    def exhausted(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("latentize.heal_model._gradients", exhausted)
    with pytest.raises(ResourceError, match="fewer tokens"):
        heal(*models, batches(), steps=QUICK, seed=0)


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentize.heal_state.torch.save", full)
    with pytest.raises(ResourceError, match=r"its state .*: the disk is full; an earlier one is kept"):
        heal(*pair(), batches(), steps=QUICK, seed=0, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())
