"""The Triton kernels of paged attention: a block of query rows against the keys of its sequence, and the merge.

Absent arguments are a pointer that is not followed. Sizes, strides and flags are compile-time constants; what the
device alone knows is clamped.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from pallas_attn.runtime.triton_batch import find, start_of
from pallas_attn.runtime.triton_numbers import widen
from pallas_attn.runtime.triton_softmax import LOG2E, put


@triton.jit
def load(pointers, mask):
    """What the pointers show, zero where the mask, if there is one, is off."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def seen_by(
    q_pos, x, kv_len, causal, b, window, ranges, prefix_lens, prefix_window,
    WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, SYMMETRIC: tl.constexpr, RANGES: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Which keys x [BN] each row sees, bool [BM, BN]: `terms.visible` once more."""
    q, k = q_pos[:, None], x[None, :]
    seen = (k <= q) | (causal == 0)
    if WINDOW == 1:
        inside = q - k < window
        if SYMMETRIC:
            inside = inside & ((causal != 0) | (k - q < window))
        seen = seen & (inside | (window <= 0))
    if WINDOW == 2:
        chunk = tl.maximum(window // (LOOKBACK + 1), 1)
        seen = seen & ((q // chunk - k // chunk <= LOOKBACK) | (window <= 0))
    if WINDOW == 3:
        seen = seen & ((k < tl.load(prefix_lens + b)) | (q - k < tl.load(prefix_window)))
    for r in tl.static_range(RANGES):
        first, last = tl.load(ranges + (b * RANGES + r) * 2), tl.load(ranges + (b * RANGES + r) * 2 + 1)
        together = (first < last) & (q >= first) & (q <= last) & (k >= first) & (k <= last)
        if CLAMP:
            together = together & ((q - k < window) | (window <= 0))
        seen = seen | together
    return seen & (k < kv_len)


@triton.jit
def tiles_of(
    low_pos, high_pos, kv_len, causal, window, split,
    WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, RANGES: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(first, last) tile of a share of the keys that any row between two positions sees, and of those in it that all
    see, as far as causality and a sliding window tell."""
    low, high = tl.full((), 0, tl.int32), kv_len
    full_low, full_high = low, kv_len
    if RANGES == 0:
        high = tl.where(causal != 0, tl.minimum(high, tl.maximum(high_pos + 1, 0)), high)
        full_high = tl.where(causal != 0, tl.minimum(kv_len, tl.maximum(low_pos + 1, 0)), kv_len)
        if WINDOW == 1:
            low = tl.where(window > 0, tl.maximum(low_pos - window + 1, 0), 0)
            full_low = tl.where(window > 0, tl.maximum(high_pos - window + 1, 0), 0)
        if WINDOW == 2:
            chunk = tl.maximum(window // (LOOKBACK + 1), 1)
            low = tl.where(window > 0, tl.maximum((tl.maximum(low_pos, 0) // chunk - LOOKBACK) * chunk, 0), 0)
    tile0, tile1 = low // BN, tl.cdiv(high, BN)
    each = tl.cdiv(tl.maximum(tile1 - tile0, 0), SPLITS)
    tile0 = tile0 + split * each
    tile1 = tl.maximum(tl.minimum(tile0 + each, tile1), tile0)
    full0 = tl.minimum(tl.maximum(tl.cdiv(full_low, BN), tile0), tile1)
    full1 = tl.minimum(tl.maximum(full_high // BN, full0), tile1)
    return tile0, tile1, full0, full1


@triton.jit
def biased(
    s, q_pos, x, context, head, row_ok, slopes, query_query,
    ALIBI: tl.constexpr, QQ: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr,
):  # fmt: skip
    """The logits with ALiBi (1, or 2: of the square root) and the query-query bias added."""
    if ALIBI > 0:
        slope = tl.load(slopes + head, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        if ALIBI == 1:
            s += slope * (x - context).to(tl.float32)[None, :]
        else:
            s -= slope * tl.sqrt(tl.maximum(q_pos[:, None] - x[None, :], 0).to(tl.float32))
    if QQ:
        row, column = (q_pos - context)[:, None], (x - context)[None, :]
        inside = (row >= 0) & (row < Q0) & (column >= 0) & (column < Q1) & row_ok[:, None]
        s += tl.load(query_query + row * Q1 + column, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def query_rows(
    q, q_scale, scale, k_scale, b, kv_head, token, head, row_ok,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q_SCALE: tl.constexpr, Q_KIND: tl.constexpr,
    KV_SCALE: tl.constexpr, OPERAND: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The rows of queries as the matrix unit takes them, and what turns each row's products to logits."""
    d = tl.arange(0, DP)
    at = (token.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    rows = tl.load(q + at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    factor = tl.load(scale) + tl.zeros_like(token).to(tl.float32)
    if Q_SCALE == 1:
        factor *= tl.load(q_scale)
    if Q_SCALE == 2:
        factor *= tl.load(q_scale + head, mask=row_ok, other=0.0)
    if Q_SCALE == 3:
        factor *= tl.load(q_scale + token * H + head, mask=row_ok, other=0.0)
    factor *= stored_scale(k_scale, b, kv_head, K, KV_SCALE)
    if NORMALIZE:  # f16 has fewer exponents than the query
        wide = rows.to(tl.float32)
        peak = tl.max(tl.abs(wide), axis=1)
        peak = tl.where(peak > 0, peak, 1.0)
        rows, factor = wide / peak[:, None], factor * peak
    return widen(rows, Q_KIND, OPERAND), factor


@triton.jit
def stored_scale(scale, b, kv_head, K: tl.constexpr, KV_SCALE: tl.constexpr):
    """The scale of keys or values where it is one for the block: per tensor, head, or sequence and head."""
    found = tl.full((), 1.0, tl.float32)
    if KV_SCALE == 1:
        found = tl.load(scale)
    if KV_SCALE == 2:
        found = tl.load(scale + kv_head)
    if KV_SCALE == 3:
        found = tl.load(scale + b * K + kv_head)
    return found


@triton.jit
def attend(
    q, q_scale, k, v, k_scale, v_scale, page_table, kv_lens, cu_q_lens, num_seqs, scale, soft_cap, window, causals,
    ranges, prefix_lens, prefix_window, slopes, query_query, sinks, out_scale, out, stats,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    K_PAGE: tl.constexpr, K_HEAD: tl.constexpr, K_SLOT: tl.constexpr, K_BLOCK: tl.constexpr, K_BLOCKS: tl.constexpr,
    V_PAGE: tl.constexpr, V_HEAD: tl.constexpr, V_SLOT: tl.constexpr, V_BLOCK: tl.constexpr, V_BLOCKS: tl.constexpr,
    V_DIM: tl.constexpr, V_BASE: tl.constexpr, HEAD_MAJOR: tl.constexpr,
    Q_SCALE: tl.constexpr, Q_KIND: tl.constexpr, KV_SCALE: tl.constexpr, KV_KIND: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, SYMMETRIC: tl.constexpr,
    RANGES: tl.constexpr, CLAMP: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, QQ: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, BEFORE_CAP: tl.constexpr, SINKS: tl.constexpr,
    OUT_KIND: tl.constexpr, OUT_RECIPROCAL: tl.constexpr, OUT_HIGH: tl.constexpr,
    BM: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One block of query rows (BQ tokens, the heads of a kv head each) against one share of its sequence's keys.

    The last blocks, which see most, come first. Tiles of keys that all rows see need no mask; the others come after.
    """
    G: tl.constexpr = H // K
    pid = tl.program_id(0)
    kv_head, split, block = pid % K, (pid // K) % SPLITS, tl.num_programs(0) // (K * SPLITS) - 1 - pid // (K * SPLITS)
    live = tl.minimum(tl.maximum(tl.load(num_seqs), 0), B)
    segment = find(cu_q_lens, live, block, T, B, 1, BQ, CHUNK)
    start, end = (start_of(cu_q_lens, live, segment, T, B), start_of(cu_q_lens, live, segment + 1, T, B))
    first = start + (block - start // BQ - segment) * BQ
    if (first >= end) | (first < start):
        return
    # The rows, and where they stand in their sequence; tokens of none have no keys.
    m = tl.arange(0, BM)
    token, head = first + m // G, kv_head * G + m % G
    row_ok = (token < end) & (m < BQ * G)
    real = (segment > 0) & (segment <= live)
    b = tl.where(real, segment - 1, 0)
    length = tl.load(kv_lens + b)
    kv_len = tl.where(real, tl.minimum(tl.maximum(length, 0), M * S), 0)
    context = length - (end - start)
    q_pos = context + (token - start)
    causal = tl.load(causals + b).to(tl.int32) if CAUSAL == 2 else tl.full((), CAUSAL, tl.int32)
    w = tl.load(window) if WINDOW == 1 or WINDOW == 2 or CLAMP else 0
    low_pos, high_pos = context + first - start, context + tl.minimum(first + BQ, end) - 1 - start
    tile0, tile1, full0, full1 = tiles_of(
        low_pos, high_pos, kv_len, causal, w, split, WINDOW, LOOKBACK, RANGES, BN, SPLITS
    )
    PLAIN: tl.constexpr = CAUSAL < 2 and WINDOW < 2 and RANGES == 0 and (WINDOW == 0 or CAUSAL == 1)
    rows, factor = query_rows(
        q, q_scale, scale, k_scale, b, kv_head, token, head, row_ok,
        H, K, D, DP, Q_SCALE, Q_KIND, KV_SCALE, OPERAND, NORMALIZE,
    )  # fmt: skip
    LATER: tl.constexpr = CAP or ALIBI > 0 or QQ  # logits of base 2 unless something is to be added to natural ones
    if not LATER:
        factor *= LOG2E
    top = tl.full((BM,), float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=row_ok, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.where(real & (split == 0), sink, top)
    total = tl.where(top > float("-inf"), 1.0, 0.0)
    acc = tl.zeros((BM, DVP), tl.float32)
    n, d, dv = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    k_dim = d if K_BLOCK == 0 else (d // K_BLOCK) * K_BLOCKS + d % K_BLOCK
    for masked in tl.static_range(0 if PLAIN else 1, 2):
        left = full0 - tile0 if PLAIN else tile1 - tile0
        count = full1 - full0
        if masked:
            count = left + tile1 - full1 if PLAIN else left
        for i in tl.range(0, count):
            tile = tl.where(i < left, tile0 + i, full1 + i - left) if masked else full0 + i
            x = tile * BN + n
            column = tl.minimum(x // S, M - 1)
            page = tl.load(page_table + b.to(tl.int64) * M + column)
            page, slot = tl.minimum(tl.maximum(page, 0), N - 1).to(tl.int64), x % S
            k_at = page * K_PAGE + kv_head * K_HEAD + slot * K_SLOT
            v_at = page * V_PAGE + kv_head * V_HEAD + V_BASE
            v_at += slot * V_SLOT if V_BLOCK == 0 else (slot // V_BLOCK) * V_BLOCKS + slot % V_BLOCK
            if masked:
                seen = seen_by(
                    q_pos, x, kv_len, causal, b, w, ranges, prefix_lens, prefix_window,
                    WINDOW, LOOKBACK, SYMMETRIC, RANGES, CLAMP,
                )  # fmt: skip
                seen &= row_ok[:, None]
                any_row = tl.max(seen.to(tl.int32), axis=0) > 0
                k_mask, v_mask = any_row[:, None] & (d < D)[None, :], any_row[:, None] & (dv < DV)[None, :]
            else:
                any_row = None
                k_mask = None if D == DP else (d < D)[None, :] & (n >= 0)[:, None]
                v_mask = None if DV == DVP else (dv < DV)[None, :] & (n >= 0)[:, None]
            keys = load(k + k_at[:, None] + k_dim[None, :], k_mask)
            values = load(v + v_at[:, None] + dv[None, :] * V_DIM, v_mask)
            keys = tl.trans(widen(keys, KV_KIND, OPERAND))
            s = tl.dot(rows, keys, input_precision=PRECISION) * factor[:, None]
            if KV_SCALE == 4:
                at = page * (S * K) + (kv_head * S + slot if HEAD_MAJOR else slot * K + kv_head)
                s *= load(k_scale + at, any_row)[None, :]
            if BEFORE_CAP:
                s = biased(s, q_pos, x, context, head, row_ok, slopes, query_query, ALIBI, QQ, Q0, Q1)
            if CAP:
                limit = tl.load(soft_cap)
                cap = tl.where(limit > 0, limit, 1.0)
                s = tl.where(limit > 0, cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / cap)) + 1.0)), s)
            if not BEFORE_CAP:
                s = biased(s, q_pos, x, context, head, row_ok, slopes, query_query, ALIBI, QQ, Q0, Q1)
            if LATER:
                s *= LOG2E
            if masked:
                s = tl.where(seen, s, float("-inf"))
            peak = tl.maximum(top, tl.max(s, axis=1))
            shift = tl.where(peak > float("-inf"), peak, 0.0) if masked else peak
            p = tl.exp2(s - shift[:, None])
            keep = tl.exp2(top - shift)
            total = total * keep + tl.sum(p, axis=1)
            top = peak
            if KV_SCALE == 4:
                p *= load(v_scale + at, any_row)[None, :]
            values = widen(values, KV_KIND, WIDE)
            acc = tl.dot(p.to(WIDE), values, acc * keep[:, None], input_precision=PRECISION)
    acc *= stored_scale(v_scale, b, kv_head, K, KV_SCALE)
    row = token * H + head
    if SPLITS == 1:
        at = row.to(tl.int64)[:, None] * DV + dv[None, :]
        put(out, stats, acc, top, total, at, dv < DV, row, row_ok, out_scale, OUT_KIND, OUT_RECIPROCAL, OUT_HIGH)
    else:
        row += split * (T * H)
        at = row.to(tl.int64)[:, None] * DV + dv[None, :]
        tl.store(out + at, acc, mask=row_ok[:, None] & (dv < DV)[None, :])
        tl.store(stats + row, top, mask=row_ok)
        tl.store(stats + SPLITS * T * H + row, total, mask=row_ok)
