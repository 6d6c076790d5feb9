"""Spliced text: both models read the same, only while inside, and only where tokens are embedded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from latentize.heal_splice import reading, splice, token_embeddings

ROWS, WIDTH = 50, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(ROWS, WIDTH), nn.Embedding(20, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS)

    def forward(self, ids: Tensor) -> Tensor:
        self.read = self.tokens(ids)
        out: Tensor = self.head(self.read + self.places(torch.arange(ids.shape[1])))
        return out


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def ids() -> Tensor:
    return torch.randint(ROWS, (8, 20), generator=torch.Generator().manual_seed(1))


def test_only_embeddings_of_the_outputs_tokens_are_found_and_each_once():
    one, other = Model(), Model()
    other.tokens = one.tokens
    assert token_embeddings((one, other), (ids(),)) == [one.tokens]


def test_both_models_read_the_same_and_only_while_inside():
    one, other = Model(), Model()
    other.tokens.load_state_dict(one.tokens.state_dict())
    one(ids())
    clean = one.read
    with reading([one.tokens, other.tokens], generator):
        one(ids())
        other(ids())
    assert torch.equal(one.read, other.read)
    assert not torch.equal(one.read, clean)
    one(ids())
    assert torch.equal(one.read, clean)


def test_every_token_stays_in_its_column_and_spans_come_from_different_sequences():
    text = torch.arange(8 * 64).view(8, 64)
    changed = splice(text, generator())
    assert torch.equal(changed.sort(0).values, text)
    sources = changed[0] // 64
    spans = sources.unique_consecutive(return_counts=True)
    assert torch.equal(spans[0], (-torch.arange(len(spans[0]))) % 8)
    assert len(spans[0]) >= 2
    assert spans[1][:-1].unique().numel() == 1


@pytest.mark.parametrize("shape", [(1, 20), (40,), (5, 3), (2, 3, 4), (0, 8)])
def test_what_cannot_be_spliced_is_left_alone(shape: tuple[int, ...]):
    values = torch.arange(math.prod(shape)).view(shape)
    assert splice(values, generator()) is values
