"""The body of the Hopper gather: one CTA's walk over its tiles (see `mosaic`)."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import INT8
from pallas_attn.ops.gather_kv.mosaic_plan import Plan, padded, runs
from pallas_attn.ops.gather_kv.problem import Problem
from pallas_attn.runtime.mosaic import Layout, row_layout, token_layout


class Segment(NamedTuple):
    """A worker's part of a sequence."""

    b: Any
    first: Any  # the token of the sequence that is gathered first
    end: Any  # and the one past the last
    row: Any  # of the result, of the first
    tile: Any  # of the sequence: the worker's first; every so many workers later comes its next
    count: Any  # of the worker's tiles


@dataclasses.dataclass
class Worker:
    """The body of the kernel: one CTA's walk over its tiles."""

    p: Problem
    cut: Plan
    workers: int
    x: dict
    out: Any
    cu_lens: Any
    ring: Any
    tile: Any
    lens: Any
    row_scale: Any
    ready: Any

    def run(self) -> None:
        """All of the worker's tiles, and its share of `cu_lens`."""
        p, cut = self.p, self.cut
        self.worker, group = lax.axis_index("worker"), lax.axis_index("group")
        # The last share of heads begins early enough to be whole: heads of two shares are written alike by both.
        self.head = jnp.minimum(group * cut.heads, p.kv_heads - cut.heads)
        self.survey()
        total, rows = jnp.sum(self.tiles), jnp.sum(self.rows)
        used = jnp.minimum(rows, p.max_tokens)
        tile = lax.while_loop(lambda tile: tile < total, self.sequence, self.worker)
        self.fill(used, tile - total)
        pl.when(group == 0)(self.tell_lengths)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def tell_lengths(self) -> None:
        """The worker's share of `cu_lens`."""

        def one(i, carry):
            b = self.worker + i * self.workers
            self.cu_lens[b] = self.before(self.rows, b)
            return carry

        share = lax.div(self.p.seqs + self.workers - self.worker, jnp.int32(self.workers))
        lax.fori_loop(0, share, one, jnp.int32(0))

    # Which tiles

    def survey(self) -> None:
        """How many rows and tiles every sequence has: vectors over the sequences, in registers."""
        p, tokens, size = self.p, self.cut.tokens, padded(self.p.seqs)
        # A sum over lanes is one instruction where every warp holds all; long vectors are shared by the warps.
        layout = token_layout(size) if size <= 512 else Layout.WG_STRIDED((size,), vec_size=1)
        sources = [x for x in (self.x["kv_lens"], self.x["starts"]) if x is not None]
        for row, source in enumerate(sources):
            at = 0
            for n in (p.seqs // 32 * 32, *(p.seqs & bit for bit in (16, 8, 4, 2))):
                if n:
                    piece = source.at[pl.ds(at, n)]
                    self.lens[row, pl.ds(at, n)] = plgpu.load(piece, layout=token_layout(n), optimized=False)
                at += n
            if p.seqs % 2:
                self.lens[row, at] = source[at]
        plgpu.commit_smem()
        lens = [plgpu.load(self.lens.at[row], layout=layout, optimized=False) for row in range(len(sources))]
        self.index = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
        live = p.seqs if self.x["live"] is None else jnp.minimum(self.x["live"][0], p.seqs)
        # Nothing was put past the last.
        kv_lens, starts = (jnp.where(self.index < live, x, 0) for x in (lens[0], lens[-1]))
        kv_lens = jnp.clip(kv_lens, 0, p.pages_per_seq * p.page_size)
        first = jnp.clip(starts, 0, kv_lens) if len(sources) > 1 else kv_lens * 0
        self.rows = kv_lens - first
        count = lax.div(kv_lens + (tokens - 1), jnp.int32(tokens)) - lax.div(first, jnp.int32(tokens))
        self.tiles = jnp.where(self.rows > 0, count, 0)

    def before(self, x, b):
        """The sum over the sequences before b."""
        return jnp.sum(jnp.where(self.index < b, x, 0))

    def find(self, tile):
        """(sequence, tiles before it, rows before it) of a tile of the list: the last sequence that has at most so many
        tiles before it."""
        b, tiles = jnp.int32(0), jnp.int32(0)
        for bit in reversed(range(self.p.seqs.bit_length())):
            further = b + 2**bit
            passed = self.before(self.tiles, further)
            b, tiles = jnp.where(passed <= tile, further, b), jnp.where(passed <= tile, passed, tiles)
        return b, tiles, self.before(self.rows, b)

    def sequence(self, tile):
        """The worker's tiles from `tile` on that belong to one sequence; returns its next."""
        p, tokens, workers = self.p, jnp.int32(self.cut.tokens), jnp.int32(self.workers)
        b, tiles, row = self.find(tile)
        # A tile that belongs to a sequence makes it a real one.
        end = jnp.clip(self.lens[0, b], 0, p.pages_per_seq * p.page_size)
        first = jnp.int32(0) if self.x["starts"] is None else jnp.clip(self.lens[1, b], 0, end)
        low = lax.div(first, tokens)
        after = tiles + lax.div(end + tokens - 1, tokens) - low
        mine = lax.div(after - tile + workers - 1, workers)
        s = Segment(b, first, end, row, low + tile - tiles, mine)
        for stage in range(self.cut.stages):
            pl.when(stage < mine)(functools.partial(self.fetch, s, stage, stage))

        def step(t, carry):
            self.step(s, t)
            return carry

        lax.fori_loop(0, mine, step, jnp.int32(0))
        return tile + mine * workers

    # One tile

    def place(self, s: Segment, t, part: int):
        """(page, slot in page) of a part of the worker's tile t, kept inside the table and the cache."""
        p, size = self.p, jnp.int32(self.p.page_size)
        position = (s.tile + t * self.workers) * self.cut.tokens + part * min(self.cut.tokens, p.page_size)
        # A tile of several pages may go on past the sequence's last.
        column = lax.div(jnp.minimum(position, s.end - 1), size)
        page = jnp.clip(self.x["table"][s.b, column], 0, p.pages - 1)
        return page, lax.rem(position, size)

    def parts(self, s: Segment, t):
        """(page, run) of everything that the tile is made of."""
        for part in range(self.cut.parts(self.p)):
            page, slot = self.place(s, t, part)
            for r in runs(self.p, self.cut, self.head, slot, part):
                yield page, r

    def fetch(self, s: Segment, t, slot) -> None:
        """Start the copies of the worker's tile t."""
        p = self.p
        for page, r in self.parts(s, t):
            for side, dim in enumerate((p.head_dim, p.v_head_dim)):
                pages, at = self.x["pages"][0 if p.layout.single else side], side * dim if p.layout.single else 0
                source = (page, pl.ds(r.source, r.rows)) + ((pl.ds(at, dim),) if p.layout.single else ())
                to = self.ring[side].at[slot, pl.ds(r.to, r.rows)]
                plgpu.copy_gmem_to_smem(pages.at[source], to, self.ready.at[2 * slot + side])

    def step(self, s: Segment, t) -> None:
        """Tile t: to numbers, and off."""
        slot = lax.rem(t, jnp.int32(self.cut.stages))
        at = (s.tile + t * self.workers) * self.cut.tokens
        low, high = jnp.maximum(s.first - at, 0), jnp.minimum(s.end - at, self.cut.tokens)
        row = s.row + at - s.first
        high = jnp.minimum(high, self.p.max_tokens - row)
        self.find_scales(s, t)
        for side in range(2):
            plgpu.barrier_wait(self.ready.at[2 * slot + side])
            numbers = self.numbers(side, slot)
            # The side's last tile has left; the other side's may be on its way.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.tile[side][...] = numbers
            plgpu.commit_smem()
            self.put(side, row, low, high)
        pl.when(t + self.cut.stages < s.count)(lambda: self.fetch(s, t + self.cut.stages, slot))

    def find_scales(self, s: Segment, t) -> None:
        """A scale for each row of the tile, where they differ; those of a page's rows lie as the rows do."""
        p, heads, tokens = self.p, self.cut.heads, self.cut.tokens
        if p.format.granularity in ("none", "tensor"):
            return
        each = [(page, r.source + i, r.to + i) for page, r in self.parts(s, t) for i in range(r.rows)]
        for side, scale in enumerate(self.x["scales"]):
            if p.format.granularity == "token_head":
                found = [(row, scale[page, source]) for page, source, row in each]
            else:
                ours = [scale[(s.b, self.head + h) if scale.ndim == 2 else self.head + h] for h in range(heads)]
                found = [(i, ours[i // tokens if p.layout.head_major else i % heads]) for i in range(heads * tokens)]
            for row, x in found:
                self.row_scale[side, row] = x
        plgpu.commit_smem()

    def numbers(self, side: int, slot):
        """A side of the tile in the result's type: the float32 product, rounded once."""
        p, (height, dim) = self.p, self.tile[side].shape
        layout = row_layout(dim & -dim, max(p.dtype.itemsize, p.format.dtype.itemsize))
        x = plgpu.load(self.ring[side].at[slot], layout=layout, optimized=False)
        if not p.format.quantized:
            return x if x.dtype == p.dtype else x.astype(jnp.float32).astype(p.dtype)
        if p.format.dtype != INT8:
            x = x.astype(jnp.float16)  # exact; no unit takes FP8 further at once
        x = x.astype(jnp.float32)
        if p.format.granularity == "tensor":
            return (x * self.x["scales"][side][0]).astype(p.dtype)
        scale = plgpu.load(self.row_scale.at[side], layout=layout.reduce(1), optimized=False)
        return (x * lax.broadcast_in_dim(scale, (height, dim), [0])).astype(p.dtype)

    def put(self, side: int, row, low, high) -> None:
        """Rows low to high of the tile to the result, where its first would go to `row`: one group of copies."""
        tile, out, cut = self.tile[side], self.out[side], self.cut
        send = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)
        whole = (low == 0) & (high == cut.tokens)

        def rows(at, count: int) -> None:
            if self.p.layout.head_major:
                for h in range(cut.heads):
                    send(tile.at[pl.ds(h * cut.tokens + at, count)], out.at[pl.ds(row + at, count), self.head + h])
            elif cut.heads == self.p.kv_heads:
                size = count * cut.heads
                send(tile.at[pl.ds(at * cut.heads, size)], out.at[pl.ds((row + at) * cut.heads, size)])
            else:
                for i in range(count):
                    to = pl.ds((row + at + i) * self.p.kv_heads + self.head, cut.heads)
                    send(tile.at[pl.ds((at + i) * cut.heads, cut.heads)], out.at[to])

        def single() -> None:
            def one(at, carry):
                rows(at, 1)
                return carry

            lax.fori_loop(low, high, one, jnp.int32(0))

        pl.when(whole)(lambda: rows(0, cut.tokens))
        pl.when(jnp.logical_not(whole))(single)
        plgpu.commit_smem_to_gmem_group()

    def fill(self, used, first) -> None:
        """Zeros in the rows past the last sequence's: the worker's tiles of these, from `first` on."""
        tokens, most = self.cut.tokens, self.p.max_tokens
        spare = lax.div(most - used + tokens - 1, jnp.int32(tokens))

        def zeros(i, carry):
            row = used + (first + i * self.workers) * tokens
            for side in range(2):
                self.put(side, row, jnp.int32(0), jnp.minimum(most - row, tokens))
            return carry

        def clear() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for tile in self.tile:
                layout = row_layout(tile.shape[1] & -tile.shape[1], self.p.dtype.itemsize)
                tile[...] = plgpu.layout_cast(jnp.zeros(tile.shape, self.p.dtype), layout)
            plgpu.commit_smem()
            lax.fori_loop(0, lax.div(spare - first + self.workers - 1, jnp.int32(self.workers)), zeros, jnp.int32(0))

        pl.when(first < spare)(clear)
