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
