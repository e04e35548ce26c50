"""The pieces that all portable code of MLA is made of: which slots a token sees, queries, and what becomes of the
attended latents."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.core import output
from pallas_attn.core.query import query_numbers
from pallas_attn.ops.mla.problem import Args, Problem


def queries(args: Args, real: Array) -> Array:
    """Query numbers [T, H, C + R] in float32, padding zero."""
    return jnp.concatenate([query_numbers(q, real) for q in (args.q_latent, args.q_rope)], axis=-1)


class Tokens(NamedTuple):
    """Some query tokens, each field [n]: which rows of the step they are, their sequences, how many keys there are at
    most for each, and whether it is real."""

    row: Array
    seq: Array
    keys: Array
    real: Array


def tokens(p: Problem, args: Args) -> Tokens:
    """All query tokens. Keys: those up to the token in its sequence, or the entries of its row of `topk`."""
    seq, q_pos, real = args.batch.tokens(p.tokens)
    if args.topk is None:
        keys = jnp.minimum(jnp.clip(args.batch.kv_lens, 0, p.keys)[seq], jnp.maximum(q_pos, -1) + 1)
    else:
        keys = jnp.full(p.tokens, p.keys) if args.topk.lengths is None else jnp.clip(args.topk.lengths, 0, p.keys)
    return Tokens(jnp.arange(p.tokens), seq, jnp.where(real, keys, 0).astype(jnp.int32), real)


def seen(p: Problem, args: Args, who: Tokens, numbers: Array) -> tuple[Array, Array]:
    """(slots, valid), each [n, X]: where keys of these tokens lie, and whether there is such a key.

    numbers [X]: which of a token's keys, counted along its sequence or along its row of `topk`.
    """
    valid = numbers < who.keys[:, None]
    position = jnp.broadcast_to(numbers, valid.shape)
    if args.topk is not None:
        position = args.topk.indices[who.row].at[:, numbers].get(mode="fill", fill_value=-1)
    if p.topk_slots:
        valid &= (position >= 0) & (position < p.pages * p.page_size)
        return jnp.where(valid, position, 0).astype(jnp.int32), valid
    kv_len = jnp.clip(args.batch.kv_lens, 0, p.pages_per_seq * p.page_size)[who.seq]
    valid &= (position >= 0) & (position < kv_len[:, None])
    position = jnp.where(valid, position, 0).astype(jnp.int32)
    page = jnp.take_along_axis(args.batch.page_table[who.seq], position // p.page_size, axis=1)
    return jnp.clip(page, 0, p.pages - 1).astype(jnp.int32) * p.page_size + position % p.page_size, valid


def finish(p: Problem, args: Args, out: Array, lse: Array) -> tuple[Array, ...]:
    """The results from attended latents [T, H, C] in float32: their up-projection, where there is one, and the one
    rounding."""
    results = output.finish(project(out, args.w_uv), p.out_dtype, p.out_format, args.out_scale)
    return (*results, lse) if p.return_lse else results


def project(out: Array, w_uv: Array | None) -> Array:
    """Attended latents [T, H, C], up-projected [T, H * DV] where there is a `w_uv`."""
    if w_uv is None:
        return out
    return dot("thc,hcv->thv", out, w_uv.astype(jnp.float32)).reshape(out.shape[0], w_uv.shape[0] * w_uv.shape[2])


def nothing(p: Problem, args: Args) -> tuple[Array, ...]:
    """The answer where no token can see a key."""
    rows = (p.tokens, p.heads)
    return finish(p, args, jnp.zeros((*rows, p.latent_dim)), jnp.full(rows, -jnp.inf))


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum in full float32, on GPUs too."""
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
