"""ONNX files of whole models: one `latentize::LatentExperts` node per MoE block, which any onnxruntime can run."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentize import __version__
from latentize.errors import LatentizeError, one_line, require_packages
from latentize.exporters.captured import capture_any_length, example_for_export, exporting, quiet
from latentize.exporters.onnx_bodies import check_form
from latentize.exporters.onnx_choice import FormChoice
from latentize.exporters.onnx_costs import tokens_in_flight
from latentize.exporters.onnx_nodes import MAX_OPSET, MIN_OPSET
from latentize.exporters.tensorrt_profiles import Profile, fixed_problem

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_OPSET = 20
#: Weights beyond this many bytes go to a second file next to the model: one ONNX file holds less than 2 GiB.
EXTERNAL_ABOVE = 3 << 29

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class OnnxExport:
    """One exported file.

    `choices` has the body form of each `latentize::LatentExperts` node. `problem` says how a profile asks for what the
    graph cannot take, where the form was chosen for it nevertheless; "" where none does.
    """

    path: Path
    data_path: Path | None
    opset: int
    choices: tuple[FormChoice, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    problem: str = ""

    @property
    def forms(self) -> Mapping[str, str]:
        """The body form of each `latentize::LatentExperts` node, by module path."""
        return _forms(self.choices)


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    form: str = "auto",
    profiles: Sequence[Profile] = (),
    metadata: Mapping[str, str] | None = None,
    opset: int = DEFAULT_OPSET,
    external_above: int = EXTERNAL_ABOVE,
) -> OnnxExport:
    """Write `model` as ONNX to `path`, with every axis of its inputs dynamic that the model leaves free.

    Args:
        model: the model; it is run in eval mode without gradients, and left as it was found.
        args, kwargs: example arguments. Only tensors become inputs of the graph; anything else is fixed.
        path: the file; weights beyond `external_above` bytes go to `path` + ".data". Both are complete or absent.
        form: how the experts' bodies order their work: "auto" (see `onnx_experts.choose_form`), "measured" (see
            `onnx_timing.fastest`), one of `onnx_bodies.FORMS`, or several by the number of tokens (see `onnx_choice`).
        profiles: what the graph will be used for; "auto" and "measured" take what is fast there; others work too.
        metadata: strings to keep in the file (recipe, evidence).
        opset: version of the standard operators.

    Raises:
        LatentizeError: the form, opset or dtype is not supported; the model cannot be captured; or it holds an operator
            that ONNX lacks, which is named with its place in the model.
        MissingExtraError: onnx, onnxscript or, to measure, onnxruntime is not installed.
        ResourceError: the disk is full.
    """
    require_packages(("onnx", "onnxscript"), "onnx", "ONNX export")
    _check_request(model, form, opset)
    inputs = example_for_export(model, args, kwargs)
    with exporting(model):
        captured = capture_any_length(model, inputs, "ONNX export")
        program = _translate(captured, opset)
    from latentize.exporters.onnx_experts import attach_bodies
    from latentize.exporters.onnx_file import write_model
    from latentize.exporters.onnx_shapes import join_shapes

    _fix_sizes(program.model)
    join_shapes(program.model)
    choices = attach_bodies(program.model, form, opset, tokens_in_flight(profiles))
    for choice in choices:
        _log.info("%s: %s", choice.block, choice.describe())
    said = {"latentize.version": __version__, "latentize.forms": json.dumps(_forms(choices))}
    program.model.metadata_props.update(said)
    if profiles:
        program.model.metadata_props["latentize.profiles"] = " ".join(map(str, profiles))
    program.model.metadata_props.update(metadata or {})
    data_path = write_model(program.model, path, external_above)
    graph = program.model.graph
    names = tuple(v.name or "" for v in graph.inputs), tuple(v.name or "" for v in graph.outputs)
    total = sum(p.stat().st_size for p in (path, data_path) if p is not None)
    return OnnxExport(path, data_path, opset, choices, *names, total, _contradiction(program.model, profiles))


def _forms(choices: Sequence[FormChoice]) -> dict[str, str]:
    """Body forms by module path."""
    return {choice.block: choice.form for choice in choices}


def _check_request(model: nn.Module, form: str, opset: int) -> None:
    check_form(form)
    if form == "measured":
        require_packages(("onnxruntime",), "onnx", "ONNX export")
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


def _translate(captured: torch.export.ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
    from latentize.exporters.onnx_experts import translation_table
    from latentize.exporters.onnx_tidy import tidy

    try:
        with quiet():
            program = torch.onnx.export(
                captured, dynamo=True, opset_version=opset, custom_translation_table=translation_table(), verbose=False,
                optimize=False,
            )
            assert program is not None
            tidy(program.model)
    except torch.onnx.OnnxExporterError as error:
        raise LatentizeError(_explain(error, captured)) from error
    return program


def _fix_sizes(model: ir.Model) -> None:
    """Sizes that the capture found to be constants, as numbers: the exporter leaves them symbols named "16"."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = (size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape)
            value.shape = ir.Shape([int(s) if isinstance(s, str) and s.isdecimal() else s for s in sizes])


def _contradiction(model: ir.Model, profiles: Sequence[Profile]) -> str:
    """How a profile asks for sizes that the graph cannot take; "" where none does."""
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        for profile in profiles:
            problem = fixed_problem(value.name or "", shape, value.dtype.is_floating_point(), profile)
            if problem:
                return problem
    return ""


def _explain(error: BaseException, captured: torch.export.ExportedProgram) -> str:
    """The operator that ONNX lacks, and the module of the model it belongs to."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    found = re.search(r"OpOverload\(op='([\w.]+)'", str(causes[-1]))
    if found is None:
        return f"ONNX export: translation failed: {one_line(causes[-1])}"
    operator = found.group(1)
    calls = _calls(operator, captured)
    on_complex = [node for node in calls if any(map(_is_complex, (node, *node.all_input_nodes)))]
    if on_complex:
        return (
            f"ONNX export: ONNX has no complex numbers, on which {operator} works in {_place(on_complex)}; compute "
            "with real and imaginary parts there, or export without ONNX"
        )
    return (
        f"ONNX export: ONNX has no operator for {operator}{_written(calls, captured)}, used in {_place(calls)}; "
        "replace it there, or export without ONNX"
    )


def _calls(operator: str, captured: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """Where an operator is called: in what was captured, or in what it decomposes to, a little or as far as it can."""
    from torch._decomp import global_decomposition_table

    everything = dict(global_decomposition_table["post_autograd"])
    decompose = captured.run_decompositions
    for program in (lambda: captured, decompose, lambda: decompose(everything)):
        calls = [node for node in program().graph.nodes if str(node.target).startswith(operator)]
        if calls:
            return calls
    return []


def _written(calls: Sequence[torch.fx.Node], captured: torch.export.ExportedProgram) -> str:
    """In brackets, which captured operator the first of some calls is part of; "" where it is that one."""
    source = next(iter(calls[0].meta.get("from_node", ())[-1:]), None) if calls else None
    while source is not None and source.from_node:
        source = source.from_node[-1]
    origin = next((node for node in captured.graph.nodes if source is not None and node.name == source.name), None)
    if origin is None or origin.target == calls[0].target:
        return ""
    return f" (in {str(origin.target).rpartition('.')[0]})"


def _is_complex(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _place(calls: Sequence[torch.fx.Node]) -> str:
    """The module that the first of some calls belongs to."""
    if not calls:
        return "the model"
    stack = list((calls[0].meta.get("nn_module_stack") or {}).values())
    path = next((name for name, _ in reversed(stack) if name), "")
    return f"module {path!r}" if path else "the model's own forward"
