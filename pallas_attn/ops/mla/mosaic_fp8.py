"""MLA over FP8 pages with one scale for all, and an FP8 query: logits are products of FP8, values are widened to f16.

The warpgroups of the values widen their halves themselves, in units of 128 columns: three for each, so that the next
tile's first unit is widened while the products with this tile's two are under way. The query stays in registers.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic_paged
from pallas_attn.ops.mla.mosaic_form import HALF, LATENT, Form, Segment
from pallas_attn.ops.mla.mosaic_paged import ring
from pallas_attn.ops.mla.mosaic_worker import PART, add_product, spread, stages, state
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ACC, OVER_ROWS, ROWS, Layout, swizzled

PIECE = 64  # columns that are widened, or multiplied from registers, at once
UNITS = 3
WIDE = jnp.float16  # holds every FP8 value exactly


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    dtype = p.kv_format.dtype
    narrow = swizzled(dtype, PIECE)
    return (
        state(form)
        | ring(p, narrow)
        | {
            # Results leave through the memory of the query that they answer.
            "memory": plgpu.RefUnion(plgpu.SMEM((ROWS, LATENT), dtype, transforms=narrow), *stages(p, PIECE)),
            "wide": plgpu.SMEM((2, UNITS, TILE, PART), WIDE, transforms=swizzled(WIDE, PART)),
            "p_tile": plgpu.SMEM((ROWS, TILE), WIDE, transforms=swizzled(WIDE, TILE)),
        }
    )


@dataclasses.dataclass
class Worker(mosaic_paged.Worker):
    """The body of the kernel."""

    wide: Any  # [half, unit, TILE, PART]
    p_tile: Any

    # The warpgroup of the queries

    def load_query(self, s: Segment):
        """(pieces of the query in registers, what turns sums of codes into logits for either part)."""
        self.fetch_query(s, self.memory[0], self.q_rope)
        pieces = [self.memory[0].at[:, pl.ds(at, PIECE)] for at in range(0, LATENT, PIECE)]
        factors = [self.factor(s, scale) for scale in self.x.q_scales]
        return [self.in_registers(x, Layout.WGMMA_8BIT) for x in (*pieces, self.q_rope)], factors

    def factor(self, s: Segment, scale):
        """A number, or one for each row [64, TILE]."""
        if scale.shape == (1,):
            return scale[0] * self.scale
        rows = plgpu.load(scale.at[pl.ds(s.row, ROWS)], layout=OVER_ROWS, optimized=False)
        return spread(rows * self.scale, TILE)

    def logits(self, s: Segment, query, t):
        """S [64, TILE] to base 2; both parts of the query have scales of their own."""
        slot, (pieces, factors) = lax.rem(t, jnp.int32(2)), query

        def multiply(latent, rope):
            for i, q in enumerate(pieces[:-1]):
                half, at = divmod(i * PIECE, HALF)
                if at == 0:
                    plgpu.barrier_wait(self.halves_ready.at[2 * half + slot])
                plgpu.wgmma(latent, q, self.halves.at[half, slot, :, pl.ds(at, PIECE)].transpose((1, 0)))
            plgpu.barrier_wait(self.ropes_ready.at[slot])
            plgpu.wgmma(rope, pieces[-1], self.ropes.at[slot].transpose((1, 0)))
            return latent[...], rope[...]

        sums = pl.run_scoped(multiply, *[ACC((ROWS, TILE), jnp.float32)] * 2)
        pl.when(t + 2 < s.count)(lambda: self.fetch_rope(s, t + 2))
        return sums[0] * factors[0] + sums[1] * factors[1]

    def weights_at(self, t):
        """One place for all."""
        return self.p_tile

    def make_room(self, s: Segment, t) -> None:
        """Until the last tile's weights have been used."""
        self.wait_free(t - 1)

    # The warpgroups of the values

    def begin_values(self, s: Segment):
        """Accumulators of two units, and the first unit widened."""
        self.widen(s, jnp.int32(0), 0)
        return self.zeros(PART), self.zeros(PART)

    def unit(self, t, i: int):
        """Where the i-th unit of tile t is widened to."""
        return self.wide.at[self.role, lax.rem(2 * t + i, jnp.int32(UNITS))]

    def widen(self, s: Segment, t, i: int) -> None:
        """The i-th unit of a tile in f16; its first one has the tile waited for."""
        slot, tile = lax.rem(t, jnp.int32(2)), s.tile0 + t
        if i == 0:
            plgpu.barrier_wait(self.halves_ready.at[2 * self.role + slot])

        def convert(masked: bool) -> None:
            for at in range(0, PART, PIECE):
                source = self.halves.at[self.role, slot, :, pl.ds(i * PART + at, PIECE)]
                x = plgpu.load(source, layout=Layout.WGMMA_UPCAST_2X).astype(WIDE)
                if masked:  # an unwritten slot may hold NaN, and 0 x NaN is NaN
                    real = self.real_tokens(s, tile, Layout.WGMMA_UPCAST_2X, x.shape)
                    x = jnp.where(real, x, jnp.zeros((), WIDE))
                self.unit(t, i)[:, pl.ds(at, PIECE)] = x

        partly = (tile + 1) * TILE > s.seq.kv_len
        pl.when(partly)(lambda: convert(masked=True))
        pl.when(~partly)(lambda: convert(masked=False))
        plgpu.commit_smem()

    def ready_values(self, s: Segment, t) -> None:
        """The second unit."""
        self.widen(s, t, 1)

    def after_alpha(self, s: Segment, t) -> None:
        """The tile has been widened, and its logits are known: its place takes the one after the next."""
        pl.when(t + 2 < s.count)(lambda: self.fetch_half(s, t + 2))

    def add_values(self, s: Segment, t, acc):
        """`acc` plus weights times values; meanwhile the next tile's first unit is widened."""

        def multiply(accs) -> None:
            for i, a in enumerate(accs):
                plgpu.wgmma(a, self.p_tile, self.unit(t, i))
            pl.when(t + 1 < s.count)(lambda: self.widen(s, t + 1, 0))

        return add_product(acc, multiply, self.interpret)
