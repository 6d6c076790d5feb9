"""The routed experts on CPU by `kernels_native.cpp`, compiled once per machine at its first use and kept in a cache.

Where no compiler is found, or `LATENTIZE_NATIVE=0` is set, `load` gives None and the plain torch kernels serve instead.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentize.activations import FUNCTIONS, Activation
from latentize.kernels_torch import Experts, Gradients
from latentize.native_build import Sources, compiled

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_SOURCE = Path(__file__).with_name("kernels_native.cpp")
#: From the widest to the plainest; the first that compiles is taken.
_VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
#: The numbers that the kernel knows activations by.
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_FORWARD = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BACKWARD = {torch.float32: "float32", torch.float64: "float64"}
_NUMBERS = ctypes.c_int64 * 7
_SCALARS = ctypes.c_double * 6


@dataclass(frozen=True)
class Library:
    """The compiled kernels by dtype."""

    forward: dict[torch.dtype, Callable[..., int]]
    block: dict[torch.dtype, Callable[..., int]]
    backward: dict[torch.dtype, Callable[..., int]]


def load() -> Library | None:
    """The compiled kernels, or None where they cannot be had. The first call may compile; safe to call from threads."""
    with _lock:
        return _load()


def block_of(dtype: torch.dtype) -> Callable[..., int] | None:
    """The kernel of a whole block (`latentize.block_native`) for a dtype; None where there is none."""
    library = load() if dtype in _FORWARD else None
    return None if library is None else library.block[dtype]


def serves(hidden: Tensor, experts: Experts) -> bool:
    """Whether the compiled forward can take these tensors as they are: on CPU, experts contiguous, kernels at hand."""
    return hidden.device.type == "cpu" and hidden.dtype in _FORWARD and _contiguous(experts) and load() is not None


def serves_backward(hidden: Tensor, experts: Experts) -> bool:
    """As `serves`, for the backward: fp32 and fp64 only."""
    return hidden.dtype in _BACKWARD and serves(hidden, experts)


def pays(indices: Tensor, experts: Experts) -> bool:
    """Whether the compiled forward is the faster one.

    It is, as measured (benchmarks/runtime.py), but for wide bf16 experts with many tokens each where the processor
    multiplies bf16 tiles: the kernel computes in fp32.
    """
    n, m, width = experts.up.shape
    wide_and_many = min(m, width) >= 256 and indices.numel() >= 24 * n
    return not (experts.up.dtype == torch.bfloat16 and wide_and_many and _has_bf16_tiles())


@functools.cache
def _has_bf16_tiles() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def forward(
    hidden: Tensor, indices: Tensor, weights: Tensor, experts: Experts, activation: Activation, weights_on_input: bool
) -> Tensor:
    """Combined output [T, l] of the selected experts on hidden [T, l]; indices and weights are [T, k].

    Raises:
        ValueError: an index is negative.
    """
    library = load()
    assert library is not None
    out = hidden.new_empty(hidden.shape)
    sizes, scalars = _describe(indices, experts, activation, weights_on_input)
    tensors = _held(hidden, indices, weights, experts)
    function = library.forward[hidden.dtype]
    raise_for(function(sizes, _pointers(tensors), scalars, out.data_ptr(), torch.get_num_threads()), indices)
    return out


def backward(
    grad: Tensor,
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    experts: Experts,
    activation: Activation,
    weights_on_input: bool,
    experts_grad: bool,
) -> Gradients:
    """Gradients from grad [T, l] of the combined output; `experts_grad` False leaves out those of the experts' tensors.

    Raises:
        ValueError: an index is negative.
    """
    library = load()
    assert library is not None
    like = (hidden, weights, *(experts if experts_grad else (None,) * 6))
    gradients = Gradients(*(hidden.new_empty(0 if t is None else t.shape) for t in like))
    sizes, scalars = _describe(indices, experts, activation, weights_on_input)
    tensors = (*_held(hidden, indices, weights, experts), grad.contiguous())
    outputs = _pointers([None if t is None else g for t, g in zip(like, gradients, strict=True)])
    function = library.backward[hidden.dtype]
    raise_for(function(sizes, _pointers(tensors), scalars, outputs, torch.get_num_threads()), indices)
    return gradients


def _describe(
    indices: Tensor, experts: Experts, a: Activation, on_input: bool
) -> tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_double]]:
    n, m, width = experts.up.shape
    sizes = _NUMBERS(*indices.shape, n, width, m, on_input, activation_number(a))
    return sizes, _SCALARS(*activation_scalars(a))


def activation_number(a: Activation) -> int:
    """The number that the kernels know an activation's function by."""
    return _ACTIVATION_NUMBERS[a.name]


def activation_scalars(a: Activation) -> tuple[float, ...]:
    """alpha, gate_min, gate_max, up_min, up_max, up_offset; absent bounds are infinite."""
    low, high = -math.inf, math.inf
    return (
        a.alpha,
        low if a.gate_min is None else a.gate_min,
        high if a.gate_max is None else a.gate_max,
        low if a.up_min is None else a.up_min,
        high if a.up_max is None else a.up_max,
        a.up_offset,
    )


def _held(hidden: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> tuple[Tensor | None, ...]:
    """The tensors as the kernel reads them; the caller keeps them alive over the call."""
    return (hidden.contiguous(), indices.contiguous(), weights.contiguous(), *experts)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _contiguous(experts: Experts) -> bool:
    return all(t is None or t.is_contiguous() for t in experts)


def raise_for(code: int, indices: Tensor) -> None:
    """Raise what a kernel's return code means for indices [T, k]; 0 is success."""
    if code == 1:
        raise ValueError(f"indices {list(indices.shape)}: expected expert numbers >= 0, found {int(indices.amin())}")
    if code:
        raise MemoryError(f"latent_experts: no memory for the pairs of indices {list(indices.shape)}")


@functools.cache
def _load() -> Library | None:
    if os.environ.get("LATENTIZE_NATIVE") == "0":
        return None
    try:
        return _bind(ctypes.CDLL(str(_compiled())))
    except (OSError, AttributeError) as error:
        _log.info("no compiled CPU kernels, plain torch is used: %s", error)
        return None


def _bind(library: ctypes.CDLL) -> Library:
    def bind(name: str, *arguments: type) -> Callable[..., int]:
        function = library[name]
        function.argtypes = arguments
        function.restype = ctypes.c_int
        return function

    call = (*(ctypes.c_void_p,) * 4, ctypes.c_int)
    block = (ctypes.c_int64, *(ctypes.c_void_p,) * 6, ctypes.c_int)
    return Library(
        {dtype: bind(f"latent_experts_{name}", *call) for dtype, name in _FORWARD.items()},
        {dtype: bind(f"latent_block_{name}", *block) for dtype, name in _FORWARD.items()},
        {dtype: bind(f"latent_experts_backward_{name}", *call) for dtype, name in _BACKWARD.items()},
    )


def _compiled() -> Path:
    """The shared library for this source, compiler and processor, compiled unless the cache holds it.

    Raises:
        OSError: no compiler was found, or none could compile it.
    """
    sources = Sources(_SOURCE, headers(), "the CPU kernels")
    return compiled(sources, _VARIANTS, "latent_experts", openmp=_openmp())


def headers() -> tuple[Path, ...]:
    """The kernels' headers."""
    return tuple(sorted(_SOURCE.parent.glob(f"{_SOURCE.stem}_*.h")))


def _openmp() -> Path | None:
    """The OpenMP runtime that torch brings, so that both use one pool of threads."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return found[0] if found else None
