"""The record of one conversion: frozen data with a versioned JSON form (docs/report-schema.md), and a page made of it.

A value that was not measured is None; nothing here is estimated in its place.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from latentize.bench import Latency
from latentize.blocks import Block, Probe
from latentize.compare import Evaluation, Gate, OutputAgreement
from latentize.comparison import Comparison
from latentize.disk_errors import write_error
from latentize.errors import LatentizeError, MissingExtraError
from latentize.exporters.onnx_choice import FormChoice
from latentize.exporters.onnxruntime_ops import Library
from latentize.exporters.tensorrt import Engine
from latentize.load_balance import ExpertLoad
from latentize.spec import MoESpec
from latentize.whole_files import written_whole

SCHEMA_VERSION = 1
JSON_NAME = "report.json"
HTML_NAME = "report.html"


@dataclass(frozen=True)
class Model:
    """What was converted: `form` says how it was given (model.py, huggingface, pt2, python), `name` where.

    Parameters and bytes count every parameter and buffer once; "after" is None where nothing was rewritten.
    """

    form: str
    name: str
    class_name: str
    parameters_before: int
    parameters_after: int | None
    bytes_before: int
    bytes_after: int | None


@dataclass(frozen=True)
class Environment:
    """Where and when it ran; `date` is ISO 8601 in UTC."""

    python: str
    torch: str
    platform: str
    cpu: str
    threads: int
    date: str
    accelerator: str | None = None

    @classmethod
    def here(cls) -> Environment:
        """The environment of this process, now."""
        return cls(
            python=platform.python_version(),
            torch=torch.__version__,
            platform=platform.platform(),
            cpu=_cpu_name(),
            threads=torch.get_num_threads(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes of one block as it came in; `latent_dim` equals `hidden_size` where it is not latent."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    latent_dim: int

    @classmethod
    def of(cls, spec: MoESpec) -> Sizes:
        """The sizes of `spec`."""
        return cls(spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k, spec.latent_dim)


@dataclass(frozen=True)
class Plan:
    """What becomes of one block: sizes, and the costs of its routed path per token, before and after.

    `weight_bytes` are read for one token: its k experts and, after, the two projections (`projection_bytes`) and the
    bypass of `bypass_rank` (`bypass_bytes`), both read once per batch. `dispatch_bytes` cross to and from the experts
    (2 · k · width); `stored_bytes` are the block's parameters. `predicted_error` is relative, for the start, and
    `predicted_loss` what it adds to the loss: nats per position, or the relative squared error of an output that is not
    class scores; `error_without_bypass` is the error predicted without the bypass. `spectrum` holds the d singular
    values that decide ℓ, largest first.
    """

    hidden_size: int
    latent_dim: int
    num_experts_before: int
    num_experts_after: int
    top_k_before: int
    top_k_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    dispatch_bytes_before: int
    dispatch_bytes_after: int
    stored_bytes_before: int
    stored_bytes_after: int
    flops_before: int
    flops_after: int
    predicted_error: float | None = None
    spectrum: tuple[float, ...] | None = None
    projection_bytes: int | None = None
    predicted_loss: float | None = None
    bypass_rank: int = 0
    bypass_bytes: int = 0
    error_without_bypass: float | None = None


@dataclass(frozen=True)
class Errors:
    """Relative error of one block's routed output on the original's own inputs, after each step."""

    initialised: float | None = None
    healed_block: float | None = None
    healed_end_to_end: float | None = None


@dataclass(frozen=True)
class SharedExpert:
    """What the recipe's refit did to the shared expert of one block: `tensors` are the model's that it changed.

    They are the only ones outside the blocks that differ from the original's. `reason` says why there are none. Errors
    are those of the sum of routed and shared output, relative, over `held_out` calibration tokens that the refit has
    not seen; a `gated` shared expert counts by another number for every token.
    """

    tensors: tuple[str, ...]
    reason: str = ""
    gated: bool = False
    held_out: int = 0
    error_before: float | None = None
    error_after: float | None = None
    bytes_added: int = 0


@dataclass(frozen=True)
class BlockRecord:
    """One place that looked like an MoE, in the model's order. `plan` is None where the block was left as it is.

    `reason` says why it was left: the condition that failed when "refused", the recipe's pattern when excluded.
    """

    name: str
    status: Literal["moe", "latent", "refused"]
    reason: str = ""
    computes: str = ""
    sizes: Sizes | None = None
    max_error: float | None = None
    evidence: tuple[Probe, ...] = ()
    plan: Plan | None = None
    errors: Errors | None = None
    load_before: ExpertLoad | None = None
    load_after: ExpertLoad | None = None
    shared_expert: SharedExpert | None = None

    @classmethod
    def of(cls, block: Block, **measured: Any) -> BlockRecord:
        """The record of `block` with what else was measured: plan, errors, loads, shared_expert; or with a reason."""
        known: dict[str, Any] = {"reason": block.reason, "max_error": block.max_error, "evidence": block.evidence}
        if block.spec is not None:
            known |= {"computes": block.spec.describe(), "sizes": Sizes.of(block.spec)}
        return cls(block.name, block.status, **(known | measured))


@dataclass(frozen=True)
class Calibration:
    """The data that the conversion saw.

    `healed_outside` is how many parameters outside the rewritten blocks healing trained; with 0 they are the
    original's.
    """

    batches: int
    tokens: int
    heal_steps: int = 0
    healed_outside: int = 0


@dataclass(frozen=True)
class OnnxAgreement:
    """An exported graph in onnxruntime, by whose operators `backend` says, against PyTorch at one length."""

    model: Literal["original", "rewritten"]
    tokens: int
    relative_error: float
    tolerance: float
    passed: bool
    backend: str = "onnxruntime"


@dataclass(frozen=True)
class Stage:
    """One step of the run; `peak_memory_bytes` is the process's largest resident size up to its end."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class File:
    """One file of OUT; `path` is relative to it."""

    path: str
    what: str
    bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything that one run found, planned, did and measured. Sections that were not measured are None."""

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    tool_version: str
    model: Model
    environment: Environment
    recipe: Mapping[str, Any]
    blocks: tuple[BlockRecord, ...]
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    outputs: OutputAgreement | None = None
    latency: tuple[Latency, ...] | None = None
    onnx: tuple[OnnxAgreement, ...] | None = None
    gates: tuple[Gate, ...] = ()
    stages: tuple[Stage, ...] = ()
    warnings: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    engines: tuple[Engine, ...] = ()
    libraries: tuple[Library, ...] = ()
    comparison: Comparison | None = None
    forms: tuple[FormChoice, ...] = ()

    @property
    def rewritten(self) -> tuple[BlockRecord, ...]:
        """The blocks that were rewritten."""
        return tuple(block for block in self.blocks if block.plan is not None)


class _Schema(GenerateJsonSchema):
    """JSON has no number for what is not finite: such a float is written as a word, which pydantic reads back."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  pydantic's signature
        return False

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["NaN", "Infinity", "-Infinity"]}]}


_ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)


def to_json(report: Report) -> str:
    """The report as JSON text, the schema version first."""
    fields = {"schema_version": report.schema_version} | _ADAPTER.dump_python(report)
    return json.dumps(_words(fields), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, name: str = JSON_NAME) -> Report:
    """The report in JSON text that `to_json` wrote; `name` is what errors call it.

    Raises:
        LatentizeError: the text is not JSON, has another schema version, or a field is missing or of the wrong type.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise LatentizeError(f"{name}: not JSON ({error}); run the conversion again to write it anew") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise LatentizeError(
            f"{name}: schema version {version!r}, expected {SCHEMA_VERSION}; "
            "read it with the release of latentize that wrote it"
        )
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise LatentizeError(f"{name}: field {where}: {problem['msg']}; it was changed or cut short") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    return _ADAPTER.json_schema(mode="serialization", schema_generator=_Schema)


def write_data(report: Report, out: Path) -> Path:
    """Write report.json into the folder `out`, whole or not at all; returns its path.

    Raises:
        ResourceError: the disk is full.
        LatentizeError: `out` cannot be written.
    """
    _write_together(out, {JSON_NAME: to_json(report)})
    return out / JSON_NAME


def write(report: Report, out: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into the folder `out`, both whole or neither; returns both paths.

    Raises:
        MissingExtraError: a package that the page needs is not installed; report.json is written nevertheless.
        ResourceError: the disk is full.
        LatentizeError: `out` cannot be written.
    """
    from latentize.report_html import render

    out = Path(out)
    try:
        page = render(report)
    except MissingExtraError:
        write_data(report, out)
        raise
    _write_together(out, {JSON_NAME: to_json(report), HTML_NAME: page})
    return out / JSON_NAME, out / HTML_NAME


def read(out: Path) -> Report:
    """The report in the folder `out`.

    Raises:
        LatentizeError: there is none, or it cannot be read.
    """
    path = Path(out) / JSON_NAME
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise LatentizeError(
            f"{path}: cannot be read ({error.strerror}); give the folder that `latentize MODEL -o OUT` wrote"
        ) from None


def _write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Files by name, all of them or none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(*(folder / name for name in texts)) as paths:
            for path, text in zip(paths, texts.values(), strict=True):
                path.write_text(text, encoding="utf-8")
    except OSError as error:
        left, elsewhere = "what was there before still is", "choose another folder"
        raise write_error(folder / " and ".join(texts), error, left, elsewhere) from None


def _words(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _words(item) for key, item in value.items()}
    return [_words(item) for item in value] if isinstance(value, (list, tuple)) else value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
