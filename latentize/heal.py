"""Heal a rewritten model: teach it what its original computes, block by block, then end to end.

Trained are the routers and the latent blocks alone, unless the plan says everything. What is kept is the best that was
measured on held-out batches, so a healed model is never worse there than the one healing started from. Where
torch.distributed is initialised (torchrun, accelerate) all processes call `heal` alike and share out the steps of the
second stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from latentize.compare import block_errors, main_output
from latentize.distill import OutputLoss
from latentize.errors import LatentizeError
from latentize.heal_blocks import heal_blocks
from latentize.heal_choice import choose
from latentize.heal_crew import Worker, hire
from latentize.heal_job import Job, State, Subset, split_batches
from latentize.heal_model import heal_model
from latentize.heal_outside import outside
from latentize.heal_pieces import piece_count
from latentize.heal_plan import BlockHealing, HealPlan, HealReport
from latentize.heal_ranks import Ranks
from latentize.heal_splice import token_embeddings
from latentize.heal_state import Checkpoint, Trainables, contiguous, training_room
from latentize.heal_text import predicts_next
from latentize.inputs import Batch, Inputs
from latentize.load_balance import ExpertLoad, expert_load
from latentize.moe import LatentMoE
from latentize.progress import Progress, silent

#: Held-out batches that show whether the original predicts text.
_TEXT_BATCHES = 2
#: Held-out batches that errors of blocks are measured on, evenly spread.
_ERROR_BATCHES = 4
_NARROWER = "; training the latent blocks alone (heal_train: latent) takes less"

__all__ = ["BlockHealing", "HealPlan", "HealReport", "heal"]


def heal(
    student: nn.Module,
    teacher: nn.Module,
    student_blocks: Mapping[str, LatentMoE],
    teacher_blocks: Mapping[str, LatentMoE],
    calibration: Sequence[Batch],
    *,
    steps: HealPlan,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> HealReport:
    """Train the blocks of `student` in place until its output is as close to that of `teacher` as it gets.

    Args:
        student: the rewritten model; what it shares with `teacher` is not touched. To train everything it must share
            nothing outside its blocks (`latentize.apart`).
        teacher: the original model with its blocks in canonical form.
        student_blocks, teacher_blocks: the same names -> the blocks inside `student` and `teacher`.
        calibration: batches, tuples of args or dicts of kwargs. Some are held out; a single batch is both trained on
            and measured on, which a note of the report says.
        steps: how long to heal.
        seed: decides the order of batches and tokens; the caller's random state is left alone.
        progress: called after every step with the steps done and their total over both stages.
        checkpoint: a folder. The state is saved there now and then; called again with the same arguments after an
            interruption, healing goes on from it and ends with the same weights.

    Raises:
        LatentizeError: no batch, blocks that do not match, a checkpoint of another job, or everything is to be trained
            in a student that shares parameters with the teacher.
        ResourceError: out of memory or disk.
    """
    _check(student, teacher, student_blocks, teacher_blocks, calibration)
    train, held_out, notes = split_batches(calibration, steps)
    everything = steps.train == "all"
    with training_room(seed, student, teacher, advice=_NARROWER if everything else ""):
        more, left = outside(student, student_blocks, teacher) if everything else ({}, [])
        notes += left
        trainables = Trainables(student_blocks, teacher, more)
        with contiguous(teacher_blocks):
            held_out, targets = _usable(teacher, held_out, notes, steps.activation_bytes)
            loss = OutputLoss.of(teacher, held_out[0])
            embeddings = token_embeddings((teacher, student), held_out[0]) if loss.kind == "kl" else []
            is_text = predicts_next(teacher, embeddings, held_out[:_TEXT_BATCHES])
            fingerprint = {
                "seed": seed,
                "plan": {k: v for k, v in asdict(steps).items() if k != "save_seconds"},
                "batches": len(calibration),
                "parameters": trainables.shapes(),
            }
            ranks = Ranks.here()
            pieces = piece_count(teacher, train[0], steps.piece_tokens, steps.pieces)
            crew = hire(Worker(student, teacher, student_blocks, teacher_blocks, embeddings), train[0], pieces)
            with crew.at_work():
                choice = choose(crew, train) if loss.kind == "kl" and pieces > 1 else None
                job = Job(
                    student, teacher, student_blocks, teacher_blocks, trainables, loss, train, held_out, targets, steps,
                    seed, progress or silent, Checkpoint(checkpoint, fingerprint, writes=ranks.rank == 0), notes,
                    trainables.step_sizes(teacher_blocks), pieces, crew, ranks, choice,
                    steps.text if is_text else 0.0,
                )  # fmt: skip
                return _run(job)


def _run(job: Job) -> HealReport:
    job.agree()
    saved = job.checkpoint.load()
    state = job.resume(saved) if saved is not None else job.begin(job.measure()[0], _errors(job), _loads(job))
    if state.stage == "blocks":
        heal_blocks(job, state)
        _keep_better_start(job, state)
        state.errors_after_blocks = _errors(job)
        state.enter("model")
        job.save(state)
    if state.stage == "model":
        job.agree()
        heal_model(job, state)
        job.agree()
        state.enter("done")
    errors, loads = _errors(job), _loads(job)
    job.save(state)
    blocks = {
        name: BlockHealing(
            state.errors_before[name],
            state.errors_after_blocks[name],
            errors[name],
            ExpertLoad.of(state.loads_before[name], state.load_tokens[name]),
            loads[name],
        )
        for name in job.student_blocks
    }
    return HealReport(
        blocks=blocks,
        loss_kind=job.loss.kind,
        loss_before=state.loss_before,
        loss_after_blocks=state.loss_after_blocks,
        loss_after=state.best_loss,
        block_steps=state.block_steps,
        model_steps=state.model_steps,
        early_stopped=state.early_stopped,
        seconds=state.seconds,
        curve=tuple((int(s), float(v)) for s, v in state.curve),
        held_out_curve=tuple((int(s), float(v)) for s, v in state.held_out_curve),
        notes=tuple(job.notes + state.notes),
        outside=job.trainables.outside if state.best_end_to_end else 0,
    )


def _errors(job: Job) -> dict[str, float]:
    some = job.held_out[:: max(1, len(job.held_out) // _ERROR_BATCHES)]
    return block_errors(job.teacher_blocks, job.student_blocks, job.teacher, some)


def _loads(job: Job) -> dict[str, ExpertLoad]:
    return expert_load(job.student, job.student_blocks, job.held_out)


def _keep_better_start(job: Job, state: State) -> None:
    """End-to-end healing starts from the block-wise result only where that is closer to the teacher as a whole."""
    loss, starved = job.measure()
    if job.better(loss, starved, state):
        state.best, state.best_loss, state.best_starved = job.trainables.snapshot(), loss, starved
    elif state.block_steps:
        job.trainables.restore(state.best)
        state.notes.append(
            "block-wise healing brought the model's output no closer to the original's "
            f"({state.loss_before:.4g} -> {loss:.4g}) and was undone"
        )
    state.loss_after_blocks = state.best_loss


def _usable(
    teacher: nn.Module, held_out: Subset, notes: list[str], most: int
) -> tuple[Subset, list[Tensor] | None]:
    """The held-out batches on which the teacher's output is finite, and that output where all takes `most` bytes.

    Raises:
        LatentizeError: there is none.
    """
    good: list[int] = []
    targets: list[Tensor] | None = []
    with torch.no_grad():
        for i, batch in enumerate(held_out):
            output = Inputs.of(batch).call(teacher)
            if not OutputLoss.usable(output):
                continue
            good.append(i)
            if targets is not None:
                targets.append(main_output(output)[0])
                targets = targets if sum(target.nbytes for target in targets) <= most else None
    if not good:
        raise LatentizeError(
            f"healing: the original's output is not finite on any of the {len(held_out)} held-out calibration batches; "
            "look for NaN or Inf in the model's weights and in the batches"
        )
    if len(good) < len(held_out):
        notes.append(f"{len(held_out) - len(good)} held-out batches gave non-finite outputs and were left out")
    return held_out.pick(good), targets


def _check(
    student: nn.Module, teacher: nn.Module, student_blocks: Mapping[str, LatentMoE],
    teacher_blocks: Mapping[str, LatentMoE], calibration: Sequence[Batch],
) -> None:  # fmt: skip
    if not len(calibration):
        raise LatentizeError("healing: no calibration batch was given; give at least one, or set heal_steps to 0")
    if any(tensor.is_inference() for model in (student, teacher) for tensor in model.parameters()):
        raise LatentizeError(
            "healing: the model's weights were made under torch.inference_mode, which keeps gradients from passing "
            "through them; build the model outside of it, or set heal_steps to 0"
        )
    if set(student_blocks) != set(teacher_blocks):
        odd = sorted(set(student_blocks) ^ set(teacher_blocks))
        raise LatentizeError(f"healing: blocks {', '.join(odd)} are in only one of the two models; pass the same names")
