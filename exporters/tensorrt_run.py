"""Engines run on a GPU, on PyTorch's tensors: for comparisons and timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentize.errors import LatentizeError
from latentize.exporters import tensorrt_library
from latentize.inputs import Inputs

#: Largest relative error between an engine and its model by the model's dtype: fp32 products are tf32 on a GPU.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: Bytes that an engine begins with: four letters, and where tensorrt-rtx wrote it, at 16 its size and at 24 the
#: library's version.
_HEAD = 28


class EngineSession:
    """An engine ready to run, with its plugin registered.

    Args:
        path: the file.
        module: the library that built it, a key of `tensorrt_library.LIBRARIES`; by default the one that is installed.

    Raises:
        LatentizeError: there is no CUDA device, or the file is no engine that this library and device can run.
    """

    def __init__(self, path: Path, module: str | None = None) -> None:
        if not path.is_file():
            raise LatentizeError(f"{path}: no such file; build it with latentize build")
        check_file(path)
        require_device(path)
        library = module or tensorrt_library.find("running engines")
        tensorrt_library.require_capability(library, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
        trt = tensorrt_library.load(library)
        from latentize.exporters.tensorrt_plugin import register

        register(trt)
        self._path = path
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise LatentizeError(
                f"{path}: {trt.__name__} {trt.__version__} cannot load it on {torch.cuda.get_device_name()}: it was "
                f"built {built_by(path)}for another device or by another version, or is damaged; build it again with "
                "latentize build"
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == inputs]
        self._outputs = [name for name in names if name not in self._inputs]
        self._kinds = {
            trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64, trt.DataType.INT32: torch.int32, trt.DataType.BOOL: torch.bool,
        }  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first output that holds floats."""
        kinds = [self._dtype(name) for name in self._outputs]
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    @property
    def device_bytes(self) -> int:
        """Device memory that one execution needs beside the weights."""
        size = getattr(self._engine, "device_memory_size_v2", None)
        return int(size if size is not None else self._engine.device_memory_size)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Outputs for a call's arguments, on the CPU, in the engine's order.

        Raises:
            LatentizeError: the shapes lie outside the engine's profiles, or it cannot run.
        """
        tensors = inputs.tensors()
        if len(tensors) != len(self._inputs):
            raise LatentizeError(f"{self._path}: reads {len(self._inputs)} tensors, the inputs hold {len(tensors)}")
        held = [
            tensor.detach().to("cuda", self._dtype(name)).contiguous()
            for name, tensor in zip(self._inputs, tensors, strict=True)
        ]
        stream = torch.cuda.current_stream()
        self._choose_profile(held, stream)
        for name, tensor in zip(self._inputs, held, strict=True):
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = [self._output(name) for name in self._outputs]
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise LatentizeError(f"{self._path}: the engine did not run; its messages are above")
        stream.synchronize()
        return [output.cpu() for output in outputs]

    def _choose_profile(self, tensors: list[Tensor], stream: Any) -> None:
        """The first profile that has room for the shapes."""
        for number in range(self._engine.num_optimization_profiles):
            ranges = [self._engine.get_tensor_profile_shape(name, number) for name in self._inputs]
            if all(_within(t.shape, low, high) for t, (low, _, high) in zip(tensors, ranges, strict=True)):
                self._context.set_optimization_profile_async(number, stream.cuda_stream)
                return
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise LatentizeError(f"{self._path}: no profile of the engine has room for {shapes}; build it with --profile")

    def _output(self, name: str) -> Tensor:
        output = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda")
        self._context.set_tensor_address(name, output.data_ptr())
        return output

    def _dtype(self, name: str) -> torch.dtype:
        return self._kinds[self._engine.get_tensor_dtype(name)]


def check_file(path: Path) -> None:
    """Refuse what is no engine, or is cut short, without a GPU.

    Raises:
        LatentizeError: saying which.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    size = path.stat().st_size
    if head[1:4] != b"trt":
        raise LatentizeError(f"{path}: is no TensorRT engine; build it with latentize build")
    named = int.from_bytes(head[16:24], "little") if head[:4] == b"vtrt" and len(head) == _HEAD else size
    if named != size or len(head) < _HEAD:
        raise LatentizeError(
            f"{path}: the engine is cut short or damaged: {size} bytes where it names {named}; build it again"
        )


def built_by(path: Path) -> str:
    """The library that an engine says it was built by, e.g. "by tensorrt-rtx 1.7.1.116, "; "" where it says nothing."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head[:4] != b"vtrt" or len(head) < _HEAD:
        return ""
    return f"by tensorrt-rtx {'.'.join(map(str, head[24:_HEAD]))}, "


def require_device(what: object) -> None:
    """Check that a CUDA device is here.

    Raises:
        LatentizeError: there is none.
    """
    if not torch.cuda.is_available():
        raise LatentizeError(f"{what}: running an engine needs an NVIDIA GPU and its driver, and there is none here")


def _within(shape: Any, low: Any, high: Any) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
