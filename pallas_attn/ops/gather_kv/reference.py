"""The gather by its definition: the whole cache in its logical order, of which each row of the result is one token."""

import jax.numpy as jnp

from pallas_attn.ops.gather_kv.problem import Args, Problem, numbers, rows, spans


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(k, v, cu_lens). Memory: a copy of the cache."""
    args = Args(*arrays)
    first, cu_lens = spans(p, args)
    where = rows(p, args, first, cu_lens)
    scales = args.cache.scales or (None, None)
    logical = [x.reshape(-1, *x.shape[2:]) for x in args.cache.read(jnp.arange(p.pages))]
    picked = [x[where.page * p.page_size + where.slot] for x in logical]
    k, v = (numbers(p, x, s, where, args.cache) for x, s in zip(picked, scales, strict=True))
    return k, v, cu_lens
