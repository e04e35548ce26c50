"""Logits by their definition: all products at once."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.ops.sparse_indexer.logits.problem import Args, Problem, columns, ranges
from pallas_attn.ops.sparse_indexer.terms import numbers


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The logits. Memory: tokens x heads x keys."""
    args = Args(*arrays)
    dot = jnp.einsum("thd,nd->thn", numbers(args.q), numbers(args.k), precision=lax.Precision.HIGHEST)
    logits = args.scale * jnp.sum(args.weights.astype(jnp.float32)[..., None] * jax.nn.relu(dot), axis=1)
    starts, ends = ranges(p, args)
    n = jnp.arange(p.keys)
    return (columns(p, jnp.where((n >= starts) & (n < ends), logits, -jnp.inf), starts),)
