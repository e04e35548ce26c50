"""Quantisation by its definition: the values that share a scale are one row, and every scale goes to its address."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_attn.core.e2m1 import NUMBERS
from pallas_attn.core.formats import E4M3, Format
from pallas_attn.core.group_scales import MANTISSA
from pallas_attn.core.quantized import divide, scale_of, scale_shape, to_storage
from pallas_attn.ops.quantize_output.problem import Args, Problem

EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)  # codes of e2m1 magnitudes: of two that are as near, the first one is taken


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales that are found)."""
    args, format = Args(*arrays), p.format
    x = _whole_rows(args.x.astype(jnp.float32), format)
    rows = _rows(x, format)
    amax = jnp.max(jnp.abs(rows), axis=-1)
    if format.two_level:
        return _two_levels(p, rows, amax, args.scale)
    scale = scale_of(amax, format, divide) if args.scale is None else _load(format, args.scale, x.shape)
    values = _back(to_storage(rows, scale[:, None], format), x.shape, format)
    values = values[..., : p.shape[-2], :] if format.order == "tma" else values
    return (values,) if p.given else (values, _store(format, scale, x.shape))


def _two_levels(p: Problem, rows: Array, amax: Array, tensor: Array | None):
    most, ideal = float(jnp.finfo(E4M3).max), amax * np.float32(1 / p.format.qmax)
    if tensor is None:
        tensor = jnp.maximum(jnp.max(ideal, initial=0.0) * np.float32(1 / most), p.format.scale_floor)
    blocks = jnp.minimum(ideal * (1 / tensor), most).astype(E4M3)
    scale = blocks.astype(jnp.float32) * tensor
    y = rows * jnp.where(scale == 0, 0.0, 1 / scale)[:, None]
    numbers = jnp.asarray(NUMBERS)[jnp.asarray(EVEN_FIRST)]
    far = jnp.abs(jnp.minimum(jnp.abs(y), p.format.qmax)[..., None] - numbers)
    code = jnp.asarray(EVEN_FIRST)[jnp.argmin(far, axis=-1)] + 8 * jnp.signbit(y)
    pairs = code.reshape(*p.shape[:-1], -1, 2)
    values = (pairs[..., 0] + 16 * pairs[..., 1]).astype(jnp.uint8)
    blocks = _store(p.format, blocks, p.shape)
    return (values, blocks) if p.given else (values, blocks, tensor)


def _whole_rows(x: Array, format: Format) -> Array:
    """x with rows of zeros at its end where scales are filled up."""
    if format.order != "tma":
        return x
    return jnp.concatenate([x, jnp.zeros((*x.shape[:-2], -x.shape[-2] % format.rows, x.shape[-1]))], axis=-2)


def _rows(x: Array, format: Format) -> Array:
    """[scales, values of one]."""
    match format.granularity:
        case "tensor":
            return x.reshape(1, -1)
        case "head":
            return jnp.moveaxis(x, -2, 0).reshape(x.shape[-2], -1)
        case "token_head":
            return x.reshape(-1, x.shape[-1])
    return x.reshape(-1, format.group or 1)


def _back(rows: Array, shape: tuple[int, ...], format: Format) -> Array:
    if format.granularity != "head":
        return rows.reshape(shape)
    return jnp.moveaxis(rows.reshape(shape[-2], *shape[:-2], shape[-1]), 0, -2)


def _address(format: Format, shape: tuple[int, ...]) -> tuple[Array, Array | int]:
    """(index in memory, bit in it) of each scale of groups of values of this shape."""
    group = jnp.arange(np.prod(shape, dtype=int) // (format.group or 1))
    if format.order == "row":
        return group, 0
    rows, columns = shape[-2], shape[-1] // (format.group or 1)
    copy, row, column = group // (rows * columns), group // columns % rows, group % columns
    share = 4 if format.scale_type == "int32" else 1
    words = -(-columns // share)
    return (copy * words + column // share) * rows + row, 8 * (column % share)


def _store(format: Format, scale: Array, shape: tuple[int, ...]) -> Array:
    """Scales [scales] as they lie in memory."""
    memory = scale_shape(format, shape)
    if format.granularity != "group":
        return scale.reshape(memory)
    index, bit = _address(format, shape)
    size = int(np.prod(memory))
    if format.scale_type != "int32":
        return jnp.zeros(size, scale.dtype).at[index].set(scale).reshape(memory)
    exponents = lax.bitcast_convert_type(scale, jnp.int32) >> MANTISSA
    return jnp.zeros(size, jnp.int32).at[index].add(exponents << bit).reshape(memory)


def _load(format: Format, memory: Array, shape: tuple[int, ...]) -> Array:
    """Scales [scales] from memory."""
    if format.granularity != "group":
        return memory.reshape(-1)
    index, bit = _address(format, shape)
    picked = memory.reshape(-1)[index]
    if format.scale_type != "int32":
        return picked
    return lax.bitcast_convert_type((picked >> bit & 255) << MANTISSA, jnp.float32)
