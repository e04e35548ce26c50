"""Cache writes as one Triton launch, in place, for Ampere, Ada and Hopper: every format that can be written, every
layout. A program takes some rows, each one token and head; codes are made by integer arithmetic, the same on all."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.core.narrow import slots32
from pallas_attn.ops.kv_cache.problem import Args, Problem
from pallas_attn.runtime.triton import Shape, cache_constants, power_of_two, rule, stored, triton_op

GRANULARITIES = {"none": 0, "tensor": 1, "head": 2, "token_head": 4}
MOST = 4096  # elements of keys or values of one program
PROGRAMS = 4 * 132  # that keep the largest of these GPUs busy


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {
        f"no head dims {(p.head_dim, p.v_head_dim)}": max(p.head_dim, p.v_head_dim) > 1024,
        f"no {p.format} cache": p.format.granularity not in GRANULARITIES,
        "an empty call": not p.tokens,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays):
    """The leaves of the written cache."""
    cache, k, v, slots = Args(*arrays)
    dim, total = power_of_two(max(p.head_dim, p.v_head_dim)), p.tokens * p.kv_heads
    rows = min(power_of_two(total // PROGRAMS), max(MOST // dim, 1))
    nothing = jnp.zeros(1)
    per_token = p.format.granularity == "token_head"
    buffers = [stored(x) for x in cache.buffers]
    scales = [jnp.atleast_1d(x) for x in cache.scales or (nothing, nothing)]
    given = [nothing, nothing] if per_token else scales
    # What is written comes in and goes out; of what is not, a number goes out that nobody writes.
    written = [buffers[0], nothing if p.layout.single else buffers[1], *(scales if per_token else [nothing, nothing])]
    op = triton_op(
        "pallas_attn.ops.kv_cache.triton_kernels:write", out=[Shape(x.shape, x.dtype) for x in written],
        grid=-(-total // rows),
        constants=cache_constants(p) | rule(p.format) | {
            "GRANULARITY": GRANULARITIES[p.format.granularity], "T": p.tokens, "ROWS": rows, "SINGLE": p.layout.single,
        },
        aliases={5 + i: i for i, x in enumerate(written) if x is not nothing}, num_warps=4 if rows * dim > 1024 else 1,
    )  # fmt: skip
    out = op(k, v, slots32(slots, p.pages * p.page_size), *given, *written)
    buffers = tuple(lax.bitcast_convert_type(x, p.format.dtype) for x in out[: len(cache.buffers)])
    return jax.tree.leaves(cache.replace(buffers, out[2:] if per_token else None))  # type: ignore[arg-type]
