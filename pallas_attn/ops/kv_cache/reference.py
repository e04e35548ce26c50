"""Cache writes by their definition: for every slot of the cache, the last token that names it, if any."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.ops.kv_cache.problem import Args, Problem, place, rows


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The leaves of the written cache. Time and memory: slots of the cache x tokens."""
    cache, k, v, slots = Args(*arrays)
    if not p.tokens:
        return jax.tree.leaves(cache)
    page, slot = place(p, slots)
    names = page * p.page_size + slot == jnp.arange(p.pages * p.page_size)[:, None]
    named, last = jnp.any(names, axis=1), p.tokens - 1 - jnp.argmax(names[:, ::-1], axis=1)
    k_scale, v_scale = cache.scales or (None, None)
    (k, k_found), (v, v_found) = rows(p.format, k, k_scale), rows(p.format, v, v_scale)
    old = cache.read(jnp.arange(p.pages))
    k, v = (_pick(p, named, last, r, x) for r, x in zip((k, v), old, strict=True))
    new = (jnp.stack([k, v], axis=2),) if p.layout.single else (k, v)
    every = jnp.arange(p.pages * p.page_size)
    buffers = tuple(
        b.write(x, sizes, every // p.page_size, every % p.page_size, r)
        for b, x, sizes, r in zip(p.layout.buffers, cache.buffers, cache.sizes(), new, strict=True)
    )
    if k_found is None or v_found is None or k_scale is None or v_scale is None:
        return jax.tree.leaves(cache.replace(buffers))
    scales = tuple(_pick_scale(p, named, last, f, s) for f, s in ((k_found, k_scale), (v_found, v_scale)))
    return jax.tree.leaves(cache.replace(buffers, scales))  # type: ignore[arg-type]


def _pick(p: Problem, named: Array, last: Array, new: Array, old: Array) -> Array:
    """Rows of all slots [N * S, K, D]: the naming token's, else the old ones."""
    return jnp.where(named[:, None, None], new[last], old.reshape(p.pages * p.page_size, *old.shape[2:]))


def _pick_scale(p: Problem, named: Array, last: Array, new: Array, old: Array) -> Array:
    old = jnp.swapaxes(old, 1, 2) if p.layout.head_major else old
    picked = jnp.where(named[:, None], new[last], old.reshape(-1, p.kv_heads)).reshape(p.pages, p.page_size, p.kv_heads)
    return jnp.swapaxes(picked, 1, 2) if p.layout.head_major else picked
