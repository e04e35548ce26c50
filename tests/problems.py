"""Random paged problems in plain numpy, with everything that must not be read poisoned, and their library twins."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import oracle
from oracle import BF16, E4M3, E5M2, F16, F32, INT8

import pallas_attn as pa

# Names of pa.Format values: storage type and what shares a scale.
FORMATS = {
    "BF16": (BF16, "none"), "F16": (F16, "none"), "F32": (F32, "none"),
    "E4M3_TENSOR": (E4M3, "tensor"), "E5M2_TENSOR": (E5M2, "tensor"),
    "E4M3_HEAD": (E4M3, "head"), "E5M2_HEAD": (E5M2, "head"),
    "E4M3_SEQ_HEAD": (E4M3, "seq_head"), "E5M2_SEQ_HEAD": (E5M2, "seq_head"),
    "E4M3_TOKEN_HEAD": (E4M3, "token_head"), "E5M2_TOKEN_HEAD": (E5M2, "token_head"),
    "INT8_TOKEN_HEAD": (INT8, "token_head"),
}  # fmt: skip
LAYOUTS = ("NHD", "HND", "INTERLEAVED", "PACKED", "SHUFFLE")
MASK_FIELDS = ("causal", "window", "symmetric", "chunk_lookback", "prefix_ranges", "clamp_prefix", "rswa")
BIAS_FIELDS = ("alibi_slopes", "alibi_sqrt", "query_query", "before_soft_cap")


@dataclass
class Problem:
    """Stored values and scales of one call; caches are logical [N, S, K, D]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: int
    format: str
    q_format: str | None = None
    q_scale: np.ndarray | None = None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None

    def expected(self, **options):
        where = self.page_table, self.kv_lens, self.cu_q_lens, self.num_seqs
        scales = {"q_scale": self.q_scale, "k_scale": self.k_scale, "v_scale": self.v_scale}
        return oracle.attention(self.q, self.k, self.v, *where, **scales, **options)

    def arguments(self, layout="NHD", **batch):
        """(q, cache, batch) for the library."""
        q = jnp.asarray(self.q)
        if self.q_format:
            q = pa.Quantized(q, jnp.asarray(self.q_scale), getattr(pa, self.q_format))
        cache = library_cache(self.k, self.v, self.k_scale, self.v_scale, self.format, layout)
        where = map(jnp.asarray, (self.page_table, self.kv_lens, self.cu_q_lens))
        return q, cache, pa.RaggedBatch(*where, jnp.int32(self.num_seqs), **batch)

    def clean(self):
        """The same with zeros and unit scales for poison."""
        fills = {"q": 0, "k": 0, "v": 0, "q_scale": 1, "k_scale": 1, "v_scale": 1}
        arrays = {n: x for n in fills if (x := getattr(self, n)) is not None and x.dtype != INT8}
        return replace(self, **{n: np.where(np.isnan(x), x.dtype.type(fills[n]), x) for n, x in arrays.items()})


def library_cache(k, v, k_scale, v_scale, format, layout):
    """pa.PagedKVCache of logical arrays."""
    if FORMATS[format][1] == "token_head":
        k_scale, v_scale = (oracle.store_scale(s, layout) for s in (k_scale, v_scale))
    k, v = (None if x is None else jnp.asarray(x) for x in oracle.store(k, v, layout))
    if FORMATS[format][1] != "none":
        k, v = (pa.Quantized(x, jnp.asarray(s), getattr(pa, format)) for x, s in ((k, k_scale), (v, v_scale)))
    return pa.PagedKVCache(k, v, getattr(pa, layout))


def library_options(**options):
    """The oracle's flat options as keyword arguments of pa.paged_attention."""
    options = {n: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x for n, x in options.items()}
    if options.get("rswa") is not None:
        options["rswa"] = (jnp.asarray(options["rswa"][0]), options["rswa"][1])
    mask = pa.Mask(**{n: options.pop(n) for n in MASK_FIELDS if n in options})
    bias = pa.Bias(**{n: options.pop(n) for n in BIAS_FIELDS if n in options})
    return {"mask": mask, "bias": None if bias == pa.Bias() else bias, **options}


def nan_of(dtype):
    """What unread places hold: NaN, or the lowest code of int8."""
    return np.int8(-128) if dtype == INT8 else np.array(np.nan, dtype)


