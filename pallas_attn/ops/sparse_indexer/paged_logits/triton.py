"""Logits over cached keys as one Triton launch: a program takes one token and some tiles of its sequence's keys, of any
layout and page size. XLA folds the queries' factors into the weights, and finds each token's sequence, before."""

import jax.numpy as jnp

from pallas_attn.ops.sparse_indexer.paged_logits.problem import Args, Problem, outputs, reach
from pallas_attn.ops.sparse_indexer.terms import fold
from pallas_attn.ops.sparse_indexer.triton import SMS, numbers, refuses, tile
from pallas_attn.runtime.triton import stored, triton_op

MOST_TILES = 16  # of a program


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    scales = p.head_dim // (p.format.group or p.head_dim)
    if scales > 1:
        return f"no keys with {scales} scales"
    return refuses(p.q_format.dtype, p.format.dtype, p.heads, p.head_dim, p.tokens, True)


def run(p: Problem, *arrays, tiles: int | None = None):
    """The logits. tiles: of a program."""
    args = Args(*arrays)
    values, weights = fold(args.q, args.weights, args.scale)
    shape = values.dtype, p.format.dtype, p.heads, p.head_dim
    many, stages = tile(*shape, True)
    every = -(-p.max_len // many)
    tiles = tiles or min(max(p.tokens * every // (8 * SMS), 1), MOST_TILES)
    op = triton_op(
        "pallas_attn.ops.sparse_indexer.triton_logits:paged_logits", out=outputs(p)[0],
        grid=p.tokens * -(-every // tiles), constants=numbers(*shape) | {
            "T": p.tokens, "N": p.pages, "M": p.pages_per_seq, "S": p.page_size,
            "PAGE": p.page_size * args.cache.pages.shape[2], "WIDTH": p.max_len, "SHUFFLED": p.layout.tiled,
            "EXPONENTS": p.format.exponents, "BN": many, "TILES": tiles,
        }, num_stages=stages,
    )  # fmt: skip
    table = args.batch.page_table.astype(jnp.int32)
    return (op(stored(values), weights, args.cache.pages, table, *reach(p, args)),)
