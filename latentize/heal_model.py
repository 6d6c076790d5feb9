"""The second stage of healing: the whole student learns the teacher's output, and what the teacher's blocks see.

Trained are its blocks alone, or everything where the plan says so (`latentize.heal_outside`).

The second part gives the earlier blocks a gradient that has not passed through all the later ones; in few steps it
brings the output closer than the output's own distance does alone. Its weight falls to zero: what counts is the output.
Near the goal the text is a small part of the target too (`latentize.heal_text`), and the last steps read it unspliced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentize.errors import LatentizeError
from latentize.heal_crew import Worker
from latentize.heal_job import (
    FALL_BACK_RATE,
    FALL_BACKS,
    OUTPUT_RATE_PER_DISTANCE,
    RATE_PER_DISTANCE,
    Job,
    State,
    cosine,
    is_evaluation,
    is_near,
    rate_for,
)
from latentize.heal_load import RoutingTap, count, follow, pressure
from latentize.heal_parts import Part, together
from latentize.heal_pieces import pieces_of
from latentize.heal_splice import Text
from latentize.heal_text import next_token_loss
from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE

#: A held-out loss above this multiple of the best one counts as divergence.
_RISING = 2.0


def heal_model(job: Job, state: State) -> None:
    """Distil `job.teacher` into `job.student`, and leave the best weights that were measured in the student."""
    plan = job.plan
    per_distance = RATE_PER_DISTANCE if job.loss.kind == "kl" else OUTPUT_RATE_PER_DISTANCE
    rate = rate_for(plan.model_rate, state.loss_after_blocks, per_distance)
    # Far from the goal many small steps pay; near it, where steps are short, half as many are as good and cheaper, and
    # the teacher is no longer the better guide by so much that the text has nothing to add.
    near = is_near(rate, plan.model_rate)
    pieces = max(1, job.pieces // 2) if near else job.pieces
    optimizer = job.optimizer(rate, state.optimizer)
    while state.model_steps < plan.model_steps and not state.early_stopped:
        losses, trouble = [], ""
        spliced = not near or state.model_steps < plan.spliced * plan.model_steps
        for number, piece in enumerate(job.train_pieces(state.model_steps, pieces)):
            share = cosine(state.model_steps + number / pieces, plan.model_steps, plan.warmup)
            found = _gradients(job, state, _Step(piece, (state.model_steps, number), spliced, near))
            if found is None:
                continue
            if not _finite(*found):
                trouble = "a loss or gradient was not finite"
                break
            losses.append(found[0])
            job.apply(optimizer, found[1], state.rate_scale * share)
        if losses:
            state.curve.append([float(state.model_steps), sum(losses) / len(losses)])
        elif not trouble:
            state.skipped += 1
        state.model_steps += 1
        if not trouble and is_evaluation(state.model_steps, plan.model_steps, plan.evaluations):
            trouble = _evaluate(job, state)
        if trouble:
            _fall_back(job, state, trouble)
            optimizer = job.optimizer(rate)
        note = f"end to end, held-out loss {state.best_loss:.4g} (was {state.loss_before:.4g})"
        job.after_step(state, optimizer, note)
    job.trainables.restore(state.best)
    if state.skipped:
        state.notes.append(f"{state.skipped} steps were skipped: the original's output was not finite on their batches")
    if plan.model_steps and state.best_loss >= state.loss_before:
        state.notes.append("healing found no weights better than the ones it started from, which were kept")


@dataclass(frozen=True)
class _Step:
    """What one step reads: whether `text` is a target too, and whether it is `spliced`."""

    batch: Batch
    key: tuple[int, int]
    spliced: bool
    text: bool


def _gradients(job: Job, state: State, step: _Step) -> tuple[float, list[Tensor | None]] | None:
    """Distance over a step and the gradients of its loss; None where the teacher's own output is not finite."""
    parts = list(enumerate(pieces_of(job.ranks.own(step.batch), len(job.crew))))
    found = together(job.crew.each(lambda worker, part: _part(job, state, step, worker, *part), parts))
    experts = {name: len(share) for name, share in state.shares.items()}
    found = job.ranks.together(found, job.trainables.masters, experts)
    if found is None:
        return None
    for name, share in state.shares.items():
        state.shares[name] = follow(share, found.counts[name])
    return found.distance, found.gradients


