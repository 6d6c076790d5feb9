"""Exported models and what runs them beside PyTorch: which are there, how fast, how much memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from latentize.bench import Latency, MakeInputs, timed_graphs
from latentize.comparison import Memory, Which
from latentize.errors import LatentizeError, MissingExtraError, one_line
from latentize.exporters.captured import exporting
from latentize.exporters.onnx_check import NoKernelError
from latentize.inputs import Inputs
from latentize.run_onnx import ONNXRUNTIME, ORIGINAL, REWRITTEN, WITH_OPERATOR, runnable, widened_note

#: What runs an exported model on one call's arguments: its outputs in the order in which the model returns them.
Runner = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Backend:
    """The exported models of one runtime. `lean` are runners that give memory back, `device_bytes` what others keep.

    `files` are what it runs; those of `widened` are copies in float32 of bfloat16 graphs, and no measure of speed or
    memory: see `exporters/onnx_widened.py`.
    """

    name: str
    runners: Mapping[Which, Runner]
    tolerances: Mapping[torch.dtype, float]
    lean: Mapping[Which, Runner] = field(default_factory=dict)
    device_bytes: Mapping[Which, int] = field(default_factory=dict)
    files: Mapping[Which, Path] = field(default_factory=dict)
    widened: frozenset[Which] = frozenset()


def available(out: Path, asked: Sequence[str] | None, notes: list[str], held: ExitStack) -> list[Backend]:
    """What runs the exports in OUT, besides PyTorch: what was `asked` for, or all that is there.

    Args:
        out: the folder.
        asked: of "torch", "ort", "trt"; None for whatever OUT and this machine have.
        notes: gets why something that is there is left out, and what runs in its place.
        held: files that are made for the backends are there until it closes.

    Raises:
        LatentizeError: what was asked for is not there, is damaged, or cannot run here.
        MissingExtraError: a package that was asked for is not installed.
    """
    found = []
    if asked is not None and "ort" in asked:
        found += onnxruntime_backends(out, notes, held)
    elif asked is None and (out / REWRITTEN).exists():
        try:
            found += onnxruntime_backends(out, notes, held)
        except (NoKernelError, MissingExtraError) as error:
            notes.append(f"{ONNXRUNTIME} is not compared: {error}")
    engines = sorted(out.glob("*.engine"))
    if asked is not None and "trt" in asked:
        if not engines:
            raise LatentizeError(f"{out}: holds no engine; build one with latentize build {out}")
        found.append(tensorrt_backend(engines, notes))
    elif asked is None and engines:
        try:
            found.append(tensorrt_backend(engines, notes))
        except LatentizeError as error:
            notes.append(f"TensorRT is not compared: {error}")
    return found


def onnxruntime_backends(out: Path, notes: list[str], held: ExitStack) -> list[Backend]:
    """onnxruntime on the CPU with the graphs in OUT, of which the original's may be missing.

    First by standard operators, then with latentize's own, where its library can be had; `notes` gets why it does not
    take a graph. A bfloat16 graph is run as a copy in float32, which is there until `held` closes.

    Raises:
        NoKernelError: onnxruntime has no CPU kernel for an operator in a graph's element type.
        LatentizeError: the rewritten model's graph is missing or damaged.
        MissingExtraError: onnxruntime is not installed.
        ResourceError: a copy does not fit on the disk.
    """
    from latentize.exporters import onnxruntime_ops

    paths: dict[Which, Path] = {"original": out / ORIGINAL, "rewritten": out / REWRITTEN}
    if not paths["rewritten"].exists():
        raise LatentizeError(f"{out}: holds no {REWRITTEN}; convert with --export onnx")
    there = {which: path for which, path in paths.items() if path.exists()}
    try:
        found = [_onnxruntime_backend(ONNXRUNTIME, there, frozenset(), None)]
    except NoKernelError:
        graphs = {which: held.enter_context(runnable(path)) for which, path in there.items()}
        widened = frozenset(which for which, path in there.items() if graphs[which] != path)
        notes += [widened_note(there[which]) for which in graphs if which in widened]
        found = [_onnxruntime_backend(ONNXRUNTIME, graphs, widened, None)]
    library = onnxruntime_ops.library()
    if library is not None:
        try:
            found.append(_onnxruntime_backend(WITH_OPERATOR, found[0].files, found[0].widened, library))
        except LatentizeError as error:
            notes.append(f"{WITH_OPERATOR} is not compared: {error}")
    return found


def _onnxruntime_backend(
    name: str, files: Mapping[Which, Path], widened: frozenset[Which], operator: Path | None
) -> Backend:
    from latentize.exporters.onnx_check import TOLERANCES, open_session, run_session

    threads = torch.get_num_threads()

    def runners(paths: Mapping[Which, Path], *, arena: bool) -> dict[Which, Runner]:
        sessions = {w: open_session(path, threads, arena=arena, operator=operator) for w, path in paths.items()}
        return {which: partial(run_session, session) for which, session in sessions.items()}

    lean = runners({which: path for which, path in files.items() if which not in widened}, arena=False)
    return Backend(name, runners(files, arena=True), TOLERANCES, lean, files=files, widened=widened)


def tensorrt_backend(engines: Sequence[Path], notes: list[str]) -> Backend:
    """TensorRT on the GPU with the first engine that it can load; `notes` gets which one.

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
        others = ", ".join(other.name for other in engines if other != path)
        left = f", the first engine that loads here, and not {others}" if others else ""
        notes.append(f"tensorrt runs {path.name}{left}")
        kept: dict[Which, int] = {"rewritten": session.device_bytes}
        return Backend("tensorrt", {"rewritten": session}, limits, {}, kept, {"rewritten": path})
    assert problem is not None
    raise problem


