"""The contract of the gather."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch, check_batch, check_kv_lens
from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import Format
from pallas_attn.core.index_cache import IndexCache, IndexLayout, check_index_cache
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.terms import check_size


class GatheredIndex(NamedTuple):
    """Contiguous index keys of several sequences: what `gather_index` returns.

    k: `Quantized`, values e4m3 `[max_tokens, D]` with float32 scales `[max_tokens, G]`, G groups of 128 values;
      sequence b in the rows cu_lens[b] to cu_lens[b + 1].
    cu_lens: int32 `[B + 1]`; cu_lens[-1] > max_tokens tells that rows past max_tokens were dropped.
    """

    k: Quantized
    cu_lens: Leaf


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one gather; hashable, and all that `supports` may look at."""

    max_tokens: int
    head_dim: int
    groups: int
    seqs: int
    pages: int
    page_size: int
    pages_per_seq: int
    format: Format
    layout: IndexLayout


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    cache: IndexCache
    page_table: Array
    kv_lens: Array
    starts: Array | None
    num_seqs: Array | None


def prepare(cache, batch, *, max_tokens, starts=None) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_index_cache(cache)
    check_batch(batch)
    check_kv_lens(batch, cache.page_size)
    check_size("max_tokens", max_tokens)
    _check_starts(starts, batch)
    seqs, pages_per_seq = batch.page_table.shape
    require(seqs * pages_per_seq > 0, "batch.page_table", f"shape {batch.page_table.shape}", "it has room for no token")
    room = seqs * pages_per_seq * cache.page_size
    require(room < 2**31, "batch.page_table", f"room for {room} tokens", "gather fewer sequences at once: below 2**31")
    problem = Problem(
        int(max_tokens), cache.head_dim, cache.groups, seqs, cache.num_pages, cache.page_size, pages_per_seq,
        cache.format, cache.layout,
    )  # fmt: skip
    return problem, Args(cache, batch.page_table, batch.kv_lens, starts, batch.num_seqs)


def _check_starts(starts, batch: RaggedBatch) -> None:
    if starts is None:
        return
    seqs, live = batch.page_table.shape[0], batch.known_live
    require(starts.shape == (seqs,), "starts", f"shape {starts.shape}", f"one for each sequence: ({seqs},)")
    require(jnp.issubdtype(starts.dtype, jnp.integer), "starts", starts.dtype, "use int32: they count tokens")
    if live is not None and is_concrete(starts):
        least = int(np.min(np.asarray(starts)[:live], initial=0))
        require(least >= 0, "starts", least, "a sequence begins at its token 0")


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(values, scales, cu_lens)."""
    return (
        jax.ShapeDtypeStruct((p.max_tokens, p.head_dim), p.format.dtype),
        jax.ShapeDtypeStruct((p.max_tokens, p.groups), jnp.float32),
        jax.ShapeDtypeStruct((p.seqs + 1,), jnp.int32),
    )


def spans(p: Problem, args: Args) -> tuple[Array, Array]:
    """(first [B], cu_lens [B + 1]): where in each sequence its tokens begin, and in which row of the result."""
    # Clamped before the cast: 64 bits must not wrap.
    room = p.pages_per_seq * p.page_size
    kv_lens = jnp.clip(args.kv_lens, 0, room).astype(jnp.int32)
    first = 0 if args.starts is None else jnp.clip(args.starts, 0, room).astype(jnp.int32)
    first = jnp.minimum(first, kv_lens)
    live = p.seqs if args.num_seqs is None else jnp.asarray(args.num_seqs)
    lens = jnp.where(jnp.arange(p.seqs) < live, kv_lens - first, 0)
    return first, jnp.pad(jnp.cumsum(lens, dtype=jnp.int32), (1, 0))


def rows(p: Problem, args: Args, first: Array, cu_lens: Array) -> tuple[Array, Array, Array]:
    """(page, slot in page, real) of every row of the result; page numbers are kept inside the cache."""
    t = jnp.arange(p.max_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(cu_lens, t, side="right", method="compare_all").astype(jnp.int32) - 1
    seq = jnp.minimum(seq, p.seqs - 1)
    position = jnp.where(t < cu_lens[-1], first[seq] + t - cu_lens[seq], 0)
    page = jnp.clip(args.page_table[seq, position // p.page_size], 0, p.pages - 1).astype(jnp.int32)
    return page, position % p.page_size, t < cu_lens[-1]


def only_real(values: Array, scales: Array, real: Array) -> tuple[Array, Array]:
    """Zeros with a scale of 1 where no token is."""
    real = real[:, None]
    return jnp.where(real, values, jnp.zeros((), values.dtype)), jnp.where(real, scales, 1.0)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[None]:
    """Bytes carry no gradient."""
    return [None] * len(jax.tree.leaves(args))
