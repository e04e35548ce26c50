"""Cache writes as one scatter a buffer: the portable backend. In place where the cache is donated."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.ops.kv_cache.problem import Args, Problem, place, rows
from pallas_attn.runtime.op import pull_back


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The leaves of the written cache."""
    cache, k, v, slots = Args(*arrays)
    page, slot = place(p, slots)
    k_scale, v_scale = cache.scales or (None, None)
    (k, k_found), (v, v_found) = rows(p.format, k, k_scale), rows(p.format, v, v_scale)
    new = (jnp.stack([k, v], axis=2),) if p.layout.single else (k, v)
    buffers = tuple(
        b.write(x, sizes, page, slot, r)
        for b, x, sizes, r in zip(p.layout.buffers, cache.buffers, cache.sizes(), new, strict=True)
    )
    if k_found is None or v_found is None or k_scale is None or v_scale is None:
        return jax.tree.leaves(cache.replace(buffers))
    scales = (_write_scale(p, k_scale, page, slot, k_found), _write_scale(p, v_scale, page, slot, v_found))
    return jax.tree.leaves(cache.replace(buffers, scales))


def _write_scale(p: Problem, scale: Array, page: Array, slot: Array, found: Array) -> Array:
    heads = jnp.arange(p.kv_heads)
    page, slot = page[:, None], slot[:, None]
    index = (page, heads, slot) if p.layout.head_major else (page, slot, heads)
    return scale.at[index].set(found, mode="drop", wrap_negative_indices=False)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments: the scatter's transpose for a float cache, none for a quantised one."""
    if p.format.quantized:
        return [None] * len(jax.tree.leaves(args))
    return pull_back(functools.partial(run, p), args, cotangents)


def fold(p: Problem, args: Args, mapped: Args, n: int, backend: str | None) -> list[Array] | None:
    """vmap: n caches one after the other are one cache; None where their scales differ."""
    from pallas_attn.ops.kv_cache import write

    args, mapped = Args(*args), Args(*mapped)
    token_head = p.format.granularity == "token_head"
    if mapped.cache.scales is not None and any(mapped.cache.scales) and not token_head:
        return None
    wide = lambda x, m: x if m else jnp.broadcast_to(x, (n, *x.shape))  # noqa: E731
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    buffers = tuple(flat(wide(x, m)) for x, m in zip(args.cache.buffers, mapped.cache.buffers, strict=True))
    scales = args.cache.scales
    if token_head:
        scales = tuple(flat(wide(x, m)) for x, m in zip(scales, mapped.cache.scales, strict=True))  # type: ignore[arg-type]
    slots = wide(args.slots, mapped.slots)
    total = p.pages * p.page_size
    inside = (slots >= 0) & (slots < total)
    slots = jnp.where(inside, slots + jnp.arange(n, dtype=slots.dtype)[:, None] * total, -1).reshape(-1)
    out = write(
        args.cache.replace(buffers, scales), flat(wide(args.k, mapped.k)), flat(wide(args.v, mapped.v)), slots, backend
    )
    return [x.reshape(n, -1, *x.shape[1:]) if x.ndim and x.shape[0] == n * p.pages else wide(x, False) for x in out]
