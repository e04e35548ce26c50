"""Logits of queries over contiguous index keys: prefill."""

from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.cases import logits_cases
from pallas_attn.ops.sparse_indexer.logits.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.sparse_indexer.logits"
BACKENDS = (
    Backend("mosaic", "pallas_attn.ops.sparse_indexer.mosaic_logits", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="slower than Mosaic"),
    Backend("xla", f"{_HERE}.xla", cost="float32 products"),
    Backend("reference", f"{_HERE}.reference", cost="all products at once"),
)
OP = register(Op("indexer_logits", prepare, outputs, BACKENDS, f"{_HERE}.xla:vjp", None, logits_cases))


def indexer_logits(
    q: Quantized | Float[Array, "T H D"],
    k: Quantized | Float[Array, "L D"],
    weights: Float[Array, "T H"],
    starts: Int[Array, "T"],
    ends: Int[Array, "T"],
    *,
    width: int | None = None,
    scale: Float[Array, ""] | float = 1.0,
    backend: str | None = None,
) -> Float[Array, "T W"]:
    """How much each query wants each key:

        logits[t, n] = scale * sum_h weights[t, h] * relu(q[t, h] . k[n])    for starts[t] <= n < ends[t], else -inf

    with the numbers that values and scales stand for.

    Args:
      q: queries, `Quantized` with their scales (`pa.quantize(q, pa.INDEX_Q)`) or floats.
      k: keys, as `gather_index` gives them, or floats.
      weights: one for each query head; float.
      starts, ends: int32, the keys that row t sees; clamped to the keys there are.
      width: None for absolute columns (W = L, column n is key n); a static int for so many compressed ones: column c of
        row t is key starts[t] + c.
      scale: a factor of all logits; `pa.Indexer` passes D**-0.5 * H**-0.5.
    Returns: float32 `[T, L]` or `[T, width]`; -inf, never garbage, outside of a row's range.
    Raises: InvalidInput for shapes that do not fit, or a bare FP8 array.
    Gradients reach float q and k, weights, scales and `scale`.
    Source: DeepGEMM fp8_mqa_logits (compressed), aiter fp8_mqa_logits (absolute).
    """
    problem, args = prepare(q, k, weights, starts, ends, width=width, scale=scale)
    return apply(OP, problem, args, backend)[0]
