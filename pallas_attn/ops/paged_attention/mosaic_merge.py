"""The second launch of split decode: partial results of each sequence are merged, finished and put in their place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_attn.core.formats import Format
from pallas_attn.ops.paged_attention.mosaic_config import Form
from pallas_attn.ops.paged_attention.mosaic_share import share
from pallas_attn.ops.paged_attention.mosaic_worker import FAR, SCALE_RANK, Inputs, Sequence, scale_at
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import LOG2E, SMS, row_layout

REGISTERS = 160  # of each thread for values that are on their way


def merge(
    p: Problem, form: Form, workers: int, x, partial, stats, sinks, v_scale, out_scale, into, interpret
) -> tuple[Array, ...]:
    """(out [T, H, D], lse [T, H] if asked) from what the workers left.

    A CTA takes one block of query rows of a sequence, or a band of its head dims where there are few; the sequences
    also share the tokens that belong to none, which come out as zeros; not so if there are results to write `into`.
    """
    columns, rows, depth = partial.shape[1:]
    heads = p.kv_heads * form.parts
    band = depth
    # Copies to global memory start at multiples of 128 bytes of shared memory.
    aligned = lambda width: form.span == 1 or width * form.part * p.out_dtype.itemsize % 128 == 0  # noqa: E731
    while band > 32 and p.seqs * columns * depth // band < 2 * SMS and aligned(band // 2):
        band //= 2
    # All loads of a step overlap; as few steps as the registers allow, of the partial results to be expected.
    expected, fit = workers // p.seqs + 2, REGISTERS // (rows * band // 128 + 2)
    together = -(-expected // -(-expected // max(fit, 1)))
    given = sinks is not None
    rank = SCALE_RANK.get(p.kv_format.granularity)
    arrays = (
        partial, stats, x.cu_q_lens, x.kv_lens, x.live, x.before,
        sinks.astype(jnp.float32).reshape(heads, form.part) if given else jnp.zeros((1, 1)),
        v_scale if rank is not None else jnp.ones(1),
        jnp.ones(1) if out_scale is None else jnp.reshape(out_scale, (1,)),
    )  # fmt: skip
    out = [jax.ShapeDtypeStruct((p.tokens, heads, form.part, depth), p.out_dtype)]
    if p.return_lse:
        out.append(jax.ShapeDtypeStruct((p.tokens, heads, form.part), jnp.float32))
    scratch = [plgpu.SMEM((rows, band), p.out_dtype), plgpu.SMEM((2, rows), jnp.float32)]

    def combine(*refs):
        ins, outs, tiles = refs[: len(arrays)], refs[len(arrays) : -2], refs[-2:]
        _merge(p, form, workers, band, together, given, rank, ins, outs, tiles, into is None, interpret)

    kernel = plgpu.kernel(
        combine, out_type=tuple(out) if into is None else (), grid=(p.seqs, columns, depth // band),
        grid_names=("seq", "column", "band"), scratch_types=scratch, interpret=interpret,
    )  # fmt: skip
    memory = [jax.new_ref(x.reshape(o.shape)) for x, o in zip(into or (), out, strict=False)]
    got = kernel(*arrays, *memory) or [jax.freeze(x) for x in memory]
    shapes = ((p.tokens, p.q_heads, depth), (p.tokens, p.q_heads))
    return tuple(g.reshape(s) for g, s in zip(got, shapes, strict=False))


def _merge(p: Problem, form, workers, band, together, given, rank, ins, outs, tiles, alone, interpret) -> None:
    partial, stats, cu_q_lens, kv_lens, live, before, sinks, v_scale, out_scale = ins
    o_tile, row_tile = tiles
    b, column, part = (lax.axis_index(name) for name in ("seq", "column", "band"))
    unit, block = lax.div(column, jnp.int32(form.blocks)), lax.rem(column, jnp.int32(form.blocks))
    nothing: Any = [None] * len(Inputs._fields)
    x = Inputs(*nothing)._replace(cu_q_lens=cu_q_lens, kv_lens=kv_lens, live=live)
    seq = Sequence.read(p, x, b)
    rows, at = partial.shape[2], pl.ds(part * band, band)
    layout = row_layout(band)
    of_rows = layout.reduce(1)
    spread = lambda v: lax.broadcast_in_dim(v, (rows, band), [0])  # noqa: E731
    value_scale = None if rank is None else scale_at(v_scale, rank, b, lax.div(unit, jnp.int32(form.parts)))
    rounding_scale = out_scale[0]
    if interpret is None:  # launched before the workers have ended: nothing of theirs is read sooner, nothing written
        plgpu.griddepcontrol_wait()
    _, each = share(before, p.seqs, workers)
    low, count = lax.div(before[b], each), before[b + 1] - before[b]
    parts = jnp.where(count > 0, lax.div(before[b + 1] - 1, each) - low + 1, 0)

    def load(ref, how):
        return plgpu.load(ref, layout=how, optimized=False)

    def step(i, state):
        acc, top, total = state
        index = [i * together + j for j in range(together)]
        slots = [low + b + jnp.minimum(j, parts - 1) for j in index]
        unreal = [jnp.where(j < parts, 0.0, FAR) for j in index]
        tops = [load(stats.at[s, column, 0], of_rows) + far for s, far in zip(slots, unreal, strict=True)]
        totals = [load(stats.at[s, column, 1], of_rows) for s in slots]
        values = [load(partial.at[s, column, pl.ds(0, rows), at], layout) for s in slots]
        peak = top
        for t in tops:
            peak = jnp.maximum(peak, t)
        keep = jnp.exp2(top - peak)
        acc, total = acc * spread(keep), total * keep
        for value, t, n in zip(values, tops, totals, strict=True):
            weight = jnp.exp2(t - peak)
            acc, total = acc + value * spread(weight), total + n * weight
        return acc, peak, total

    zero = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), of_rows)
    top, total = zero + FAR, zero
    if given:
        for r in range(form.part * form.span):
            row_tile[0, r] = sinks[unit, r % form.part]
        for r in range(form.part * form.span, rows):
            row_tile[0, r] = jnp.float32(-jnp.inf)
        plgpu.commit_smem()
        sink = load(row_tile.at[0], of_rows) * jnp.float32(LOG2E)
        top, total = jnp.maximum(sink, FAR), jnp.where(sink > FAR, 1.0, 0.0)
    state = (plgpu.layout_cast(jnp.zeros((rows, band), jnp.float32), layout), top, total)
    acc, top, total = lax.fori_loop(0, lax.div(parts + (together - 1), jnp.int32(together)), step, state)
    some = jnp.where(total > 0, total, 1.0)
    result = acc / spread(some)
    if value_scale is not None:
        result = result * value_scale
    o_tile[...] = round_to(result, p.out_format, p.out_dtype, rounding_scale)
    row_tile[1] = jnp.where(total > 0, (top + jnp.log2(some)) / jnp.float32(LOG2E), -jnp.inf)
    plgpu.commit_smem()
    first = block * form.span
    for i in range(form.span):
        pl.when(first + i < seq.q_len)(
            lambda i=i: plgpu.copy_smem_to_gmem(
                o_tile.at[pl.ds(i * form.part, form.part)],
                outs[0].at[seq.start + first + i, unit, pl.ds(0, form.part), at],
            )
        )
    if p.return_lse:
        pl.when(part == 0)(lambda: _write_lse(p, form, seq, unit, first, row_tile, outs[1]))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if not alone:
        return
    end = jnp.clip(cu_q_lens[jnp.clip(live[0], 0, p.seqs)], 0, p.tokens) + b
    pl.when((block == 0) & (end < p.tokens))(lambda: _clear(p, form, end, unit, at, part, o_tile, layout, outs))


def round_to(x, format: Format | None, dtype, scale):
    """The one rounding of the result, as `stored.finish` has it."""
    if format is None:
        return x.astype(dtype)
    y = x * (1.0 / scale) if format.apply_scale == "reciprocal" else x / scale
    return jnp.clip(y, format.qmin, format.qmax).astype(dtype)


def _write_lse(p: Problem, form, seq, unit, first, row_tile, lse) -> None:
    for i in range(form.span):

        def token(i=i) -> None:
            for g in range(form.part):
                lse[seq.start + first + i, unit, g] = row_tile[1, i * form.part + g]

        pl.when(first + i < seq.q_len)(token)


def _clear(p: Problem, form, first, unit, at, part, o_tile, layout, outs) -> None:
    """Every seqs-th token from `first` is zero: those that belong to no sequence."""
    plgpu.commit_smem()
    o_tile[...] = plgpu.layout_cast(jnp.zeros(o_tile.shape, jnp.float32), layout).astype(o_tile.dtype)
    plgpu.commit_smem()

    def token(i, carry):
        t = first + i * p.seqs
        plgpu.copy_smem_to_gmem(o_tile.at[pl.ds(0, form.part)], outs[0].at[t, unit, pl.ds(0, form.part), at])
        if p.return_lse:

            def lse() -> None:
                for g in range(form.part):
                    outs[1][t, unit, g] = jnp.float32(-jnp.inf)

            pl.when(part == 0)(lse)
        return carry

    lax.fori_loop(0, lax.div(p.tokens - first + (p.seqs - 1), jnp.int32(p.seqs)), token, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
