"""Integers of any width as the int32 that kernels read, none of which may wrap into range."""

import jax
import jax.numpy as jnp


def clamped(x: jax.Array, most: int) -> jax.Array:
    """What a kernel clamps to 0 .. most by itself; wider numbers, and unsigned ones, are clamped here."""
    return x if x.dtype == jnp.int32 else jnp.clip(x, 0, most).astype(jnp.int32)


def slots32(slots: jax.Array, end: int) -> jax.Array:
    """Slots, of which a kernel passes over those outside of 0 .. end - 1 by itself; of 64 bits these are -1."""
    if slots.dtype.itemsize > 4:
        slots = jnp.where((slots >= 0) & (slots < end), slots, -1)
    return slots.astype(jnp.int32)
