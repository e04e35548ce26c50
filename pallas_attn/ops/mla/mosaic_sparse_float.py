"""MLA over listed rows of a float cache. The rows of half a tile land at once, since all of them would not fit."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic_sparse
from pallas_attn.ops.mla.mosaic_form import HALF, LATENT, ROPE, Form
from pallas_attn.ops.mla.mosaic_gather import read
from pallas_attn.ops.mla.mosaic_sparse import memory, with_nothing
from pallas_attn.ops.mla.problem import Problem

WIDTH = LATENT + ROPE
PIECE = 128  # columns that are moved at once


def rows(p: Problem, pages, interpret) -> tuple:
    """The cache's rows, then one of zeros."""
    return with_nothing(pages.reshape(p.pages * p.page_size, WIDTH))


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    dtype = p.kv_format.dtype
    width, what = (WIDTH * dtype.itemsize, jnp.uint8) if interpret is None else (WIDTH, dtype)
    landing = plgpu.SMEM((2 * Worker.places, TILE // 2 // Worker.bands, width), what)
    return memory(p, form, interpret, dtype, [landing])


class Worker(mosaic_sparse.Worker):
    """The body of the kernel."""

    bands, places = 2, 1

    def convert(self, slot, band: int) -> None:
        """From rows to tiles."""
        rows, place = self.rows(band), self.place(band)
        for column in range(0, LATENT, PIECE):
            half, at = divmod(column, HALF)
            to = self.memory[0].at[slot, half, rows, pl.ds(at, PIECE)]
            self.put_array(to, self.landed_at(place, column, PIECE))
        self.put_array(self.ropes[0].at[slot, rows], self.landed_at(place, LATENT, ROPE))

    def landed_at(self, place, column: int, count: int):
        """Columns of the rows that have landed."""
        if self.interpret is None:
            return read(self.landing[0].at[place], 2 * column, count, self.memory[0].dtype)
        return self.landing[0][place, :, pl.ds(column, count)]
