"""Random calls of the routed experts' operator, and what the reference computes for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentize.activations import Activation
from latentize.kernels_torch import Experts
from latentize.reference import experts_forward
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

SILU = Activation("silu")
CLAMPED = {"alpha": 1.7, "gate_min": -0.9, "gate_max": 0.8, "up_min": -0.7, "up_max": 0.7, "up_offset": 1.0}


class Call(NamedTuple):
    """The tensors of one call."""

    hidden: Tensor
    indices: Tensor
    weights: Tensor
    experts: Experts


def call(
    tokens=5, experts=4, k=2, m=6, width=3, *, gated=True, biases=True, dtype=torch.float64, absent=1, seed=0
) -> Call:
    """Random arguments; `absent` expert numbers past the real ones may be selected."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    scores = torch.rand(tokens, experts + absent, generator=generator)
    return Call(
        normal(tokens, width),
        scores.argsort(1)[:, :k],
        normal(tokens, k),
        Experts(
            normal(experts, m, width) if gated else None,
            normal(experts, m, width),
            normal(experts, width, m),
            normal(experts, m) if gated and biases else None,
            normal(experts, m) if biases else None,
            normal(experts, width) if biases else None,
        ),
    )


def to(c: Call, dtype: torch.dtype) -> Call:
    """The call with its floating tensors in another dtype."""
    experts = Experts(*(None if t is None else t.to(dtype) for t in c.experts))
    return Call(c.hidden.to(dtype), c.indices, c.weights.to(dtype), experts)


def reference(c: Call, activation: Activation = SILU, on_input: bool = False) -> Tensor:
    """What the call gives by definition, in its dtype."""
    e = c.experts
    router = RouterSpec(torch.empty(0), c.indices.shape[1], applies_to="input" if on_input else "output")
    experts = ExpertsSpec(e.up, e.down, e.gate, e.gate_bias, e.up_bias, e.down_bias, activation)
    return experts_forward(MoESpec(router, experts), c.hidden, Routing(c.weights, c.weights, c.indices))
