"""From stored values to the numbers they stand for, and from float32 results to what is returned."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core import output, query
from pallas_attn.core.caches import PagedKVCache, to_token_major
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention.problem import Problem


def query_numbers(q: Array | Quantized, kv_heads: int, real: Array) -> Array:
    """The query in float32 as [T, K, G, D], its scale applied; padding (not real [T]) is zero, whatever it holds."""
    return query.query_numbers(q, real).reshape(q.shape[0], kv_heads, -1, q.shape[-1])


def cache_numbers(cache: PagedKVCache, pages: Array, seq: Array, seen: Array) -> tuple[Array, Array]:
    """Keys and values of whole pages in float32, their scales applied.

    pages [L, P] page numbers, seq [L] whose they are, seen [L, P * S] which slots any query sees: the others are zero,
    whatever bytes they hold. Returns [L, P * S, K, D] and [.., DV].
    """
    scales = cache.scales or (None, None)
    k, v = (x.reshape(seen.shape + x.shape[-2:]) for x in cache.read(pages))
    return _numbers(cache, k, scales[0], pages, seq, seen), _numbers(cache, v, scales[1], pages, seq, seen)


def _numbers(cache: PagedKVCache, x: Array, scale: Array | None, pages: Array, seq: Array, seen: Array) -> Array:
    # Values and scales are cleared before they meet, so that no NaN of an unread slot reaches a gradient either.
    seen = seen[..., None, None]
    number = jnp.where(seen, x.astype(jnp.float32), 0.0)
    if scale is None:
        return number
    return number * jnp.where(seen, _scale_of(cache, scale, pages, seq, seen.shape[:2]), 0.0)


def _scale_of(cache: PagedKVCache, scale: Array, pages: Array, seq: Array, shape: tuple[int, ...]) -> Array:
    """The scale, broadcastable to [L, X, K, D]."""
    match cache.format.granularity:
        case "tensor":
            return scale
        case "head":
            return scale[:, None]
        case "seq_head":
            return scale[seq][:, None, :, None]
        case _:
            picked = to_token_major(cache, scale).at[pages].get(mode="clip")
            return picked.reshape(*shape, scale.shape[1] if cache.layout.head_major else scale.shape[2], 1)


def finish(p: Problem, out: Array, scale: Array | None) -> tuple[Array, ...]:
    """The one rounding of results [T, H, DV]: to a float type, through a static scale, or by groups of [T, H * DV]
    with the scales that are found."""
    return output.finish(out, p.out_dtype, p.out_format, scale)
