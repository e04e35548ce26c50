"""The cases of paged attention: one list for the support table, the tests and the bench."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.caches import abstract_cache
from pallas_attn.core.formats import E4M3_STATIC, E4M3_TENSOR, KV_FORMATS, NVFP4, e4m3_group
from pallas_attn.core.layouts import LAYOUTS, NHD
from pallas_attn.core.masks import Bias, Mask
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention.problem import Problem, prepare

S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of the op, by name, as keyword arguments for 3 sequences and 8 heads."""

    name: str
    kwargs: dict


def options() -> tuple[Option, ...]:
    """Every option that a backend may refuse, with abstract arrays."""
    i32, f32 = jnp.int32, jnp.float32
    ranges, slopes = S((3, 2, 2), i32), S((8,), f32)
    return (
        Option("causal", {}),
        Option("non-causal", {"mask": Mask(causal=False)}),
        Option("causal per sequence", {"mask": Mask(causal=S((3,), jnp.bool_))}),
        Option("sliding window", {"mask": Mask(window=21)}),
        Option("non-causal window", {"mask": Mask(causal=False, window=21)}),
        Option("chunked local", {"mask": Mask(window=32, chunk_lookback=1)}),
        Option("prefix ranges", {"mask": Mask(prefix_ranges=ranges)}),
        Option("prefix ranges, clamped", {"mask": Mask(window=21, prefix_ranges=ranges, clamp_prefix=True)}),
        Option("R-SWA", {"mask": Mask(rswa=(S((3,), i32), 16))}),
        Option("soft cap", {"soft_cap": 5.0}),
        Option("ALiBi", {"bias": Bias(alibi_slopes=slopes)}),
        Option("ALiBi sqrt", {"bias": Bias(alibi_slopes=slopes, alibi_sqrt=True)}),
        Option("ALiBi before soft cap", {"bias": Bias(alibi_slopes=slopes, before_soft_cap=True), "soft_cap": 5.0}),
        Option("query-query bias", {"bias": Bias(query_query=S((9, 9), f32))}),
        Option("sinks", {"sinks": S((8,), f32)}),
        Option("FP8 query", {"q": Quantized(S((32, 8, 128), jnp.float8_e4m3fn), S((), f32), E4M3_TENSOR)}),
        Option("FP8 output", {"out": (E4M3_STATIC, 0.5)}),
        Option("group FP8 output", {"out": e4m3_group(128)}),
        Option("NVFP4 output", {"out": (NVFP4, 0.01)}),
        Option("LSE", {"return_lse": True}),
    )


def abstract_batch(seqs: int = 3, pages_per_seq: int = 4, max_q_len: int | None = None) -> RaggedBatch:
    """A batch of shapes only."""
    shapes = ((seqs, pages_per_seq), (seqs,), (seqs + 1,))
    return RaggedBatch(*(S(s, jnp.int32) for s in shapes), max_q_len=max_q_len)


def support_cases() -> Iterator[tuple[str, str, Problem]]:
    """(dimension, name, problem) of each format, layout and option, one varied at a time from FP8 per tensor in NHD;
    for mixed batches and for pure decode (max_q_len 1)."""
    for kind, most in (("mixed", None), ("decode", 1)):
        batch = abstract_batch(max_q_len=most)
        q = S((32, 8, 128), jnp.bfloat16)
        for format in KV_FORMATS:
            yield f"{kind}, format", format.name, prepare(q, abstract_cache(format, NHD, seqs=3), batch)[0]
        cache = abstract_cache(E4M3_TENSOR, NHD)
        for layout in LAYOUTS:
            yield f"{kind}, layout", layout.name, prepare(q, abstract_cache(E4M3_TENSOR, layout), batch)[0]
        for option in options():
            kwargs = dict(option.kwargs)
            yield f"{kind}, option", option.name, prepare(kwargs.pop("q", q), cache, batch, **kwargs)[0]
