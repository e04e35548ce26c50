"""The contract of logits over cached keys."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch, check_batch, check_kv_lens
from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.index_cache import IndexCache, IndexLayout, check_index_cache
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.terms import check_quantized, check_rows, check_size, check_weights


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one call; hashable, and all that `supports` may look at."""

    tokens: int
    heads: int
    head_dim: int
    seqs: int
    pages: int
    page_size: int
    pages_per_seq: int
    max_len: int
    max_q_len: int | None
    q_format: Format
    format: Format
    layout: IndexLayout
    row_lens: bool  # whether rows bring their own lengths


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    q: Array | Quantized
    weights: Array
    cache: IndexCache
    batch: RaggedBatch
    row_lens: Array | None
    scale: Array


def prepare(q, weights, cache, batch, *, max_len=None, row_lens=None, scale: Leaf = 1.0) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_quantized("q", q, 3, "[tokens, heads, head_dim]")
    check_index_cache(cache)
    check_batch(batch)
    check_kv_lens(batch, cache.page_size)
    tokens, heads, dim = q.shape
    require(dim == cache.head_dim, "q", f"head_dim {dim}", f"the cache has {cache.head_dim}")
    require(heads > 0, "q", f"shape {q.shape}", "give at least one head")
    check_weights(weights, tokens, heads)
    check_rows("row_lens", row_lens, tokens)
    seqs, pages_per_seq = batch.page_table.shape
    require(seqs * pages_per_seq > 0, "batch.page_table", f"shape {batch.page_table.shape}", "it has room for no token")
    if max_len is not None:
        check_size("max_len", max_len)
    require(jnp.shape(scale) == (), "scale", f"shape {jnp.shape(scale)}", "it is one number")
    problem = Problem(
        tokens, heads, dim, seqs, cache.num_pages, cache.page_size, pages_per_seq,
        int(max_len or pages_per_seq * cache.page_size), batch.max_q_len,
        q.format if isinstance(q, Quantized) else float_format(q.dtype),  # type: ignore[arg-type]
        cache.format, cache.layout, row_lens is not None,
    )  # fmt: skip
    return problem, Args(q, weights, cache, batch, row_lens, jnp.float32(scale))


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The logits."""
    return (jax.ShapeDtypeStruct((p.tokens, p.max_len), jnp.float32),)


def reach(p: Problem, args: Args) -> tuple[Array, Array]:
    """(sequence, number of keys seen) of every row, int32 [T]; 0 for padding, and never more than there are."""
    seq, position, real = args.batch.tokens(p.tokens)
    room = jnp.clip(args.batch.kv_lens[seq], 0, min(p.pages_per_seq * p.page_size, p.max_len))
    seen = position + 1 if args.row_lens is None else args.row_lens
    return seq, jnp.where(real, jnp.clip(seen, 0, room), 0).astype(jnp.int32)
