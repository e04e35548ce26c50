"""MLA over listed rows of FP8_DS_MLA: every token is a sequence whose keys are gathered row by row.

A row is copied as it lies, 656 bytes to one landing place for each token of a tile; a slot that is none has a row of
zeros copied. The warpgroups of the values then make f16 of their halves: codes times their tile's scale, which is
exact, for scales are powers of two. They do so for the next tile while the queries' warpgroup has this one's logits.
What f16 cannot hold is cut off: magnitudes past 57344 of a latent, and past 65504 of a query or a rotary part.

Shared memory is full to the last KiB: half of the query's latent and its rotary part are in registers, the query comes
in, and results go out, through the memory of the tiles.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE, padded
from pallas_attn.core.formats import E4M3
from pallas_attn.core.latent_cache import DS_BYTES, DS_CODES, DS_SCALES
from pallas_attn.ops.mla import mosaic_worker
from pallas_attn.ops.mla.mosaic_form import HALF, ROPE, Form, Segment
from pallas_attn.ops.mla.mosaic_worker import FAR, PART, add_product, stages, state
from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import seen, tokens
from pallas_attn.runtime.mosaic import ACC, OVER_COLUMNS, ROWS, Layout, swizzled

WIDE, PAIR = jnp.float16, jnp.bfloat16  # what is multiplied; what a row's bytes past the codes are read as
MOST = float(jnp.finfo(WIDE).max)
MOST_SCALE = 128.0  # times 448 is the largest in f16
LISTS = 4  # tiles' slots in flight
TOGETHER = 8  # rows that one step of a loop asks for
CODES = 16  # columns of one load: the row's pitch must be a multiple of them


def keys(p: Problem, args: Args, interpret) -> dict[str, Any]:
    """The cache as rows, and the slots of each token's keys, -1 for none, in tiles. Where all tokens have as many,
    nothing is to be computed of the tiles before each."""
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
        "pages": _rows(p, args.cache.pages, interpret), "page_table": slots.reshape(p.tokens, tiles, TILE),
        "kv_lens": who.keys, "cu_q_lens": jnp.asarray(np.arange(p.tokens + 1), jnp.int32),
        "live": jnp.full(1, p.tokens, jnp.int32),
        "before": jnp.pad(before, (0, spare), constant_values=np.iinfo(np.int32).max),
    }  # fmt: skip


def _rows(p: Problem, pages, interpret) -> tuple:
    """The cache's rows, then one of zeros; for the interpreter also as pairs of bytes."""
    rows = pages.reshape(p.pages * p.page_size, DS_BYTES)
    every = rows, jnp.zeros((1, DS_BYTES), jnp.uint8)
    codes = [lax.bitcast_convert_type(x, E4M3) for x in every]
    if interpret is None:
        return tuple(codes)
    pairs = [lax.bitcast_convert_type(x.reshape(len(x), -1, 2), PAIR) for x in every]
    return codes[0], pairs[0], codes[1], pairs[1]


