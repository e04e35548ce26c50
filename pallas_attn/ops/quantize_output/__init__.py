"""Quantising activations and outputs: one scale a tensor, a head, a token and head, or a group."""

from jaxtyping import Array, Float

from pallas_attn.core.arch import Arch
from pallas_attn.core.formats import Format
from pallas_attn.core.quantized import Quantized, put_together
from pallas_attn.ops.quantize_output.cases import support_cases
from pallas_attn.ops.quantize_output.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply

_HERE = "pallas_attn.ops.quantize_output"


OP = register(
    Op(
        "quantize",
        prepare,
        outputs,
        (
            Backend("mosaic", f"{_HERE}.mosaic", ("cuda",), (Arch.HOPPER,)),
            Backend("xla", f"{_HERE}.xla", cost="two passes over the input"),
            Backend("reference", f"{_HERE}.reference", cost="memory"),
        ),
        vjp=None,
        batch=f"{_HERE}.xla:fold",
        support_cases=support_cases,
    )
)


def quantize(
    x: Float[Array, "*shape"],
    format: Format,
    scale: Array | float | None = None,
    *,
    backend: str | None = None,
) -> Quantized:
    """Quantise floats by the format's own rules.

    Args:
      x: float array `[..., D]`; for per-head formats `[..., heads, D]`.
      format: a quantised Format other than a per-(sequence, head) one, which exists for reading only.
      scale: a known (static) scale of the shape that `Quantized` tells, for NVFP4 the tensor's `[]`, or None to find it
        from the largest magnitudes in `x`.
      backend: name of a backend; default the best that supports the call.
    Returns: `Quantized`; values are clamped to the finite range, never NaN for finite `x`.
    Raises: InvalidInput for a float format, an axis that is no multiple of the group, a scale of the wrong shape, or
      one that is not positive.
    """
    problem, args = prepare(x, format, scale)
    return put_together(format, apply(OP, problem, args, backend), args.scale)
