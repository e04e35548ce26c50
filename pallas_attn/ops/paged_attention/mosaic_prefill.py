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

import dataclasses
import math
from typing import Any

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
from pallas_attn.ops.paged_attention.mosaic_prefill_crew import NEWS, Loader, Preparer
from pallas_attn.ops.paged_attention.mosaic_prefill_plan import NUMBERS, WARPGROUPS, Form, Inputs
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.runtime.mosaic import ROWS, SHARED, SMS, swizzled

DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # of keys and of values
CAN = {"non-causal", "per-sequence causal", "window", "soft cap", "sinks", "FP8 output", "LSE"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a tuner may choose.

    tile: tokens of a step. keys, values, wide: tiles in flight of keys, of values, and of what is widened.
    ahead: whether the next block's query may come before the last one's result has left.
    alone: whether a block has one head only: then one copy brings a warpgroup's 64 queries, and one takes its result.
    """

    tile: int = 128
    keys: int = 3
    values: int = 2
    wide: int = 2
    ahead: bool = True
    alone: bool = False


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


def choose(p: Problem) -> Config:
    """The configuration for a problem: the first of these that fits the shared memory."""
    tile = 64 if p.head_dim > 128 or p.kv_format.dtype == INT8 else 128
    rings = ((3, 2, 2, True), (3, 2, 2, False), (2, 2, 2, False), (2, 1, 2, False), (2, 1, 1, False), (1, 1, 1, False))
    # Blocks of all heads of a group have fewer rows of nobody where sequences are short, but copies of a few rows each.
    alone = p.tokens >= ROWS * p.seqs and fits(p, 1)
    choices = [Config(tile, *ring, alone) for ring in rings]
    return next((c for c in choices if shared_bytes(p, c) <= SHARED), choices[-1])


def part_of(p: Problem) -> int:
    """Heads of one block: the most that divide the group evenly and fit. None would be 0."""
    return max((d for d in range(1, min(p.group, ROWS) + 1) if p.group % d == 0 and fits(p, d)), default=0)


def fits(p: Problem, part: int) -> bool:
    """Whether rows of a token of so many heads begin at multiples of 128 bytes, as copies want it; queries of one head
    come in one copy."""
    result, query = part * p.v_head_dim * p.out_dtype.itemsize, part * p.head_dim * p.q_format.dtype.itemsize
    return result % 128 == 0 and (part == 1 or query % 128 == 0)


def form_of(p: Problem, config: Config, few: int = 0) -> Form:
    """The static shape of the kernel for one problem."""
    part = 1 if config.alone else part_of(p)
    stored, span = p.kv_format.dtype, ROWS // part
    wide = jnp.float16 if stored.itemsize == 1 else stored
    operand = jnp.float16 if stored == INT8 else stored
    if stored in FP8:
        operand = p.q_format.dtype if p.q_format.quantized else jnp.float8_e4m3fn
    # bf16 has 8 bits, f16 11 and float32 24; two terms of FP8 8 and three 12, two of bf16 16, of f16 22.
    exact = p.q_format.quantized or jnp.finfo(operand).nmant >= jnp.finfo(p.q_format.dtype).nmant
    several = 3 if p.q_format.dtype == jnp.float32 and operand in FP8 else 2
    blocks = p.tokens // (WARPGROUPS * span) + p.seqs + 1
    return Form(
        config.tile, part, p.group // part, span, 1 if exact else several, jnp.dtype(operand), jnp.dtype(wide),
        config.keys, config.values, config.wide, config.ahead, few, blocks,
    )  # fmt: skip


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


def scratch_of(p: Problem, form: Form) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    stored, tile, barrier = p.kv_format.dtype, form.tile, plgpu.Barrier

    def tiles(slots: int, dim: int, dtype) -> Any:
        return plgpu.SMEM((slots, tile, dim), dtype, transforms=swizzled(dtype, dim))

    pages = max(tile // p.page_size, 1)
    scratch = _of_query(p, form) | {
        "row_values": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "k_ring": tiles(form.keys, p.head_dim, stored),
        "v_ring": tiles(form.values, p.v_head_dim, stored),
        "news": plgpu.SMEM((NEWS, NUMBERS), jnp.int32),
        "ticket": plgpu.SMEM((1,), jnp.int32),
        "news_here": barrier(num_barriers=NEWS),
        "news_used": barrier(num_arrivals=WARPGROUPS + 1, num_barriers=NEWS),
        "q_here": barrier(num_arrivals=1 if form.part == 1 else form.span, num_barriers=WARPGROUPS),
        "q_used": barrier(num_barriers=WARPGROUPS),
        "k_here": barrier(num_arrivals=pages, num_barriers=form.keys),
        "k_used": barrier(num_arrivals=WARPGROUPS, num_barriers=form.keys),
        "v_here": barrier(num_arrivals=pages, num_barriers=form.values),
        "v_ready": barrier(num_barriers=form.value_slots(p)),
        "v_used": barrier(num_arrivals=WARPGROUPS, num_barriers=form.value_slots(p)),
    }
    if stored.itemsize == 1:
        scratch |= {
            "v_wide": tiles(form.wide, p.v_head_dim, form.wide_type),
            "v_free": barrier(num_barriers=form.values),
        }
    if form.relays_keys(p):
        scratch["k_ready"] = barrier(num_barriers=form.keys)
    if stored == INT8:
        scratch["k_wide"] = tiles(form.keys, p.head_dim, form.operand)
    if p.kv_format.granularity == "token_head":
        scratch |= {name: plgpu.SMEM((form.keys, tile), jnp.float32) for name in ("k_scales", "v_scales")}
    if mosaic_prefill_compute.INTERPRET is not None:
        columns = ([tile], form.columns(p))
        scratch["stand_ins"] = [[plgpu.SMEM((WARPGROUPS, ROWS, n), jnp.float32) for n in each] for each in columns]
    return scratch


def _of_query(p: Problem, form: Form) -> dict[str, Any]:
    """The query as it comes, as the matrix unit takes it, and the result. The last two, or all if no query comes ahead,
    are never alive together in a warpgroup and share its memory. Each fills as many bytes of it, so that no warpgroup
    reaches into the other's. Results of 4 bytes leave in halves."""
    depth = p.head_dim
    out_depth = min(p.v_head_dim, 2 * p.v_head_dim // p.out_dtype.itemsize)
    terms, result = form.terms * depth * form.operand.itemsize, out_depth * p.out_dtype.itemsize
    raw = depth * p.q_format.dtype.itemsize
    most = max(terms, result, 0 if form.ahead else raw)
    rows = lambda width: ROWS * most // width  # noqa: E731  # of so many bytes, in a warpgroup's part
    memory: list[Any] = [] if form.ahead else [plgpu.SMEM((WARPGROUPS, rows(raw), depth), p.q_format.dtype)]
    tiles = (WARPGROUPS, rows(depth * form.operand.itemsize), depth)
    memory.append(plgpu.SMEM(tiles, form.operand, transforms=swizzled(form.operand, depth)))
    memory.append(plgpu.SMEM((WARPGROUPS, rows(result), out_depth), p.out_dtype))
    scratch: dict[str, Any] = {"of_query": plgpu.RefUnion(*memory)}
    if form.ahead:
        scratch["raw_q"] = plgpu.SMEM((WARPGROUPS, ROWS, depth), p.q_format.dtype)
    return scratch


def shared_bytes(p: Problem, config: Config) -> int:
    """Shared memory that one CTA takes: every array begins at a multiple of 1024."""

    def size(x) -> int:
        if isinstance(x, plgpu.RefUnion):
            return max(map(size, x.refs))
        if isinstance(x, plgpu.Barrier | list):
            return 0
        return -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024

    barriers, driver = 1024, 1024
    return sum(map(size, scratch_of(p, form_of(p, config)).values())) + barriers + driver
