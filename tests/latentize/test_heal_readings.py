"""The block-wise stage of healing on what blocks read in the student: what is learned from what, and that it pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_lm import VOCAB, L, Lm
from torch import Tensor, nn

from latentize import heal_blocks
from latentize.heal import HealPlan, HealReport, heal
from latentize.heal_readings import Student, collect
from latentize.moe import LatentMoE
from latentize.spec import LatentSpec

#: Longer than any token of the original is.
LARGE = 20.0
PLAN = HealPlan(24, 0, block_tokens=64, own_steps=4, held_out=0.2)


class Skips(Lm):
    """Leaves tokens out of its second block where the first has made them large: other ones in the student."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.blocks[0](x)
        small = x.norm(dim=-1, keepdim=True) < LARGE
        routed = torch.zeros_like(x).masked_scatter(small, self.blocks[1](x[small.squeeze(-1)]))
        return self.head(x + routed)


class Overflows(Lm):
    """Where the first block makes a token large, the second reads infinity; the output does without it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.blocks[0](x)
        read = torch.where(x.norm(dim=-1).amax() > LARGE, torch.inf, 1.0) * x
        return self.head(x + self.blocks[1](read).nan_to_num(0.0, 0.0, 0.0))


def blocks_of(model: Lm) -> dict[str, LatentMoE]:
    return {f"blocks.{i}": block for i, block in enumerate(model.blocks)}


def narrowed(block: LatentMoE, width: int) -> LatentMoE:
    """A block with its first latent directions alone."""
    spec = block.spec.map_tensors(torch.clone)
    e, latent = spec.experts, spec.latent
    assert e.gate is not None
    assert latent is not None
    experts = replace(e, up=e.up[..., :width], gate=e.gate[..., :width], down=e.down[:, :width])
    kept = replace(spec, experts=experts, latent=LatentSpec(latent.down[:width], latent.up[:, :width]))
    return LatentMoE(kept.map_tensors(torch.Tensor.contiguous))


def pair(kind: type[Lm] = Lm, width: int = 1, scale: float = 1.0):
    """(student, teacher, student blocks, teacher blocks); the student's first block cannot but lose much."""
    teacher, student = kind(), kind()
    with torch.no_grad():
        for block in teacher.blocks:
            block.experts.latent_up.mul_(4)
    student.blocks = nn.ModuleList([narrowed(teacher.blocks[0], width), narrowed(teacher.blocks[1], L)])
    with torch.no_grad():
        student.blocks[0].experts.latent_up.mul_(scale)
    return student, teacher, blocks_of(student), blocks_of(teacher)


def batches(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"ids": torch.randint(VOCAB, (4, 16), generator=generator)} for _ in range(count)]


def never(_tokens: int) -> bool:
    return False


def test_blocks_read_in_the_student_and_learn_from_the_original():
    student, teacher, mine, its = pair()
    data = batches(3)
    found = collect(teacher, its, data, never, Student(student, mine))
    theirs = collect(teacher, its, data, never)
    assert found.batches == theirs.batches == 3
    assert not found.unlike
    ids = torch.cat([batch["ids"] for batch in data]).flatten()
    with torch.no_grad():
        hidden = student.embed(ids)
        read = hidden + student.blocks[0](hidden)
        meant = teacher.embed(ids)
        meant = meant + teacher.blocks[0](meant)
        target = teacher.blocks[1](meant)
    assert torch.allclose(found.of["blocks.1"].inputs[0], read, atol=1e-5)
    assert torch.allclose(theirs.of["blocks.1"].inputs[0], meant, atol=1e-5)
    assert not torch.allclose(read, meant, atol=1e-2)
    for activations in (found, theirs):
        assert torch.allclose(activations.of["blocks.1"].output, target, atol=1e-5)


def test_as_many_batches_are_read_as_are_enough():
    _, teacher, _, its = pair()
    assert collect(teacher, its, batches(), lambda tokens: tokens >= 100).batches == 2


