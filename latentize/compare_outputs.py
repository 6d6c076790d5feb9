"""Exported models beside the PyTorch models that they were made of: how far apart, length by length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.compare import Differences, main_output
from latentize.compare_backends import Backend, why
from latentize.compare_inputs import Sequences
from latentize.comparison import BackendAgreement, LengthAgreement, Which
from latentize.errors import LatentizeError
from latentize.exporters.captured import exporting
from latentize.exporters.onnx_check import relative_error
from latentize.exporters.onnx_widened import TOLERANCE as WIDENED
from latentize.exporters.onnx_widened import widen_inputs, widen_model
from latentize.inputs import Inputs
from latentize.passes.double import dtype_of
from latentize.run_onnx import DRAWS
from latentize.ties import TieWatch

#: A call and a seed -> the same shapes with fresh values.
Redraw = Callable[[Inputs, int], Inputs]


def agreement(
    models: Mapping[Which, nn.Module], backends: Iterable[Backend], sequences: Iterable[Sequences], notes: list[str],
    tolerance: float | None = None, *, exported: Mapping[Which, nn.Module] | None = None, redraw: Redraw | None = None,
) -> tuple[list[LengthAgreement], list[BackendAgreement]]:  # fmt: skip
    """The rewritten model against the original, and each backend's graphs against their models, length by length.

    Where a graph disagrees on all sequences of a length, and in each a router's choice is a tie within the tolerance,
    fresh ones are drawn. If ties leave nothing to compare all the same, the length is left out where most positions of
    one of the sequences agree, as they do before a choice falls otherwise; not where it is so at every length: a graph
    that never agrees has failed.

    Args:
        models: both, in PyTorch; run in eval mode, left as found.
        backends: what else runs them.
        sequences: the calls; only one call's outputs are held at a time.
        notes: gets which length is left out.
        tolerance: largest relative error; by default the backend's for the model's dtype.
        exported: the same models in the form that graphs are made of, whose routers can be watched, and which are
            widened where a graph is; by default `models`.
        redraw: a call and a seed -> the same shapes with fresh values; by default no call is drawn again.

    Raises:
        LatentizeError: the models' outputs have different shapes.
    """
    graphs = _graphs(models, exported or models, list(backends), tolerance)
    lengths: list[LengthAgreement] = []
    tried: list[tuple[_Tally, BackendAgreement]] = []
    for batch in sequences:
        between = Differences()
        tallies = [_Tally(graph) for graph in graphs]
        for inputs in batch.calls:
            answers: dict[int, _Expected] = {}
            a, b = (_answer(answers, models[which], inputs) for which in ("original", "rewritten"))
            if a.main.shape != b.main.shape:
                raise LatentizeError(
                    f"compare: the original returns {list(a.main.shape)} and the rewritten model {list(b.main.shape)} "
                    "for the same inputs; compare models of the same task"
                )
            between.add(a.main, b.main, scores=a.scores)
            for tally in tallies:
                tally.add(inputs, answers)
        if redraw is not None:
            _draw_again(tallies, batch.calls[0], redraw)
        lengths.append(LengthAgreement(batch.tokens, len(batch.calls), between.result()))
        tried += [(tally, tally.row(batch.tokens)) for tally in tallies]
    told = {(row.backend, row.model) for tally, row in tried if not tally.only_ties}
    rows = []
    for tally, row in tried:
        if tally.excused and (row.backend, row.model) in told:
            notes.append(f"{row.backend}, {row.model}, T = {row.tokens}: not compared: {row.note}")
        else:
            rows.append(row)
    return lengths, rows


def _draw_again(tallies: Sequence[_Tally], inputs: Inputs, redraw: Redraw) -> None:
    """Fresh sequences for those that could compare none."""
    for seed in range(DRAWS):
        answers: dict[int, _Expected] = {}
        for tally in tallies:
            if tally.only_ties:
                tally.add(redraw(inputs, seed), answers)


@dataclass(frozen=True)
class _Expected:
    """What a PyTorch model returned: every tensor, which of them is compared in detail, and whether that is scores."""

    outputs: list[Tensor]
    number: int
    scores: bool
    closest: float  # to a tie of a router's choice, relative

    @property
    def main(self) -> Tensor:
        return _rows(self.outputs[self.number])

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> _Expected:
        with exporting(model), TieWatch(model) as ties:
            output = inputs.call(model)
        main, named = main_output(output)
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        same = (i for i, t in enumerate(outputs) if (t.data_ptr(), t.numel()) == (main.data_ptr(), main.numel()))
        return cls(outputs, next(same, 0), named or inputs.whole_numbers, ties.closest)


def _answer(answers: dict[int, _Expected], model: nn.Module, inputs: Inputs) -> _Expected:
    """What a model returns for a call, out of `answers` by the model's identity, where it was run already."""
    if id(model) not in answers:
        answers[id(model)] = _Expected.of(model, inputs)
    return answers[id(model)]


