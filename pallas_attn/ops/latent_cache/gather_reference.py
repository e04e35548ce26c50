"""The latent gather by its definition: the numbers of the whole cache, of which each row of the result is one token."""

import jax.numpy as jnp

from pallas_attn.core.layouts import as_bytes, from_bytes
from pallas_attn.ops.latent_cache.gather_problem import Args, Problem, sources


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(rows, cu_lens). Memory: a copy of the cache in the type of the result."""
    args = Args(*arrays)
    where, cu_lens = sources(p, args)
    every = as_bytes(args.cache.pages)
    if p.dtype is not None:
        every = args.cache.numbers(args.cache.pages, jnp.ones((p.pages, p.page_size), bool), p.dtype)
    picked = every.reshape(-1, every.shape[2])[where.page * p.page_size + where.slot]
    rows = jnp.where(where.real[:, None], picked, jnp.zeros((), picked.dtype))
    return from_bytes(rows, p.stored[1] if p.dtype is None else p.dtype), cu_lens
