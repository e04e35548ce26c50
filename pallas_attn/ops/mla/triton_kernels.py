"""The Triton kernels of MLA: some query rows, each a token and head, against the rows of its sequence's cache, or
against those that its token lists.

A row of the cache is loaded once, its latent being key and value. Absent arguments are a pointer that is not followed;
what the device alone knows is clamped.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from pallas_attn.runtime.triton_batch import find, start_of
from pallas_attn.runtime.triton_numbers import widen
from pallas_attn.runtime.triton_softmax import LOG2E, put


@triton.jit
def query_rows(
    q, q_scale, row, row_ok, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALE: tl.constexpr,
    KIND: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """(one part of some query rows as the matrix unit takes it, the scale of each)."""
    d = tl.arange(0, DP)
    x = tl.load(q + row.to(tl.int64)[:, None] * D + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    factor = tl.zeros_like(row).to(tl.float32) + 1.0
    if SCALE == 1:
        factor *= tl.load(q_scale)
    if SCALE == 2:
        factor *= tl.load(q_scale + row % H, mask=row_ok, other=0.0)
    if SCALE == 3:
        factor *= tl.load(q_scale + row, mask=row_ok, other=0.0)
    return widen(x, KIND, OPERAND), factor


@triton.jit
def cached_rows(
    cache, slot, ok, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, PARTS: tl.constexpr,
    KIND: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """(latents [BN, CP], rotary parts [BN, RP]) in some slots of the cache, zero where not ok. With PARTS, a row is
    bytes: codes, as many float32 scales as there are PARTS of the latent, and bf16 rotary parts."""
    n: tl.constexpr = slot.shape[0]
    c, r = tl.arange(0, CP), tl.arange(0, RP)
    rope_ok = ok[:, None] & (r < R)[None, :]
    if PARTS == 0:
        at = slot * (C + R)
        latent = tl.load(cache + at[:, None] + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        rope = tl.load(cache + (at + C)[:, None] + r[None, :], mask=rope_ok, other=0.0)
        latent, rope = widen(latent, KIND, OPERAND), widen(rope, KIND, OPERAND)
    else:
        BYTES: tl.constexpr = C + 4 * PARTS + 2 * R
        part, i = tl.arange(0, PARTS), tl.arange(0, C // PARTS)
        codes = cache if KIND > 0 else cache.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        where = (slot * BYTES)[:, None, None] + (part * (C // PARTS))[None, :, None] + i[None, None, :]
        x = widen(tl.load(codes + where, mask=ok[:, None, None], other=0.0), KIND, tl.float32)
        scales = cache.to(tl.pointer_type(tl.float32), bitcast=True)
        where = (slot * (BYTES // 4) + C // 4)[:, None] + part[None, :]
        scale = tl.load(scales + where, mask=ok[:, None], other=0.0)
        latent = tl.reshape((x * scale[:, :, None]).to(OPERAND), (n, CP))
        ropes = cache.to(tl.pointer_type(tl.bfloat16), bitcast=True)
        where = (slot * (BYTES // 2) + C // 2 + 2 * PARTS)[:, None] + r[None, :]
        rope = tl.load(ropes + where, mask=rope_ok, other=0.0).to(OPERAND)
    return latent, rope


@triton.jit
def attended(latent, rope, keys, key_ropes, by_latent, by_rope, seen, top, total, acc):
    """The running (base-2 maximum, sum, weighted latents) of some rows after one more tile of keys."""
    s = tl.dot(latent, tl.trans(keys)) * by_latent[:, None]
    s += tl.dot(rope, tl.trans(key_ropes)) * by_rope[:, None]
    s = tl.where(seen, s, float("-inf"))
    peak = tl.maximum(top, tl.max(s, axis=1))
    shift = tl.where(peak > float("-inf"), peak, 0.0)
    p, keep = tl.exp2(s - shift[:, None]), tl.exp2(top - shift)
    acc = tl.dot(p.to(keys.dtype), keys, acc * keep[:, None])
    return peak, total * keep + tl.sum(p, axis=1), acc


@triton.jit
def give(
    out, stats, acc, top, total, row, row_ok, split, out_scale,
    TH: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SPLITS: tl.constexpr,
    OUT_KIND: tl.constexpr, OUT_RECIPROCAL: tl.constexpr, OUT_HIGH: tl.constexpr,
):  # fmt: skip
    """Store rows of the result, or of one of its parts for `merge`."""
    c = tl.arange(0, CP)
    if SPLITS == 1:
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        put(out, stats, acc, top, total, at, c < C, row, row_ok, out_scale, OUT_KIND, OUT_RECIPROCAL, OUT_HIGH)
    else:
        at = row.to(tl.int64) + split.to(tl.int64) * TH
        tl.store(out + at[:, None] * C + c[None, :], acc, mask=row_ok[:, None] & (c < C)[None, :])
        tl.store(stats + at, top, mask=row_ok)
        tl.store(stats + at + SPLITS * TH, total, mask=row_ok)


@triton.jit
def attend(
    q_latent, q_rope, latent_scale, rope_scale, cache, cache_scale, page_table, scale, out_scale, kv_lens, cu_q_lens,
    num_seqs, out, stats,
    T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, Q_SCALE: tl.constexpr,
    Q_KIND: tl.constexpr, KV_SCALE: tl.constexpr, KV_KIND: tl.constexpr, OPERAND: tl.constexpr,
    OUT_KIND: tl.constexpr, OUT_RECIPROCAL: tl.constexpr, OUT_HIGH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BM query rows of one sequence against a share of the keys that any of them sees. The last rows, which see most,
    come first; what stands before the first sequence and after the last is a sequence without keys."""
    pid = tl.program_id(0)
    blocks = tl.num_programs(0) // SPLITS
    block, split = blocks - 1 - pid % blocks, pid // blocks
    live = tl.minimum(tl.maximum(tl.load(num_seqs), 0), B)
    segment = find(cu_q_lens, live, block, T, B, H, BM, CHUNK)
    start, end = start_of(cu_q_lens, live, segment, T, B), start_of(cu_q_lens, live, segment + 1, T, B)
    first = start * H + (block - start * H // BM - segment) * BM
    if (first >= end * H) | (first < start * H):
        return
    row = first + tl.arange(0, BM)
    row_ok = row < end * H
    real = (segment > 0) & (segment <= live)
    b = tl.where(real, segment - 1, 0)
    length = tl.load(kv_lens + b)
    kv_len = tl.where(real, tl.minimum(tl.maximum(length, 0), M * S), 0)
    context = length - (end - start)
    position = context + row // H - start
    last = context + (tl.minimum(first + BM, end * H) - 1) // H - start
    latent, by_latent = query_rows(q_latent, latent_scale, row, row_ok, H, C, CP, Q_SCALE, Q_KIND, OPERAND)
    rope, by_rope = query_rows(q_rope, rope_scale, row, row_ok, H, R, RP, Q_SCALE, Q_KIND, OPERAND)
    value_scale = tl.load(cache_scale) if KV_SCALE else 1.0
    factor = tl.load(scale) * value_scale * LOG2E
    by_latent, by_rope = by_latent * factor, by_rope * factor
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, CP), tl.float32)
    tiles = tl.cdiv(tl.minimum(kv_len, tl.maximum(last + 1, 0)), BN)
    each = tl.cdiv(tiles, SPLITS)
    for tile in tl.range(split * each, tl.minimum((split + 1) * each, tiles)):
        x = tile * BN + tl.arange(0, BN)
        page = tl.load(page_table + b.to(tl.int64) * M + tl.minimum(x // S, M - 1))
        slot = tl.minimum(tl.maximum(page, 0), N - 1).to(tl.int64) * S + x % S
        ok = (x < kv_len) & (x <= last)
        keys, key_ropes = cached_rows(cache, slot, ok, C, R, CP, RP, PARTS, KV_KIND, OPERAND)
        seen = (x[None, :] <= position[:, None]) & ok[None, :]
        top, total, acc = attended(
            latent, rope, keys, key_ropes, by_latent, by_rope, seen, top, total, acc
        )  # fmt: skip
    acc *= value_scale
    give(
        out, stats, acc, top, total, row, row_ok, split, out_scale, T * H, C, CP, SPLITS,
        OUT_KIND, OUT_RECIPROCAL, OUT_HIGH,
    )  # fmt: skip


@triton.jit
def attend_listed(
    q_latent, q_rope, latent_scale, rope_scale, cache, cache_scale, page_table, scale, out_scale, indices, counts, seqs,
    lens, out, stats,
    T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, Q_SCALE: tl.constexpr,
    Q_KIND: tl.constexpr, KV_SCALE: tl.constexpr, KV_KIND: tl.constexpr, OPERAND: tl.constexpr,
    OUT_KIND: tl.constexpr, OUT_RECIPROCAL: tl.constexpr, OUT_HIGH: tl.constexpr,
    KEYS: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """BM heads of one token against a share of the keys that it lists: slots, or positions in its sequence."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (H + BM - 1) // BM
    t, split = pid // (BLOCKS * SPLITS), pid // BLOCKS % SPLITS
    head = pid % BLOCKS * BM + tl.arange(0, BM)
    row, row_ok = t * H + head, head < H
    count, b, kv_len = tl.load(counts + t), tl.load(seqs + t).to(tl.int64), tl.load(lens + t)
    latent, by_latent = query_rows(q_latent, latent_scale, row, row_ok, H, C, CP, Q_SCALE, Q_KIND, OPERAND)
    rope, by_rope = query_rows(q_rope, rope_scale, row, row_ok, H, R, RP, Q_SCALE, Q_KIND, OPERAND)
    value_scale = tl.load(cache_scale) if KV_SCALE else 1.0
    factor = tl.load(scale) * value_scale * LOG2E
    by_latent, by_rope = by_latent * factor, by_rope * factor
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, CP), tl.float32)
    tiles = tl.cdiv(count, BN)
    each = tl.cdiv(tiles, SPLITS)
    for tile in tl.range(split * each, tl.minimum((split + 1) * each, tiles)):
        i = tile * BN + tl.arange(0, BN)
        x = tl.load(indices + t.to(tl.int64) * KEYS + i, mask=i < count, other=-1)
        if SLOTS:
            ok = (x >= 0) & (x < N * S)
            slot = tl.where(ok, x, 0).to(tl.int64)
        else:
            ok = (x >= 0) & (x < kv_len)
            x = tl.where(ok, x, 0)
            page = tl.load(page_table + b * M + x // S, mask=ok, other=0)
            slot = tl.minimum(tl.maximum(page, 0), N - 1).to(tl.int64) * S + x % S
        keys, key_ropes = cached_rows(cache, slot, ok, C, R, CP, RP, PARTS, KV_KIND, OPERAND)
        top, total, acc = attended(
            latent, rope, keys, key_ropes, by_latent, by_rope, ok[None, :], top, total, acc
        )  # fmt: skip
    acc *= value_scale
    give(
        out, stats, acc, top, total, row, row_ok, split, out_scale, T * H, C, CP, SPLITS,
        OUT_KIND, OUT_RECIPROCAL, OUT_HIGH,
    )  # fmt: skip
