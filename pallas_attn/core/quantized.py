"""Quantised values that carry their scale; the only casts to FP8 and INT8 outside kernel bodies."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import Format
from pallas_attn.core.leaf import Leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("format",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Values of `format.dtype` and the float32 scale that turns them into numbers: `values * scale`.

    The shape of `scale` follows the format: tensor `[]`, head `[K]` (the axis before the last of the values),
    seq_head `[B, K]`, token_head `values.shape[:-1]`, group `[..., D / group]`.
    """

    values: Leaf
    scale: Leaf
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the values."""
        return self.values.ndim


def check_positive(scale, argument: str) -> None:
    """Refuse a concrete scale that is not positive and finite; a traced or abstract one passes."""
    if not is_concrete(scale):
        return
    x = np.asarray(scale)
    ok = bool(np.all((x > 0) & np.isfinite(x)))
    require(ok, argument, x if x.size < 9 else "an array with others", "scales must be positive and finite")


def scale_shape(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scale for values of this shape whose axis before the last is the head."""
    match format.granularity:
        case "tensor":
            return ()
        case "head":
            return (shape[-2],)
        case "token_head":
            return shape[:-1]
        case "group" if format.group:
            fix = f"make it a multiple of {format.group}"
            require(shape[-1] % format.group == 0, "x", f"last axis {shape[-1]}", fix)
            return (*shape[:-1], shape[-1] // format.group)
    raise ValueError(f"{format} has no scale that one array determines")


def spread(format: Format, scale: Array, shape: tuple[int, ...]) -> Array:
    """`scale` with axes added and groups repeated so that it broadcasts against values of `shape`."""
    match format.granularity:
        case "tensor":
            return scale
        case "head" | "token_head":
            return scale[..., None]
        case "group" if format.group:
            return jnp.repeat(scale, format.group, axis=-1, total_repeat_length=shape[-1])
    raise ValueError(f"{format}: the scale needs a batch to be applied")


def find_scale(x: Array, format: Format) -> Array:
    """The dynamic scale of float `x` by the format's rule, in float32."""
    x = jnp.abs(x.astype(jnp.float32))
    match format.granularity:
        case "tensor":
            amax = jnp.max(x)
        case "head":
            amax = jnp.max(x, axis=(*range(x.ndim - 2), x.ndim - 1))
        case "token_head":
            amax = jnp.max(x, axis=-1)
        case _:
            amax = jnp.max(x.reshape(*scale_shape(format, x.shape), format.group), axis=-1)
    return scale_of(amax, format, _divide)


def scale_of(amax: Array, format: Format, divide: Callable) -> Array:
    """The scale for float32 largest magnitudes. Kernels call it too, with a division that is IEEE's there."""
    amax, qmax = jnp.maximum(amax, format.amax_floor), np.float32(format.qmax)
    scale = amax * (1 / qmax) if format.find_scale == "reciprocal" else divide(amax, qmax)
    scale = jnp.maximum(scale, format.scale_floor)
    return _round_up_to_power_of_two(scale) if format.ue8m0 else scale


def _divide(x: Array, y: Array | np.float32) -> Array:
    """x / y as IEEE has it: XLA would multiply by the reciprocal of a broadcast y, which is not the same float32."""
    return x / lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def _round_up_to_power_of_two(x: Array) -> Array:
    """Exact 2**ceil(log2(x)) for positive float32: one more exponent where any bit of the mantissa is set."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def to_storage(x: Array, scale: Array, format: Format) -> Array:
    """Float `x` over a broadcastable scale, rounded and clamped into `format.dtype`; NaN stays NaN in FP8."""
    x = x.astype(jnp.float32)
    y = x * (1.0 / scale) if format.apply_scale == "reciprocal" else _divide(x, scale)
    return to_codes(y, format)


def to_codes(y: Array, format: Format) -> Array:
    """`x / scale` rounded and clamped into `format.dtype`; kernels call it too.

    XLA's own float32 -> FP8 conversion does not saturate, so the clamp comes first; the one to integers cuts towards 0.
    """
    if format.rounding == "half_away":
        # The first clip changes no result: it keeps product and sum from becoming one operation with one rounding.
        y = jnp.clip(y, format.qmin - 1, format.qmax + 1)
        y = y + jnp.where(y >= 0, 0.5, -0.5)
    return jnp.clip(y, format.qmin, format.qmax).astype(format.dtype)


def quantize(x: Float[Array, "*shape"], format: Format, scale: Array | float | None = None) -> Quantized:
    """Quantise floats by the format's own rules.

    Args:
      x: float array `[..., D]`; for per-head formats `[..., heads, D]`.
      format: a quantised Format other than a per-(sequence, head) one, which exists for reading only.
      scale: a known (static) scale of the shape that `Quantized` tells, or None to find it from the largest
        magnitudes in `x`.
    Returns: `Quantized`; values are clamped to the finite range, never NaN for finite `x`.
    Raises: InvalidInput for a float format, a scale of the wrong shape, or one that is not positive.
    """
    require(format.quantized, "format", format, "use x.astype(format.dtype): this format has no scale")
    require(format.granularity != "seq_head", "format", format, "quantise per tensor, per head or per token and head")
    expected = scale_shape(format, x.shape)
    if scale is None:
        scale = find_scale(x, format)
    scale = jnp.asarray(scale, jnp.float32)
    require(scale.shape == expected, "scale", f"shape {scale.shape}", f"{format} for x {x.shape} needs {expected}")
    check_positive(scale, "scale")
    return Quantized(to_storage(x, spread(format, scale, x.shape), format), scale, format)


def dequantize(x: Quantized, dtype=jnp.float32) -> Array:
    """`values * scale` in float32, rounded once to `dtype`; never through another narrow type."""
    return (x.values.astype(jnp.float32) * spread(x.format, x.scale, x.shape)).astype(dtype)


def fake_quantize(x: Float[Array, "*shape"], format: Format, scale: Array | float | None = None) -> Array:
    """`x` as it reads back after quantisation, in `x.dtype`, with the gradient of the identity (straight through).

    How a model trains against an FP8 cache: an FP8 array itself can carry no gradient. Values that saturate get
    none; the scale gets none.
    """
    return _fake_quantize(x, None if scale is None else lax.stop_gradient(jnp.asarray(scale, jnp.float32)), format)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake_quantize(x, scale, format):
    return _fake_quantize_fwd(x, scale, format)[0]


def _fake_quantize_fwd(x, scale, format):
    q = quantize(x, format, scale)
    # Without the barrier XLA on GPUs may drop the pair of conversions as excess precision.
    q = dataclasses.replace(q, values=lax.optimization_barrier(q.values))
    inside = jnp.abs(x.astype(jnp.float32)) <= format.qmax * spread(format, q.scale, x.shape) * (1 + 2**-20)
    return dequantize(q, x.dtype), (inside, scale)


def _fake_quantize_bwd(format, residual, g):
    inside, scale = residual
    return jnp.where(inside, g, 0).astype(g.dtype), None if scale is None else jnp.zeros_like(scale)


_fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)
