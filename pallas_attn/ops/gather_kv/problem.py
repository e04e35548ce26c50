"""The contract of the gather."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_attn.core.batch import RaggedBatch, check_batch, check_kv_lens
from pallas_attn.core.caches import PagedKVCache, check_cache, to_token_major
from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import BF16, Format, float_format
from pallas_attn.core.layouts import Layout


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
    check_kv_lens(batch, cache.page_size)
    _check_max_tokens(max_tokens)
    _check_starts(starts, batch)
    require(seqs * pages_per_seq > 0, "batch.page_table", f"shape {batch.page_table.shape}", "it has room for no token")
    require(cache.num_pages > 0, "cache.k", "no page", "allocate at least one")
    room = seqs * pages_per_seq * cache.page_size
    require(room < 2**31, "batch.page_table", f"room for {room} tokens", "gather fewer sequences at once: below 2**31")
    problem = Problem(
        int(max_tokens), cache.kv_heads, cache.head_dim, cache.v_head_dim, seqs, cache.num_pages, cache.page_size,
        pages_per_seq, cache.format, cache.layout, _out_dtype(dtype, cache.format),
    )  # fmt: skip
    return problem, Args(cache, batch.page_table, batch.kv_lens, starts, batch.num_seqs)


def _check_max_tokens(max_tokens) -> None:
    fix = "it is a static int of at least 1: the rows of the result"
    number = isinstance(max_tokens, int | np.integer) and not isinstance(max_tokens, bool)
    require(
        number and int(max_tokens) > 0, "max_tokens", max_tokens if is_concrete(max_tokens) else "a traced value", fix
    )


def _check_starts(starts, batch: RaggedBatch) -> None:
    if starts is None:
        return
    seqs, live = batch.page_table.shape[0], batch.known_live
    require(starts.shape == (seqs,), "starts", f"shape {starts.shape}", f"one for each sequence: ({seqs},)")
    require(jnp.issubdtype(starts.dtype, jnp.integer), "starts", starts.dtype, "use int32: they count tokens")
    if live is not None and is_concrete(starts):
        least = int(np.min(np.asarray(starts)[:live], initial=0))
        require(least >= 0, "starts", least, "a sequence begins at its token 0")


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
    # Clamped before the cast: 64 bits must not wrap.
    kv_lens = jnp.clip(args.kv_lens, 0, p.pages_per_seq * p.page_size).astype(jnp.int32)
    first = 0 if args.starts is None else jnp.clip(args.starts, 0, p.pages_per_seq * p.page_size).astype(jnp.int32)
    first = jnp.minimum(first, kv_lens)
    live = p.seqs if args.num_seqs is None else jnp.asarray(args.num_seqs)
    lens = jnp.where(jnp.arange(p.seqs) < live, kv_lens - first, 0)
    return first, jnp.pad(jnp.cumsum(lens, dtype=jnp.int32), (1, 0))


class Rows(NamedTuple):
    """Where every row of the result comes from, each `[max_tokens]`: its sequence, page and slot in page, and whether
    there is such a token."""

    seq: Array
    page: Array
    slot: Array
    real: Array


def rows(p: Problem, args: Args, first: Array, cu_lens: Array) -> Rows:
    """The rows of the result; page numbers are kept inside the cache."""
    t = jnp.arange(p.max_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(cu_lens, t, side="right", method="compare_all").astype(jnp.int32) - 1
    seq = jnp.minimum(seq, p.seqs - 1)
    position = jnp.where(t < cu_lens[-1], first[seq] + t - cu_lens[seq], 0)
    page = jnp.clip(args.page_table[seq, position // p.page_size], 0, p.pages - 1).astype(jnp.int32)
    return Rows(seq, page, position % p.page_size, t < cu_lens[-1])


def numbers(p: Problem, x: Array, scale: Array | None, where: Rows, cache: PagedKVCache) -> Array:
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
