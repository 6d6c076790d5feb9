"""Growing ONNX graphs node by node: a thin builder, and the expert activations in standard operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from latentize.activations import Activation

if TYPE_CHECKING:
    import onnx

DOUBLE = 11  # onnx.TensorProto.DOUBLE, so that its users need not import onnx
#: First opset with every operator the bodies use (Gelu came last).
MIN_OPSET = 20
#: Last opset these bodies were checked with.
MAX_OPSET = 23


class Nodes:
    """A growing list of nodes. Every method appends one and returns the name of its output."""

    def __init__(self, dtype: int, counter: Iterator[int] | None = None) -> None:
        """`dtype` is the onnx.TensorProto element type of floating-point constants and of branches' outputs."""
        self.dtype = dtype
        self.list: list[onnx.NodeProto] = []
        self._counter = counter if counter is not None else itertools.count()

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Append a node with several outputs."""
        from onnx import helper

        names = [self.fresh(op_type.lower()) for _ in range(outputs)]
        self.list.append(helper.make_node(op_type, list(inputs), names, domain=domain, **attributes))
        return names

    def fresh(self, stem: str) -> str:
        """A name that no other value of the function has."""
        return f"{stem}_{next(self._counter)}"

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def scalar(self, value: float) -> str:
        """A constant of the builder's floating-point type."""
        from onnx import helper

        return self._constant(helper.make_tensor(self.fresh("scalar"), self.dtype, [], [value]))

    def constant(self, value: npt.NDArray[Any]) -> str:
        """A constant with the array's own type."""
        from onnx import numpy_helper

        return self._constant(numpy_helper.from_array(value, self.fresh("value")))

    def _constant(self, tensor: onnx.TensorProto) -> str:
        return self.op("Constant", value=tensor)

    def reshape(self, value: str, *shape: int) -> str:
        """`value` with another shape, -1 as in numpy."""
        return self.op("Reshape", value, self.ints(*shape))

    def transposed(self, value: str) -> str:
        """The stack of matrices `value` [n, a, b] as [n, b, a]."""
        return self.op("Transpose", value, perm=[0, 2, 1])

    def rows(self, value: str) -> str:
        """The first dimension of `value`, an int64 vector of one element."""
        return self.op("Shape", value, start=0, end=1)

    def if_(self, condition: str, then: Callable[[Nodes], str], otherwise: Callable[[Nodes], str]) -> str:
        """One of two branches; each gets a builder and returns the name of its result."""
        branches = {"then_branch": self._branch("then", then), "else_branch": self._branch("else", otherwise)}
        return self.op("If", condition, **branches)

    def _branch(self, name: str, build: Callable[[Nodes], str]) -> onnx.GraphProto:
        from onnx import helper

        inner = Nodes(self.dtype, self._counter)
        result = build(inner)
        return helper.make_graph(inner.list, self.fresh(name), [], [_value(result, self.dtype)])

    def loop(self, trips: str, initial: str, step: Callable[[Nodes, str, str], str]) -> str:
        """`initial` passed `trips` times through step(builder, iteration, carried) -> carried."""
        from onnx import TensorProto, helper

        inner = Nodes(self.dtype, self._counter)
        iteration, condition, carried = inner.fresh("iteration"), inner.fresh("condition"), inner.fresh("carried")
        result = step(inner, iteration, carried)
        inputs = [
            helper.make_tensor_value_info(iteration, TensorProto.INT64, []),
            helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
            _value(carried, self.dtype),
        ]
        go_on = inner.op("Identity", condition)
        outputs = [helper.make_tensor_value_info(go_on, TensorProto.BOOL, []), _value(result, self.dtype)]
        body = helper.make_graph(inner.list, self.fresh("body"), inputs, outputs)
        return self.op("Loop", trips, "", initial, body=body)


def _value(name: str, dtype: int) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, dtype, None)


def activate(nodes: Nodes, activation: Activation, gate: str | None, up: str) -> str:
    """Hidden activations from pre-activations, as `Activation.__call__` defines them."""
    a = activation
    inner = _clip(nodes, up if gate is None else gate, a.gate_min, a.gate_max)
    if a.name == "silu":
        slope = inner if a.alpha == 1.0 else nodes.op("Mul", inner, nodes.scalar(a.alpha))
        active = nodes.op("Mul", inner, nodes.op("Sigmoid", slope))
    else:
        active = _FUNCTIONS[a.name](nodes, inner)
    if gate is None:
        return active
    up = _clip(nodes, up, a.up_min, a.up_max)
    if a.up_offset:
        up = nodes.op("Add", up, nodes.scalar(a.up_offset))
    return nodes.op("Mul", active, up)


def _clip(nodes: Nodes, value: str, low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return value
    bounds = ["" if bound is None else nodes.scalar(bound) for bound in (low, high)]
    return nodes.op("Clip", value, *(bounds if bounds[1] else bounds[:1]))


def _single(op_type: str, **attributes: Any) -> Callable[[Nodes, str], str]:
    return lambda nodes, value: nodes.op(op_type, value, **attributes)


def _relu_squared(nodes: Nodes, value: str) -> str:
    positive = nodes.op("Relu", value)
    return nodes.op("Mul", positive, positive)


_FUNCTIONS: Mapping[str, Callable[[Nodes, str], str]] = MappingProxyType(
    {
        "gelu": _single("Gelu"),
        "gelu_tanh": _single("Gelu", approximate="tanh"),
        "relu": _single("Relu"),
        "relu_squared": _relu_squared,
        "sigmoid": _single("Sigmoid"),
        "tanh": _single("Tanh"),
        "leaky_relu": _single("LeakyRelu", alpha=0.01),
        "elu": _single("Elu"),
        "selu": _single("Selu"),
        "mish": _single("Mish"),
        "softplus": _single("Softplus"),
        "hardswish": _single("HardSwish"),
        "relu6": lambda nodes, value: _clip(nodes, value, 0.0, 6.0),
        "identity": _single("Identity"),
    }
)
