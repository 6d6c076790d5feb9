"""Exported models against PyTorch: errors, required tolerances, ties; with runners that stand for runtimes."""

import math

import pytest
import torch
from torch import nn

from latentize import compare_outputs
from latentize.compare_backends import Backend
from latentize.compare_inputs import Sequences
from latentize.compare_outputs import agreement
from latentize.errors import LatentizeError
from latentize.exporters.onnx_widened import TOLERANCE as WIDENED
from latentize.inputs import Inputs
from latentize.moe import LatentMoE
from latentize.run_onnx import DRAWS
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec
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
    lengths, rows = agreement(MODELS, [backend], [calls(1), calls(5)], [])
    assert [(row.tokens, row.sequences, row.outputs.positions) for row in lengths] == [(1, 3, 3), (5, 3, 15)]
    assert all(row.outputs.relative == pytest.approx(0.05, rel=1e-6) for row in lengths)
    assert all(row.outputs.top1 == 1.0 for row in lengths)  # called logits
    assert [(row.model, row.tokens, row.passed) for row in rows] == [
        ("original", 1, True), ("rewritten", 1, False), ("original", 5, True), ("rewritten", 5, False),
    ]  # fmt: skip
    assert rows[0].error == 0.0
    assert rows[1].error == pytest.approx(2e-5, rel=0.01)
    assert (rows[1].outputs.positions, rows[1].tolerance) == (3, 1e-5)
    _, allowed = agreement(MODELS, [backend], [calls(1)], [], tolerance=1e-4)
    assert all(row.passed for row in allowed)


@pytest.mark.parametrize(
    "run, words",
    [
        (runner(2.1, error=RuntimeError("no kernel\nfor it")), "it does not run: RuntimeError: no kernel for it"),
        (runner(2.1, shape=(4, 1)), r"it returns [[4, 1], []] where PyTorch returns [[1, 1, 4], []]"),
    ],
)
def test_what_does_not_run_or_fit_is_infinitely_far_off_and_says_why(run, words):
    _, (row,) = agreement(MODELS, [Backend("b", {"rewritten": run}, TOLERANCES)], [calls(1)], [])
    assert (row.error, row.passed, row.outputs) == (math.inf, False, None)
    assert row.note == words


def test_models_of_other_shapes_are_refused():
    with pytest.raises(LatentizeError, match=r"original returns \[1, 1, 4\] and the rewritten model \[1, 4\]"):
        agreement({"original": nn.Identity(), "rewritten": nn.Flatten(0, 1)}, [], [calls(1)], [])


@pytest.mark.parametrize(("tied", "passed", "error"), [(1, True, 0.0), (0, False, 1e-3), (3, False, 1e-3)])
def test_a_sequence_is_left_out_only_where_it_disagrees_on_a_tie(monkeypatch, tied, passed, error):
    closest = iter([c for c in [0.0] * tied + [math.inf] * 9 for _ in range(2)])  # both models are run on a sequence
    batch, wrong = calls(5), iter([1e-3] * max(1, tied) + [0.0] * 9)

    class Watch(TieWatch):
        def __exit__(self, *of):
            super().__exit__(*of)
            self.closest = next(closest)

    monkeypatch.setattr(compare_outputs, "TieWatch", Watch)
    backend = Backend("b", {"rewritten": lambda inputs: runner(2.0 * (1 + next(wrong)))(inputs)}, TOLERANCES)
    _, (row,) = agreement({"original": Twice(), "rewritten": Twice()}, [backend], [batch], [])
    assert row.passed is passed
    assert row.error == pytest.approx(error, rel=0.01)
    assert ("left out" in row.note) is bool(tied)


class Routed(nn.Module):
    """A block of one expert out of four; of inputs that begin with a negative number the choice is a tie."""

    def __init__(self):
        super().__init__()
        rows = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [-1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
        up, down = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        self.moe = LatentMoE(MoESpec(RouterSpec(rows, 1), ExpertsSpec(up, down)))

    def forward(self, x):
        return {"logits": self.moe(x.flatten(0, 1)).view_as(x), "aux": x.sum()}


class Hidden(nn.Module):
    """The same as another module, which is not found in it."""

    def __init__(self, inner):
        super().__init__()
        self._call = lambda x: inner(x)

    def forward(self, x):
        return self._call(x)


ROUTED = Routed()


def sequence(tokens, sign):
    return Inputs((sign * torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(tokens)).abs(),))


def off_by(error, where=lambda x: bool((x[..., 0] < 0).any()), since=0):
    """A graph of `ROUTED` that is off where a router's choice is a tie, or elsewhere, from a position on."""

    def run(inputs):
        (x,) = inputs.tensors()
        with torch.no_grad():
            found = ROUTED(x)
        late = torch.arange(x.shape[1])[None, :, None] >= since
        return [found["logits"] * (1 + error * where(x) * late), found["aux"]]

    return run


