"""RoPE and quantisation of index queries."""

from jaxtyping import Array, Float

from pallas_attn.core.arch import Arch
from pallas_attn.core.formats import INDEX_Q, Format
from pallas_attn.core.quantized import Quantized, put_together
from pallas_attn.ops.sparse_indexer.cases import rope_cases
from pallas_attn.ops.sparse_indexer.rope.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply

_HERE = "pallas_attn.ops.sparse_indexer.rope"
BACKENDS = (
    Backend("mosaic", "pallas_attn.ops.sparse_indexer.mosaic_rope", ("cuda",), (Arch.HOPPER,)),
    Backend("xla", f"{_HERE}.xla", cost="rotated queries in memory"),
    Backend("reference", f"{_HERE}.reference", cost="a gather of every number's partner"),
)
OP = register(Op("rope_quantize", prepare, outputs, BACKENDS, None, None, rope_cases))


def rope_quantize(
    x: Float[Array, "T H D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    interleaved: bool = False,
    hadamard: bool = False,
    format: Format = INDEX_Q,
    backend: str | None = None,
) -> Quantized:
    """Rotate index queries by RoPE and quantise them: one step from the projection to what the logits ops take.

        y_i = x_i cos_i - x_j sin_i,   y_j = x_j cos_i + x_i sin_i      (i, j) the i-th pair of the first R dims

    The same bits as rotation (in float32, products and sums rounded one by one, the result to the type of x), the
    Hadamard matrix (likewise) and `pa.quantize` one after the other. Scales that are no powers of two depend on the
    division, which XLA approximates on a GPU; the scale of a row with a NaN depends on the backend's maximum.

    Args:
      x: `[T, H, D]` floats, D a multiple of the format's group.
      cos, sin: float32 `[T, R / 2]`, of the angles position * frequency; R <= D, dims from R on are not rotated.
      interleaved: static; pairs are dims (2i, 2i + 1) instead of (i, i + R / 2).
      hadamard: static; turn by the Hadamard matrix behind RoPE, as the keys were; D a power of two.
      format: e4m3 with a float32 scale per group, in rows: INDEX_Q, or with `ue8m0=False` scales of any size.
    Returns: `Quantized` `[T, H, D]` with scales `[T, H, D / group]`.
    Raises: InvalidInput for shapes that do not fit, or another format.
    Training rotates and passes on `fake_quantize`: FP8 values carry no gradient.
    Source: vLLM csrc fused_indexer_q_rope_quant (rotation, Hadamard and quantisation of q).
    """
    problem, args = prepare(x, cos, sin, interleaved=interleaved, hadamard=hadamard, format=format)
    return put_together(format, apply(OP, problem, args, backend), None)
