"""Tensors go to safetensors and come back strictly: complete, finite, of the same shape, shared where they were."""

import json

import pytest
import torch
from torch import nn

from latentize import tensors
from latentize.errors import LatentizeError


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((2,), float("-inf")))
        self.register_buffer("strided", torch.randn(width, width)[:, ::2])


def test_tensors_come_back_bit_for_bit_and_shared_ones_stay_shared(tmp_path):
    model, other = Tied(), Tied()
    aliases = tensors.save_state(model, tmp_path)
    assert aliases == {"head.weight": "embed.weight"}
    tensors.load_state(other, tmp_path, aliases)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other.head.weight is other.embed.weight


def test_shared_tensors_are_shared_again_where_the_structure_had_them_apart(tmp_path):
    aliases = tensors.save_state(Tied(), tmp_path)
    apart = Tied()
    apart.head.weight = nn.Parameter(torch.zeros(5, 4))
    tensors.load_state(apart, tmp_path, aliases)
    assert apart.head.weight.data_ptr() == apart.embed.weight.data_ptr()


def test_the_stored_dtype_wins(tmp_path):
    tensors.save_state(nn.Linear(2, 2).bfloat16(), tmp_path)
    model = nn.Linear(2, 2)
    tensors.load_state(model, tmp_path, {})
    assert model.weight.dtype == torch.bfloat16


def test_large_models_are_sharded_with_an_index(tmp_path):
    model, other = (
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))),
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))),
    )
    tensors.save_state(model, tmp_path, max_shard_bytes=600)
    index = json.loads((tmp_path / tensors.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == 4 * (64 + 8) * 4
    tensors.load_state(other, tmp_path, {})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_parameters_are_not_saved(tmp_path, value):
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(LatentizeError, match=r"bias \[2\]: 1 values are not finite"):
        tensors.save_state(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_without_data_are_not_saved(tmp_path):
    with pytest.raises(LatentizeError, match="missing, it is on the meta device"):
        tensors.save_state(nn.Linear(2, 2, device="meta"), tmp_path)


def test_state_that_is_not_tensors_is_not_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

    with pytest.raises(LatentizeError, match="_extra_state: a dict"):
        tensors.save_state(Extra(2, 2), tmp_path)


@pytest.mark.parametrize(
    ("saved", "model", "words"),
    [
        (nn.Linear(2, 2, bias=False), nn.Linear(2, 2), "bias and 0 more are missing from"),
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), "bias and 0 more are unexpected in"),
        (nn.Linear(2, 3, bias=False), nn.Linear(2, 2, bias=False), r"weight is \[3, 2\], the model expects \[2, 2\]"),
    ],
)
def test_loading_is_strict(tmp_path, saved, model, words):
    tensors.save_state(saved, tmp_path)
    with pytest.raises(LatentizeError, match=words):
        tensors.load_state(model, tmp_path, {})


def test_a_file_cut_short_is_said(tmp_path):
    tensors.save_state(nn.Linear(2, 2), tmp_path)
    file = tmp_path / tensors.FILE
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(LatentizeError, match="missing or was cut short"):
        tensors.load_state(nn.Linear(2, 2), tmp_path, {})
