"""Pairs sorted by expert and cut into blocks of one expert each, on the device and without asking it anything.

How many blocks there will be is not known on the host: a grid takes the largest number possible, and the blocks past
the last one have no rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(indices, at, pairs, NUM_EXPERTS: tl.constexpr):
    """Expert numbers as int32, with NUM_EXPERTS for whatever names no expert and for positions past the pairs."""
    expert = tl.load(indices + at, mask=at < pairs, other=NUM_EXPERTS)
    return tl.where((expert < 0) | (expert > NUM_EXPERTS), NUM_EXPERTS, expert).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def sort_pairs(
    indices,
    pairs,
    blocks,
    order,
    block_expert,
    block_start,
    block_rows,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Stable counting sort by comparing all pairs with all; each program does a slice of the pairs and of the blocks.

    indices [T, k] int64, `pairs` = T·k -> order [pairs] int32, the pairs sorted by expert, those of no expert last;
    block_expert, block_start (position in `order`), block_rows [blocks] int32. EXPERTS is NUM_EXPERTS rounded up to
    a power of two; grid (ceil(max(pairs, blocks) / SLICE),).
    """
    expert = tl.arange(0, EXPERTS)
    mine = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    my_key = load_keys(indices, mine, pairs, NUM_EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    rank = tl.zeros([SLICE], tl.int32)
    for start in range(0, pairs, CHUNK):
        other = start + tl.arange(0, CHUNK)
        key = load_keys(indices, other, pairs, NUM_EXPERTS)
        counts += tl.sum((key[None, :] == expert[:, None]).to(tl.int32), 1)
        earlier = (key[None, :] == my_key[:, None]) & (other[None, :] < mine[:, None])
        before = ((key[None, :] < my_key[:, None]) | earlier) & (other < pairs)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(order + rank, mine, mask=mine < pairs)

    counts = tl.where(expert < NUM_EXPERTS, counts, 0)
    of_expert = (counts + BLOCK - 1) // BLOCK
    last_block, last_pair = tl.cumsum(of_expert, 0), tl.cumsum(counts, 0)
    block_of = tl.sum((last_block[None, :] <= mine[:, None]).to(tl.int32), 1)  # EXPERTS for blocks past the last one
    chosen = (expert[None, :] == block_of[:, None]).to(tl.int32)
    offset = (mine - tl.sum(chosen * (last_block - of_expert)[None, :], 1)) * BLOCK
    count = tl.sum(chosen * counts[None, :], 1)
    rows = tl.maximum(tl.minimum(count - offset, BLOCK), 0)
    tl.store(block_expert + mine, tl.where(rows > 0, block_of, 0), mask=mine < blocks)
    tl.store(block_start + mine, tl.sum(chosen * (last_pair - counts)[None, :], 1) + offset, mask=mine < blocks)
    tl.store(block_rows + mine, rows, mask=mine < blocks)
