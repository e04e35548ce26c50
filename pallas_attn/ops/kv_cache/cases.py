"""The cases of cache writes: one list for the support table, the tests and the bench."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_attn.core.caches import abstract_cache
from pallas_attn.core.formats import E4M3_TENSOR, KV_FORMATS, Format
from pallas_attn.core.layouts import LAYOUTS, NHD, Layout
from pallas_attn.ops.kv_cache.problem import Problem, prepare


def support_cases() -> Iterator[tuple[str, str, Problem]]:
    """(dimension, name, problem) of every format that can be written, and of every layout."""
    for format in KV_FORMATS:
        if format.granularity != "seq_head":
            yield "format", format.name, _problem(format, NHD)
    for layout in LAYOUTS:
        yield "layout", layout.name, _problem(E4M3_TENSOR, layout)


def _problem(format: Format, layout: Layout) -> Problem:
    rows, slots = jax.ShapeDtypeStruct((32, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((32,), jnp.int32)
    return prepare(abstract_cache(format, layout), rows, rows, slots)[0]
