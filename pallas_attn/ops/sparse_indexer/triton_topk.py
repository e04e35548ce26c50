"""The Triton kernel of the selection: a row's k-th largest number, digit by digit, then the columns that reach it."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """uint32 in the order of the floats, NaN as -inf, -0 as +0: by their bits, so that no subnormal counts as 0."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    nan = size > 0x7F800000
    key = tl.where(nan, -0x7F800000, tl.where(bits < 0, -size, size))
    return key.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def counted(row, count, blocks, high, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """How often each digit [256] at SHIFT stands in numbers of the row whose digits above it are `high`."""
    counts = tl.zeros((256,), tl.int32)
    for block in tl.range(0, blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        same = column < count
        key = ordered(tl.load(row + column, mask=same, other=0.0))
        if SHIFT < 24:
            same = same & ((key >> (SHIFT + 8)) == high)
        counts += tl.histogram(((key >> SHIFT) & 0xFF).to(tl.int32), 256, mask=same)
    return counts


@triton.jit
def topk(logits, starts, ends, out, W: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One row. Four passes count the digits, of eight bits each, of what begins as the k-th largest number does; a
    fifth one places the columns above it, and the first of its equals. So many passes for every row."""
    t = tl.program_id(0)
    start = tl.load(starts + t)
    count = tl.maximum(tl.load(ends + t) - start, 0)
    row, to = logits + t.to(tl.int64) * W + start, out + t.to(tl.int64) * K
    i, digits = tl.arange(0, BLOCK), tl.arange(0, 256)
    blocks, all = tl.cdiv(count, BLOCK), count <= K
    need = tl.minimum(count, K)
    high, rest = tl.zeros((), tl.uint32), need  # the digits so far, and how many numbers are to come of what has them
    for turn in tl.static_range(4):
        counts = counted(row, count, tl.where(all, 0, blocks), high, 24 - 8 * turn, BLOCK)
        reach = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.max(tl.where(reach >= rest, digits, 0), axis=0)
        rest -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        high = (high << 8) | digit.to(tl.uint32)
    # Now `high` is the k-th largest number, of whose equals the first `rest` are chosen.
    larger, equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for block in tl.range(0, blocks):
        column = block * BLOCK + i
        inside = column < count
        key = ordered(tl.load(row + column, mask=inside, other=0.0))
        more, same = inside & (all | (key > high)), inside & (key == high) & (all == 0)
        both = more.to(tl.int32) + (same.to(tl.int32) << 16)  # both counts in a word: blocks are shorter than 2 ** 15
        before = tl.cumsum(both, axis=0) - both
        equals = equal + (before >> 16)
        place = larger + (before & 0xFFFF) + tl.minimum(equals, rest)
        tl.store(to + place, column, mask=more | (same & (equals < rest)))
        whole = tl.sum(both, axis=0)
        larger, equal = larger + (whole & 0xFFFF), equal + (whole >> 16)
    for first in tl.range(need, K, BLOCK):
        tl.store(to + first + i, tl.full((BLOCK,), -1, tl.int32), mask=first + i < K)
