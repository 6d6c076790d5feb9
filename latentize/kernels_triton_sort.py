"""Pairs sorted by expert and cut into blocks of one expert each, on the device and without asking it anything.

A stable counting sort in two kernels: `count_pairs` counts each chunk of the pairs by expert, `place_pairs` adds the
counts up and gives every pair its place. How many blocks there will be is not known on the host: a grid takes the
largest number possible, and the blocks past the last one have no rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(indices, at, pairs, NUM_EXPERTS: tl.constexpr):
    """(expert numbers as int32, whether they name an expert); 0 for what does not, and for positions past `pairs`."""
    expert = tl.load(indices + at, mask=at < pairs, other=-1)
    real = (expert >= 0) & (expert < NUM_EXPERTS)
    return tl.where(real, expert, 0).to(tl.int32), real


@triton.jit(do_not_specialize=["pairs"])
def count_pairs(
    indices,
    pairs,
    chunk_counts,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """chunk_counts [chunks, EXPERTS] int32: the pairs of each chunk by expert; grid (chunks,).

    indices [T, k] int64, `pairs` = T·k. EXPERTS is NUM_EXPERTS rounded up to a power of two.
    """
    key, real = load_keys(indices, tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), pairs, NUM_EXPERTS)
    counts = tl.histogram(key, EXPERTS, mask=real)
    tl.store(chunk_counts + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def place_pairs(
    indices,
    chunk_counts,
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
    CHUNKS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The places of a chunk's pairs and a slice of the blocks; grid (ceil(pairs / SLICE),), more than enough.

    order [pairs] int32: the pairs sorted by expert; those of no expert have no place, and as many at its end are not
    written. block_expert, block_start (position in `order`), block_rows [blocks] int32. The counts of CHUNKS chunks are
    read at a time.
    """
    program = tl.program_id(0)
    chunks = tl.cdiv(pairs, CHUNK)
    if (program >= chunks) & (program * SLICE >= blocks):
        return
    expert = tl.arange(0, EXPERTS)
    chunk = tl.arange(0, CHUNKS)
    counts = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)  # pairs of the expert in earlier chunks
    for start in range(0, chunks, CHUNKS):
        number = start + chunk
        at = chunk_counts + number[:, None] * EXPERTS + expert[None, :]
        some = tl.load(at, mask=(number < chunks)[:, None], other=0)
        counts += tl.sum(some, 0)
        before += tl.sum(tl.where((number < program)[:, None], some, 0), 0)
    of_expert = (counts + BLOCK - 1) // BLOCK
    last_block, last_pair = tl.cumsum(of_expert, 0), tl.cumsum(counts, 0)
    first_pair = last_pair - counts

    if program < chunks:
        inside = tl.arange(0, CHUNK)
        mine = program * CHUNK + inside
        key, real = load_keys(indices, mine, pairs, NUM_EXPERTS)
        earlier = tl.zeros([CHUNK, 32], tl.int32)
        for start in range(0, CHUNK, 32):
            other = start + tl.arange(0, 32)
            other_key, other_real = load_keys(indices, program * CHUNK + other, pairs, NUM_EXPERTS)
            same = (other_key[None, :] == key[:, None]) & (other[None, :] < inside[:, None])
            earlier += (same & other_real[None, :]).to(tl.int32)
        place = tl.gather(first_pair + before, key, 0) + tl.sum(earlier, 1)
        tl.store(order + place, mine, mask=real)

    block = program * SLICE + tl.arange(0, SLICE)
    block_of = tl.sum((last_block[:, None] <= block[None, :]).to(tl.int32), 0)  # EXPERTS for blocks past the last one
    chosen = (expert[:, None] == block_of[None, :]).to(tl.int32)
    offset = (block - tl.sum(chosen * (last_block - of_expert)[:, None], 0)) * BLOCK
    count = tl.sum(chosen * counts[:, None], 0)
    rows = tl.maximum(tl.minimum(count - offset, BLOCK), 0)
    tl.store(block_expert + block, tl.where(rows > 0, block_of, 0), mask=block < blocks)
    tl.store(block_start + block, tl.sum(chosen * first_pair[:, None], 0) + offset, mask=block < blocks)
    tl.store(block_rows + block, rows, mask=block < blocks)
