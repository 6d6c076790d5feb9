"""Batches in pieces: what is divided, what is handed on whole, and when a batch stays in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentize.heal_pieces import piece_count, pieces_of


class Model(nn.Module):
    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        return ids if positions is None else ids + positions


def ids(rows: int = 6, length: int = 10) -> Tensor:
    return torch.arange(rows * length).view(rows, length)


def test_tensors_with_the_sequences_first_are_divided_and_the_rest_is_handed_on():
    batch = {"ids": ids(), "mask": torch.ones(6, 10), "positions": torch.arange(10)[None], "cache": False}
    pieces: list[Any] = pieces_of(batch, 4)
    assert [len(p["ids"]) for p in pieces] == [len(p["mask"]) for p in pieces] == [2, 2, 1, 1]
    assert torch.equal(torch.cat([p["ids"] for p in pieces]), ids())
    assert all(p["positions"] is batch["positions"] and p["cache"] is False for p in pieces)


def test_tuples_stay_tuples():
    pieces = pieces_of((ids(), 3), 2)
    assert [type(p) for p in pieces] == [tuple, tuple]
    assert [p[1] for p in pieces] == [3, 3]


@pytest.mark.parametrize("batch", [(torch.randn(8, 4),), (ids(1),), ()])
def test_a_batch_without_an_axis_of_sequences_stays_whole(batch: tuple[Tensor, ...]):
    assert pieces_of(batch, 4) == [batch]


@pytest.mark.parametrize(
    ("rows", "least", "expected"), [(6, 10, 4), (6, 20, 3), (3, 1, 3), (6, 60, 1), (6, 1000, 1), (1, 1, 1)]
)
def test_pieces_hold_enough_tokens(rows: int, least: int, expected: int):
    assert piece_count(Model(), {"ids": ids(rows)}, least, 4) == expected


def test_a_model_that_takes_no_pieces_gets_whole_batches():
    class Picky(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids.view(6, 10)

    assert piece_count(Picky(), (ids(),), 10, 4) == 1
