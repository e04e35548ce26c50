"""Numbers of four bits: a sign, two of exponent, one of mantissa; two to a byte, the even one in the low half."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; the next eight codes are their negatives
MIDDLES = tuple((a + b) / 2 for a, b in itertools.pairwise(NUMBERS))


def to_pairs(y: Float[Array, "*rows D"]) -> UInt8[Array, "*rows D2"]:
    """Floats rounded to the nearest, ties to even codes, saturating; NaN, which has no code, becomes a zero.

    Arithmetic and not a conversion, for few devices have one.
    """
    size = jnp.abs(y)
    above = (size >= m if code % 2 else size > m for code, m in enumerate(MIDDLES))
    code = sum((x.astype(jnp.uint8) for x in above), jnp.where(jnp.signbit(y), jnp.uint8(8), jnp.uint8(0)))
    return code[..., ::2] | (code[..., 1::2] << 4)


def from_pairs(pairs: UInt8[Array, "*rows D2"]) -> Float[Array, "*rows D"]:
    """The float32 numbers of the codes."""
    codes = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)
    return jnp.asarray([*NUMBERS, *(-x for x in NUMBERS)], jnp.float32)[codes]
