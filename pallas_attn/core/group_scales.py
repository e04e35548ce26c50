"""Scales of groups in memory: in rows or columns, filled up for the copy engine, packed, in two levels.

`Format` tells what each order is. Logical scales are [.., M, G] for values [.., M, D].
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format
from pallas_attn.core.leaf import Leaf

MANTISSA = 23  # bits of a float32 below its exponent


class BlockScale(NamedTuple):
    """Scales in two levels: e4m3 `blocks`, as the format orders them, each times the float32 `tensor` `[]`."""

    blocks: Leaf
    tensor: Leaf


def count(format: Format, values: tuple[int, ...]) -> int:
    """G of values of this shape."""
    assert format.group is not None
    ok = bool(values) and values[-1] % format.group == 0
    require(ok, "x", f"shape {values}", f"make its last axis a multiple of {format.group}")
    return values[-1] // format.group


def shape(format: Format, values: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in memory for values of this shape."""
    words = -(-count(format, values) // (4 if format.scale_type == "int32" else 1))
    if format.order == "row":
        return (*values[:-1], words)
    require(len(values) > 1, "x", f"shape {values}", f"{format} needs rows: [.., M, D]")
    return (*values[:-2], words, values[-2] + -values[-2] % format.rows)


def arrange(format: Format, scale: Array, fill: Array) -> Array:
    """Logical scales as they lie in memory; `fill` stands where rows are filled up."""
    if format.order == "row":
        return scale
    scale = jnp.swapaxes(scale, -1, -2)
    scale = _fill(scale, (0, -scale.shape[-1] % format.rows), fill)
    if format.scale_type != "int32":
        return scale
    exponents = _fill(lax.bitcast_convert_type(scale, jnp.int32) >> MANTISSA, (-scale.shape[-2] % 4, 0), 0)
    exponents = exponents.reshape(*exponents.shape[:-2], exponents.shape[-2] // 4, 4, exponents.shape[-1])
    return jnp.sum(exponents << 8 * jnp.arange(4)[:, None], axis=-2, dtype=jnp.int32)


def _fill(x: Array, more: tuple[int, int], value) -> Array:
    """x with `more` at the ends of its last two axes."""
    edges = [(0, 0)] * (x.ndim - 2) + [(0, n) for n in more]
    return jnp.pad(x, edges, constant_values=value) if any(more) else x


def read(format: Format, scale: Array | BlockScale, values: tuple[int, ...]) -> Array:
    """Logical float32 scales of values of this shape from the ones in memory."""
    blocks, tensor = scale if isinstance(scale, BlockScale) else (scale, None)
    if format.scale_type == "int32":
        *copies, words, rows = blocks.shape
        exponents = (blocks[..., None, :] >> 8 * jnp.arange(4)[:, None]) & 255  # [.., words, 4, M']
        blocks = lax.bitcast_convert_type(exponents << MANTISSA, jnp.float32).reshape(*copies, 4 * words, rows)
        blocks = blocks[..., : count(format, values), :]
    if format.order != "row":
        blocks = jnp.swapaxes(blocks, -1, -2)[..., : values[-2], :]
    blocks = blocks.astype(jnp.float32)
    return blocks if tensor is None else blocks * tensor


def repeat(format: Format, scale: Array) -> Array:
    """Logical scales [.., M, G] for each value: [.., M, D]."""
    assert format.group is not None
    return jnp.repeat(scale, format.group, axis=-1, total_repeat_length=scale.shape[-1] * format.group)
