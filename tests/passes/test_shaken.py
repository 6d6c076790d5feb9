"""A shaken copy holds randomised weights, lends its memory to the trained ones, and holds the same ones afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentize.passes.double import in_double, in_own_dtype
from latentize.passes.shaken import Shaken


class Block(nn.Module):
    """Two matrices, one of them under two names, a buffer that is read and one that a run writes to."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.again = self.first
        self.register_buffer("bias", torch.zeros(6))
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        result: torch.Tensor = self.second(self.again(x)) + self.bias
        return result


NAMES = {"first.weight", "again.weight", "second.bias", "bias", "runs", "not there"}


def shaken() -> Shaken:
    found = Shaken.of(Block())
    found.randomise(NAMES, seed=3)
    return found


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_it_is_the_original_until_it_is_randomised() -> None:
    block = Block()
    for name, tensor in Shaken.of(block).module.state_dict().items():
        assert torch.equal(tensor, block.state_dict()[name].to(tensor.dtype))
        assert tensor.dtype in (torch.float64, torch.int64)


def test_only_the_named_tensors_change_and_tied_ones_once() -> None:
    found = shaken()
    original, copy = found.original.state_dict(), found.module.state_dict()
    changed = {name for name in copy if not torch.equal(copy[name], original[name].to(copy[name].dtype))}
    assert changed == {"first.weight", "again.weight", "second.bias", "bias"}
    assert torch.equal(copy["first.weight"], copy["again.weight"])
    size = (copy["first.weight"] - original["first.weight"]).norm() / original["first.weight"].norm()
    assert 0.3 < size < 0.8


def test_the_trained_weights_lie_in_its_memory_and_give_it_back() -> None:
    found = shaken()
    found.shrink({"second.bias"}, 0.1)
    before = state(found.module)
    wanted = in_double(found.original)
    x = torch.randn(3, 6, dtype=torch.float64)
    with found.trained() as trained:
        assert torch.equal(trained(x), wanted(x))
        for (name, one), (_, other) in zip(trained.named_parameters(), found.module.named_parameters(), strict=True):
            assert one.data_ptr() == other.data_ptr(), name
    for name, tensor in found.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert int(found.original.get_buffer("runs")) == int(found.module.get_buffer("runs")) == 0


def test_randomised_weights_come_back_after_an_exception() -> None:
    found = shaken()
    before = state(found.module)
    with pytest.raises(ValueError, match="stop"), found.trained():
        raise ValueError("stop")
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.module.state_dict().items())


def test_a_part_lends_the_memory_of_the_whole() -> None:
    found = shaken()
    block, copy = found.original, found.module
    assert isinstance(block, Block)
    assert isinstance(copy, Block)
    part = found.part(nn.Sequential(block.first), nn.Sequential(copy.first))
    with part.trained() as trained:
        assert torch.equal(trained.get_parameter("0.weight"), block.first.weight.double())
        assert trained.get_parameter("0.weight").data_ptr() == copy.first.weight.data_ptr()
    assert not torch.equal(copy.first.weight, block.first.weight.double())


def test_noise_does_not_depend_on_how_much_is_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Linear(64, 96)
    found = []
    for size in (2**20, 1024):
        monkeypatch.setattr("latentize.passes.shaken._AT_ONCE", size)
        copy = Shaken.of(wide)
        copy.randomise({"weight"}, seed=1)
        found.append(copy.module.get_parameter("weight").clone())
    assert torch.equal(*found)


def test_a_copy_in_the_own_dtype_reads_the_parameters_and_writes_its_own_buffers() -> None:
    block = Block().train()
    copy = in_own_dtype(block)
    copy(torch.zeros(1, 6))
    assert copy.get_parameter("first.weight") is block.first.weight
    assert (int(block.get_buffer("runs")), int(copy.get_buffer("runs"))) == (0, 1)
    assert block.training
    assert not copy.training
