"""The contract of the gather."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_attn.core import packed
from pallas_attn.core.batch import check_batch
from pallas_attn.core.caches import PagedKVCache, check_cache, to_token_major
from pallas_attn.core.errors import require
from pallas_attn.core.formats import BF16, Format, float_format
from pallas_attn.core.layouts import Layout
from pallas_attn.core.packed import check_gather


class Gathered(NamedTuple):
    """Contiguous keys and values of several sequences: what `gather_kv` returns.

    k, v: `[max_tokens, K, D]` and `[max_tokens, K, DV]`, sequence b in the rows cu_lens[b] to cu_lens[b + 1]; rows past
      the last sequence are zero.
    cu_lens: int32 `[B + 1]`; cu_lens[-1] > max_tokens tells that so many tokens were to be gathered and did not fit:
      the rows past max_tokens were dropped.
    """

    k: Float[Array, "L K D"]
    v: Float[Array, "L K DV"]
    cu_lens: Int[Array, "B_1"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one gather; hashable, and all that `supports` may look at."""

    max_tokens: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    seqs: int
    pages: int
    page_size: int
    pages_per_seq: int
    format: Format
    layout: Layout
    dtype: Any  # of what comes out


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    cache: PagedKVCache
    page_table: Array
    kv_lens: Array
    starts: Array | None
    num_seqs: Array | None


def prepare(cache, batch, *, max_tokens, starts=None, dtype=None) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_batch(batch)
    seqs, pages_per_seq = batch.page_table.shape
    check_cache(cache, seqs)
    check_gather(batch, cache.page_size, max_tokens, starts)
    require(cache.num_pages > 0, "cache.k", "no page", "allocate at least one")
    problem = Problem(
        int(max_tokens), cache.kv_heads, cache.head_dim, cache.v_head_dim, seqs, cache.num_pages, cache.page_size,
        pages_per_seq, cache.format, cache.layout, _out_dtype(dtype, cache.format),
    )  # fmt: skip
    return problem, Args(cache, batch.page_table, batch.kv_lens, starts, batch.num_seqs)


def _out_dtype(dtype, format: Format) -> np.dtype:
    found = np.dtype(dtype) if dtype is not None else BF16.dtype if format.quantized else format.dtype
    fix = "gather to bfloat16, float16 or float32: the scales are applied"
    require(float_format(found) is not None, "dtype", found, fix)
    return found


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(k, v, cu_lens)."""
    rows = [jax.ShapeDtypeStruct((p.max_tokens, p.kv_heads, d), p.dtype) for d in (p.head_dim, p.v_head_dim)]
    return (*rows, jax.ShapeDtypeStruct((p.seqs + 1,), jnp.int32))


def spans(p: Problem, args: Args) -> tuple[Array, Array]:
    """(first [B], cu_lens [B + 1]): where in each sequence its tokens begin, and in which row of the result."""
    return packed.spans(args.kv_lens, args.starts, args.num_seqs, p.pages_per_seq * p.page_size)


def rows(p: Problem, args: Args, first: Array, cu_lens: Array) -> packed.Rows:
    """The rows of the result; page numbers are kept inside the cache."""
    return packed.rows(first, cu_lens, args.page_table, p.max_tokens, p.page_size, p.pages)


def numbers(p: Problem, x: Array, scale: Array | None, where: packed.Rows, cache: PagedKVCache) -> Array:
    """Stored values `[L, K, D]` as what they stand for, in `p.dtype`: float32 times scale, rounded once; zero where no
    token is."""
    real = where.real[:, None, None]
    if scale is None:
        return jnp.where(real, x, jnp.zeros((), x.dtype)).astype(p.dtype)
    match p.format.granularity:
        case "head":
            scale = scale[:, None]
        case "seq_head":
            scale = scale[where.seq][..., None]
        case "token_head":
            scale = to_token_major(cache, scale)[where.page, where.slot][..., None]
    # Both are cleared before they meet, so that no NaN of an unread slot reaches a gradient either.
    number = jnp.where(real, x.astype(jnp.float32), 0.0) * jnp.where(real, scale, 0.0)
    return number.astype(p.dtype)
