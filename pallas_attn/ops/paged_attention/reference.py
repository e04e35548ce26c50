"""Paged attention by its definition: all keys of every token at once, in float32. Memory T x context x K x D."""

import jax.numpy as jnp
from jax import lax

from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.ops.paged_attention.stored import cache_numbers, finish, query_numbers
from pallas_attn.ops.paged_attention.terms import Where, dot, scores, visible


def supports(p: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(out [T, H, DV], lse [T, H] if asked)."""
    args = Args(*arrays)
    seq, q_pos, real = args.batch.tokens(p.tokens)
    kv_len = jnp.clip(args.batch.kv_lens, 0, p.pages_per_seq * p.page_size)[seq]
    _, length = args.batch.bounds(p.tokens)
    context = args.batch.kv_lens[seq] - length[seq]
    w = Where(seq, context, kv_len, q_pos[:, None], real[:, None], jnp.arange(p.pages_per_seq * p.page_size))
    seen = visible(args.mask, w)
    k, v = cache_numbers(args.cache, args.batch.page_table[seq], seq, seen[:, 0])
    q = query_numbers(args.q, p.kv_heads, real)[:, :, :, None]
    s = scores(dot("tkgqd,txkd->tkgqx", q, k), args.scale, args.bias, args.soft_cap, w)
    s = jnp.where(seen[:, None, None], s, -jnp.inf)
    out, lse = softmax(s, v, args.sinks, real)
    out = finish(p, out.reshape(p.tokens, p.q_heads, -1), args.out_scale)
    return (*out, lse.reshape(p.tokens, p.q_heads)) if p.return_lse else out


def softmax(s, v, sinks, real):
    """Softmax of s [T, K, G, 1, X] over keys and the weighted sum of v [T, X, K, DV]; a sink has no value."""
    sink = jnp.full(s.shape[1:3], -jnp.inf) if sinks is None else sinks.astype(jnp.float32).reshape(s.shape[1:3])
    sink = jnp.where(real[:, None, None], sink, -jnp.inf)[..., None]
    top = lax.stop_gradient(jnp.maximum(jnp.max(s, axis=-1), sink))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    p = jnp.exp(s - top[..., None])
    total = jnp.sum(p, axis=-1) + jnp.exp(sink - top)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = dot("tkgqx,txkd->tkgqd", p, v) / total[..., None]
    return out[:, :, :, 0], jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
