"""Batches taken in pieces: end to end, several steps on a few sequences each heal more than one step on all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.inputs import Batch, Inputs


def pieces_of(batch: Batch, count: int) -> list[Batch]:
    """`batch` in up to `count` pieces of consecutive sequences; whole where no axis of sequences is seen.

    The first tensor that holds token ids [B, T] or states [B, T, d] decides; every tensor whose first axis has length B
    is divided along it, and anything else is handed to each piece as it is.
    """
    leading = next((tensor for tensor in Inputs.of(batch).tensors() if _has_sequences(tensor)), None)
    if leading is None or count < 2 or len(leading) < 2:
        return [batch]
    rows = torch.arange(len(leading)).tensor_split(min(count, len(leading)))

    def part(leaf: Any, places: Tensor) -> Any:
        divided = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(leading)
        return leaf[int(places[0]) : int(places[-1]) + 1] if divided else leaf

    return [pytree.tree_map(lambda leaf, places=places: part(leaf, places), batch) for places in rows]


def piece_count(model: nn.Module, batch: Batch, least_tokens: int, most: int) -> int:
    """In how many pieces, `most` at most, of `least_tokens` tokens or more `model` takes a batch like this one."""
    leading = next((tensor for tensor in Inputs.of(batch).tensors() if _has_sequences(tensor)), None)
    if leading is None:
        return 1
    count = min(most, len(leading), leading.shape[0] * leading.shape[1] // least_tokens)
    if count < 2:
        return 1
    try:
        with torch.no_grad():
            for piece in pieces_of(batch, count):
                Inputs.of(piece).call(model)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return 1
    return count


def _has_sequences(tensor: Tensor) -> bool:
    return tensor.ndim == (3 if tensor.is_floating_point() else 2)
