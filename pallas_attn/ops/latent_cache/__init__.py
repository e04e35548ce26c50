"""The latent cache of MLA: writing tokens into pages, and gathering them."""

import jax
from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.latent_cache import LatentCache
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.latent_cache import gather_problem, write_problem
from pallas_attn.ops.latent_cache.cases import gather_cases, write_cases
from pallas_attn.ops.latent_cache.gather_problem import GatheredLatent
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply

_HERE = "pallas_attn.ops.latent_cache"


WRITE = register(
    Op(
        "write_latent",
        write_problem.prepare,
        write_problem.outputs,
        (
            Backend("mosaic", f"{_HERE}.mosaic_write", ("cuda",), (Arch.HOPPER,)),
            Backend("xla", f"{_HERE}.write_xla", cost="a scatter and launches for the scales"),
            Backend("reference", f"{_HERE}.write_reference", cost="time slots x tokens"),
        ),
        f"{_HERE}.write_xla:vjp",
        f"{_HERE}.write_xla:fold",
        write_cases,
    )
)
# vmap of a gather is a loop: every mapped result is packed and padded by itself.
GATHER = register(
    Op(
        "gather_latent",
        gather_problem.prepare,
        gather_problem.outputs,
        (
            Backend("mosaic", f"{_HERE}.mosaic_gather", ("cuda",), (Arch.HOPPER,)),
            Backend("xla", f"{_HERE}.gather_xla", cost="a gather and launches for the offsets"),
            Backend("reference", f"{_HERE}.gather_reference", cost="a copy of the whole cache"),
        ),
        f"{_HERE}.gather_xla:vjp",
        None,
        gather_cases,
    )
)


def write(cache: LatentCache, latent, rope, slots, backend: str | None) -> tuple[Array, ...]:
    """`write_latent` on checked arguments, returning the leaves of the cache."""
    return apply(WRITE, *write_problem.prepare(cache, latent, rope, slots), backend)


def write_latent(
    cache: LatentCache,
    latent: Float[Array, "T_c C"],
    rope: Float[Array, "T_r R"],
    slots: Int[Array, "T"],
    *,
    backend: str | None = None,
) -> LatentCache:
    """Quantise new latents and rotary parts by the cache's own format and put them into their slots.

    Args:
      cache: donate it (`jax.jit(..., donate_argnums=...)`) and the write is in place.
      latent, rope: `[T', C]` and `[T', R]` floats of one type, T' >= T; rows past T are ignored. FP8_DS_MLA keeps the
        rotary part as bfloat16.
      slots: int `[T]`, page * page_size + slot in page, as `RaggedBatch.slot_mapping` gives; tokens whose slot is
        negative or past the cache are dropped. No two tokens may name the same slot.
      backend: name of a backend; default the best that supports the call.
    Returns: the cache; a format per tensor keeps its scale, FP8_DS_MLA finds one for each tile of each row.
    Raises: InvalidInput for shapes that do not fit, or FP8 input.
    Source: vLLM csrc/cache_kernels.cu concat_and_cache_mla and concat_and_cache_ds_mla.
    """
    return jax.tree.unflatten(jax.tree.structure(cache), write(cache, latent, rope, slots, backend))


def gather_latent(
    cache: LatentCache,
    batch: RaggedBatch,
    *,
    max_tokens: int,
    starts: Int[Array, "B"] | None = None,
    dtype: object | None = None,
    raw: bool = False,
    backend: str | None = None,
) -> GatheredLatent:
    """Latents and rotary parts of the tokens starts[b] to kv_lens[b] of every sequence b, one after the other.

        rows[cu_lens[b] + i] = round(float32(stored value of token starts[b] + i) * scale)

    with one rounding, from float32 to `dtype`; where cache and result have the same float type, a copy of the bits.

    Args:
      cache: pages of any format.
      batch: `page_table`, `kv_lens` and `num_seqs` say which tokens there are; query tokens play no part.
      max_tokens: static, the rows of the result; rows that no token fills are zero, tokens past the last row are
        dropped, and `cu_lens` tells of both.
      starts: int32 `[B]` in tokens, anywhere in a page; None is 0. At or past a sequence's end it yields no token.
      dtype: bfloat16, float16 or float32; default bfloat16 for a quantised cache, else the cache's own.
      raw: return the rows as they are stored, scales included (for FP8_DS_MLA, whole rows of 656 bytes).
      backend: name of a backend; default the best that supports the call.
    Returns: `GatheredLatent(rows [max_tokens, C + R], cu_lens int32 [B + 1])`; raw rows of a format per tensor are
      `Quantized` with the cache's scale.
    Raises: InvalidInput for arguments that do not fit each other; Unsupported when the named backend refuses.
    Page numbers and lengths out of range at run time are clamped: nothing outside the cache is read.
    Gradients reach a float cache and the scale per tensor.
    Source: vLLM csrc/cache_kernels.cu gather_and_maybe_dequant_cache, cp_gather_cache (raw) and
      cp_gather_and_upconvert_fp8_kv_cache.
    """
    problem, args = gather_problem.prepare(cache, batch, max_tokens=max_tokens, starts=starts, dtype=dtype, raw=raw)
    rows, cu_lens = apply(GATHER, problem, args, backend)
    if raw and cache.scale is not None:
        return GatheredLatent(Quantized(rows, cache.scale, cache.format), cu_lens)
    return GatheredLatent(rows, cu_lens)
