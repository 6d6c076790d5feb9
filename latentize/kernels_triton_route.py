"""The routing function as one Triton kernel: scores, top-k, weights. Imported only where Triton is installed.

It mirrors `latentize.routing.route`, which stays the definition, for routers without groups and p-norms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentize.kernels_triton_math import log1p_exp, tanh


@triton.jit
def scored(z, inside, most, total, SCORE: tl.constexpr):
    """Scores of logits z: a softmax with its largest logit and its sum of exponentials given, or each alone."""
    if SCORE == "softmax":
        out = tl.exp(z - most) / total
    elif SCORE == "sigmoid":
        out = tl.sigmoid(z)
    else:
        tl.static_assert(SCORE == "sqrt_softplus")
        out = tl.sqrt(tl.where(z > 20.0, z, log1p_exp(tl.where(z > 20.0, 20.0, z))))
    return tl.where(inside, out, 0.0)


@triton.jit
def softmax_of(z, inside):
    """(largest logit, sum of exponentials) over those inside."""
    most = tl.max(tl.where(inside, z, float("-inf")), 0)
    return most, tl.sum(tl.where(inside, tl.exp(z - most), 0.0), 0)


@triton.jit
def capped(z, SOFTCAP: tl.constexpr):
    """Logits within ±SOFTCAP; as they are where it is None."""
    if SOFTCAP is not None:
        z = SOFTCAP * tanh(z / SOFTCAP)
    return z


@triton.jit
def ranked(choice, expert, inside, EXPERTS: tl.constexpr):
    """int64 keys in the order of the choices, NaN above all; of equal choices the first expert has the larger key."""
    bits = (choice + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(choice != choice, 0x7FFFFFFF, order).to(tl.int64)
    return tl.where(inside, order * 4294967296 + (EXPERTS - 1 - expert), -9223372036854775808)


@triton.jit
def select_experts(
    logits,
    selection_bias,
    per_expert_scale,
    indices,
    weights,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCORE: tl.constexpr,
    TOPK_FIRST: tl.constexpr,
    BIAS_ON_LOGIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """indices int64 and weights fp32 [T, k], largest first, from logits [T, N] fp32; grid (T,).

    Of equal choices the first expert is taken; NaN is taken before all else, and passes through.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < NUM_EXPERTS
    z = capped(tl.load(logits + token * NUM_EXPERTS + expert, mask=inside, other=0.0), SOFTCAP)
    most, total = 0.0, 1.0
    if SCORE == "softmax" and not TOPK_FIRST:
        most, total = softmax_of(z, inside)
    choice = z
    if not (TOPK_FIRST or BIAS_ON_LOGIT):
        choice = scored(z, inside, most, total, SCORE)
    if selection_bias is not None:
        choice += tl.load(selection_bias + expert, mask=inside, other=0.0).to(tl.float32)
    key = ranked(choice, expert, inside, EXPERTS)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.int32)
    for turn in range(TOP_K):
        best = tl.max(key, 0)
        number = EXPERTS - 1 - (best & (EXPERTS - 1)).to(tl.int32)
        chosen = tl.where(slot == turn, number, chosen)
        key = tl.where(key == best, -9223372036854775808, key)
    real = slot < TOP_K
    z = capped(tl.load(logits + token * NUM_EXPERTS + chosen, mask=real, other=0.0), SOFTCAP)
    if SCORE == "softmax" and TOPK_FIRST:
        most, total = softmax_of(z, real)
    weight = scored(z, real, most, total, SCORE)
    if NORMALIZE == "sum":
        weight = weight / (tl.sum(weight, 0) + EPS)
    elif NORMALIZE == "clamp":
        total = tl.sum(weight, 0)
        weight = weight / tl.where(total < EPS, EPS, total)
    else:
        tl.static_assert(NORMALIZE == "none")
    weight = weight * SCALE
    if per_expert_scale is not None:
        weight *= tl.load(per_expert_scale + chosen, mask=real, other=0.0).to(tl.float32)
    tl.store(indices + token * TOP_K + slot, chosen.to(tl.int64), mask=real)
    tl.store(weights + token * TOP_K + slot, weight, mask=real)
