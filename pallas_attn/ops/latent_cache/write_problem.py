"""The contract of latent cache writes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.latent_cache import LatentCache, check_latent_cache
from pallas_attn.core.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one write; hashable, and all that `supports` may look at."""

    tokens: int
    latent_dim: int
    rope_dim: int
    pages: int
    page_size: int
    format: Format
    dtype: Any  # of the latents
    leaves: tuple[jax.ShapeDtypeStruct, ...]  # of the cache: what comes back


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    cache: LatentCache
    latent: Array
    rope: Array
    slots: Array


def prepare(cache, latent, rope, slots) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_latent_cache(cache)
    require(slots.ndim == 1, "slots", f"shape {slots.shape}", "it is [tokens]")
    require(jnp.issubdtype(slots.dtype, jnp.integer), "slots", slots.dtype, "use int32")
    tokens = slots.shape[0]
    for name, x, dim in (("latent", latent, cache.latent_dim), ("rope", rope, cache.rope_dim)):
        fix = "pass floats: the cache quantises them with its own scales"
        plain = not isinstance(x, Quantized) and float_format(x.dtype) is not None
        require(plain, name, "Quantized" if isinstance(x, Quantized) else f"a bare {x.dtype} array", fix)
        require(x.ndim == 2, name, f"shape {x.shape}", "it is [tokens, dim]: all heads share one latent")
        require(x.shape[0] >= tokens, name, f"{x.shape[0]} tokens", f"slots names {tokens}")
        require(x.shape[1] == dim, name, f"dim {x.shape[1]}", f"the cache has {dim}")
    require(latent.dtype == rope.dtype, "rope", rope.dtype, f"latent is {latent.dtype}: use one type")
    leaves = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(cache))
    problem = Problem(
        tokens, cache.latent_dim, cache.rope_dim, cache.num_pages, cache.page_size, cache.format, latent.dtype, leaves
    )
    # An abstract array of enough rows, which `explain` may bring, stays whole.
    first = lambda x: x if x.shape[0] == tokens else x[:tokens]  # noqa: E731
    return problem, Args(cache, first(latent), first(rope), slots)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The leaves of the cache."""
    return p.leaves


def place(p: Problem, slots: Array) -> Array:
    """The row of each token among those of all pages; a negative slot or one past the end gets the row past the last,
    which a scatter drops."""
    end = p.pages * p.page_size
    return jnp.where((slots >= 0) & (slots < end), slots, end).astype(jnp.int32)
