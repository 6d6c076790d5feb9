"""The first stage of healing: every block learns its original's routed output, all blocks at once.

They do so on the original's own inputs first and, in as many of the last steps as the plan says, on what they read in
the student (`latentize.heal_readings`). Errors are measured as the model's output minds them
(`latentize.heal_sensitivity`). The models are run a few batches at a time, as many as the bound on kept activations
allows, and all blocks take their steps on those before the next ones are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from latentize.heal_job import Job, State, cosine, is_evaluation, rate_for
from latentize.heal_load import RoutingTap, count, follow, pressure
from latentize.heal_readings import Activations, Readings, Student, collect
from latentize.heal_sensitivity import output_metrics
from latentize.inputs import Batch
from latentize.moe import LatentMoE

#: At most so many held-out tokens a block are measured on.
_HELD_OUT_TOKENS = 8192


def heal_blocks(job: Job, state: State) -> None:
    """Train every block; each keeps the weights that did best on held-out tokens of the kind that it learned from."""
    plan = job.plan
    if not plan.block_steps:
        return
    metrics = output_metrics(job.teacher, job.teacher_blocks, job.train, job.seed)
    squares = [error**2 for error in state.errors_before.values()]
    optimizer = job.optimizer(rate_for(plan.block_rate, sum(squares) / len(squares)), state.optimizer)
    switch = plan.block_steps - round(plan.own_share * plan.block_steps)
    resumed_late = bool(state.block_best) and state.block_steps >= switch  # these are read in the student below
    held_out = {} if resumed_late else _held_out(job, state, own=False)
    if not state.block_best:
        state.block_best = job.trainables.snapshot(blocks=True)
        state.block_best_errors = _errors(job, held_out, metrics)
    while state.block_steps < plan.block_steps and state.stale < plan.patience:
        own = state.block_steps >= switch
        if state.block_steps == switch:
            state.stale = 0
        until = min(plan.block_steps, state.block_steps + plan.own_steps) if own else switch
        if own:
            held_out = _held_out(job, state, own=True)
            _measure_best(job, state, held_out, metrics)
        read = state.cursor
        chunk = _chunk(job, state, (until - state.block_steps) * plan.block_tokens, own=own)
        tokens = max((len(a) for a in chunk.values()), default=0)
        if not tokens:
            job.notes.append("no block was reached by the calibration batches: nothing to heal block-wise")
            return
        steps = min(max(1, tokens // plan.block_tokens), until - state.block_steps)
        order = job.generator(1, read)
        pieces = {name: torch.randperm(len(a), generator=order).tensor_split(steps) for name, a in chunk.items()}
        for step in range(steps):
            tokens_now = {name: chunk[name].at(rows[step]) for name, rows in pieces.items() if len(rows[step])}
            _step(job, state, optimizer, tokens_now, metrics)
            state.block_steps += 1
            if is_evaluation(state.block_steps, plan.block_steps, plan.evaluations):
                _keep_best(job, state, _errors(job, held_out, metrics))
            note = f"block-wise, largest block error {max(state.block_best_errors.values(), default=0.0):.4f}"
            job.after_step(state, optimizer, note, resumable=step == steps - 1)
    job.trainables.restore(state.block_best)


def _held_out(job: Job, state: State, *, own: bool) -> dict[str, Activations]:
    return _read(job, state, job.held_out, lambda tokens: tokens >= _HELD_OUT_TOKENS, own=own).of


def _chunk(job: Job, state: State, wanted: int, *, own: bool) -> dict[str, Activations]:
    """The next `wanted` tokens of training, or as many of them as are kept at once."""
    limit = min(wanted, max(job.plan.block_tokens, job.plan.activation_bytes // _token_bytes(job)))
    read = state.cursor
    stream = (job.train_batch(i) for i in range(read, read + len(job.train)))
    found = _read(job, state, stream, lambda tokens: tokens >= limit, own=own)
    state.cursor += found.batches
    return found.of


def _read(job: Job, state: State, batches: Iterable[Batch], enough: Callable[[int], bool], *, own: bool) -> Readings:
    student = Student(job.student, job.student_blocks) if own else None
    found = collect(job.teacher, job.teacher_blocks, batches, enough, student)
    for name in sorted(found.unlike):
        note = (
            f"block {name!r}: in the rewritten model other numbers of tokens reach it than in the original, or values "
            "that are not finite; where they do, it was healed block-wise on what the original reads"
        )
        if note not in state.notes:
            state.notes.append(note)
    return found


def _measure_best(
    job: Job, state: State, held_out: Mapping[str, Activations], metrics: Mapping[str, Tensor]
) -> None:
    """The errors of the best weights on these tokens: those on other inputs say nothing of them."""
    now = job.trainables.snapshot(blocks=True)
    job.trainables.restore(state.block_best)
    state.block_best_errors = _errors(job, held_out, metrics)
    job.trainables.restore(now)


def _token_bytes(job: Job) -> int:
    """Bytes that one token's activations take over all blocks: an input and an output of width d each."""
    total = 0
    for block in job.teacher_blocks.values():
        spec = block.spec
        total += 2 * spec.hidden_size * spec.experts.up.element_size()
    return max(1, total)


