"""The KV cache: writing tokens into pages."""

import jax
from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.caches import PagedKVCache
from pallas_attn.ops.kv_cache.cases import support_cases
from pallas_attn.ops.kv_cache.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.kv_cache"


OP = register(
    Op(
        "write_kv",
        prepare,
        outputs,
        (
            Backend("mosaic", f"{_HERE}.mosaic", ("cuda",), (Arch.HOPPER,)),
            Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="up to twice the time of Mosaic"),
            Backend("xla", f"{_HERE}.xla", cost="a scatter for each buffer"),
            Backend("reference", f"{_HERE}.reference", cost="time slots x tokens"),
        ),
        f"{_HERE}.xla:vjp",
        f"{_HERE}.xla:fold",
        support_cases,
    )
)


def write(cache: PagedKVCache, k, v, slots, backend: str | None) -> tuple[Array, ...]:
    """`write_kv` on checked arguments, returning the leaves of the cache."""
    return apply(OP, *prepare(cache, k, v, slots), backend)


def write_kv(
    cache: PagedKVCache,
    k: Float[Array, "T_k K D"],
    v: Float[Array, "T_v K DV"],
    slots: Int[Array, "T"],
    *,
    backend: str | None = None,
) -> PagedKVCache:
    """Quantise new keys and values by the cache's own format and put them into their slots.

    Args:
      cache: donate it (`jax.jit(..., donate_argnums=...)`) and the write is in place.
      k, v: `[T', K, D]` and `[T', K, DV]` floats, T' >= T; rows past T are ignored.
      slots: int `[T]`, page * page_size + slot in page, as `RaggedBatch.slot_mapping` gives; tokens whose slot is
        negative or past the cache are dropped. No two tokens may name the same slot.
    Returns: the cache; a format per tensor or head keeps its scales, one per (token, head) gets the tokens' own.
    Raises: InvalidInput for shapes that do not fit, FP8 input, or a format per (sequence, head).
    Source: vLLM csrc/cache_kernels.cu reshape_and_cache_flash, and the per-token-head Triton writer.
    """
    return jax.tree.unflatten(jax.tree.structure(cache), write(cache, k, v, slots, backend))
