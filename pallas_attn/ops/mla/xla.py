"""MLA in plain jnp, streaming over blocks of keys with an online softmax: the portable backend.

All heads of a token read the same rows, so that a token with its heads is a tile of its own, and listed keys (`topk`)
differ from a whole sequence in nothing but where they lie.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import dot, finish, nothing, queries, seen

MIN_BLOCK, MAX_BLOCK = 16, 512  # keys of a block
BLOCK_ELEMENTS = 1 << 23  # float32 elements of one block over all tokens, at most about


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def block(p: Problem) -> int:
    """Keys of a block: fewer when there are many tokens."""
    keys = BLOCK_ELEMENTS // max(p.tokens * (p.latent_dim + p.rope_dim), 1)
    return min(max(keys, MIN_BLOCK), MAX_BLOCK, p.keys)


def blocks(p: Problem, args: Args) -> Array:
    """How many blocks this step needs."""
    if args.topk is not None:
        longest = p.keys if args.topk.lengths is None else jnp.clip(jnp.max(args.topk.lengths), 0, p.keys)
    else:
        seq, q_pos, real = args.batch.tokens(p.tokens)
        longest = jnp.max(jnp.where(real, jnp.minimum(q_pos + 1, args.batch.kv_lens[seq]), 0))
        longest = jnp.clip(longest, 0, p.keys)
    return (jnp.asarray(longest, jnp.int32) + block(p) - 1) // block(p)


def load(p: Problem, args: Args, j: Array) -> tuple[Array, Array]:
    """(keys [T, X, C + R] in float32, zero where not valid; valid [T, X]) of the j-th block."""
    slots, valid = seen(p, args, j * block(p) + jnp.arange(block(p)))
    return args.cache.numbers(args.cache.stored(slots), valid), valid


def logits(args: Args, q: Array, keys: Array) -> Array:
    """[T, H, X]."""
    return args.scale * dot("thd,txd->thx", q, keys)


def forward(p: Problem, args: Args) -> tuple[Array, Array]:
    """(latents [T, H, C], lse [T, H]) in float32."""
    q = queries(args, args.batch.tokens(p.tokens)[2])

    def body(j, state):
        top, total, acc = state
        keys, valid = load(p, args, j)
        s = jnp.where(valid[:, None], logits(args, q, keys), -jnp.inf)
        new = jnp.maximum(top, jnp.max(s, axis=-1))
        shift = jnp.where(jnp.isfinite(new), new, 0.0)
        weight, keep = jnp.exp(s - shift[..., None]), jnp.exp(top - shift)
        acc = acc * keep[..., None] + dot("thx,txc->thc", weight, keys[..., : p.latent_dim])
        return new, total * keep + jnp.sum(weight, axis=-1), acc

    rows = (p.tokens, p.heads)
    state = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, p.latent_dim))
    top, total, acc = lax.fori_loop(0, blocks(p, args), body, state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return acc / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def run(p: Problem, *arrays):
    """(out, the scales that are found, lse [T, H] if asked)."""
    args = Args(*arrays)
    return nothing(p, args) if p.empty else finish(p, args, *forward(p, args))
