"""The contract of the latent gather."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_attn.core import packed
from pallas_attn.core.errors import require
from pallas_attn.core.formats import BF16, Format, float_format
from pallas_attn.core.latent_cache import LatentCache, check_latent_cache
from pallas_attn.core.packed import check_gather
from pallas_attn.core.quantized import Quantized


class GatheredLatent(NamedTuple):
    """Contiguous latents of several sequences: what `gather_latent` returns.

    rows: `[max_tokens, C + R]`, sequence b in the rows cu_lens[b] to cu_lens[b + 1]; rows past the last sequence are
      zero. Raw: the stored rows, of a format per tensor as `Quantized`, of FP8_DS_MLA as uint8 `[max_tokens, 656]`.
    cu_lens: int32 `[B + 1]`; cu_lens[-1] > max_tokens tells that so many tokens were to be gathered and did not fit:
      the rows past max_tokens were dropped.
    """

    rows: Array | Quantized
    cu_lens: Int[Array, "B_1"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one gather; hashable, and all that `supports` may look at."""

    max_tokens: int
    latent_dim: int
    rope_dim: int
    seqs: int
    pages: int
    page_size: int
    pages_per_seq: int
    format: Format
    stored: tuple[int, Any]  # width and type of a row in the cache
    dtype: Any  # of what comes out; None for the stored rows


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    cache: LatentCache
    page_table: Array
    kv_lens: Array
    starts: Array | None
    num_seqs: Array | None


def prepare(cache, batch, *, max_tokens, starts=None, dtype=None, raw=False) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_latent_cache(cache)
    check_gather(batch, cache.page_size, max_tokens, starts)
    require(cache.num_pages > 0, "cache.pages", "no page", "allocate at least one")
    require(isinstance(raw, bool), "raw", raw, "it is static: True or False")
    require(not raw or dtype is None, "dtype", dtype, "raw rows are what is stored: leave it out")
    seqs, pages_per_seq = batch.page_table.shape
    problem = Problem(
        int(max_tokens), cache.latent_dim, cache.rope_dim, seqs, cache.num_pages, cache.page_size, pages_per_seq,
        cache.format, (cache.pages.shape[2], cache.pages.dtype), None if raw else _out_dtype(dtype, cache.format),
    )  # fmt: skip
    return problem, Args(cache, batch.page_table, batch.kv_lens, starts, batch.num_seqs)


def _out_dtype(dtype, format: Format) -> np.dtype:
    found = np.dtype(dtype) if dtype is not None else BF16.dtype if format.quantized else format.dtype
    fix = "gather to bfloat16, float16 or float32: the scales are applied; or raw=True for what is stored"
    require(float_format(found) is not None, "dtype", found, fix)
    return found


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(rows, cu_lens)."""
    width, dtype = p.stored if p.dtype is None else (p.latent_dim + p.rope_dim, p.dtype)
    return jax.ShapeDtypeStruct((p.max_tokens, width), dtype), jax.ShapeDtypeStruct((p.seqs + 1,), jnp.int32)


def sources(p: Problem, args: Args) -> tuple[packed.Rows, Array]:
    """Where every row of the result comes from, and cu_lens."""
    first, cu_lens = packed.spans(args.kv_lens, args.starts, args.num_seqs, p.pages_per_seq * p.page_size)
    return packed.rows(first, cu_lens, args.page_table, p.max_tokens, p.page_size, p.pages), cu_lens
