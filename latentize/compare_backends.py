"""Exported models run beside the PyTorch models that they were made of: how far apart, how fast, how much memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.bench import Latency, MakeInputs, latency
from latentize.compare import Differences, main_output
from latentize.compare_inputs import Sequences
from latentize.comparison import BackendAgreement, LengthAgreement, Memory, Which
from latentize.errors import LatentizeError, one_line
from latentize.exporters.captured import exporting
from latentize.exporters.onnx_check import NoKernelError, relative_error
from latentize.inputs import Inputs
from latentize.passes.double import dtype_of
from latentize.run_onnx import ONNXRUNTIME, ORIGINAL, REWRITTEN, WITH_OPERATOR
from latentize.ties import TieWatch

#: What runs an exported model on one call's arguments: its outputs in the order in which the model returns them.
Runner = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Backend:
    """The exported models of one runtime. `lean` are runners that give memory back, `device_bytes` what others keep."""

    name: str
    runners: Mapping[Which, Runner]
    tolerances: Mapping[torch.dtype, float]
    lean: Mapping[Which, Runner] = field(default_factory=dict)
    device_bytes: Mapping[Which, int] = field(default_factory=dict)


def available(out: Path, asked: Sequence[str] | None, notes: list[str]) -> list[Backend]:
    """What runs the exports in OUT, besides PyTorch: what was `asked` for, or all that is there.

    Args:
        out: the folder.
        asked: of "torch", "ort", "trt"; None for whatever OUT and this machine have.
        notes: gets why something that is there is left out.

    Raises:
        LatentizeError: what was asked for is not there, is damaged, or cannot run here.
        MissingExtraError: a package that was asked for is not installed.
    """
    found = []
    if asked is not None and "ort" in asked:
        found += onnxruntime_backends(out, notes)
    elif asked is None and (out / REWRITTEN).exists():
        try:
            found += onnxruntime_backends(out, notes)
        except NoKernelError as error:
            notes.append(f"{ONNXRUNTIME} is not compared: {error}")
    engines = sorted(out.glob("*.engine"))
    if asked is not None and "trt" in asked:
        if not engines:
            raise LatentizeError(f"{out}: holds no engine; build one with latentize build {out}")
        found.append(tensorrt_backend(engines))
    elif asked is None and engines:
        try:
            found.append(tensorrt_backend(engines))
        except LatentizeError as error:
            notes.append(f"TensorRT is not compared: {error}")
    return found


def onnxruntime_backends(out: Path, notes: list[str]) -> list[Backend]:
    """onnxruntime on the CPU with the graphs in OUT, of which the original's may be missing.

    First by standard operators, then with latentize's own, where its library can be had; `notes` gets why it does not
    take a graph.

    Raises:
        LatentizeError: the rewritten model's graph is missing or damaged.
        MissingExtraError: onnxruntime is not installed.
    """
    from latentize.exporters import onnxruntime_ops

    paths: dict[Which, Path] = {"original": out / ORIGINAL, "rewritten": out / REWRITTEN}
    if not paths["rewritten"].exists():
        raise LatentizeError(f"{out}: holds no {REWRITTEN}; convert with --export onnx")
    there = {which: path for which, path in paths.items() if path.exists()}
    found = [_onnxruntime_backend(ONNXRUNTIME, there, None)]
    library = onnxruntime_ops.library()
    if library is not None:
        try:
            found.append(_onnxruntime_backend(WITH_OPERATOR, there, library))
        except LatentizeError as error:
            notes.append(f"{WITH_OPERATOR} is not compared: {error}")
    return found


def _onnxruntime_backend(name: str, paths: Mapping[Which, Path], operator: Path | None) -> Backend:
    from latentize.exporters.onnx_check import TOLERANCES, open_session, run_session

    threads = torch.get_num_threads()

    def runners(*, arena: bool) -> dict[Which, Runner]:
        sessions = {w: open_session(path, threads, arena=arena, operator=operator) for w, path in paths.items()}
        return {which: partial(run_session, session) for which, session in sessions.items()}

    return Backend(name, runners(arena=True), TOLERANCES, runners(arena=False))


def tensorrt_backend(engines: Sequence[Path]) -> Backend:
    """TensorRT on the GPU with the first engine that it can load.

    Raises:
        LatentizeError: there is no GPU, or no engine that it runs.
    """
    from latentize.exporters.tensorrt_run import TOLERANCES, EngineSession

    problem: LatentizeError | None = None
    for path in engines:
        try:
            session = EngineSession(path)
        except LatentizeError as error:
            problem = problem or error
            continue
        limits = dict.fromkeys(TOLERANCES, TOLERANCES[session.dtype])
        return Backend("tensorrt", {"rewritten": session}, limits, {}, {"rewritten": session.device_bytes})
    assert problem is not None
    raise problem


def agreement(
    models: Mapping[Which, nn.Module], backends: Iterable[Backend], sequences: Iterable[Sequences],
    tolerance: float | None = None,
) -> tuple[list[LengthAgreement], list[BackendAgreement]]:  # fmt: skip
    """The rewritten model against the original, and each backend's graphs against their models, length by length.

    Args:
        models: both, in PyTorch; run in eval mode, left as found.
        backends: what else runs them.
        sequences: the calls; only one call's outputs are held at a time.
        tolerance: largest relative error; by default the backend's for the model's dtype.

    Raises:
        LatentizeError: the models' outputs have different shapes.
    """
    lengths, rows = [], []
    backends = list(backends)
    for batch in sequences:
        between = Differences()
        tallies = [
            _Tally(backend, which, _limit(backend, models[which], tolerance))
            for backend in backends for which in backend.runners
        ]  # fmt: skip
        for inputs in batch.calls:
            expected = {which: _Expected.of(model, inputs) for which, model in models.items()}
            a, b = expected["original"], expected["rewritten"]
            if a.main.shape != b.main.shape:
                raise LatentizeError(
                    f"compare: the original returns {list(a.main.shape)} and the rewritten model {list(b.main.shape)} "
                    "for the same inputs; compare models of the same task"
                )
            between.add(a.main, b.main, scores=a.scores)
            for tally in tallies:
                tally.add(inputs, expected[tally.which])
        lengths.append(LengthAgreement(batch.tokens, len(batch.calls), between.result()))
        rows += [tally.row(batch.tokens) for tally in tallies]
    return lengths, rows


def timed(backend: Backend, make_inputs: MakeInputs, tokens: Iterable[int], repeats: int) -> list[Latency]:
    """Latency of a backend's graphs, interleaved."""
    rows = []
    for count in tokens:
        inputs = make_inputs(count)
        if isinstance(inputs, str):
            rows.append(Latency.of(backend.name, count, {}, inputs))
            continue
        calls: dict[str, Callable[[], object]] = {w: _call(runner, inputs) for w, runner in backend.runners.items()}
        rows.append(Latency.of(backend.name, count, latency(calls, repeats, min(5, repeats))))
    return rows


