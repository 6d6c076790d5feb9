"""Arguments brought to another number of tokens, and models left as they were found."""

import random

import pytest
import torch
from torch import nn

from latentize.inputs import Inputs, observing, runnable_at, with_tokens


class Embeds(nn.Module):
    """Token ids to vectors; knows 8 positions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 4)
        self.positions = nn.Embedding(8, 4)

    def forward(self, ids, mask=None):
        return self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_token_ids_are_cut_and_repeated_along_the_second_axis(tokens):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    resized = with_tokens((ids,), {}, tokens)
    assert resized is not None
    assert resized.args[0].tolist() == [[[5, 6, 7][i % 3] for i in range(tokens)]]


@pytest.mark.parametrize("shape, expected", [((2, 5, 4), (1, 9, 4)), ((5, 4), (9, 4)), ((2, 4, 4), (1, 9, 4))])
def test_hidden_states_keep_their_width(shape, expected):
    resized = with_tokens((torch.randn(shape),), {}, 9)
    assert resized is not None
    assert resized.args[0].shape == expected


def test_what_goes_with_the_tokens_is_resized_with_them():
    kwargs = {
        "input_ids": torch.randint(0, 9, (2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "bias": torch.zeros(2, 1, 6, 6),
        "position_ids": torch.arange(6).expand(2, 6),
        "cache_position": torch.arange(6),
        "scale": torch.tensor(2.0),
        "use_cache": False,
    }
    resized = with_tokens((), kwargs, 10)
    assert resized is not None
    shapes = {name: tuple(value.shape) for name, value in resized.kwargs.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "input_ids": (1, 10), "attention_mask": (1, 10), "bias": (1, 1, 10, 10), "position_ids": (1, 10),
        "cache_position": (10,), "scale": (),
    }  # fmt: skip
    assert resized.kwargs["use_cache"] is False
    assert resized.kwargs["position_ids"].tolist() == [list(range(10))]
    assert resized.kwargs["cache_position"].tolist() == list(range(10))


def test_the_given_arguments_stay_as_they_are():
    ids = torch.tensor([[1, 2]])
    kwargs = {"ids": ids}
    with_tokens((), kwargs, 5)
    assert kwargs["ids"] is ids
    assert ids.tolist() == [[1, 2]]


def test_images_have_no_token_axis_and_the_reason_shows_their_shape():
    inputs, reason = runnable_at(nn.Identity(), (torch.randn(2, 3, 8, 8),), {}, 4)
    assert inputs is None
    assert "[2, 3, 8, 8]" in reason


def test_a_length_that_the_model_does_not_take_is_refused_with_its_own_error():
    example = (torch.randint(0, 32, (1, 4)),)
    assert runnable_at(Embeds(), example, {}, 8)[1] == ""
    inputs, reason = runnable_at(Embeds(), example, {}, 9)
    assert inputs is None
    assert "9 tokens" in reason
    assert "Error" in reason


def test_observing_leaves_modes_gradients_and_random_states_as_found():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model.train()
    model[1].eval()
    torch.manual_seed(3)
    random.seed(3)
    expected, expected_python = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    with observing(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
        torch.rand(5)
        random.random()
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(2), expected)
    assert random.random() == expected_python


def test_a_batch_is_args_or_kwargs():
    x = torch.ones(2, 3)
    assert torch.equal(Inputs.of((x,)).call(nn.Identity()), x)
    assert torch.equal(Inputs.of({"input": x}).call(nn.Identity()), x)
