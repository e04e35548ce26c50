"""Logits over cached keys by their definition: the whole cache as numbers, all products at once."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.paged_logits.problem import Args, Problem, reach
from pallas_attn.ops.sparse_indexer.terms import numbers


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The logits. Memory: a copy of the cache, and tokens x heads x keys."""
    args = Args(*arrays)
    seq, seen = reach(p, args)
    x = jnp.arange(p.max_len)
    page = args.batch.page_table[:, jnp.minimum(x // p.page_size, p.pages_per_seq - 1)]
    stored = args.cache.read(jnp.arange(p.pages))
    keys = numbers(Quantized(*stored, p.format))[jnp.clip(page, 0, p.pages - 1), x % p.page_size]  # [B, max_len, D]
    dot = jnp.einsum("thd,tnd->thn", numbers(args.q), keys[seq], precision=lax.Precision.HIGHEST)
    logits = args.scale * jnp.sum(args.weights.astype(jnp.float32)[..., None] * jax.nn.relu(dot), axis=1)
    return (jnp.where(x < seen[:, None], logits, -jnp.inf),)
