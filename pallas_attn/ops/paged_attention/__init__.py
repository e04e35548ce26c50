"""Paged attention: ragged queries against keys and values in pages, prefill and decode in one call."""

from jaxtyping import Array, Float

from pallas_attn.core.arch import Arch
from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.caches import PagedKVCache
from pallas_attn.core.formats import Format
from pallas_attn.core.masks import Bias, Mask
from pallas_attn.core.quantized import Quantized, put_together
from pallas_attn.ops.paged_attention.cases import support_cases
from pallas_attn.ops.paged_attention.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.paged_attention"
BACKENDS = (
    Backend("mosaic", f"{_HERE}.mosaic", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="a tenth slower than Mosaic"),
    Backend("xla", f"{_HERE}.xla", cost="no tensor cores for FP8, several kernels a block"),
    Backend("reference", f"{_HERE}.reference", cost="memory tokens x context"),
)
OP = register(
    Op("paged_attention", prepare, outputs, BACKENDS, f"{_HERE}.grad:vjp", f"{_HERE}.fold:fold", support_cases)
)  # fmt: skip


def paged_attention(
    q: Float[Array, "T H D"] | Quantized,
    cache: PagedKVCache,
    batch: RaggedBatch,
    *,
    scale: Array | float | None = None,
    mask: Mask = Mask(),
    bias: Bias | None = None,
    soft_cap: Array | float | None = None,
    sinks: Float[Array, "H"] | None = None,
    out: object | Format | tuple[Format, Array | float] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Array | Quantized | tuple[Array | Quantized, Array]:
    """Attention of the step's query tokens to the cached tokens of their own sequences.

    For query t of sequence b and head h, over the visible keys x of b:

        s_x = soft_cap * tanh(scale * q_t . k_x / soft_cap) + bias
        out = sum_x exp(s_x) v_x / (exp(sinks_h) + sum_x exp(s_x))

    with q, k, v the numbers (stored value times scale), all in float32, rounded once at the end.

    Args:
      q: `[T, H, D]` bf16, f16 or f32, or Quantized with a scale per tensor, head or (token, head). Head h reads kv
        head h // (H / K).
      cache: keys `[.., K, D]` and values `[.., K, DV]` in pages, this step's tokens already written (`write_kv`).
      batch: who owns which query tokens and which pages; sequence b's queries are its last tokens.
      scale: factor of the logits, default D ** -0.5. A number or a traced scalar, as are soft_cap and the window.
      mask: which keys are visible; causal by default.
      bias: ALiBi or query-query bias.
      soft_cap: bound of the scaled logits; None or <= 0 is none.
      sinks: float `[H]`, a logit of each head that takes weight but has no value; not multiplied by `scale`.
      out: a float dtype (default q's, bf16 for a quantised q); (format, scale) with a format per tensor such as
        `E4M3_STATIC` for an FP8 output quantised with that static scale; `e4m3_group(64 or 128)` for one whose scales
        are found, or (`NVFP4`, the tensor's scale): DV is a multiple of the group.
      return_lse: also return the natural-log sum of exp(s), sinks included, float32 `[T, H]`.
      backend: name of a backend; default the best that supports the call.
    Returns: `[T, H, DV]`, and the LSE if asked; a Quantized for a quantised output, in groups `[T, H * DV]` as the
      projection after it reads them. Padding tokens are 0 (where scales are found, with that of zeros) with LSE -inf;
      real tokens that see no key are 0 with LSE = sinks (-inf without), so that partial results merge exactly.
    Raises: InvalidInput for arguments that do not fit each other; Unsupported when the named backend refuses.
    Page numbers and lengths out of range at run time are clamped: nothing outside the cache is read.
    Source: vLLM v1/attention/ops/triton_unified_attention.py (order of terms), aiter pa_ragged (bias before the cap).
    """
    problem, args = prepare(
        q, cache, batch,
        scale=scale, mask=mask, bias=bias, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
    )  # fmt: skip
    results = apply(OP, problem, args, backend)
    arrays = results[:-1] if return_lse else results
    first = arrays[0] if problem.out_format is None else put_together(problem.out_format, arrays, args.out_scale)
    return (first, results[-1]) if return_lse else first
