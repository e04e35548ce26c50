"""From one cache layout to another."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.core.caches import PagedKVCache, check_cache
from pallas_attn.core.errors import require
from pallas_attn.core.layouts import Layout, Sizes, as_bytes, from_bytes
from pallas_attn.core.quantized import Quantized

BLOCK = 2**26  # bytes that are moved at once


def convert_layout(cache: PagedKVCache, layout: Layout) -> PagedKVCache:
    """The same keys, values and scales in another layout, bit for bit.

    Pages stay where they are, so every page table stays good. Donate the cache (`jax.jit(pa.convert_layout,
    static_argnums=1, donate_argnums=0)`): between layouts with equally many buffers it is then converted in place,
    block by block, with no more than a block of 64 MiB besides; between one buffer and two, both caches exist at once.

    Args:
      cache: of any format and layout.
      layout: one of `pa.LAYOUTS`.
    Returns: the cache; scales per token and head lie as the new layout has them, others as they were.
    Raises: InvalidInput where the layout cannot hold such pages: SHUFFLE needs page size and head dims to be multiples
      of 16 bytes, layouts of one buffer need keys and values of one head dim.
    """
    check_cache(cache)
    require(isinstance(layout, Layout), "layout", type(layout).__name__, "choose one of pa.LAYOUTS")
    n, s, heads, dim = cache.num_pages, cache.page_size, cache.kv_heads, cache.head_dim
    v_dim, itemsize = cache.v_head_dim, cache.buffers[0].dtype.itemsize
    fits = not layout.single or dim == v_dim
    require(fits, "layout", layout, f"keys have {dim} dims and values {v_dim}: use a layout of two buffers")
    sizes = tuple(layout.sizes(n, s, heads, d, itemsize) for d in (dim, v_dim)[: len(layout.buffers)])
    if layout == cache.layout:
        return cache
    buffers = tuple(from_bytes(x, cache.format.dtype) for x in _converted(cache, layout, sizes))
    scales = cache.scales
    if scales is not None and cache.format.granularity == "token_head" and layout.head_major != cache.layout.head_major:
        scales = tuple(jnp.swapaxes(x, 1, 2) for x in scales)
    k, v = (*buffers, None)[:2]
    if scales is None:
        return PagedKVCache(k, v, layout)
    return PagedKVCache(Quantized(k, scales[0], cache.format), Quantized(v, scales[1], cache.format), layout)


def _converted(cache: PagedKVCache, layout: Layout, sizes: tuple[Sizes, ...]) -> list[Array]:
    """The new buffers, FP8 as bytes. Where there are as many as before each takes the memory of an old one: a page is
    as long in every layout, and in a loop over blocks of pages XLA makes no second cache."""
    n, old = cache.num_pages, [as_bytes(x).reshape(cache.num_pages, -1) for x in cache.buffers]
    shapes = [b.shape(size) for b, size in zip(layout.buffers, sizes, strict=True)]
    in_place = len(shapes) == len(old)
    new = old if in_place else [jnp.zeros((n, math.prod(s[1:])), old[0].dtype) for s in shapes]

    def move(first, count: int, new: list[Array]) -> list[Array]:
        block = [lax.dynamic_slice_in_dim(x, first, count) for x in (new if in_place else old)]
        known = zip(cache.layout.buffers, block, cache.sizes(), strict=True)
        rows = [b.logical(x, size) for b, x, size in known]
        if cache.layout.single and not layout.single:
            rows = [rows[0][..., 0, :], rows[0][..., 1, :]]
        elif layout.single and not cache.layout.single:
            rows = [jnp.stack(rows, axis=-2)]
        laid = [b.lay(x, size).reshape(count, -1) for b, x, size in zip(layout.buffers, rows, sizes, strict=True)]
        return [lax.dynamic_update_slice_in_dim(x, y, first, 0) for x, y in zip(new, laid, strict=True)]

    count = max(min(n, BLOCK * n // cache.nbytes), 1)
    new = lax.fori_loop(0, n // count, lambda i, new: move(i * count, count, new), new)
    if n % count:
        new = move(n - n % count, n % count, new)
    return [x.reshape(s) for x, s in zip(new, shapes, strict=True)]
