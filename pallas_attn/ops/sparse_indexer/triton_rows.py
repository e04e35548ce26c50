"""The Triton kernels that move index keys: into their pages, and out of them. `IndexCache` says what lies where."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from pallas_attn.runtime.triton_numbers import codes, found_scale

TILE = tl.constexpr(16)  # tokens and values of a tile of a shuffled page


@triton.jit
def value_places(page, slot, d, D: tl.constexpr, PAGE: tl.constexpr, SHUFFLED: tl.constexpr):
    """Bytes of the values d [rows, n] or [n] of rows at (page, slot in page), in pages of PAGE bytes; page is 64 bits
    wide."""
    if SHUFFLED:
        row, column = slot // TILE * (TILE * D) + slot % TILE * TILE, d // TILE * (TILE * TILE) + d % TILE
    else:
        row, column = slot * D, d
    return (page * PAGE + row)[:, None] + (column if len(d.shape) == 2 else column[None, :])


@triton.jit
def stored_scale(cache, at, ok, EXPONENTS: tl.constexpr):
    """The scales whose first bytes are at `at`, 0 where not ok."""
    if EXPONENTS:
        scale = (tl.load(cache + at, mask=ok, other=0).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(cache.to(tl.pointer_type(tl.float32), bitcast=True) + at // 4, mask=ok, other=0.0)
    return scale


@triton.jit
def write(
    k, slots, pages, out,
    T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, PAGE: tl.constexpr, SHUFFLED: tl.constexpr, EXPONENTS: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, INTEGER: tl.constexpr, RECIPROCAL: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    AMAX_FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr, BY: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """Some rows, each one token and group of values; a token without a slot inside the cache writes nothing. The
    output is the cache's own memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, g, i = row // G, row % G, tl.arange(0, GP)
    slot = tl.load(slots + t, mask=t < T, other=-1)
    ok = (slot >= 0) & (slot < N * S)
    page, slot = (slot // S).to(tl.int64), slot % S
    mask, d = ok[:, None] & (i < GROUP)[None, :], g[:, None] * GROUP + i[None, :]
    x = tl.load(k + t[:, None] * D + d, mask=mask, other=0.0).to(tl.float32)
    scale = found_scale(x, AMAX_FLOOR, SCALE_FLOOR, BY, HIGH, UE8M0)
    code = codes(x, scale, KIND, INTEGER, RECIPROCAL, LOW, HIGH)
    tl.store(out + value_places(page, slot, d, D, PAGE, SHUFFLED), code, mask=mask)
    at = page * PAGE + S * D + (slot * G + g) * 4
    if EXPONENTS:
        byte = ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
        four = tl.arange(0, 4)
        tl.store(out + at[:, None] + four[None, :], byte[:, None] + tl.zeros((1, 4), tl.uint8), mask=ok[:, None])
    else:
        tl.store(out.to(tl.pointer_type(tl.float32), bitcast=True) + at // 4, scale, mask=ok)


@triton.jit
def gather(
    pages, page_of, slot_of, real, out, scales,
    T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, S: tl.constexpr,
    PAGE: tl.constexpr, SHUFFLED: tl.constexpr, EXPONENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows, each one token and group of values; zeros with a scale of 1 where no token is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, g, i = row // G, row % G, tl.arange(0, GP)
    page, slot = tl.load(page_of + t, mask=t < T, other=0).to(tl.int64), tl.load(slot_of + t, mask=t < T, other=0)
    ok = tl.load(real + t, mask=t < T, other=0) != 0
    mask, d = (i < GROUP)[None, :] & (t < T)[:, None], g[:, None] * GROUP + i[None, :]
    x = tl.load(pages + value_places(page, slot, d, D, PAGE, SHUFFLED), mask=mask & ok[:, None], other=0)
    tl.store(out + t[:, None] * D + d, x, mask=mask)
    scale = stored_scale(pages, page * PAGE + S * D + (slot * G + g) * 4, ok, EXPONENTS)
    tl.store(scales + row, tl.where(ok, scale, 1.0), mask=t < T)
