"""Index writes by their definition: for every slot of the cache, the last token that names it, if any."""

import jax.numpy as jnp

from pallas_attn.core.index_cache import place
from pallas_attn.core.quantized import quantize
from pallas_attn.ops.sparse_indexer.write.problem import Args, Problem


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """The written pages. Time and memory: slots of the cache x tokens."""
    cache, k, slots = Args(*arrays)
    if not p.tokens:
        return (cache.pages,)
    page, slot = place(slots, p.pages, p.page_size)
    every = jnp.arange(p.pages * p.page_size)
    names = page * p.page_size + slot == every[:, None]
    named, last = jnp.any(names, axis=1)[:, None], p.tokens - 1 - jnp.argmax(names[:, ::-1], axis=1)
    new = quantize(k, p.format)
    where = every // p.page_size, every % p.page_size
    rows = jnp.where(named, cache.rows(new.values, new.scale)[last], cache.read_rows(*where))
    return (cache.write_rows(*where, rows).pages,)
