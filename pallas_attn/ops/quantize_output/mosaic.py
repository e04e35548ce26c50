"""Quantisation in groups on Hopper, by one launch: values, scales in the order of the format, exponents packed.

A matrix [M, D] is cut into tiles of some rows and one group, so that a tile's scales are neighbours in a column of
scales; scales in rows are those of a matrix [M * G, group]. A CTA of one warpgroup asks for several tiles at once, one
below the other, or for packed exponents the four groups of a word, and takes them in turn; small problems have smaller
CTAs, so that all SMs have some. Sixteen lanes hold a row
and load 16 bytes each, so that a scale is found inside a warp. Values and scales leave by TMA. The last tile begins
early enough to be whole: what two tiles share is written alike by both.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import E4M3, GROUPS
from pallas_attn.core.group_scales import MANTISSA
from pallas_attn.core.quantized import quantized_arrays, scale_of, to_codes
from pallas_attn.ops.quantize_output.problem import Args, Problem
from pallas_attn.runtime.dispatch import Elsewhere
from pallas_attn.runtime.mosaic import SMS, divide, row_layout

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
TILES = 4  # of a CTA, at most: bytes on their way while the first is worked on; the groups of an int32
BUSY = 3 * SMS  # CTAs: below that, more of them with less to do
MOST_ROWS = 32  # of a tile: its registers hold it in float32
WHOLE = 4  # rows: 16 bytes of scales, where a copy of them may begin


class Cut(NamedTuple):
    """How a problem is cut: a matrix of rows and groups, tiles of `height` rows, some to a CTA."""

    rows: int
    groups: int
    height: int
    tiles: int


def cut_of(p: Problem) -> Cut:
    """The matrix that the kernel sees."""
    size = p.format.group or 1
    *lead, rows, width = (1, *p.shape)
    for n in lead:
        rows *= n
    if p.format.order == "row":
        rows, width = rows * (width // size), size
    cut = Cut(rows, width // size, min(MOST_ROWS, max(rows // 8, 1) * 8), TILES)
    while not _packed(p) and cut.tiles > 1 and math.prod(grid_of(p, cut)) < BUSY:
        cut = cut._replace(tiles=cut.tiles // 2)
    while cut.height % 16 == 0 and math.prod(grid_of(p, cut)) < BUSY:
        cut = cut._replace(height=cut.height // 2)
    return cut


def grid_of(p: Problem, cut: Cut) -> tuple[int, int]:
    """CTAs: by rows, and by groups or words of groups."""
    if _packed(p):
        return -(-cut.rows // cut.height), -(-cut.groups // TILES)
    return -(-cut.rows // (cut.height * cut.tiles)), cut.groups


def _packed(p: Problem) -> bool:
    return p.format.scale_type == "int32"


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    format = p.format
    groups = format.granularity == "group" and format.group in GROUPS and format.dtype == E4M3
    if not groups or (format.find_scale, format.apply_scale) != ("divide", "reciprocal"):
        return Elsewhere(f"no {format}")
    if p.given:
        return Elsewhere("no known scales")
    cut, matrix = cut_of(p), len(p.shape) == 2 or format.order == "row"
    refusals = {
        f"no {p.dtype}": p.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32),
        f"no {format} for more than two axes": not matrix,
        f"fewer than 8 rows: {cut.rows}": cut.rows < 8,
        f"no {cut.rows} rows, which are no multiple of {WHOLE}": cut.rows % WHOLE != 0,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays):
    """(values, scales that are found)."""
    x, cut, size = Args(*arrays).x, cut_of(p), p.format.group or 1
    values, scale = quantized_arrays(p.format, p.shape, False)
    grid = grid_of(p, cut)
    kernel = plgpu.kernel(
        lambda *refs: _quantize(p, cut, *refs),
        out_type=[
            jax.ShapeDtypeStruct((cut.rows, cut.groups * size), values.dtype),
            jax.ShapeDtypeStruct((grid[1], cut.rows), scale.dtype),
        ],
        grid=grid,
        grid_names=("rows", "columns"),
        scratch_types=[
            plgpu.SMEM((cut.tiles, cut.height, size), p.dtype),
            plgpu.SMEM((cut.tiles, cut.height, size), values.dtype),
            plgpu.SMEM((cut.tiles, MOST_ROWS), scale.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=cut.tiles),
        ],
        interpret=INTERPRET,
    )
    made = kernel(x.reshape(cut.rows, cut.groups * size))
    return tuple(m.reshape(s.shape) for m, s in zip(made, (values, scale), strict=True))


def _quantize(p: Problem, cut: Cut, x, values, scale, raw, codes, found, ready) -> None:
    size, packed = p.format.group or 1, _packed(p)
    row, column = lax.axis_index("rows"), lax.axis_index("columns")

    def place(i: int):
        """(first row, group) of a tile; past the last of either, the last."""
        first = row * cut.height if packed else (row * cut.tiles + i) * cut.height
        group = jnp.minimum(column * TILES + i, cut.groups - 1) if packed else column
        return jnp.minimum(first, cut.rows - cut.height), group

    def part(i: int):
        first, group = place(i)
        return pl.ds(first, cut.height), pl.ds(group * size, size)

    for i in range(cut.tiles):
        plgpu.copy_gmem_to_smem(x.at[part(i)], raw.at[i], ready.at[i])
    word = None
    for i in range(cut.tiles):
        plgpu.barrier_wait(ready.at[i])
        number = _tile(p, raw.at[i], codes.at[i])
        if packed:
            byte = _exponent(number, column * TILES + i < cut.groups) << _same(number, 8 * i)
            word = byte if word is None else word | byte
        else:
            found[i, pl.ds(0, cut.height)] = number
    if packed:
        found[0, pl.ds(0, cut.height)] = word
    plgpu.commit_smem()
    for i in range(cut.tiles):
        plgpu.copy_smem_to_gmem(codes.at[i], values.at[part(i)])
        if i == 0 or not packed:
            rows, _ = part(i)
            plgpu.copy_smem_to_gmem(found.at[i, pl.ds(0, cut.height)], scale.at[column, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _same(like, x):
    """An int32, once for each number of `like`."""
    return lax.broadcast_in_dim(jnp.int32(x), like.shape, [])


def _exponent(scale, inside):
    """The exponents of powers of two, zero for a group that is none."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return lax.shift_right_logical(bits, _same(scale, MANTISSA)) * _same(scale, inside.astype(jnp.int32))


def _tile(p: Problem, raw, codes):
    """The scales [height] of a tile, whose values go to `codes`."""
    height, size = raw.shape
    layout = row_layout(size, p.dtype.itemsize)
    each = layout.reduce(1)
    every = lambda c: plgpu.layout_cast(jnp.full((height,), c, jnp.float32), each)  # noqa: E731
    x = plgpu.load(raw, layout=layout, optimized=False).astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=1)
    scale = scale_of(amax, p.format, lambda x, c: divide(x, every(c), each, bool(INTERPRET)))
    inverse = divide(every(1), scale, each, bool(INTERPRET))
    codes[...] = to_codes(x * lax.broadcast_in_dim(inverse, (height, size), [0]), p.format)
    return scale
