"""The routed experts in plain torch: (token, expert) pairs sorted by expert, one matrix product per expert hit.

Works on every device and dtype. The backward is written out: in an operator's implementation autograd is switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentize.activations import Activation

#: Bytes of intermediate values that are held at once, about; more tokens are computed in parts.
AT_ONCE = 32 << 20


class Experts(NamedTuple):
    """The tensors of N experts at width l: gate, up [N, m, l]; down [N, l, m]; biases [N, m], [N, m], [N, l]."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


class Gradients(NamedTuple):
    """Gradients of `backward`'s inputs; those of absent tensors, or not asked for, have no elements."""

    hidden: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor


@dataclass(frozen=True)
class Dispatch:
    """The P pairs of real experts, sorted by expert: positions `pairs` [P] in [T·k], `tokens` [P]; the hit experts."""

    pairs: Tensor
    tokens: Tensor
    hit: list[int]
    counts: list[int]

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> Dispatch:
        """The dispatch of indices [T, k]; an index >= num_experts takes part in nothing.

        Raises:
            ValueError: an index is negative.
        """
        flat = indices.reshape(-1)
        if flat.numel() and int(flat.amin()) < 0:
            raise ValueError(f"indices {list(indices.shape)}: expected expert numbers >= 0, found {int(flat.amin())}")
        short = flat.clamp_max(num_experts)
        counts = torch.bincount(short, minlength=num_experts + 1)[:num_experts].tolist()
        order = _stable_argsort(short)[: sum(counts)]
        hit = [expert for expert, count in enumerate(counts) if count]
        return cls(order, order.div(indices.shape[-1], rounding_mode="floor"), hit, [counts[e] for e in hit])

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The sorted pairs' rows [P, ...] as one view per hit expert."""
        return torch.split(rows, self.counts)


def _stable_argsort(keys: Tensor) -> Tensor:
    """Stable argsort of small non-negative integers; NumPy sorts 16-bit keys by radix, ten times faster."""
    if keys.device.type != "cpu" or not keys.numel() or int(keys.amax()) > torch.iinfo(torch.int16).max:
        return keys.argsort(stable=True)
    return torch.from_numpy(keys.to(torch.int16).numpy().argsort(kind="stable"))


def forward(
    hidden: Tensor, indices: Tensor, weights: Tensor, experts: Experts, activation: Activation, weights_on_input: bool
) -> Tensor:
    """Combined output [T, l] of the selected experts on hidden [T, l]; indices and weights are [T, k]."""
    tokens = _tokens_at_once(indices, experts)
    if len(indices) > tokens:
        out = hidden.new_empty(hidden.shape)
        for part, x, i, w in zip(*(t.split(tokens) for t in (out, hidden, indices, weights)), strict=True):
            part.copy_(forward(x, i, w, experts, activation, weights_on_input))
        return out
    dispatch = Dispatch.of(indices, len(experts.up))
    if not dispatch.hit:
        return hidden.new_zeros(hidden.shape)
    pair_weights = weights.reshape(-1).index_select(0, dispatch.pairs).unsqueeze(-1)
    y = _outputs(hidden, pair_weights if weights_on_input else None, experts, activation, dispatch)
    return _combine(y if weights_on_input else y.mul_(pair_weights), dispatch, indices)


