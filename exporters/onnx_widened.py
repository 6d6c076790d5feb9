"""A bfloat16 graph as onnxruntime's CPU kernels can run it: the same graph and weights in float32.

bfloat16 numbers are float32 numbers, so that the copy has the graph's own weights and rounds less between its nodes. It
is there to be held against the model in float32: what the graph computes, without the rounding of what will run it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.errors import MissingExtraError
from latentize.exporters.onnx_file import write_model
from latentize.inputs import Inputs

if TYPE_CHECKING:
    import onnx_ir as ir

#: Largest relative error between a widened graph and the model widened alike: the graph's constants, such as a scale of
#: attention, were rounded to bfloat16 (2^-9 at most) when it was made, the model's are not.
TOLERANCE = 1e-2
#: Attributes that name an element type by its number.
_TYPE_NAMES = ("to", "dtype", "output_dtype", "stash_type", "saturate_type")


def holds_bfloat16(path: Path) -> bool:
    """Whether any value of an ONNX file is bfloat16.

    Raises:
        OSError, ValueError: the file cannot be read.
        MissingExtraError: onnxscript, which brings onnx_ir, is not installed.
    """
    try:
        import onnx_ir as ir
    except ImportError:
        raise MissingExtraError("onnxscript", "onnx", "running a bfloat16 graph") from None

    model = ir.load(path)
    return any(value.dtype == ir.DataType.BFLOAT16 for value in _values(model))


def widen_graph(path: Path, target: Path, external_above: int) -> None:
    """Write an ONNX file's copy in float32.

    Args:
        path: the file, with bfloat16 values.
        target: where the copy goes; weights beyond `external_above` bytes go to `target` + ".data".
        external_above: see `onnx_file.write_model`.

    Raises:
        ResourceError: the disk is full.
    """
    import onnx_ir as ir

    model = ir.load(path)
    for value in _values(model):
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.const_value is not None:
                value.const_value = _widen_tensor(value.const_value)
    for node in _nodes(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _widen_tensor(attribute.value))
            elif name in _TYPE_NAMES and attribute.value == int(ir.DataType.BFLOAT16):
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    write_model(model, target, external_above)


def widen_model(model: nn.Module) -> nn.Module:
    """A copy of a model whose bfloat16 parameters and buffers are float32."""
    widened = copy.deepcopy(model)
    for module in widened.modules():
        for own in (module._parameters, module._buffers):
            for tensor in own.values():
                if tensor is not None and tensor.dtype == torch.bfloat16:
                    tensor.data = tensor.data.float()
    return widened


def widen_inputs(inputs: Inputs) -> Inputs:
    """A call's arguments with their bfloat16 tensors in float32."""

    def widen(leaf: object) -> object:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf

    args, kwargs = pytree.tree_map(widen, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def _widen_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _nodes(model: ir.Model) -> Iterable[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _values(model: ir.Model) -> Iterable[ir.Value]:
    """Every value of a model, those of bodies and branches included, each once."""
    found: list[ir.Value] = []
    for function in model.functions.values():
        found += [*function.inputs, *function.outputs]
    for graph in model.graphs():
        found += [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in _nodes(model):
        found += node.outputs
    return {id(value): value for value in found}.values()
