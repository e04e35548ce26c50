"""The contract of cache writes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.caches import PagedKVCache, check_cache
from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.layouts import Layout
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized, find_scale, spread, to_storage


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one write; hashable, and all that `supports` may look at."""

    tokens: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    pages: int
    page_size: int
    format: Format
    layout: Layout
    k_dtype: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]  # of the cache: what comes back


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    cache: PagedKVCache
    k: Array
    v: Array
    slots: Array


def prepare(cache, k, v, slots) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_cache(cache)
    format = cache.format
    readable = f"{format} is for reading only: write per head or per token and head"
    require(format.granularity != "seq_head", "cache.format", format, readable)
    require(slots.ndim == 1, "slots", f"shape {slots.shape}", "it is [tokens]")
    require(jnp.issubdtype(slots.dtype, jnp.integer), "slots", slots.dtype, "use int32")
    tokens = slots.shape[0]
    for name, x, dim in (("k", k, cache.head_dim), ("v", v, cache.v_head_dim)):
        fix = "pass floats: the cache quantises them with its own scales"
        plain = not isinstance(x, Quantized) and float_format(x.dtype) is not None
        require(plain, name, "Quantized" if isinstance(x, Quantized) else f"a bare {x.dtype} array", fix)
        require(x.ndim == 3, name, f"shape {x.shape}", "it is [tokens, kv_heads, head_dim]")
        require(x.shape[0] >= tokens, name, f"{x.shape[0]} tokens", f"slots names {tokens}")
        require(x.shape[1] == cache.kv_heads, name, f"{x.shape[1]} heads", f"the cache has {cache.kv_heads} kv heads")
        require(x.shape[2] == dim, name, f"head_dim {x.shape[2]}", f"the cache has {dim}")
    require(k.shape[0] == v.shape[0], "v", f"{v.shape[0]} tokens", f"k has {k.shape[0]}")
    leaves = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(cache))
    problem = Problem(
        tokens, cache.kv_heads, cache.head_dim, cache.v_head_dim, cache.num_pages, cache.page_size,
        format, cache.layout, k.dtype, leaves,
    )  # fmt: skip
    return problem, Args(cache, _first(k, tokens), _first(v, tokens), slots)


def _first(x: Leaf, tokens: int) -> Leaf:
    """The first rows; an abstract array of enough rows, which `explain` may bring, stays whole."""
    return x if x.shape[0] == tokens else x[:tokens]


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The leaves of the cache."""
    return p.leaves


def rows(format: Format, x: Array, scale: Array | None) -> tuple[Array, Array | None]:
    """Token rows [T, K, D] as they are stored, and their scales [T, K] where each token has its own."""
    if not format.quantized:
        return x.astype(format.dtype), None
    if format.granularity != "token_head":
        return to_storage(x, spread(format, scale, x.shape), format), None  # type: ignore[arg-type]
    found = find_scale(x, format)
    return to_storage(x, found[..., None], format), found


def place(p: Problem, slots: Array) -> tuple[Array, Array]:
    """(page, slot in page) of each token; what is negative or past the end gets the page N, which a scatter drops."""
    inside = (slots >= 0) & (slots < p.pages * p.page_size)
    slots = jnp.where(inside, slots, p.pages * p.page_size).astype(jnp.int32)
    return slots // p.page_size, slots % p.page_size
