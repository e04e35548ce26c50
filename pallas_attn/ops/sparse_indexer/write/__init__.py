"""Writing index keys into their cache."""

from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.index_cache import IndexCache
from pallas_attn.ops.sparse_indexer.cases import write_cases
from pallas_attn.ops.sparse_indexer.write.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.sparse_indexer.write"
BACKENDS = (
    Backend("mosaic", "pallas_attn.ops.sparse_indexer.mosaic_write", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS),
    Backend("xla", f"{_HERE}.xla", cost="a scatter of bytes"),
    Backend("reference", f"{_HERE}.reference", cost="time slots x tokens"),
)
OP = register(Op("write_index", prepare, outputs, BACKENDS, f"{_HERE}.problem:vjp", None, write_cases))


def write_index(
    cache: IndexCache, k: Float[Array, "T_k D"], slots: Int[Array, "T"], *, backend: str | None = None
) -> IndexCache:
    """Quantise new index keys by the cache's own format and put values and scales into their slots.

        scale = max(max|k|, 1e-4) / 448, up to the next power of two (INDEX_K),   value = clamp(round(k / scale))

    Args:
      cache: donate it (`jax.jit(..., donate_argnums=...)`) and the write is in place.
      k: `[T', D]` floats, T' >= T; rows past T are ignored.
      slots: int `[T]`, page * page_size + slot in page, as `RaggedBatch.slot_mapping` gives; tokens whose slot is
        negative or past the cache are dropped. No two tokens may name the same slot.
    Returns: the cache, other bytes in it.
    Raises: InvalidInput for shapes that do not fit, or FP8 input.
    No gradient: the cache is bytes. Train on floats, `indexer_logits(q, pa.fake_quantize(k, pa.INDEX_K), ...)`.
    Source: vLLM csrc/cache_kernels.cu indexer_k_quant_and_cache.
    """
    problem, args = prepare(cache, k, slots)
    (pages,) = apply(OP, problem, args, backend)
    return cache.replace(pages)
