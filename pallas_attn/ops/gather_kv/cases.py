"""The cases of the gather: one list for the support table, the tests and the bench."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.caches import abstract_cache
from pallas_attn.core.formats import E4M3_TENSOR, FLOAT_FORMATS, KV_FORMATS, Format
from pallas_attn.core.layouts import LAYOUTS, NHD, Layout
from pallas_attn.ops.gather_kv.problem import Problem, prepare

S = jax.ShapeDtypeStruct


def support_cases() -> Iterator[tuple[str, str, Problem]]:
    """(dimension, name, problem) of every format, layout and type of the result, one varied at a time from FP8 per
    tensor in NHD to bf16."""
    for format in KV_FORMATS:
        yield "format", format.name, _problem(format, NHD)
    for layout in LAYOUTS:
        yield "layout", layout.name, _problem(E4M3_TENSOR, layout)
    for result in FLOAT_FORMATS:
        yield "result", result.name, _problem(E4M3_TENSOR, NHD, result.dtype)


def _problem(format: Format, layout: Layout, dtype=None) -> Problem:
    batch = RaggedBatch(S((3, 4), jnp.int32), S((3,), jnp.int32), S((4,), jnp.int32))
    return prepare(abstract_cache(format, layout, seqs=3), batch, max_tokens=128, dtype=dtype)[0]