def scales_for(granularity, base, shape, rng):
    """Known, non-unit scales; shape is (sequences, kv heads)."""
    match granularity:
        case "tensor":
            return np.float32(base)
        case "head":
            return (base * rng.uniform(0.5, 2, shape[1])).astype(F32)
        case "seq_head":
            return (base * rng.uniform(0.5, 2, shape)).astype(F32)
    return None


def make(
    rng, format="F32", q_lens=(1, 5, 0, 17, 3, 2, 4), kv_lens=(9, 5, 0, 40, 0, 33, 2), *,
    heads=(4, 2), dim=64, v_dim=None, page_size=16, q_dtype=F32, q_format=None, spare_seqs=2, spare_tokens=4,
    table_width=None, num_pages=None,
):  # fmt: skip
    """A problem whose spare sequences, tokens, slots, pages and scales are all poison.

    The default batch mixes decode, prefill, a chunk, an empty sequence, queries without keys (q_len 3, kv_len 0) and
    queries before the first key (q_len 4, kv_len 2).
    """
    (num_heads, kv_heads), real = heads, len(q_lens)
    pages = [-(-n // page_size) for n in kv_lens]
    count = num_pages or sum(pages) + 3
    table = rng.choice(np.array([-7, 2**30, count, 0], np.int32), (real + spare_seqs, table_width or max(pages) + 1))
    order = rng.permutation(count)
    written = np.zeros((count, page_size), bool)
    for b, n in enumerate(kv_lens):
        table[b, : pages[b]] = order[sum(pages[:b]) :][: pages[b]]
        where = np.arange(n)
        written[table[b, where // page_size], where % page_size] = True
    # Only the first num_seqs + 1 entries of cu_q_lens, and num_seqs of kv_lens, mean anything.
    cu = np.concatenate([[0], np.cumsum(q_lens), [0] * spare_seqs]).astype(np.int32)
    lens = np.concatenate([kv_lens, [10**6] * spare_seqs]).astype(np.int32)
    dtype, granularity = FORMATS[format]
    k, k_scale = _cache(rng, written, kv_heads, dim, dtype, granularity, 0.5, len(lens))
    v, v_scale = _cache(rng, written, kv_heads, v_dim or dim, dtype, granularity, 0.25, len(lens))
    tokens = sum(q_lens) + spare_tokens
    q, q_scale = rng.standard_normal((tokens, num_heads, dim)).astype(F32), None
    if q_format:
        q_granularity = FORMATS[q_format][1]
        q_scale = scales_for(q_granularity, 0.75 / 100, (1, num_heads), rng)
        q, found = oracle.quantise(q, FORMATS[q_format][0], q_granularity, q_scale)
        q_scale = found.copy()
        if q_granularity == "token_head":
            q_scale[sum(q_lens) :] = np.nan
    else:
        q = q.astype(q_dtype)
    q[sum(q_lens) :] = nan_of(q.dtype.type)
    return Problem(q, k, v, table, lens, cu, real, format, q_format, q_scale, k_scale, v_scale)


def _cache(rng, written, kv_heads, dim, dtype, granularity, base, seqs):
    x = rng.standard_normal((*written.shape, kv_heads, dim)).astype(F32)
    scale = scales_for(granularity, base, (seqs, kv_heads), rng)
    codes, found = oracle.quantise(x, dtype, granularity, np.float32(base) if granularity == "seq_head" else scale)
    codes[~written] = nan_of(dtype)
    if granularity == "token_head":
        scale = np.where(written[..., None], found, np.nan).astype(F32)
    return codes, scale


def relative_error(got, want):
    """Largest relative L2 error of any row; rows that must be zero must be exactly so."""
    got, want = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (got, want))
    size = np.linalg.norm(want, axis=-1)
    assert not got[size == 0].any(), "rows without keys or padding rows are not zero"
    assert np.isfinite(got).all(), "NaN or infinity leaked into the output"
    return float(np.max(np.linalg.norm(got - want, axis=-1)[size > 0] / size[size > 0], initial=0))


def assert_close(got, want, tolerance=1e-5):
    """Compare (out, lse) with the oracle's."""
    assert relative_error(got[0], want[0]) <= tolerance
    np.testing.assert_allclose(np.asarray(got[1]), want[1], rtol=2e-5, atol=2e-5)
