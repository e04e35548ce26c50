"""What Triton kernels share: which query rows of a ragged batch a program has."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def start_of(cu_q_lens, live, segment, T: tl.constexpr, B: tl.constexpr):
    """First token of a segment: what stands before the first sequence, each sequence, what stands after the last."""
    at = tl.minimum(tl.maximum(segment - 1, 0), live)
    start = tl.minimum(tl.maximum(tl.load(cu_q_lens + at), 0), T)
    return tl.where(segment == 0, 0, tl.where(segment > B + 1, T, start))


@triton.jit
def find(
    cu_q_lens, live, block,
    T: tl.constexpr, B: tl.constexpr, PER: tl.constexpr, BQ: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The segment that a block of BQ rows belongs to, of which a token has PER: segment s begins at block
    start * PER // BQ + s at the latest."""
    count = tl.full((), 0, tl.int32)
    for first in tl.range(0, B + 2, CHUNK):
        segment = first + tl.arange(0, CHUNK)
        begins = start_of(cu_q_lens, live, segment, T, B) * PER // BQ + segment
        count += tl.sum(((begins <= block) & (segment < B + 2)).to(tl.int32), axis=0)
    return tl.maximum(count - 1, 0)
