"""What models are compared on: lengths up to the model's own, cut from data, within time and memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from latentize import compare_inputs
from latentize.compare_inputs import lengths, own_length, sequences


class Ids(nn.Module):
    """Scores of ids, as a model with a configuration of its own length."""

    def __init__(self, longest=None):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=longest)
        self.table = nn.Embedding(8, 8)
        self.longest = longest

    def forward(self, ids, mask=None):
        if self.longest is not None and ids.shape[1] > self.longest:
            raise ValueError(f"{ids.shape[1]} positions")
        return self.table(ids)


def batch(rows, start):
    return (torch.arange(start, start + rows * 10).view(rows, 10) % 8, torch.ones(rows, 10, dtype=torch.bool))


@pytest.mark.parametrize(
    "last, expected", [(1, [1]), (40, [1, 16, 40]), (256, [1, 16, 64, 256]), (4000, [1, 16, 256, 1024, 4000])]
)
def test_lengths_end_with_the_last_one(last, expected):
    assert lengths(last) == expected


def test_the_models_own_length_is_read_off_its_configuration():
    assert own_length(Ids(40)) == 40
    assert own_length(Ids()) is None
    nested = nn.Identity()
    nested.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=512))
    assert own_length(nested) == 512
    assert own_length(nn.Identity()) is None


def test_sequences_are_cut_from_the_data_end_to_end():
    notes = []
    found = list(sequences(Ids(40), [batch(3, 0), batch(3, 30)], None, notes))
    assert [(each.tokens, len(each.calls)) for each in found] == [(1, 16), (16, 16), (40, 16)]
    text = torch.arange(60) % 8
    assert torch.equal(found[1].calls[1].args[0], text[16:32].unsqueeze(0))
    assert torch.equal(found[2].calls[1].args[0], text[torch.arange(40, 80) % 60].unsqueeze(0))
    assert found[2].calls[0].args[1].shape == (1, 40)  # what goes with the ids has their length
    assert notes == []


def test_what_a_length_would_take_is_said_instead_of_trying_it(monkeypatch):
    notes = []
    monkeypatch.setattr(compare_inputs, "_SECONDS", 0.0)
    found = list(sequences(Ids(1000), [batch(3, 0)], None, notes))
    assert [each.tokens for each in found] == [1, 16, 256]
    assert notes == ["not compared at 1000 tokens: a call may take 0 s"]
    notes.clear()
    monkeypatch.setattr(compare_inputs, "_SECONDS", 9.0)
    monkeypatch.setattr(compare_inputs, "free_memory", lambda: 1)
    assert [each.tokens for each in sequences(Ids(1000), [batch(3, 0)], None, notes)] == [1, 16, 256]
    assert "its outputs would take" in notes[0]


def test_a_length_that_the_model_rejects_is_left_out_with_its_reason():
    model, notes = Ids(40), []
    model.longest = 20
    assert [each.tokens for each in sequences(model, [batch(3, 0)], None, notes)] == [1, 16]
    assert notes == ["not compared at 40 tokens: the model does not run on 40 tokens: ValueError: 40 positions"]


def test_a_model_of_one_size_is_compared_on_its_example():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(3, 14)

    notes = []
    (only,) = sequences(Fixed(), [(torch.zeros(2, 7, 3),)], None, notes)
    assert (only.tokens, len(only.calls), len(notes)) == (14, 1, 4)
