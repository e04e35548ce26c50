"""How the Hopper gather cuts a problem into tiles, and tiles into copies."""

import functools
from typing import Any, NamedTuple

from pallas_attn.ops.gather_kv.problem import Problem
from pallas_attn.runtime.mosaic import SHARED
from pallas_attn.runtime.mosaic_packed import padded

TILE_BYTES = 16 * 1024  # of one side of a tile of the result
STAGES = 2
MOST_ROWS, MOST_SCALES = 256, 64  # of one tile, and of one whose rows have scales of their own
MOST_PARTS = 16  # pages of one tile
MOST_CTAS = 6  # of one SM


class Plan(NamedTuple):
    """How a problem is cut."""

    tokens: int  # of a tile: a divisor of the page size, or a multiple
    heads: int  # of one CTA
    stages: int  # tiles in flight
    ctas: int  # of one SM

    def parts(self, p: Problem) -> int:
        """Pages of a tile."""
        return max(self.tokens // p.page_size, 1)


@functools.cache
def plan(p: Problem) -> Plan:
    """Tiles of TILE_BYTES or less, and as many CTAs as shared memory holds."""
    dim = max(p.head_dim, p.v_head_dim)
    rows = MOST_ROWS if p.format.granularity in ("none", "tensor") else MOST_SCALES
    most = min(max(TILE_BYTES // (dim * p.dtype.itemsize), 1), rows)
    heads = -(-p.kv_heads // -(-p.kv_heads // most))
    fit = min(max(most // heads, 1), MOST_PARTS * p.page_size)
    tokens = next(t for t in range(min(fit, p.page_size), 0, -1) if p.page_size % t == 0)
    if fit >= p.page_size:
        tokens = fit // p.page_size * p.page_size
    height = height_of(tokens * heads)
    widths = [STAGES * d * p.format.dtype.itemsize + d * p.dtype.itemsize for d in (p.head_dim, p.v_head_dim)]
    used = height * sum(widths) + 8 * padded(p.seqs) + 2048 + 1024
    return Plan(tokens, heads, STAGES, max(min(SHARED // used, MOST_CTAS), 1))


def height_of(rows: int) -> int:
    """Rows of a tile in shared memory: register layouts take them by eight."""
    return -(-rows // 8) * 8


class Run(NamedTuple):
    """Rows that lie together in a page, from `source` on, and in a tile, from `to` on."""

    source: Any
    to: int
    rows: int


def runs(p: Problem, cut: Plan, head, slot, part: int):
    """The runs of the tile's part-th page, from `slot` on: NHD rows are (slot, head), head-major ones (head, slot)."""
    size = min(cut.tokens, p.page_size)
    at = part * size
    if p.layout.head_major:
        if cut.heads == p.kv_heads and cut.tokens == p.page_size:
            return [Run(0, 0, size * cut.heads)]
        return [Run((head + h) * p.page_size + slot, h * cut.tokens + at, size) for h in range(cut.heads)]
    if cut.heads == p.kv_heads:
        return [Run(slot * p.kv_heads, at * cut.heads, size * cut.heads)]
    return [Run((slot + i) * p.kv_heads + head, (at + i) * cut.heads, cut.heads) for i in range(size)]
