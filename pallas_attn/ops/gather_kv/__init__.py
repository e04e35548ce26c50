"""The gather: cached tokens of many sequences as contiguous keys and values."""

from jaxtyping import Array, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.caches import PagedKVCache
from pallas_attn.ops.gather_kv.cases import support_cases
from pallas_attn.ops.gather_kv.problem import Gathered, outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.gather_kv"
BACKENDS = (
    Backend("mosaic", f"{_HERE}.mosaic", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="launches for the offsets, then one"),
    Backend("xla", f"{_HERE}.xla", cost="a gather for each side and launches for the offsets"),
    Backend("reference", f"{_HERE}.reference", cost="a copy of the whole cache"),
)
# vmap is a loop: every mapped result is packed and padded by itself, so that no longer batch gives them all.
OP = register(Op("gather_kv", prepare, outputs, BACKENDS, f"{_HERE}.xla:vjp", None, support_cases))


def gather_kv(
    cache: PagedKVCache,
    batch: RaggedBatch,
    *,
    max_tokens: int,
    starts: Int[Array, "B"] | None = None,
    dtype: object | None = None,
    backend: str | None = None,
) -> Gathered:
    """Keys and values of the tokens starts[b] to kv_lens[b] of every sequence b, one after the other.

        k[cu_lens[b] + i] = round(float32(stored value of token starts[b] + i) * scale)

    with one rounding, from float32 to `dtype`; where cache and result have the same float type, a copy of the bits.

    Args:
      cache: pages of any format and layout.
      batch: `page_table`, `kv_lens` and `num_seqs` say which tokens there are; query tokens play no part, so that a
        chunk of the context is the batch with the chunk's ends as `kv_lens` and its beginnings as `starts`.
      max_tokens: static, the rows of the result. Lengths are known only on the device: rows that no token fills are
        zero, tokens past the last row are dropped, and `cu_lens` tells of both.
      starts: int32 `[B]` in tokens, anywhere in a page; None is 0. At or past a sequence's end it yields no token.
      dtype: bfloat16, float16 or float32; default bfloat16 for a quantised cache, else the cache's own.
      backend: name of a backend; default the best that supports the call.
    Returns: `Gathered(k [max_tokens, K, D], v [max_tokens, K, DV], cu_lens int32 [B + 1])`.
    Raises: InvalidInput for arguments that do not fit each other; Unsupported when the named backend refuses.
    Page numbers and lengths out of range at run time are clamped: nothing outside the cache is read.
    Gradients reach a float cache and the scales.
    Source: vLLM v1/attention/backends/rocm_aiter_fa.py cp_mha_gather_cache.
    """
    problem, args = prepare(cache, batch, max_tokens=max_tokens, starts=starts, dtype=dtype)
    return Gathered(*apply(OP, problem, args, backend))