@torch.enable_grad()
def _part(job: Job, state: State, step: _Step, worker: Worker, number: int, batch: Batch) -> Part | None:
    """One worker's part of a step."""
    place = job.ranks.rank * len(job.crew) + number
    key = (*step.key, place) if place else step.key
    with job.reading(worker, batch, *key, spliced=step.spliced) as text:
        return _distance(job, state, worker, batch, text if step.text else Text())


def _distance(job: Job, state: State, worker: Worker, batch: Batch, text: Text) -> Part | None:
    inputs = Inputs.of(batch)
    with torch.no_grad(), InputTap(worker.teacher_blocks) as teacher_inputs:
        target = inputs.call(worker.teacher)
    if not job.loss.usable(target):
        return None
    with RoutingTap(worker.student_blocks) as tap, InputTap(worker.student_blocks) as student_inputs:
        output = inputs.call(worker.student)
        routings = tap.take()
    wrong, whole = job.loss.sums(output, target, batch)
    distance = wrong / whole.clamp_min(1e-30)
    surprise = next_token_loss(output, text.ids) if job.text_weight else None
    loss = distance if surprise is None else torch.lerp(distance, surprise, job.text_weight)
    if job.plan.match_inputs:
        weight = job.plan.match_inputs * cosine(state.model_steps, job.plan.model_steps, 0.0)
        loss = loss + weight * mismatch(student_inputs.seen, teacher_inputs.seen)
    for name, block in worker.student_blocks.items():
        push = pressure(routings[name], block.router.spec, state.shares[name], job.plan.min_load)
        if push is not None:
            loss = loss + distance.detach() * push
    counts = {name: count(routings[name], len(share)) for name, share in state.shares.items()}
    if not loss.requires_grad:
        raise LatentizeError(
            "healing: no gradient reaches the blocks from the model's output, as where its forward runs without them "
            "(torch.no_grad, torch.inference_mode) or gives whole numbers; mend that, or set heal_steps to 0"
        )
    found = torch.autograd.grad(loss, job.trainables.parameters, allow_unused=True)
    gradients: list[Tensor | None] = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
    return Part(wrong.item(), whole.item(), gradients, counts)


class InputTap:
    """While entered, collects the hidden states that some blocks' experts read, as (block, [T, d]) in order."""

    def __init__(self, blocks: Mapping[str, LatentMoE]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self.seen: list[tuple[str, Tensor]] = []

    def __enter__(self) -> Self:
        for name, block in self._blocks.items():
            self._handles.append(block.experts.register_forward_pre_hook(self._watch(name)))
        return self

    def __exit__(self, _kind: type[BaseException] | None, _e: BaseException | None, _at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.seen.append((name, args[0]))

        return keep


def mismatch(student: Sequence[tuple[str, Tensor]], teacher: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Relative squared errors of the student's block inputs against the teacher's, added up over the blocks."""
    total = torch.zeros(())
    for (name, mine), (other, its) in zip(student, teacher, strict=True):
        assert name == other
        if mine.requires_grad:
            target = its.to(torch.promote_types(its.dtype, torch.float32))
            total = total.to(target.device) + (mine.to(target.dtype) - target).square().sum() / target.square().sum()
    return total


def _finite(loss: float, gradients: list[Tensor | None]) -> bool:
    return math.isfinite(loss) and all(g is None or bool(g.isfinite().all()) for g in gradients)


def _evaluate(job: Job, state: State) -> str:
    """Measure, keep what is best; returns what is wrong, if anything."""
    loss, starved = job.measure()
    state.held_out_curve.append([float(state.model_steps), loss])
    if job.better(loss, starved, state):
        state.best, state.best_loss, state.best_starved, state.stale = job.trainables.snapshot(), loss, starved, 0
        state.best_end_to_end = True
        return ""
    state.stale += 1
    if not loss <= _RISING * max(state.best_loss, 1e-12) and state.stale > 1:
        return f"the held-out loss rose to {loss:.4g}"
    return "the held-out loss stopped falling" if state.stale >= job.plan.patience else ""


def _fall_back(job: Job, state: State, reason: str) -> None:
    """Back to the best weights, with a smaller rate; the end of the stage where that did not help before."""
    job.trainables.restore(state.best)
    state.rate_scale *= FALL_BACK_RATE
    state.stale = 0
    state.fall_backs += 1
    state.early_stopped = state.fall_backs > FALL_BACKS
    then = "stopped" if state.early_stopped else f"went on with {state.rate_scale:.2g} of the learning rate"
    state.notes.append(f"at step {state.model_steps} {reason}: went back to the best weights and {then}")
