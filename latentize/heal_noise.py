"""Token noise: some of the tokens that two models read are replaced by others, in both alike.

A teacher answers any text, so a student can learn from texts that nobody wrote. Calibration data is often what the
teacher was trained on; from noise the student also learns how the teacher behaves where it knows less.
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


@contextmanager
def noisy(embeddings: Sequence[nn.Embedding], share: float, generator: Callable[[], torch.Generator]) -> Iterator[None]:
    """While inside, a `share` of the token ids [B, T] that the embeddings read are others of the same batch.

    `generator` gives one in the same state at every call, so that every embedding reads the same.
    """

    def replace(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replaced(args[0], share, generator()), *args[1:])

    handles = [embedding.register_forward_pre_hook(replace) for embedding in embeddings] if share else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replaced(ids: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`ids` with a share of its entries replaced by entries drawn from all of them."""
    chosen = (torch.rand(ids.shape, generator=generator) < share).to(ids.device)
    drawn = torch.randint(max(1, ids.numel()), ids.shape, generator=generator).to(ids.device)
    return torch.where(chosen, ids.flatten()[drawn], ids) if ids.numel() else ids
