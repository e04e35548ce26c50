"""Quantised values that carry their scale; the only casts to FP8 and INT8 outside kernel bodies."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.core import group_scales
from pallas_attn.core.e2m1 import from_pairs, to_pairs
from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import E2M1, E4M3, Format
from pallas_attn.core.group_scales import BlockScale
from pallas_attn.core.leaf import Leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("format",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Values of `format.dtype` and the float32 scale that turns them into numbers: `values * scale`.

    The shape of `scale` follows the format: tensor `[]`, head `[K]` (the axis before the last of the values),
    seq_head `[B, K]`, token_head `values.shape[:-1]`, group `[..., D / group]` in the format's order and type, which
    `Format` tells; for NVFP4 a `BlockScale`, and the values are uint8 `[..., D / 2]`.
    """

    values: Leaf
    scale: Leaf
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers: that of the values, but for several to a byte."""
        if self.format.per_byte == 1:
            return self.values.shape
        return (*self.values.shape[:-1], self.values.shape[-1] * self.format.per_byte)

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
    """Shape in memory of the scale for values of this shape whose axis before the last is the head; blocks' for two
    levels."""
    match format.granularity:
        case "tensor":
            return ()
        case "head":
            return (shape[-2],)
        case "token_head":
            return shape[:-1]
        case "group":
            return group_scales.shape(format, shape)
    raise ValueError(f"{format} has no scale that one array determines")


def spread(format: Format, scale: Array | BlockScale, shape: tuple[int, ...]) -> Array:
    """`scale` with axes added and groups repeated so that it broadcasts against values of `shape`."""
    match format.granularity:
        case "tensor":
            return scale  # type: ignore[return-value]
        case "head" | "token_head":
            return scale[..., None]  # type: ignore[call-overload]
        case "group":
            return group_scales.repeat(format, group_scales.read(format, scale, shape))
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
            amax = group_amax(x, format)
    return scale_of(amax, format, divide)


def group_amax(x: Array, format: Format) -> Array:
    """Largest magnitudes [.., M, G] of float `x` [.., M, D]."""
    x = jnp.abs(x.astype(jnp.float32))
    return jnp.max(x.reshape(*x.shape[:-1], group_scales.count(format, x.shape), format.group), axis=-1)


def find_block_scale(x: Array, format: Format, tensor: Array | None) -> BlockScale:
    """Scales in two levels of float `x`, blocks [.., M, G]; the tensor's is found where it is not given."""
    ideal, most = group_amax(x, format) * np.float32(1 / format.qmax), float(jnp.finfo(E4M3).max)
    if tensor is None:
        tensor = jnp.maximum(jnp.max(ideal, initial=0.0) * np.float32(1 / most), format.scale_floor)
    return BlockScale(jnp.minimum(ideal * (1.0 / tensor), most).astype(E4M3), tensor)


def arrange(scale: Array, format: Format) -> Array:
    """Group scales [.., M, G] as they lie in memory; rows that are filled up have the scale of zeros."""
    return group_scales.arrange(format, scale, scale_of(jnp.zeros(()), format, divide))


def scale_of(amax: Array, format: Format, divide: Callable) -> Array:
    """The scale for float32 largest magnitudes. Kernels call it too, with a division that is IEEE's there."""
    amax, qmax = jnp.maximum(amax, format.amax_floor), np.float32(format.qmax)
    scale = amax * (1 / qmax) if format.find_scale == "reciprocal" else divide(amax, qmax)
    scale = jnp.maximum(scale, format.scale_floor)
    return _round_up_to_power_of_two(scale) if format.ue8m0 else scale


