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
    """The places of a chunk's pairs, SLICE at a time, and SLICE blocks; grid (ceil(pairs / SLICE),), more than enough.

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
    earlier = tl.zeros([CHUNKS, EXPERTS], tl.int32)
    later = tl.zeros([CHUNKS, EXPERTS], tl.int32)
    for start in range(0, chunks, CHUNKS):
        number = start + chunk
        at = chunk_counts + number[:, None] * EXPERTS + expert[None, :]
        some = tl.load(at, mask=(number < chunks)[:, None], other=0)
        is_earlier = (number < program)[:, None]
        earlier += tl.where(is_earlier, some, 0)
        later += tl.where(is_earlier, 0, some)
    before = tl.sum(earlier, 0)
    counts = before + tl.sum(later, 0)
    of_expert = (counts + BLOCK - 1) // BLOCK
    last_block, last_pair = tl.cumsum(of_expert, 0), tl.cumsum(counts, 0)
    first_pair = last_pair - counts

    if program < chunks:
        place = first_pair + before  # of the next pair of each expert
        inside = tl.arange(0, SLICE)
        for start in range(program * CHUNK, tl.minimum((program + 1) * CHUNK, pairs), SLICE):
            key, real = load_keys(indices, start + inside, pairs, NUM_EXPERTS)
            same = (key[None, :] == key[:, None]) & real[None, :] & (inside[None, :] < inside[:, None])
            at = tl.gather(place, key, 0) + tl.sum(same.to(tl.int32), 1)
            tl.store(order + at, start + inside, mask=real)
            place += tl.histogram(key, EXPERTS, mask=real)

    block = program * SLICE + tl.arange(0, SLICE)
    block_of = tl.sum((last_block[:, None] <= block[None, :]).to(tl.int32), 0)  # EXPERTS for blocks past the last one
    chosen = (expert[:, None] == block_of[None, :]).to(tl.int32)
    offset = (block - tl.sum(chosen * (last_block - of_expert)[:, None], 0)) * BLOCK
    count = tl.sum(chosen * counts[:, None], 0)
    rows = tl.maximum(tl.minimum(count - offset, BLOCK), 0)
    tl.store(block_expert + block, tl.where(rows > 0, block_of, 0), mask=block < blocks)
    tl.store(block_start + block, tl.sum(chosen * first_pair[:, None], 0) + offset, mask=block < blocks)
    tl.store(block_rows + block, rows, mask=block < blocks)
