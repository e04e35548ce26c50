"""The contract of quantisation."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized, check_quantize, quantized_arrays


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
    """(values, scales that are found)."""
    return quantized_arrays(p.format, p.shape, p.given)
