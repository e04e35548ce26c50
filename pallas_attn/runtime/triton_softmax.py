"""What Triton kernels share: how rows of an attention end, whole or as parts that are merged."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from pallas_attn.runtime.triton_numbers import as_bytes, to_code

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded(x, scale, KIND: tl.constexpr, RECIPROCAL: tl.constexpr, HIGH: tl.constexpr):
    """The one rounding of an FP8 result."""
    s = tl.load(scale)
    x = x * tl.div_rn(1.0, s) if RECIPROCAL else tl.div_rn(x, tl.zeros_like(x) + s)
    return to_code(x, KIND, False, -HIGH, HIGH)


@triton.jit
def put(
    out, lse, acc, top, total, at, d_ok, row, row_ok, out_scale,
    OUT_KIND: tl.constexpr, OUT_RECIPROCAL: tl.constexpr, OUT_HIGH: tl.constexpr,
):  # fmt: skip
    """Divide, round and store rows of the result; `top` is the base-2 maximum, `total` the sum."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    acc = acc / safe[:, None]
    mask = row_ok[:, None] & d_ok[None, :]
    if OUT_KIND == 0:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(as_bytes(out) + at, rounded(acc, out_scale, OUT_KIND, OUT_RECIPROCAL, OUT_HIGH), mask=mask)
    tl.store(lse + row, tl.where(some, (top + tl.log2(safe)) / LOG2E, float("-inf")), mask=row_ok)


@triton.jit
def merge(
    partial, stats, out_scale, out, lse,
    T: tl.constexpr, H: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr,
    OUT_KIND: tl.constexpr, OUT_RECIPROCAL: tl.constexpr, OUT_HIGH: tl.constexpr,
):  # fmt: skip
    """The partial results of one row added up, in a fixed order."""
    row = tl.program_id(0)
    i, dv = tl.arange(0, SPLITS_P), tl.arange(0, DVP)
    at = row + i * (T * H)
    tops = tl.load(stats + at, mask=i < SPLITS, other=float("-inf"))
    totals = tl.load(stats + SPLITS * T * H + at, mask=i < SPLITS, other=0.0)
    some = totals > 0
    top = tl.max(tl.where(some, tops, float("-inf")), axis=0)
    weight = tl.where(some, tl.exp2(tops - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    where = at.to(tl.int64)[:, None] * DV + dv[None, :]
    parts = tl.load(partial + where, mask=some[:, None] & (dv < DV)[None, :], other=0.0)
    acc = tl.sum(parts * weight[:, None], axis=0)
    one = tl.arange(0, 1)
    total = tl.sum(totals * weight, axis=0) + one.to(tl.float32)
    row = row + one
    put(
        out, lse, acc[None, :], top + one, total, row.to(tl.int64)[:, None] * DV + dv[None, :], dv < DV, row, row >= 0,
        out_scale, OUT_KIND, OUT_RECIPROCAL, OUT_HIGH,
    )  # fmt: skip
