"""What Triton kernels share: FP8 and INT8 codes to numbers and back, by integer arithmetic where the GPU has none."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

E4M3 = tl.constexpr(1)  # kinds of codes that arrive as bytes; 0 is whatever Triton converts by itself
E5M2 = tl.constexpr(2)


@triton.jit
def widen(x, KIND: tl.constexpr, TO: tl.constexpr):
    """Stored values in a wider type. Bytes that are FP8 codes become f16, which holds each of them exactly."""
    if KIND == E4M3:
        # Exponent and mantissa fall into place in f16, subnormals too, eight factors of two low.
        magnitude = x.to(tl.uint16) & 0x7F
        bits = ((x.to(tl.uint16) & 0x80) << 8) | tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7).to(tl.uint16)
        x = (bits.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    if KIND == E5M2:
        x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    return x.to(TO)


@triton.jit
def fp8_code(x, KIND: tl.constexpr):
    """The byte of float32 x, within the format's range, rounded half to even; NaN is NaN."""
    MANTISSA: tl.constexpr = 3 if KIND == E4M3 else 2
    SMALLEST: tl.constexpr = -6 if KIND == E4M3 else -14  # exponent of the smallest normal number
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    half = (1 << (22 - MANTISSA)) - 1
    rounded = (size + half + ((size >> (23 - MANTISSA)) & 1)) >> (23 - MANTISSA)
    normal = rounded - ((126 + SMALLEST) << MANTISSA)
    # Adding this number leaves the subnormal's code, rounded, in the lowest bits.
    magic = 2.0 ** (23 + SMALLEST - MANTISSA)
    shifted = (size.to(tl.float32, bitcast=True) + magic).to(tl.uint32, bitcast=True)
    subnormal = shifted - ((127 + 23 + SMALLEST - MANTISSA) << 23)
    code = tl.where(size < ((127 + SMALLEST) << 23), subnormal, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def to_code(x, KIND: tl.constexpr, INTEGER: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x over its scale, rounded and clamped as `core.quantized.to_codes` does; integers round half away from zero."""
    if INTEGER:
        x = tl.minimum(tl.maximum(x, LOW - 1.0), HIGH + 1.0)
        x = x + tl.where(x >= 0, 0.5, -0.5)
        code = tl.minimum(tl.maximum(x, LOW), HIGH).to(tl.int8)
    else:
        code = fp8_code(tl.where(x == x, tl.minimum(tl.maximum(x, LOW), HIGH), x), KIND)
    return code


@triton.jit
def as_bytes(pointer):
    """The pointer to FP8 values, or to their bytes, as one to bytes."""
    return pointer.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def found_scale(x, AMAX_FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr, BY: tl.constexpr, QMAX: tl.constexpr, UE8M0):
    """The scale of each row by the format's rule: `core.quantized.scale_of` once more."""
    amax = tl.max(tl.abs(x), axis=1)
    amax = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), tl.maximum(amax, AMAX_FLOOR))
    scale = amax * BY if BY > 0 else tl.div_rn(amax, tl.zeros_like(amax) + QMAX)
    scale = tl.where(scale == scale, tl.maximum(scale, SCALE_FLOOR), scale)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def codes(
    x, scale, KIND: tl.constexpr, INTEGER: tl.constexpr, RECIPROCAL: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """Rows of numbers over their scales, as codes: `core.quantized.apply_scale` once more."""
    if RECIPROCAL:
        y = x * tl.div_rn(1.0 + tl.zeros_like(scale), scale)[:, None]
    else:
        y = tl.div_rn(x, scale[:, None] + tl.zeros_like(x))
    return to_code(y, KIND, INTEGER, LOW, HIGH)
