"""How index queries and keys are turned before they are quantised: by RoPE, and by the Hadamard matrix.

Kernels do the same sums and products in the same order, so that they give the same bits.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

MOST = np.finfo(np.float32).max


def angles(positions: Array, frequencies: Array) -> tuple[Array, Array]:
    """(cos, sin) float32 [T, R / 2] of the tokens at these positions."""
    angle = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def summed(a: Array, cos: Array, b: Array, sin: Array) -> Array:
    """a cos + b sin, rounded after each operation: the clips change no finite product, and keep a product and the sum
    from becoming one operation with one rounding. Kernels call it too."""
    return jnp.clip(a * cos, -MOST, MOST) + jnp.clip(b * sin, -MOST, MOST)


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """RoPE on the first dims of x [T, .., D], in float32, rounded once; what comes back is all of x, rotated dims
    first: there is nothing in place whose result a caller could drop."""
    dim = 2 * cos.shape[-1]
    cos, sin = (t.reshape(t.shape[0], *(1 for _ in x.shape[2:]), -1) for t in (cos, sin))
    part = x[..., :dim].astype(jnp.float32)
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else jnp.split(part, 2, axis=-1)
    turned = summed(a, cos, b, -sin), summed(b, cos, a, sin)
    turned = jnp.stack(turned, axis=-1).reshape(part.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rounded(turned, x.dtype), x[..., dim:]], axis=-1)


def hadamard(x: Array) -> Array:
    """x times the orthogonal Hadamard matrix of its last axis (a power of two), in float32, rounded once."""
    dim, y = x.shape[-1], x.astype(jnp.float32)
    for bit in range(int(math.log2(dim))):
        pairs = y.reshape(*x.shape[:-1], -1, 2, 1 << bit)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
    return rounded(y * np.float32(dim**-0.5), x.dtype)


def rounded(x: Array, dtype) -> Array:
    """x in a type that may be narrower. Without the barrier XLA may leave the rounding out where the next step widens
    the numbers again."""
    return lax.optimization_barrier(x.astype(dtype))
