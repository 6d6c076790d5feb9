"""`latentize build`: TensorRT engines and onnxruntime's library from what a conversion wrote."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentize import artefact, report, staging, terminal
from latentize.disk_errors import COPY
from latentize.errors import LatentizeError, MissingExtraError
from latentize.exporters.tensorrt_profiles import Profile, choose
from latentize.progress import Steps
from latentize.run_onnx import REWRITTEN, check_own

if TYPE_CHECKING:
    from latentize.exporters.onnxruntime_ops import Library
    from latentize.exporters.tensorrt import Engine, Experts

#: Targets that are no GPUs: the library for most machines of this architecture, and for this one.
LIBRARIES = ("onnxruntime", "onnxruntime-native")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build(
    out: Path, targets: Sequence[str], experts: Experts | None = None, *, profiles: Sequence[Profile] = (),
    dtype: str | None = None, quiet: bool = False,
) -> None:  # fmt: skip
    """Build for the converted model in OUT what each target needs; the report gets what was built.

    Args:
        out: the folder.
        targets: of `LIBRARIES` for a library of latentize's operator that onnxruntime registers, or what engines are
            built for; none for the default of the TensorRT library that is installed.
        experts: how the routed experts run in engines; None for dense.
        profiles: what the engines take; none for the recipe's.
        dtype: of `DTYPES`; the model is exported again in it. None for that of the graph in OUT.
        quiet: say nothing.

    Raises:
        LatentizeError: OUT is not ours, cannot be written or holds no ONNX graph of its own, a target or profile does
            not fit, options of engines are given where none is built, TensorRT rejects the graph, or there is no
            compiler for the library.
        MissingExtraError: the packages that build engines are not installed.
        ResourceError: there is too little memory or disk.
    """
    targets = tuple(dict.fromkeys(targets))
    libraries, gpus = [t for t in targets if t in LIBRARIES], [t for t in targets if t not in LIBRARIES]
    if libraries and not gpus:
        _refuse_options(libraries[0], {"--experts": experts, "--dtype": dtype, "--profile": profiles})
    artefact.read_manifest(out)
    staging.check_writable(out, elsewhere=COPY)
    console, _ = terminal.consoles(quiet=quiet)
    if libraries:
        made = _library(out, libraries)
        for line in (describe_library(made, out), *_kept(out, (made.file,), libraries=(made,))):
            console.print(terminal.plain(line))
    if gpus or not libraries:
        _engines(out, gpus, experts or "dense", profiles, dtype, quiet=quiet)


def _refuse_options(target: str, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise LatentizeError(
            f"{' and '.join(given)}: for engines alone, and --target {target} makes a library, which runs {REWRITTEN} "
            "as it is; leave this out, or name a GPU as a target too"
        )


def _library(out: Path, targets: Sequence[str]) -> Library:
    from latentize.exporters import onnxruntime_ops

    if len(targets) > 1:
        raise LatentizeError(f"--target {' and '.join(targets)}: both write {onnxruntime_ops.FILE}; give one of them")
    if not (out / REWRITTEN).exists():
        raise LatentizeError(f"{out}: the library serves {REWRITTEN}, which is not there; convert with --export onnx")
    return onnxruntime_ops.build(out, native=targets[0] == LIBRARIES[1])


def _engines(
    out: Path, targets: Sequence[str], experts: Experts, profiles: Sequence[Profile], dtype: str | None, *, quiet: bool
) -> None:
    from latentize.exporters import tensorrt
    from latentize.run_compare import check_report, require_tensorrt

    manifest = artefact.read_manifest(out)
    require_tensorrt("latentize build")
    check_report(out)
    planned = manifest.recipe.get("profiles") or ()
    chosen = choose(profiles, planned, _longest(out))
    if dtype is None and not (out / REWRITTEN).exists():
        raise LatentizeError(
            f"{out}: engines are built from {REWRITTEN}, which is not there; convert with --export onnx"
        )
    if dtype is None:
        check_own(out, manifest.recipe)
    console, progress = terminal.consoles(quiet=quiet)
    steps = Steps(progress)
    with tempfile.TemporaryDirectory() as folder:
        source = None
        if dtype is not None:
            with steps.step("export"):
                source = _exported(out, dtype, Path(folder))
        lines: list[str] = []
        try:
            with steps.step("build") as show:
                tensorrt.build(
                    out, targets=targets, profiles=chosen, strict=bool(profiles or planned), experts=experts,
                    source=source, put=lambda engine, finished: lines.extend(_put(out, engine, finished)),
                    progress=show,
                )  # fmt: skip
        finally:
            for line in dict.fromkeys(lines):
                console.print(terminal.plain(line))


def _put(out: Path, engine: Engine, finished: Path) -> tuple[str, ...]:
    """Put an engine in its place and into the report, which never describes another one; what there is to say."""
    made = report.read(out) if (out / report.JSON_NAME).exists() else None
    if made is not None and any(known.file == engine.file for known in made.engines):
        _kept(out, (engine.file,))
    finished.replace(out / engine.file)
    return describe(engine), *_kept(out, (engine.file,), engines=(engine,))


def describe(engine: Engine) -> str:
    """An engine in a line."""
    from latentize.exporters.tensorrt import WHERE

    kinds = ", ".join(f"{count} {kind.lower()}" for kind, count in list(engine.layers.items())[:4])
    fused = f", {engine.plugins} of them latentize's" if engine.plugins else ""
    ranges = "; ".join(
        " ".join(f"{name} {'..'.join('x'.join(map(str, shape)) for shape in of)}" for name, of in one.items())
        for one in engine.profiles
    )
    where, size = WHERE.get(engine.target, "this machine's GPU"), f"{engine.bytes:,} bytes in {engine.dtype}"
    run = f", of which {len(engine.plan)} are left to run" if engine.plan else ""
    timed = ", with the timings of an earlier build" if engine.timed_before else ""
    line = (
        f"{engine.file}: {size} by {engine.library} in {engine.seconds:.1f} s{timed}, "
        f"{sum(engine.layers.values())} layers{fused} ({kinds}, …){run}, takes {ranges}, for {where}"
    )
    return "; ".join((line, *engine.notes))


def describe_library(made: Library, out: Path) -> str:
    """A library in a line."""
    return (
        f"{made.file}: {made.bytes:,} bytes for onnxruntime 1.17 or newer on {made.processor}, built on {made.system}; "
        f'register it with SessionOptions.register_custom_ops_library("{out / made.file}")'
    )


def _longest(out: Path) -> int | None:
    """The longest sequence that the converted model's configuration names."""
    try:
        values: Any = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return None
    inner = [values, values.get("text_config")] if isinstance(values, dict) else []
    found = (each.get("max_position_embeddings") for each in inner if isinstance(each, dict))
    return next((length for length in found if isinstance(length, int)), None)


def _exported(out: Path, dtype: str, folder: Path) -> Path:
    """The converted model as ONNX in another dtype."""
    from latentize.exporters.onnx import export_onnx

    source = artefact.open_artefact(out)
    wanted = DTYPES[dtype]

    def cast(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args = tuple(cast(value) for value in source.args)
    kwargs = {name: cast(value) for name, value in source.kwargs.items()}
    return export_onnx(source.model.to(wanted), args, kwargs, folder / REWRITTEN, form="dense").path


def _kept(
    out: Path, names: Sequence[str], *, engines: Sequence[Engine] = (), libraries: Sequence[Library] = ()
) -> list[str]:
    """Put what was built into the report of OUT, in place of what has one of these names; what stood in the way."""
    if not (out / report.JSON_NAME).exists():
        return []
    made = report.read(out)
    kept_engines = (*(engine for engine in made.engines if engine.file not in names), *engines)
    kept_libraries = (*(library for library in made.libraries if library.file not in names), *libraries)
    try:
        report.write(replace(made, engines=kept_engines, libraries=kept_libraries), out)
    except MissingExtraError as error:
        return [str(error)]
    return []
