"""The body of the paged logits kernel: one CTA's walk over its units of work (see `mosaic_paged_logits`)."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.ops.sparse_indexer.mosaic_parts import DIM, clear, factors, put, put_some
from pallas_attn.ops.sparse_indexer.paged_logits.problem import Problem
from pallas_attn.runtime.mosaic import ACC, OVER_COLUMNS, OVER_ROWS, Layout, token_layout

FILL_TILES = 32  # of -inf that are one unit of work: as many bytes as a tile


def most_rows(p: Problem) -> int:
    """Query tokens of a sequence, at most."""
    return min(p.max_q_len or 1, p.tokens)


class Sequence(NamedTuple):
    """One sequence of the step, every number kept inside the step and the page table. What follows the last one is the
    rows that belong to none."""

    b: Any
    rows: Any  # query tokens
    head: Any  # how many of them come before all sequences: 0, but for rows that belong to none
    start: Any  # row i is token i + start, from `head` on
    kv_len: Any
    tiles: Any  # of cached tokens
    fills: Any  # units of -inf behind them, of one row


@dataclasses.dataclass
class Worker:
    """The body of the kernel."""

    p: Problem
    config: Any
    workers: int
    x: dict
    out: Any
    queries: Any
    rowwise: Any  # the ring as copies fill it
    keys: Any  # and as the matrix unit reads it
    key_scales: Any
    factors: Any
    line: Any
    units: Any
    q_here: Any
    here: Any

    def run(self) -> None:
        """All units of the worker."""
        p = self.p
        self.tile, self.stages = self.config.tile, self.config.stages
        self.columns = -(-p.max_len // self.tile)  # tiles of a whole row
        self.room = min(p.pages_per_seq * p.page_size, p.max_len)
        self.live = jnp.int32(p.seqs) if self.x["live"] is None else jnp.clip(self.x["live"][0], 0, p.seqs)
        self.survey()
        total = jnp.sum(self.counts)
        each = lax.div(total + (self.workers - 1), jnp.int32(self.workers))
        begin = jnp.minimum(lax.axis_index("worker") * each, total)
        end = jnp.minimum(begin + each, total)
        b, before = self.find(begin)
        lax.while_loop(lambda state: state[1] < end, lambda state: self.segment(*state, end=end), (b, begin, before))

    # Which units

    def units_of(self, kv_lens, rows):
        """Units of a sequence, or of a vector of them; (all, tiles, fills of a row)."""
        tiles = lax.div(jnp.clip(kv_lens, 0, self.room) + (self.tile - 1), jnp.int32(self.tile))
        fills = lax.div(self.columns - tiles + (FILL_TILES - 1), jnp.int32(FILL_TILES))
        return jnp.where(rows > 0, tiles + rows * fills, 0), tiles, fills

    def rows_of(self, b, start, end):
        """Query tokens from the bounds as the batch has them."""
        rows = jnp.clip(end, 0, self.p.tokens) - jnp.clip(start, 0, self.p.tokens)
        return jnp.where(b < self.live, jnp.clip(rows, 0, most_rows(self.p)), 0)

    def survey(self) -> None:
        """The units of all sequences: in shared memory, and as a vector in registers."""
        p, x, at = self.p, self.x, 0
        for size in (p.seqs // 32 * 32, 16, 8, 4, 2, 1):  # as registers hold them, and as stores may begin
            if not 0 < size <= p.seqs - at:
                continue
            if size == 1:
                self.units[at] = self.units_of(
                    x["kv_lens"][at], self.rows_of(at, x["starts"][at], x["starts"][at + 1])
                )[0]
            else:
                layout = token_layout(size)
                kv_lens, start, end = (
                    plgpu.load(ref.at[pl.ds(first, size)], layout=layout, optimized=False)
                    for ref, first in ((x["kv_lens"], at), (x["starts"], at), (x["starts"], at + 1))
                )
                b = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) + at
                self.units[pl.ds(at, size)] = self.units_of(kv_lens, self.rows_of(b, start, end))[0]
            at += size
        self.units[p.seqs] = self.units_of(jnp.int32(0), self.spare()[2])[0]
        plgpu.commit_smem()
        size = self.units.shape[0]
        # A sum over lanes is one instruction where every warp holds all; long vectors are shared by the warps.
        layout = token_layout(size) if size <= 512 else Layout.WG_STRIDED((size,), vec_size=1)
        self.index = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
        found = plgpu.load(self.units, layout=layout, optimized=False)
        self.counts = jnp.where(self.index <= p.seqs, found, 0)

    def find(self, unit):
        """(sequence, units before it) of a unit of the list: the last sequence that has at most so many before it."""
        b, before = jnp.int32(0), jnp.int32(0)
        for bit in reversed(range((self.p.seqs + 1).bit_length())):
            further = b + 2**bit
            passed = jnp.sum(jnp.where(self.index < further, self.counts, 0))
            b, before = jnp.where(passed <= unit, further, b), jnp.where(passed <= unit, passed, before)
        return b, before

    def spare(self):
        """(rows before all sequences, first row behind them, how many rows these are)."""
        first, last = (jnp.clip(self.x["starts"][b], 0, self.p.tokens) for b in (0, self.live))
        last = jnp.maximum(first, last)
        return first, last, first + self.p.tokens - last

    def read(self, b) -> Sequence:
        """Sequence b, or after the last the rows that belong to none."""
        p, x = self.p, self.x
        none = b >= p.seqs
        inside = jnp.minimum(b, p.seqs - 1)
        first, last, spare = self.spare()
        start = jnp.clip(x["starts"][inside], 0, p.tokens)
        rows = jnp.where(none, spare, self.rows_of(inside, start, x["starts"][inside + 1]))
        kv_len = jnp.where(none, 0, x["kv_lens"][inside])
        _, tiles, fills = self.units_of(kv_len, rows)
        head, start = jnp.where(none, first, 0), jnp.where(none, last - first, start)
        return Sequence(inside, rows, head, start, kv_len, tiles, fills)

    def segment(self, b, at, before, end):
        """The worker's units of one sequence; returns (next sequence, its first unit, units before it)."""
        after = before + self.units[b]
        last = jnp.minimum(end, after)

        def work() -> None:
            s = self.read(b)
            begin, stop = jnp.minimum(at - before, s.tiles), jnp.minimum(last - before, s.tiles)
            pl.when(begin < stop)(lambda: self.stream(s, begin, stop - begin))
            lax.fori_loop(jnp.maximum(at - before - s.tiles, 0), last - before - s.tiles, fill, s)

        def fill(unit, s):
            i, stretch = lax.div(unit, s.fills), lax.rem(unit, s.fills)
            first = (s.tiles + stretch * FILL_TILES) * self.tile
            row = jnp.where(i < s.head, i, i + s.start)
            clear(self.out, row, first, jnp.minimum(first + FILL_TILES * self.tile, self.p.max_len))
            return s

        pl.when(at < last)(work)
        return b + 1, last, after

    # One sequence's tiles

    def stream(self, s: Sequence, tile0, count) -> None:
        """Logits of the tiles tile0 to tile0 + count."""
        rows = most_rows(self.p)
        plgpu.commit_smem()  # every warp is done with the last queries
        for i in range(rows):
            token = jnp.minimum(s.start + i, self.p.tokens - 1)
            plgpu.copy_gmem_to_smem(self.x["q"].at[token], self.queries.at[i], self.q_here)
        for stage in range(self.stages):
            pl.when(stage < count)(lambda stage=stage: self.fetch(s, tile0 + stage, stage))
        lens = [self.row_len(s, i) for i in range(rows)]
        weights = [self.own_factors(s, i) for i in range(rows)]
        if rows > 1:  # more than registers hold
            for i, w in enumerate(weights):
                self.factors[i] = w
            plgpu.commit_smem()
        plgpu.barrier_wait(self.q_here)

        def step(t, carry):
            self.step(s, tile0, count, t, lens, weights[0] if rows == 1 else None)
            return carry

        lax.fori_loop(0, count, step, jnp.int32(0))

    def own_factors(self, s: Sequence, i: int):
        """[H]: what the products of the sequence's query token i are multiplied by."""
        token, q_scale = jnp.minimum(s.start + i, self.p.tokens - 1), self.x["q_scale"]
        own = q_scale.at[token] if len(q_scale.shape) == 2 else q_scale
        return factors(self.x["weights"].at[token], own, self.x["scale"])

    def row_len(self, s: Sequence, i: int):
        """How many tokens the sequence's row i sees."""
        seen = s.kv_len - s.rows + i + 1
        if self.x["row_lens"] is not None:
            seen = self.x["row_lens"][jnp.minimum(s.start + i, self.p.tokens - 1)]
        return jnp.clip(seen, 0, jnp.clip(s.kv_len, 0, self.room))

    def fetch(self, s: Sequence, tile, slot) -> None:
        """Start the copies of a tile."""
        p, part = self.p, min(self.p.page_size, 64)
        for at in range(0, self.tile, part):
            # A tile may go on past the sequence's last page, or begin there.
            token = tile * self.tile + at
            column = lax.div(jnp.minimum(token, jnp.clip(s.kv_len, 1, self.room) - 1), jnp.int32(p.page_size))
            page = jnp.clip(self.x["table"][s.b, column], 0, p.pages - 1)
            inside = lax.rem(token, jnp.int32(p.page_size))
            values, scales = (
                self.x["values"].at[page, pl.ds(inside, part)],
                self.x["scales"].at[page, pl.ds(p.page_size * DIM // 4 + inside, part)],
            )
            plgpu.copy_gmem_to_smem(values, self.rowwise.at[slot, pl.ds(at, part)], self.here.at[slot])
            plgpu.copy_gmem_to_smem(scales, self.key_scales.at[slot, pl.ds(at, part)], self.here.at[slot])

    def step(self, s: Sequence, tile0, count, t, lens, weights) -> None:
        """One tile."""
        slot, rows = lax.rem(t, jnp.int32(self.stages)), len(lens)
        plgpu.barrier_wait(self.here.at[slot])
        scale = self.scale_of(plgpu.load(self.key_scales.at[slot], layout=OVER_ROWS, optimized=False))
        for i in range(rows):
            product = self.product(slot, i)
            if i == rows - 1:
                plgpu.commit_smem()  # every warp is done with the tile
                ahead = t + self.stages
                pl.when(ahead < count)(lambda ahead=ahead: self.fetch(s, tile0 + ahead, slot))
            w = weights
            if w is None:
                w = plgpu.load(self.factors.at[i], layout=OVER_COLUMNS, optimized=False)
            wide = lax.broadcast_in_dim(w, product.shape, [1])
            z = jnp.sum(jnp.maximum(product, 0.0) * wide, axis=1) * scale
            column = (tile0 + t) * self.tile
            token = plgpu.broadcasted_iota(jnp.int32, (self.tile,), 0, layout=OVER_ROWS) + column
            z = jnp.where(token < lens[i], z, -jnp.inf)
            if rows == 1:
                self.leave(s.start, column, z)
            else:
                pl.when(i < s.rows)(lambda i=i, z=z, column=column: self.leave(s.start + i, column, z))

    def product(self, slot, i: int):
        """S^T [tile, heads] of query token i."""

        def multiply(acc):
            plgpu.wgmma(acc, self.keys.at[slot], self.queries.at[i].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, ACC((self.tile, self.p.heads), jnp.float32))

    def scale_of(self, bits):
        """Scales as float32 from what is stored for them."""
        return lax.bitcast_convert_type((bits & 0xFF) << 23 if self.p.format.exponents else bits, jnp.float32)

    def leave(self, row, column, z) -> None:
        """A tile's logits to their row, which may end before."""
        whole = lambda: put(self.out.at[row, pl.ds(column, self.tile)], z)  # noqa: E731
        if self.p.max_len % self.tile == 0:
            whole()
            return

        def some() -> None:
            self.line[...] = z
            plgpu.commit_smem()
            put_some(self.out, row, column, self.line, 0, self.p.max_len - column)
            plgpu.commit_smem()

        fits = column + self.tile <= self.p.max_len
        pl.when(fits)(whole)
        pl.when(jnp.logical_not(fits))(some)
