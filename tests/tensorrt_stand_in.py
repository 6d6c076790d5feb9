"""As much of the full TensorRT's `tensorrt.plugin` as our plugins touch, with its rules about signatures enforced.

Written after the library's documentation and public Python sources, which cannot be installed without its binaries.
Shapes are plain numbers here: what the library computes symbolically is computed at once.
"""

from __future__ import annotations

import enum
import inspect
import typing
from dataclasses import dataclass, field
from types import UnionType


class DataType(enum.Enum):
    FLOAT = "FP32"
    HALF = "FP16"
    BF16 = "BF16"
    INT64 = "INT64"
    INT32 = "INT32"


class ShapeExpr:
    """A number that supports what the library's symbolic expressions do, and nothing more: no comparison, no int()."""

    def __init__(self, value):
        self._value = value._value if isinstance(value, ShapeExpr) else value

    def __add__(self, other):
        return ShapeExpr(self._value + ShapeExpr(other)._value)

    def __mul__(self, other):
        return ShapeExpr(self._value * ShapeExpr(other)._value)


def number(value):
    return ShapeExpr(value)._value


def cdiv(first, second):
    assert isinstance(first, ShapeExpr) or isinstance(second, ShapeExpr)
    return ShapeExpr(-(-number(first) // number(second)))


def minimum(first, second):
    assert isinstance(first, ShapeExpr) or isinstance(second, ShapeExpr)
    return ShapeExpr(min(number(first), number(second)))


@dataclass
class TensorDesc:
    shape_expr: tuple
    dtype: DataType


def from_shape_expr(shape, dtype):
    assert isinstance(shape, tuple)
    return TensorDesc(tuple(ShapeExpr(size) for size in shape), dtype)


class SymInt32(ShapeExpr):
    pass


class SymIntExprs(list):
    def __init__(self, length):
        super().__init__([None] * length)


class KernelLaunchParams:
    _FIELDS = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self):
        for name in self._FIELDS:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name, value):
        assert name in self._FIELDS
        object.__setattr__(self, name, number(value))


@dataclass
class AutoTuneCombination:
    kinds: str
    layout: str
    tactics: list


@dataclass
class Definition:
    describe: typing.Any
    inputs: list
    outputs: int
    autotune: typing.Any = None
    aot_impl: typing.Any = None


@dataclass
class Plugin:
    """The module `tensorrt.plugin`: what was registered is in `known`."""

    known: dict = field(default_factory=dict)
    TensorDesc = TensorDesc
    AutoTuneCombination = AutoTuneCombination
    KernelLaunchParams = KernelLaunchParams
    SymIntExprs = SymIntExprs
    SymInt32 = SymInt32
    from_shape_expr = staticmethod(from_shape_expr)
    cdiv = staticmethod(cdiv)
    min = staticmethod(minimum)

    def register(self, name):
        namespace, _, short = name.partition("::")
        assert namespace not in ("", "trt", "tensorrt", "std")
        assert short
        assert "." not in name
        assert name not in self.known

        def decorate(function):
            signature = inspect.signature(function)
            for parameter in signature.parameters.values():
                assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
                assert parameter.default is inspect.Parameter.empty
                assert issubclass(parameter.annotation, TensorDesc)
            returned = signature.return_annotation
            several = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
            assert all(issubclass(each, TensorDesc) for each in several)
            self.known[name] = Definition(function, list(signature.parameters), len(several))
            return function

        return decorate

    def autotune(self, name):
        def decorate(function):
            signature = inspect.signature(function)
            assert list(signature.parameters) == [*self.known[name].inputs, "outputs"]
            assert typing.get_origin(signature.return_annotation) is list
            self.known[name].autotune = function
            return function

        return decorate

    def aot_impl(self, name):
        def decorate(function):
            signature = inspect.signature(function)
            assert list(signature.parameters) == [*self.known[name].inputs, "outputs", "tactic"]
            assert typing.get_origin(signature.parameters["outputs"].annotation) is tuple
            assert signature.parameters["tactic"].annotation is int
            symbol, code, launch, counts = typing.get_args(signature.return_annotation)
            for each in (symbol, code):
                assert isinstance(each, UnionType)
                assert set(typing.get_args(each)) == {str, bytes}
            assert issubclass(launch, KernelLaunchParams)
            assert issubclass(counts, SymIntExprs)
            self.known[name].aot_impl = function
            return function

        return decorate


@dataclass
class Trt:
    """The module `tensorrt`."""

    DataType = DataType
