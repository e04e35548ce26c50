"""The cases of the indexer's ops: one list for the support table, the tests and the bench.

Each op imports its cases, so these import an op's `prepare` when they are asked for, not before.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.formats import INDEX_FORMATS, INDEX_K, INDEX_Q, Format
from pallas_attn.core.index_cache import INDEX_LAYOUTS, INDEX_NORMAL, IndexCache, IndexLayout
from pallas_attn.core.quantized import Quantized

type Cases = Iterator[tuple[str, str, Any]]
S = jax.ShapeDtypeStruct
HEADS, DIM, ROWS = 64, 128, 8


def caches() -> Iterator[tuple[str, str, IndexCache]]:
    """(dimension, name, abstract cache) of each format, layout and page size, one varied at a time."""
    for format in INDEX_FORMATS:
        yield "format", format.name, abstract_cache(format)
    for layout in INDEX_LAYOUTS:
        yield "layout", layout.name, abstract_cache(layout=layout)
    for page_size in (1, 16, 64):
        yield "page size", str(page_size), abstract_cache(page_size=page_size)


def abstract_cache(format: Format = INDEX_K, layout: IndexLayout = INDEX_NORMAL, page_size: int = 64) -> IndexCache:
    """A cache of shapes only."""
    return jax.eval_shape(lambda: IndexCache.allocate(16, page_size, DIM, format=format, layout=layout))


def abstract_queries(tokens: int = ROWS) -> Quantized:
    """FP8 queries of shapes only."""
    return Quantized(S((tokens, HEADS, DIM), INDEX_Q.dtype), S((tokens, HEADS, 1), jnp.float32), INDEX_Q)


def abstract_batch(next_n: int = 1) -> RaggedBatch:
    """Sequences of `next_n` query tokens each, of shapes only."""
    seqs = ROWS // next_n
    shapes = ((seqs, 4), (seqs,), (seqs + 1,))
    return RaggedBatch(*(S(s, jnp.int32) for s in shapes), max_q_len=next_n)


def rope_cases() -> Cases:
    """Pairs, options, scales and types of queries."""
    from pallas_attn.ops.sparse_indexer.rope.problem import prepare

    x, turn = S((ROWS, HEADS, DIM), jnp.bfloat16), S((ROWS, DIM // 4), jnp.float32)
    for name, interleaved in (("halves", False), ("neighbours", True)):
        yield "pairs", name, prepare(x, turn, turn, interleaved=interleaved)[0]
    yield "option", "hadamard", prepare(x, turn, turn, hadamard=True)[0]
    for name, format in (("power of two", INDEX_Q), ("float32", dataclasses.replace(INDEX_Q, ue8m0=False))):
        yield "scale", name, prepare(x, turn, turn, format=format)[0]
    for dtype in ("bfloat16", "float16", "float32"):
        yield "query", dtype, prepare(S(x.shape, jnp.dtype(dtype)), turn, turn)[0]


def write_cases() -> Cases:
    """Every format, layout and page size."""
    from pallas_attn.ops.sparse_indexer.write.problem import prepare

    for dimension, name, cache in caches():
        yield dimension, name, prepare(cache, S((32, DIM), jnp.bfloat16), S((32,), jnp.int32))[0]


def gather_cases() -> Cases:
    """Every format, layout and page size."""
    from pallas_attn.ops.sparse_indexer.gather.problem import prepare

    for dimension, name, cache in caches():
        yield dimension, name, prepare(cache, abstract_batch(), max_tokens=128)[0]


def logits_cases() -> Cases:
    """FP8 and float operands; absolute and compressed columns."""
    from pallas_attn.ops.sparse_indexer.logits.problem import prepare

    rows, weights, floats = S((ROWS,), jnp.int32), S((ROWS, HEADS), jnp.float32), S((ROWS, HEADS, DIM), jnp.bfloat16)
    k = Quantized(S((256, DIM), INDEX_K.dtype), S((256, 1), jnp.float32), INDEX_K)
    for name, q, keys in (("FP8", abstract_queries(), k), ("float", floats, S((256, DIM), jnp.bfloat16))):
        yield "operands", name, prepare(q, keys, weights, rows, rows)[0]
    for name, width in (("absolute", None), ("compressed", 64)):
        yield "columns", name, prepare(abstract_queries(), k, weights, rows, rows, width=width)[0]


def paged_logits_cases() -> Cases:
    """Every format, layout and page size; query tokens of a sequence; rows of their own lengths; float queries."""
    from pallas_attn.ops.sparse_indexer.paged_logits.problem import prepare

    weights, q = S((ROWS, HEADS), jnp.float32), abstract_queries()
    for dimension, name, cache in caches():
        yield dimension, name, prepare(q, weights, cache, abstract_batch())[0]
    for next_n in (1, 2, 4, 8):
        yield "next_n", str(next_n), prepare(q, weights, abstract_cache(), abstract_batch(next_n))[0]
    lens, floats = S((ROWS,), jnp.int32), S((ROWS, HEADS, DIM), jnp.bfloat16)
    yield "option", "row lengths", prepare(q, weights, abstract_cache(), abstract_batch(), row_lens=lens)[0]
    yield "option", "float query", prepare(floats, weights, abstract_cache(), abstract_batch())[0]


def topk_cases() -> Cases:
    """Numbers of positions, lengths of rows, options."""
    from pallas_attn.ops.sparse_indexer.topk.problem import prepare

    rows = S((ROWS,), jnp.int32)
    for k in (512, 1024, 2048, 4096):
        yield "k", str(k), prepare(S((ROWS, 32768), jnp.float32), k)[0]
    for columns in (4096, 32768, 131072, 1 << 20):
        yield "columns", str(columns), prepare(S((ROWS, columns), jnp.float32), 2048)[0]
    logits = S((ROWS, 32768), jnp.float32)
    yield "option", "starts and ends", prepare(logits, 2048, starts=rows, ends=rows)[0]
    yield "option", "sorted", prepare(logits, 2048, sorted=True)[0]
