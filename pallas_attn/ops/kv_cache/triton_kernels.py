"""The Triton kernel of cache writes: some rows, each one token and head, keys and values both."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from pallas_attn.runtime.triton_numbers import as_bytes, codes, found_scale
from pallas_attn.runtime.triton_places import places, scale_place


@triton.jit
def write_side(
    x, given, buffer, scales, row, page, at, head, ok,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr,
    PAGE: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, BY_SLOT: tl.constexpr, BASE: tl.constexpr, HEAD_MAJOR: tl.constexpr,
    GRANULARITY: tl.constexpr, KIND: tl.constexpr, INTEGER: tl.constexpr, RECIPROCAL: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, AMAX_FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr, BY: tl.constexpr,
    UE8M0: tl.constexpr,
):  # fmt: skip
    """Rows of keys or of values, quantised by the format's rule, put into their slots."""
    d = tl.arange(0, DP)
    mask = ok[:, None] & (d < D)[None, :]
    numbers = tl.load(x + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    where = places(page, at, head, d, PAGE, HEAD, SLOT, DIM, BLOCK, BLOCKS, BY_SLOT, BASE)
    if GRANULARITY == 0:
        tl.store(buffer + where, numbers.to(buffer.dtype.element_ty), mask=mask)
    else:
        if GRANULARITY == 4:
            scale = found_scale(numbers, AMAX_FLOOR, SCALE_FLOOR, BY, HIGH, UE8M0)
            tl.store(scales + scale_place(page, at, head, K, S, HEAD_MAJOR), scale, mask=ok)
        elif GRANULARITY == 2:
            scale = tl.load(given + head, mask=ok, other=1.0)
        else:
            scale = tl.load(given) + tl.zeros_like(head).to(tl.float32)
        code = codes(numbers, scale, KIND, INTEGER, RECIPROCAL, LOW, HIGH)
        tl.store((buffer if INTEGER else as_bytes(buffer)) + where, code, mask=mask)


@triton.jit
def write(
    k, v, slots, k_given, v_given, k_in, v_in, k_scale_in, v_scale_in, k_out, v_out, k_scale, v_scale,
    T: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, SINGLE: tl.constexpr,
    HEAD_MAJOR: tl.constexpr, GRANULARITY: tl.constexpr, KIND: tl.constexpr, INTEGER: tl.constexpr,
    RECIPROCAL: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr, BY: tl.constexpr, UE8M0: tl.constexpr,
    KD: tl.constexpr, KDP: tl.constexpr, K_PAGE: tl.constexpr, K_HEAD: tl.constexpr, K_SLOT: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_BLOCKS: tl.constexpr,
    VD: tl.constexpr, VDP: tl.constexpr, V_PAGE: tl.constexpr, V_HEAD: tl.constexpr, V_SLOT: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_BLOCKS: tl.constexpr, V_BASE: tl.constexpr,
):  # fmt: skip
    """A token without a slot inside the cache writes nothing. The outputs are the cache's own memory, so that what
    comes in of it need not be read; a single buffer is the first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // K, row % K
    slot = tl.load(slots + token, mask=token < T, other=-1)
    ok = (slot >= 0) & (slot < N * S)
    page, at = (slot // S).to(tl.int64), slot % S
    write_side(
        k, k_given, k_out, k_scale, row, page, at, head, ok, K, KD, KDP, S, K_PAGE, K_HEAD, K_SLOT, K_DIM, K_BLOCK,
        K_BLOCKS, False, 0, HEAD_MAJOR, GRANULARITY, KIND, INTEGER, RECIPROCAL, LOW, HIGH, AMAX_FLOOR, SCALE_FLOOR,
        BY, UE8M0,
    )  # fmt: skip
    write_side(
        v, v_given, k_out if SINGLE else v_out, v_scale, row, page, at, head, ok, K, VD, VDP, S, V_PAGE, V_HEAD,
        V_SLOT, V_DIM, V_BLOCK, V_BLOCKS, True, V_BASE, HEAD_MAJOR, GRANULARITY, KIND, INTEGER, RECIPROCAL, LOW, HIGH,
        AMAX_FLOOR, SCALE_FLOOR, BY, UE8M0,
    )  # fmt: skip
