"""Latent cache writes by their definition: for every slot of the cache, the last token that names it, if any."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_attn.core.layouts import as_bytes, from_bytes
from pallas_attn.ops.latent_cache.write_problem import Args, Problem, place


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The leaves of the written cache. Time and memory: slots of the cache x tokens."""
    cache, latent, rope, slots = Args(*arrays)
    if not p.tokens:
        return jax.tree.leaves(cache)
    names = place(p, slots) == jnp.arange(p.pages * p.page_size)[:, None]
    named, last = jnp.any(names, axis=1), p.tokens - 1 - jnp.argmax(names[:, ::-1], axis=1)
    rows, old = as_bytes(cache.rows(latent, rope)), as_bytes(cache.pages)
    pages = jnp.where(named[:, None], rows[last], old.reshape(-1, old.shape[2])).reshape(old.shape)
    return jax.tree.leaves(dataclasses.replace(cache, pages=from_bytes(pages, cache.pages.dtype)))