def memory(
    models: Mapping[Which, nn.Module], backends: Iterable[Backend], make_inputs: MakeInputs, tokens: Iterable[int],
    *, torch_too: bool = True,
) -> list[Memory]:  # fmt: skip
    """What one call takes in PyTorch and in each backend, at each number of tokens that the model runs on."""
    runners: dict[str, Mapping[Which, Runner]] = {}
    if torch_too:
        runners["torch"] = {which: _in_torch(model) for which, model in models.items()}
    kept: dict[str, Mapping[Which, int]] = {}
    for backend in backends:
        runners[backend.name] = backend.lean
        kept[backend.name] = backend.device_bytes
    rows = []
    for count in tokens:
        inputs = make_inputs(count)
        if isinstance(inputs, str):
            continue
        for name, of in runners.items():
            taken = {which: call_memory(_call(runner, inputs)) for which, runner in of.items()} or kept.get(name, {})
            rows.append(Memory(name, count, taken.get("original"), taken.get("rewritten")))
    return rows


def call_memory(call: Callable[[], object]) -> int | None:
    """Resident bytes at the worst moment of a call beyond those before it; None where the system does not tell."""
    call()  # what is made once is not counted
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _limit(backend: Backend, model: nn.Module, tolerance: float | None) -> float:
    return tolerance if tolerance is not None else backend.tolerances.get(dtype_of(model), 1e-5)


def _call(runner: Runner, inputs: Inputs) -> Callable[[], object]:
    return lambda: runner(inputs)


def _in_torch(model: nn.Module) -> Runner:
    def run(inputs: Inputs) -> list[Tensor]:
        with exporting(model):
            inputs.call(model)
        return []

    return run


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


class _Tally:
    """One graph's differences over the sequences of one length.

    A sequence on which it disagrees, and a router's choice is a tie within the tolerance, is left out and counted.
    """

    def __init__(self, backend: Backend, which: Which, tolerance: float) -> None:
        self.which: Which = which
        self._backend, self._tolerance = backend, tolerance
        self._error, self._note = 0.0, ""
        self._tied: list[float] = []
        self._differences = Differences()

    def add(self, inputs: Inputs, expected: _Expected) -> None:
        if self._note:
            return
        try:
            found = self._backend.runners[self.which](inputs)
        except Exception as problem:  # runtimes' exceptions have no common base but Exception
            ours = isinstance(problem, LatentizeError)
            self._note = str(problem) if ours else f"it does not run: {one_line(problem)}"
            return
        got, wanted = ([list(t.shape) for t in tensors] for tensors in (found, expected.outputs))
        if got != wanted:
            self._note = f"it returns {got} where PyTorch returns {wanted}"
            return
        error = max((relative_error(a, e) for a, e in zip(found, expected.outputs, strict=True)), default=0.0)
        if error > self._tolerance >= expected.closest:
            self._tied.append(error)
            return
        self._error = max(self._error, error)
        self._differences.add(expected.main, _rows(found[expected.number]), scores=expected.scores)

    def row(self, tokens: int) -> BackendAgreement:
        error = float("inf") if self._note else self._error
        note = self._note
        if self._tied and not note:
            note = f"{len(self._tied)} sequences left out, where a router's choice is a tie that rounding decides"
            error = error if self._differences.positions else max(self._tied)
        outputs = self._differences.result() if self._differences.positions and not self._note else None
        name, limit = self._backend.name, self._tolerance
        return BackendAgreement(name, self.which, tokens, error, limit, error <= limit, outputs, note)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim > 1 else tensor.unsqueeze(0)