def scratch(p: Problem, form: Form, interpret) -> dict[str, Any]:
    """Shared memory and barriers of a CTA. The interpreter knows no operands in registers and no bytes that are read as
    another type."""
    half, rope = swizzled(WIDE, HALF), swizzled(WIDE, ROPE)
    landing = [plgpu.SMEM((TILE, DS_BYTES), E4M3), plgpu.SMEM((TILE, DS_BYTES // 2), PAIR)]
    raw = p.q_format.dtype
    return state(form) | {
        "memory": plgpu.RefUnion(
            plgpu.SMEM((2, 2, TILE, HALF), WIDE, transforms=half),
            plgpu.SMEM((2, 2, ROWS, HALF), raw, transforms=swizzled(raw, HALF)), *stages(p, PART),
        ),
        "ropes": plgpu.RefUnion(
            plgpu.SMEM((2, TILE, ROPE), WIDE, transforms=rope),
            plgpu.SMEM((2, ROWS, ROPE), raw, transforms=swizzled(raw, ROPE)),
        ),
        "operands": [plgpu.SMEM((ROWS, n), WIDE, transforms=swizzled(WIDE, min(n, 64))) for n in (
            (HALF,) if interpret is None else (HALF, HALF, ROPE)
        )],
        "landing": landing if interpret else plgpu.RefUnion(*landing, plgpu.SMEM((TILE * DS_BYTES,), E4M3)),
        "q_ready": plgpu.Barrier(num_arrivals=3 * (ROWS // form.chunk)),
        "slots": plgpu.SMEM((LISTS, TILE), jnp.int32),
        "listed": plgpu.Barrier(num_barriers=LISTS),
        "landed": plgpu.Barrier(num_arrivals=TILE * (1 if interpret is None else 2)),
        "q_taken": plgpu.Barrier(),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }  # fmt: skip


@dataclasses.dataclass
class Worker(mosaic_worker.Worker):
    """The body of the kernel."""

    ropes: Any  # [slot, TILE, ROPE], which take the weights in the end, and the query's as it comes
    operands: Any  # what of the query is in shared memory
    landing: Any  # rows as codes, as pairs of bytes, and all of them in a line
    slots: Any  # [tile, TILE]
    listed: Any
    landed: Any
    q_taken: Any
    full: Any

    # The warpgroup of the queries

    def prime_scores(self, s: Segment) -> None:
        """Nothing: the others gather whole rows."""

    def load_query(self, s: Segment):
        """The query's latent in halves, and its rotary part, in f16."""
        raw, raw_rope = self.memory[1].at[1], self.ropes[1].at[1]  # where the second tile will be
        chunk, last = self.form.chunk, self.p.tokens * self.form.heads - self.form.chunk
        for at in range(0, ROWS, chunk):
            row = pl.multiple_of(jnp.minimum(s.row + at, last), chunk)
            rows, to = pl.ds(row, chunk), pl.ds(at, chunk)
            for half in range(2):
                source = self.x.q_latent.at[rows, pl.ds(half * HALF, HALF)]
                plgpu.copy_gmem_to_smem(source, raw.at[half, to], self.q_ready)
            plgpu.copy_gmem_to_smem(self.x.q_rope.at[rows], raw_rope.at[to], self.q_ready)
        plgpu.barrier_wait(self.q_ready)
        first, second, rope = (_in_f16(plgpu.load(x, layout=Layout.WGMMA)) for x in (raw.at[0], raw.at[1], raw_rope))
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
        pl.when(s.count > 0)(lambda: self.gather(s, jnp.int32(0)))

    def fetch_slots(self, s: Segment, t) -> None:
        """Ask for the slots of a tile."""
        place = lax.rem(t, jnp.int32(LISTS))
        pl.when((self.role == 0) & (t < s.count))(
            lambda: plgpu.copy_gmem_to_smem(
                self.x.page_table.at[s.b, s.tile0 + t], self.slots.at[place], self.listed.at[place]
            )
        )

    def gather(self, s: Segment, t) -> None:
        """Ask for the warpgroup's half of a tile's rows."""
        place = lax.rem(t, jnp.int32(LISTS))
        plgpu.barrier_wait(self.listed.at[place])
        first, listed = self.role * (TILE // 2), s.seq.kv_len - (s.tile0 + t) * TILE

        cache, zeros = self.x.pages[: len(self.x.pages) // 2], self.x.pages[len(self.x.pages) // 2 :]

        def some(i, carry):
            for j in range(TOGETHER):
                row = first + i * TOGETHER + j
                slot = self.slots[place, row]
                real = (slot >= 0) & (slot < self.x.pages[0].shape[0]) & (row < listed)
                pl.when(real)(lambda row=row, slot=slot: self.copy_row(cache, slot, row))
                pl.when(~real)(lambda row=row: self.copy_row(zeros, 0, row))
            return carry

        lax.fori_loop(0, TILE // 2 // TOGETHER, some, jnp.int32(0))

    def copy_row(self, sources, slot, row) -> None:
        """Start the copy of one row to its place."""
        if self.interpret is None:
            to = self.landing[2].at[pl.ds(row * DS_BYTES, DS_BYTES)]
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # makes it a plain copy of bytes
            plgpu.copy_gmem_to_smem(sources[0].at[slot], to, self.landed, oob_mode=inside)
            return
        for source, to in zip(sources, self.landing, strict=True):
            plgpu.copy_gmem_to_smem(source.at[slot], to.at[row], self.landed)

    def widen(self, s: Segment, t) -> None:
        """The warpgroup's half of a tile in f16; once both are there, the rows of the next one are asked for."""
        slot = lax.rem(t, jnp.int32(2))
        plgpu.barrier_wait(self.landed)
        self.find_scales()
        layout, half = Layout.WGMMA_UPCAST_2X, self.memory[0].at[slot, self.role]
        for group in range(HALF // 128):
            scale = self.scale_tile.at[self.role, group]
            scale = plgpu.load(scale, layout=layout.reduce(1), optimized=False).astype(WIDE)
            for at in range(group * 128, (group + 1) * 128, 64):
                pieces = [self.landing[0].at[:, pl.ds(self.role * HALF + at + i, CODES)] for i in range(0, 64, CODES)]
                x = jnp.concatenate([plgpu.load(x, layout=layout, optimized=False) for x in pieces], axis=1)
                half[:, pl.ds(at, 64)] = x.astype(WIDE) * lax.broadcast_in_dim(scale, (TILE, 64), [0])
        pl.when(self.role == slot)(lambda: self.widen_rope(slot))  # each has every second one
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])
        plgpu.barrier_wait(self.full.at[slot])
        pl.when(t + 1 < s.count)(lambda: self.gather(s, t + 1))

    def find_scales(self) -> None:
        """The scales of the half's two groups, for every row. They are powers of two: their upper halves, read as bf16,
        are all there is of them."""
        pairs = self.landing[1].at[:, pl.ds(DS_CODES // 2, 8)]
        pairs = plgpu.load(pairs, layout=Layout.WGMMA, optimized=False).astype(jnp.float32)
        column = plgpu.broadcasted_iota(jnp.int32, (TILE, 8), 1, layout=Layout.WGMMA)
        for group in range(HALF // 128):
            which = 2 * (self.role * (HALF // 128) + group) + 1
            scale = jnp.sum(jnp.where(column == which, pairs, 0.0), axis=1)
            self.scale_tile[self.role, group] = jnp.minimum(scale, MOST_SCALE)
        plgpu.commit_smem()

    def widen_rope(self, slot) -> None:
        """The rotary part of a tile in f16, whole: a buffer of 64 columns cannot be written in parts."""
        pieces = [self.landing[1].at[:, pl.ds(DS_SCALES // 2 + i, 8)] for i in range(0, ROPE, 8)]
        rope = jnp.concatenate([plgpu.load(x, layout=Layout.WGMMA, optimized=False) for x in pieces], axis=1)
        self.ropes[0][slot] = _in_f16(rope)

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


def _in_f16(x):
    return jnp.clip(x.astype(jnp.float32), -MOST, MOST).astype(WIDE)
