"""The ring of a kernel that reads whole sequences: tiles from pages, in two halves of values and the rotary part."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic_worker
from pallas_attn.ops.mla.mosaic_form import HALF, LATENT, ROPE, Segment, inside
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ROWS


def ring(p: Problem, transforms, stages: int = 2) -> dict[str, Any]:
    """Tiles in shared memory, three buffers each, since TMA takes no part of a row."""
    dtype, copies = p.kv_format.dtype, max(TILE // p.page_size, 1)
    return {
        "q_rope": plgpu.SMEM((ROWS, ROPE), dtype, transforms=transforms),
        "halves": plgpu.SMEM((2, stages, TILE, HALF), dtype, transforms=transforms),
        "ropes": plgpu.SMEM((stages, TILE, ROPE), dtype, transforms=transforms),
        "halves_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=2 * stages),
        "ropes_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    }


@dataclasses.dataclass
class Worker(mosaic_worker.Worker):
    """Each warpgroup of the values asks for its own half, that of the queries for the rotary part."""

    q_rope: Any
    halves: Any  # [half, slot, TILE, HALF]
    ropes: Any  # [slot, TILE, ROPE]
    halves_ready: Any
    ropes_ready: Any

    def prime_scores(self, s: Segment) -> None:
        """Ask for the first rotary parts."""
        for t in range(self.ropes.shape[0]):
            pl.when(t < s.count)(lambda t=t: self.fetch_rope(s, jnp.int32(t)))

    def prime_values(self, s: Segment) -> None:
        """Ask for the first halves."""
        for t in range(2):
            pl.when(t < s.count)(lambda t=t: self.fetch_half(s, jnp.int32(t)))

    def fetch_rope(self, s: Segment, t) -> None:
        """Ask for the rotary part of a tile."""
        slot = lax.rem(t, jnp.int32(self.ropes.shape[0]))
        self.fetch(s, t, self.pages_of(s, t), LATENT, self.ropes.at[slot], self.ropes_ready.at[slot])

    def pages_of(self, s: Segment, t) -> list:
        """The pages of a tile's parts, as the table has them; the last real page past the end."""
        last = lax.div(jnp.maximum(s.seq.kv_len - 1, 0), jnp.int32(self.p.page_size))
        first = lax.div((s.tile0 + t) * TILE, jnp.int32(self.p.page_size))
        parts = range(max(TILE // self.p.page_size, 1))
        return [self.x.page_table[s.seq.pages, jnp.minimum(first + part, last)] for part in parts]

    def fetch_half(self, s: Segment, t, pages: list | None = None) -> None:
        """Ask for the warpgroup's half of a tile, whose pages may have been looked up before there is room for it."""
        stages = self.halves.shape[1]
        slot = lax.rem(t, jnp.int32(stages))
        ready = self.halves_ready.at[stages * self.role + slot]
        self.fetch(s, t, pages or self.pages_of(s, t), self.role * HALF, self.halves.at[self.role, slot], ready)

    def fetch(self, s: Segment, t, pages: list, column, to, ready) -> None:
        """Start the copies of some columns of the segment's tile t, from pages that are kept inside the cache."""
        p, size = self.p, TILE // len(pages)
        for j, page in enumerate(pages):
            page = jnp.clip(page, 0, p.pages - 1)
            source = self.x.pages.at[page, inside(p, s.tile0 + t), pl.ds(column, to.shape[1])]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(j * size, size)], ready)

    def fetch_query(self, s: Segment, latent, rope) -> None:
        """The block's rows of the query; past the real ones, rows of others."""
        chunk, last = self.form.chunk, self.p.tokens * self.form.heads - self.form.chunk
        for at in range(0, ROWS, chunk):
            row = pl.multiple_of(jnp.minimum(s.row + at, last), chunk)
            for source, to in ((self.x.q_latent, latent), (self.x.q_rope, rope)):
                plgpu.copy_gmem_to_smem(source.at[pl.ds(row, chunk)], to.at[pl.ds(at, chunk)], self.q_ready)
