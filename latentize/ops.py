"""`torch.ops.latentize.latent_experts`: the routed experts at latent width, as one operator.

One node in a traced graph, whatever the number of experts, so that export, compilation and engines see the block whole.
The mathematics is `latentize.reference.experts_forward` without projections; the strategies below only order the work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentize.activations import Activation

#: Up to this many selected (token, expert) pairs, each pair's matrices are read on their own; above it, pairs are sorted.
GATHER_PAIRS = 8


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
    """Combined output [T, l] of the selected experts, in plain differentiable torch.

    Args:
        hidden: [T, l] tokens at the experts' width.
        indices: [T, k] int64 selected experts; an index >= N contributes nothing.
        weights: [T, k] routing weights.
        gate, up: [N, m, l]; down: [N, l, m]; gate_bias, up_bias: [N, m]; down_bias: [N, l].
        activation: the non-linearity.
        weights_on_input: whether a weight multiplies its expert's input instead of its output.
    """
    tokens, k = indices.shape
    order = indices.reshape(-1).argsort(stable=True)
    counts = torch.bincount(indices.reshape(-1), minlength=up.shape[0])[: up.shape[0]].tolist()
    token = order.div(k, rounding_mode="floor")
    pair_weights = weights.reshape(-1)[order].unsqueeze(-1).to(hidden.dtype)
    rows = hidden[token]
    if weights_on_input:
        rows = rows * pair_weights
    outputs = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            x = rows[start : start + count]
            g = None if gate is None else F.linear(x, gate[expert], None if gate_bias is None else gate_bias[expert])
            u = F.linear(x, up[expert], None if up_bias is None else up_bias[expert])
            h = activation(g, u)
            outputs.append(F.linear(h, down[expert], None if down_bias is None else down_bias[expert]))
        start += count
    combined = hidden.new_zeros(hidden.shape)
    if not outputs:
        return combined
    routed = torch.cat(outputs)
    if not weights_on_input:
        routed = routed * pair_weights[: len(routed)]
    return combined.index_add(0, token[: len(routed)], routed)


@torch.library.custom_op("latentize::latent_experts", mutates_args=())
def latent_experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    gate_min: float | None,
    gate_max: float | None,
    up_min: float | None,
    up_max: float | None,
    up_offset: float,
    weights_on_input: bool,
) -> Tensor:
    """Combined output [T, l] of the selected experts; arguments as in `compute`, the activation spelled out."""
    function = Activation(activation, alpha, gate_min, gate_max, up_min, up_max, up_offset)
    return compute(
        hidden, indices, weights, gate, up, down, gate_bias, up_bias, down_bias, function, weights_on_input
    )


@latent_experts.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)
