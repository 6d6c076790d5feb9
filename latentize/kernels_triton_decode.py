"""The routed experts for few tokens: every (token, expert) pair reads its expert's weights, nothing is sorted.

Two kernels without atomics. `decode_up`: one program per pair and rows of gate and up. `decode_down`: one program per
token and rows of its output, which adds the k experts in the order of their slots. Both only stream weights.
Starting the second while the first runs out (programmatic dependent launch) made both slower on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentize.kernels_triton_math import activate, load_fp32


@triton.jit
def decode_up(
    hidden,
    indices,
    weights,
    gate,
    up,
    gate_bias,
    up_bias,
    activated,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    GATE_ROW: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    UP_ROW: tl.constexpr,
    GATE_BIAS_STRIDE: tl.constexpr,
    UP_BIAS_STRIDE: tl.constexpr,
    ON_INPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MIN: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_MIN: tl.constexpr,
    UP_MAX: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """activated [T·k, m] fp32 from hidden [T, l], indices and weights [T, k]; grid (T·k, ceil(m / ROWS))."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(indices + pair)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, INNER)
    x_row = hidden + pair // TOP_K * WIDTH
    up_rows = up + expert * UP_STRIDE + row[:, None] * UP_ROW
    up_sums = tl.zeros([ROWS, INNER], tl.float32)
    gate_sums = tl.zeros([ROWS, INNER], tl.float32)
    for start in tl.range(0, WIDTH, INNER, num_stages=STAGES):
        at = start + column
        mask = (row < INTERMEDIATE)[:, None] & (at < WIDTH)[None, :]
        x = load_fp32(x_row + at, at < WIDTH)[None, :]
        up_sums += load_fp32(up_rows + at[None, :], mask) * x
        if gate is not None:
            gate_rows = gate + expert * GATE_STRIDE + row[:, None] * GATE_ROW
            gate_sums += load_fp32(gate_rows + at[None, :], mask) * x
    u, g = tl.sum(up_sums, 1), tl.sum(gate_sums, 1)
    if ON_INPUT:
        weight = tl.load(weights + pair).to(tl.float32)
        u, g = u * weight, g * weight
    if up_bias is not None:
        u += load_fp32(up_bias + expert * UP_BIAS_STRIDE + row, row < INTERMEDIATE)
    if gate_bias is not None:
        g += load_fp32(gate_bias + expert * GATE_BIAS_STRIDE + row, row < INTERMEDIATE)
    GATED: tl.constexpr = gate is not None
    if not GATED:
        g = u
    h = activate(g, u, GATED, ACTIVATION, ALPHA, GATE_MIN, GATE_MAX, UP_MIN, UP_MAX, UP_OFFSET)
    tl.store(activated + pair * INTERMEDIATE + row, h, mask=row < INTERMEDIATE)


@triton.jit
def decode_down(
    activated,
    indices,
    weights,
    down,
    down_bias,
    combined,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    DOWN_STRIDE: tl.constexpr,
    DOWN_ROW: tl.constexpr,
    DOWN_BIAS_STRIDE: tl.constexpr,
    ON_INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """combined [T, l] from activated [T·k, m] fp32; grid (T, ceil(l / ROWS)). A negative index gives NaN."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, INNER)
    sums = tl.zeros([ROWS, INNER], tl.float32)
    CHUNKS: tl.constexpr = (INTERMEDIATE + INNER - 1) // INNER
    for step in tl.range(0, TOP_K * CHUNKS, num_stages=STAGES):
        pair = token * TOP_K + step // CHUNKS
        at = step % CHUNKS * INNER + column
        expert = tl.load(indices + pair)
        real = (expert >= 0) & (expert < NUM_EXPERTS)
        weight = 1.0
        if not ON_INPUT:
            weight = tl.load(weights + pair).to(tl.float32)
        seen = at < tl.where(real, INTERMEDIATE, 0)
        h = load_fp32(activated + pair * INTERMEDIATE + at, seen)
        h = tl.where(real, h * weight, 0.0)
        at_down = down + expert * DOWN_STRIDE + row[:, None] * DOWN_ROW + at[None, :]
        sums += load_fp32(at_down, (row < WIDTH)[:, None] & seen[None, :]) * h[None, :]
    total = tl.sum(sums, 1)
    for slot in range(TOP_K):
        expert = tl.load(indices + token * TOP_K + slot)
        if down_bias is not None:
            real = (expert >= 0) & (expert < NUM_EXPERTS)
            bias = load_fp32(down_bias + expert * DOWN_BIAS_STRIDE + row, row < tl.where(real, WIDTH, 0))
            if not ON_INPUT:
                bias *= tl.load(weights + token * TOP_K + slot).to(tl.float32)
            total += tl.where(real, bias, 0.0)
        total = tl.where(expert < 0, float("nan"), total)
    tl.store(combined + token * WIDTH + row, total.to(combined.dtype.element_ty), mask=row < WIDTH)
