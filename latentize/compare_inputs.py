"""What models are compared on: sequences of several lengths up to the model's own, cut from its data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.inputs import Batch, Inputs, observing, runnable_at
from latentize.progress import free_memory

#: Lengths that every model is tried at; longer ones follow, four times as long each, up to the model's own.
LENGTHS = (1, 16, 256)
#: Tokens compared at each length, about; sequences at most.
_TOKENS, _SEQUENCES = 1024, 16
#: Seconds that one call may be expected to take, and the share of the free memory that its outputs may.
_SECONDS, _SHARE = 20.0, 0.25


@dataclass(frozen=True)
class Sequences:
    """Calls of one sequence of `tokens` tokens each."""

    tokens: int
    calls: tuple[Inputs, ...]


def sequences(model: nn.Module, batches: Sequence[Batch], longest: int | None, notes: list[str]) -> Iterator[Sequences]:
    """Sequences cut from `batches` at every length that `model` runs on; `notes` gets why longer ones are left out.

    Args:
        model: it is run on each length once.
        batches: what they are cut from, joined; repeated where a length needs more.
        longest: the last length; None for the model's own, or of `LENGTHS` where it names none.
    """
    own = own_length(model)
    last = longest if longest is not None else own or max(LENGTHS)
    pool = _pool(batches)
    before: _Cost | None = None
    for tokens in lengths(last):
        if reason := _too_much(tokens, before):
            notes.append(f"not compared at {tokens} tokens: {reason}")
            break
        inputs, reason = runnable_at(model, *_parts(batches[0]), tokens)
        if inputs is None:
            notes.append(f"not compared at {tokens} tokens: {reason}")
            continue
        before = _Cost.of(model, inputs, tokens)
        count = max(1, min(_SEQUENCES, _TOKENS // tokens))
        yield Sequences(tokens, tuple(_filled(inputs, pool, i) for i in range(count)))
    if before is None:  # it takes its own sizes only
        calls = tuple(Inputs.of(batch) for batch in batches[:1])
        yield Sequences(max((t.numel() // t.shape[-1] for t in calls[0].tensors() if t.ndim > 1), default=1), calls)


def lengths(last: int) -> list[int]:
    """`LENGTHS` and four times as long each, up to `last` and with it."""
    found = [length for length in LENGTHS if length < last]
    while found and found[-1] * 4 < last:
        found.append(found[-1] * 4)
    return [*found, last]


def own_length(model: nn.Module) -> int | None:
    """The longest sequence that the model's configuration names; None where it names none."""
    config = getattr(model, "config", None)
    inner = [config, *(getattr(config, name, None) for name in ("text_config", "llm_config"))]
    found = [getattr(c, "max_position_embeddings", None) for c in inner if c is not None]
    return next((length for length in found if isinstance(length, int) and length > 0), None)


@dataclass(frozen=True)
class _Cost:
    """What one call on so many tokens took."""

    tokens: int
    seconds: float
    nbytes: int

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, tokens: int) -> _Cost:
        start = time.monotonic()
        with observing(model):
            output = inputs.call(model)
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        return cls(tokens, time.monotonic() - start, sum(leaf.nbytes for leaf in leaves))


def _parts(batch: Batch) -> tuple[tuple[object, ...], dict[str, object]]:
    inputs = Inputs.of(batch)
    return inputs.args, dict(inputs.kwargs)


def _too_much(tokens: int, shorter: _Cost | None) -> str:
    """Why a length beyond those every model is tried at is not tried, given what a shorter one took; "" to try it."""
    if shorter is None or tokens <= max(LENGTHS):
        return ""
    ratio = tokens / shorter.tokens
    expected, needed, free = shorter.seconds * ratio**2, shorter.nbytes * ratio, free_memory()
    if expected > _SECONDS:
        return f"a call may take {expected:.0f} s"
    if free is not None and needed > _SHARE * free:
        return f"its outputs would take {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"
    return ""


def _pool(batches: Sequence[Batch]) -> Tensor | None:
    """The leading tensors of the batches end to end, [P, ...]; None where they do not fit together."""
    parts = [tensor for batch in batches if (tensor := Inputs.of(batch).leading()) is not None]
    rows = [t if t.is_floating_point() and t.ndim == 2 else t.flatten(0, 1) for t in parts]
    if not rows or any(t.shape[1:] != rows[0].shape[1:] or t.dtype != rows[0].dtype for t in rows):
        return None
    return torch.cat(rows)


def _filled(inputs: Inputs, pool: Tensor | None, number: int) -> Inputs:
    """The same call with part `number` of the pool as its leading tensor; the pool repeats."""
    leading = inputs.leading()
    if pool is None or leading is None:
        return inputs
    batched = not (leading.is_floating_point() and leading.ndim == 2)
    tokens = leading.shape[1] if batched else leading.shape[0]
    rows = pool[torch.arange(number * tokens, (number + 1) * tokens, device=pool.device) % len(pool)]
    filled = rows.unsqueeze(0) if batched else rows

    def put(leaf: object) -> object:
        return filled if leaf is leading else leaf

    args, kwargs = pytree.tree_map(put, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)
