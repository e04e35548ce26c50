"""RoPE and quantisation by their definition: every number knows its partner; a scale belongs to a row."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.core.quantized import divide, scale_of, to_storage
from pallas_attn.ops.sparse_indexer.rope.problem import Args, Problem
from pallas_attn.ops.sparse_indexer.turns import rounded, summed


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales)."""
    x, cos, sin = Args(*arrays)
    y = _rotated(p, x.astype(jnp.float32), cos, sin)
    if p.hadamard:
        y = _turned(y, p.dtype)
    rows = y.reshape(-1, p.format.group or 1)
    scale = scale_of(jnp.max(jnp.abs(rows), axis=-1), p.format, divide)
    values = to_storage(rows, scale[:, None], p.format)
    return values.reshape(x.shape), scale.reshape(*x.shape[:2], -1)


def _rotated(p: Problem, x: Array, cos: Array, sin: Array) -> Array:
    dims = np.arange(2 * p.half)
    pair, second = (dims // 2, dims % 2) if p.interleaved else (dims % p.half, dims // p.half)
    partner = dims ^ 1 if p.interleaved else (dims + p.half) % (2 * p.half)
    sign = jnp.where(second == 1, 1.0, -1.0)
    turned = summed(x[..., dims], cos[:, None, pair], x[..., partner], (sign * sin[:, pair])[:, None])
    return x.at[..., dims].set(rounded(turned, p.dtype).astype(jnp.float32))


def _turned(x: Array, dtype) -> Array:
    """Times the Hadamard matrix, factor by factor: each adds to a number, or subtracts it from, that of the dim which
    differs in one bit."""
    dims = np.arange(x.shape[-1])
    for bit in range(len(dims).bit_length() - 1):
        other = x[..., dims ^ (1 << bit)]
        x = jnp.where(dims >> bit & 1, other - x, x + other)
    return rounded(x * np.float32(len(dims) ** -0.5), dtype).astype(jnp.float32)
