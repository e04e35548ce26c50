"""Paged decode on Hopper: up to 8 query tokens per sequence against pages of any format, at the speed of the memory.

Work is a flat list of tiles of 64 tokens, cut evenly between W workers per kv head whatever the lengths. A worker is a
CTA of one warpgroup (several fit on an SM) with a ring of tiles that TMA fills. Per tile, with the roles swapped so
that tokens are the long side of the matrix unit:

    S^T = K Q^T                 FP8 x FP8; a wider query is the sum of two FP8 terms, stacked and added afterwards
    P^T = exp2(S^T - max)       float32, then f16
    O^T = O^T alpha + V^T P^T   V is widened to f16, which holds every FP8 and INT8 value exactly

INT8 keys are widened as well; bf16 and f16 caches go to the matrix unit as they are. Scales per token enter the logits
(keys) and, as their logarithm, the exponent (values). Each (worker, sequence) pair leaves a partial result, which
`mosaic_merge` adds up in a fixed order: two launches, and the same bits every time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE, RaggedBatch, padded
from pallas_attn.core.formats import INT8
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention import mosaic_merge
from pallas_attn.ops.paged_attention.mosaic_config import FP8, Config, Form, choose, form_of, part_of, rings
from pallas_attn.ops.paged_attention.mosaic_share import MOST_COUNTED
from pallas_attn.ops.paged_attention.mosaic_worker import Inputs, Worker
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.runtime.mosaic import SMS, swizzled

CAN = {"non-causal", "per-sequence causal", "window", "soft cap", "sinks", "FP8 output", "LSE"}
INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernels on a CPU
MOST_TOKENS = 8  # of a sequence
MOST_SEQS = 8192


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    tokens, size = p.max_q_len or MOST_TOKENS + 1, p.kv_format.dtype.itemsize
    windowed = {"window", "non-causal"} <= set(p.options) or {"window", "per-sequence causal"} <= set(p.options)
    part = part_of(p)
    narrow = p.head_dim * min(p.q_format.dtype.itemsize, p.out_dtype.itemsize) * part % 128
    refusals = {
        f"it needs batch.max_q_len <= {MOST_TOKENS}": tokens > MOST_TOKENS,
        f"no {', '.join(sorted(set(p.options) - CAN))}": bool(set(p.options) - CAN),
        f"no non-causal window for {tokens} query tokens": windowed and tokens > 1,
        f"no {p.kv_format} cache": p.kv_format.dtype not in (*FP8, INT8, jnp.bfloat16, jnp.float16),
        f"no {p.layout} layout": p.layout.blocked,
        f"no page size {p.page_size}": p.page_size not in (16, 32, 64, 128, 256),
        f"no head dim {p.head_dim}, {p.v_head_dim}": p.head_dim not in (64, 128, 256) or p.v_head_dim != p.head_dim,
        f"no {p.group} query heads per kv head": p.group > 16 and part < 16,
        f"no {p.q_format} query": p.q_format.quantized and p.q_format.dtype not in FP8,
        f"no FP8 rows of {p.head_dim} for an odd group of {p.group} and {tokens} query tokens": tokens > 1
        and bool(narrow),
        f"no {p.head_dim} head dims of {size} bytes": p.head_dim * size > 512,
        f"no more than {MOST_SEQS} sequences": p.seqs > MOST_SEQS,
        "an empty call": not p.tokens or not p.seqs,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays, config: Config | None = None, into: tuple[jax.Array, ...] | None = None):
    """(out [T, H, DV], lse [T, H] if asked). In a mixed step, sequences of at most max_q_len query tokens are written
    `into` the results of the others."""
    args = Args(*arrays)
    config = config or choose(p)
    form = form_of(p, config)
    workers = max(SMS * config.ctas // form.columns, 1)
    inputs = _inputs(p, args, form, mixed=into is not None)
    partial, stats, before = partials(p, form, config, workers, inputs)
    inputs = inputs._replace(before=before)
    sinks, v_scale = args.sinks, _stored_scale(args, 1)
    merge = mosaic_merge.merge
    return merge(p, form, workers, inputs, partial, stats, sinks, v_scale, args.out_scale, into, INTERPRET)


def _inputs(p: Problem, args: Args, form: Form, mixed: bool) -> Inputs:
    batch, window = args.batch, args.mask.window
    nothing = jnp.zeros(1)
    per_token = p.kv_format.granularity == "token_head"
    i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    one = lambda x: jnp.reshape(x, (1,))  # noqa: E731
    q, q_scale, shape = args.q, nothing, (p.tokens, p.kv_heads * form.parts, form.part)
    if isinstance(q, Quantized):
        q_scale = one(q.scale) if q.scale.ndim == 0 else jnp.broadcast_to(q.scale, (p.tokens, p.q_heads)).reshape(shape)
        q = q.values
    causal = args.mask.causal
    return Inputs(
        q.reshape(*shape, p.head_dim), _flat(p, args.cache.buffers), i32(batch.page_table), i32(batch.kv_lens),
        i32(batch.cu_q_lens), one(i32(p.seqs if batch.num_seqs is None else batch.num_seqs)),
        _before(p, batch, window, mixed), one(args.scale), q_scale, _stored_scale(args, 0),
        _stored_scale(args, 1) if per_token else nothing,
        nothing if args.soft_cap is None else one(args.soft_cap), one(i32(0 if window is None else window)),
        nothing if isinstance(causal, bool) or p.max_q_len == 1 else i32(causal),
    )  # fmt: skip


def _before(p: Problem, batch: RaggedBatch, window, mixed: bool) -> Any:
    """The schedule's tiles. Where the batch has none for this window, or counts others' rows in a mixed step: None, so
    that the workers count them, or for many sequences, which would take them longer, XLA's."""
    plan = None if mixed else batch.schedule
    if plan is not None and (window is None or isinstance(window, int)) and plan.window == window:
        return plan.before
    return None if p.seqs <= MOST_COUNTED else batch.tiles_before(window, p.max_q_len)


