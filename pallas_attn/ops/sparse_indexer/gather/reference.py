"""The gather by its definition: the whole cache in its logical order, of which each row of the result is one token."""

import jax.numpy as jnp

from pallas_attn.ops.sparse_indexer.gather.problem import Args, Problem, only_real, sources


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales, cu_lens). Memory: a copy of the cache."""
    args = Args(*arrays)
    where, cu_lens = sources(p, args)
    values, scales = args.cache.read(jnp.arange(p.pages))
    return (*only_real(values[where.page, where.slot], scales[where.page, where.slot], where.real), cu_lens)
