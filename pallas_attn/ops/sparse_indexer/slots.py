"""From positions in a sequence to slots of a cache: what sparse attention reads."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_attn.core.batch import RaggedBatch, check_batch
from pallas_attn.core.errors import require
from pallas_attn.ops.sparse_indexer.terms import check_size


def to_slots(
    indices: Int[Array, "T k"], batch: RaggedBatch, *, page_size: int, compact: bool = False
) -> Int[Array, "T k"] | tuple[Int[Array, "T k"], Int[Array, "T"]]:
    """Positions of each query token's own sequence as slots, page_table[b, x // page_size] * page_size + x % page_size.

    Args:
      indices: int `[T, k]` as `indexer_topk` gives them; negative ones are no position.
      batch: `page_table` and `cu_q_lens` say whose row t is.
      page_size: static, of the cache that the slots are for; it may be another than the index cache's, if the page
        table is that cache's too.
      compact: also bring the valid slots of a row to its front, in their order, and count them.
    Returns: int32 `[T, k]`, -1 for what is no position, past the page table, in a negative page or a padding token's;
      with `compact` also int32 `[T]`, how many there are.
    Source: vLLM v1/attention/backends/mla/sparse_utils.py triton_convert_req_index_to_global_index.
    """
    check_batch(batch)
    require(indices.ndim == 2, "indices", f"shape {indices.shape}", "they are [tokens, k]")
    require(jnp.issubdtype(indices.dtype, jnp.integer), "indices", indices.dtype, "use int32")
    check_size("page_size", page_size)
    width = batch.page_table.shape[1]
    require(
        batch.page_table.size > 0, "batch.page_table", f"shape {batch.page_table.shape}", "it has room for no token"
    )
    seq, _, real = batch.tokens(indices.shape[0])
    column = indices // page_size
    page = batch.page_table.astype(jnp.int32)[seq[:, None], jnp.clip(column, 0, width - 1)]
    valid = real[:, None] & (indices >= 0) & (column < width) & (page >= 0)
    slots = jnp.where(valid, page * page_size + (indices % page_size).astype(jnp.int32), -1)
    if not compact:
        return slots
    order = jnp.argsort(~valid, axis=1, stable=True)
    return jnp.take_along_axis(slots, order, axis=1), jnp.sum(valid, axis=1, dtype=jnp.int32)
