"""Paged attention and its cache write in float64 numpy: what "correct" means, written without the library.

Dims: T tokens, H query heads, K kv heads, D head dim (DV of values), B sequences, N pages, S page size.
Caches here are logical, [N, S, K, D], whatever their layout; `store` lays them out.
"""

import ml_dtypes
import numpy as np

BF16, F16, F32, INT8 = ml_dtypes.bfloat16, np.float16, np.float32, np.int8
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
QMAX = {E4M3: np.float32(448), E5M2: np.float32(57344), INT8: np.float32(127)}


# ---------------------------------------------------------------- attention


def visible(
    q_pos, k_pos, b, *, causal=True, window=None, symmetric=True, chunk_lookback=None,
    prefix_ranges=None, clamp_prefix=False, rswa=None,
):  # fmt: skip
    """bool [rows, keys]: (causal AND locality) OR prefix ranges."""
    ahead = k_pos[None, :] - q_pos[:, None]
    is_causal = bool(causal if np.ndim(causal) == 0 else causal[b])
    seen = ahead <= 0 if is_causal else np.ones_like(ahead, bool)
    if rswa is not None:
        seen &= (k_pos < rswa[0][b])[None, :] | (-ahead < rswa[1])
    elif window is not None and chunk_lookback is not None:
        chunk = window // (chunk_lookback + 1)
        seen &= (q_pos // chunk)[:, None] - (k_pos // chunk)[None, :] <= chunk_lookback
    elif window is not None:
        seen &= -ahead < window
        if symmetric and not is_causal:
            seen &= ahead < window
    for first, last in [] if prefix_ranges is None else prefix_ranges[b]:
        if first >= last:
            continue
        inside = ((first <= q_pos) & (q_pos <= last))[:, None] & ((first <= k_pos) & (k_pos <= last))[None, :]
        seen |= inside & (-ahead < window) if clamp_prefix and window is not None else inside
    return seen


def bias_of(rows, k_pos, context, alibi_slopes, alibi_sqrt, query_query):
    """float64 [H or 1, rows, keys]."""
    bias = np.zeros((1, len(rows), len(k_pos)))
    if alibi_slopes is not None:
        distance = (k_pos - context)[None, :] + 0.0 * rows[:, None]
        if alibi_sqrt:
            distance = -np.sqrt(np.maximum(context + rows[:, None] - k_pos[None, :], 0))
        bias = bias + np.asarray(alibi_slopes, np.float64)[:, None, None] * distance
    if query_query is not None:
        column = k_pos - context
        inside = (column >= 0) & (column < query_query.shape[1])
        table = np.asarray(query_query, np.float64)[rows]
        bias = bias + np.where(inside, table[:, np.clip(column, 0, query_query.shape[1] - 1)], 0)
    return bias


def gather(pages, scale, page_ids, offsets, b):
    """float64 [keys, K, D]: stored values times their scale, which is [], [K], [B, K] or [N, S, K]."""
    values = pages[page_ids, offsets].astype(np.float64)
    if scale is None:
        return values
    scale = np.asarray(scale, np.float64)
    if scale.ndim == 3:
        return values * scale[page_ids, offsets][..., None]
    return values * (scale[b] if scale.ndim == 2 else scale)[..., None]


def attention(
    q, k, v, page_table, kv_lens, cu_q_lens, num_seqs=None, *, scale=None, q_scale=None, k_scale=None, v_scale=None,
    alibi_slopes=None, alibi_sqrt=False, query_query=None, before_soft_cap=False, soft_cap=None, sinks=None, **mask,
):  # fmt: skip
    """(out [T, H, DV], lse [T, H]), float64. q [T, H, D]; q_scale [], [H] or [T, H]; `mask` as `visible` takes it."""
    (tokens, heads, dim), (_, page_size, kv_heads, _) = q.shape, k.shape
    scale = dim**-0.5 if scale is None else float(scale)
    query = q.astype(np.float64) * (1 if q_scale is None else np.asarray(q_scale, np.float64)[..., None])
    out, lse = np.zeros((tokens, heads, v.shape[-1])), np.full((tokens, heads), -np.inf)
    for b in range(len(kv_lens) if num_seqs is None else int(num_seqs)):
        start, end, length = int(cu_q_lens[b]), int(cu_q_lens[b + 1]), int(kv_lens[b])
        rows, k_pos, context = np.arange(end - start), np.arange(length), length - (end - start)
        where = page_table[b, k_pos // page_size], k_pos % page_size
        keys = gather(k, k_scale, *where, b).repeat(heads // kv_heads, axis=1)
        values = gather(v, v_scale, *where, b).repeat(heads // kv_heads, axis=1)
        logits = scale * np.einsum("nhd,lhd->hnl", query[start:end], keys)
        bias = bias_of(rows, k_pos, context, alibi_slopes, alibi_sqrt, query_query)
        logits = logits + bias if before_soft_cap else logits
        logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
        logits = logits if before_soft_cap else logits + bias
        logits = np.where(visible(context + rows, k_pos, b, **mask), logits, -np.inf)
        sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
        top = np.maximum(logits.max(-1, initial=-np.inf), sink[:, None])
        shift = np.where(np.isfinite(top), top, 0)
        p = np.exp(logits - shift[..., None])
        mass = p.sum(-1) + np.exp(sink[:, None] - shift)
        with np.errstate(divide="ignore"):
            lse[start:end] = (shift + np.log(mass)).T
        out[start:end] = np.einsum("hnl,lhd->nhd", p / np.where(mass > 0, mass, 1)[..., None], values)
    return out, lse


# ---------------------------------------------------------------- quantisers: float32 in, (codes, float32 scale) out


def to_fp8(y, dtype):
    """Saturating round to nearest even."""
    return np.clip(y, -QMAX[dtype], QMAX[dtype]).astype(dtype)


def round_half_away(y):
    return np.trunc(np.clip(y + np.copysign(np.float32(0.5), y), -128, 127)).astype(INT8)


def per_tensor(x, scale, dtype):
    """Also per head: the scale broadcasts against x [..., D] after its last axis is dropped."""
    return to_fp8(x / np.asarray(scale, np.float32)[..., None], dtype)


def static(x, scale, dtype=E4M3):
    return to_fp8(x * (np.float32(1) / np.float32(scale)), dtype)


def per_token_head(x, dtype):
    scale = np.maximum(np.abs(x).max(-1) * (np.float32(1) / QMAX[dtype]), np.float32(1e-6))
    y = x * (np.float32(1) / scale)[..., None]
    return (round_half_away(y) if dtype == INT8 else to_fp8(y, dtype)), scale


def power_of_two_above(scale):
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)


def per_group(x, group, ue8m0=False):
    groups = x.reshape(*x.shape[:-1], -1, group)
    scale = np.maximum(np.abs(groups).max(-1), np.float32(1e-10)) / QMAX[E4M3]
    scale = power_of_two_above(np.maximum(scale, np.float32(1e-10))) if ue8m0 else scale
    return to_fp8(groups * (np.float32(1) / scale)[..., None], E4M3).reshape(x.shape), scale


def index_key(x):
    """One power-of-two scale per row of 128, amax floored before the division."""
    scale = power_of_two_above(np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-4)) / QMAX[E4M3])
    return to_fp8(x / scale, E4M3), scale


def ds_mla(x):
    """One power-of-two scale per tile of 128, floored after the division."""
    tiles = x.reshape(*x.shape[:-1], -1, 128)
    scale = power_of_two_above(np.maximum(np.abs(tiles).max(-1) / QMAX[E4M3], np.float32(1e-4)))
    return to_fp8(tiles / scale[..., None], E4M3).reshape(x.shape), scale


def quantise(x, dtype, granularity, scale=None):
    """(codes, scale) of keys or values [..., K, D] for a cache."""
    x = np.asarray(x, np.float32)
    if granularity == "none":
        with np.errstate(over="ignore"):  # float16 overflows to infinity
            return x.astype(dtype), None
    if granularity == "token_head":
        return per_token_head(x, dtype)
    return per_tensor(x, scale, dtype), scale


# ---------------------------------------------------------------- cache write and layouts


def write(pages, rows, slots):
    """A copy of pages [N, S, ...] with rows[t] at slot t; slots outside the cache are dropped."""
    pages = pages.copy()
    count, page_size = pages.shape[:2]
    for row, slot in zip(rows, slots, strict=False):
        if 0 <= slot < count * page_size:
            pages[slot // page_size, slot % page_size] = row
    return pages


def address(layout, part, page, slot, head, d, S, K, D, x):
    """Element index of one stored number; part is 0 for K and 1 for V; x elements fill 16 bytes."""
    match layout, part:
        case "NHD", _:
            return ((page * S + slot) * K + head) * D + d
        case "HND", _:
            return ((page * K + head) * S + slot) * D + d
        case "INTERLEAVED", _:
            return ((page * S + slot) * 2 * K + 2 * head + part) * D + d
        case "PACKED", _:
            return ((page * K + head) * S + slot) * 2 * D + part * D + d
        case "SHUFFLE", 0:
            return page * K * S * D + head * S * D + (d // x) * S * x + slot * x + d % x
        case "SHUFFLE", 1:
            return page * K * S * D + head * S * D + (slot // x) * D * x + d * x + slot % x
    raise ValueError(layout)


def shapes(layout, N, S, K, D, DV, x):
    """Buffer shapes of K and V (V's is None where one buffer holds both)."""
    return {
        "NHD": ((N, S, K, D), (N, S, K, DV)),
        "HND": ((N, K, S, D), (N, K, S, DV)),
        "INTERLEAVED": ((N, S, 2 * K, D), None),
        "PACKED": ((N, K, S, 2 * D), None),
        "SHUFFLE": ((N, K, D // x, S, x), (N, K, S // x, DV, x)),
    }[layout]


def can_hold(layout, S, D, DV, itemsize):
    x = 16 // itemsize
    if layout == "SHUFFLE":
        return S % x == 0 and D % x == 0
    return D == DV or layout in ("NHD", "HND")


def store(k, v, layout):
    """Buffers (k, v) of a logical cache; v is None where one buffer holds both."""
    N, S, K, D = k.shape
    x = 16 // k.dtype.itemsize
    k_shape, v_shape = shapes(layout, N, S, K, D, v.shape[-1], x)
    buffers = [np.zeros(np.prod(k_shape), k.dtype), None if v_shape is None else np.zeros(np.prod(v_shape), v.dtype)]
    for part, logical in enumerate((k, v)):
        page, slot, head, d = np.indices(logical.shape)
        flat = address(layout, part, page, slot, head, d, S, K, logical.shape[-1], x)
        buffers[0 if v_shape is None else part][flat.ravel()] = logical.ravel()
    return buffers[0].reshape(k_shape), None if v_shape is None else buffers[1].reshape(v_shape)


def store_scale(scale, layout):
    """Per-token-head scales [N, S, K] as the layout keeps them."""
    return scale if layout in ("NHD", "INTERLEAVED") else np.ascontiguousarray(scale.transpose(0, 2, 1))
