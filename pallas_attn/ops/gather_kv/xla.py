"""The gather as one XLA gather a side with the scales behind it: the portable backend."""

import functools

from jaxtyping import Array

from pallas_attn.ops.gather_kv.problem import Args, Problem, numbers, rows, spans
from pallas_attn.runtime.op import pull_back


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
    return pull_back(functools.partial(run, p), args, cotangents)
