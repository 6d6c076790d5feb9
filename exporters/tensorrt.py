"""TensorRT engines from a converted model's ONNX file, built with tensorrt-rtx on a machine with or without a GPU.

The library is driven in a process of its own (`tensorrt_worker`): it aborts on what it cannot load, and it looks for
its parser's library under a name that its package does not have.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentize.errors import LatentizeError, MissingExtraError, ResourceError

#: What an engine can be built for, and where it then runs.
WHERE = {"portable": "NVIDIA GPUs of compute capability 8.0, 8.6, 8.9 and 12.0"} | {
    name: f"NVIDIA GPUs of compute capability {capability}"
    for name, capability in (("SM80", "8.0"), ("SM86", "8.6"), ("SM89", "8.9"), ("SM120", "12.0"))
}
#: How an engine runs the routed experts.
Experts = Literal["dense", "plugin"]
#: The body form that TensorRT takes: it rejects loops over active experts and onnxruntime's fused operator.
FORM = "dense"


@dataclass(frozen=True)
class Engine:
    """One engine file. `profile` has the smallest, usual and largest shape of every input.

    `layers` counts the network's layers, `plugins` those of them that are the project's plugin.
    """

    path: Path
    target: str
    profile: dict[str, list[list[int]]]
    layers: int
    bytes: int
    seconds: float
    plugins: int = 0


def build(
    out: Path,
    *,
    targets: Sequence[str] = ("portable",),
    max_batch: int = 4,
    max_tokens: int = 256,
    experts: Experts = "dense",
) -> tuple[Engine, ...]:
    """Build an engine for each target from `out`/model.onnx, as `out`/model.TARGET.engine; no GPU is needed.

    With `experts` "dense" they run as three dense matrix products over all experts; with "plugin" as the layer of
    `tensorrt_plugin`, which reads the selected ones only and must be registered by whoever loads the engine. Both in
    the dtype of the ONNX file. Inputs take any batch up to `max_batch` and any number of tokens up to `max_tokens`.
    Running an engine needs an NVIDIA GPU of compute capability 8.0, 8.6, 8.9 or 12.0.

    Raises:
        LatentizeError: there is no model.onnx, a target is unknown, or TensorRT rejects the model (the node is named).
        MissingExtraError: tensorrt-rtx, onnx or onnxscript is not installed.
        ResourceError: the build ran out of memory or disk.
    """
    source = out / "model.onnx"
    unknown = [target for target in targets if target not in WHERE]
    if unknown:
        raise LatentizeError(f"TensorRT target {unknown[0]!r} is not known: expected one of {', '.join(WHERE)}")
    if max_batch < 1 or max_tokens < 1:
        raise LatentizeError(f"TensorRT: max_batch {max_batch} and max_tokens {max_tokens} must be at least 1")
    for package, name in (("tensorrt_rtx", "tensorrt-rtx"), ("onnx", "onnx"), ("onnx_ir", "onnxscript")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(name, "tensorrt", "building TensorRT engines (no GPU is needed for that)")
    if not source.is_file():
        raise LatentizeError(f"{out} holds no model.onnx: convert with --export onnx first")
    with tempfile.TemporaryDirectory(dir=out, prefix=".engine.") as folder:
        work = Path(folder)
        parsable = _parsable(source, work / "model.onnx", experts)
        request = {"max_batch": max_batch, "max_tokens": max_tokens, "plugin": experts == "plugin"}
        return tuple(_build(parsable, out / f"model.{t}.engine", t, request, work) for t in targets)


def _parsable(source: Path, path: Path, experts: Experts) -> Path:
    """The model in standard operators, bodies in TensorRT's form inlined; or with the experts' nodes as plugins."""
    import onnx
    import onnx.inliner
    import onnx_ir as ir

    from latentize.exporters.onnx import one_line
    from latentize.exporters.onnx_experts import attach_bodies

    try:
        model = ir.load(source)
    except Exception as error:
        raise LatentizeError(f"{source}: not a readable ONNX file ({one_line(error)}); export it again") from error
    model.functions.clear()
    if experts == "dense":
        attach_bodies(model, FORM, model.opset_imports[""])
    ir.save(model, path, external_data=path.name + ".data")
    saved = onnx.load(path, load_external_data=False)
    if experts == "dense":
        saved = onnx.inliner.inline_local_functions(saved)
    else:
        from latentize.exporters.tensorrt_plugin import name_plugins

        name_plugins(saved)
    onnx.save(saved, path)
    return path


def _build(source: Path, path: Path, target: str, request: dict[str, Any], work: Path) -> Engine:
    unfinished = work / path.name
    start = time.perf_counter()
    answer = _ask_worker({**request, "source": str(source), "engine": str(unfinished), "target": target}, work)
    if "error" in answer:
        raise LatentizeError(f"{path}: TensorRT cannot build it for {target}: {answer['error']}")
    unfinished.replace(path)
    seconds = time.perf_counter() - start
    return Engine(path, target, answer["profile"], answer["layers"], path.stat().st_size, seconds, answer["plugins"])


def _ask_worker(request: dict[str, Any], work: Path) -> dict[str, Any]:
    paths = [str(_library_folder(work)), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(  # noqa: S603 - our own module, no shell
        [sys.executable, "-m", "latentize.exporters.tensorrt_worker", json.dumps(request)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no message")
    if done.returncode == -9 or "out of memory" in last.lower() or "No space left" in last:
        raise ResourceError(f"TensorRT ran out of memory or disk: {last}")
    raise LatentizeError(f"TensorRT stopped with status {done.returncode}: {last}")


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
