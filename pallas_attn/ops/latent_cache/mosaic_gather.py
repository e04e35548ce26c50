"""The latent gather on Hopper: pages to contiguous rows by one launch.

`runtime/mosaic_packed.py` tells who gathers what. Rows lie in a line in the cache, in shared memory and in the result,
so that the part of a page that a tile takes is one copy of bytes, and a whole tile leaves by one; at the ends of a
sequence rows leave one by one: no copy writes what another sequence owns. Numbers go through registers for their scale;
rows that come out as they are stored leave from where they landed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import BF16, E4M3, FP8_DS_MLA
from pallas_attn.core.latent_cache import DS_CODES, DS_LATENT, DS_ROPE, DS_SCALES
from pallas_attn.ops.latent_cache.gather_problem import Args, Problem, outputs
from pallas_attn.runtime.mosaic import SHARED, SMS, get_rows, put_rows, recast, row_layout, whole_rows
from pallas_attn.runtime.mosaic_packed import MOST_SEQS, Segment, Walk, padded, where

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
TILE_BYTES = 20 * 1024  # of a tile of the result
STAGES = 3
MOST_PARTS = 16  # pages of one tile
MOST_CTAS = 6  # of one SM
MOST = 1152  # numbers of a row
LANES = 16  # that hold a row


class Plan(NamedTuple):
    """How a problem is cut."""

    tokens: int  # of a tile: a divisor of the page size, or a multiple
    stages: int  # tiles in flight
    height: int  # of a tile in shared memory: register layouts take rows by eight
    ctas: int  # of one SM


def as_stored(p: Problem) -> bool:
    """Whether rows come out as they are stored."""
    return p.dtype is None or (not p.format.quantized and p.dtype == p.format.dtype)


@functools.cache
def plan(p: Problem) -> Plan:
    """Tiles of TILE_BYTES or less, and as many CTAs as shared memory holds."""
    (width, stored), out = p.stored, outputs(p)[0]
    row = out.shape[1] * out.dtype.itemsize
    fit = min(max(TILE_BYTES // row, 1), MOST_PARTS * p.page_size)
    tokens = next(t for t in range(min(fit, p.page_size), 0, -1) if p.page_size % t == 0)
    if fit >= p.page_size:
        tokens = fit // p.page_size * p.page_size
    height = -(-tokens // 8) * 8
    used = height * (STAGES * width * stored.itemsize + (0 if as_stored(p) else row)) + 8 * padded(p.seqs) + 3 * 1024
    return Plan(tokens, STAGES, height, max(min(SHARED // used, MOST_CTAS), 1))


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    width = p.latent_dim + p.rope_dim
    refusals = {
        f"no rows of {width} numbers": width % 16 != 0 or width > MOST,
        f"more than {MOST_SEQS} sequences": p.seqs > MOST_SEQS,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays):
    """(rows, cu_lens)."""
    cut, args = plan(p), Args(*arrays)
    scale = args.cache.scale
    x = where(p, args.page_table, args.kv_lens, args.starts, args.num_seqs) | {
        "pages": args.cache.pages,
        "scale": None if scale is None else scale.reshape(1),
    }
    leaves, tree = jax.tree.flatten(x)
    width, stored = p.stored
    rows, cu_lens = outputs(p)
    parts = max(cut.tokens // p.page_size, 1)
    tile = [] if as_stored(p) else [plgpu.SMEM((cut.height, rows.shape[1]), rows.dtype)]
    workers = max(min(SMS * cut.ctas, -(-p.max_tokens // cut.tokens) + p.seqs), 1)

    def gather_latent(*refs):
        ins, rest = refs[: len(leaves)], refs[len(leaves) :]
        out, cu_lens, lens, ready, ring, *tile = rest
        made = tile[0] if tile else ring.at[0]
        Worker(p, cut, workers, jax.tree.unflatten(tree, ins), cu_lens, lens, out, ring, made, ready).run()

    return plgpu.kernel(
        gather_latent, out_type=[rows, cu_lens], grid=(workers,), grid_names=("worker",),
        scratch_types=[
            plgpu.SMEM((2, padded(p.seqs)), jnp.int32),
            plgpu.Barrier(num_arrivals=parts, num_barriers=cut.stages),
            plgpu.SMEM((cut.stages, cut.height, width), stored), *tile,
        ],
        interpret=INTERPRET,
    )(*leaves)  # fmt: skip


@dataclasses.dataclass
class Worker(Walk):
    """The body of the kernel: one CTA's walk over its tiles."""

    cut: Plan
    out: Any
    ring: Any  # tiles as they are stored
    tile: Any  # one of the result; where rows leave from the ring, only a cleared one
    ready: Any

    def run(self) -> None:
        """All of the worker's tiles, and its share of `cu_lens`."""
        self.walk()
        self.tell_lengths()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def fetch(self, s: Segment, t, slot) -> None:
        """Start the copies of the worker's tile t."""
        size = min(self.cut.tokens, self.p.page_size)
        # A promise that makes it a plain copy of bytes.
        promise = None if INTERPRET else plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        for part in range(self.parts()):
            page, first = self.place(s, t, part)
            rows, to = self.x["pages"].at[page, pl.ds(first, size)], self.ring.at[slot, pl.ds(part * size, size)]
            plgpu.copy_gmem_to_smem(rows, to, self.ready.at[slot], oob_mode=promise)

    def step(self, s: Segment, t) -> None:
        """Tile t: to numbers, and off."""
        stages, span = jnp.int32(self.cut.stages), self.span(s, t)
        slot = lax.rem(t, stages)
        plgpu.barrier_wait(self.ready.at[slot])
        if as_stored(self.p):
            self.put(self.ring.at[slot], *span)
            # The tile before has left, and its place may be filled; behind the last one comes another sequence.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            more = (t > 0) & (t + stages - 1 < s.count)
            pl.when(more)(lambda: self.fetch(s, t + stages - 1, lax.rem(t + stages - 1, stages)))
            pl.when(t + 1 == s.count)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.convert(self.ring.at[slot])
        plgpu.commit_smem()
        self.put(self.tile, *span)
        pl.when(t + stages < s.count)(lambda: self.fetch(s, t + stages, slot))

    def convert(self, rows) -> None:
        """Stored rows to numbers in the result's type: the float32 product, rounded once."""
        if self.p.format == FP8_DS_MLA:
            self.convert_bytes(rows)
            return
        width = rows.shape[1]
        layout = row_layout(width & -width, max(self.p.dtype.itemsize, rows.dtype.itemsize))
        x = self.widened(get_rows(rows, layout, bool(INTERPRET)))
        if self.x["scale"] is not None:
            x = x * self.x["scale"][0]
        put_rows(self.tile, x.astype(self.p.dtype), layout, bool(INTERPRET))

    def convert_bytes(self, rows) -> None:
        """The same for rows of FP8_DS_MLA."""
        dtype, group, interpret = self.p.dtype, FP8_DS_MLA.group, bool(INTERPRET)
        assert group is not None
        get = lambda at, n: get_rows(rows.at[:, pl.ds(at, n)], whole_rows(n), interpret)  # noqa: E731
        words = recast(get(DS_CODES, 4 * LANES), jnp.float32, interpret)  # the scales, then what lies behind them
        column = plgpu.broadcasted_iota(jnp.int32, words.shape, 1, layout=whole_rows(LANES))
        layout = row_layout(group, dtype.itemsize)
        for i in range(DS_LATENT // group):
            part = pl.ds(i * group, group)
            codes = lax.bitcast_convert_type(get_rows(rows.at[:, part], layout, interpret), E4M3)
            scale = jnp.sum(jnp.where(column == i, words, 0.0), axis=1)
            x = self.widened(codes) * lax.broadcast_in_dim(scale, codes.shape, [0])
            put_rows(self.tile.at[:, part], x.astype(dtype), layout, interpret)
        x = recast(get(DS_SCALES, 2 * DS_ROPE), BF16.dtype, interpret)
        x = x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)
        put_rows(self.tile.at[:, pl.ds(DS_LATENT, DS_ROPE)], x, whole_rows(DS_ROPE), interpret)

    def widened(self, x):
        """In float32; codes by way of f16, which is exact: no unit takes FP8 further at once."""
        return (x.astype(jnp.float16) if x.dtype.itemsize == 1 else x).astype(jnp.float32)

    def put(self, tile, row, low, high) -> None:
        """Rows low to high of a tile to the result, where its first would go to `row`: one group of copies."""
        tokens = self.cut.tokens

        def rows(at, count: int) -> None:
            to = self.out.at[pl.ds(row + at, count)]
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(at, count)], to, commit_group=False)

        def single() -> None:
            lax.fori_loop(low, high, lambda at, carry: rows(at, 1) or carry, jnp.int32(0))

        whole = (low == 0) & (high == tokens)
        pl.when(whole)(lambda: rows(0, tokens))
        pl.when(jnp.logical_not(whole))(single)
        plgpu.commit_smem_to_gmem_group()

    def clear(self) -> None:
        """Zeros in the tile."""
        width, dtype = self.tile.shape[1], self.tile.dtype
        layout = row_layout(width & -width, dtype.itemsize)
        zeros = plgpu.layout_cast(jnp.zeros(self.tile.shape, dtype), layout)
        put_rows(self.tile, zeros, layout, bool(INTERPRET))

    def put_zeros(self, row, count) -> None:
        """So many cleared rows to the result."""
        self.put(self.tile, row, jnp.int32(0), count)
