"""Logits of queries over their sequences' cached index keys: decode."""

from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.index_cache import IndexCache
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.cases import paged_logits_cases
from pallas_attn.ops.sparse_indexer.paged_logits.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.sparse_indexer.paged_logits"
BACKENDS = (
    Backend("mosaic", "pallas_attn.ops.sparse_indexer.mosaic_paged_logits", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="slower than Mosaic"),
    Backend("xla", f"{_HERE}.xla", cost="every query gathers its pages"),
    Backend("reference", f"{_HERE}.reference", cost="a copy of the cache and all products at once"),
)
OP = register(Op("paged_indexer_logits", prepare, outputs, BACKENDS, f"{_HERE}.xla:vjp", None, paged_logits_cases))


def paged_indexer_logits(
    q: Quantized | Float[Array, "T H D"],
    weights: Float[Array, "T H"],
    cache: IndexCache,
    batch: RaggedBatch,
    *,
    max_len: int | None = None,
    row_lens: Int[Array, "T"] | None = None,
    scale: Float[Array, ""] | float = 1.0,
    backend: str | None = None,
) -> Float[Array, "T max_len"]:
    """How much each query token wants each cached token of its sequence:

        logits[t, x] = scale * sum_h weights[t, h] * relu(q[t, h] . k[x])    for x < n_t, else -inf

    where n_t is the token's position + 1: with next_n query tokens a sequence, kv_len - next_n + j + 1 for the j-th.
    Sequences may bring different numbers of query tokens; row t of q and of weights always belong together.

    Args:
      q: queries, `Quantized` with their scales (`pa.quantize(q, pa.INDEX_Q)`) or floats.
      weights: one for each query head; float.
      cache: pages of any layout and format, this step's tokens already written.
      batch: pages, lengths and query tokens of the sequences.
      max_len: static, the columns of the result; None for all that a row of the page table holds.
      row_lens: int32 `[T]`, n_t itself, where it is not position + 1 (drafts in a tree); at most
        the sequence's kv_len.
      scale: a factor of all logits; `pa.Indexer` passes D**-0.5 * H**-0.5.
    Returns: float32 `[T, max_len]`; -inf, never garbage, at and after n_t; a padding token has -inf only.
    Raises: InvalidInput for shapes that do not fit, or a bare FP8 array.
    Page numbers and lengths out of range at run time are clamped: nothing outside the cache is read.
    Gradients reach float q, weights, the scale of q and `scale`; the cache is bytes and gets none.
    Source: DeepGEMM fp8_paged_mqa_logits.
    """
    problem, args = prepare(q, weights, cache, batch, max_len=max_len, row_lens=row_lens, scale=scale)
    return apply(OP, problem, args, backend)[0]
