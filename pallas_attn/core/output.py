"""What an attention returns: a float type, or its result quantised in one rounding."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import GROUPS, Format, float_format
from pallas_attn.core.quantized import check_positive, quantize, quantized_arrays, take_apart


def check_out(out, default, dim: int) -> tuple[np.dtype, Format | None, Any]:
    """(storage dtype, format of a quantised output, its scale if given) of the argument `out`.

    default: the dtype that None stands for; dim: values of one head.
    """
    format, scale = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    if isinstance(format, Format) and format.quantized:
        _check_format(format, scale, dim)
        return format.stored, format, None if scale is None else jnp.asarray(scale, jnp.float32)
    require(not isinstance(out, tuple), "out", out, "it is a dtype, a format in groups, or (format, scale)")
    dtype = format.dtype if isinstance(format, Format) else out
    dtype = np.dtype(default if dtype is None else dtype)
    fix = "use a float type, or (format, scale) for FP8: an FP8 array without a scale means nothing"
    require(float_format(dtype) is not None, "out", dtype, fix)
    return dtype, None, None


def _check_format(format: Format, scale, dim: int) -> None:
    fix = "use E4M3_STATIC or E5M2_STATIC with one scale, e4m3_group(64 or 128), or NVFP4 with the tensor's scale"
    require(format.granularity in ("tensor", "group"), "out", format, fix)
    if format.granularity == "group" and not format.two_level:
        require(format.group in GROUPS, "out", f"{format} of groups of {format.group}", "groups are of 64 or 128")
        require(scale is None, "out", f"{format} with a scale", "pass the format alone: it finds its own scales")
    else:
        require(scale is not None, "out", f"{format} without a scale", "pass (format, scale)")
        require(np.ndim(scale) == 0, "out", f"a scale of shape {np.shape(scale)}", "it is one number")
        check_positive(scale, "out")
    whole = format.group is None or dim % format.group == 0
    require(
        whole, "out", f"{format} for values of {dim}", f"make them a multiple of {format.group}, or leave out float"
    )


def out_arrays(shape: tuple[int, ...], dtype: np.dtype, format: Format | None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(out, the scales that are found) for results of this shape [T, ..]; in groups all of a token is one row."""
    if format is None or format.granularity == "tensor":
        return (jax.ShapeDtypeStruct(shape, dtype),)
    return quantized_arrays(format, (shape[0], math.prod(shape[1:])), format.two_level)


def finish(out: Array, dtype: np.dtype, format: Format | None, scale: Array | None) -> tuple[Array, ...]:
    """The one rounding of float32 results [T, ..]: to a float type, through a static scale, or by groups of a token's
    row, with the scales that are found."""
    if format is None:
        return (out.astype(dtype),)
    x = out if format.granularity == "tensor" else out.reshape(out.shape[0], math.prod(out.shape[1:]))
    return take_apart(quantize(x, format, scale), scale is not None)
