"""The body of the Hopper gather: one CTA's walk over its tiles (see `mosaic`)."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import INT8
from pallas_attn.ops.gather_kv.mosaic_plan import Plan, runs
from pallas_attn.runtime.mosaic import row_layout
from pallas_attn.runtime.mosaic_packed import Segment, Walk


@dataclasses.dataclass
class Worker(Walk):
    """The body of the kernel: one CTA's walk over its tiles."""

    cut: Plan
    out: Any
    ring: Any
    tile: Any
    row_scale: Any
    ready: Any

    def run(self) -> None:
        """All of the worker's tiles, and its share of `cu_lens`."""
        group = lax.axis_index("group")
        # The last share of heads begins early enough to be whole: heads of two shares are written alike by both.
        self.head = jnp.minimum(group * self.cut.heads, self.p.kv_heads - self.cut.heads)
        self.walk()
        pl.when(group == 0)(self.tell_lengths)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def pieces(self, s: Segment, t):
        """(page, run) of everything that the tile is made of."""
        for part in range(self.parts()):
            page, slot = self.place(s, t, part)
            for r in runs(self.p, self.cut, self.head, slot, part):
                yield page, r

    def fetch(self, s: Segment, t, slot) -> None:
        """Start the copies of the worker's tile t."""
        p = self.p
        for page, r in self.pieces(s, t):
            for side, dim in enumerate((p.head_dim, p.v_head_dim)):
                pages, at = self.x["pages"][0 if p.layout.single else side], side * dim if p.layout.single else 0
                source = (page, pl.ds(r.source, r.rows)) + ((pl.ds(at, dim),) if p.layout.single else ())
                to = self.ring[side].at[slot, pl.ds(r.to, r.rows)]
                plgpu.copy_gmem_to_smem(pages.at[source], to, self.ready.at[2 * slot + side])

    def step(self, s: Segment, t) -> None:
        """Tile t: to numbers, and off."""
        slot = lax.rem(t, jnp.int32(self.cut.stages))
        row, low, high = self.span(s, t)
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
        each = [(page, r.source + i, r.to + i) for page, r in self.pieces(s, t) for i in range(r.rows)]
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

    def clear(self) -> None:
        """Zeros in both sides' tiles."""
        for tile in self.tile:
            layout = row_layout(tile.shape[1] & -tile.shape[1], self.p.dtype.itemsize)
            tile[...] = plgpu.layout_cast(jnp.zeros(tile.shape, self.p.dtype), layout)

    def put_zeros(self, row, count) -> None:
        """So many cleared rows to both results."""
        for side in range(2):
            self.put(side, row, jnp.int32(0), count)