def _tokens_at_once(indices: Tensor, experts: Experts) -> int:
    """Tokens whose intermediate values, a few rows of each width for every pair, take about `AT_ONCE` bytes."""
    _, m, latent = experts.up.shape
    pair = (2 * latent + 3 * m) * experts.up.element_size()
    return max(1, AT_ONCE // (pair * max(1, indices.shape[1])))


def _outputs(
    hidden: Tensor, input_weights: Tensor | None, experts: Experts, activation: Activation, dispatch: Dispatch
) -> Tensor:
    """Outputs [P, l] of the sorted pairs, before their weights; what led to them is freed on return."""
    x = hidden.index_select(0, dispatch.tokens)
    if input_weights is not None:
        x *= input_weights
    gate = None if experts.gate is None else _linear(x, experts.gate, experts.gate_bias, dispatch)
    up = _linear(x, experts.up, experts.up_bias, dispatch)
    del x
    activated = activation(gate, up)
    del gate, up
    return _linear(activated, experts.down, experts.down_bias, dispatch)


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
    """Gradients from grad [T, l] of the combined output; the pre-activations are computed again.

    `experts_grad` False leaves out the gradients of the experts' tensors.
    """
    at_once = _tokens_at_once(indices, experts)
    if len(indices) > at_once and not experts_grad:
        given = zip(*(t.split(at_once) for t in (grad, hidden, indices, weights)), strict=True)
        parts = [backward(g, x, i, w, experts, activation, weights_on_input, False) for g, x, i, w in given]
        of_tokens = (torch.cat([part.hidden for part in parts]), torch.cat([part.weights for part in parts]))
        return Gradients(*of_tokens, *parts[0][2:])
    dispatch = Dispatch.of(indices, len(experts.up))
    if not dispatch.hit:
        return _zero_gradients(hidden, weights, experts if experts_grad else None)
    inputs = hidden.index_select(0, dispatch.tokens)
    pair_weights = weights.reshape(-1).index_select(0, dispatch.pairs).unsqueeze(-1)
    x = inputs * pair_weights if weights_on_input else inputs
    gate = None if experts.gate is None else _linear(x, experts.gate, experts.gate_bias, dispatch)
    up = _linear(x, experts.up, experts.up_bias, dispatch)
    activated = activation(gate, up)
    grad_y = grad.index_select(0, dispatch.tokens)
    grad_activated = _transposed(grad_y, experts.down, dispatch)
    if not weights_on_input:
        grad_weight = torch.linalg.vecdot(grad_activated, activated)
        if experts.down_bias is not None:
            grad_weight += torch.linalg.vecdot(grad_y, _rows_of(experts.down_bias, dispatch))
        grad_activated = grad_activated * pair_weights
        grad_y = grad_y * pair_weights
    grad_gate, grad_up = activation.backward(gate, up, grad_activated)
    grad_x = _transposed(grad_up, experts.up, dispatch)
    if grad_gate is not None:
        assert experts.gate is not None
        grad_x += _transposed(grad_gate, experts.gate, dispatch)
    if weights_on_input:
        grad_weight = torch.linalg.vecdot(grad_x, inputs)
        grad_x = grad_x * pair_weights
    grad_weights = torch.zeros(weights.numel(), dtype=weights.dtype, device=weights.device)
    grad_weights[dispatch.pairs] = grad_weight
    absent = hidden.new_empty(0)
    if experts_grad:
        of_experts = (
            absent if grad_gate is None else _outer(grad_gate, x, experts.gate, dispatch),
            _outer(grad_up, x, experts.up, dispatch),
            _outer(grad_y, activated, experts.down, dispatch),
            absent if grad_gate is None else _sums(grad_gate, experts.gate_bias, dispatch),
            _sums(grad_up, experts.up_bias, dispatch),
            _sums(grad_y, experts.down_bias, dispatch),
        )
    else:
        of_experts = (absent.clone(),) * 6
    return Gradients(_combine(grad_x, dispatch, indices), grad_weights.view(weights.shape), *of_experts)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
    """x_e @ weight[e].T + bias[e] on the sorted pairs x [P, in]; weight [N, out, in]."""
    out = x.new_empty(len(x), weight.shape[1])
    for e, rows, result in zip(dispatch.hit, dispatch.split(x), dispatch.split(out), strict=True):
        if bias is None:
            torch.mm(rows, weight[e].t(), out=result)
        else:
            torch.addmm(bias[e], rows, weight[e].t(), out=result)
    return out


def _transposed(x: Tensor, weight: Tensor, dispatch: Dispatch) -> Tensor:
    """x_e @ weight[e] on the sorted pairs x [P, out]; weight [N, out, in]."""
    out = x.new_empty(len(x), weight.shape[2])
    for e, rows, result in zip(dispatch.hit, dispatch.split(x), dispatch.split(out), strict=True):
        torch.mm(rows, weight[e], out=result)
    return out


def _outer(grad: Tensor, x: Tensor, weight: Tensor | None, dispatch: Dispatch) -> Tensor:
    """grad_e.T @ x_e for each expert, in the shape of weight [N, out, in]; zero for experts that were not hit."""
    assert weight is not None
    out = _empty_unless_missed(weight, dispatch)
    for e, g, rows in zip(dispatch.hit, dispatch.split(grad), dispatch.split(x), strict=True):
        torch.mm(g.t(), rows, out=out[e])
    return out


def _sums(grad: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
    if bias is None:
        return grad.new_empty(0)
    out = _empty_unless_missed(bias, dispatch)
    for e, g in zip(dispatch.hit, dispatch.split(grad), strict=True):
        torch.sum(g, 0, out=out[e])
    return out


def _empty_unless_missed(like: Tensor, dispatch: Dispatch) -> Tensor:
    make = torch.empty if len(dispatch.hit) == len(like) else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


def _rows_of(bias: Tensor, dispatch: Dispatch) -> Tensor:
    hit = torch.tensor(dispatch.hit, device=bias.device)
    return bias.index_select(0, hit).repeat_interleave(torch.tensor(dispatch.counts, device=bias.device), 0)


def _combine(y: Tensor, dispatch: Dispatch, indices: Tensor) -> Tensor:
    """The sum over each token's pairs, always in the order of its slots."""
    tokens, k = indices.shape
    make = torch.empty if len(y) == tokens * k else torch.zeros
    slots = make(tokens * k, y.shape[1], dtype=y.dtype, device=y.device)
    return slots.index_copy_(0, dispatch.pairs, y).view(tokens, k, -1).sum(1)


def _zero_gradients(hidden: Tensor, weights: Tensor, experts: Experts | None) -> Gradients:
    of_experts = (None,) * 6 if experts is None else experts
    like = (hidden, weights, *of_experts)
    return Gradients(*(hidden.new_empty(0) if t is None else hidden.new_zeros(t.shape) for t in like))
