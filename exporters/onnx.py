"""ONNX files of whole models: one `latentize::LatentExperts` node per MoE block, which any onnxruntime can run."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize import __version__
from latentize.errors import LatentizeError, MissingExtraError
from latentize.exporters.onnx_bodies import check_form
from latentize.exporters.onnx_nodes import MAX_OPSET, MIN_OPSET
from latentize.inputs import Inputs, observing, with_tokens

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_OPSET = 20
#: Weights beyond this many bytes go to a second file next to the model: one ONNX file holds less than 2 GiB.
EXTERNAL_ABOVE = 3 << 29

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class OnnxExport:
    """One exported file. `forms` has the body form of each `latentize::LatentExperts` node, by module path."""

    path: Path
    data_path: Path | None
    opset: int
    forms: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    form: str = "auto",
    metadata: Mapping[str, str] | None = None,
    opset: int = DEFAULT_OPSET,
    external_above: int = EXTERNAL_ABOVE,
) -> OnnxExport:
    """Write `model` as ONNX to `path`, with every axis of its inputs dynamic that the model leaves free.

    Args:
        model: the model; it is run in eval mode without gradients, and left as it was found.
        args, kwargs: example arguments. Only tensors become inputs of the graph; anything else is fixed.
        path: the file; weights beyond `external_above` bytes go to `path` + ".data". Both are complete or absent.
        form: how the experts' bodies order their work: "auto" (see `onnx_experts.choose_form`), one of
            `onnx_bodies.FORMS`, or several as "few+many" or "few+some+many", by the number of selected experts in the
            batch.
        metadata: strings to keep in the file (recipe, evidence).
        opset: version of the standard operators.

    Raises:
        LatentizeError: the form, opset or dtype is not supported; the model cannot be captured; or it holds an operator
            that ONNX lacks, which is named with its place in the model.
        MissingExtraError: onnx or onnxscript is not installed.
        ResourceError: the disk is full.
    """
    _require("onnx", "onnxscript")
    _check_request(model, form, opset)
    inputs = example_for_export(model, args, kwargs)
    with exporting(model):
        captured = _capture(model, inputs)
        program = _translate(captured, opset)
    from latentize.exporters.onnx_experts import attach_bodies
    from latentize.exporters.onnx_file import write_model

    _fix_sizes(program.model)
    forms = attach_bodies(program.model, form, opset)
    program.model.metadata_props.update({"latentize.version": __version__, "latentize.forms": json.dumps(forms)})
    program.model.metadata_props.update(metadata or {})
    data_path = write_model(program.model, path, external_above)
    graph = program.model.graph
    names = tuple(v.name or "" for v in graph.inputs), tuple(v.name or "" for v in graph.outputs)
    total = sum(p.stat().st_size for p in (path, data_path) if p is not None)
    return OnnxExport(path, data_path, opset, forms, *names, total)


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no key-value cache among the outputs of a transformers model."""
    seen: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in seen if getattr(config, "use_cache", False) is True}
    with observing(model):
        try:
            for config in configs.values():
                config.use_cache = False
            yield
        finally:
            for config in configs.values():
                config.use_cache = True


def example_for_export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """The example arguments with two sequences of at least two tokens, where the model takes that.

    An axis of length 1 would be taken for fixed.
    """
    given = Inputs(args, kwargs)
    tensors = given.tensors()
    roomy = given
    if tensors and tensors[0].ndim > 1 and 1 in tensors[0].shape[:2]:
        short = tensors[0].shape[1] == 1 or (tensors[0].ndim == 2 and tensors[0].is_floating_point())
        longer = with_tokens(args, kwargs, 8) if short else None
        roomy = _doubled(given if longer is None else longer)
    with exporting(model):
        try:
            roomy.call(model)
        except Exception:  # the user's model may insist on its example's sizes
            return given
    return roomy


def _doubled(inputs: Inputs) -> Inputs:
    """Two copies of the batch, where every tensor's leading axis has length 1."""
    if any(t.ndim == 0 or t.shape[0] != 1 for t in inputs.tensors() if t.ndim > 1):
        return inputs

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim > 1 else leaf

    return Inputs(*pytree.tree_map(twice, (inputs.args, dict(inputs.kwargs))))


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, "onnx", "ONNX export") from None


def _check_request(model: nn.Module, form: str, opset: int) -> None:
    if form != "auto":
        check_form(form)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise LatentizeError(f"ONNX opset {opset} is not supported: expected {MIN_OPSET} to {MAX_OPSET}")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            raise LatentizeError(
                f"ONNX export: {name} is {tensor.dtype}; supported are float32, float16, bfloat16 and float64: "
                "convert the model with model.to(...)"
            )
        if tensor.is_meta:
            raise LatentizeError(f"ONNX export: {name} is on the meta device; load the model with its weights")


def _capture(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    shapes: Any = torch.export.ShapesCollection()
    for tensor in inputs.tensors():
        shapes[tensor] = dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO)
    try:
        with _quiet():
            return torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise LatentizeError(
            f"ONNX export: torch.export cannot capture {type(model).__name__}: {one_line(error)}; "
            "that part of its forward depends on data in Python"
        ) from error


def _translate(captured: torch.export.ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
    from latentize.exporters.onnx_experts import translation_table

    try:
        with _quiet():
            program = torch.onnx.export(
                captured, dynamo=True, opset_version=opset, custom_translation_table=translation_table(), verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        raise LatentizeError(_explain(error, captured)) from error
    assert program is not None
    return program


def _fix_sizes(model: ir.Model) -> None:
    """Sizes that the capture found to be constants, as numbers: the exporter leaves them symbols named "16"."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = (size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape)
            value.shape = ir.Shape([int(s) if isinstance(s, str) and s.isdecimal() else s for s in sizes])


def _explain(error: BaseException, captured: torch.export.ExportedProgram) -> str:
    """The operator that ONNX lacks, and the module of the model it belongs to."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    found = re.search(r"OpOverload\(op='([\w.]+)'", str(causes[-1]))
    if found is None:
        return f"ONNX export: translation failed: {one_line(causes[-1])}"
    operator = found.group(1)
    return (
        f"ONNX export: ONNX has no operator for {operator}, used in {_place(captured, operator)}; "
        "replace it there, or export without ONNX"
    )


def _place(captured: torch.export.ExportedProgram, operator: str) -> str:
    for program in (captured, captured.run_decompositions()):
        for node in program.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith(operator):
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                path = next((name for name, _ in reversed(stack) if name), "")
                return f"module {path!r}" if path else "the model's own forward"
    return "the model"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's advice to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """An exception as the first lines of its message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"