@dataclass(frozen=True)
class _Graph:
    """One exported model of a backend, the PyTorch model it is held against, and the one that is watched for ties."""

    backend: Backend
    which: Which
    model: nn.Module
    watched: nn.Module
    tolerance: float

    def reads(self, inputs: Inputs) -> Inputs:
        """A call as both read it."""
        return widen_inputs(inputs) if self.which in self.backend.widened else inputs


def _graphs(
    models: Mapping[Which, nn.Module], exported: Mapping[Which, nn.Module], backends: Sequence[Backend],
    tolerance: float | None,
) -> list[_Graph]:  # fmt: skip
    """Every graph of `backends`; a model is widened once for all that run a copy of its graph in float32."""
    wide = {which: widen_model(exported[which]) for which in {w for backend in backends for w in backend.widened}}
    found = []
    for backend in backends:
        for which in backend.runners:
            widened = which in backend.widened
            model, watched = (wide[which], wide[which]) if widened else (models[which], exported[which])
            usual = WIDENED if widened else backend.tolerances.get(dtype_of(model), 1e-5)
            found.append(_Graph(backend, which, model, watched, usual if tolerance is None else tolerance))
    return found


class _Tally:
    """One graph's differences over the sequences of one length.

    A sequence on which it disagrees, and a router's choice is a tie within the tolerance, is left out and counted.
    """

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self._error, self._note = 0.0, ""
        self._tied: list[float] = []
        self._mostly = False  # most positions of a sequence that was left out agree
        self._differences = Differences()

    @property
    def only_ties(self) -> bool:
        """Whether there was nothing to compare but sequences that were left out."""
        return bool(self._tied) and not self._note and not self._differences.positions

    @property
    def excused(self) -> bool:
        """Whether ties explain why there was nothing to compare: without them the graph agrees."""
        return self.only_ties and self._mostly

    def add(self, inputs: Inputs, answers: dict[int, _Expected]) -> None:
        """One more sequence; what models return for it is looked up in `answers`, and kept there."""
        if self._note:
            return
        graph, inputs = self._graph, self._graph.reads(inputs)
        expected = _answer(answers, graph.model, inputs)
        try:
            found = graph.backend.runners[graph.which](inputs)
        except Exception as problem:  # runtimes' exceptions have no common base but Exception
            self._note = why(problem)
            return
        got, wanted = ([list(t.shape) for t in tensors] for tensors in (found, expected.outputs))
        if got != wanted:
            self._note = f"it returns {got} where PyTorch returns {wanted}"
            return
        error = max((relative_error(a, e) for a, e in zip(found, expected.outputs, strict=True)), default=0.0)
        if error > graph.tolerance >= _answer(answers, graph.watched, inputs).closest:
            self._tied.append(error)
            self._mostly |= _median_error(expected.main, _rows(found[expected.number])) <= graph.tolerance
            return
        self._error = max(self._error, error)
        self._differences.add(expected.main, _rows(found[expected.number]), scores=expected.scores)

    def row(self, tokens: int) -> BackendAgreement:
        """What was found."""
        error = float("inf") if self._note else self._error
        note = self._note
        if self._tied and not note:
            note = f"{len(self._tied)} sequences left out, where a router's choice is a tie that rounding decides"
            error = max(self._tied) if self.only_ties else error
        outputs = self._differences.result() if self._differences.positions and not self._note else None
        name, which, limit = self._graph.backend.name, self._graph.which, self._graph.tolerance
        return BackendAgreement(name, which, tokens, error, limit, error <= limit, outputs, note)


def _median_error(expected: Tensor, found: Tensor) -> float:
    """The relative error of the median position; infinite where it is not finite."""
    e, f = (t.double().flatten(0, -2) for t in (expected, found))
    errors = (f - e).norm(dim=-1) / e.norm(dim=-1)
    return float(errors.nan_to_num(nan=float("inf")).median())


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim > 1 else tensor.unsqueeze(0)
