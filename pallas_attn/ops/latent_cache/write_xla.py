"""Latent cache writes as one scatter: the portable backend. In place where the cache is donated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.layouts import as_bytes, from_bytes
from pallas_attn.ops.latent_cache.write_problem import Args, Problem, place
from pallas_attn.runtime.op import pull_back


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The leaves of the written cache."""
    cache, latent, rope, slots = Args(*arrays)
    old, rows = as_bytes(cache.pages), as_bytes(cache.rows(latent, rope))
    flat = old.reshape(-1, old.shape[2]).at[place(p, slots)].set(rows, mode="drop", wrap_negative_indices=False)
    return jax.tree.leaves(dataclasses.replace(cache, pages=from_bytes(flat.reshape(old.shape), cache.pages.dtype)))


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments: the scatter's transpose for a float cache, none for a quantised one."""
    if p.format.quantized:
        return [None] * len(jax.tree.leaves(args))
    return pull_back(functools.partial(run, p), args, cotangents)


def fold(p: Problem, args: Args, mapped: Args, n: int, backend: str | None) -> list[Array] | None:
    """vmap: n caches one after the other are one cache; None where their scales differ."""
    from pallas_attn.ops.latent_cache import write

    args, mapped = Args(*args), Args(*mapped)
    if mapped.cache.scale is not None and mapped.cache.scale:
        return None
    wide = lambda x, m: x if m else jnp.broadcast_to(x, (n, *x.shape))  # noqa: E731
    flat = lambda x, m: wide(x, m).reshape(-1, *x.shape[1 + m :])  # noqa: E731
    total = p.pages * p.page_size
    slots = wide(args.slots, mapped.slots)
    inside = (slots >= 0) & (slots < total)
    slots = jnp.where(inside, slots + jnp.arange(n, dtype=slots.dtype)[:, None] * total, -1).reshape(-1)
    cache = dataclasses.replace(args.cache, pages=flat(args.cache.pages, mapped.cache.pages))
    out = write(cache, flat(args.latent, mapped.latent), flat(args.rope, mapped.rope), slots, backend)
    return [x.reshape(n, p.pages, *x.shape[1:]) if x.ndim else wide(x, False) for x in out]
