"""Commands on a folder that a conversion wrote: compare it with its original, time both, build engines."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from latentize import artefact, terminal
from latentize.bench import TOKENS, Latency, bench_models, bench_onnx
from latentize.compare import Gate, evaluate_pair, output_agreement, require
from latentize.conversion import batches_of, example_batch
from latentize.errors import LatentizeError, MissingExtraError
from latentize.inputs import Batch, Inputs, observing, runnable_at
from latentize.progress import Steps
from latentize.run_onnx import ORIGINAL, REWRITTEN, agreement
from latentize.sources import Source, open_model

#: Batches that outputs are compared on.
_BATCHES = 8
#: About the time that the calls of one model at one number of tokens may take.
_SECONDS = 5.0


def compare(out: Path, original: str | None, *, quiet: bool) -> None:
    """Compare the converted model in OUT, and its ONNX graph where there is one, with its original.

    Raises:
        LatentizeError: OUT is not ours, or its original is not found.
        GateError: ONNX and PyTorch disagree.
    """
    console, progress = terminal.consoles(quiet=quiet)
    steps = Steps(progress)
    with steps.step("load"):
        source, rewritten = open_pair(out, original)
    notes: list[str] = list(source.notes)
    gates: list[Gate] = []
    with steps.step("compare"):
        evaluation = None if source.evaluate is None else evaluate_pair(source.model, rewritten, source.evaluate)
        outputs = output_agreement(source.model, rewritten, _batches(source))
        rows = agreement("rewritten", out / REWRITTEN, rewritten, source, notes) if (out / REWRITTEN).exists() else []
    terminal.print_evaluation(console, evaluation, outputs)
    if rows:
        terminal.print_onnx(console, rows)
        gates = [Gate.of(f"ONNX against PyTorch, T = {row.tokens}", row.relative_error, row.tolerance) for row in rows]
    terminal.print_end(console, gates, notes, (), str(out))
    require(gates)


def bench(out: Path, original: str | None, *, quiet: bool) -> None:
    """Time the converted model in OUT and its original.

    Raises:
        LatentizeError: OUT is not ours, or its original is not found.
    """
    console, progress = terminal.consoles(quiet=quiet)
    steps = Steps(progress)
    with steps.step("load"):
        source, rewritten = open_pair(out, original)
    with steps.step("time"):
        rows = latencies(source, source.model, rewritten, out)
    terminal.print_latency(console, rows)


def build(out: Path, targets: Sequence[str], experts: Literal["dense", "plugin"], *, quiet: bool) -> None:
    """Build TensorRT engines from the converted model in OUT, one for each target.

    Raises:
        LatentizeError: OUT is not ours, holds no ONNX graph, a target is unknown, or TensorRT rejects the graph.
        MissingExtraError: the packages that build engines are not installed.
    """
    from latentize.exporters import tensorrt

    artefact.read_manifest(out)
    require_tensorrt("latentize build")
    if not (out / REWRITTEN).exists():
        raise LatentizeError(
            f"{out}: engines are built from {REWRITTEN}, which is not there; convert with --export onnx"
        )
    console, progress = terminal.consoles(quiet=quiet)
    with Steps(progress).step("build"):
        engines = tensorrt.build(out, targets=targets, experts=experts)
    for engine in engines:
        fused = f", {engine.plugins} of them latentize's plugin" if engine.plugins else ""
        console.print(
            f"{engine.path}: {engine.bytes:,} bytes, {engine.layers} layers{fused}, for {tensorrt.WHERE[engine.target]}"
        )


def require_tensorrt(feature: str) -> None:
    """Check that engines can be built here.

    Raises:
        MissingExtraError: naming the package that is missing.
    """
    for package, name, extra in (("tensorrt_rtx", "tensorrt-rtx", "tensorrt"), ("onnx", "onnx", "onnx")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(name, extra, f"{feature} (no GPU is needed to build, one is to run)")


def open_pair(out: Path, original: str | None) -> tuple[Source, nn.Module]:
    """(the original as a source, the converted model) of a folder.

    Raises:
        LatentizeError: the folder is not ours, or the original is not where it was.
    """
    manifest = artefact.read_manifest(out)
    text = original if original is not None else manifest.origin.text
    if not text:
        raise LatentizeError(
            f"{out}: it was converted from Python, so its original is not known; give --original MODEL"
        )
    try:
        source = open_model(text)
    except LatentizeError as error:
        if original is not None:
            raise
        raise LatentizeError(f"{out}: its original cannot be opened ({error}); give --original MODEL") from error
    return source, artefact.load(out)


def latencies(source: Source, original: nn.Module, rewritten: nn.Module, folder: Path) -> tuple[Latency, ...]:
    """Latency of both models in PyTorch and, where both graphs are in `folder`, in onnxruntime.

    Slow models are timed over fewer rounds, so that a table takes about a minute at most.
    """

    def make_inputs(tokens: int) -> Inputs | str:
        inputs, reason = runnable_at(original, source.args, source.kwargs, tokens)
        return reason if inputs is None else inputs

    rounds = _rounds(original, source)
    rows = bench_models(original, rewritten, make_inputs, TOKENS, repeats=rounds, warmup=min(5, rounds))
    paths = {"original": folder / ORIGINAL, "rewritten": folder / REWRITTEN}
    present = {name: path for name, path in paths.items() if path.exists()}
    if "rewritten" not in present:
        return rows
    return rows + bench_onnx(present, make_inputs, TOKENS, repeats=rounds, warmup=min(5, rounds))


def _rounds(model: nn.Module, source: Source) -> int:
    began = time.monotonic()
    with observing(model):
        Inputs(source.args, source.kwargs).call(model)
    return max(3, min(30, int(_SECONDS / max(1e-6, time.monotonic() - began))))


def _batches(source: Source) -> list[Batch]:
    if source.calibration is None:
        return [example_batch(source.model, source.args, source.kwargs)]
    return list(batches_of(source.calibration(), source.model))[-_BATCHES:]
