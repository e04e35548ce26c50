"""The selection on Hopper: rows of up to a million columns by one launch, for any input.

A row lies in the registers of one CTA, or of a cluster of up to 8, which search one threshold together: a count of the
numbers above a guess takes one barrier. Guesses first follow the counts as if the numbers were normal, then by the
secant rule; from the ninth on they halve what is left of the order keys (floats as integers in the same order), so that
no input takes more than 8 + 32 and a few. Now and then both ends move to the nearest numbers that there are, which ends
the search at once where many are equal. Then each warp knows how many of the chosen stand before its columns, and 32
neighbours at a time leave by one ballot: in ascending order, ties by the lowest column, without atomics.

Many long rows are not held but streamed (`mosaic_topk_stream`): what is held and searched then is a list of each part.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.narrow import clamped
from pallas_attn.ops.sparse_indexer.mosaic_topk_lanes import MOST_UNITS, UNIT, WARPGROUPS, WARPS, Form, Lanes
from pallas_attn.ops.sparse_indexer.mosaic_topk_list import CAPACITY, LIST_UNITS, PIECE, RING, Listed
from pallas_attn.ops.sparse_indexer.mosaic_topk_search import Row
from pallas_attn.ops.sparse_indexer.mosaic_topk_stream import stream_row
from pallas_attn.ops.sparse_indexer.topk.problem import Args, Problem
from pallas_attn.runtime.mosaic import SMS

MOST_COLUMNS, MOST_K = 1 << 20, 4096
MOST_CTAS = 8  # of a cluster, on every GPU
CLUSTERED = 128  # SMs in groups of 16 that clusters share
STREAMED_ROWS, STREAMED_COLUMNS = 32, 1 << 16  # from which on rows are streamed, and of how many columns a CTA takes


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {
        "no order by value: sorted=False": p.sorted,
        f"no k of {p.k}": p.k > MOST_K,
        f"no rows of {p.columns} columns": p.columns > MOST_COLUMNS,
        "an empty call": not p.rows,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def form_of(p: Problem, ctas: int | None = None, stream: bool | None = None) -> Form:
    """The static shape of the kernel for one problem, by CTAs of a cluster: as few as hold a row, or, where rows are
    streamed, as many as there are for each."""
    most = MOST_UNITS * UNIT
    long = (p.columns > STREAMED_COLUMNS and p.rows >= STREAMED_ROWS) or p.columns > MOST_CTAS * most
    if long if stream is None else stream:
        fits = (n for n in (8, 4, 2) if n * p.rows <= CLUSTERED and n * STREAMED_COLUMNS <= p.columns)
        ctas = ctas or next(fits, 1)
        return Form(p.rows, p.columns, p.k, ctas, LIST_UNITS, 1, False, clusters_of(p, ctas), streamed=True)
    if ctas is None:
        ctas = next((n for n in (1, 2, 4) if n * most >= p.columns), MOST_CTAS)
    segments = -(-p.columns // (ctas * most))
    units = -(-p.columns // (ctas * segments * UNIT))
    staged = segments == 1 and p.columns % 256 == 0
    return Form(p.rows, p.columns, p.k, ctas, units, segments, staged, clusters_of(p, ctas))


def clusters_of(p: Problem, ctas: int) -> int:
    """How many clusters there are at a time, no more than rows."""
    return min(SMS if ctas == 1 else CLUSTERED // ctas, p.rows)


def run(p: Problem, *arrays, ctas: int | None = None, stream: bool | None = None, early: bool = False):
    """The columns. stream: whether rows are; early: start beside the kernel before this one, and wait for it."""
    form = form_of(p, ctas, stream)
    leaves, tree = jax.tree.flatten(inputs_of(form, Args(*arrays)))

    def topk(*refs, **scratch):
        if early:
            plgpu.griddepcontrol_wait()
        x = jax.tree.unflatten(tree, refs[: len(leaves)])
        select(form, x, (Listed if form.streamed else Lanes)(form, x["logits"], refs[-1], **scratch))

    cluster: dict[str, Any] = {"cluster": (form.ctas,), "cluster_names": ("rank",)} if form.ctas > 1 else {}
    kernel = plgpu.kernel(
        topk, out_type=jax.ShapeDtypeStruct((p.rows, p.k), jnp.int32), grid=(form.clusters,), grid_names=("cluster",),
        num_threads=WARPGROUPS, thread_name="warpgroup", scratch_types=scratch_of(form), **cluster,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )  # fmt: skip
    return (kernel(*leaves),)


def inputs_of(form: Form, args: Args) -> dict[str, Any]:
    """What the kernel reads, by name."""
    logits = args.logits
    return {
        "logits": logits.reshape(form.rows, -1, 256) if form.staged else logits,
        "starts": None if args.starts is None else clamped(args.starts, form.columns),
        "ends": None if args.ends is None else clamped(args.ends, form.columns),
    }


def scratch_of(form: Form) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    words = {"words": plgpu.SMEM((2 * 3 * form.ctas * WARPS + (4 if form.streamed else 0),), jnp.int32)}
    if form.streamed:
        return words | {
            "list": plgpu.SMEM((2 * CAPACITY,), jnp.int32),
            "ring": plgpu.SMEM((RING * PIECE,), jnp.float32),
            "own": plgpu.SMEM((2 * 3 * WARPS,), jnp.int32),
        }
    tile = plgpu.SMEM((16 * form.units if form.staged else 1, 256), jnp.float32)
    return words | {"tile": tile, "here": plgpu.Barrier()}


def select(form: Form, x: dict, lanes) -> None:
    """The rows of one cluster, one after the other."""
    cluster = lax.axis_index("cluster")
    mine = lax.div(form.rows - cluster + form.clusters - 1, jnp.int32(form.clusters))

    def row(i, turn):
        number = cluster + i * form.clusters
        end = jnp.int32(form.columns) if x["ends"] is None else jnp.clip(x["ends"][number], 0, form.columns)
        first = jnp.int32(0) if x["starts"] is None else jnp.clip(x["starts"][number], 0, end)
        if form.streamed:
            return stream_row(lanes, number, first, end, turn)
        lanes.take(number, first, end)
        sample = lanes.sample(turn)  # its barrier tells that all threads have their part of the row
        pl.when(i + 1 < mine)(lambda: lanes.fetch(number + form.clusters))
        return Row(form, lanes, end - first, sample).select(1 - turn)

    if form.streamed:
        lanes.prepare()
        lax.fori_loop(0, mine, row, (jnp.int32(0), jnp.int32(0)))
        return
    lanes.fetch(cluster)
    lax.fori_loop(0, mine, row, jnp.int32(0))
