"""The Triton kernel of the gather: some rows of the result, each one token and head, keys and values both."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from pallas_attn.runtime.triton_numbers import widen
from pallas_attn.runtime.triton_places import places, scale_place


@triton.jit
def find(cu_lens, t, B: tl.constexpr, STEPS: tl.constexpr):
    """The sequence that row t of the result belongs to, by halving; B past the last token."""
    seq = tl.zeros_like(t)
    for i in tl.static_range(STEPS):
        further = seq + (1 << (STEPS - 1 - i))
        begin = tl.load(cu_lens + tl.minimum(further, B))
        seq = tl.where((further <= B) & (begin <= t), further, seq)
    return seq


@triton.jit
def gather_side(
    buffer, scale, out, t, seq, page, slot, head, row_ok, real,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr,
    SLOT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BY_SLOT: tl.constexpr,
    BASE: tl.constexpr, HEAD_MAJOR: tl.constexpr, GRANULARITY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Rows of keys or of values: zeros where no token is; without a scale, bits that need no rounding are copied."""
    d = tl.arange(0, DP)
    where = places(page, slot, head, d, PAGE, HEAD, SLOT, DIM, BLOCK, BLOCKS, BY_SLOT, BASE)
    x = tl.load(buffer + where, mask=real[:, None] & (d < D)[None, :], other=0.0)
    if GRANULARITY > 0:
        if GRANULARITY == 1:
            place = tl.zeros_like(page)
        elif GRANULARITY == 2:
            place = head
        elif GRANULARITY == 3:
            place = seq * K + head
        else:
            place = scale_place(page, slot, head, K, S, HEAD_MAJOR)
        x = widen(x, KIND, tl.float32) * tl.load(scale + place, mask=real, other=0.0)[:, None]
    at = (t.to(tl.int64) * K + head)[:, None] * D + d[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=row_ok[:, None] & (d < D)[None, :])


@triton.jit
def gather(
    k, v, k_scale, v_scale, page_table, first, cu_lens, k_out, v_out,
    T: tl.constexpr, B: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, HEAD_MAJOR: tl.constexpr, GRANULARITY: tl.constexpr, KIND: tl.constexpr,
    KD: tl.constexpr, KDP: tl.constexpr, K_PAGE: tl.constexpr, K_HEAD: tl.constexpr, K_SLOT: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_BLOCKS: tl.constexpr,
    VD: tl.constexpr, VDP: tl.constexpr, V_PAGE: tl.constexpr, V_HEAD: tl.constexpr, V_SLOT: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_BLOCKS: tl.constexpr, V_BASE: tl.constexpr,
):  # fmt: skip
    """Neighbouring rows are neighbours in the cache: heads of a token, or tokens of a head where the layout has those
    together. A single buffer comes as both `k` and `v`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, head = (row % T, row // T) if HEAD_MAJOR else (row // K, row % K)
    t, row_ok = t.to(tl.int32), row < T * K
    seq = find(cu_lens, t, B, STEPS)
    real = row_ok & (seq < B)
    position = tl.load(first + seq, mask=real, other=0) + t - tl.load(cu_lens + seq, mask=real, other=0)
    position = tl.where(real, position, 0)
    page = tl.load(page_table + seq.to(tl.int64) * M + position // S, mask=real, other=0)
    page, slot = tl.minimum(tl.maximum(page, 0), N - 1).to(tl.int64), position % S
    gather_side(
        k, k_scale, k_out, t, seq, page, slot, head, row_ok, real, K, KD, KDP, S, K_PAGE, K_HEAD, K_SLOT, K_DIM,
        K_BLOCK, K_BLOCKS, False, 0, HEAD_MAJOR, GRANULARITY, KIND,
    )  # fmt: skip
    gather_side(
        v, v_scale, v_out, t, seq, page, slot, head, row_ok, real, K, VD, VDP, S, V_PAGE, V_HEAD, V_SLOT, V_DIM,
        V_BLOCK, V_BLOCKS, True, V_BASE, HEAD_MAJOR, GRANULARITY, KIND,
    )  # fmt: skip
