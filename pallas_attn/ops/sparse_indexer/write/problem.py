"""The contract of index writes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.index_cache import IndexCache, IndexLayout, check_index_cache
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one write; hashable, and all that `supports` may look at."""

    tokens: int
    head_dim: int
    pages: int
    page_size: int
    format: Format
    layout: IndexLayout
    k_dtype: Any
    shape: tuple[int, ...]  # of the pages: what comes back


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    cache: IndexCache
    k: Array
    slots: Array


def prepare(cache, k: Leaf, slots) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_index_cache(cache)
    require(slots.ndim == 1, "slots", f"shape {slots.shape}", "it is [tokens]")
    require(jnp.issubdtype(slots.dtype, jnp.integer), "slots", slots.dtype, "use int32")
    tokens = slots.shape[0]
    fix = "pass floats: the cache quantises them by its own format"
    require(not isinstance(k, Quantized), "k", "Quantized", fix)
    require(float_format(k.dtype) is not None, "k", f"a bare {k.dtype} array", fix)
    require(k.ndim == 2, "k", f"shape {k.shape}", "it is [tokens, head_dim]: index keys have one head")
    require(k.shape[0] >= tokens, "k", f"{k.shape[0]} tokens", f"slots names {tokens}")
    require(k.shape[1] == cache.head_dim, "k", f"head_dim {k.shape[1]}", f"the cache has {cache.head_dim}")
    problem = Problem(
        tokens, cache.head_dim, cache.num_pages, cache.page_size, cache.format, cache.layout, k.dtype, cache.pages.shape
    )
    return problem, Args(cache, k if k.shape[0] == tokens else k[:tokens], slots)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The pages."""
    return (jax.ShapeDtypeStruct(p.shape, jnp.uint8),)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[None]:
    """Bytes carry no gradient."""
    return [None] * len(jax.tree.leaves(args))
