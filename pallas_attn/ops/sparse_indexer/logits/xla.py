"""Logits block by block of rows and keys: the portable backend. No more than a block of products exists at a time."""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.ops.sparse_indexer.logits.problem import Args, Problem, columns, ranges
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
        return (jnp.zeros((0, p.width or p.keys)),)
    block = min(p.keys, MAX_KEYS)
    keys = *apart(args.k), jnp.arange(p.keys, dtype=jnp.int32)
    rows = *fold(args.q, args.weights, args.scale), *ranges(p, args)
    tile = min(p.tokens, max(ELEMENTS // (p.heads * block), 1))
    logits = in_blocks(functools.partial(_tile, p, keys, block), tile, rows)
    return (logits.reshape(-1, logits.shape[-1])[: p.tokens],)


def _tile(p: Problem, keys: tuple[Array, ...], block: int, queries, weights, starts, ends) -> Array:
    """The logits of some rows."""

    def of_keys(k: Array, k_scale: Array, n: Array) -> Array:
        seen = (n >= starts) & (n < ends)
        some = jnp.any(seen, axis=0)  # what no row sees is cleared: it may be NaN, of which 0 times is no 0

        def logits() -> Array:
            kept = jnp.where(some[:, None], k.astype(jnp.float32), 0.0)
            return scored(queries, weights, kept, jnp.where(some, k_scale, 1.0))

        return masked(seen, logits)

    found = in_blocks(of_keys, block, keys, fill=-1)  # keys past the last are numbered -1, which no row sees
    return columns(p, jnp.moveaxis(found, 0, 1).reshape(queries.shape[0], -1)[:, : p.keys], starts)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments."""
    return pull_back(functools.partial(run, p), args, cotangents)
