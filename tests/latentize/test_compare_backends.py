"""Backends against PyTorch: errors, required tolerances, memory; with runners that stand for runtimes."""

import math

import pytest
import torch
from torch import nn

from latentize import compare_backends
from latentize.compare_backends import Backend, agreement, available, call_memory, memory, timed
from latentize.compare_inputs import Sequences
from latentize.errors import LatentizeError
from latentize.inputs import Inputs
from latentize.ties import TieWatch

TOLERANCES = {torch.float32: 1e-5}


class Twice(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return {"logits": x * self.factor, "aux": x.sum()}


def runner(factor, *, shape=None, error=None):
    def run(inputs):
        if error is not None:
            raise error
        (x,) = inputs.tensors()
        logits = x * factor
        return [x.sum(), logits if shape is None else logits.reshape(shape)][::-1]

    return run


def calls(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return Sequences(tokens, tuple(Inputs((torch.randn(1, tokens, 4, generator=generator),)) for _ in range(3)))


MODELS = {"original": Twice(), "rewritten": Twice(2.1)}


def test_every_length_has_its_error_and_tolerance():
    backend = Backend("b", {"original": runner(2.0), "rewritten": runner(2.1 * (1 + 2e-5))}, TOLERANCES)
    lengths, rows = agreement(MODELS, [backend], [calls(1), calls(5)])
    assert [(row.tokens, row.sequences, row.outputs.positions) for row in lengths] == [(1, 3, 3), (5, 3, 15)]
    assert all(row.outputs.relative == pytest.approx(0.05, rel=1e-6) for row in lengths)
    assert all(row.outputs.top1 == 1.0 for row in lengths)  # called logits
    assert [(row.model, row.tokens, row.passed) for row in rows] == [
        ("original", 1, True), ("rewritten", 1, False), ("original", 5, True), ("rewritten", 5, False),
    ]  # fmt: skip
    assert rows[0].error == 0.0
    assert rows[1].error == pytest.approx(2e-5, rel=0.01)
    assert (rows[1].outputs.positions, rows[1].tolerance) == (3, 1e-5)
    _, allowed = agreement(MODELS, [backend], [calls(1)], tolerance=1e-4)
    assert all(row.passed for row in allowed)


@pytest.mark.parametrize(
    "run, words",
    [
        (runner(2.1, error=RuntimeError("no kernel\nfor it")), "it does not run: RuntimeError: no kernel for it"),
        (runner(2.1, shape=(4, 1)), r"it returns [[4, 1], []] where PyTorch returns [[1, 1, 4], []]"),
    ],
)
def test_what_does_not_run_or_fit_is_infinitely_far_off_and_says_why(run, words):
    _, (row,) = agreement(MODELS, [Backend("b", {"rewritten": run}, TOLERANCES)], [calls(1)])
    assert (row.error, row.passed, row.outputs) == (math.inf, False, None)
    assert row.note == words


def test_models_of_other_shapes_are_refused():
    with pytest.raises(LatentizeError, match=r"original returns \[1, 1, 4\] and the rewritten model \[1, 4\]"):
        agreement({"original": nn.Identity(), "rewritten": nn.Flatten(0, 1)}, [], [calls(1)])


def test_timing_says_why_a_length_is_missing():
    backend = Backend("b", {"rewritten": runner(2.0)}, TOLERANCES)
    rows = timed(backend, lambda t: "too long" if t > 1 else calls(t).calls[0], (1, 16), 3)
    assert (rows[0].backend, rows[0].tokens, rows[0].original) == ("b", 1, None)
    assert rows[0].rewritten.median_ms > 0
    assert (rows[1].rewritten, rows[1].note) == (None, "too long")


def test_the_memory_of_a_call_is_what_it_took_at_its_worst_moment():
    size = 40 << 20

    def call():
        return bytes(bytearray(size))

    found = call_memory(call)
    if found is None:
        pytest.skip("this system does not tell")
    assert size <= found < 3 * size
    assert call_memory(lambda: None) < size / 4


def test_memory_is_asked_of_lean_runners_and_read_off_devices():
    lean = {"rewritten": lambda inputs: [torch.zeros(1)]}
    backends = [Backend("lean", {}, TOLERANCES, lean), Backend("device", {}, TOLERANCES, {}, {"rewritten": 77})]
    rows = memory(MODELS, backends, lambda t: "no" if t > 1 else calls(t).calls[0], (1, 16))
    assert [(row.backend, row.tokens) for row in rows] == [("torch", 1), ("lean", 1), ("device", 1)]
    assert (rows[1].original, rows[2].rewritten) == (None, 77)


def test_backends_that_are_not_there_are_one_line_where_asked_for(tmp_path, monkeypatch):
    assert available(tmp_path, None, []) == []
    with pytest.raises(LatentizeError, match=r"holds no model\.onnx; convert with --export onnx"):
        available(tmp_path, ("ort",), [])
    with pytest.raises(LatentizeError, match="holds no engine; build one with latentize build"):
        available(tmp_path, ("torch", "trt"), [])
    (tmp_path / "model.portable.engine").write_bytes(b"ftrt" + bytes(60))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LatentizeError, match="needs an NVIDIA GPU and its driver, and there is none here"):
        available(tmp_path, ("trt",), [])
    notes = []
    assert available(tmp_path, None, notes) == []
    assert "TensorRT is not compared" in notes[0]
    assert compare_backends.dtype_of(nn.Identity()) == torch.float32


@pytest.mark.parametrize(("tied", "passed", "error"), [(1, True, 0.0), (0, False, 1e-3), (3, False, 1e-3)])
def test_a_sequence_is_left_out_only_where_it_disagrees_on_a_tie(monkeypatch, tied, passed, error):
    closest = iter([c for c in [0.0] * tied + [math.inf] * 9 for _ in range(2)])  # both models are run on a sequence
    batch, wrong = calls(5), iter([1e-3] * max(1, tied) + [0.0] * 9)

    class Watch(TieWatch):
        def __exit__(self, *of):
            super().__exit__(*of)
            self.closest = next(closest)

    monkeypatch.setattr(compare_backends, "TieWatch", Watch)
    backend = Backend("b", {"rewritten": lambda inputs: runner(2.0 * (1 + next(wrong)))(inputs)}, TOLERANCES)
    _, (row,) = agreement({"original": Twice(), "rewritten": Twice()}, [backend], [batch])
    assert row.passed is passed
    assert row.error == pytest.approx(error, rel=0.01)
    assert ("left out" in row.note) is bool(tied)
