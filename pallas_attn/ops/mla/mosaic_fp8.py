"""MLA over FP8 pages with one scale for all, and an FP8 query: logits are products of FP8, values are widened to f16.

The warpgroups of the values widen their halves themselves (`mosaic_widen`), the next tile while the products with this
one are under way. Weights have two places: those of the next tile are there when these products end. The query stays
in registers.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic_paged
from pallas_attn.ops.mla.mosaic_form import HALF, Form, Segment
from pallas_attn.ops.mla.mosaic_paged import ring
from pallas_attn.ops.mla.mosaic_widen import widen
from pallas_attn.ops.mla.mosaic_worker import add_product, spread, stages, state
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ACC, OVER_ROWS, ROWS, Layout, swizzled

PIECE = 64  # columns that are widened, or multiplied from registers, at once
QUARTERS = 4  # of the memory of a warpgroup's widened tiles
STAGES = 2  # tiles in flight
PLACES = 2  # of weights, and of widened tiles
WIDE = jnp.float16  # holds every FP8 value exactly


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA. The second place of widened tiles is the query's until it is in registers,
    and the results' on their way out: a quarter of the memory each. The interpreter, which has no operands in
    registers, keeps the query apart."""
    dtype = p.kv_format.dtype
    narrow = swizzled(dtype, PIECE)
    query = plgpu.SMEM((2, QUARTERS, ROWS, HALF), dtype, transforms=narrow)
    wide = plgpu.SMEM((2, PLACES, TILE, HALF), WIDE, transforms=swizzled(WIDE, HALF))
    return (
        state(p, form)
        | ring(p, narrow, STAGES)
        | {
            "q_ready": plgpu.Barrier(num_arrivals=3 * (ROWS // form.chunk)),
            "memory": plgpu.RefUnion(wide, query, *stages(p, PIECE, (2, QUARTERS))),
            "latent": [] if interpret is None else [plgpu.SMEM((2, ROWS, HALF), dtype, transforms=narrow)],
            "p_tile": plgpu.SMEM((PLACES, ROWS, TILE), WIDE, transforms=swizzled(WIDE, TILE)),
        }
    )


@dataclasses.dataclass
class Worker(mosaic_paged.Worker):
    """The body of the kernel."""

    latent: Any  # the query's, if it is kept apart
    p_tile: Any

    def __post_init__(self) -> None:
        self.wide, query, *results = self.memory
        self.query = self.latent[0] if self.latent else query.at[:, QUARTERS - 2]
        self.memory = [x.at[:, QUARTERS - 1] for x in results]

    # The warpgroup of the queries

    def ask_query(self, s: Segment) -> None:
        """Ask for the query."""
        self.fetch_halves(s, self.query, self.q_rope)

    def take_query(self, s: Segment):
        """(pieces of the query in registers, what turns sums of codes into logits for either part)."""
        pieces = [self.query.at[half, :, pl.ds(at, PIECE)] for half in range(2) for at in range(0, HALF, PIECE)]
        factors = [self.factor(s, scale) for scale in self.x.q_scales]
        pieces = [self.in_registers(x, Layout.WGMMA_8BIT) for x in pieces]
        return pieces, factors

    def factor(self, s: Segment, scale):
        """A number, or one for each row [64, TILE]."""
        if scale.shape == (1,):
            return scale[0] * self.scale
        rows = plgpu.load(scale.at[pl.ds(s.row, ROWS)], layout=OVER_ROWS, optimized=False)
        return spread(rows * self.scale, TILE)

    def score_tile(self, s: Segment, query, t, state, masked: bool) -> tuple:
        """Weights of one tile, up to one tile ahead of the values."""
        self.wait_free(t - PLACES)
        return super().score_tile(s, query, t, state, masked)

    def logits(self, s: Segment, query, t):
        """S [64, TILE] to base 2; both parts of the query have scales of their own."""
        slot, (pieces, factors) = lax.rem(t, jnp.int32(STAGES)), query

        def multiply(latent, rope):
            for half in range(2):
                plgpu.barrier_wait(self.halves_ready.at[half * STAGES + slot])
                for i, q in enumerate(pieces[4 * half : 4 * half + 4]):
                    plgpu.wgmma(latent, q, self.halves.at[half, slot, :, pl.ds(i * PIECE, PIECE)].transpose((1, 0)))
            plgpu.barrier_wait(self.ropes_ready.at[slot])
            plgpu.wgmma(rope, self.q_rope, self.ropes.at[slot].transpose((1, 0)))
            return latent[...], rope[...]

        sums = pl.run_scoped(multiply, *[ACC((ROWS, TILE), jnp.float32)] * 2)
        pl.when(t + STAGES < s.count)(lambda: self.fetch_rope(s, t + STAGES))
        return sums[0] * factors[0] + sums[1] * factors[1]

    def weights_at(self, t):
        """Two places by turns."""
        return self.p_tile.at[lax.rem(t, jnp.int32(PLACES))]

    def make_room(self, s: Segment, t) -> None:
        """There is room since the tile's logits were begun."""

    def after_scores(self, s: Segment) -> None:
        """No phase of a barrier is passed over."""
        self.wait_free(s.count - PLACES)

    # The warpgroups of the values

    def begin_values(self, s: Segment):
        """The result so far, and the first tile widened."""
        self.widen(jnp.int32(0))
        return self.zeros()

    def widened(self, t):
        """Where tile t is widened to."""
        return self.wide.at[self.role, lax.rem(t, jnp.int32(PLACES))]

    def widen(self, t) -> None:
        """A tile in f16, once it is there."""
        slot = lax.rem(t, jnp.int32(STAGES))
        plgpu.barrier_wait(self.halves_ready.at[STAGES * self.role + slot])
        tile = self.halves.at[self.role, slot]
        if self.interpret is None:
            widen(tile, self.widened(t), self.halves.dtype, WIDE)
        else:
            self.widened(t)[...] = tile[...].astype(WIDE)
        plgpu.commit_smem()

    def ready_values(self, s: Segment, t) -> None:
        """Zeros, in the tile as it has been widened, in place of tokens that are not there: an unwritten slot may hold
        NaN, and 0 x NaN is NaN. A loop, not a branch: nothing of it stands beside the code of all other tiles."""
        tile = s.tile0 + t

        def clear(_, carry):
            real = self.real_tokens(s, tile, Layout.WGMMA, (TILE, PIECE))
            for at in range(0, HALF, PIECE):
                piece = self.widened(t).at[:, pl.ds(at, PIECE)]
                x = plgpu.load(piece, layout=Layout.WGMMA)
                piece[...] = jnp.where(real, x, jnp.zeros((), WIDE))
            plgpu.commit_smem()
            return carry

        partly = (tile + 1) * TILE > s.seq.kv_len
        lax.fori_loop(0, partly.astype(jnp.int32), clear, jnp.int32(0))

    def add_values(self, s: Segment, t, acc):
        """`acc` plus weights times values. Meanwhile the tile after the next is asked for, in the place of this one,
        which has been widened and whose logits are known; and the next one is widened."""
        pages = self.pages_of(s, t + STAGES)

        def multiply(acc) -> None:
            plgpu.wgmma(acc, self.weights_at(t), self.widened(t))
            pl.when(t + STAGES < s.count)(lambda: self.fetch_half(s, t + STAGES, pages))
            pl.when(t + 1 < s.count)(lambda: self.widen(t + 1))

        return add_product(acc, multiply, self.interpret)