@pytest.mark.parametrize("kind", [Skips, Overflows])
def test_where_the_student_differs_the_originals_inputs_are_read_and_a_note_says_so(kind: type[Lm]):
    student, teacher, mine, its = pair(kind, L, 20.0)
    found = collect(teacher, its, batches(3), never, Student(student, mine))
    theirs = collect(teacher, its, batches(3), never)
    assert found.unlike == {"blocks.1"}
    assert torch.equal(found.of["blocks.1"].output, theirs.of["blocks.1"].output)
    assert all(bool(t.isfinite().all()) for t in found.of["blocks.1"].inputs)
    report = heal(*pair(kind, L, 20.0), batches(), steps=replace(PLAN, own_share=0.5), seed=0)
    assert sum("other numbers of tokens" in note and "'blocks.1'" in note for note in report.notes) == 1
    assert report.loss_after <= report.loss_before


def healed(share: float, **changes: float) -> HealReport:
    return heal(*pair(), batches(), steps=replace(PLAN, own_share=share, **changes), seed=0)


def test_making_up_for_earlier_blocks_brings_the_output_closer():
    losses = {share: healed(share).loss_after_blocks for share in (0.0, 0.5, 1.0)}
    assert losses[0.5] < 0.9 * losses[0.0]
    assert losses[1.0] < 0.9 * losses[0.0]


def test_the_first_steps_are_the_same_whatever_follows():
    seen: dict[float, list[dict[str, Tensor]]] = {0.0: [], 0.5: []}
    for share, weights in seen.items():
        models = pair()

        def keep(done: int, total: int, note: str = "", models=models, weights=weights) -> None:
            weights.append({n: p.detach().clone() for n, p in models[0].named_parameters()})

        heal(*models, batches(15), steps=replace(PLAN, own_share=share), seed=0, progress=keep)
    equal = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(*seen.values(), strict=True)]
    assert equal == [True] * 12 + [False] * 12


def test_the_best_weights_are_measured_again_on_the_inputs_that_count(monkeypatch: pytest.MonkeyPatch):
    kept = []
    measure = heal_blocks._measure_best

    def watched(job, state, held_out, metrics):
        before, live = dict(state.block_best_errors), job.trainables.snapshot(blocks=True)
        measure(job, state, held_out, metrics)
        assert all(torch.equal(a, b) for a, b in zip(live, job.trainables.masters, strict=True))  # training goes on
        kept.append((before, dict(state.block_best_errors)))

    monkeypatch.setattr(heal_blocks, "_measure_best", watched)
    healed(0.5)
    assert len(kept) == 3  # 12 steps, 4 at a time
    before, after = kept[0]
    assert before["blocks.0"] == pytest.approx(after["blocks.0"], rel=1e-5)  # reads the same in both models
    assert after["blocks.1"] > 1.05 * before["blocks.1"]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("interrupted_at", [4, 11, 13, 20])
def test_interrupted_healing_resumes_to_the_identical_result(tmp_path: Path, share: float, interrupted_at: int):
    plan = replace(PLAN, own_share=share, save_seconds=0.0, activation_bytes=1)

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done == interrupted_at:
            raise KeyboardInterrupt

    def state(student: nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in student.parameters()]

    straight, broken, resumed = pair(), pair(), pair()
    expected = heal(*straight, batches(), steps=plan, seed=1)
    with pytest.raises(KeyboardInterrupt):
        heal(*broken, batches(), steps=plan, seed=1, progress=interrupt, checkpoint=tmp_path)
    report = heal(*resumed, batches(), steps=plan, seed=1, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state(straight[0]), state(resumed[0]), strict=True))
    assert replace(report, seconds=0.0) == replace(expected, seconds=0.0)


def test_notes_survive_an_interruption_once(tmp_path: Path):
    plan = replace(PLAN, own_share=1.0, save_seconds=0.0)
    stop: Callable[..., None] = _interrupt_at(9)
    with pytest.raises(KeyboardInterrupt):
        heal(*pair(Skips, L, 20.0), batches(), steps=plan, seed=1, progress=stop, checkpoint=tmp_path)
    report = heal(*pair(Skips, L, 20.0), batches(), steps=plan, seed=1, checkpoint=tmp_path)
    assert sum("other numbers of tokens" in note for note in report.notes) == 1


def _interrupt_at(step: int) -> Callable[..., None]:
    def interrupt(done: int, total: int, note: str = "") -> None:
        if done == step:
            raise KeyboardInterrupt

    return interrupt
