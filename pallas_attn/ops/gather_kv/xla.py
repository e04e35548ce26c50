"""The gather as one XLA gather a side with the scales behind it: the portable backend."""

import jax
from jaxtyping import Array

from pallas_attn.ops.gather_kv.problem import Args, Problem, numbers, rows, spans
from pallas_attn.runtime.op import differentiable


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(k, v, cu_lens)."""
    args = Args(*arrays)
    first, cu_lens = spans(p, args)
    where = rows(p, args, first, cu_lens)
    scales = args.cache.scales or (None, None)
    picked = args.cache.read_slots(where.page, where.slot)
    k, v = (numbers(p, x, s, where, args.cache) for x, s in zip(picked, scales, strict=True))
    return k, v, cu_lens


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments: the gather's transpose into a float cache, and of the scales."""
    leaves, tree = jax.tree.flatten(args)
    mine = [i for i, x in enumerate(leaves) if differentiable(x)]

    def gathered(*floats):
        given = dict(zip(mine, floats, strict=True))
        return run(p, *jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(leaves)]))[:2]

    _, pull = jax.vjp(gathered, *(leaves[i] for i in mine))
    found = dict(zip(mine, pull(tuple(cotangents[:2])), strict=True))
    return [found.get(i) for i in range(len(leaves))]
