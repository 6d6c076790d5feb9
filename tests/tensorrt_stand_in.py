"""As much of the full TensorRT as our plugins and our worker touch, with its rules about signatures enforced.

Written after the library's documentation and public Python sources, which cannot be installed without its binaries.
Shapes are plain numbers here: what the library computes symbolically is computed at once.
"""

from __future__ import annotations

import enum
import inspect
import json
import types
import typing
from dataclasses import dataclass, field
from types import UnionType


class DataType(enum.Enum):
    FLOAT = "FP32"
    HALF = "FP16"
    BF16 = "BF16"
    INT64 = "INT64"
    INT32 = "INT32"
    BOOL = "BOOL"


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


class TimingCache:
    """Tactics measured on a device; a serialised one begins with that device's name."""

    def __init__(self, device, tactics):
        self.device, self.tactics = device, tactics

    def serialize(self):
        return memoryview(json.dumps([self.device, sorted(self.tactics)]).encode())


class BuilderConfig:
    """Takes a cache of this device only, as the library does when it is told not to ignore a mismatch."""

    def __init__(self, device):
        self._device, self._cache = device, None
        self.profiles = []

    def create_timing_cache(self, serialized):
        assert isinstance(serialized, bytes)
        if not serialized:
            return TimingCache(self._device, set())
        try:
            device, tactics = json.loads(serialized)
        except ValueError:
            return None
        return TimingCache(device, set(tactics))

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.device != self._device:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Profile(dict):
    """An optimisation profile: smallest, usual and largest shape by input."""

    def set_shape(self, name, *shapes):
        self[name] = shapes


class Builder:
    """Times every tactic that its cache has not; `timed` has what each build timed, the latest last."""

    timed: typing.ClassVar[list] = []
    device = "a GPU"

    def __init__(self, logger):
        pass

    def create_network(self, flags):
        return Network()

    def create_builder_config(self):
        return BuilderConfig(self.device)

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        wanted = {"gemm", "softmax"}
        Builder.timed.append(sorted(wanted - config.get_timing_cache().tactics))
        config.get_timing_cache().tactics.update(wanted)
        config.progress_monitor.phase_start("Building", None, 1)
        config.progress_monitor.step_complete("Building", 0)
        config.progress_monitor.phase_finish("Building")
        return b"ptrt engine"


class Network:
    """One input of ids, three layers."""

    num_inputs, num_layers = 1, 3

    def get_input(self, number):
        return types.SimpleNamespace(name="ids", dtype=DataType.INT64, shape=(-1, -1))

    def get_layer(self, number):
        kind = ("MATRIX_MULTIPLY", "MATRIX_MULTIPLY", "PLUGIN_V3")[number]
        return types.SimpleNamespace(type=types.SimpleNamespace(name=kind))


class Trt:
    """The module `tensorrt`."""

    __version__ = "10.9.0"
    DataType = DataType
    Builder = Builder
    NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    IProgressMonitor = object

    class Logger:
        ERROR = 1

        def __init__(self, level):
            pass

    class OnnxParser:
        def __init__(self, network, logger):
            pass

        def parse_from_file(self, path):
            return True

    class LayerInformationFormat:
        JSON = "json"

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, engine):
            return self

        def create_engine_inspector(self):
            return self

        def get_engine_information(self, form):
            return json.dumps({"Layers": ["gemm + softmax", {"Name": "experts"}]})
