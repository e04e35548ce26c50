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
from pallas_attn.ops.mla.mosaic_form import HALF, ROPE, Form
from pallas_attn.ops.mla.mosaic_sparse import memory
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import Layout

WIDE, PAIR = jnp.float16, jnp.bfloat16  # what is multiplied; what a row's bytes past the codes are read as
MOST_SCALE = 128.0  # times 448 is the largest in f16
CODES, PAIRS = 16, 8  # columns of one load: the row's pitch must be a multiple of them


def rows(p: Problem, pages, interpret) -> tuple:
    """The cache's rows, then one of zeros. The interpreter, which reads no bytes as another type, has each twice: as
    codes and as pairs."""
    every = pages.reshape(p.pages * p.page_size, DS_BYTES), jnp.zeros((1, DS_BYTES), jnp.uint8)
    if interpret is None:
        return every
    codes = [lax.bitcast_convert_type(x, E4M3) for x in every]
    pairs = [lax.bitcast_convert_type(x.reshape(len(x), -1, 2), PAIR) for x in every]
    return codes[0], pairs[0], codes[1], pairs[1]


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    landing = [
        plgpu.SMEM((TILE, DS_BYTES), E4M3), plgpu.SMEM((TILE, DS_BYTES // 2), PAIR),
        plgpu.SMEM((TILE * DS_BYTES,), jnp.uint8),
    ]  # fmt: skip
    return memory(p, form, interpret, WIDE, landing)


class Worker(mosaic_sparse.Worker):
    """The body of the kernel."""

    bands = 1

    def convert(self, slot, band: int) -> None:
        """Codes times scales, and the rotary part."""
        self.find_scales()
        layout, half = Layout.WGMMA_UPCAST_2X, self.memory[0].at[slot, self.role]
        for group in range(HALF // 128):
            scale = self.scale_tile.at[self.role, group]
            scale = plgpu.load(scale, layout=layout.reduce(1), optimized=False).astype(WIDE)
            for at in range(group * 128, (group + 1) * 128, 64):
                x = self.landed_at(0, self.role * HALF + at, CODES, layout)
                half[:, pl.ds(at, 64)] = x.astype(WIDE) * lax.broadcast_in_dim(scale, (TILE, 64), [0])
        pl.when(self.role == slot)(lambda: self.convert_rope(slot))

    def landed_at(self, view: int, column, width: int, layout):
        """64 columns of all rows, so many at once."""
        pieces = [self.landing[view].at[:, pl.ds(column + i, width)] for i in range(0, 64, width)]
        return jnp.concatenate([plgpu.load(x, layout=layout, optimized=False) for x in pieces], axis=1)

    def convert_rope(self, slot) -> None:
        """The rotary part."""
        assert ROPE == 64
        self.ropes[0][slot] = self.widened(self.landed_at(1, DS_SCALES // 2, PAIRS, Layout.WGMMA))

    def find_scales(self) -> None:
        """The scales of the half's two groups, for every row. They are powers of two: their upper halves, read as bf16,
        are all there is of them."""
        pairs = self.landing[1].at[:, pl.ds(DS_CODES // 2, PAIRS)]
        pairs = plgpu.load(pairs, layout=Layout.WGMMA, optimized=False).astype(jnp.float32)
        column = plgpu.broadcasted_iota(jnp.int32, (TILE, PAIRS), 1, layout=Layout.WGMMA)
        for group in range(HALF // 128):
            which = 2 * (self.role * (HALF // 128) + group) + 1
            scale = jnp.sum(jnp.where(column == which, pairs, 0.0), axis=1)
            self.scale_tile[self.role, group] = jnp.minimum(scale, MOST_SCALE)
        plgpu.commit_smem()