def _stored_scale(args: Args, side: int) -> jax.Array:
    """The scale of keys or values as the cache has it, at least [1]."""
    return jnp.ones(1) if args.cache.scales is None else jnp.atleast_1d(args.cache.scales[side])


def _flat(p: Problem, buffers: tuple) -> tuple:
    """Token-major buffers as [N, S, K * D] (or [N, S, K * 2 * D]), so that neighbouring heads are one row."""
    if p.layout.head_major:
        return tuple(buffers)
    return tuple(x.reshape(p.pages, p.page_size, -1) for x in buffers)


def partials(p: Problem, form: Form, config: Config, workers: int, x: Inputs) -> tuple[jax.Array, ...]:
    """The kernel: [W + B, columns, rows, D] weighted values, [.., 2, rows] running maxima (base 2) and sums, and the
    schedule's tiles, given or counted."""
    depth, heads, rows, stages = p.head_dim, config.heads, form.rows, config.stages
    widths = rings(p, config)
    stored, narrow = p.kv_format.dtype, p.kv_format.dtype.itemsize == 1
    # The query as it comes, the widened tile and the result are never alive together: they share memory.
    phases = [
        plgpu.SMEM((heads, rows, depth), p.q_format.dtype),
        plgpu.SMEM((heads, rows, depth), jnp.float32, transforms=swizzled(jnp.float32, depth)),
    ]
    if narrow:
        phases.append(plgpu.SMEM((heads, TILE, depth), form.wide, transforms=swizzled(form.wide, depth)))
    if x.before is None:
        phases.append(plgpu.SMEM((2 * padded(p.seqs),), jnp.int32))
    scratch = {
        "q_tile": plgpu.SMEM((heads, form.terms * rows, depth), form.operand, transforms=swizzled(form.operand, depth)),
        "rings": [plgpu.SMEM((stages, TILE, w), stored, transforms=swizzled(stored, min(w, depth))) for w in widths],
        "phases": plgpu.RefUnion(*phases),
        "p_tile": plgpu.SMEM((heads, rows, TILE), form.wide, transforms=swizzled(form.wide, TILE)),
        # The rows' factors are in registers before there are statistics.
        "row_values": plgpu.RefUnion(plgpu.SMEM((heads, rows), jnp.float32), plgpu.SMEM((heads, 2, rows), jnp.float32)),
        "q_ready": plgpu.Barrier(num_arrivals=heads * form.span),
        "ready": plgpu.Barrier(num_arrivals=len(widths) * max(TILE // p.page_size, 1), num_barriers=stages),
    }
    if p.kv_format.granularity == "token_head":
        scratch["token_scales"] = plgpu.SMEM((stages, 2, heads, TILE), jnp.float32)
    slots = workers + p.seqs
    columns = form.columns * heads
    out = [
        jax.ShapeDtypeStruct((slots, columns, rows, depth), jnp.float32),
        jax.ShapeDtypeStruct((slots, columns, 2, rows), jnp.float32),
    ]
    if x.before is None:
        out.append(jax.ShapeDtypeStruct((padded(p.seqs),), jnp.int32))
    leaves, tree = jax.tree.flatten(x)

    def attend(*refs, **scratch):
        ins, (*results,) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        counted = results.pop() if x.before is None else None
        if INTERPRET is None:  # a kernel that lets another begin is launched in a way that does not wait by itself
            plgpu.griddepcontrol_wait()
        Worker(p, form, config, workers, ins, *results, counted=counted, **scratch).run()
        if INTERPRET is None:  # the merge may start: it waits for what is still on its way
            plgpu.griddepcontrol_launch_dependents()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        attend, out_type=tuple(out), grid=(workers, form.columns), grid_names=("worker", "column"),
        scratch_types=scratch, compiler_params=plgpu.CompilerParams(approx_math=True), interpret=INTERPRET,
    )  # fmt: skip
    got = kernel(*leaves)
    return got if x.before is None else (*got, x.before)
