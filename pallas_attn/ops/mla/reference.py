"""MLA by its definition: every token against every row of the cache, counting how often it sees the row."""

import jax.numpy as jnp
from jax import lax

from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import dot, finish, nothing, queries, seen, tokens


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(out, the scales that are found, lse [T, H] if asked). Memory: tokens x the whole cache in float32."""
    args = Args(*arrays)
    if p.empty:
        return nothing(p, args)
    who = tokens(p, args)
    slots, valid = seen(p, args, who, jnp.arange(p.keys))
    times = jnp.zeros((p.tokens, p.pages * p.page_size)).at[who.row[:, None], slots].add(valid)
    rows = args.cache.pages.reshape(p.pages * p.page_size, -1)
    # A copy for each token: what it does not see may be NaN to others.
    keys = args.cache.numbers(jnp.broadcast_to(rows, (p.tokens, *rows.shape)), times > 0)
    s = args.scale * dot("thd,txd->thx", queries(args, who.real), keys)
    s = jnp.where(times[:, None] > 0, s, -jnp.inf)
    top = lax.stop_gradient(jnp.max(s, axis=-1, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight = times[:, None] * jnp.exp(s - top[..., None])
    total = jnp.sum(weight, axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = dot("thx,txc->thc", weight, keys[..., : p.latent_dim]) / total[..., None]
    return finish(p, args, out, jnp.where(some, top + jnp.log(total), -jnp.inf))
