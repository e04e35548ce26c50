"""Index writes as one Triton launch, in place; codes are made by integer arithmetic, the same on every GPU."""

import jax.numpy as jnp

from pallas_attn.core.narrow import slots32
from pallas_attn.ops.sparse_indexer.triton import page_constants, rows_of
from pallas_attn.ops.sparse_indexer.write.problem import Args, Problem
from pallas_attn.runtime.triton import Shape, rule, triton_op


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    return None if p.tokens else "an empty call"


def run(p: Problem, *arrays):
    """The written pages."""
    args = Args(*arrays)
    own = page_constants(args.cache)
    total = p.tokens * own["G"]
    rows = rows_of(total)
    op = triton_op(
        "pallas_attn.ops.sparse_indexer.triton_rows:write", out=Shape(p.shape, jnp.uint8), grid=-(-total // rows),
        constants=own | rule(p.format) | {"T": p.tokens, "N": p.pages, "ROWS": rows}, aliases={2: 0}, num_warps=1,
    )  # fmt: skip
    return (op(args.k, slots32(args.slots, p.pages * p.page_size), args.cache.pages),)
