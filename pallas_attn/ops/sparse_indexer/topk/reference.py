"""The selection by its definition: a stable sort of every row."""

import jax.numpy as jnp
from jax import lax

from pallas_attn.ops.sparse_indexer.topk.problem import Args, Problem, ranges


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The columns."""
    args = Args(*arrays)
    starts, ends = ranges(p, args)
    column = jnp.broadcast_to(jnp.arange(p.columns, dtype=jnp.int32), args.logits.shape)
    outside = (column < starts) | (column >= ends)
    bits = lax.bitcast_convert_type(jnp.where(jnp.isnan(args.logits), -jnp.inf, args.logits), jnp.int32)
    # Integers in the order of the floats, -0 as +0: a float sort may take subnormals for zeros.
    value = jnp.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    *_, best = lax.sort((outside.astype(jnp.int32), -value, column), num_keys=2, is_stable=True)
    best = jnp.pad(best, ((0, 0), (0, max(p.k - p.columns, 0))))[:, : p.k]
    real = jnp.arange(p.k) < ends - starts
    best = jnp.where(real, best - starts, jnp.iinfo(jnp.int32).max)
    return (jnp.where(real, best if p.sorted else jnp.sort(best, axis=1), -1),)
