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
    sequences = sequences_of(batch)
    if count < 2 or sequences < 2:
        return [batch]
    rows = torch.arange(sequences).tensor_split(min(count, sequences))
    return [_part(batch, sequences, slice(int(places[0]), int(places[-1]) + 1)) for places in rows]


def sequences_of(batch: Batch) -> int:
    """How many sequences a batch has, by the rule of `pieces_of`; 0 where no axis of them is seen."""
    leading = next((tensor for tensor in Inputs.of(batch).tensors() if _has_sequences(tensor)), None)
    return 0 if leading is None else len(leading)


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some of the sequences [n] of a batch, by the rule of `pieces_of`."""
    return _part(batch, sequences_of(batch), rows)


def _part(batch: Batch, sequences: int, rows: slice | Tensor) -> Batch:
    def part(leaf: Any) -> Any:
        divided = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == sequences
        return leaf[rows] if divided else leaf

    found: Batch = pytree.tree_map(part, batch)
    return found


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
