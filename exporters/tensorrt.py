"""TensorRT engines from a converted model's ONNX file, with tensorrt or tensorrt-rtx, the latter also without a GPU.

The library is driven in a process of its own (`tensorrt_worker`): it aborts on what it cannot load, and it looks for
its parser's library under a name that its package does not have.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentize import store
from latentize.disk_errors import COPY, disk_errors
from latentize.errors import LatentizeError, MissingExtraError, ResourceError, one_line
from latentize.exporters import tensorrt_library
from latentize.exporters.tensorrt_profiles import USUAL, Profile
from latentize.native_build import cache_folder
from latentize.progress import Progress, free_memory, silent
from latentize.staging import working_folder

#: What tensorrt-rtx builds engines for, and where they then run.
WHERE = {"portable": "NVIDIA GPUs of compute capability 8.0, 8.6, 8.9 and 12.0"} | {
    name: f"NVIDIA GPUs of compute capability {capability}"
    for name, capability in (("SM80", "8.0"), ("SM86", "8.6"), ("SM89", "8.9"), ("SM120", "12.0"))
}
#: The GPU of this machine: all that the full library builds for.
NATIVE = "native"
#: How an engine runs the routed experts: dense products, the plugin in Python, or kernels embedded in the engine.
Experts = Literal["dense", "plugin", "embedded"]
#: The body form that TensorRT takes: it rejects loops over active experts and onnxruntime's fused operator.
FORM = "dense"
#: Copies of the weights that a build holds at its worst moment, at least: parsed, in the network, in the engine.
_COPIES = 3
#: What the process says last when it ran out of something.
_RAN_OUT = ("out of memory", "OutOfMemory", "bad_alloc", "MemoryError", "No space left",
            "Disk quota exceeded", "File too large")  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """One engine file. `file` is relative to OUT.

    `profiles` has, for each profile, the smallest, usual and largest shape of every input. `layers` counts the layers
    of the network by their kinds, `plugins` those of them that are the project's own. `plan` has the layers that the
    engine runs, known only where a GPU can load it. `timed_before` says that a timing cache of an earlier build served:
    tensorrt-rtx, which measures nothing while it builds, has none. `notes` are what a user should know.
    """

    file: str
    target: str
    library: str
    experts: str
    dtype: str
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    layers: Mapping[str, int]
    plugins: int
    plan: tuple[str, ...] | None
    bytes: int
    seconds: float
    timed_before: bool = False
    notes: tuple[str, ...] = ()


def build(
    out: Path,
    *,
    targets: Sequence[str] | None = None,
    profiles: Sequence[Profile] = USUAL,
    strict: bool = False,
    experts: Experts = "dense",
    source: Path | None = None,
    put: Callable[[Engine, Path], None] | None = None,
    progress: Progress = silent,
) -> tuple[Engine, ...]:
    """Build an engine for each target from `out`/model.onnx, as `out`/model.TARGET.engine.

    Each is in its place before the next one is begun, and stays there where that one fails.

    With `experts` "dense" they run as three dense matrix products over all experts; with "plugin" as the layer of
    `tensorrt_plugin`, which reads the selected ones only and must be registered by whoever loads the engine; with
    "embedded" as the kernels of `tensorrt_quick`, which the engine carries with it.

    Args:
        out: the folder that the engines go to.
        targets: of `WHERE`, or "native"; by default portable with tensorrt-rtx, native with the full library.
        profiles: what the engines take, as far as the graph leaves its axes free.
        strict: refuse profiles where the graph fixes an axis at another size.
        experts: how the routed experts run, in the dtype of the ONNX file.
        source: another ONNX file than `out`/model.onnx.
        put: what puts a finished engine, from the file given, in its place; by default it is only moved there.
        progress: called now and then.

    Raises:
        LatentizeError: there is no ONNX file of a converted model, a target is unknown or not this machine's, a profile
            contradicts the graph, TensorRT rejects the model (the node is named), or `out` cannot be written.
        MissingExtraError: neither library, or not onnx or onnxscript, is installed.
        ResourceError: there is too little memory or disk.
    """
    library = tensorrt_library.find("building TensorRT engines")
    for package, name in (("onnx", "onnx"), ("onnx_ir", "onnxscript")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(name, "tensorrt", "building TensorRT engines")
    chosen = _targets(library, targets)
    _check_experts(library, experts)
    path = out / "model.onnx" if source is None else source
    if not path.is_file():
        raise LatentizeError(f"{out} holds no model.onnx: convert with --export onnx first")
    _check_memory(path)
    errors = disk_errors(out, "what was finished is kept there", COPY)
    with errors, working_folder(out) as work:
        tokens = max(p.in_flight[1] for p in profiles)
        dtype, problems = _parsable(path, work / "model.onnx", experts, tokens)
        request = {
            "library": library, "plugin": experts == "plugin", "quick": problems, "tokens": tokens,
            "profiles": [[list(p.batch), list(p.tokens)] for p in profiles], "strict": strict,
            "source": str(work / "model.onnx"),
        }  # fmt: skip
        engines = []
        for target in chosen:
            fields, finished = _build(out, target, request, work, progress)
            engine = Engine(**{**fields, "experts": experts, "dtype": dtype})
            if put is None:
                finished.replace(out / engine.file)
            else:
                put(engine, finished)
            engines.append(engine)
    return tuple(engines)


def _targets(library: str, targets: Sequence[str] | None) -> tuple[str, ...]:
    """The targets to build for, each once, which this library on this machine can."""
    rtx = library == "tensorrt_rtx"
    chosen = tuple(dict.fromkeys(targets)) if targets else (("portable",) if rtx else (NATIVE,))
    for target in chosen:
        if target != NATIVE and target not in WHERE:
            raise LatentizeError(
                f"TensorRT target {target!r} is not known: expected one of {', '.join(WHERE)}, or {NATIVE}"
            )
        if target != NATIVE and not rtx:
            raise LatentizeError(
                f"target {target}: the full tensorrt builds for this machine's GPU alone; leave out --target, or use "
                "tensorrt-rtx, which builds for GPUs that are not here"
            )
        if target == NATIVE:
            _check_device(library)
    return chosen


def _check_device(library: str) -> None:
    import torch

    if not torch.cuda.is_available():
        what = "the full tensorrt builds on the GPU that it builds for" if library == "tensorrt" else "target native"
        raise LatentizeError(
            f"{what}: there is no NVIDIA GPU with a driver here; tensorrt-rtx builds without one (--target portable)"
        )
    tensorrt_library.require_capability(library, torch.cuda.get_device_capability(), torch.cuda.get_device_name())


def _check_experts(library: str, experts: str) -> None:
    if experts == "embedded" and library != "tensorrt":
        raise LatentizeError(
            "experts embedded: only the full tensorrt (10.9 or newer) embeds kernels in engines, and it is not "
            "installed here; use --experts plugin"
        )


def _check_memory(path: Path) -> None:
    weights = sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
    needed, free = _COPIES * weights, free_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"{path}: building takes at least {needed / 2**30:.1f} GiB of memory ({_COPIES} copies of its weights) and "
            f"{free / 2**30:.1f} GiB are free; use a machine with more"
        )


def _parsable(source: Path, path: Path, experts: str, tokens: int) -> tuple[str, list[Any]]:
    """Write the model as TensorRT parses it, bodies inlined or nodes named as plugins.

    Returns:
        the experts' dtype, and the problems that embedded kernels solve, as JSON values.
    """
    import onnx
    import onnx.inliner
    import onnx_ir as ir

    from latentize.exporters.onnx_bodies import DOMAIN, OP_TYPE
    from latentize.exporters.onnx_experts import attach_bodies

    try:
        model = ir.load(source)
    except Exception as error:
        raise LatentizeError(f"{source}: not a readable ONNX file ({one_line(error)}); export it again") from error
    model.functions.clear()
    nodes = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    if not nodes:
        raise LatentizeError(
            f"{source}: holds no {DOMAIN}::{OP_TYPE} node, so it is not the graph of a converted model; export it again"
        )
    hidden = [node.inputs[0] for node in nodes]
    dtypes = [value.dtype for value in hidden if value is not None]
    problems: list[Any] = []
    if experts == "dense":
        attach_bodies(model, FORM, model.opset_imports[""])
    if experts == "embedded":
        from latentize.exporters.tensorrt_quick import embed

        problems = [store.encode(problem, _no_tensor) for problem in embed(model, tokens)]
    try:
        ir.save(model, path, external_data=path.name + ".data")
    except (ValueError, FileNotFoundError) as error:  # external data that is cut short or gone
        raise LatentizeError(f"{source}: its weights cannot be read ({one_line(error)}); export it again") from error
    saved = onnx.load(path, load_external_data=False)
    if experts == "dense":
        saved = onnx.inliner.inline_local_functions(saved)
    elif experts == "plugin":
        from latentize.exporters.tensorrt_plugin import name_plugins

        name_plugins(saved)
    onnx.save(saved, path)
    return str(dtypes[0]).lower() if dtypes and dtypes[0] is not None else "none", problems


def _no_tensor(path: str, _tensor: Any) -> Any:
    raise AssertionError(f"{path}: a problem holds no tensors")


def _build(
    out: Path, target: str, request: dict[str, Any], work: Path, progress: Progress
) -> tuple[dict[str, Any], Path]:
    """Fields of an engine, and its file in `work`."""
    path = out / f"model.{target}.engine"
    finished = work / path.name
    start = time.perf_counter()
    answer = _ask_worker(
        {**request, "engine": str(finished), "target": target, "cache": str(cache_folder())}, work,
        lambda done, total, note="": progress(done, total, f"{target}: {note}"),
    )  # fmt: skip
    if "error" in answer:
        raise LatentizeError(f"{path}: TensorRT cannot build it for {target}: {answer['error']}")
    profiles = tuple(
        {name: tuple(tuple(shape) for shape in shapes) for name, shapes in one.items()} for one in answer["profiles"]
    )
    plan = None if answer["plan"] is None else tuple(answer["plan"])
    return {
        "file": path.name, "target": target, "library": answer["library"], "profiles": profiles,
        "layers": answer["layers"], "plugins": answer["plugins"], "plan": plan, "bytes": finished.stat().st_size,
        "seconds": time.perf_counter() - start, "timed_before": answer["timed_before"],
        "notes": tuple(answer["notes"]),
    }, finished  # fmt: skip


def _ask_worker(request: dict[str, Any], work: Path, progress: Progress) -> dict[str, Any]:
    paths = [str(_library_folder(work)), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
    worker = subprocess.Popen(  # noqa: S603 - our own module, no shell
        [sys.executable, "-m", "latentize.exporters.tensorrt_worker", str(os.getpid()), json.dumps(request)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    assert worker.stdout is not None
    assert worker.stderr is not None
    said: deque[str] = deque(maxlen=1)  # not kept in a file: what goes wrong may be a full disk
    listener = threading.Thread(target=lambda: said.extend(filter(str.strip, worker.stderr or ())), daemon=True)
    listener.start()
    answer: dict[str, Any] = {}
    try:
        for line in worker.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "step" in answer:
                    progress(answer["step"], answer["of"], answer["phase"])
        status = worker.wait()
    finally:
        worker.kill()
    listener.join()
    last = said[0].strip() if said else "no message"
    if status == 0 and answer and "step" not in answer:
        return {**answer, "error": f"{answer['error']}: {last}"} if answer.get("why") else answer
    if status == -signal.SIGKILL or any(words in last for words in _RAN_OUT):
        raise ResourceError(f"TensorRT ran out of memory or disk (status {status}): {last}")
    raise LatentizeError(f"TensorRT stopped with status {status}: {last}")


def _library_folder(work: Path) -> Path:
    """A folder in which the library has the name that its ONNX parser opens."""
    folder = work / "lib"
    folder.mkdir(exist_ok=True)
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for library in Path(place).glob("lib*.so.*"):
            link = folder / (library.name.partition(".so")[0] + ".so")
            if not link.exists():
                link.symlink_to(library)
    return folder
