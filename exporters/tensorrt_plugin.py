"""The routed latent experts as a TensorRT plugin layer on the project's Triton kernels.

`IPluginV3` in Python, for `tensorrt` and `tensorrt-rtx` alike. An engine holds the layer's description; building it
needs no GPU. Whoever loads such an engine calls `register` first, in a process with torch and Triton: the kernels run
from there, on TensorRT's stream and buffers.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentize import kernels_triton
from latentize.activations import Activation
from latentize.errors import LatentizeError
from latentize.exporters.onnx_bodies import DOMAIN, INPUTS, OP_TYPE
from latentize.kernels_torch import Experts
from latentize.kernels_triton_steps import PROGRAMS, Cut, Problem, block_count, workspaces

#: The plugin's name, version and namespace in TensorRT's registry. The version changes with the layer's meaning.
NAME, VERSION, NAMESPACE = OP_TYPE, "1", DOMAIN
#: Every buffer in the workspace starts at a multiple of this many bytes.
ALIGNMENT = 256
#: The inputs that every layer has.
REQUIRED = ("hidden", "indices", "weights", "up", "down")
#: Tokens of one pair each that fill a large device with the largest blocks: see `kernels_triton_steps.Cut`.
SETTLED = PROGRAMS * 64
_NUMPY = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2", torch.int64: "<i8", torch.int32: "<i4"}


@dataclass(frozen=True)
class Layer:
    """What a plugin layer computes; the tensors' shapes come with the call. `tensors` names its inputs, in order."""

    tensors: tuple[str, ...]
    activation: Activation
    weights_on_input: bool = False

    def problem(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Problem:
        """The kernels' problem for inputs of these shapes, contiguous as TensorRT's linear format has them."""
        of = dict(zip(self.tensors, shapes, strict=True))
        experts, m, width = of["up"]
        strides: dict[str, Any] = {name: (math.prod(s[1:]), s[2]) for name, s in of.items() if len(s) == 3}
        strides |= {name: s[1] for name, s in of.items() if len(s) == 2 and name.endswith("_bias")}
        top_k = of["indices"][1]
        return Problem(experts, top_k, width, m, dtype, self.activation, self.weights_on_input, **strides)

    def run(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, inputs: Sequence[int], output: int, workspace: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """The layer on raw buffers: pointers to inputs of `shapes`, to the output [T, l] and to the workspace.

        Runs on the current stream of `device`; indices are int64, all else is of `dtype`.
        """
        tokens = shapes[0][0]
        if not tokens:
            return
        problem = self.problem(shapes, dtype)
        cut = Cut.of(problem, tokens)
        tensors: dict[str, Tensor | None] = dict.fromkeys(Experts._fields)
        for name, shape, pointer in zip(self.tensors, shapes, inputs, strict=True):
            tensors[name] = tensor_at(pointer, shape, torch.int64 if name == "indices" else dtype, device)
        tensors["combined"] = tensor_at(output, shapes[0], dtype, device)
        at = workspace
        for name, (shape, kind) in workspaces(problem, tokens, cut).items():
            tensors[name] = tensor_at(at, shape, kind, device)
            at += _aligned(math.prod(shape) * kind.itemsize)
        kernels_triton.run(problem, cut, tensors)

    def workspace_bytes(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """Bytes of workspace that suffice for every number of tokens from 1 to the shapes' own."""
        return _most_workspace(self.problem(shapes, dtype), shapes[0][0])


def tensor_at(pointer: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory at `pointer` as a contiguous tensor; it is not kept alive."""
    if not math.prod(shape):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu":
        nbytes = math.prod(shape) * dtype.itemsize
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype=dtype).view(*shape)
    flat = torch.as_tensor(_Memory(pointer, tuple(shape), _NUMPY[dtype]), device=device)
    return flat.view(dtype)


class _Memory:
    """Device memory as torch takes it over; bf16, which the interface has not, goes as 16-bit integers."""

    def __init__(self, pointer: int, shape: tuple[int, ...], kind: str) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": kind, "data": (pointer, False), "version": 3}


@functools.lru_cache(maxsize=64)
def _most_workspace(problem: Problem, most: int) -> int:
    """The most that a number of tokens up to `most` takes: fewer tokens may be cut into more parts.

    From `SETTLED` tokens on nothing is split any more, and only the few bytes for each block and the counts of each
    chunk depend on the cut. Chunks double past powers of two of pairs, so that their number is largest at one.
    """
    fullest = {2**power // problem.top_k for power in range(1, (most * problem.top_k).bit_length())}
    counted = ({*range(1, min(most, SETTLED) + 1), most} | {t for t in fullest if t <= most}) - {0}
    blocks = 3 * _aligned(4 * block_count(problem, most * problem.top_k, 16))
    return blocks + max((_workspace_bytes(problem, tokens) for tokens in counted), default=0)


def _workspace_bytes(problem: Problem, tokens: int) -> int:
    buffers = workspaces(problem, tokens, Cut.of(problem, tokens)).values()
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in buffers)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def to_fields(layer: Layer) -> dict[str, Any]:
    """The layer as plain values by name: what an engine keeps of it. Names are those of the ONNX node's attributes."""
    values = {"tensors": " ".join(layer.tensors), "weights_on_input": int(layer.weights_on_input)}
    a = layer.activation
    named = {f.name: getattr(a, f.name) for f in fields(a) if f.name != "name" and getattr(a, f.name) is not None}
    return {**values, "activation": a.name, **{name: float(value) for name, value in named.items()}}


def from_fields(values: Mapping[str, Any]) -> Layer:
    """The layer that `to_fields` described, or an ONNX node's attributes do.

    Raises:
        LatentizeError: a needed field is missing or an input is unknown.
    """
    names = tuple(str(values.get("tensors", "")).split())
    if not set(REQUIRED) <= set(names) <= set(INPUTS) or len(set(names)) < len(names):
        raise LatentizeError(
            f"{NAME} layer: expected the inputs {', '.join(REQUIRED)} and perhaps others of {', '.join(INPUTS)}, "
            f"found {' '.join(names) or 'none'}; build the engine again with this version of latentize"
        )
    scalars = {f.name: float(values[f.name]) for f in fields(Activation) if f.name != "name" and f.name in values}
    activation = Activation(str(values.get("activation", "silu")), **scalars)
    return Layer(names, activation, bool(values.get("weights_on_input", 0)))


def name_plugins(model: Any) -> int:
    """Make every `latentize::LatentExperts` node of an ONNX ModelProto one that TensorRT's parser takes for the plugin.

    Bodies go, absent inputs too: the attribute `tensors` says which are there. Returns the number of nodes.
    """
    from onnx import helper

    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    for node in nodes:
        given = [(name, value) for name, value in zip(INPUTS, node.input, strict=False) if value]
        del node.input[:]
        node.input.extend(value for _, value in given)
        attributes = {
            "tensors": " ".join(name for name, _ in given), "plugin_version": VERSION, "plugin_namespace": NAMESPACE
        }  # fmt: skip
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        node.overload = ""
    del model.functions[:]
    return len(nodes)


def register(trt: Any) -> None:
    """Make the plugin known to TensorRT in this process, for building and for loading; more than once does no harm.

    Args:
        trt: the module `tensorrt_rtx` or `tensorrt`.
    """
    registry = trt.get_plugin_registry()
    if registry.get_creator(NAME, VERSION, NAMESPACE) is None:
        registry.register_creator(creator(trt), NAMESPACE)


@functools.cache
def creator(trt: Any) -> Any:
    """The plugin's creator; TensorRT does not keep it alive, the cache does."""
    plugin = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            scalars = [f.name for f in fields(Activation) if f.name != "name"]
            empty = {"tensors": "", "activation": "", "weights_on_input": 0, **dict.fromkeys(scalars, 0.0)}
            self.field_names = _collection(trt, empty)

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:  # noqa: ARG002
            return plugin(from_fields({f.name: _value(trt, f) for f in collection}))

    return Creator()


@functools.cache
def _plugin_class(trt: Any) -> Any:
    torch_of = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16}
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class LatentExpertsPlugin(*bases):  # type: ignore[misc]
        """TensorRT's side of a `Layer`: shapes, dtypes and buffers."""

        def __init__(self, layer: Layer) -> None:
            for base in bases:
                base.__init__(self)
            self.layer = layer
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = 1
            self.timing_cache_id = ""

        def get_capability_interface(self, kind: Any) -> Any:  # noqa: ARG002
            return self

        def clone(self) -> Any:
            return LatentExpertsPlugin(self.layer)

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:  # noqa: ARG002
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:  # noqa: ARG002
            tensor, hidden = tensors[position].desc, tensors[0].desc
            if tensor.format != trt.TensorFormat.LINEAR:
                return False
            if position < len(self.layer.tensors) and self.layer.tensors[position] == "indices":
                return bool(tensor.type == trt.DataType.INT64)
            return tensor.type in torch_of and tensor.type == hidden.type

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Nothing depends on the profile but the workspace."""

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:  # noqa: ARG002
            shapes = [tuple(tensor.max) for tensor in inputs]
            return self.layer.workspace_bytes(shapes, torch_of[inputs[0].desc.type])

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one; the kernels' own tuner chooses among theirs."""

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Shapes are read at every call."""

        def attach_to_context(self, context: Any) -> Any:  # noqa: ARG002
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return _collection(trt, to_fields(self.layer))

        def enqueue(
            self, inputs: Sequence[Any], outputs: Sequence[Any], pointers: Sequence[int],  # noqa: ARG002
            results: Sequence[int], workspace: int, stream: int,
        ) -> None:  # fmt: skip
            device = where()
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)) if device.type == "cuda" else nullcontext():
                shapes = [tuple(tensor.dims) for tensor in inputs]
                self.layer.run(shapes, torch_of[inputs[0].type], pointers, results[0], workspace, device)

    return LatentExpertsPlugin


def where() -> torch.device:
    """The device that TensorRT's buffers are on: the current one."""
    return torch.device("cuda", torch.cuda.current_device())


def _collection(trt: Any, values: Mapping[str, Any]) -> Any:
    """Values as TensorRT's fields: text as characters, whole numbers as int32, others as fp32."""
    return trt.PluginFieldCollection([field for field, _ in _held_fields(trt, tuple(values.items()))])


@functools.cache
def _held_fields(trt: Any, items: tuple[tuple[str, Any], ...]) -> list[tuple[Any, np.ndarray[Any, Any]]]:
    """Each field with its data, which the field only points to; the cache keeps both alive."""
    kinds = {str: trt.PluginFieldType.CHAR, int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
    held = []
    for name, value in items:
        if isinstance(value, str):
            data = np.frombuffer(value.encode(), dtype=np.int8)
        else:
            data = np.array([value], dtype=np.int32 if isinstance(value, int) else np.float32)
        held.append((trt.PluginField(name, data, kinds[type(value)]), data))
    return held


def _value(trt: Any, field: Any) -> Any:
    data = np.asarray(field.data)
    if field.type == trt.PluginFieldType.CHAR:
        return data.tobytes().rstrip(b"\0").decode()
    return data.reshape(-1)[0].item()
