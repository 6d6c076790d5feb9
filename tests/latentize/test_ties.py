"""Ties are told from disagreements: inputs on which rounding decides who is chosen prove nothing, and all others do."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from latentize import run_onnx
from latentize.exporters import onnx_check, onnxruntime_ops
from latentize.moe import LatentMoE
from latentize.sources import Source
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec
from latentize.ties import TieWatch, margin

X = torch.randn(1, 256, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """One block; `tied` makes two of its experts' router rows the same, of which one is chosen."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(4, 6, generator=generator)
        if tied:
            rows[1] = rows[0]
        up, down = torch.randn(4, 5, 6, generator=generator), torch.randn(4, 6, 5, generator=generator)
        self.moe = LatentMoE(MoESpec(RouterSpec(rows, 1), ExpertsSpec(up, down)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x.flatten(0, 1)).view_as(x)


def disagreeing(monkeypatch: pytest.MonkeyPatch, errors: list[float]) -> None:
    """Let every comparison run the model and find the next of `errors`; there is no library of operators."""
    left = iter(errors)

    def check(_path, model, inputs, tolerance, *, operator):
        assert operator is None
        model(*inputs[0][0])
        return SimpleNamespace(error=next(left))

    monkeypatch.setattr(onnx_check, "check_onnx", check)
    monkeypatch.setattr(onnxruntime_ops, "library", lambda: None)


def agreement(net: Net, notes: list[str]) -> list[run_onnx.OnnxAgreement]:
    return run_onnx.agreement("rewritten", Path("model.onnx"), net, Source("module", Path("net"), net, (X,)), notes)


def test_a_margin_is_the_gap_between_the_last_chosen_and_the_next():
    rule = RouterSpec(torch.empty(0), 2, order="topk_first")
    assert margin(torch.tensor([[3.0, 2.5, 1.0], [3.0, 1.0, 1.0]]).double(), rule).tolist() == [1.5, 0.0]
    assert margin(torch.ones(1, 2).double(), rule).tolist() == [math.inf]


def test_a_tie_between_groups_is_a_tie():
    rule = RouterSpec(torch.empty(0), 1, score="sigmoid", groups=Groups(2, 1, "max", "-inf"))
    logits = torch.tensor([[1.0, 0.0, 1.0, -1.0], [2.0, 0.0, 1.0, -1.0]]).double()
    assert (margin(logits, rule) == 0).tolist() == [True, False]


def test_a_watch_sees_the_closest_choice_of_all_routers():
    for tied in (True, False):
        net = Net(tied=tied)
        with torch.no_grad(), TieWatch(net) as ties:
            net(X)
        assert (ties.closest == 0.0) is tied
        assert not net.moe.router._forward_hooks


def test_a_disagreement_without_a_tie_counts_at_once(monkeypatch):
    net, notes = Net(tied=False), []
    disagreeing(monkeypatch, [3e-4] * 3)
    assert [row.passed for row in agreement(net, notes)] == [False] * 3
    assert notes == []


def test_a_disagreement_on_a_tie_is_counted_and_tried_on_other_values(monkeypatch):
    net, notes = Net(tied=True), []
    disagreeing(monkeypatch, [3e-7, 2e-7, 3e-4, 3e-7])
    rows = agreement(net, notes)
    assert [(row.passed, row.relative_error) for row in rows] == [(True, 3e-7), (True, 2e-7), (True, 3e-7)]
    assert len(notes) == 1
    assert "1 of 2 inputs of 256 tokens were left out" in notes[0]


def test_a_graph_that_never_agrees_fails_whatever_is_tied(monkeypatch):
    net, notes = Net(tied=True), []
    disagreeing(monkeypatch, [3e-4] * 100)
    assert not any(row.passed for row in agreement(net, notes))
