"""Backward of MLA: one more stream over the keys, with the weights recomputed from the LSE."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.ops.mla import xla
from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import dot, project, queries, tokens
from pallas_attn.runtime.op import widened


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[Array | None]:
    """Cotangents of the flattened arguments; None for those that have none."""
    grads: list[Array | None] = [None] * len(jax.tree.leaves(args))
    if p.out_format is not None or p.empty:
        return grads  # a quantised output carries no gradient
    wide, values, rebuild = widened(args)
    latents, lse = xla.forward(p, rebuild(values))
    _, pull = jax.vjp(lambda latents, values: project(latents, rebuild(values).w_uv), latents, values)
    d_latents, by_projection = pull(cotangents[0].astype(jnp.float32))
    d_lse = cotangents[1] if p.return_lse else 0.0
    shift = d_lse - jnp.sum(latents * d_latents, axis=-1)
    by_attention = _stream(p, rebuild, values, lse, d_latents, shift)
    for i, a, b in zip(wide, by_projection, by_attention, strict=True):
        grads[i] = a + b
    return grads


def _stream(p: Problem, rebuild, values: tuple, lse: Array, d_latents: Array, shift: Array) -> tuple[Array, ...]:
    """Of d_s = w * (d_latents . c + shift) what reaches each argument, with w = exp(s - lse)."""
    every = tokens(p, rebuild(values))
    finite = jnp.where(jnp.isfinite(lse), lse, 0.0)

    def one(c, grads):
        who = xla.chunk(p, every, c)
        lse, d_out, moved = (x[who.row] for x in (finite, d_latents, shift))

        def body(j, grads):
            def terms(values):
                a = rebuild(values)
                keys, valid = xla.load(p, a, who, j)
                s = xla.logits(a, queries(a, every.real)[who.row], keys)
                return (s, keys[..., : p.latent_dim]), valid

            (s, latents), pull, valid = jax.vjp(terms, values, has_aux=True)
            weight = jnp.where(valid[:, None], jnp.exp(jnp.minimum(s - lse[..., None], 0.0)), 0.0)
            d_s = weight * (dot("thc,txc->thx", d_out, latents) + moved[..., None])
            (new,) = pull((d_s, dot("thx,thc->txc", weight, d_out)))
            return jax.tree.map(jnp.add, grads, new)

        return lax.fori_loop(0, xla.blocks(p, who), body, grads)

    return lax.fori_loop(0, xla.chunks(p), one, jax.tree.map(jnp.zeros_like, values))
