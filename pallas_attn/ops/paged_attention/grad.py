"""Backward of paged attention: one more stream over the pages, with the weights recomputed from the LSE.

Memory does not grow with T x context either: each block's logits are pulled back through the very functions that
made them, so every mask, bias and scale has its gradient without a line of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.ops.paged_attention import xla
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.ops.paged_attention.terms import dot, scores, visible
from pallas_attn.runtime.op import widened


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments; None for those that have none."""
    grads: list[Array | None] = [None] * len(jax.tree.leaves(args))
    if p.out_format is not None or not p.tokens or not p.seqs:
        return grads  # an FP8 output carries no gradient
    wide, values, rebuild = widened(args)
    found, d_sinks = _stream(p, rebuild, values, cotangents)
    for i, g in zip(wide, found, strict=True):
        grads[i] = g
    if args.sinks is not None:
        grads[len(jax.tree.leaves(args[: Args._fields.index("sinks")]))] = d_sinks
    return grads


def _stream(p: Problem, rebuild, values: tuple, cotangents: tuple) -> tuple[tuple[Array, ...], Array | None]:
    args = rebuild(values)
    tiles, block = xla.cut(p, args.batch)
    out, lse = xla.forward(p, args, tiles, block)
    d_out = _by_tile(p, tiles, out, cotangents[0])
    d_lse = _by_tile(p, tiles, lse, cotangents[1]) if p.return_lse else 0.0
    shift = d_lse - jnp.sum(out * d_out, axis=-1)
    finite = jnp.where(jnp.isfinite(lse), lse, 0.0)

    def body(j, grads):
        w = xla.where(p, tiles, block, j)
        seen = visible(args.mask, w)

        def logits(values):
            a = rebuild(values)
            k, v = xla.load(a, tiles, block, j, seen)
            s = dot("nkgqd,nxkd->nkgqx", xla.gather_queries(p, a, tiles), k)
            return scores(s, a.scale, a.bias, a.soft_cap, w), v

        (s, v), pull = jax.vjp(logits, values)
        weight = jnp.where(seen[:, None, None], jnp.exp(jnp.minimum(s - finite[..., None], 0.0)), 0.0)
        d_s = weight * (dot("nkgqd,nxkd->nkgqx", d_out, v) + shift[..., None])
        (new,) = pull((d_s, dot("nkgqx,nkgqd->nxkd", weight, d_out)))
        return jax.tree.map(jnp.add, grads, new)

    first, last = xla.blocks(p, args.mask, tiles, block)
    grads = lax.fori_loop(first, last, body, jax.tree.map(jnp.zeros_like, values))
    return grads, _sinks(p, args, finite, shift, tiles)


def _by_tile(p: Problem, tiles: xla.Tiles, like: Array, cotangent: Array) -> Array:
    """A cotangent by token, brought to the tiles."""
    struct = jax.ShapeDtypeStruct(like.shape, like.dtype)
    transpose = jax.linear_transpose(lambda x: xla.to_tokens(p, x, tiles, 0.0), struct)
    return transpose(cotangent.astype(jnp.float32))[0]


def _sinks(p: Problem, args: Args, lse: Array, shift: Array, tiles: xla.Tiles) -> Array | None:
    """A sink is a key without a value: the cotangent of its logit is its weight times the shift."""
    if args.sinks is None:
        return None
    sink = args.sinks.astype(jnp.float32).reshape(1, p.kv_heads, -1, 1)
    weight = jnp.where(tiles.real[:, None, None, :], jnp.exp(jnp.minimum(sink - lse, 0.0)), 0.0)
    return jnp.sum(weight * shift, axis=(0, 3)).reshape(-1)
