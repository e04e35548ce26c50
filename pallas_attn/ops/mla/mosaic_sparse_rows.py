"""MLA over listed rows of FP8_DS_MLA: 656 bytes that become f16.

Codes are multiplied by their tile's scale in f16, which is exact, for scales are powers of two. What f16 cannot hold is
cut off: magnitudes past 57344 of a latent, and past 65504 of a query or a rotary part.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.core.formats import E4M3
from pallas_attn.core.latent_cache import DS_BYTES, DS_CODES, DS_SCALES
from pallas_attn.ops.mla import mosaic_sparse
from pallas_attn.ops.mla.mosaic_form import HALF, LATENT, ROPE, Form
from pallas_attn.ops.mla.mosaic_gather import MOST_SCALE, read, read_codes
from pallas_attn.ops.mla.mosaic_sparse import memory, with_nothing
from pallas_attn.ops.mla.problem import Problem

WIDE, PAIR = jnp.float16, jnp.bfloat16  # what is multiplied; what a row's bytes past the codes are read as
GROUP = 128  # columns of one scale


def rows(p: Problem, pages, interpret) -> tuple:
    """The cache's rows, then one of zeros. The interpreter, which reads no bytes as another type, has each twice: as
    codes and as pairs."""
    every = with_nothing(pages.reshape(p.pages * p.page_size, DS_BYTES))
    if interpret is None:
        return every
    codes = [lax.bitcast_convert_type(x, E4M3) for x in every]
    pairs = [lax.bitcast_convert_type(x.reshape(len(x), -1, 2), PAIR) for x in every]
    return codes[0], pairs[0], codes[1], pairs[1]


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    landing = [plgpu.SMEM((2, TILE // 2, DS_BYTES), jnp.uint8)]
    if interpret is not None:
        places = landing[0].shape[:2]
        landing = [plgpu.SMEM((*places, DS_BYTES), E4M3), plgpu.SMEM((*places, DS_BYTES // 2), PAIR)]
    return memory(p, form, interpret, WIDE, landing)


class Worker(mosaic_sparse.Worker):
    """The body of the kernel."""

    bands = places = 1

    def convert(self, slot, band: int) -> None:
        """Codes times scales, and the rotary part."""
        rows, place = self.rows(band), self.place(band)
        for group in range(LATENT // GROUP):
            half, at = divmod(group * GROUP, HALF)
            self.put_array(self.memory[0].at[slot, half, rows, pl.ds(at, GROUP)], self.scaled(place, group))
        self.put_array(self.ropes[0].at[slot, rows], self.widened(self.rotary(place)))

    def scaled(self, place, group: int):
        """A group of columns of the rows that have landed, in f16."""
        if self.interpret is None:
            return read_codes(self.landing[0].at[place], group * GROUP, DS_CODES + 4 * group)
        codes = self.landing[0][place, :, pl.ds(group * GROUP, GROUP)].astype(WIDE)
        # A power of two: its upper half, read as bf16, is all there is of it.
        scale = self.landing[1][place, :, pl.ds(DS_CODES // 2 + 2 * group + 1, 1)]
        return codes * jnp.minimum(scale.astype(jnp.float32), MOST_SCALE).astype(WIDE)

    def rotary(self, place):
        """Their rotary parts."""
        if self.interpret is None:
            return read(self.landing[0].at[place], DS_SCALES, ROPE, PAIR)
        return self.landing[1][place, :, pl.ds(DS_SCALES // 2, ROPE)]
