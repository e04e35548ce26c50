"""Logits over contiguous keys as one Triton launch: a program keeps a tile of keys and goes over some tokens. XLA folds
the queries' factors into the weights before."""

import jax.numpy as jnp

from pallas_attn.ops.sparse_indexer.logits.problem import Args, Problem, outputs, ranges
from pallas_attn.ops.sparse_indexer.terms import apart, fold
from pallas_attn.ops.sparse_indexer.triton import SMS, numbers, refuses, tile
from pallas_attn.runtime.triton import power_of_two, stored, triton_op

MOST_TOKENS = 128  # of a program


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    return refuses(p.q_format.dtype, p.k_format.dtype, p.heads, p.head_dim, p.tokens, False)


def run(p: Problem, *arrays, tokens: int | None = None):
    """The logits. tokens: of a program."""
    args = Args(*arrays)
    (values, weights), (keys, k_scale) = fold(args.q, args.weights, args.scale), apart(args.k)
    starts, ends = (x[:, 0] for x in ranges(p, args))
    (result,) = outputs(p)
    width = result.shape[1]
    shape = values.dtype, keys.dtype, p.heads, p.head_dim
    many, stages = tile(*shape, False)
    # Rows of compressed columns end where a row that starts at the last key ends.
    tiles = -(-(p.keys if p.width is None else p.keys + p.width) // many)
    tokens = tokens or min(power_of_two(p.tokens * tiles // (4 * SMS)), MOST_TOKENS)
    op = triton_op(
        "pallas_attn.ops.sparse_indexer.triton_logits:logits", out=result, grid=tiles * -(-p.tokens // tokens),
        constants=numbers(*shape) | {
            "T": p.tokens, "N": p.keys, "WIDTH": width, "COMPRESSED": p.width is not None, "BT": tokens,
            "BN": many, "TILES": tiles,
        }, num_stages=stages,
    )  # fmt: skip
    return (op(stored(values), weights, stored(keys), k_scale.astype(jnp.float32), starts, ends),)