def divide(x: Array, y: Array | np.float32) -> Array:
    """x / y as IEEE has it: XLA would multiply by the reciprocal of a broadcast y, which is not the same float32."""
    return x / lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def _round_up_to_power_of_two(x: Array) -> Array:
    """Exact 2**ceil(log2(x)) for positive float32: one more exponent where any bit of the mantissa is set."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def to_storage(x: Array, scale: Array, format: Format) -> Array:
    """Float `x` over a broadcastable scale, rounded and clamped into `format.dtype`; NaN stays NaN in FP8."""
    x = x.astype(jnp.float32)
    if format.two_level:  # a block of tiny numbers has the scale 0
        return to_pairs(x * jnp.where(scale == 0, 0.0, 1.0 / scale))
    y = x * (1.0 / scale) if format.apply_scale == "reciprocal" else divide(x, scale)
    return to_codes(y, format)


def to_codes(y: Array, format: Format) -> Array:
    """`x / scale` rounded and clamped into `format.dtype`, one value a byte; kernels call it too.

    XLA's own float32 -> FP8 conversion does not saturate, so the clamp comes first; the one to integers cuts towards 0.
    """
    if format.rounding == "half_away":
        # The first clip changes no result: it keeps product and sum from becoming one operation with one rounding.
        y = jnp.clip(y, format.qmin - 1, format.qmax + 1)
        y = y + jnp.where(y >= 0, 0.5, -0.5)
    return jnp.clip(y, format.qmin, format.qmax).astype(format.dtype)


def check_quantize(x, format: Format, scale) -> None:
    """Refuse what `quantize` cannot do."""
    require(format.quantized, "format", format, "use x.astype(format.dtype): this format has no scale")
    require(format.granularity != "seq_head", "format", format, "quantise per tensor, per head or per token and head")
    expected = scale_shape(format, x.shape)
    expected = () if format.two_level else expected
    if scale is not None:
        fix = f"{format} for x {x.shape} needs {expected}"
        require(np.shape(scale) == expected, "scale", f"shape {np.shape(scale)}", fix)
        if format.scale_type != "int32":
            check_positive(scale, "scale")


def quantize(x: Float[Array, "*shape"], format: Format, scale: Array | float | None = None) -> Quantized:
    """Floats by the format's own rules, in plain jnp: what `pa.quantize` is the op of."""
    check_quantize(x, format, scale)
    if scale is not None:
        scale = jnp.asarray(scale, jnp.int32 if format.scale_type == "int32" else jnp.float32)
    if format.two_level:
        blocks, scale = find_block_scale(x, format, scale)
        number = group_scales.repeat(format, blocks.astype(jnp.float32) * scale)
        return Quantized(to_storage(x, number, format), BlockScale(arrange(blocks, format), scale), format)
    if scale is not None:
        return Quantized(to_storage(x, spread(format, scale, x.shape), format), scale, format)
    found = find_scale(x, format)
    if format.granularity != "group":
        return Quantized(to_storage(x, spread(format, found, x.shape), format), found, format)
    return Quantized(to_storage(x, group_scales.repeat(format, found), format), arrange(found, format), format)


def quantized_arrays(format: Format, shape: tuple[int, ...], given: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What quantising numbers of this shape makes: values, then the scales that are found (none, one, or the blocks'
    and the tensor's); `given` tells of a known scale."""
    values = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // format.per_byte), format.stored)
    if format.two_level:
        blocks = jax.ShapeDtypeStruct(scale_shape(format, shape), E4M3)
        return (values, blocks) if given else (values, blocks, jax.ShapeDtypeStruct((), jnp.float32))
    dtype = jnp.int32 if format.scale_type == "int32" else jnp.float32
    return (values,) if given else (values, jax.ShapeDtypeStruct(scale_shape(format, shape), dtype))


def take_apart(x: Quantized, given: bool) -> tuple[Leaf, ...]:
    """The arrays that `quantized_arrays` tells of."""
    if x.format.two_level:
        return (x.values, x.scale.blocks) if given else (x.values, *x.scale)
    return (x.values,) if given else (x.values, x.scale)


def put_together(format: Format, arrays: Sequence[Leaf], given: Leaf | None) -> Quantized:
    """The Quantized of such arrays and of the scale that was given, if any."""
    values, *scales = arrays
    scales = scales if given is None else [*scales, given]
    return Quantized(values, BlockScale(*scales) if format.two_level else scales[0], format)


def dequantize(x: Quantized, dtype=jnp.float32) -> Array:
    """`values * scale` in float32, rounded once to `dtype`; never through another narrow type."""
    numbers = from_pairs(x.values) if x.format.dtype == E2M1 else x.values.astype(jnp.float32)
    return (numbers * spread(x.format, x.scale, x.shape)).astype(dtype)


def fake_quantize(x: Float[Array, "*shape"], format: Format, scale: Array | float | None = None) -> Array:
    """`x` as it reads back after quantisation, in `x.dtype`, with the gradient of the identity (straight through).

    How a model trains against an FP8 cache: an FP8 array itself can carry no gradient. Values that saturate get
    none; the scale gets none.
    """
    return _fake_quantize(x, None if scale is None else lax.stop_gradient(jnp.asarray(scale)), format)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake_quantize(x, scale, format):
    return _fake_quantize_fwd(x, scale, format)[0]


def _fake_quantize_fwd(x, scale, format):
    q = quantize(x, format, scale)
    # Without the barrier XLA on GPUs may drop the pair of conversions as excess precision.
    q = dataclasses.replace(q, values=lax.optimization_barrier(q.values))
    slack = 2**-3 if format.two_level else 2**-20  # a scale that was found may itself be rounded down
    inside = jnp.abs(x.astype(jnp.float32)) <= format.qmax * spread(format, q.scale, x.shape) * (1 + slack)
    return dequantize(q, x.dtype), inside


def _fake_quantize_bwd(format, inside, g):
    return jnp.where(inside, g, 0).astype(g.dtype), None


_fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)
