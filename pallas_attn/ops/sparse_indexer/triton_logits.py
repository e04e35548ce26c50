"""The Triton kernels of the indexer's logits, sum_h w_h relu(q_h . k) * s: over contiguous keys and cached ones."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from pallas_attn.ops.sparse_indexer.triton_rows import stored_scale, value_places
from pallas_attn.runtime.triton_numbers import widen


@triton.jit
def query(
    q, weights, t, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KIND: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """(queries [HP, DP] of token t as the matrix unit takes them, their weights [HP]); heads that are none are 0."""
    h, d = tl.arange(0, HP), tl.arange(0, DP)
    row = t.to(tl.int64) * H + h
    x = tl.load(q + row[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
    return widen(x, KIND, OPERAND), tl.load(weights + row, mask=h < H, other=0.0)


@triton.jit
def scored(queries, weights, keys, k_scale, PRECISION: tl.constexpr):
    """Logits [BN] of one token's queries over keys [BN, DP]. Keys are the product's rows, so that heads are added up
    inside of a warp."""
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    return tl.sum(tl.maximum(s, 0.0) * weights[None, :], axis=1) * k_scale


@triton.jit
def put(out, z, t, n, start, WIDTH: tl.constexpr, COMPRESSED: tl.constexpr):
    """Store logits of the keys n where they belong in row t, if anywhere."""
    column = n - start if COMPRESSED else n
    tl.store(out + t.to(tl.int64) * WIDTH + column, z, mask=(column >= 0) & (column < WIDTH))


@triton.jit
def logits(
    q, weights, k, k_scale, starts, ends, out,
    T: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, COMPRESSED: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q_KIND: tl.constexpr, K_KIND: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """BT tokens over one tile of keys, which stay where they are; the last tokens come first. Where columns are
    compressed, tiles go on past the last key: column c of a row is key start + c."""
    pid = tl.program_id(0)
    first = (tl.num_programs(0) // TILES - 1 - pid // TILES) * BT
    n = pid % TILES * BN + tl.arange(0, BN)
    every, d = first + tl.arange(0, BT), tl.arange(0, DP)
    low = tl.min(tl.load(starts + every, mask=every < T, other=N), axis=0)
    high = tl.max(tl.load(ends + every, mask=every < T, other=0), axis=0)
    ok = (n >= low) & (n < high)
    tokens = tl.minimum(BT, T - first)
    if tl.max(ok.to(tl.int32), axis=0) > 0:
        keys = tl.load(k + n.to(tl.int64)[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        keys, scale = widen(keys, K_KIND, OPERAND), tl.load(k_scale + n, mask=ok, other=0.0)
        for i in tl.range(0, tokens):
            t = first + i
            start = tl.load(starts + t)
            queries, w = query(q, weights, t, H, HP, D, DP, Q_KIND, OPERAND)
            seen = (n >= start) & (n < tl.load(ends + t))
            z = tl.where(seen, scored(queries, w, keys, scale, PRECISION), float("-inf"))
            put(out, z, t, n, start, WIDTH, COMPRESSED)
    else:
        for i in tl.range(0, tokens):
            nothing = tl.full((BN,), float("-inf"), tl.float32)
            put(out, nothing, first + i, n, tl.load(starts + first + i), WIDTH, COMPRESSED)


@triton.jit
def cached_keys(
    cache, page, slot, ok, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr,
    SHUFFLED: tl.constexpr, EXPONENTS: tl.constexpr, KIND: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """(keys [BN, DP] as the matrix unit takes them, their scales [BN]) of slots in pages of PAGE bytes; zero where not
    ok. `IndexCache` says what lies where."""
    d = tl.arange(0, DP)
    codes = cache if KIND > 0 else cache.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    where = value_places(page, slot, d, D, PAGE, SHUFFLED)
    keys = tl.load(codes + where, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    scale = stored_scale(cache, page * PAGE + S * D + slot * 4, ok, EXPONENTS)
    return widen(keys, KIND, OPERAND), scale


@triton.jit
def paged_logits(
    q, weights, cache, page_table, seqs, counts, out,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    SHUFFLED: tl.constexpr, EXPONENTS: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q_KIND: tl.constexpr, K_KIND: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One token over some tiles of its sequence's keys. Tokens of a sequence are neighbours, so that all but the first
    find its keys in the L2 cache."""
    t, first = tl.program_id(0) % T, tl.program_id(0) // T * (TILES * BN)
    count, b = tl.load(counts + t), tl.load(seqs + t).to(tl.int64)
    queries, w = query(q, weights, t, H, HP, D, DP, Q_KIND, OPERAND)
    row = out + t.to(tl.int64) * WIDTH
    tiles = tl.minimum(tl.cdiv(tl.maximum(count - first, 0), BN), TILES)
    for i in tl.range(0, tiles):
        x = first + i * BN + tl.arange(0, BN)
        ok = x < count
        page = tl.load(page_table + b * M + tl.minimum(x // S, M - 1), mask=ok, other=0)
        page = tl.minimum(tl.maximum(page, 0), N - 1).to(tl.int64)
        keys, scale = cached_keys(cache, page, x % S, ok, D, DP, S, PAGE, SHUFFLED, EXPONENTS, K_KIND, OPERAND)
        z = tl.where(ok, scored(queries, w, keys, scale, PRECISION), float("-inf"))
        tl.store(row + x, z, mask=x < WIDTH)
    for i in tl.range(tiles, TILES):
        x = first + i * BN + tl.arange(0, BN)
        tl.store(row + x, tl.full((BN,), float("-inf"), tl.float32), mask=x < WIDTH)
