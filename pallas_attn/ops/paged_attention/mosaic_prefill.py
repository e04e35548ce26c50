"""Paged prefill on Hopper: any number of query tokens per sequence against pages of any format.

A CTA takes blocks of query tokens of one sequence, with all heads of a group as rows, one block after the other until
there are none left. Two of its warpgroups compute 64 rows each, a third widens what the matrix unit cannot take as it
is, the fourth loads tiles of keys and values by TMA, those of the next block while the last one's result leaves:

    S = Q K^T                 FP8 x FP8; a wider query is the sum of two FP8 terms, which costs what f16 would
    P = exp2(S - max)         float32, then f16, in registers
    O = O alpha + P V         V widened to f16, which holds every FP8 and INT8 value exactly

The product of one tile's weights runs while the next tile's logits become weights. INT8 keys are widened as well; bf16
and f16 caches go to the matrix unit as they are. Tiles that no row of the block sees are not read.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import INT8
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention import mosaic_prefill_compute
from pallas_attn.ops.paged_attention.mosaic_config import FP8
from pallas_attn.ops.paged_attention.mosaic_prefill_compute import Computer
from pallas_attn.ops.paged_attention.mosaic_prefill_config import (
    Config,
    choose,
    form_of,
    part_of,
    scratch_of,
    shared_bytes,
)
from pallas_attn.ops.paged_attention.mosaic_prefill_crew import Loader, Preparer
from pallas_attn.ops.paged_attention.mosaic_prefill_plan import WARPGROUPS, Form, Inputs
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.runtime.mosaic import SHARED, SMS

DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # of keys and of values
CAN = {"non-causal", "per-sequence causal", "window", "soft cap", "sinks", "FP8 output", "LSE"}


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    size = p.kv_format.dtype.itemsize
    refusals = {
        f"no {', '.join(sorted(set(p.options) - CAN))}": bool(set(p.options) - CAN),
        f"no {p.kv_format} cache": p.kv_format.dtype not in (*FP8, INT8, jnp.bfloat16, jnp.float16),
        f"no {p.layout} layout": p.layout.blocked,
        f"no page size {p.page_size}": p.page_size not in (16, 32, 64, 128, 256),
        f"no head dim {p.head_dim}, {p.v_head_dim}": (p.head_dim, p.v_head_dim) not in DIMS,
        f"no head dim {p.head_dim}, {p.v_head_dim} in {p.layout}": p.layout.single and p.head_dim != p.v_head_dim,
        f"no {p.q_format} query": p.q_format.quantized and p.q_format.dtype not in FP8,
        f"no {p.head_dim} head dims of {size} bytes": p.head_dim * size > 512,
        f"no FP8 rows of {p.head_dim} for an odd group of {p.group}": not part_of(p),
        "an empty call": not p.tokens or not p.seqs,
    }
    reason = next((reason for reason, refused in refusals.items() if refused), None)
    if reason is None and shared_bytes(p, choose(p)) > SHARED:
        return f"no head dim {p.head_dim} with a {p.q_format} query, {p.kv_format} cache and {p.out_dtype} result"
    return reason


def run(p: Problem, *arrays, config: Config | None = None, few: int = 0):
    """(out [T, H, DV], lse [T, H] if asked); rows of sequences with at most `few` query tokens hold anything."""
    args = Args(*arrays)
    form = form_of(p, config or choose(p), few)._replace(mirrored=args.mask.symmetric and "window" in p.options)
    leaves, tree = jax.tree.flatten(inputs_of(p, form, args))
    units, workers = p.kv_heads * form.parts, min(SMS, form.cells(p))
    out = [jax.ShapeDtypeStruct((p.tokens, units, form.part, p.v_head_dim), p.out_dtype)]
    if p.return_lse:
        out.append(jax.ShapeDtypeStruct((p.tokens, units, form.part), jnp.float32))
    # Blocks are as long as what they see: a CTA takes the next one when it is done. Few need no counter.
    dynamic = form.cells(p) > workers and mosaic_prefill_compute.INTERPRET is None
    counter = [jax.new_ref(jnp.zeros(1, jnp.int32))] if dynamic else []

    def prefill(*refs, **scratch):
        ins, rest = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        taken, outs = (rest[0], rest[1:]) if dynamic else (None, rest)
        crew = (p, form, workers, ins, taken, outs)
        role = lax.axis_index("warpgroup")
        pl.when(role < WARPGROUPS)(lambda: Computer(*crew, **scratch).run(role))
        pl.when(role == WARPGROUPS)(lambda: Preparer(*crew, **scratch).run())
        pl.when(role == WARPGROUPS + 1)(lambda: Loader(*crew, **scratch).run())

    kernel = plgpu.kernel(
        prefill, out_type=tuple(out), grid=(workers,), grid_names=("worker",), scratch_types=scratch_of(p, form),
        num_threads=WARPGROUPS + 2, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=mosaic_prefill_compute.INTERPRET,
    )  # fmt: skip
    got = kernel(*leaves, *counter)
    shapes = ((p.tokens, p.q_heads, p.v_head_dim), (p.tokens, p.q_heads))
    return tuple(g.reshape(s) for g, s in zip(got, shapes, strict=False))


def inputs_of(p: Problem, form: Form, args: Args) -> Inputs:
    """What the kernel reads, in the shapes that it reads."""
    batch, cache, nothing = args.batch, args.cache, jnp.zeros(1)
    i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    one = lambda x: jnp.reshape(x, (1,))  # noqa: E731
    q, q_scale, units = args.q, nothing, p.kv_heads * form.parts
    if isinstance(q, Quantized):
        heads = {0: (1,), 1: (units, form.part), 2: (p.tokens, units, form.part)}[q.scale.ndim]
        q, q_scale = q.values, q.scale.reshape(heads)
    buffers = cache.buffers
    if not p.layout.head_major:  # neighbouring heads are one row
        buffers = tuple(x.reshape(p.pages, p.page_size, -1) for x in buffers)
    k_scale, v_scale = [nothing] * 2 if cache.scales is None else [s if s.ndim else one(s) for s in cache.scales]
    window, causal = args.mask.window, args.mask.causal
    return Inputs(
        q.reshape(p.tokens, units, form.part, p.head_dim), tuple(buffers), i32(batch.page_table), i32(batch.kv_lens),
        i32(batch.cu_q_lens), one(i32(p.seqs if batch.num_seqs is None else batch.num_seqs)), one(args.scale), q_scale,
        k_scale, v_scale, nothing if args.soft_cap is None else one(args.soft_cap),
        one(i32(0 if window is None else window)), nothing if isinstance(causal, bool) else i32(causal),
        nothing if args.sinks is None else args.sinks.astype(jnp.float32).reshape(units, form.part),
        nothing if args.out_scale is None else one(args.out_scale),
    )  # fmt: skip
