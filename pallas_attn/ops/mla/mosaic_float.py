"""MLA over float pages: a tile is the keys of the third warpgroup and, half by half, the values of the first two.

The weights of a tile take the place of its rotary part, which has been used by then: they are as large. Half of the
query stays in registers, for the matrix unit reads no more than 128 bytes a cycle of shared memory.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic_paged
from pallas_attn.ops.mla.mosaic_form import HALF, LATENT, ROPE, Form, Segment
from pallas_attn.ops.mla.mosaic_paged import ring
from pallas_attn.ops.mla.mosaic_worker import PART, add_product, stages, state
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ACC, ROWS, Layout, swizzled


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    dtype = p.kv_format.dtype
    tiles = ring(p, swizzled(dtype, ROPE))
    return state(p, form) | tiles | {
        "q_latent": plgpu.SMEM((ROWS, LATENT), dtype, transforms=swizzled(dtype, LATENT)),
        # Results leave through the second place of their half.
        "halves": [], "memory": plgpu.RefUnion(tiles["halves"], *stages(p, PART, (2, 2))),
    }  # fmt: skip


@dataclasses.dataclass
class Worker(mosaic_paged.Worker):
    """The body of the kernel."""

    q_latent: Any

    def __post_init__(self) -> None:
        self.halves, *results = self.memory
        self.memory = [x.at[:, 1] for x in results]

    # The warpgroup of the queries

    def ask_query(self, s: Segment) -> None:
        """Ask for the query."""
        self.fetch_query(s, self.q_latent, self.q_rope)

    def take_query(self, s: Segment):
        """The first half of the query in registers."""
        return self.in_registers(self.q_latent.at[:, pl.ds(0, HALF)], Layout.WGMMA)

    def logits(self, s: Segment, query, t):
        """S [64, TILE] to base 2."""
        slot = lax.rem(t, jnp.int32(2))

        def multiply(acc):
            for half, q in enumerate((query, self.q_latent.at[:, pl.ds(HALF, HALF)])):
                plgpu.barrier_wait(self.halves_ready.at[2 * half + slot])
                plgpu.wgmma(acc, q, self.halves.at[half, slot].transpose((1, 0)))
            plgpu.barrier_wait(self.ropes_ready.at[slot])
            plgpu.wgmma(acc, self.q_rope, self.ropes.at[slot].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, ACC((ROWS, TILE), jnp.float32)) * self.scale

    def weights_at(self, t):
        """Where the weights of a tile go."""
        return self.ropes.at[lax.rem(t, jnp.int32(2))]

    def after_weights(self, s: Segment, t) -> None:
        """The place of the last tile's weights takes the rotary part of the next tile."""
        self.wait_free(t - 1)
        pl.when((t > 0) & (t + 1 < s.count))(lambda: self.fetch_rope(s, t + 1))

    # The warpgroups of the values

    def prime_values(self, s: Segment) -> None:
        """Ask for the first halves; where the second one goes, results of the sequence before may be."""
        pl.when(s.count > 0)(lambda: self.fetch_half(s, jnp.int32(0)))
        pl.when((s.count > 1) & (s.b == self.own(0)))(lambda: self.fetch_half(s, jnp.int32(1)))

    def begin_values(self, s: Segment):
        """The result so far, and the second tile asked for."""
        pl.when((s.count > 1) & (s.b != self.own(0)))(lambda: self.fetch_half(s, jnp.int32(1)))
        return self.zeros()

    def add_values(self, s: Segment, t, acc):
        """`acc` plus weights times values."""
        slot, tile = lax.rem(t, jnp.int32(2)), s.tile0 + t
        values = self.halves.at[self.role, slot]
        # The queries' warpgroup is done with the keys: what lies past the end may be cleared.
        pl.when((tile + 1) * TILE > s.seq.kv_len)(lambda: self.clear(s, tile, values))
        pages = self.pages_of(s, t + 2)
        acc = add_product(acc, lambda a: plgpu.wgmma(a, self.ropes.at[slot], values), self.interpret)
        pl.when(t + 2 < s.count)(lambda: self.fetch_half(s, t + 2, pages))
        return acc

    def clear(self, s: Segment, tile, values) -> None:
        """Zeros in place of tokens that are not there: 0 x NaN would be NaN."""
        real = self.real_tokens(s, tile, Layout.WGMMA, (TILE, ROPE))
        for at in range(0, HALF, ROPE):
            piece = values.at[:, pl.ds(at, ROPE)]
            x = plgpu.load(piece, layout=Layout.WGMMA)
            piece[...] = jnp.where(real, x, jnp.zeros((), x.dtype))
        plgpu.commit_smem()
