"""The KV cache: writing tokens into pages."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.core.caches import PagedKVCache, abstract_cache
from pallas_attn.core.formats import E4M3_TENSOR, KV_FORMATS
from pallas_attn.core.layouts import LAYOUTS, NHD
from pallas_attn.ops.kv_cache.problem import Problem, outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply

_HERE = "pallas_attn.ops.kv_cache"


def support_cases() -> Iterator[tuple[str, str, Problem]]:
    """(dimension, name, problem) of every format that can be written, and of every layout."""
    S = jax.ShapeDtypeStruct
    rows, slots = S((32, 2, 128), jnp.bfloat16), S((32,), jnp.int32)

    def problem(format, layout):
        return prepare(abstract_cache(format, layout), rows, rows, slots)[0]

    for format in KV_FORMATS:
        if format.granularity != "seq_head":
            yield "format", format.name, problem(format, NHD)
    for layout in LAYOUTS:
        yield "layout", layout.name, problem(E4M3_TENSOR, layout)


OP = register(
    Op(
        "write_kv",
        prepare,
        outputs,
        (
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
