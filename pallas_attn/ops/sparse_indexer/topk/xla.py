"""The selection by counting: the portable backend.

The k-th largest value of a row is found bit by bit, by 32 passes that count; then one prefix sum tells where the chosen
columns go. No sort of a row, no atomics: bounded for every input, and the same in every run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_attn.ops.sparse_indexer.terms import in_blocks
from pallas_attn.ops.sparse_indexer.topk.problem import HIGH, Args, Problem, ordered, ranges

ELEMENTS = 1 << 27  # logits of the rows that are searched at a time, at most about


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The columns."""
    args = Args(*arrays)
    if not p.rows:
        return (jnp.zeros((0, p.k), jnp.int32),)
    rows = args.logits, *ranges(p, args)
    tile = min(p.rows, max(ELEMENTS // p.columns, 1))
    return (in_blocks(functools.partial(select, p), tile, rows).reshape(-1, p.k)[: p.rows],)


def select(p: Problem, logits: Array, starts: Array, ends: Array) -> Array:
    """The columns [R, k] of some rows."""
    column = jnp.arange(p.columns, dtype=jnp.int32)
    key = jnp.where((column >= starts) & (column < ends), ordered(logits), 0)
    need = jnp.clip(ends - starts, 0, p.k)
    least = threshold(key, need)
    above, equal = key > least, key == least
    spare = need - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    chosen = above | (equal & (running(equal) <= spare))
    nth = jnp.arange(1, p.k + 1, dtype=jnp.int32)
    best = jax.vmap(lambda x: jnp.searchsorted(x, nth))(running(chosen)).astype(jnp.int32)
    if p.sorted:
        value = jnp.take_along_axis(key, jnp.minimum(best, p.columns - 1), axis=1)
        last = jnp.where(nth > need, np.uint32(0xFFFFFFFF), ~value)  # ascending here is descending there
        _, best = lax.sort((last, best), num_keys=1, is_stable=True)
    return jnp.where(nth <= need, best - starts, -1)


def threshold(key: Array, need: Array) -> Array:
    """The largest uint32 [T, 1] that at least `need` keys of the row reach: the need-th largest key itself."""

    def body(i, least):
        more = least | (HIGH >> i.astype(jnp.uint32))
        count = jnp.sum(key >= more, axis=1, keepdims=True, dtype=jnp.int32)
        return jnp.where(count >= need, more, least)

    return lax.fori_loop(0, 32, body, jnp.zeros_like(need, jnp.uint32))


def running(x: Array) -> Array:
    """How many of a row are true up to and with each column."""
    return jnp.cumsum(x, axis=1, dtype=jnp.int32)
