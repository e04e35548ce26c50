"""Index writes as one scatter of bytes: the portable backend. In place where the cache is donated."""

from pallas_attn.core.index_cache import place
from pallas_attn.core.quantized import quantize
from pallas_attn.ops.sparse_indexer.write.problem import Args, Problem


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The written pages."""
    cache, k, slots = Args(*arrays)
    new = quantize(k, p.format)
    rows = cache.rows(new.values, new.scale)
    return (cache.write_rows(*place(slots, p.pages, p.page_size), rows).pages,)
