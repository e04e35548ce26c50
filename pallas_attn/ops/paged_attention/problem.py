"""The contract of paged attention: every cross-argument check, and the hashable record that backends decide on."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch, check_batch, check_kv_lens, check_queries
from pallas_attn.core.caches import PagedKVCache, check_cache
from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import Format
from pallas_attn.core.layouts import Layout
from pallas_attn.core.masks import Bias, Mask
from pallas_attn.core.output import check_out, out_arrays
from pallas_attn.core.quantized import Quantized
from pallas_attn.core.query import check_query


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one call; hashable, and all that `supports` may look at."""

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    seqs: int
    pages: int
    page_size: int
    pages_per_seq: int
    max_q_len: int | None
    q_format: Format
    kv_format: Format
    layout: Layout
    options: tuple[str, ...]  # masks, biases and the rest, by name
    out_dtype: np.dtype
    out_format: Format | None
    return_lse: bool

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.q_heads // self.kv_heads


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    q: Array | Quantized
    cache: PagedKVCache
    batch: RaggedBatch
    scale: Array
    mask: Mask
    bias: Bias
    soft_cap: Array | None
    sinks: Array | None
    out_scale: Array | None


def prepare(
    q, cache, batch, *, scale=None, mask=Mask(), bias=None, soft_cap=None, sinks=None, out=None, return_lse=False
) -> tuple[Problem, Args]:  # fmt: skip
    """Check a call; returns what a backend decides on and what it computes with."""
    bias = Bias() if bias is None else bias
    q_format = check_query("q", q)
    tokens, q_heads, head_dim = q.shape
    check_batch(batch)
    seqs, pages_per_seq = batch.page_table.shape
    check_cache(cache, seqs)
    kv_heads, page_size = cache.kv_heads, cache.page_size
    check_kv_lens(batch, page_size)
    require(q_heads % kv_heads == 0, "q", f"{q_heads} heads", f"make it a multiple of the cache's {kv_heads} kv heads")
    require(head_dim == cache.head_dim, "q", f"head_dim {head_dim}", f"the cache has keys of {cache.head_dim}")
    check_queries(batch, tokens)
    _check_mask(mask, seqs)
    _check_heads("bias.alibi_slopes", bias.alibi_slopes, q_heads)
    _check_heads("sinks", sinks, q_heads)
    rank = bias.query_query is None or bias.query_query.ndim == 2
    require(rank, "bias.query_query", getattr(bias.query_query, "shape", None), "it is [Q, Q']")
    default = jnp.bfloat16 if q_format.quantized else q.dtype
    out_dtype, out_format, out_scale = check_out(out, default, cache.v_head_dim)
    options = (*mask.names(), *bias.names(), *_extras(soft_cap, sinks, out_format, return_lse))
    problem = Problem(
        tokens, q_heads, kv_heads, head_dim, cache.v_head_dim, seqs, cache.num_pages, page_size, pages_per_seq,
        batch.max_q_len, q_format, cache.format, cache.layout, options, out_dtype, out_format, return_lse,
    )  # fmt: skip
    scale = head_dim**-0.5 if scale is None else scale
    _check_scalar("scale", scale)
    _check_scalar("soft_cap", soft_cap)
    cap = None if soft_cap is None else jnp.asarray(soft_cap, jnp.float32)
    return problem, Args(q, cache, batch, jnp.asarray(scale, jnp.float32), mask, bias, cap, sinks, out_scale)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(out, the scales that are found, lse?) of a call."""
    out = out_arrays((p.tokens, p.q_heads, p.v_head_dim), p.out_dtype, p.out_format)
    lse = jax.ShapeDtypeStruct((p.tokens, p.q_heads), jnp.float32)
    return (*out, lse) if p.return_lse else out


def _extras(soft_cap, sinks, out_format, return_lse) -> tuple[str, ...]:
    static = out_format is not None and out_format.granularity == "tensor"
    used = {
        "soft cap": soft_cap is not None,
        "sinks": sinks is not None,
        "FP8 output" if static else f"{out_format} output": out_format is not None,
        "LSE": return_lse,
    }
    return tuple(name for name, on in used.items() if on)


def _check_mask(mask: Mask, seqs: int) -> None:
    require(isinstance(mask, Mask), "mask", type(mask).__name__, "pass a pa.Mask")
    if not isinstance(mask.causal, bool):
        require(mask.causal.shape == (seqs,), "mask.causal", f"shape {mask.causal.shape}", f"it is a bool or [{seqs}]")
    _check_scalar("mask.window", mask.window)
    if mask.chunk_lookback is not None:
        ok = isinstance(mask.chunk_lookback, int) and mask.chunk_lookback >= 0
        require(ok, "mask.chunk_lookback", mask.chunk_lookback, "it is a static int >= 0")
        fix = "chunks take their size from it: window // (lookback + 1)"
        require(mask.window is not None, "mask.window", None, fix)
        wide = not is_concrete(mask.window) or int(mask.window) > mask.chunk_lookback  # type: ignore[arg-type]
        require(wide, "mask.window", mask.window, "at least chunk_lookback + 1")
        require(mask.rswa is None, "mask.rswa", "with chunk_lookback", "choose one of them")
    if mask.prefix_ranges is not None:
        shape = mask.prefix_ranges.shape
        ok = len(shape) == 3 and shape[0] == seqs and shape[2] == 2
        require(ok, "mask.prefix_ranges", f"shape {shape}", f"it is [{seqs}, ranges, 2]")
    if mask.clamp_prefix:
        require(mask.window is not None, "mask.window", None, "clamp_prefix clamps to it")
    if mask.rswa is not None:
        shape = mask.rswa[0].shape
        require(shape == (seqs,), "mask.rswa", f"prefix lengths of shape {shape}", f"it is ([{seqs}], window)")


def _check_heads(name: str, x, heads: int) -> None:
    require(x is None or x.shape == (heads,), name, f"shape {getattr(x, 'shape', None)}", f"q has {heads} heads")


def _check_scalar(name: str, x) -> None:
    scalar = x is None or np.ndim(x) == 0
    require(scalar, name, f"shape {getattr(x, 'shape', None)}", "it is one number")
    if x is not None and is_concrete(x) and name == "scale":
        require(bool(np.isfinite(float(x))), name, x, "it is a finite number")
