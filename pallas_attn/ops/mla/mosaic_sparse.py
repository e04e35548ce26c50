"""MLA over listed keys: every token is a sequence whose rows are gathered one by one.

A row is copied as it lies to a landing place; a slot that is none has a row of zeros copied. The warpgroups of the
values then put their halves where the matrix unit can read them, `mosaic_sparse_rows` and `mosaic_sparse_float` tell
how. They do so for the next tile while the queries' warpgroup has this one's logits.

Shared memory is full to the last KiB: half of the query's latent and its rotary part are in registers, the query comes
in, and results go out, through the memory of the tiles.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE, padded
from pallas_attn.ops.mla import mosaic_worker
from pallas_attn.ops.mla.mosaic_form import HALF, ROPE, Form, Segment
from pallas_attn.ops.mla.mosaic_worker import FAR, PART, add_product, stages, state
from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import seen, tokens
from pallas_attn.runtime.mosaic import ACC, OVER_COLUMNS, ROWS, Layout, swizzled

LISTS = 4  # tiles' slots in flight
TOGETHER = 8  # rows that one step of a loop asks for


def keys(p: Problem, args: Args, rows: tuple) -> dict[str, Any]:
    """What of the inputs tells of keys: the cache's rows, as given, and the slots of each token's keys, -1 for none, in
    tiles. Where all tokens have as many, nothing is to be computed of the tiles before each."""
    assert p.topk is not None
    assert args.topk is not None
    who = tokens(p, args)
    if p.topk_slots:
        end = p.pages * p.page_size  # nothing of more than 32 bits may wrap into the cache
        slots = args.topk.indices
        slots = slots if slots.dtype == jnp.int32 else jnp.where((slots >= 0) & (slots < end), slots, -1)
    else:
        found, valid = seen(p, args, who, jnp.arange(p.topk))
        slots = jnp.where(valid, found, -1)
    tiles = -(-p.topk // TILE)
    slots = jnp.pad(slots.astype(jnp.int32), ((0, 0), (0, tiles * TILE - p.topk)), constant_values=-1)
    before = jnp.asarray(np.arange(p.tokens + 1) * tiles, jnp.int32)
    if p.topk_lengths:
        before = jnp.pad(jnp.cumsum(-(-who.keys // TILE)).astype(jnp.int32), (1, 0))
    spare = padded(p.tokens) - p.tokens - 1
    return {
        "pages": rows, "page_table": slots.reshape(p.tokens, tiles, TILE), "owners": None,
        "kv_lens": who.keys, "cu_q_lens": jnp.asarray(np.arange(p.tokens + 1), jnp.int32),
        "live": jnp.full(1, p.tokens, jnp.int32),
        "before": jnp.pad(before, (0, spare), constant_values=np.iinfo(np.int32).max),
    }  # fmt: skip


def memory(p: Problem, form: Form, interpret, wide, landing) -> dict[str, Any]:
    """Shared memory and barriers of a CTA. The interpreter knows no operands in registers.

    wide: the type that is multiplied; landing: buffers of rows as they lie, the last one all of them in a line.
    """
    half, rope, raw = swizzled(wide, HALF), swizzled(wide, ROPE), p.q_format.dtype
    return state(form) | {
        "memory": plgpu.RefUnion(
            plgpu.SMEM((2, 2, TILE, HALF), wide, transforms=half),
            plgpu.SMEM((2, 2, ROWS, HALF), raw, transforms=swizzled(raw, HALF)), *stages(p, PART),
        ),
        "ropes": plgpu.RefUnion(
            plgpu.SMEM((2, TILE, ROPE), wide, transforms=rope),
            plgpu.SMEM((2, ROWS, ROPE), raw, transforms=swizzled(raw, ROPE)),
        ),
        "operands": [plgpu.SMEM((ROWS, n), wide, transforms=swizzled(wide, min(n, 64))) for n in (
            (HALF,) if interpret is None else (HALF, HALF, ROPE)
        )],
        "landing": plgpu.RefUnion(*landing) if interpret is None else landing[:-1],
        "q_ready": plgpu.Barrier(num_arrivals=3 * (ROWS // form.chunk)),
        "slots": plgpu.SMEM((LISTS, TILE), jnp.int32),
        "listed": plgpu.Barrier(num_barriers=LISTS),
        "landed": plgpu.Barrier(num_arrivals=landing[0].shape[0] * (1 if interpret is None else len(landing) - 1)),
        "read": plgpu.Barrier(num_arrivals=2),
        "q_taken": plgpu.Barrier(),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }  # fmt: skip


@dataclasses.dataclass
class Worker(mosaic_worker.Worker):
    """The body of the kernel."""

    ropes: Any  # [slot, TILE, ROPE], which take the weights in the end, and the query's as it comes
    operands: Any  # what of the query is in shared memory
    landing: Any  # rows
    slots: Any  # [tile, TILE]
    listed: Any
    landed: Any
    q_taken: Any
    read: Any
    full: Any

    bands: ClassVar[int]  # of rows, that land one after the other

    # The warpgroup of the queries

    def prime_scores(self, s: Segment) -> None:
        """Nothing: the others gather whole rows."""

    def load_query(self, s: Segment):
        """The query's latent in halves, and its rotary part, in f16."""
        raw, raw_rope = self.memory[1].at[1], self.ropes[1].at[1]  # where the second tile will be
        self.fetch_halves(s, raw, raw_rope)
        first, second, rope = (
            self.widened(plgpu.load(x, layout=Layout.WGMMA)) for x in (raw.at[0], raw.at[1], raw_rope)
        )
        if self.interpret is None:
            self.operands[0][...] = second
            query = first, self.operands[0], rope
        else:
            for place, x in zip(self.operands, (first, second, rope), strict=True):
                place[...] = x
            query = self.operands
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.q_taken)
        return query

    def widened(self, x):
        """Numbers in the type that is multiplied; what f16 cannot hold is cut off."""
        wide = self.memory[0].dtype
        if x.dtype == wide:
            return x
        most = float(jnp.finfo(wide).max)
        return jnp.clip(x.astype(jnp.float32), -most, most).astype(wide)

    def logits(self, s: Segment, query, t):
        """S [64, TILE] to base 2."""
        slot = lax.rem(t, jnp.int32(2))
        plgpu.barrier_wait(self.full.at[slot])

        def multiply(acc):
            tile = self.memory[0].at[slot, 0], self.memory[0].at[slot, 1], self.ropes[0].at[slot]
            for q, part in zip(query, tile, strict=True):
                plgpu.wgmma(acc, q, part.transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, ACC((ROWS, TILE), jnp.float32)) * self.scale

    def unmasked(self, s: Segment) -> None:
        """A slot that is none may stand anywhere."""

    def masked(self, s: Segment, t, x):
        """Logits, as good as -inf where there is no slot."""
        place = lax.rem(t, jnp.int32(LISTS))
        plgpu.barrier_wait(self.listed.at[place])
        slot = plgpu.load(self.slots.at[place], layout=OVER_COLUMNS, optimized=False)
        at = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=OVER_COLUMNS) + (s.tile0 + t) * TILE
        real = (slot >= 0) & (slot < self.x.pages[0].shape[0]) & (at < s.seq.kv_len)
        return x + lax.broadcast_in_dim(jnp.where(real, 0.0, 2 * FAR), x.shape, [1])

    def weights_at(self, t):
        """The rotary part of the tile, which has been used by then."""
        return self.ropes[0].at[lax.rem(t, jnp.int32(2))]

    def after_weights(self, s: Segment, t) -> None:
        """No phase of a barrier is passed over."""
        self.wait_free(t - 1)

    # The warpgroups of the values

    def prime_values(self, s: Segment) -> None:
        """Ask for the slots of the first tiles, then for the first rows."""
        for t in range(LISTS - 1):
            self.fetch_slots(s, jnp.int32(t))
        pl.when(s.count > 0)(lambda: self.gather(s, jnp.int32(0), 0))

    def fetch_slots(self, s: Segment, t) -> None:
        """Ask for the slots of a tile."""
        place = lax.rem(t, jnp.int32(LISTS))
        pl.when((self.role == 0) & (t < s.count))(
            lambda: plgpu.copy_gmem_to_smem(
                self.x.page_table.at[s.b, s.tile0 + t], self.slots.at[place], self.listed.at[place]
            )
        )

    def gather(self, s: Segment, t, band: int) -> None:
        """Ask for the warpgroup's share of a band of a tile's rows."""
        place, share = lax.rem(t, jnp.int32(LISTS)), TILE // self.bands // 2
        if band == 0:
            plgpu.barrier_wait(self.listed.at[place])
        first, listed = band * 2 * share, s.seq.kv_len - (s.tile0 + t) * TILE
        half = len(self.x.pages) // 2
        cache, zeros = self.x.pages[:half], self.x.pages[half:]

        def some(i, carry):
            for j in range(TOGETHER):
                row = self.role * share + i * TOGETHER + j
                slot = self.slots[place, first + row]
                real = (slot >= 0) & (slot < self.x.pages[0].shape[0]) & (first + row < listed)
                pl.when(real)(lambda row=row, slot=slot: self.copy_row(cache, slot, row))
                pl.when(~real)(lambda row=row: self.copy_row(zeros, 0, row))
            return carry

        lax.fori_loop(0, share // TOGETHER, some, jnp.int32(0))

    def copy_row(self, sources, slot, row) -> None:
        """Start the copy of one row to its place."""
        if self.interpret is None:
            size, pitch = sources[0].shape[1], self.landing[0].shape[1]
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # makes it a plain copy of bytes
            to = self.landing[-1].at[pl.ds(row * pitch, size)]
            plgpu.copy_gmem_to_smem(sources[0].at[slot], to, self.landed, oob_mode=inside)
            return
        for source, to in zip(sources, self.landing, strict=True):
            plgpu.copy_gmem_to_smem(source.at[slot], to.at[row, pl.ds(0, source.shape[1])], self.landed)

    def widen(self, s: Segment, t) -> None:
        """A tile made ready for the matrix unit; whenever all that has landed is read, the next rows are asked for."""
        slot = lax.rem(t, jnp.int32(2))
        for band in range(self.bands):
            plgpu.barrier_wait(self.landed)
            self.convert(slot, band)
            plgpu.commit_smem()
            done = self.full.at[slot] if band + 1 == self.bands else self.read
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            if band + 1 < self.bands:
                self.gather(s, t, band + 1)
        pl.when(t + 1 < s.count)(lambda: self.gather(s, t + 1, 0))

    def convert(self, slot, band: int) -> None:
        """The warpgroup's half of what has landed, and every second time the rotary part, to its place in the tile: a
        buffer of 64 columns cannot be written in parts."""
        raise NotImplementedError

    def begin_values(self, s: Segment):
        """The result so far, and the first tile widened."""
        self.widen(s, jnp.int32(0))
        return self.zeros(HALF)

    def ready_values(self, s: Segment, t) -> None:
        """The next tile widened: the place of the last one is free."""
        self.wait_free(t - 1)
        self.fetch_slots(s, t + LISTS - 1)
        pl.when(t == 0)(lambda: plgpu.barrier_wait(self.q_taken))
        pl.when(t + 1 < s.count)(lambda: self.widen(s, t + 1))

    def add_values(self, s: Segment, t, acc):
        """`acc` plus weights times values."""
        slot = lax.rem(t, jnp.int32(2))
        values = self.memory[0].at[slot, self.role]
        return add_product(acc, lambda a: plgpu.wgmma(a, self.ropes[0].at[slot], values), self.interpret)

    def after_values(self, s: Segment) -> None:
        """No phase of a barrier is passed over, and the other warpgroup is done with the weights."""
        self.wait_free(s.count - 1)
