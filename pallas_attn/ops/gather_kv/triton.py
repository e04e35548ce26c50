"""The gather as one Triton launch, for Ampere, Ada and Hopper: every format, every layout. A program takes some rows of
the result, each one token and head, finds the sequence of each, and puts its keys and values there in one rounding.
XLA adds the lengths up before."""

import jax.numpy as jnp

from pallas_attn.ops.gather_kv.problem import Args, Problem, outputs, spans
from pallas_attn.runtime.triton import cache_constants, kind, power_of_two, stored, triton_op

GRANULARITIES = {"none": 0, "tensor": 1, "head": 2, "seq_head": 3, "token_head": 4}
MOST = 4096  # elements of keys or values of one program
PROGRAMS = 4 * 132  # that keep the largest of these GPUs busy


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {
        f"no head dims {(p.head_dim, p.v_head_dim)}": max(p.head_dim, p.v_head_dim) > 1024,
        f"no {p.format} cache": p.format.granularity not in GRANULARITIES,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays):
    """(k, v, cu_lens)."""
    args = Args(*arrays)
    first, cu_lens = spans(p, args)
    buffers = [stored(x) for x in args.cache.buffers]
    scales = [jnp.atleast_1d(x) for x in args.cache.scales or (jnp.zeros(1),) * 2]
    table = args.page_table
    if table.dtype.itemsize > 4:  # 64 bits: nothing may wrap into the cache
        table = jnp.clip(table, 0, p.pages - 1)
    dim, total = power_of_two(max(p.head_dim, p.v_head_dim)), p.max_tokens * p.kv_heads
    rows = min(power_of_two(total // PROGRAMS), max(MOST // dim, 1))
    op = triton_op(
        "pallas_attn.ops.gather_kv.triton_kernels:gather", out=outputs(p)[:2], grid=-(-total // rows),
        constants=cache_constants(p) | {
            "T": p.max_tokens, "B": p.seqs, "M": p.pages_per_seq, "STEPS": p.seqs.bit_length(), "ROWS": rows,
            "GRANULARITY": GRANULARITIES[p.format.granularity], "KIND": kind(p.format.dtype),
        }, num_warps=4 if rows * dim > 1024 else 1,
    )  # fmt: skip
    return *op(buffers[0], buffers[-1], *scales, table.astype(jnp.int32), first, cu_lens), cu_lens
