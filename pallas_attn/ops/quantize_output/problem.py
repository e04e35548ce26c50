"""The contract of quantisation."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_attn.core.errors import require
from pallas_attn.core.formats import E4M3, Format
from pallas_attn.core.group_scales import BlockScale
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized, check_quantize, scale_shape


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one call; hashable, and all that `supports` may look at."""

    shape: tuple[int, ...]
    dtype: np.dtype
    format: Format
    given: bool  # whether the caller knows the scale; for two levels, the tensor's


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    x: Leaf
    scale: Leaf | None


def prepare(x, format, scale=None) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    require(isinstance(format, Format), "format", type(format).__name__, "pass a pa.Format")
    dtype = x.values.dtype if isinstance(x, Quantized) else x.dtype
    wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    require(wide, "x", f"{dtype} values", "pass floats; pa.dequantize makes them of a pa.Quantized")
    check_quantize(x, format, scale)
    if scale is not None and not isinstance(scale, jax.ShapeDtypeStruct):
        scale = jnp.asarray(scale, jnp.int32 if format.scale_type == "int32" else jnp.float32)
    return Problem(x.shape, np.dtype(dtype), format, scale is not None), Args(x, scale)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(values, scales that are found): none, one, or the blocks' and the tensor's."""
    values = jax.ShapeDtypeStruct((*p.shape[:-1], p.shape[-1] // p.format.per_byte), p.format.stored)
    return (values, *found_scales(p.format, p.shape, p.given))


def found_scales(format: Format, shape: tuple[int, ...], given: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The scales that quantising values of this shape finds."""
    tensor = jax.ShapeDtypeStruct((), jnp.float32)
    if format.two_level:
        blocks = jax.ShapeDtypeStruct(scale_shape(format, shape), E4M3)
        return (blocks,) if given else (blocks, tensor)
    dtype = jnp.int32 if format.scale_type == "int32" else jnp.float32
    return () if given else (jax.ShapeDtypeStruct(scale_shape(format, shape), dtype),)


def flat(p: Problem, q: Quantized) -> tuple[Leaf, ...]:
    """The results of a backend, as `outputs` lists them."""
    if p.format.two_level:
        return (q.values, q.scale.blocks) if p.given else (q.values, *q.scale)
    return (q.values,) if p.given else (q.values, q.scale)


def collect(p: Problem, given: Leaf, results: tuple[Leaf, ...]) -> Quantized:
    """What the caller gets: the results around the scale that was given, if any."""
    values, *scales = results
    scales = [*scales, *([given] if p.given else [])]
    return Quantized(values, BlockScale(*scales) if p.format.two_level else scales[0], p.format)
