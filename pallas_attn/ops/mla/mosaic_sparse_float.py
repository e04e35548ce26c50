"""MLA over listed rows of a float cache. The rows of half a tile land at once, since all of them would not fit."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic_sparse
from pallas_attn.ops.mla.mosaic_form import HALF, LATENT, ROPE, Form
from pallas_attn.ops.mla.mosaic_sparse import memory
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import Layout

WIDTH = LATENT + ROPE
BAND = TILE // 2
PITCH = WIDTH + 8  # of rows that land: their lines begin in different banks
PIECE = 64  # columns that are moved at once
LOAD = 8  # columns of one load: 16 bytes, for wider ones make layout inference take the rows for tiles
# Registers of BAND rows: 8 to a warp, 4 lanes for 8 columns.
LAYOUT = Layout.TILED(Tiling(((BAND, LOAD), (8, LOAD), (2,))), (-5,), (-3, -2), -1)


def rows(p: Problem, pages, interpret) -> tuple:
    """The cache's rows, then one of zeros."""
    return pages.reshape(p.pages * p.page_size, WIDTH), jnp.zeros((1, WIDTH), pages.dtype)


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    dtype = p.kv_format.dtype
    landing = [plgpu.SMEM((BAND, PITCH), dtype), plgpu.SMEM((BAND * PITCH,), dtype)]
    return memory(p, form, interpret, dtype, landing)


class Worker(mosaic_sparse.Worker):
    """The body of the kernel."""

    bands = TILE // BAND

    def convert(self, slot, band: int) -> None:
        """From rows to tiles."""
        half, to = self.memory[0].at[slot, self.role], pl.ds(band * BAND, BAND)
        for at in range(0, HALF, PIECE):
            half[to, pl.ds(at, PIECE)] = self.landed_at(self.role * HALF + at)
        pl.when(self.role == slot)(lambda: self.convert_rope(slot, to))

    def convert_rope(self, slot, to) -> None:
        """The rotary part."""
        self.ropes[0][slot, to] = self.landed_at(LATENT)

    def landed_at(self, column):
        """PIECE columns of the rows that have landed."""
        pieces = [self.landing[0].at[:, pl.ds(column + i, LOAD)] for i in range(0, PIECE, LOAD)]
        return jnp.concatenate([plgpu.load(x, layout=LAYOUT, optimized=False) for x in pieces], axis=1)
