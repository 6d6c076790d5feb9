"""Where a difference begins: no block is blamed for a router's choice that rounding decides."""

import pytest
import torch
from torch import nn

from latentize.compare_blocks import in_onnxruntime
from latentize.errors import LatentizeError
from latentize.exporters import onnx_blocks
from latentize.inputs import Inputs
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

TIED, CLEAR = Inputs((torch.tensor([[-1.0, 0.0]]),)), Inputs((torch.tensor([[1.0, 0.0]]),))


class Net(nn.Module):
    """One expert out of three; the choice is a tie where the first number is negative."""

    def __init__(self):
        super().__init__()
        rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        self.moe = LatentMoE(MoESpec(RouterSpec(rows, 1), ExpertsSpec(torch.ones(3, 2, 2), torch.ones(3, 2, 2))))

    def forward(self, x):
        return self.moe(x)


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Calls of a graph whose second block is over the tolerance, but for those that `right` names."""
    pytest.importorskip("onnxruntime")
    calls, right = [], []

    def block_errors(_path, model, inputs, _tolerance):
        calls.append(inputs)
        model(*inputs.args)
        return ({"a": 0.0}, "") if any(inputs is one for one in right) else ({"a": 0.0, "b": 0.5}, "b")

    monkeypatch.setattr(onnx_blocks, "block_errors", block_errors)
    return calls, right, lambda given: in_onnxruntime(tmp_path / "model.onnx", Net(), given, 1, 1e-5)


def test_a_block_over_the_tolerance_is_named_where_no_choice_is_a_tie(tried):
    calls, _, search = tried
    found = search([TIED, CLEAR, CLEAR])
    assert (found.first_over, found.note, len(calls)) == ("b", "", 2)


def test_a_tie_that_changes_nothing_is_compared(tried):
    calls, right, search = tried
    right.append(TIED)
    found = search([TIED, CLEAR])
    assert (found.errors, found.first_over, found.note, len(calls)) == ({"a": 0.0}, "", "", 1)


def test_a_block_is_not_blamed_for_ties(tried):
    found = tried[2]([TIED, TIED])
    assert (found.errors, found.first_over) == ({}, "")
    assert "a router's choice is a tie that rounding decides" in found.note


def test_a_graph_that_cannot_be_searched_is_a_note(tried, monkeypatch):
    def refuse(*_):
        raise LatentizeError("model.onnx: holds 3 blocks and the model runs 2")

    monkeypatch.setattr(onnx_blocks, "block_errors", refuse)
    assert tried[2]([CLEAR]).note == "model.onnx: holds 3 blocks and the model runs 2"