def test_ties_of_the_original_are_seen_in_its_exported_form():
    models = {"original": Hidden(ROUTED), "rewritten": ROUTED}
    batch = Sequences(3, (sequence(3, 1), sequence(3, -1)))
    backend = Backend("b", {"original": off_by(1e-3)}, TOLERANCES)
    _, (unseen,) = agreement(models, [backend], [batch], [])
    assert not unseen.passed
    _, (row,) = agreement(models, [backend], [batch], [], exported={"original": ROUTED, "rewritten": ROUTED})
    assert (row.passed, row.outputs.positions) == (True, 3)
    assert row.note.startswith("1 sequences left out")
    wrong = Backend("b", {"original": off_by(1e-3, lambda _: True)}, TOLERANCES)
    _, (row,) = agreement(models, [wrong], [batch], [], exported={"original": ROUTED, "rewritten": ROUTED})
    assert not row.passed


def test_fresh_sequences_are_drawn_where_every_one_is_tied():
    drawn = []

    def redraw(inputs, seed):
        drawn.append(seed)
        return sequence(inputs.tensors()[0].shape[1], 1 if seed == 2 else -1)

    models, batch = {"original": ROUTED, "rewritten": ROUTED}, Sequences(3, (sequence(3, -1),))
    graph = Backend("b", {"rewritten": off_by(1e-3)}, TOLERANCES)
    _, (row,) = agreement(models, [graph], [batch], [], redraw=redraw)
    assert (row.passed, row.outputs.positions, drawn) == (True, 3, [0, 1, 2])
    assert row.note.startswith("3 sequences left out")
    _, (row,) = agreement(models, [Backend("b", {"rewritten": off_by(0)}, TOLERANCES)], [batch], [], redraw=redraw)
    assert (row.passed, row.note, drawn) == (True, "", [0, 1, 2])  # a tie that changes nothing is compared


def test_a_length_with_nothing_but_ties_is_left_out_where_another_was_compared_and_fails_where_none_was():
    models, notes, draws = {"original": ROUTED, "rewritten": ROUTED}, [], []

    def redraw(inputs, seed):
        draws.append(seed)
        return inputs

    short, long = Sequences(1, (sequence(1, 1),)), Sequences(3, (sequence(3, -1),))
    graph = Backend("b", {"rewritten": off_by(1e-3, since=2)}, TOLERANCES)
    lengths, (row,) = agreement(models, [graph], [short, long], notes, redraw=redraw)
    assert [length.tokens for length in lengths] == [1, 3]
    assert (row.tokens, row.passed) == (1, True)
    assert draws == list(range(DRAWS))
    said = f"b, rewritten, T = 3: not compared: {1 + DRAWS} sequences left out, where a router's choice is a tie"
    assert notes[0].startswith(said)
    _, (row,) = agreement(models, [graph], [long], notes, redraw=redraw)
    assert (row.passed, row.outputs) == (False, None)
    assert 1e-4 < row.error < 1e-3


def test_ties_are_no_excuse_where_most_positions_disagree():
    """A graph that is wrong from some length on, whose every sequence has a tie somewhere."""
    models, notes = {"original": ROUTED, "rewritten": ROUTED}, []
    short, long = Sequences(1, (sequence(1, 1),)), Sequences(3, (sequence(3, -1),))
    for wrong in (off_by(1.0), off_by(1.0, since=1)):
        graph = Backend("b", {"rewritten": wrong}, TOLERANCES)
        _, rows = agreement(models, [graph], [short, long], notes, redraw=lambda inputs, _seed: inputs)
        assert {row.tokens: row.passed for row in rows} == {1: True, 3: False}
    assert notes == []


def test_a_widened_graph_is_held_against_the_model_widened_alike():
    seen = []

    def run(inputs):
        (x,) = inputs.tensors()
        seen.append(x.dtype)
        return [x * MODELS["rewritten"].factor.bfloat16().float() * (1 + 1e-3), x.sum()]

    models = {which: Twice(model.factor.item()).bfloat16() for which, model in MODELS.items()}
    batch = Sequences(5, tuple(Inputs((inputs.args[0].bfloat16(),)) for inputs in calls(5).calls))
    backend = Backend("b", {"rewritten": run}, TOLERANCES, widened=frozenset({"rewritten"}))
    (length,), (row,) = agreement(models, [backend], [batch], [])
    assert set(seen) == {torch.float32}
    assert (row.passed, row.tolerance) == (True, WIDENED)
    assert row.error == pytest.approx(1e-3, rel=1e-3)  # in bfloat16 rounding alone would be more
    assert length.outputs.relative == pytest.approx(0.05, rel=0.1)
    assert {model.factor.dtype for model in models.values()} == {torch.bfloat16}
