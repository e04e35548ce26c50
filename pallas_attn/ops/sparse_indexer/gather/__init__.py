"""The gather: cached index keys of many sequences, contiguous, with their scales."""

from jaxtyping import Array, Int

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.index_cache import IndexCache
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.cases import gather_cases
from pallas_attn.ops.sparse_indexer.gather.problem import GatheredIndex, outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.sparse_indexer.gather"
BACKENDS = (
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS),
    Backend("xla", f"{_HERE}.xla", cost="a gather of bytes"),
    Backend("reference", f"{_HERE}.reference", cost="a copy of the whole cache"),
)
OP = register(Op("gather_index", prepare, outputs, BACKENDS, f"{_HERE}.problem:vjp", None, gather_cases))


def gather_index(
    cache: IndexCache,
    batch: RaggedBatch,
    *,
    max_tokens: int,
    starts: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> GatheredIndex:
    """Index keys of the tokens starts[b] to kv_lens[b] of every sequence b, one after the other: the stored bytes.

    Args:
      cache: pages of any layout and format.
      batch: `page_table`, `kv_lens` and `num_seqs` say which tokens there are; query tokens play no part.
      max_tokens: static, the rows of the result. Lengths are known only on the device: rows that no token fills are
        zero with a scale of 1, tokens past the last row are dropped, and `cu_lens` tells of both.
      starts: int32 `[B]` in tokens, anywhere in a page; None is 0. At or past a sequence's end it yields no token.
    Returns: `GatheredIndex(k Quantized [max_tokens, D] with scales [max_tokens, G], cu_lens int32 [B + 1])`.
    Raises: InvalidInput for arguments that do not fit each other.
    Page numbers and lengths out of range at run time are clamped: nothing outside the cache is read.
    Source: vLLM csrc/cache_kernels.cu cp_gather_indexer_k_quant_cache.
    """
    problem, args = prepare(cache, batch, max_tokens=max_tokens, starts=starts)
    values, scale, cu_lens = apply(OP, problem, args, backend)
    return GatheredIndex(Quantized(values, scale, cache.format), cu_lens)
