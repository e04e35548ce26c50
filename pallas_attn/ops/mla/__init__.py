"""MLA: attention in the latent space, all heads reading one row of a token."""

from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.formats import Format
from pallas_attn.core.latent_cache import LatentCache
from pallas_attn.core.quantized import Quantized, put_together
from pallas_attn.ops.mla.cases import support_cases
from pallas_attn.ops.mla.problem import outputs, prepare
from pallas_attn.ops.mla.topk import TopK
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.mla"
BACKENDS = (
    Backend("mosaic", f"{_HERE}.mosaic", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="slower than Mosaic"),
    Backend("xla", f"{_HERE}.xla", cost="no tensor cores for FP8, several kernels a block"),
    Backend("reference", f"{_HERE}.reference", cost="memory tokens x slots of the cache"),
)
# vmap is a loop: tokens, heads and keys fill a device without one.
OP = register(Op("mla_attention", prepare, outputs, BACKENDS, f"{_HERE}.grad:vjp", None, support_cases))


def mla_attention(
    q_latent: Float[Array, "T H C"] | Quantized,
    q_rope: Float[Array, "T H R"] | Quantized,
    cache: LatentCache,
    batch: RaggedBatch,
    *,
    scale: Array | float,
    topk: Int[Array, "T k"] | TopK | None = None,
    w_uv: Float[Array, "H C DV"] | None = None,
    out: object | Format | tuple[Format, Array | float] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Array | Quantized | tuple[Array | Quantized, Array]:
    """Multi-head latent attention in its absorbed form: keys and values of all heads are the cached latents.

    For query t of sequence b and head h, over the rows (c_x, r_x) of b up to t's own, or over those that `topk` lists:

        s_x = scale * (q_latent_t . c_x + q_rope_t . r_x)
        out = sum_x exp(s_x) c_x / sum_x exp(s_x),   with w_uv: out_h @ w_uv[h], all heads in a row

    with q, c, r the numbers (stored value times scale), all in float32, rounded once at the end.

    Args:
      q_latent, q_rope: `[T, H, C]` (queries times the key up-projection) and `[T, H, R]`, both bf16, f16 or f32, or
        both Quantized in one format with scales of their own, each per tensor, head or (token, head).
      cache: latents of any format, this step's tokens already written (`write_latent`).
      batch: who owns which query tokens and which pages; sequence b's queries are its last tokens, and causal. Decode,
        several tokens a sequence and prefill may stand in one batch.
      scale: factor of the logits, a number or a traced scalar. It is the model's own, such as (128 + 64) ** -0.5 times
        YaRN's factor, never that of the absorbed width: so there is no default.
      topk: int32 `[T, k]` positions in the token's own sequence, -1 for none, or a `TopK` for slots and lengths.
      w_uv: `[H, C, DV]`, the value up-projection of each head; the result is then `[T, H * DV]`.
      out: a float dtype (default q_latent's, bf16 for a quantised one); (format, scale) with a format per tensor such
        as `E4M3_STATIC` for an FP8 output quantised with that static scale; `e4m3_group(64 or 128)`, in any of its
        orders, for one whose scales are found, or (`NVFP4`, the tensor's scale): DV, or C without w_uv, is a multiple
        of the group.
      return_lse: also return the natural-log sum of exp(s), float32 `[T, H]`.
      backend: name of a backend; default the best that supports the call.
    Returns: latents `[T, H, C]`, or `[T, H * DV]` with w_uv, and the LSE if asked; a Quantized for a quantised output,
      in groups `[T, H * C]` or `[T, H * DV]` as the projection after it reads them. Padding tokens and tokens that see
      no key are 0 (where scales are found, with that of zeros) with LSE -inf.
    Raises: InvalidInput for arguments that do not fit each other; Unsupported when the named backend refuses.
    Page numbers, slots and lengths out of range at run time are clamped or passed over: nothing outside the cache is
    read. Gradients reach queries, scales, w_uv and a float cache.
    Source: vLLM model_executor/layers/attention/mla_attention.py; FlashMLA for the sparse form, whose rows of -1 are
    undefined there.
    """
    problem, args = prepare(
        q_latent, q_rope, cache, batch, scale=scale, topk=topk, w_uv=w_uv, out=out, return_lse=return_lse
    )
    results = apply(OP, problem, args, backend)
    arrays = results[:-1] if return_lse else results
    first = arrays[0] if problem.out_format is None else put_together(problem.out_format, arrays, args.out_scale)
    return (first, results[-1]) if return_lse else first
