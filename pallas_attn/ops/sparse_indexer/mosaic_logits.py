"""Logits over contiguous keys on Hopper, for prefill: as fast as the sum over heads lets the matrix unit be.

A job is some query tokens, whose heads fill the columns of the matrix unit, over a part of the keys that they see. One
CTA an SM takes every so many jobs. One of its warpgroups loads queries, weights, keys and scales; each of the others
multiplies 64 keys of a block:

    S^T = K Q^T                             FP8 x FP8
    z = s sum_h (w_h s_h scale) relu(S^T)   along the rows of the accumulator: inside a warp

What no row of a job sees is not read; its columns get -inf from the same CTA.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.narrow import clamped
from pallas_attn.ops.sparse_indexer.logits.problem import Args, Problem
from pallas_attn.ops.sparse_indexer.mosaic_logits_crew import Computer, Form, Job, Loader
from pallas_attn.ops.sparse_indexer.mosaic_parts import DIM, key_ring, no_queries, query_scale
from pallas_attn.runtime.mosaic import ROWS, SMS, swizzled

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
COLUMNS = 128  # of the matrix unit: heads of a job's query tokens


class Config(NamedTuple):
    """What a tuner may choose.

    computes: warpgroups that compute. stages: blocks of keys in flight. parts: jobs that share the keys of the same
    queries, so that the last jobs end together. registers: of a thread that computes, and of one that loads.
    """

    computes: int = 4
    stages: int = 3
    parts: int = 5  # does not divide the SMs, or some would have all jobs that are a block longer
    registers: tuple[int, int] = (112, 24)


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    k = p.k_format
    scaled = k.granularity == "token_head" or (k.granularity == "group" and k.group == DIM)
    refusals = no_queries(p.q_format, p.heads, p.head_dim, 32) | {
        f"no {k} keys": not scaled or k.dtype != jnp.float8_e4m3fn,
        f"fewer than {ROWS} keys": p.keys < ROWS,
        "an empty call": not p.tokens,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def form_of(p: Problem, config: Config) -> Form:
    """The static shape of the kernel for one problem."""
    rows = min(max(COLUMNS // p.heads, 1), p.tokens)
    computes = min(config.computes, p.keys // ROWS)
    return Form(rows, computes, config.stages, config.parts, config.registers, -(-p.tokens // rows))


def run(p: Problem, *arrays, config: Config | None = None):
    """The logits."""
    form = form_of(p, config or Config())
    args = Args(*arrays)
    leaves, tree = jax.tree.flatten(inputs_of(p, args))
    workers = min(SMS, form.jobs)

    def logits(*refs, **scratch):
        scratch["rowwise"], scratch["keys"] = scratch["keys"] if INTERPRET is None else [scratch["keys"]] * 2
        crew = (p, form, workers, jax.tree.unflatten(tree, refs[: len(leaves)]), refs[-1])
        role = lax.axis_index("warpgroup")
        interpreted = INTERPRET is not None
        pl.when(role < form.computes)(lambda: Computer(*crew, **scratch).run(role))
        pl.when(role == form.computes)(lambda: Loader(*crew, **scratch).run(drains=interpreted))

    kernel = plgpu.kernel(
        logits, out_type=jax.ShapeDtypeStruct((p.tokens, p.width or p.keys), jnp.float32),
        grid=(workers,), grid_names=("worker",), scratch_types=scratch_of(p, form, args.weights.dtype),
        num_threads=form.computes + 1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=INTERPRET,
    )  # fmt: skip
    return (kernel(*leaves),)


def inputs_of(p: Problem, args: Args) -> dict[str, Any]:
    """What the kernel reads, by name; queries as rows of (token, head)."""
    q, k = args.q, args.k
    return {
        "q": q.values.reshape(-1, DIM),  # type: ignore[union-attr]
        "q_scale": query_scale(q),  # type: ignore[arg-type]
        "weights": args.weights,
        "scale": args.scale.reshape(1),
        "k": k.values,  # type: ignore[union-attr]
        "k_scale": k.scale.reshape(-1),  # type: ignore[union-attr]
        "starts": clamped(args.starts, p.keys),
        "ends": clamped(args.ends, p.keys),
    }


def scratch_of(p: Problem, form: Form, weights) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    stored, tiles, barrier = p.k_format.dtype, swizzled(p.k_format.dtype, DIM), plgpu.Barrier
    slots, columns = 2, form.rows * p.heads
    height = max(form.rows, 64 // p.heads)  # copies begin at multiples of 128 bytes
    own = p.q_format.granularity in ("group", "token_head")
    scratch: dict[str, Any] = {
        "jobs": plgpu.SMEM((slots, len(Job._fields)), jnp.int32),
        "queries": plgpu.SMEM((slots, columns, DIM), stored, transforms=tiles),
        "weights": plgpu.SMEM((slots, height, p.heads), weights),
        "keys": key_ring(form.stages, form.block, INTERPRET is not None),
        "key_scales": plgpu.SMEM((form.stages, form.block), jnp.float32),
        "line": plgpu.SMEM((form.computes, form.rows, ROWS), jnp.float32),
        "q_here": barrier(num_arrivals=3 + own, num_barriers=slots),  # of copies, and one of the loader's
        "q_used": barrier(num_arrivals=form.computes, num_barriers=slots),
        "k_here": barrier(num_arrivals=2, num_barriers=form.stages),
        "k_used": barrier(num_arrivals=form.computes, num_barriers=form.stages),
    }
    if own:
        scratch["q_scales"] = plgpu.SMEM((slots, height, p.heads), jnp.float32)
    return scratch
