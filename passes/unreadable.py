"""Weights that stand in the way of a proof: the plain reason behind a refusal that would otherwise name a symptom."""

from __future__ import annotations

from torch import Tensor, nn

from latentize.memory import all_finite

#: Bits below which a floating-point dtype only stores weights: no arithmetic is defined on it.
_ARITHMETIC_BITS = 16


def unreadable(module: nn.Module, path: str) -> str:
    """Which tensor of the module at a path cannot be computed with, and why; "" where all can."""
    prefix = f"{path}." if path else ""
    for name, tensor in module.state_dict(prefix=prefix, keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        shape = list(tensor.shape)
        if tensor.is_meta:
            return f"{name} {shape} is on the meta device; load its weights"
        kind = type(tensor.data)
        if kind is not Tensor:
            return f"{name} {shape} is a {kind.__name__}, a quantised or otherwise packed tensor; dequantise it first"
        if not tensor.is_floating_point():
            continue
        if tensor.element_size() * 8 < _ARITHMETIC_BITS:
            kind_name = str(tensor.dtype).removeprefix("torch.")
            return f"{name} {shape} is stored as {kind_name}; dequantise it first (model.to(torch.bfloat16))"
        if isinstance(tensor, nn.Parameter) and not all_finite(tensor):
            return f"{name} {shape} holds NaN or Inf; repair the weights"
    return ""
