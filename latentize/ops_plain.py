"""What `latentize.ops` and `route_triton` compute, in plain PyTorch: for where latentize is not installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentize.activations import Activation
from latentize.reference import experts_forward
from latentize.routing import Routing, route
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec


def check_indices(indices: Tensor, count: int) -> None:
    """Nothing: the plain loop over experts never reads past them."""
    del indices, count


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias [T, N], in at least fp32, of hidden [T, d] and weight [N, d]."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def routed(logits: Tensor, router: RouterSpec) -> Routing:
    """Routing of logits [T, N] by the definition."""
    return route(logits, router)


def compute(
    hidden: Tensor, indices: Tensor, weights: Tensor, gate: Tensor | None, up: Tensor, down: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    activation: Activation, weights_on_input: bool,
) -> Tensor:  # fmt: skip
    """Combined output [T, l] of the selected experts; arguments as those of `latentize.ops.compute`."""
    experts = ExpertsSpec(up, down, gate, gate_bias, up_bias, down_bias, activation)
    applies_to = "input" if weights_on_input else "output"
    router = RouterSpec(torch.empty(0), indices.shape[-1], applies_to=applies_to)  # type: ignore[arg-type]
    return experts_forward(MoESpec(router, experts), hidden, Routing(weights, weights, indices))


class Kept:
    """Nothing, in place of what the compiled kernels keep of a module."""


def route_few(*_: object) -> Routing | None:
    """None: nothing was compiled here."""
    return None


def experts_few(*_: object) -> Tensor | None:
    """As `route_few`."""
    return None


def block_few(*_: object) -> Tensor | None:
    """As `route_few`."""
    return None
