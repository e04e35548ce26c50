"""The gather of index keys as one Triton launch. XLA finds the page and slot of every row before."""

import jax.numpy as jnp
from jax import lax

from pallas_attn.ops.sparse_indexer.gather.problem import Args, Problem, outputs, sources
from pallas_attn.ops.sparse_indexer.triton import page_constants, rows_of
from pallas_attn.runtime.triton import Shape, triton_op


def supports(p: Problem) -> str | None:
    """The kernel takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales, cu_lens)."""
    args = Args(*arrays)
    where, cu_lens = sources(p, args)
    values, scales, _ = outputs(p)
    total = p.max_tokens * p.groups
    rows = rows_of(total)
    op = triton_op(
        "pallas_attn.ops.sparse_indexer.triton_rows:gather", out=(Shape(values.shape, jnp.uint8), scales),
        grid=-(-total // rows), constants=page_constants(args.cache) | {"T": p.max_tokens, "ROWS": rows}, num_warps=1,
    )  # fmt: skip
    codes, scale = op(args.cache.pages, where.page, where.slot, where.real.astype(jnp.int32))
    return lax.bitcast_convert_type(codes, values.dtype), scale, cu_lens
