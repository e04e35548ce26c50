"""Quantisation in plain jnp: the portable backend, and what derivatives are taken of."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.quantized import quantize, take_apart
from pallas_attn.ops.quantize_output.problem import Args, Problem
from pallas_attn.runtime.op import apply


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales that are found)."""
    args = Args(*arrays)
    return take_apart(quantize(args.x, p.format, args.scale), p.given)


def fold(p: Problem, args: Args, mapped: Args, n: int, backend: str | None) -> list[Array] | None:
    """vmap: one call over a longer x, a scale of a tensor or head being one of a row; None where each copy of a format
    in two levels has its own tensor."""
    from pallas_attn.ops.quantize_output import OP, prepare

    args, mapped = Args(*args), Args(*mapped)
    if p.format.two_level and (mapped.scale or not p.given):
        return None
    wide = lambda x, m: x if m else jnp.broadcast_to(x, (n, *x.shape))  # noqa: E731
    x, format = wide(args.x, mapped.x), p.format
    shared = format.two_level or (format.granularity == "tensor" and p.given and not mapped.scale)
    scale = args.scale if shared or not p.given else wide(args.scale, mapped.scale)
    if shared or format.granularity in ("group", "token_head"):
        return list(apply(OP, *prepare(x, format, scale), backend))
    x = jnp.moveaxis(x, -2, 1) if format.granularity == "head" else x[:, None]
    rows = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    scale = None if scale is None else scale.reshape(rows.shape[:2])
    values, *found = apply(OP, *prepare(rows, dataclasses.replace(format, granularity="token_head"), scale), backend)
    values = values.reshape(x.shape)
    if format.granularity == "head":
        return [jnp.moveaxis(values, 1, -2), *found]
    return [values[:, 0], *(s[:, 0] for s in found)]
