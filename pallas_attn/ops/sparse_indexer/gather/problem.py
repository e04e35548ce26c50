"""The contract of the gather."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core import packed
from pallas_attn.core.formats import Format
from pallas_attn.core.index_cache import IndexCache, IndexLayout, check_index_cache
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.packed import check_gather
from pallas_attn.core.quantized import Quantized


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
    check_gather(batch, cache.page_size, max_tokens, starts)
    seqs, pages_per_seq = batch.page_table.shape
    problem = Problem(
        int(max_tokens), cache.head_dim, cache.groups, seqs, cache.num_pages, cache.page_size, pages_per_seq,
        cache.format, cache.layout,
    )  # fmt: skip
    return problem, Args(cache, batch.page_table, batch.kv_lens, starts, batch.num_seqs)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(values, scales, cu_lens)."""
    return (
        jax.ShapeDtypeStruct((p.max_tokens, p.head_dim), p.format.dtype),
        jax.ShapeDtypeStruct((p.max_tokens, p.groups), jnp.float32),
        jax.ShapeDtypeStruct((p.seqs + 1,), jnp.int32),
    )


def sources(p: Problem, args: Args) -> tuple[packed.Rows, Array]:
    """Where every row of the result comes from, and cu_lens."""
    first, cu_lens = packed.spans(args.kv_lens, args.starts, args.num_seqs, p.pages_per_seq * p.page_size)
    return packed.rows(first, cu_lens, args.page_table, p.max_tokens, p.page_size, p.pages), cu_lens


def only_real(values: Array, scales: Array, real: Array) -> tuple[Array, Array]:
    """Zeros with a scale of 1 where no token is."""
    real = real[:, None]
    return jnp.where(real, values, jnp.zeros((), values.dtype)), jnp.where(real, scales, 1.0)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[None]:
    """Bytes carry no gradient."""
    return [None] * len(jax.tree.leaves(args))