def _step(
    job: Job,
    state: State,
    optimizer: torch.optim.Optimizer,
    tokens: Mapping[str, Activations],
    metrics: Mapping[str, Tensor],
) -> None:
    """One step of all blocks; a block whose loss or gradient is not finite sits it out."""
    names = list(tokens)
    found = job.crew.each(lambda _worker, name: _block_gradients(job, state, name, tokens[name], metrics[name]), names)
    gradients: list[Tensor | None] = [None] * len(job.trainables.parameters)
    for name, (of_block, counts) in zip(names, found, strict=True):
        state.shares[name] = follow(state.shares[name], counts)
        for i, gradient in zip(job.trainables.of(name), of_block, strict=True):
            gradients[i] = gradient
    job.apply(optimizer, gradients, cosine(state.block_steps, job.plan.block_steps, job.plan.warmup))


@torch.enable_grad()
def _block_gradients(
    job: Job, state: State, name: str, activations: Activations, metric: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of one block's error by its parameters, each None where one is not finite, and its experts' counts."""
    block = job.student_blocks[name]
    with RoutingTap({name: block}) as tap:
        wrong, whole = squared_error(block, activations, metric)
        routings = tap.take()[name]
    loss = wrong / whole.clamp_min(1e-30)
    push = pressure(routings, block.router.spec, state.shares[name], job.plan.min_load)
    if push is not None:
        loss = loss + loss.detach() * push
    parameters = [job.trainables.parameters[i] for i in job.trainables.of(name)]
    found: list[Tensor | None] = list(torch.autograd.grad(loss, parameters, allow_unused=True))
    if not math.isfinite(loss.item()) or not all(g is None or bool(g.isfinite().all()) for g in found):
        found = [None] * len(found)
    return found, count(routings, len(state.shares[name]))


def squared_error(block: LatentMoE, activations: Activations, metric: Tensor) -> tuple[Tensor, Tensor]:
    """‖(student − teacher) R‖² and ‖teacher R‖² over the tokens for a metric R [d, d], in at least fp32."""
    target = activations.output.to(torch.promote_types(activations.output.dtype, metric.dtype))
    difference = block(*activations.inputs).to(target.dtype) - target
    root = metric.to(target.dtype)
    return (difference @ root).square().sum(), (target @ root).square().sum()


def _errors(job: Job, held_out: Mapping[str, Activations], metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each block on the held-out tokens, in its metric."""
    errors = {}
    with torch.no_grad():
        for name, activations in held_out.items():
            pieces = torch.arange(len(activations)).tensor_split(math.ceil(len(activations) / job.plan.block_tokens))
            sums = [squared_error(job.student_blocks[name], activations.at(r), metrics[name]) for r in pieces]
            wrong, whole = sum(s[0].item() for s in sums), sum(s[1].item() for s in sums)
            errors[name] = math.sqrt(wrong / whole) if whole else 0.0
    return errors


def _keep_best(job: Job, state: State, errors: Mapping[str, float]) -> None:
    gained = False
    for name, error in errors.items():
        if error < state.block_best_errors[name]:  # false for NaN
            gained = True
            state.block_best_errors[name] = error
            for i in job.trainables.of(name):
                state.block_best[i].copy_(job.trainables.masters[i])
    state.stale = 0 if gained else state.stale + 1
