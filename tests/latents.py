"""Latent caches and MLA in plain numpy: rows byte by byte, attention in float64, and random problems whose unread
places are all poison, with their library twins."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import oracle
from oracle import BF16, E4M3, E5M2, F16, F32
from problems import nan_of

import pallas_attn as pa

FORMATS = {
    "BF16": BF16, "F16": F16, "F32": F32, "E4M3_TENSOR": E4M3, "E5M2_TENSOR": E5M2, "FP8_DS_MLA": np.uint8,
}  # fmt: skip


def dims_of(format):
    """(C, R): FP8_DS_MLA has its own, the others may be small."""
    return (512, 64) if format == "FP8_DS_MLA" else (48, 16)


def store(latent, rope, format, scale=None):
    """Rows [.., W] as upstream's writers lay them out."""
    latent, rope = np.asarray(latent, F32), np.asarray(rope, F32)
    if format != "FP8_DS_MLA":
        granularity = "tensor" if "TENSOR" in format else "none"
        return oracle.quantise(np.concatenate([latent, rope], -1), FORMATS[format], granularity, scale)[0]
    codes, scales = oracle.ds_mla(latent)
    parts = codes, scales, rope.astype(BF16)
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in parts], -1)


def load(rows, format, scale=None):
    """float32 numbers [.., C + R] of stored rows: one product each, so exact but for its rounding."""
    if format != "FP8_DS_MLA":
        return rows.astype(F32) * F32(1 if scale is None else scale)
    codes = np.ascontiguousarray(rows[..., :512]).view(E4M3).astype(F32)
    scales = np.ascontiguousarray(rows[..., 512:528]).view(F32).repeat(128, -1)
    rope = np.ascontiguousarray(rows[..., 528:]).view(BF16).astype(F32)
    return np.concatenate([codes * scales, rope], -1)


def poison(format):
    """What unread rows hold: NaN, in FP8_DS_MLA all bits set, which is NaN in each of its parts."""
    return np.uint8(255) if format == "FP8_DS_MLA" else nan_of(FORMATS[format])


def attention(latents, latent_dim, queries, visible, scale):
    """(out [T, H, C], lse [T, H]) in float64. latents [N * S, C + R], queries [T, H, C + R]; visible: for each token
    the slots that it attends to, with repetitions."""
    tokens, heads, _ = queries.shape
    out, lse = np.zeros((tokens, heads, latent_dim)), np.full((tokens, heads), -np.inf)
    for t, slots in enumerate(visible):
        if not len(slots):
            continue
        keys = latents[slots].astype(np.float64)
        logits = float(scale) * queries[t].astype(np.float64) @ keys.T
        top = logits.max(-1, keepdims=True)
        p = np.exp(logits - top)
        lse[t] = top[:, 0] + np.log(p.sum(-1))
        out[t] = p / p.sum(-1, keepdims=True) @ keys[:, :latent_dim]
    return out, lse


