"""`torch.ops.latentize.latent_experts`: the routed experts at latent width, as one operator.

One node in a traced graph, whatever the number of experts, so that export, compilation and engines see the block whole.
The mathematics is `latentize.reference.experts_forward` without projections; the `kernels_*` files only order the work:
`kernels_triton` on CUDA, `kernels_native` on CPU, `kernels_torch` where those do not serve, and for gradients on CUDA.
Environment: `LATENTIZE_TRITON=0`, `LATENTIZE_TUNE=0` and `LATENTIZE_NATIVE=0` switch off the Triton kernels, their
tuning, the compiled CPU kernels; `LATENTIZE_CACHE` is the folder that keeps what was compiled and measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from latentize import kernels_native, kernels_torch, kernels_triton
from latentize.activations import Activation
from latentize.kernels_torch import Experts

_checked: ContextVar[bool] = ContextVar("latentize_checked", default=False)
_plain: ContextVar[bool] = ContextVar("latentize_plain", default=False)

_TENSORS = (
    "Tensor hidden, Tensor indices, Tensor weights, Tensor? gate, Tensor up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias"
)
_SCALARS = (
    "str activation, float alpha, float? gate_min, float? gate_max, float? up_min, float? up_max, float up_offset, "
    "bool weights_on_input"
)
torch.library.define("latentize::latent_experts", f"({_TENSORS}, {_SCALARS}) -> Tensor")
torch.library.define(
    "latentize::latent_experts_backward",
    f"(Tensor grad, {_TENSORS}, {_SCALARS}, bool experts_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

#: The operator. Arguments as in `compute`, the activation spelled out as the fields of `Activation`.
latent_experts = torch.ops.latentize.latent_experts.default
_latent_experts_backward = torch.ops.latentize.latent_experts_backward.default


def compute(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    weights_on_input: bool,
) -> Tensor:
    """Combined output [T, l] of the selected experts, through the operator.

    Args:
        hidden: [T, l] tokens at the experts' width.
        indices: [T, k] int64 selected experts; an index >= N contributes nothing.
        weights: [T, k] routing weights, in the dtype of `hidden`.
        gate, up: [N, m, l]; down: [N, l, m]; gate_bias, up_bias: [N, m]; down_bias: [N, l].
        activation: the non-linearity.
        weights_on_input: whether a weight multiplies its expert's input instead of its output.

    Raises:
        ValueError: shapes or dtypes do not fit together, or an index is negative. On CUDA a negative index makes its
            token's output NaN instead: asking would stall the device.
    """
    a = activation
    combined: Tensor = latent_experts(
        hidden, indices, weights, gate, up, down, gate_bias, up_bias, down_bias,
        a.name, a.alpha, a.gate_min, a.gate_max, a.up_min, a.up_max, a.up_offset, weights_on_input,
    )  # fmt: skip
    return combined


@contextmanager
def plain() -> Iterator[None]:
    """Plain torch computes inside: what is small and done once need not wait for a compiler."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether this is within `plain`."""
    return _plain.get()


@contextmanager
def checked() -> Iterator[None]:
    """Within it, `LatentExperts` refuses expert numbers that name no expert, identity experts included.

    Elsewhere an index past the experts contributes nothing; a negative one is refused everywhere on CPU.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def check_indices(indices: Tensor, limit: int) -> None:
    """Within `checked`, refuse indices outside [0, limit).

    Raises:
        ValueError: names the smallest and the largest index.
    """
    if torch.compiler.is_compiling() or not _checked.get() or not indices.numel():
        return
    low, high = int(indices.amin()), int(indices.amax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"indices {list(indices.shape)}: expected expert numbers in [0, {limit}), found {low} … {high}"
        )


def _check(hidden: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        ValueError: names the argument, what was expected and what was found.
    """
    if experts.up.dim() != 3 or hidden.dim() != 2 or indices.dim() != 2:
        found = f"hidden {list(hidden.shape)}, indices {list(indices.shape)}, up {list(experts.up.shape)}"
        raise ValueError(f"latent_experts: expected hidden [T, l], indices [T, k] and up [N, m, l], found {found}")
    n, m, latent = experts.up.shape
    expected = {
        "hidden": (hidden, (hidden.shape[0], latent)),
        "indices": (indices, (hidden.shape[0], indices.shape[1])),
        "weights": (weights, indices.shape),
        "gate": (experts.gate, (n, m, latent)),
        "down": (experts.down, (n, latent, m)),
        "gate_bias": (experts.gate_bias, (n, m)),
        "up_bias": (experts.up_bias, (n, m)),
        "down_bias": (experts.down_bias, (n, latent)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"latent_experts: {name} expected shape {list(shape)}, found {list(tensor.shape)}")
        dtype = torch.int64 if name == "indices" else experts.up.dtype
        if tensor.dtype != dtype:
            raise ValueError(f"latent_experts: {name} expected {dtype} (as up), found {tensor.dtype}")


@torch.library.impl("latentize::latent_experts", "CompositeExplicitAutograd")
def _forward(hidden: Tensor, indices: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    experts, activation, weights_on_input = Experts(*rest[:6]), Activation(*rest[6:13]), rest[13]
    _check(hidden, indices, weights, experts)
    arguments = (hidden, indices, weights, experts, activation, weights_on_input)
    if _plain.get():
        return kernels_torch.forward(*arguments)
    if kernels_triton.serves(hidden, experts):
        return kernels_triton.forward(*arguments)
    native = kernels_native.serves(hidden, experts) and kernels_native.pays(indices, experts)
    combined: Tensor = (kernels_native if native else kernels_torch).forward(*arguments)
    return combined


@torch.library.impl("latentize::latent_experts_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, hidden: Tensor, indices: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    experts, activation, weights_on_input, experts_grad = Experts(*rest[:6]), Activation(*rest[6:13]), *rest[13:]
    kernels = kernels_native if kernels_native.serves_backward(hidden, experts) else kernels_torch
    return tuple(kernels.backward(grad, hidden, indices, weights, experts, activation, weights_on_input, experts_grad))


@torch.library.register_fake("latentize::latent_experts")  # type: ignore[untyped-decorator]
def _(hidden: Tensor, indices: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    _check(hidden, indices, weights, Experts(*rest[:6]))
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.register_fake("latentize::latent_experts_backward")  # type: ignore[untyped-decorator]
def _(grad: Tensor, hidden: Tensor, indices: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    shapes = [hidden, weights, *(rest[:6] if rest[-1] else (None,) * 6)]
    return tuple(
        hidden.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in shapes
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:9])
    ctx.scalars = inputs[9:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    experts_grad = any(ctx.needs_input_grad[3:9])
    hidden, weights, *of_experts = _latent_experts_backward(grad, *saved, *ctx.scalars, experts_grad)
    gradients = [g if needed else None for g, needed in zip(of_experts, ctx.needs_input_grad[3:9], strict=True)]
    return (hidden, None, weights, *gradients, *(None,) * len(ctx.scalars))


torch.library.register_autograd("latentize::latent_experts", _differentiate, setup_context=_save)
