"""Spliced text: what two models read is cut into pieces of several sequences put together, in both alike.

A teacher answers any text, so a student can learn from texts that nobody wrote. Calibration data is often what the
teacher was trained on; from spliced texts the student also learns how the teacher behaves where it knows less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentize.compare import main_output
from latentize.inputs import Batch, Inputs


def token_embeddings(models: Sequence[nn.Module], batch: Batch) -> list[nn.Embedding]:
    """The embeddings of tokens in `models`: those with as many rows as the first one's output has columns."""
    with torch.no_grad():
        columns = main_output(Inputs.of(batch).call(models[0]))[0].shape[-1]
    found = [m for model in models for m in model.modules() if isinstance(m, nn.Embedding)]
    return list({id(m): m for m in found if m.num_embeddings == columns}.values())


def padded(batch: Batch) -> bool:
    """Whether a batch says that some positions are padding: that goes with its sequence, and so must the ids."""
    mask = Inputs.of(batch).kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and not bool(mask.all())


class Text:
    """The token ids [B, T] that models are given to read, as the last of them read them; None before."""

    ids: Tensor | None = None


@contextmanager
def reading(
    embeddings: Sequence[nn.Embedding], generator: Callable[[], torch.Generator] | None = None
) -> Iterator[Text]:
    """While inside, listens to what the embeddings read, which is spliced where a `generator` is given.

    `generator` gives one in the same state at every call, so that every embedding reads the same.
    """
    found = Text()

    def replace(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.ids = args[0] if generator is None else splice(args[0], generator())
        return (found.ids, *args[1:])

    handles = [embedding.register_forward_pre_hook(replace) for embedding in embeddings]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def splice(ids: Tensor, generator: torch.Generator) -> Tensor:
    """`ids` [B, T] cut into spans of a random length, a half to a sixteenth of T, each taken from the next sequence.

    A token stays where it was in its sequence. With one sequence, or tokens in another shape, nothing changes.
    """
    if ids.ndim != 2 or ids.shape[0] < 2 or ids.shape[1] < 4:
        return ids
    length = int(torch.randint(max(1, ids.shape[1] // 16), ids.shape[1] // 2 + 1, (1,), generator=generator))
    return torch.cat([span.roll(number, 0) for number, span in enumerate(ids.split(length, 1))], 1)
