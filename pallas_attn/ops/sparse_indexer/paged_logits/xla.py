"""Logits over cached keys, block by block of rows and pages: the portable backend.

Every row gathers its own sequence's pages, so that rows of one sequence read them again: made for decode. A prompt is
cheaper through `gather_index` and `indexer_logits`.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.index_cache import IndexCache
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.paged_logits.problem import Args, Problem, reach
from pallas_attn.ops.sparse_indexer.terms import ELEMENTS, apart, fold, in_blocks, masked, scored
from pallas_attn.runtime.op import pull_back

MAX_KEYS = 1024  # of a block


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The logits."""
    args = Args(*arrays)
    if not p.tokens:
        return (jnp.zeros((0, p.max_len)),)
    seq, seen = reach(p, args)
    needed = min(-(-p.max_len // p.page_size), p.pages_per_seq)
    pages = args.batch.page_table[:, :needed][seq]
    tile = min(p.tokens, max(ELEMENTS // (max(p.heads, p.head_dim) * _block(p, needed) * p.page_size), 1))
    rows = *fold(args.q, args.weights, args.scale), pages, seen
    logits = in_blocks(functools.partial(_tile, p, args.cache), tile, rows)
    logits = logits.reshape(-1, logits.shape[-1])[: p.tokens, : p.max_len]
    return (jnp.pad(logits, ((0, 0), (0, p.max_len - logits.shape[1])), constant_values=-jnp.inf),)


def _block(p: Problem, pages: int) -> int:
    """Pages of a block."""
    return max(min(MAX_KEYS // p.page_size, pages), 1)


def _tile(p: Problem, cache: IndexCache, queries: Array, weights: Array, pages: Array, seen: Array) -> Array:
    """The logits [R, pages * S] of some rows."""
    block = _block(p, pages.shape[1])

    def of_pages(pages: Array, first: Array) -> Array:
        x = first[:, None] * p.page_size + jnp.arange(p.page_size)
        real = x.reshape(-1) < seen[:, None]

        def logits() -> Array:
            keys, k_scale = apart(Quantized(*cache.read(pages.T), p.format))
            keys, k_scale = (a.reshape(*real.shape, *a.shape[3:]) for a in (keys, k_scale))
            # What no row sees is cleared: bytes that nobody wrote may be NaN, of which 0 times is no 0.
            kept = jnp.where(real[..., None], keys.astype(jnp.float32), 0.0)
            return scored(queries, weights, kept, jnp.where(real, k_scale, 1.0))

        return masked(real, logits)

    number = jnp.arange(pages.shape[1], dtype=jnp.int32)
    # Pages past the last of a row: number them past the longest row.
    found = in_blocks(of_pages, block, (pages.T, number), fill=p.max_len)
    return jnp.moveaxis(found, 0, 1).reshape(queries.shape[0], -1)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments."""
    return pull_back(functools.partial(run, p), args, cotangents)
