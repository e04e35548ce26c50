"""The latent gather as one XLA gather with the scales behind it: the portable backend."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.layouts import as_bytes, from_bytes
from pallas_attn.ops.latent_cache.gather_problem import Args, Problem, sources
from pallas_attn.runtime.op import pull_back


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(rows, cu_lens)."""
    args = Args(*arrays)
    where, cu_lens = sources(p, args)
    rows = args.cache.stored(where.page * p.page_size + where.slot)
    if p.dtype is not None:
        return args.cache.numbers(rows, where.real, p.dtype), cu_lens
    kept = jnp.where(where.real[:, None], as_bytes(rows), jnp.zeros((), as_bytes(rows).dtype))
    return from_bytes(kept, rows.dtype), cu_lens


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments: the gather's transpose into a float cache, and of the scale."""
    if p.dtype is None and p.format.quantized:
        return [None] * len(jax.tree.leaves(args))
    return pull_back(functools.partial(run, p), args, cotangents)