def timed(backend: Backend, make_inputs: MakeInputs, tokens: Iterable[int], repeats: int) -> list[Latency]:
    """Latency of a backend's graphs, interleaved; one that does not run is noted."""
    rows = []
    for count in tokens:
        inputs = make_inputs(count)
        if isinstance(inputs, str):
            rows.append(Latency.of(backend.name, count, {}, inputs))
            continue
        calls: dict[str, Callable[[], object]] = {w: _call(runner, inputs) for w, runner in backend.runners.items()}
        rows.append(timed_graphs(backend.name, count, calls, repeats, min(5, repeats)))
    return rows


def memory(
    models: Mapping[Which, nn.Module], backends: Iterable[Backend], make_inputs: MakeInputs, tokens: Iterable[int],
    notes: list[str], *, torch_too: bool = True,
) -> list[Memory]:  # fmt: skip
    """What one call takes in PyTorch and in each backend, at each number of tokens that the model runs on.

    What does not run has none; `notes` gets why.
    """
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
            taken: dict[Which, int | None] = dict(kept.get(name, {}))
            for which, runner in of.items():
                try:
                    taken[which] = call_memory(_call(runner, inputs))
                except Exception as problem:  # runtimes' exceptions have no common base but Exception
                    if name == "torch":
                        raise
                    notes.append(f"{name}, {which}: no memory of a call is known: {why(problem)}")
            if taken:
                rows.append(Memory(name, count, taken.get("original"), taken.get("rewritten")))
    return rows


def why(problem: Exception) -> str:
    """Why an exported model does not run, on a line."""
    return str(problem) if isinstance(problem, LatentizeError) else f"it does not run: {one_line(problem)}"


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


def _call(runner: Runner, inputs: Inputs) -> Callable[[], object]:
    return lambda: runner(inputs)


def _in_torch(model: nn.Module) -> Runner:
    def run(inputs: Inputs) -> list[Tensor]:
        with exporting(model):
            inputs.call(model)
        return []

    return run
