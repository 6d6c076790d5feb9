"""The routing function as one Triton kernel: scores, top-k, weights. Imported only where Triton is installed.

It mirrors `latentize.routing.route`, which stays the definition, for routers without groups and p-norms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentize.kernels_triton_math import log1p_exp, tanh


@triton.jit
def scored(z, inside, SCORE: tl.constexpr):
    """Scores of logits z, a softmax over those inside or each alone; zero outside."""
    if SCORE == "softmax":
        e = tl.where(inside, tl.exp(z - tl.max(tl.where(inside, z, float("-inf")), 0)), 0.0)
        out = e / tl.sum(e, 0)
    elif SCORE == "sigmoid":
        out = tl.sigmoid(z)
    else:
        tl.static_assert(SCORE == "sqrt_softplus")
        out = tl.sqrt(tl.where(z > 20.0, z, log1p_exp(tl.where(z > 20.0, 20.0, z))))
    return tl.where(inside, out, 0.0)


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
    z = tl.load(logits + token * NUM_EXPERTS + expert, mask=inside, other=0.0)
    if SOFTCAP is not None:
        z = SOFTCAP * tanh(z / SOFTCAP)
    scores = z if TOPK_FIRST else scored(z, inside, SCORE)
    choice = z if BIAS_ON_LOGIT else scores
    if selection_bias is not None:
        choice += tl.load(selection_bias + expert, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(choice != choice, float("inf"), choice)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.int32)
    weight = tl.zeros([SLOTS], tl.float32)
    left = inside
    for turn in range(TOP_K):
        best = tl.max(tl.where(left, choice, float("-inf")), 0)
        number = tl.min(tl.where(left & (choice == best), expert, EXPERTS), 0)
        here = expert == number
        chosen = tl.where(slot == turn, number, chosen)
        weight = tl.where(slot == turn, tl.sum(tl.where(here, scores, 0.0), 0), weight)
        left = left & (expert != number)
    real = slot < TOP_K
    if TOPK_FIRST:
        weight = scored(weight, real, SCORE)
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
