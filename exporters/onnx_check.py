"""Does an ONNX file compute what the PyTorch model computes? Run both on the same inputs and compare."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.errors import GateError, LatentizeError, MissingExtraError, one_line
from latentize.exporters.captured import exporting
from latentize.exporters.onnxruntime_ops import register_library
from latentize.inputs import Inputs
from latentize.passes.double import dtype_of

if TYPE_CHECKING:
    import onnxruntime

#: Largest relative error between an exported graph and its model, by the model's dtype: rounding, a few hundred times.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class NoKernelError(LatentizeError):
    """onnxruntime has no CPU kernel for an operator in the graph's element type."""


@dataclass(frozen=True)
class Comparison:
    """One run of both sides. `shapes` are those of the tensors that went in."""

    shapes: tuple[tuple[int, ...], ...]
    error: float  # relative, ‖onnx − torch‖ / ‖torch‖ over the worst output
    max_abs: float


@dataclass(frozen=True)
class OnnxAgreement:
    """What `check_onnx` found. `error` is the smallest tolerance that would have passed."""

    error: float
    tolerance: float
    comparisons: tuple[Comparison, ...]


def check_onnx(
    path: Path,
    model: nn.Module,
    inputs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    tolerance: float | None = None,
    *,
    operator: Path | None = None,
) -> OnnxAgreement:
    """Run the file in onnxruntime (CPU) and `model` in PyTorch on each of `inputs`, and compare every output.

    Args:
        path: the ONNX file.
        model: the model it was exported from; run in eval mode, left as it was.
        inputs: (args, kwargs) pairs; take fresh values, other lengths, a single token, several sequences.
        tolerance: largest relative error allowed; by default `TOLERANCES` of the model's dtype.
        operator: as for `open_session`.

    Raises:
        GateError: the two disagree, an output is not finite where PyTorch's is, or onnxruntime cannot run the file.
        LatentizeError: the file is missing or broken, or `inputs` is empty.
        MissingExtraError: onnxruntime is not installed.
    """
    if not inputs:
        raise LatentizeError(f"{path}: no inputs to compare on; give at least one (args, kwargs) pair")
    limit = TOLERANCES.get(dtype_of(model), 1e-5) if tolerance is None else tolerance
    session = open_session(path, operator=operator)
    found = []
    for args, kwargs in inputs:
        comparison = _compare(session, path, model, Inputs(args, dict(kwargs)))
        if not comparison.error <= limit:  # NaN fails too
            raise GateError(
                f"{path}: onnxruntime and PyTorch disagree on inputs {_shapes(comparison.shapes)}: "
                f"relative error {comparison.error:.2e}, allowed {limit:.0e}, "
                f"largest difference {comparison.max_abs:.2e}"
            )
        found.append(comparison)
    return OnnxAgreement(max(c.error for c in found), limit, tuple(found))


def open_session(
    path: Path, threads: int = 0, *, arena: bool = True, operator: Path | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime CPU session on a file.

    Args:
        path: the file.
        threads: how many; 0 leaves it to onnxruntime.
        arena: without it every call gives its memory back when it ends, which is slower.
        operator: the library of `onnxruntime_ops` that runs the experts; None for the file's standard operators.

    Raises:
        NoKernelError: it has no CPU kernel for an operator in the graph's element type.
        LatentizeError: the file is missing, broken, or uses what this onnxruntime does not support.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", "running ONNX files") from None
    if not path.is_file():
        raise LatentizeError(f"{path}: no such file; export the model first")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = 4  # what goes wrong is raised; it need not be printed too
    if operator is not None:
        register_library(options, operator)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise _explained(path, error) from error


def _explained(path: Path, error: Exception) -> LatentizeError:
    missing = re.search(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'", str(error))
    if missing is None:
        return LatentizeError(f"{path}: onnxruntime cannot load it: {one_line(error)}")
    operator, node = missing.groups()
    return NoKernelError(
        f"{path}: onnxruntime has no CPU kernel for {operator} in the graph's dtype ({node}): export the model in "
        "float32 to run it on CPU"
    )


def run_session(
    session: onnxruntime.InferenceSession, inputs: Inputs, outputs: Sequence[str] | None = None
) -> list[Tensor]:
    """The named outputs of a session for a call's arguments; all of them in the order the model returns its tensors."""
    names = [i.name for i in session.get_inputs()]
    values = {name: _ort_value(t) for name, t in zip(names, inputs.tensors(), strict=True)}
    wanted = [o.name for o in session.get_outputs()] if outputs is None else list(outputs)
    return [torch.utils.dlpack.from_dlpack(output) for output in session.run_with_ort_values(wanted, values)]


def _ort_value(tensor: Tensor) -> onnxruntime.OrtValue:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        import onnx

        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _compare(session: onnxruntime.InferenceSession, path: Path, model: nn.Module, inputs: Inputs) -> Comparison:
    with exporting(model):
        expected = [t for t in pytree.tree_leaves(inputs.call(model)) if isinstance(t, Tensor)]
    try:
        actual = run_session(session, inputs)
    except Exception as error:
        raise GateError(f"{path}: onnxruntime cannot run it: {one_line(error)}") from error
    shapes = tuple(tuple(t.shape) for t in inputs.tensors())
    got, wanted = [tuple(t.shape) for t in actual], [tuple(t.shape) for t in expected]
    if got != wanted:
        raise GateError(f"{path}: on inputs {_shapes(shapes)} onnxruntime returns {got}, PyTorch returns {wanted}")
    pairs = list(zip(actual, expected, strict=True))
    return Comparison(shapes, max(relative_error(a, e) for a, e in pairs), max(_largest(a, e) for a, e in pairs))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite where what is not finite differs."""
    a, e = actual.double(), expected.double()
    if a.isnan().sum() != e.isnan().sum():
        return float("inf")
    size = e.norm().item()
    error = ((a - e).norm().item() / size) if size else (0.0 if not a.any() else float("inf"))
    return error if math.isfinite(error) else float("inf")


def _largest(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(str(list(s)) for s in shapes) or "none"
