"""What the gathers' Mosaic kernels share: how tokens of many sequences are dealt out to CTAs, and where they lie.

The context of all sequences is one list of tiles, each a part of a page or some whole pages, and after it the tiles of
zeros that fill the result up. The CTAs, of one warpgroup each, deal them out in turn, so that at any time all write to
one stretch of the result. Which sequence a tile belongs to is found by halving, each step a sum over the sequences'
tiles: no launch comes before.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.narrow import clamped
from pallas_attn.runtime.mosaic import Layout, token_layout

MOST_SEQS = 4096  # their lengths stay in registers


def where(p: Any, page_table, kv_lens, starts, num_seqs) -> dict[str, Any]:
    """What a walk reads, by name."""
    room = p.pages_per_seq * p.page_size
    return {
        "table": clamped(page_table, p.pages - 1),
        "kv_lens": clamped(kv_lens, room),
        "starts": None if starts is None else clamped(starts, room),
        "live": None if num_seqs is None else clamped(jnp.asarray(num_seqs), p.seqs).reshape(1),
    }


def padded(seqs: int) -> int:
    """Sequences of a vector that all threads hold."""
    return -(-seqs // 128) * 128


class Segment(NamedTuple):
    """A worker's part of a sequence."""

    b: Any
    first: Any  # the token of the sequence that is gathered first
    end: Any  # and the one past the last
    row: Any  # of the result, of the first
    tile: Any  # of the sequence: the worker's first; every so many workers later comes its next
    count: Any  # of the worker's tiles


@dataclasses.dataclass
class Walk:
    """One CTA's walk over its tiles; what becomes of a tile is in subclasses."""

    p: Any  # the problem: seqs, pages, page_size, pages_per_seq, max_tokens
    cut: Any  # tokens of a tile, a divisor of the page size or a multiple; stages, tiles in flight
    workers: int
    x: dict  # `where`, and what else there is to be read
    cu_lens: Any
    lens: Any  # [2, padded(seqs)] in shared memory

    def fetch(self, s: Segment, t, slot) -> None:
        """Start the copies of the worker's tile t."""
        raise NotImplementedError

    def step(self, s: Segment, t) -> None:
        """Tile t: to numbers, and off."""
        raise NotImplementedError

    def clear(self) -> None:
        """Zeros where tiles of the result are made."""
        raise NotImplementedError

    def put_zeros(self, row, count) -> None:
        """So many cleared rows to the result, from `row` on."""
        raise NotImplementedError

    def walk(self) -> None:
        """All of the worker's tiles."""
        self.worker = lax.axis_index("worker")
        self.survey()
        total, rows = jnp.sum(self.tiles), jnp.sum(self.rows)
        used = jnp.minimum(rows, self.p.max_tokens)
        tile = lax.while_loop(lambda tile: tile < total, self.sequence, self.worker)
        self.fill(used, tile - total)

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

    def parts(self) -> int:
        """Pages of a tile."""
        return max(self.cut.tokens // self.p.page_size, 1)

    def place(self, s: Segment, t, part: int):
        """(page, slot in page) of a part of the worker's tile t, kept inside the table and the cache."""
        p, size = self.p, jnp.int32(self.p.page_size)
        position = (s.tile + t * self.workers) * self.cut.tokens + part * min(self.cut.tokens, p.page_size)
        # A tile of several pages may go on past the sequence's last.
        column = lax.div(jnp.minimum(position, s.end - 1), size)
        page = jnp.clip(self.x["table"][s.b, column], 0, p.pages - 1)
        return page, lax.rem(position, size)

    def span(self, s: Segment, t):
        """(row, low, high): where tile t's first token would go in the result, and which of its tokens do go there."""
        at = (s.tile + t * self.workers) * self.cut.tokens
        low, high = jnp.maximum(s.first - at, 0), jnp.minimum(s.end - at, self.cut.tokens)
        row = s.row + at - s.first
        return row, low, jnp.minimum(high, self.p.max_tokens - row)

    def fill(self, used, first) -> None:
        """Zeros in the rows past the last sequence's: the worker's tiles of these, from `first` on."""
        tokens, most = self.cut.tokens, self.p.max_tokens
        spare = lax.div(most - used + tokens - 1, jnp.int32(tokens))

        def zeros(i, carry):
            row = used + (first + i * self.workers) * tokens
            self.put_zeros(row, jnp.minimum(most - row, tokens))
            return carry

        def all_zeros() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.clear()
            plgpu.commit_smem()
            lax.fori_loop(0, lax.div(spare - first + self.workers - 1, jnp.int32(self.workers)), zeros, jnp.int32(0))

        pl.when(first < spare)(all_zeros)
