"""Latent cache writes on Hopper: rows made and put into their slots by one launch, in place.

A CTA of one warpgroup takes 8 tokens. Sixteen lanes hold a row, so that the scales of FP8_DS_MLA are found inside the
warp. Whatever the format, a row is made in shared memory as it is stored and leaves by one copy for wherever its slot
lies; a token without a slot leaves nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import FP8_DS_MLA
from pallas_attn.core.latent_cache import DS_CODES, DS_SCALES
from pallas_attn.core.narrow import slots32
from pallas_attn.core.quantized import scale_of, to_codes
from pallas_attn.ops.latent_cache.write_problem import Args, Problem
from pallas_attn.runtime.mosaic import divide, put_rows, recast, row_layout, whole_rows

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
ROWS = 8  # tokens of a CTA, the fewest that fill its registers
ALIGNED = 128  # bytes: where a copy out of shared memory begins
MOST = 1024  # numbers of a part of a row, which are in registers at once
LANES = 16  # that hold a row


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    dims = (p.latent_dim, p.rope_dim)
    refusals = {
        f"no latent of {p.latent_dim} with a rotary part of {p.rope_dim}": any(d % 16 for d in dims)
        or not p.rope_dim
        or max(dims) > MOST,
        "an empty call": not p.tokens or not p.pages * p.page_size,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays):
    """The leaves of the written cache."""
    cache, latent, rope, slots = Args(*arrays)
    size, width = p.pages * p.page_size, cache.pages.shape[2]
    given = [] if cache.scale is None else [cache.scale.reshape(1)]
    pitch = -(-width * cache.pages.dtype.itemsize // ALIGNED) * ALIGNED // cache.pages.dtype.itemsize
    # References make what comes in and what goes out one and the same memory.
    memory = jax.new_ref(cache.pages.reshape(size, width))

    def write_latent(latent, rope, slots, *refs):
        _write(p, (latent, rope), slots, refs[: len(given)], *refs[len(given) :])

    plgpu.kernel(
        write_latent,
        out_type=(),
        grid=(-(-p.tokens // ROWS),),
        grid_names=("tokens",),
        scratch_types=[
            [plgpu.SMEM((ROWS, width), p.dtype) for _, _, width in pieces(p)],
            plgpu.SMEM((ROWS, pitch), cache.pages.dtype),
            plgpu.Barrier(num_arrivals=len(pieces(p))),
        ],
        interpret=INTERPRET,
    )(latent, rope, slots32(slots, size), *given, memory)
    pages = jax.freeze(memory).reshape(cache.pages.shape)
    return [pages] if cache.scale is None else [pages, cache.scale]


def pieces(p: Problem) -> list[tuple[int, int, int]]:
    """(part of a row, its first column, columns) of each tile that is read as a whole: Pallas has tiles of 2 bytes lie
    as suits the matrix unit, and then reads the wrong columns of a slice."""
    group = FP8_DS_MLA.group if p.format == FP8_DS_MLA else None
    latent = [(0, at, group or p.latent_dim) for at in range(0, p.latent_dim, group or p.latent_dim)]
    return [*latent, (1, 0, p.rope_dim)]


def _write(p: Problem, parts, slots, given, memory, raw, rows, ready) -> None:
    count = min(ROWS, p.tokens)
    # The last share begins early enough to be whole: tokens of two shares are written alike by both.
    first = jnp.minimum(lax.axis_index("tokens") * ROWS, p.tokens - count)
    for (part, at, width), tile in zip(pieces(p), raw, strict=True):
        source = parts[part].at[pl.ds(first, count), pl.ds(at, width)]
        plgpu.copy_gmem_to_smem(source, tile.at[pl.ds(0, count)], ready)
    plgpu.barrier_wait(ready)
    if p.format == FP8_DS_MLA:
        _make_bytes(raw[:-1], raw[-1], rows)
    else:
        _make_numbers(p, raw, given, rows)
    plgpu.commit_smem()
    width = memory.shape[1]
    for i in range(count):
        slot = slots[first + i]
        row, to = rows.at[pl.ds(i, 1), pl.ds(0, width)], memory.at[pl.ds(slot, 1)]
        real = (slot >= 0) & (slot < memory.shape[0])
        pl.when(real)(functools.partial(plgpu.copy_smem_to_gmem, row, to))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _make_numbers(p: Problem, raw, given, rows) -> None:
    """Rows of one type: floats, or codes of the cache's scale."""
    at, interpret = 0, bool(INTERPRET)
    for tile in raw:
        dim = tile.shape[1]
        layout = row_layout(dim & -dim)
        x = plgpu.load(tile, layout=layout, optimized=False)
        if p.format.quantized:
            scale = plgpu.layout_cast(jnp.full(x.shape, given[0][0], jnp.float32), layout)
            x = to_codes(divide(x.astype(jnp.float32), scale, layout, interpret), p.format)
        elif x.dtype != rows.dtype:
            x = x.astype(jnp.float32).astype(rows.dtype)
        put_rows(rows.at[:, pl.ds(at, dim)], x, layout, interpret)
        at += dim


def _make_bytes(latent: list, rope, rows) -> None:
    """Rows of FP8_DS_MLA: codes, scales, the rotary part."""
    group, dim, interpret = FP8_DS_MLA.group, rope.shape[1], bool(INTERPRET)
    assert group is not None
    layout, words = row_layout(group), whole_rows(LANES)
    each = layout.reduce(1)
    every = lambda c: plgpu.layout_cast(jnp.full((ROWS,), c, jnp.float32), each)  # noqa: E731
    quotient = lambda x, y: divide(x, every(y) if jnp.ndim(y) == 0 else y, each, interpret)  # noqa: E731
    put = lambda at, x: put_rows(rows.at[:, pl.ds(at, x.shape[1])], x, whole_rows(x.shape[1]), interpret)  # noqa: E731
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, LANES), 1, layout=words)
    bits = column * 0
    for i, tile in enumerate(latent):
        part = pl.ds(i * group, group)
        x = plgpu.load(tile, layout=layout, optimized=False).astype(jnp.float32)
        scale = scale_of(jnp.max(jnp.abs(x), axis=1), FP8_DS_MLA, quotient)
        # Of a power of two: multiplying by the reciprocal is the division.
        y = x * lax.broadcast_in_dim(quotient(every(1), scale), x.shape, [0])
        # The kernel's own conversion saturates, and a clamp before it would make a number of a NaN.
        codes = to_codes(y, FP8_DS_MLA) if interpret else y.astype(FP8_DS_MLA.dtype)
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
        put_rows(rows.at[:, part], codes, layout, interpret)
        found = lax.broadcast_in_dim(lax.bitcast_convert_type(scale, jnp.int32), column.shape, [0])
        bits = jnp.where(column == i, found, bits)
    put(DS_CODES, recast(bits, jnp.uint8, interpret))
    plgpu.commit_smem()  # the rotary part covers the end of that
    x = plgpu.load(rope, layout=whole_rows(dim), optimized=False).astype(jnp.float32).astype(jnp.bfloat16)
    put(DS_SCALES, recast(x, jnp.uint8, interpret))
