"""Paged decode on Hopper: one query token per sequence against FP8 pages, at the speed of the memory.

Work is a flat list of tiles of 64 tokens, cut evenly between W workers per kv head whatever the lengths. A worker is a
CTA of one warpgroup (four fit on an SM) with a ring of two tiles that TMA fills. Per tile, with the roles swapped so
that tokens are the long side of the matrix unit:

    S^T = K Q^T                 FP8 x FP8; a bf16 query is the sum of two FP8 terms, stacked and added afterwards
    P^T = exp2(S^T - max)       float32, then f16
    O^T = O^T alpha + V^T P^T   V is widened to f16, which holds every FP8 value exactly

Each (worker, sequence) pair leaves a partial result; `combine` merges them in a fixed order, so the result is
deterministic.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_attn.core.formats import E4M3
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.ops.paged_attention.stored import finish

TILE = 64
STAGES = 2
SMS = 132
MERGED = 8  # partial results that the combine loads at once
BAND = 64  # head dims of one CTA of the combine
# The one query of a sequence is its last token: there is nothing after it for a causal mask to hide.
CAN = {"non-causal", "per-sequence causal", "window", "soft cap", "sinks", "FP8 output", "LSE"}
INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernels on a CPU
LOG2E = math.log2(math.e)
FAR = -1e30  # stands for -inf in the running maximum: -inf less -inf is NaN
Layout = plgpu.Layout
ACC = plgpu.ACC  # type: ignore[attr-defined]  # public in fact, not in the type stubs


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {
        "it needs batch.max_q_len == 1": p.max_q_len != 1,
        f"no {', '.join(sorted(set(p.options) - CAN))}": bool(set(p.options) - CAN),
        f"no {p.kv_format} cache": p.kv_format.dtype != E4M3 or p.kv_format.granularity == "token_head",
        f"no {p.layout} layout": p.layout.name not in ("NHD", "HND"),
        f"no page size {p.page_size}": p.page_size not in (16, 32, 64, 128, 256),
        f"no head dim {p.head_dim}, {p.v_head_dim}": p.head_dim != 128 or p.v_head_dim != 128,
        f"no {p.group} query heads per kv head": p.group > 16,
        f"no {p.q_format} query": p.q_format.quantized and p.q_format.dtype != E4M3,
        "an empty call": not p.tokens or not p.seqs,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


class Schedule(NamedTuple):
    """Which tiles each worker takes. Tile t of sequence b is number before[b] + t - first[b] of the flat list."""

    work: Array  # int32 [4, W]: first and end tile in the flat list, first sequence, sequences touched
    before: Array  # int32 [B + 1]: tiles of the sequences before
    first: Array  # int32 [B]: first tile of each sequence that anyone sees
    span: Array  # int32 [2, B]: first of each sequence's partial results, and how many


def schedule(p: Problem, kv_len: Array, first_token: Array, workers: int) -> Schedule:
    """Cut all tiles evenly between `workers`."""
    first = first_token // TILE
    count = jnp.maximum(-(-kv_len // TILE) - first, 0)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count).astype(jnp.int32)])
    each = jnp.maximum(-(-before[-1] // workers), 1)
    start = jnp.minimum(jnp.arange(workers, dtype=jnp.int32) * each, before[-1])
    end = jnp.minimum(start + each, before[-1])
    rank = lambda x: (jnp.searchsorted(before, x, side="right", method="compare_all") - 1).astype(jnp.int32)  # noqa: E731
    seq, last = rank(start), rank(end - 1)
    touched = jnp.where(end > start, last - seq + 1, 0)
    # Worker w leaves its part of sequence b as partial w + b. Both rise along the list, so no two share a place.
    low = before[:-1] // each
    parts = jnp.where(count > 0, (before[1:] - 1) // each - low + 1, 0)
    span = jnp.stack([low + jnp.arange(p.seqs, dtype=jnp.int32), parts])
    return Schedule(jnp.stack([start, end, seq, touched]), before, first, span)


def split_query(p: Problem, q: Array | Quantized, rows: int) -> tuple[Array, Array]:
    """The query [B, H, D] as FP8 terms that add up [B, K, terms * rows, D], and each row's factor [B, K, rows]."""
    shape = (q.shape[0], p.kv_heads, p.group, p.head_dim)
    pad = ((0, 0), (0, 0), (0, rows - p.group), (0, 0))
    if isinstance(q, Quantized):
        scale = jnp.broadcast_to(q.scale, q.shape[:2]).reshape(shape[:3])
        return jnp.pad(q.values.reshape(shape), pad), jnp.pad(scale, pad[:3])
    x = jnp.pad(q.astype(jnp.float32).reshape(shape), pad)
    top = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(top > 0, top, 1.0) / 240.0
    x = x / scale[..., None]
    # The barrier keeps XLA from folding the conversion there and back into nothing.
    high = lax.optimization_barrier(x.astype(E4M3))
    low = (x - high.astype(jnp.float32)).astype(E4M3)
    return jnp.concatenate([high, low], axis=2), scale