@dataclass
class Problem:
    """Stored rows [N, S, W], queries and the ragged batch of one call."""

    pages: np.ndarray
    format: str
    scale: np.ndarray | None
    q: np.ndarray  # [T, H, C + R]
    q_format: str | None
    q_scale: tuple | None  # of the latent and of the rotary part
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: int

    @property
    def dims(self):
        return dims_of(self.format)

    def cache(self):
        scale = None if self.scale is None else jnp.asarray(self.scale)
        return pa.LatentCache(jnp.asarray(self.pages), getattr(pa, self.format), scale, self.dims[1])

    def batch(self, **keywords):
        where = map(jnp.asarray, (self.page_table, self.kv_lens, self.cu_q_lens))
        return pa.RaggedBatch(*where, jnp.int32(self.num_seqs), **keywords)

    def queries(self):
        parts = jnp.asarray(self.q[..., : self.dims[0]]), jnp.asarray(self.q[..., self.dims[0] :])
        if self.q_format is None:
            return parts
        format = getattr(pa, self.q_format)
        return tuple(pa.Quantized(x, jnp.asarray(s), format) for x, s in zip(parts, self.q_scale, strict=True))

    def arguments(self, **batch):
        return *self.queries(), self.cache(), self.batch(**batch)

    def numbers(self):
        """(latents [N * S, C + R], queries [T, H, C + R]), poison included."""
        c, queries = self.dims[0], self.q.astype(np.float64)
        if self.q_format is not None:
            for part, scale in zip((slice(0, c), slice(c, None)), self.q_scale, strict=True):
                queries[..., part] *= np.asarray(scale, np.float64)[..., None]
        latents = load(self.pages, self.format, self.scale)
        return latents.reshape(-1, latents.shape[-1]), queries

    def slots(self, b, positions):
        """Where tokens of sequence b lie."""
        size = self.pages.shape[1]
        return self.page_table[b, positions // size].astype(int) * size + positions % size

    def causal(self):
        """The slots that each token sees, as lists."""
        seen = [np.zeros(0, int)] * len(self.q)
        for b in range(self.num_seqs):
            start, end = self.cu_q_lens[b : b + 2]
            for t in range(start, end):
                most = int(self.kv_lens[b]) - (end - start) + (t - start) + 1
                seen[t] = self.slots(b, np.arange(max(most, 0)))
        return seen

    def expected(self, scale, visible=None):
        """The oracle's (out, lse)."""
        latents, queries = self.numbers()
        return attention(latents, self.dims[0], queries, self.causal() if visible is None else visible, scale)


def make(
    rng, format="F32", q_lens=(1, 5, 0, 17, 3, 2, 4), kv_lens=(9, 5, 0, 40, 0, 33, 2), *, heads=3, page_size=16,
    q_dtype=F32, q_format=None, spare_seqs=2, spare_tokens=4, table_width=None, num_pages=None,
):  # fmt: skip
    """A problem as problems.make has them: decode, prefill, a chunk, an empty sequence, queries without keys, queries
    before the first key, spare sequences and tokens; everything else is poison."""
    real, (latent_dim, rope_dim) = len(q_lens), dims_of(format)
    counts = [-(-n // page_size) for n in kv_lens]
    count = num_pages or sum(counts) + 3
    table = rng.choice(np.array([-7, 2**30, count, 0], np.int32), (real + spare_seqs, table_width or max(counts) + 1))
    order, first = rng.permutation(count), 0
    written = np.zeros((count, page_size), bool)
    for b, n in enumerate(kv_lens):
        table[b, : counts[b]] = order[first : first + counts[b]]
        first += counts[b]
        where = np.arange(n)
        written[table[b, where // page_size], where % page_size] = True
    scale = F32(0.37 / 16) if "TENSOR" in format else None
    parts = (rng.standard_normal((count, page_size, d)).astype(F32) for d in (latent_dim, rope_dim))
    pages = store(*parts, format, scale)
    pages[~written] = poison(format)
    tokens = sum(q_lens) + spare_tokens
    q, q_scale = rng.standard_normal((tokens, heads, latent_dim + rope_dim)).astype(F32), None
    if q_format:
        granularity = {"E4M3_TENSOR": "tensor", "E4M3_HEAD": "head", "E4M3_TOKEN_HEAD": "token_head"}[q_format]
        given = {"tensor": F32(0.0075), "head": (0.0075 * rng.uniform(0.5, 2, heads)).astype(F32)}.get(granularity)
        halves = q[..., :latent_dim], q[..., latent_dim:]
        coded = [oracle.quantise(x, E4M3, granularity, None if given is None else given * f)
                 for x, f in zip(halves, (F32(1), F32(1.5)), strict=True)]  # fmt: skip
        q, q_scale = np.concatenate([c for c, _ in coded], -1), tuple(np.array(s) for _, s in coded)
        if granularity == "token_head":
            for s in q_scale:
                s[sum(q_lens) :] = np.nan
    else:
        q = q.astype(q_dtype)
    q[sum(q_lens) :] = nan_of(q.dtype.type)
    cu = np.concatenate([[0], np.cumsum(q_lens), [0] * spare_seqs]).astype(np.int32)
    lens = np.concatenate([kv_lens, [10**6] * spare_seqs]).astype(np.int32)
    return Problem(pages, format, scale, q, q_format, q_scale, table, lens, cu, real)
