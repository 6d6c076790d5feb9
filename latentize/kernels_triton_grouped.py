"""The routed experts for many tokens: blocks of pairs that share an expert, as matrix products on the tensor cores.

`grouped_up` and `grouped_down` are one matrix product each. `fused` is both for widths whose accumulator fits in
registers: the hidden activations never leave the processor. `combine` adds a token's outputs in one fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentize.kernels_triton_math import activate, load_fp32


@triton.jit
def block_rows_of(order, block_start, block_rows, block, BLOCK: tl.constexpr):
    """(position, pair, inside) of a block's rows; rows that are not inside read pair 0."""
    row = tl.arange(0, BLOCK)
    inside = row < tl.load(block_rows + block)
    position = (tl.load(block_start + block) + row).to(tl.int64)
    pair = tl.load(order + position, mask=inside, other=0).to(tl.int64)
    return position, pair, inside


@triton.jit
def grouped_up(
    hidden,
    weights,
    gate,
    up,
    gate_bias,
    up_bias,
    order,
    block_expert,
    block_start,
    block_rows,
    activated,
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
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MIN: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_MIN: tl.constexpr,
    UP_MAX: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """activated [T·k, m] in sorted order from hidden [T, l]; grid (blocks · ceil(m / COLUMNS),)."""
    TILES: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // TILES
    if tl.load(block_rows + block) == 0:
        return
    expert = tl.load(block_expert + block).to(tl.int64)
    position, pair, inside = block_rows_of(order, block_start, block_rows, block, BLOCK)
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    here = column < INTERMEDIATE
    x_rows = hidden + (pair // TOP_K * WIDTH)[:, None]
    up_columns = up + expert * UP_STRIDE + column[None, :] * UP_ROW
    u = tl.zeros([BLOCK, COLUMNS], tl.float32)
    g = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, WIDTH, INNER):
        at = start + tl.arange(0, INNER)
        x = tl.load(x_rows + at[None, :], mask=inside[:, None] & (at < WIDTH)[None, :], other=0.0)
        mask = (at < WIDTH)[:, None] & here[None, :]
        u = tl.dot(x, tl.load(up_columns + at[:, None], mask=mask, other=0.0), u, input_precision=PRECISION)
        if gate is not None:
            gate_columns = gate + expert * GATE_STRIDE + column[None, :] * GATE_ROW
            g = tl.dot(x, tl.load(gate_columns + at[:, None], mask=mask, other=0.0), g, input_precision=PRECISION)
    if ON_INPUT:
        weight = load_fp32(weights + pair, inside)
        u, g = u * weight[:, None], g * weight[:, None]
    if up_bias is not None:
        u += load_fp32(up_bias + expert * UP_BIAS_STRIDE + column, here)[None, :]
    if gate_bias is not None:
        g += load_fp32(gate_bias + expert * GATE_BIAS_STRIDE + column, here)[None, :]
    GATED: tl.constexpr = gate is not None
    if not GATED:
        g = u
    h = activate(g, u, GATED, ACTIVATION, ALPHA, GATE_MIN, GATE_MAX, UP_MIN, UP_MAX, UP_OFFSET)
    to = activated + (position * INTERMEDIATE)[:, None] + column[None, :]
    tl.store(to, h.to(activated.dtype.element_ty), mask=inside[:, None] & here[None, :])


@triton.jit
def grouped_down(
    activated,
    weights,
    down,
    down_bias,
    order,
    block_expert,
    block_start,
    block_rows,
    outputs,
    WIDTH: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    DOWN_STRIDE: tl.constexpr,
    DOWN_ROW: tl.constexpr,
    DOWN_BIAS_STRIDE: tl.constexpr,
    ON_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Weighted outputs [T·k, l] by pair from activated [T·k, m]; grid (blocks · ceil(l / COLUMNS),)."""
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // TILES
    if tl.load(block_rows + block) == 0:
        return
    expert = tl.load(block_expert + block).to(tl.int64)
    position, pair, inside = block_rows_of(order, block_start, block_rows, block, BLOCK)
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    here = column < WIDTH
    h_rows = activated + (position * INTERMEDIATE)[:, None]
    down_columns = down + expert * DOWN_STRIDE + column[None, :] * DOWN_ROW
    y = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, INTERMEDIATE, INNER):
        at = start + tl.arange(0, INNER)
        h = tl.load(h_rows + at[None, :], mask=inside[:, None] & (at < INTERMEDIATE)[None, :], other=0.0)
        mask = (at < INTERMEDIATE)[:, None] & here[None, :]
        y = tl.dot(h, tl.load(down_columns + at[:, None], mask=mask, other=0.0), y, input_precision=PRECISION)
    if down_bias is not None:
        y += load_fp32(down_bias + expert * DOWN_BIAS_STRIDE + column, here)[None, :]
    if not ON_INPUT:
        y = y * load_fp32(weights + pair, inside)[:, None]
    to = outputs + (pair * WIDTH)[:, None] + column[None, :]
    tl.store(to, y.to(outputs.dtype.element_ty), mask=inside[:, None] & here[None, :])


@triton.jit
def fused(
    hidden,
    weights,
    gate,
    up,
    down,
    gate_bias,
    up_bias,
    down_bias,
    order,
    block_expert,
    block_start,
    block_rows,
    outputs,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    GATE_ROW: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    UP_ROW: tl.constexpr,
    DOWN_STRIDE: tl.constexpr,
    DOWN_ROW: tl.constexpr,
    GATE_BIAS_STRIDE: tl.constexpr,
    UP_BIAS_STRIDE: tl.constexpr,
    DOWN_BIAS_STRIDE: tl.constexpr,
    ON_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MIN: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_MIN: tl.constexpr,
    UP_MAX: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Weighted outputs [T·k, SPLITS, l] by pair from hidden [T, l], each over its share of m; grid (blocks · SPLITS,).

    PADDED is l rounded up to a power of two: a block's tokens stay on the processor whole.
    """
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if tl.load(block_rows + block) == 0:
        return
    expert = tl.load(block_expert + block).to(tl.int64)
    _, pair, inside = block_rows_of(order, block_start, block_rows, block, BLOCK)
    at = tl.arange(0, PADDED)
    mask_x = inside[:, None] & (at < WIDTH)[None, :]
    x = tl.load(hidden + (pair // TOP_K * WIDTH)[:, None] + at[None, :], mask=mask_x, other=0.0)
    weight = load_fp32(weights + pair, inside)
    y = tl.zeros([BLOCK, PADDED], tl.float32)
    GATED: tl.constexpr = gate is not None
    for start in range(split * COLUMNS, INTERMEDIATE, SPLITS * COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = column < INTERMEDIATE
        mask = (at < WIDTH)[:, None] & here[None, :]
        up_tile = tl.load(up + expert * UP_STRIDE + column[None, :] * UP_ROW + at[:, None], mask=mask, other=0.0)
        u = tl.dot(x, up_tile, input_precision=PRECISION)
        if ON_INPUT:
            u = u * weight[:, None]
        if up_bias is not None:
            u += load_fp32(up_bias + expert * UP_BIAS_STRIDE + column, here)[None, :]
        g = u
        if GATED:
            gate_tile = tl.load(
                gate + expert * GATE_STRIDE + column[None, :] * GATE_ROW + at[:, None], mask=mask, other=0.0
            )
            g = tl.dot(x, gate_tile, input_precision=PRECISION)
            if ON_INPUT:
                g = g * weight[:, None]
            if gate_bias is not None:
                g += load_fp32(gate_bias + expert * GATE_BIAS_STRIDE + column, here)[None, :]
        h = activate(g, u, GATED, ACTIVATION, ALPHA, GATE_MIN, GATE_MAX, UP_MIN, UP_MAX, UP_OFFSET)
        h = tl.where(here[None, :], h, 0.0).to(x.dtype)  # of zero, some activations are not zero
        down_tile = tl.load(
            down + expert * DOWN_STRIDE + at[None, :] * DOWN_ROW + column[:, None],
            mask=here[:, None] & (at < WIDTH)[None, :],
            other=0.0,
        )
        y = tl.dot(h, down_tile, y, input_precision=PRECISION)
    if down_bias is not None:
        bias = load_fp32(down_bias + expert * DOWN_BIAS_STRIDE + at, at < WIDTH)
        y += tl.where(split == 0, bias, 0.0)[None, :]
    if not ON_INPUT:
        y = y * weight[:, None]
    to = outputs + ((pair * SPLITS + split) * WIDTH)[:, None] + at[None, :]
    tl.store(to, y.to(outputs.dtype.element_ty), mask=mask_x)


@triton.jit
def combine(
    indices,
    outputs,
    combined,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """combined [T, l] from outputs [T·k, SPLITS, l]; grid (T, ceil(l / COLUMNS)). A negative index gives NaN.

    OUTPUTS is TOP_K · SPLITS rounded up to a power of two: all are read at once and added in one fixed order.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, OUTPUTS)
    inside = row < TOP_K * SPLITS
    expert = tl.load(indices + token * TOP_K + row // SPLITS, mask=inside, other=NUM_EXPERTS)
    real = (expert >= 0) & (expert < NUM_EXPERTS)
    at = outputs + ((token * TOP_K * SPLITS + row) * WIDTH)[:, None] + column[None, :]
    total = tl.sum(load_fp32(at, real[:, None] & (column < WIDTH)[None, :]), 0)
    total = tl.where(tl.min(expert, 0) < 0, float("nan"), total)
    tl.store(combined + token * WIDTH + column, total.to(combined.dtype.element_ty), mask=column < WIDTH)