def run(p: Problem, *arrays):
    """(out [T, H, DV], lse [T, H] if asked)."""
    args = Args(*arrays)
    start, length = args.batch.bounds(p.tokens)
    kv_len = jnp.where(length > 0, jnp.clip(args.batch.kv_lens, 0, p.pages_per_seq * p.page_size), 0).astype(jnp.int32)
    window = args.mask.window
    low = (
        jnp.zeros_like(kv_len)
        if window is None
        else jnp.where(jnp.asarray(window) > 0, jnp.maximum(kv_len - window, 0), 0)
    )
    q = jax.tree.map(lambda x: x[jnp.clip(start, 0, p.tokens - 1)] if x.ndim == 3 else x, args.q)
    if isinstance(q, Quantized) and q.format.granularity == "token_head":
        q = Quantized(q.values, args.q.scale[jnp.clip(start, 0, p.tokens - 1)], q.format)  # type: ignore[union-attr]
    rows = 8 if p.group <= 8 else 16
    terms, factor = split_query(p, q, rows)
    k_scale, v_scale = args.cache.scales  # type: ignore[misc]
    factor = factor * args.scale * _per_head(k_scale, p)[..., None]
    workers = max(SMS * (4 if rows == 8 else 3) // p.kv_heads, 1)
    plan = schedule(p, kv_len, low, workers)
    cap = None if args.soft_cap is None else _cap(args.soft_cap)
    partial = partials(p, terms, factor, args.cache.buffers, args.batch.page_table, kv_len, low, plan, cap)
    sinks = jnp.full(p.q_heads, -jnp.inf) if args.sinks is None else args.sinks.astype(jnp.float32)
    out, lse = combine(p, partial, plan.span, sinks)
    out = (out.reshape(p.seqs, p.kv_heads, p.group, -1) * _per_head(v_scale, p)[..., None, None]).reshape(out.shape)
    seq, _, live = args.batch.tokens(p.tokens)
    out = finish(jnp.where(live[:, None, None], out[seq], 0.0), p.out_dtype, p.out_format, args.out_scale)
    return (out, jnp.where(live[:, None], lse[seq], -jnp.inf)) if p.return_lse else (out,)


def _cap(cap: Array) -> Array:
    """(cap, 1), or (1, 0) for a cap that is not positive, which is none."""
    on = cap > 0
    return jnp.stack([jnp.where(on, cap, 1.0), on.astype(jnp.float32)])


def _per_head(scale: Array, p: Problem) -> Array:
    """A scale per tensor, head or (sequence, head) as [B, K]."""
    return jnp.broadcast_to(scale, (p.seqs, p.kv_heads))


def combine(p: Problem, partial: Array, span: Array, sinks: Array) -> tuple[Array, Array]:
    """Merge each sequence's partials, in order: (out [B, H, D] without the value scale, lse [B, H]), both float32."""
    rows = partial.shape[-1]
    pad = ((0, 0), (0, rows - p.group))
    sink = jnp.pad((sinks * LOG2E).reshape(p.kv_heads, p.group), pad, constant_values=-jnp.inf)
    start = jnp.stack([jnp.maximum(sink, FAR), jnp.where(sink > FAR, 1.0, 0.0)], axis=1)
    shape = jax.ShapeDtypeStruct((p.seqs, p.kv_heads, p.head_dim, rows), jnp.float32)
    sums = jax.ShapeDtypeStruct((p.seqs, p.kv_heads, 2, rows), jnp.float32)
    kernel = plgpu.kernel(
        _merge, out_type=(shape, sums),
        grid=(p.seqs, p.kv_heads, p.head_dim // BAND), grid_names=("seq", "head", "band"),
        scratch_types=[plgpu.SMEM((BAND, rows), jnp.float32), plgpu.SMEM((2, rows), jnp.float32)],
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=INTERPRET,
    )  # fmt: skip
    out, sums = kernel(partial, span, start)
    top, mass = sums[:, :, 0, : p.group], sums[:, :, 1, : p.group]
    lse = jnp.where(mass > 0, (top + jnp.log2(jnp.where(mass > 0, mass, 1.0))) / LOG2E, -jnp.inf)
    return jnp.swapaxes(out[..., : p.group], 2, 3).reshape(p.seqs, p.q_heads, -1), lse.reshape(p.seqs, p.q_heads)


def _merge(partial, span, start, out, sums, o_tile, s_tile) -> None:
    """One band of head dims of one (sequence, head): MERGED partials at a time, so that their loads overlap."""
    seq, head, band = (lax.axis_index(name) for name in ("seq", "head", "band"))
    rows, depth = out.shape[-1], out.shape[-2]
    over_rows = Layout.WGMMA.reduce(0)
    spread = lambda x: lax.broadcast_in_dim(x, (BAND, rows), [1])  # noqa: E731
    low, count = span[0, seq], span[1, seq]

    def load(slot, row):
        return plgpu.load(partial.at[slot, head, row], layout=over_rows, optimized=False)

    def step(i, state):
        acc, top, total = state
        slots = [low + jnp.minimum(i * MERGED + j, count - 1) for j in range(MERGED)]
        unreal = [jnp.where(i * MERGED + j < count, 0.0, FAR) for j in range(MERGED)]
        band_rows = pl.ds(band * BAND, BAND)
        values = [plgpu.load(partial.at[s, head, band_rows], layout=Layout.WGMMA, optimized=False) for s in slots]
        tops = [load(s, depth) + far for s, far in zip(slots, unreal, strict=True)]
        totals = [load(s, depth + 1) for s in slots]
        new = functools.reduce(jnp.maximum, tops, top)
        keep = jnp.exp2(top - new)
        acc, total = acc * spread(keep), total * keep
        for value, t, n in zip(values, tops, totals, strict=True):
            weight = jnp.exp2(t - new)
            acc, total = acc + value * spread(weight), total + n * weight
        return acc, new, total

    state = (
        plgpu.layout_cast(jnp.zeros((BAND, rows), jnp.float32), Layout.WGMMA),
        plgpu.load(start.at[head, 0], layout=over_rows, optimized=False),
        plgpu.load(start.at[head, 1], layout=over_rows, optimized=False),
    )
    acc, top, total = lax.fori_loop(0, lax.div(count + (MERGED - 1), jnp.int32(MERGED)), step, state)
    o_tile[...] = acc / spread(jnp.where(total > 0, total, 1.0))
    s_tile[0], s_tile[1] = top, total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_tile, out.at[seq, head, pl.ds(band * BAND, BAND)])
    pl.when(band == 0)(lambda: plgpu.copy_smem_to_gmem(s_tile, sums.at[seq, head]))
    plgpu.wait_smem_to_gmem(0)


def swizzled(dtype, columns: int) -> tuple:
    """Transforms of a tile of rows for TMA and the matrix unit."""
    width = min(128, columns * jnp.dtype(dtype).itemsize)
    columns = width // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]


def partials(p: Problem, terms, factor, buffers, page_table, kv_len, low, plan: Schedule, cap) -> Array:
    """The kernel: [W + B, K, D + 2, rows] float32, each partial's weighted values, running maximum (base 2) and sum."""
    depth, rows, workers = p.head_dim, factor.shape[-1], plan.work.shape[1]
    copies = max(TILE // p.page_size, 1)
    scratch = [
        plgpu.SMEM(terms.shape[2:], E4M3, transforms=swizzled(E4M3, depth)),
        plgpu.SMEM((STAGES, TILE, depth), E4M3, transforms=swizzled(E4M3, depth)),
        plgpu.SMEM((STAGES, TILE, depth), E4M3, transforms=swizzled(E4M3, depth)),
        # The wide values and the result are never alive together: four CTAs fit on an SM only if they share.
        plgpu.RefUnion(
            plgpu.SMEM((TILE, depth), jnp.float16, transforms=swizzled(jnp.float16, depth)),
            plgpu.SMEM((depth + 2, rows), jnp.float32),
        ),
        plgpu.SMEM((rows, TILE), jnp.float16, transforms=swizzled(jnp.float16, TILE)),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2 * copies, num_barriers=STAGES),
    ]
    shape = jax.ShapeDtypeStruct((workers + p.seqs, p.kv_heads, depth + 2, rows), jnp.float32)
    inputs = [terms, factor, *buffers, page_table, kv_len, low, *plan[:3]]
    kernel = plgpu.kernel(
        lambda *refs: _body(p, cap is not None, *refs),
        out_type=shape, grid=(workers, p.kv_heads), grid_names=("worker", "head"), scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=INTERPRET,
    )  # fmt: skip
    return kernel(*inputs, jnp.ones(2) if cap is None else cap)


def _body(
    p: Problem, capped: bool, terms, factor, k, v, page_table, kv_len, low, work, before, first, cap, out,
    q_tile, k_ring, v_ring, shared, p_tile, q_ready, ready,
) -> None:  # fmt: skip
    v_wide, o_tile = shared
    worker, head = lax.axis_index("worker"), lax.axis_index("head")
    start, end, seq, touched = (work[i, worker] for i in range(4))
    rows, depth = p_tile.shape[0], p.head_dim
    over_rows = Layout.WGMMA.reduce(0)  # a value for each query row, held like a column of the tile
    spread = lambda x, n: lax.broadcast_in_dim(x, (n, rows), [1])  # noqa: E731
    log2e = jnp.float32(LOG2E)

    def page_of(b, tile, j):
        """Page of the j-th part of a tile, kept inside the table and the cache; the last real page past the end."""
        column = (tile * TILE) // p.page_size + j if p.page_size < TILE else (tile * TILE) // p.page_size
        column = jnp.minimum(column, jnp.maximum(kv_len[b] - 1, 0) // p.page_size)
        return jnp.clip(page_table[b, column], 0, p.pages - 1)

    def rows_of(ref, page, tile):
        if p.page_size <= TILE:
            return ref.at[page, head] if p.layout.head_major else ref.at[page, :, head]
        inside = pl.ds(lax.rem(tile * TILE, jnp.int32(p.page_size)), TILE)
        return ref.at[page, head, inside] if p.layout.head_major else ref.at[page, inside, head]

    def fetch(b, tile, slot):
        size = min(p.page_size, TILE)
        for j in range(TILE // size):
            page = page_of(b, tile, j)
            for source, ring in ((k, k_ring), (v, v_ring)):
                plgpu.copy_gmem_to_smem(
                    rows_of(source, page, tile), ring.at[slot, pl.ds(j * size, size)], ready.at[slot]
                )

    def segment(i, carry):
        b = seq + i
        tile0 = first[b] + jnp.maximum(start - before[b], 0)
        count = first[b] + jnp.minimum(end, before[b + 1]) - before[b] - tile0
        plgpu.wait_smem_to_gmem(0)  # the last segment's result has left
        plgpu.commit_smem()  # and every warp is done with its query
        plgpu.copy_gmem_to_smem(terms.at[b, head], q_tile, q_ready)
        for slot in range(STAGES):
            pl.when(slot < count)(lambda slot=slot: fetch(b, tile0 + slot, slot))
        scale = plgpu.load(factor.at[b, head], layout=over_rows, optimized=False)
        plgpu.barrier_wait(q_ready)

        def scores(slot):
            def multiply(acc):
                plgpu.wgmma(acc, k_ring.at[slot], q_tile.transpose((1, 0)))
                return acc[...]

            s = pl.run_scoped(multiply, ACC((TILE, q_tile.shape[0]), jnp.float32))
            total = s[:, :rows]
            for term in range(1, q_tile.shape[0] // rows):
                total = total + s[:, term * rows : (term + 1) * rows]
            s = total * spread(scale, TILE)
            if capped:
                bound, on = cap[0], cap[1]  # on is 0 or 1: a cap that is not positive is none
                tanh = 1.0 - 2.0 / (jnp.exp2(s * (2.0 * log2e / bound)) + 1.0)
                s = tanh * (bound * on) + s * (1.0 - on)
            return s * log2e

        def inside(tile, layout, shape):
            token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + tile * TILE
            return (token < kv_len[b]) & (token >= low[b])

        def step(t, state, masked):
            acc, top, total = state
            slot, tile = lax.rem(t, jnp.int32(STAGES)), tile0 + t
            plgpu.barrier_wait(ready.at[slot])
            s = scores(slot)
            if masked:
                s = jnp.where(inside(tile, Layout.WGMMA, (TILE, rows)), s, FAR)
            new = jnp.maximum(top, jnp.max(s, axis=0))
            keep, weight = jnp.exp2(top - new), jnp.exp2(s - spread(new, TILE))
            if masked:
                weight = jnp.where(inside(tile, Layout.WGMMA, (TILE, rows)), weight, 0.0)
            total = total * spread(keep, TILE) + weight
            p_tile.transpose((1, 0))[...] = plgpu.layout_cast(weight.astype(jnp.float16), Layout.WGMMA_TRANSPOSED)
            wide = plgpu.load(v_ring.at[slot], layout=Layout.WGMMA_UPCAST_2X).astype(jnp.float16)
            if masked:  # an unwritten slot may hold NaN, and 0 x NaN is NaN
                wide = jnp.where(inside(tile, Layout.WGMMA_UPCAST_2X, (TILE, depth)), wide, jnp.float16(0))
            v_wide[...] = wide
            plgpu.commit_smem()
            pl.when(t + STAGES < count)(lambda: fetch(b, tile + STAGES, slot))

            def multiply(acc):
                plgpu.wgmma(acc, v_wide.transpose((1, 0)), p_tile.transpose((1, 0)))
                return acc[...]

            product = pl.run_scoped(multiply, ACC((depth, rows), jnp.float32))
            return acc * spread(keep, depth) + product, new, total

        state = (
            plgpu.layout_cast(jnp.zeros((depth, rows), jnp.float32), Layout.WGMMA),
            plgpu.layout_cast(jnp.full((rows,), FAR, jnp.float32), over_rows),
            plgpu.layout_cast(jnp.zeros((TILE, rows), jnp.float32), Layout.WGMMA),
        )
        # Whole tiles need no mask; with a window the first one does too.
        whole = jnp.clip(kv_len[b] // TILE - tile0, 0, count) if "window" not in p.options else jnp.int32(0)
        state = lax.fori_loop(0, whole, lambda t, s: step(t, s, False), state)
        acc, top, total = lax.fori_loop(whole, count, lambda t, s: step(t, s, True), state)
        o_tile[pl.ds(0, depth)] = acc
        o_tile[depth] = top
        o_tile[depth + 1] = jnp.sum(total, axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile, out.at[worker + b, head])
        return carry

    lax.fori_loop(0, touched, segment, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
