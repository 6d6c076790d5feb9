"""The expert non-linearities a spec can name, as plain functions of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


#: name -> elementwise function. `silu` is special: its slope comes from `Activation.alpha`.
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
        "relu": F.relu,
        "relu_squared": _relu_squared,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "selu": F.selu,
        "mish": F.mish,
        "softplus": F.softplus,
        "hardswish": F.hardswish,
        "relu6": F.relu6,
        "identity": _identity,
    }
)


@dataclass(frozen=True)
class Activation:
    """How an expert turns its pre-activations into hidden activations.

    Gated (the expert has a gate):   h = f(clamp(gate)) * (clamp(up) + up_offset)
    Ungated (it has none):           h = f(clamp(up)), the clamp being the gate's

    with f(z) = z * sigmoid(alpha * z) for "silu", else `FUNCTIONS[name](z)`. A bound of None does not clamp.
    """

    name: str = "silu"
    alpha: float = 1.0
    gate_min: float | None = None
    gate_max: float | None = None
    up_min: float | None = None
    up_max: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in FUNCTIONS:
            raise ValueError(f"unknown activation {self.name!r}: expected one of {', '.join(FUNCTIONS)}")

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Hidden activations [..., m] from pre-activations gate and up [..., m]; gate is None when ungated."""
        inner = up if gate is None else gate
        if self.gate_min is not None or self.gate_max is not None:
            inner = inner.clamp(self.gate_min, self.gate_max)
        if self.name == "silu" and self.alpha != 1.0:
            active = inner * torch.sigmoid(self.alpha * inner)
        else:
            active = FUNCTIONS[self.name](inner)
        if gate is None:
            return active
        if self.up_min is not None or self.up_max is not None:
            up = up.clamp(self.up_min, self.up_max)
        return active * (up + self.up_offset if self.up_offset else up)

    def describe(self, gated: bool) -> str:
        """The activation in words, e.g. "silu GLU, gate ≤ 7, |up| ≤ 7, up + 1"."""
        words = [f"{self.name} GLU" if gated else self.name]
        words += [f"{f.name} {getattr(self, f.name):g}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join(words)
