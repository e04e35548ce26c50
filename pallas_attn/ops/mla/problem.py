"""The contract of MLA: every cross-argument check, and the hashable record that backends decide on."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch, check_batch, check_kv_lens, check_queries
from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.latent_cache import LatentCache, check_latent_cache
from pallas_attn.core.output import check_out, out_arrays
from pallas_attn.core.quantized import Quantized
from pallas_attn.core.query import check_query
from pallas_attn.ops.mla.topk import TopK, check_topk


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one call; hashable, and all that `supports` may look at."""

    tokens: int
    heads: int
    latent_dim: int
    rope_dim: int
    seqs: int
    pages: int
    page_size: int
    pages_per_seq: int
    max_q_len: int | None
    q_format: Format
    kv_format: Format
    topk: int | None  # keys of a token where they are listed
    topk_slots: bool
    topk_lengths: bool
    v_dim: int | None  # of the up-projection
    w_dtype: np.dtype | None  # of its weights
    out_dtype: np.dtype
    out_format: Format | None
    return_lse: bool

    @property
    def empty(self) -> bool:
        """Whether no token can see a key."""
        tables = () if self.topk_slots else (self.pages_per_seq,)
        return 0 in (self.tokens, self.seqs, self.pages, self.keys, *tables)

    @property
    def keys(self) -> int:
        """The most keys that a token sees."""
        return self.pages_per_seq * self.page_size if self.topk is None else self.topk


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    q_latent: Array | Quantized
    q_rope: Array | Quantized
    cache: LatentCache
    batch: RaggedBatch
    scale: Array
    topk: TopK | None
    w_uv: Array | None
    out_scale: Array | None


def prepare(
    q_latent, q_rope, cache, batch, *, scale, topk=None, w_uv=None, out=None, return_lse=False
) -> tuple[Problem, Args]:  # fmt: skip
    """Check a call; returns what a backend decides on and what it computes with."""
    check_latent_cache(cache)
    q_format = _check_queries(q_latent, q_rope, cache)
    tokens, heads, latent_dim = q_latent.shape
    check_batch(batch)
    check_kv_lens(batch, cache.page_size)
    check_queries(batch, tokens)
    seqs, pages_per_seq = batch.page_table.shape
    _check_scale(scale)
    topk = check_topk(topk, tokens)
    _check_w_uv(w_uv, heads, latent_dim)
    v_dim = None if w_uv is None else w_uv.shape[2]
    default = jnp.bfloat16 if q_format.quantized else q_latent.dtype
    out_dtype, out_format, out_scale = check_out(out, default, v_dim or latent_dim)
    problem = Problem(
        tokens, heads, latent_dim, cache.rope_dim, seqs, cache.num_pages, cache.page_size, pages_per_seq,
        batch.max_q_len, q_format, cache.format, None if topk is None else topk.indices.shape[1],
        topk is not None and topk.slots, topk is not None and topk.lengths is not None,
        v_dim, None if w_uv is None else np.dtype(w_uv.dtype), out_dtype, out_format, return_lse,
    )  # fmt: skip
    return problem, Args(q_latent, q_rope, cache, batch, jnp.asarray(scale, jnp.float32), topk, w_uv, out_scale)


def _check_queries(q_latent, q_rope, cache: LatentCache) -> Format:
    formats = check_query("q_latent", q_latent), check_query("q_rope", q_rope)
    require(formats[0] == formats[1], "q_rope", formats[1], f"q_latent is {formats[0]}: use one format")
    parts = (("q_latent", q_latent, cache.latent_dim), ("q_rope", q_rope, cache.rope_dim))
    for name, q, dim in parts:
        require(q.shape[2] == dim, name, f"dim {q.shape[2]}", f"the cache has {dim}")
    same = q_latent.shape[:2] == q_rope.shape[:2]
    require(same, "q_rope", f"shape {q_rope.shape}", f"q_latent has {q_latent.shape[:2]} tokens and heads")
    require(q_latent.shape[1] > 0, "q_latent", "no head", "it has at least one")
    return formats[0]


def _check_scale(scale) -> None:
    fix = "it is the model's own number, such as (128 + 64) ** -0.5: the width of the latent tells nothing of it"
    require(scale is not None, "scale", None, fix)
    require(np.ndim(scale) == 0, "scale", f"shape {np.shape(scale)}", "it is one number")
    if is_concrete(scale):
        require(bool(np.isfinite(float(scale))), "scale", scale, "it is a finite number")


def _check_w_uv(w_uv, heads: int, latent_dim: int) -> None:
    if w_uv is None:
        return
    require(float_format(w_uv.dtype) is not None, "w_uv", w_uv.dtype, "use bfloat16, float16 or float32")
    ok = len(w_uv.shape) == 3 and w_uv.shape[:2] == (heads, latent_dim) and w_uv.shape[2] > 0
    require(ok, "w_uv", f"shape {w_uv.shape}", f"it is [{heads} heads, {latent_dim} latent, value dim]")


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(out, the scales that are found, lse?) of a call."""
    shape = (p.tokens, p.heads, p.latent_dim) if p.v_dim is None else (p.tokens, p.heads * p.v_dim)
    out = out_arrays(shape, p.out_dtype, p.out_format)
    lse = jax.ShapeDtypeStruct((p.tokens, p.heads), jnp.float32)
    return (*out, lse) if p.return_lse else out
