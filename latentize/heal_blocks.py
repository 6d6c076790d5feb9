"""The first stage of healing: every block learns its original's routed output on the original's own inputs.

Errors are measured as the model's output minds them (`latentize.heal_sensitivity`). The teacher is run a few batches at
a time, as many as the bound on kept activations allows, and all blocks take their steps on those before the next ones
are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.heal_job import Job, State, cosine, is_evaluation, rate_for
from latentize.heal_load import RoutingTap, count, follow, pressure
from latentize.heal_sensitivity import output_metrics
from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE
from latentize.taps import BlockCall, tapped

#: At most so many held-out tokens a block are measured on.
_HELD_OUT_TOKENS = 8192


@dataclass(frozen=True)
class Activations:
    """What went into one block and came out of its routed path, over T tokens."""

    inputs: tuple[Tensor, ...]  # hidden [T, d], and what the router read [T, d] where that is another tensor
    output: Tensor  # [T, d]

    def __len__(self) -> int:
        return len(self.output)

    def at(self, rows: Tensor) -> Activations:
        """Some of the tokens."""
        return Activations(tuple(t[rows] for t in self.inputs), self.output[rows])


def heal_blocks(job: Job, state: State) -> None:
    """Train every block on the teacher's activations; each keeps the weights that did best on held-out tokens."""
    plan = job.plan
    if not plan.block_steps:
        return
    metrics = output_metrics(job.teacher, job.teacher_blocks, job.train, job.seed)
    held_out, _ = collect(job, job.held_out, lambda tokens: tokens >= _HELD_OUT_TOKENS)
    if not state.block_best:
        state.block_best, state.block_best_errors = job.trainables.snapshot(), _errors(job, held_out, metrics)
    squares = [error**2 for error in state.errors_before.values()]
    optimizer = job.optimizer(rate_for(plan.block_rate, sum(squares) / len(squares)), state.optimizer)
    while state.block_steps < plan.block_steps and state.stale < plan.patience:
        wanted = (plan.block_steps - state.block_steps) * plan.block_tokens
        limit = min(wanted, max(plan.block_tokens, plan.activation_bytes // _token_bytes(job)))
        read = state.cursor
        stream = (job.train_batch(i) for i in range(read, read + len(job.train)))
        chunk, batches = collect(job, stream, lambda tokens: tokens >= limit)  # noqa: B023 - used at once
        state.cursor += batches
        tokens = max((len(a) for a in chunk.values()), default=0)
        if not tokens:
            job.notes.append("no block was reached by the calibration batches: nothing to heal block-wise")
            return
        steps = min(max(1, tokens // plan.block_tokens), plan.block_steps - state.block_steps)
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


def collect(job: Job, batches: Iterable[Batch], enough: Callable[[int], bool]) -> tuple[dict[str, Activations], int]:
    """The teacher's activations at every block over `batches`, until `enough(tokens)`; and the batches that took."""
    kept: dict[str, list[Activations]] = {name: [] for name in job.teacher_blocks}

    def keep(name: str, call: BlockCall) -> None:
        if not bool(call.output.isfinite().all()):
            return
        kept[name].append(Activations(tuple(t.detach() for t in call.inputs), call.output.detach()))

    used = 0
    with torch.no_grad(), tapped(job.teacher_blocks, keep):
        for batch in batches:
            Inputs.of(batch).call(job.teacher)
            used += 1
            if enough(max(sum(len(a) for a in parts) for parts in kept.values())):
                break
    return {name: _joined(parts) for name, parts in kept.items() if parts}, used


def _joined(parts: list[Activations]) -> Activations:
    inputs = tuple(torch.cat(column) for column in zip(*(p.inputs for p in parts), strict=True))
    return Activations(inputs, torch.cat([p.output for p in parts]))


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
    for routing in routings:
        push = pressure(routing, block.router.spec, state.shares[name], job.plan.min_load)
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
