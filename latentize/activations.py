"""The expert non-linearities a spec can name, as plain functions of a tensor, with their derivatives."""

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


#: The constants of "selu" (Klambauer et al. 2017, Self-Normalizing Neural Networks).
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934

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


def _silu_slope_backward(grad: Tensor, x: Tensor, alpha: float) -> Tensor:
    gate = torch.sigmoid(alpha * x)
    return grad * gate * (1 + alpha * x * (1 - gate))


_aten = torch.ops.aten

#: name -> (gradient of the output, input) -> gradient of the input; at a kink the subgradient is autograd's.
DERIVATIVES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "silu": _aten.silu_backward,
        "gelu": _aten.gelu_backward,
        "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
        "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
        "relu_squared": lambda grad, x: grad * F.relu(x) * 2,
        "sigmoid": lambda grad, x: _aten.sigmoid_backward(grad, x.sigmoid()),
        "tanh": lambda grad, x: _aten.tanh_backward(grad, x.tanh()),
        "leaky_relu": lambda grad, x: _aten.leaky_relu_backward(grad, x, 0.01, False),
        "elu": lambda grad, x: _aten.elu_backward(grad, 1.0, 1.0, 1.0, False, x),
        "selu": lambda grad, x: _aten.elu_backward(grad, _SELU_ALPHA, _SELU_SCALE, 1.0, False, x),
        "mish": _aten.mish_backward,
        "softplus": lambda grad, x: _aten.softplus_backward(grad, x, 1.0, 20.0),
        "hardswish": _aten.hardswish_backward,
        "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0.0, 6.0),
        "identity": lambda grad, x: grad,  # noqa: ARG005
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
        active = self._function(_clamp(up if gate is None else gate, self.gate_min, self.gate_max))
        return active if gate is None else active * self._linear_part(up)

    def backward(self, gate: Tensor | None, up: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of the pre-activations from the gradient of the hidden activations.

        Args:
            gate, up: [..., m] pre-activations as given to the call; gate is None when ungated.
            grad: [..., m] gradient of the hidden activations.

        Returns:
            (gradient of gate [..., m], or None when ungated; gradient of up [..., m]).
        """
        inner = _clamp(up if gate is None else gate, self.gate_min, self.gate_max)
        if gate is None:
            return None, _clamp_backward(self._derivative(grad, inner), up, self.gate_min, self.gate_max)
        grad_gate = self._derivative(grad * self._linear_part(up), inner)
        grad_up = grad * self._function(inner)
        return (
            _clamp_backward(grad_gate, gate, self.gate_min, self.gate_max),
            _clamp_backward(grad_up, up, self.up_min, self.up_max),
        )

    def _function(self, inner: Tensor) -> Tensor:
        if self.name == "silu" and self.alpha != 1.0:
            return inner * torch.sigmoid(self.alpha * inner)
        return FUNCTIONS[self.name](inner)

    def _derivative(self, grad: Tensor, inner: Tensor) -> Tensor:
        if self.name == "silu" and self.alpha != 1.0:
            return _silu_slope_backward(grad, inner, self.alpha)
        return DERIVATIVES[self.name](grad, inner)

    def _linear_part(self, up: Tensor) -> Tensor:
        up = _clamp(up, self.up_min, self.up_max)
        return up + self.up_offset if self.up_offset else up

    def describe(self, gated: bool) -> str:
        """The activation in words, e.g. "silu GLU, gate ≤ 7, |up| ≤ 7, up + 1"."""
        words = [f"{self.name} GLU" if gated else self.name]
        words += [f"{f.name} {getattr(self, f.name):g}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join(words)


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x if low is None and high is None else x.clamp(low, high)


def _clamp_backward(grad: Tensor, x: Tensor, low: float | None, high: float | None) -> Tensor:
    if low is not None:
        grad = grad.masked_fill(x < low, 0)
    return grad if high is None else grad.masked_fill(x > high, 0)
