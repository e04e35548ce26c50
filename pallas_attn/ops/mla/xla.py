"""MLA in plain jnp, streaming over blocks of keys with an online softmax: the portable backend.

All heads of a token read the same rows, so that a token with its heads is a tile of its own, and listed keys (`topk`)
differ from a whole sequence in nothing but where they lie. Tokens are taken in chunks, each up to its own longest
context: memory is (chunk x block).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import Tokens, dot, finish, nothing, queries, seen, tokens

MAX_CHUNK = 128  # tokens of a chunk
MAX_BLOCK = 512  # keys of a block
BLOCK_ELEMENTS = 1 << 23  # float32 elements of one block over a chunk, at most about


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def chunks(p: Problem) -> int:
    """How many chunks there are."""
    return -(-p.tokens // MAX_CHUNK)


def chunk(p: Problem, every: Tokens, c: Array) -> Tokens:
    """The tokens of the c-th chunk; past the last one, tokens that are not real."""
    size = -(-p.tokens // chunks(p))
    at = c * size + jnp.arange(size)
    inside, who = at < p.tokens, jax.tree.map(lambda x: x.at[at].get(mode="clip"), every)
    return who._replace(real=who.real & inside, keys=jnp.where(inside, who.keys, 0))


def block(p: Problem) -> int:
    """Keys of a block."""
    size = -(-p.tokens // chunks(p)) * (p.latent_dim + p.rope_dim)
    return min(max(BLOCK_ELEMENTS // size, 1), MAX_BLOCK, p.keys)


def blocks(p: Problem, who: Tokens) -> Array:
    """How many blocks these tokens need."""
    return (jnp.max(who.keys) + block(p) - 1) // block(p)


def load(p: Problem, args: Args, who: Tokens, j: Array) -> tuple[Array, Array]:
    """(keys [n, X, C + R] in float32, zero where not valid; valid [n, X]) of the j-th block."""
    slots, valid = seen(p, args, who, j * block(p) + jnp.arange(block(p)))
    return args.cache.numbers(args.cache.stored(slots), valid), valid


def logits(args: Args, q: Array, keys: Array) -> Array:
    """[n, H, X]."""
    return args.scale * dot("thd,txd->thx", q, keys)


def forward(p: Problem, args: Args) -> tuple[Array, Array]:
    """(latents [T, H, C], lse [T, H]) in float32."""
    every = tokens(p, args)
    q = queries(args, every.real)
    out = lax.map(lambda c: _attend(p, args, q, chunk(p, every, c)), jnp.arange(chunks(p)))
    latents, lse = (x.reshape(-1, *x.shape[2:])[: p.tokens] for x in out)
    return latents, lse


def _attend(p: Problem, args: Args, q: Array, who: Tokens) -> tuple[Array, Array]:
    """(latents [n, H, C], lse [n, H]) of a chunk."""
    q = q[who.row]

    def body(j, state):
        top, total, acc = state
        keys, valid = load(p, args, who, j)
        s = jnp.where(valid[:, None], logits(args, q, keys), -jnp.inf)
        new = jnp.maximum(top, jnp.max(s, axis=-1))
        shift = jnp.where(jnp.isfinite(new), new, 0.0)
        weight, keep = jnp.exp(s - shift[..., None]), jnp.exp(top - shift)
        acc = acc * keep[..., None] + dot("thx,txc->thc", weight, keys[..., : p.latent_dim])
        return new, total * keep + jnp.sum(weight, axis=-1), acc

    rows = q.shape[:2]
    state = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, p.latent_dim))
    top, total, acc = lax.fori_loop(0, blocks(p, who), body, state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return acc / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def run(p: Problem, *arrays):
    """(out, the scales that are found, lse [T, H] if asked)."""
    args = Args(*arrays)
    return nothing(p, args) if p.empty else finish(p, args, *forward(p, args))
