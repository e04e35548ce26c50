"""MLA over listed keys: every token is a sequence whose rows are gathered one by one.

A row is copied as it lies to a landing place; a slot that is none has a row of zeros copied. Each warpgroup of the
values has half of a tile's rows copied and puts them where the matrix unit can read them, for both: `mosaic_gather`,
`mosaic_sparse_rows` and `mosaic_sparse_float` tell how. It does so for the next tile while the queries' warpgroup has
this one's logits; as soon as some rows are read, the next ones are asked for in their place.

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

from pallas_attn.core.batch import TILE, before_each
from pallas_attn.core.narrow import clamped, slots32
from pallas_attn.ops.mla import mosaic_worker
from pallas_attn.ops.mla.mosaic_form import HALF, ROPE, Form, Listed, Segment
from pallas_attn.ops.mla.mosaic_gather import SEEN, UNSEEN, WORDS, begin, gather, look_up, put, read_slots, wait
from pallas_attn.ops.mla.mosaic_worker import PART, add_product, stages, state
from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.runtime.mosaic import ACC, OVER_COLUMNS, ROWS, Layout, swizzled

LISTS = 4  # tiles' slots in flight


def keys(p: Problem, args: Args, rows: tuple) -> dict[str, Any]:
    """What of the inputs tells of keys: the cache's rows, as given, and the lists of tokens, in tiles. The kernels ask
    the batch themselves whose token a row is and where its keys lie. XLA has to add up lengths, where there are any,
    and to fill up lists that are not whole tiles."""
    assert p.topk is not None
    assert args.topk is not None
    batch, lengths, before = args.batch, args.topk.lengths, None
    room, tiles = (p.pages if p.topk_slots else p.pages_per_seq) * p.page_size, -(-p.topk // TILE)
    list_ = slots32(args.topk.indices, room)
    if p.topk % TILE:
        list_ = jnp.pad(list_, ((0, 0), (0, tiles * TILE - p.topk)), constant_values=-1)
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, p.topk).astype(jnp.int32)
        before = before_each(-(-lengths // TILE))
    live = jnp.asarray(p.seqs if batch.num_seqs is None else batch.num_seqs)
    where = (None, None)
    if not p.topk_slots:
        where = clamped(batch.kv_lens, room), clamped(batch.page_table, p.pages - 1)
    return {
        "pages": rows, "page_table": list_.reshape(p.tokens, tiles, TILE), "owners": None,
        "kv_lens": lengths, "cu_q_lens": None, "live": None, "before": before,
        "listed": Listed(clamped(batch.cu_q_lens, p.tokens), clamped(live, p.seqs).reshape(1), *where),
    }  # fmt: skip


def with_nothing(rows):
    """Rows of a cache, then one of zeros for keys that are none. Another one beside it keeps XLA from launching a
    kernel that writes the zeros: it is a constant now."""
    return rows, jnp.asarray(np.repeat([[0], [1]], rows.shape[1], axis=1).astype(rows.dtype))


def memory(p: Problem, form: Form, interpret, wide, landing: list) -> dict[str, Any]:
    """Shared memory and barriers of a CTA. The interpreter knows no operands in registers.

    wide: the type that is multiplied; landing: buffers of rows as they lie [places of both warpgroups, rows, width].
    """
    half, rope, raw = swizzled(wide, HALF), swizzled(wide, ROPE), p.q_format.dtype
    places = landing[0].shape[0]
    return state(p, form) | {
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
        "landing": landing,
        "q_ready": plgpu.Barrier(num_arrivals=3 * (ROWS // form.chunk)),
        "slots": plgpu.SMEM((LISTS, TILE), jnp.int32),
        "listed": plgpu.Barrier(num_barriers=LISTS),
        "landed": [plgpu.SMEM((2, WORDS), jnp.int32)] if interpret is None else [
            plgpu.Barrier(num_arrivals=landing[0].shape[1] * len(landing), num_barriers=places)
        ],
        "q_taken": plgpu.Barrier(),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "left": plgpu.Barrier(num_arrivals=2),
    }  # fmt: skip


@dataclasses.dataclass
class Worker(mosaic_worker.Worker):
    """The body of the kernel."""

    ropes: Any  # [slot, TILE, ROPE], which take the weights in the end, and the query's as it comes
    operands: Any  # what of the query is in shared memory
    landing: Any  # rows
    slots: Any  # [tile, TILE], then masks
    listed: Any
    landed: Any
    q_taken: Any
    full: Any
    left: Any

    bands: ClassVar[int]  # of a warpgroup's rows of a tile, that are copied and read one after the other
    places: ClassVar[int]  # where they land, by turns

    def run(self) -> None:
        """Barriers first, then all sequences."""
        role = lax.axis_index("role")
        if self.interpret is None:
            pl.when(role < 2)(lambda: begin(self.landed[0].at[role], self.places))
        super().run()

    # The warpgroup of the queries

    @property
    def plain(self) -> bool:
        """It has no registers to spare."""
        return True

    def prime_scores(self, s: Segment) -> None:
        """Nothing: the others gather whole rows."""

    def raw_query(self) -> tuple:
        """Where the query comes in: where the second tile will be."""
        return self.memory[1].at[1], self.ropes[1].at[1]

    def ask_query(self, s: Segment) -> None:
        """Ask for the query."""
        self.fetch_halves(s, *self.raw_query())

    def take_query(self, s: Segment):
        """The query's latent in halves, and its rotary part, in f16."""
        raw, raw_rope = self.raw_query()
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
        """Logits, as good as -inf where there is no slot: whoever gathered the rows has left that in the list."""
        mask = plgpu.load(self.slots.at[lax.rem(t, jnp.int32(LISTS))], layout=OVER_COLUMNS, optimized=False)
        return x + lax.broadcast_in_dim(lax.bitcast_convert_type(mask, jnp.float32), x.shape, [1])

    def leave_weights(self, s: Segment, t, weight) -> None:
        """No warp waits for another until all are done: they have since the rotary part was read, to leave alpha."""
        target = self.weights_at(t)
        self.put_array(target, weight.astype(target.dtype), Layout.WGMMA)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.p_ready.at[lax.rem(t, jnp.int32(2))])

    def weights_at(self, t):
        """The rotary part of the tile, which has been used by then."""
        return self.ropes[0].at[lax.rem(t, jnp.int32(2))]

    def after_weights(self, s: Segment, t) -> None:
        """No phase of a barrier is passed over."""
        self.wait_free(t - 1)

    def put_array(self, to, x, layout=None) -> None:
        """Put an array, or, without a layout, what was read of rows, in its place."""
        if self.interpret is None:
            put(to, x, layout)
        else:
            to[...] = x

    # The warpgroups of the values

    def prime_values(self, s: Segment) -> None:
        """Ask for the slots of the first tiles, then for the first rows."""
        for t in range(LISTS - 1):
            self.fetch_slots(s, jnp.int32(t))

        def first() -> None:
            self.await_slots(s, jnp.int32(0))
            for band in range(self.places):
                self.gather(s, jnp.int32(0), band, self.slots_of(s, jnp.int32(0), self.rows(band)))

        pl.when(s.count > 0)(first)

    def fetch_slots(self, s: Segment, t) -> None:
        """Ask for the slots of a tile."""
        place = lax.rem(t, jnp.int32(LISTS))
        pl.when((self.role == 0) & (t < s.count))(
            lambda: plgpu.copy_gmem_to_smem(
                self.x.page_table.at[s.b, s.tile0 + t], self.slots.at[place], self.listed.at[place]
            )
        )

    def await_slots(self, s: Segment, t) -> None:
        """Until the slots of a tile are there."""
        pl.when(t < s.count)(lambda: plgpu.barrier_wait(self.listed.at[lax.rem(t, jnp.int32(LISTS))]))

    def slots_of(self, s: Segment, t, rows) -> Any:
        """The slots of some rows of a tile, a lane's own; of a tile that is none they are anything."""
        if self.interpret is not None:
            return None
        list_, listed = self.slots.at[lax.rem(t, jnp.int32(LISTS))], s.seq.kv_len - (s.tile0 + t) * TILE
        if s.seq.context is None:
            return read_slots(list_, rows.start, listed, rows.size)
        table, seq = self.x.listed.page_table, s.seq
        where = seq.owner, seq.context, self.p.pages, self.p.page_size
        return look_up(list_, rows.start, listed, rows.size, table, *where)

    def place(self, band: int):
        """Where a band lands."""
        return self.role * self.places + band % self.places

    def rows(self, band: int):
        """Which rows of a tile it has."""
        count = TILE // 2 // self.bands
        return pl.ds(pl.multiple_of(self.role * (TILE // 2) + band * count, 8), count)

    def gather(self, s: Segment, t, band: int, slots) -> None:
        """Ask for a band of a tile's rows."""
        list_, place, rows = lax.rem(t, jnp.int32(LISTS)), self.place(band), self.rows(band)
        half = len(self.x.pages) // 2
        cache, zeros = self.x.pages[:half], self.x.pages[half:]
        if self.interpret is None:
            turns, to = self.landed[0].at[self.role], self.landing[0].at[place]
            gather(turns, band % self.places, to, self.slots.at[list_], cache[0], zeros[0], rows.start, slots)
            return

        def one(i, carry):
            slot = self.slot(s, t, rows.start + i)
            real = (slot >= 0) & (slot < cache[0].shape[0])
            for row, none, to in zip(cache, zeros, self.landing, strict=True):
                copy = lambda x, at, to=to: plgpu.copy_gmem_to_smem(x.at[at], to.at[place, i], self.landed[0].at[place])  # noqa: E731
                pl.when(real)(lambda row=row, copy=copy: copy(row, slot))
                pl.when(~real)(lambda none=none, copy=copy: copy(none, 0))
            self.slots[list_, rows.start + i] = jnp.where(real, SEEN, UNSEEN)
            return carry

        lax.fori_loop(0, rows.size, one, jnp.int32(0))

    def slot(self, s: Segment, t, row):
        """`slots_of` for the interpreter: of one row."""
        number, p, size = self.slots[lax.rem(t, jnp.int32(LISTS)), row], self.p, jnp.int32(self.p.page_size)
        real = row < s.seq.kv_len - (s.tile0 + t) * TILE
        if s.seq.context is not None:
            real &= (number >= 0) & (number < s.seq.context)
            number = jnp.where(real, number, 0)
            page = jnp.clip(self.x.listed.page_table[s.seq.owner, lax.div(number, size)], 0, p.pages - 1)
            number = page * size + lax.rem(number, size)
        return jnp.where(real, number, -1)

    def widen(self, s: Segment, t) -> None:
        """The warpgroup's rows of a tile made ready for the matrix unit."""
        slot = lax.rem(t, jnp.int32(2))
        self.await_slots(s, t + 1)
        next_ = [divmod(band + self.places, self.bands) for band in range(self.bands)]
        # Looked up before there is anything to wait for.
        slots = [self.slots_of(s, t + later, self.rows(band)) for later, band in next_]
        for band, (later, following) in enumerate(next_):
            if self.interpret is None:
                wait(self.landed[0].at[self.role], band % self.places)
            else:
                plgpu.barrier_wait(self.landed[0].at[self.place(band)])
            self.convert(slot, band)
            ask = lambda later=later, band=band, following=following: self.gather(s, t + later, following, slots[band])  # noqa: E731
            pl.when(t + later < s.count)(ask)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])

    def convert(self, slot, band: int) -> None:
        """What has landed to its place in the tile."""
        raise NotImplementedError

    def begin_values(self, s: Segment):
        """The result so far, and the first tile widened."""
        self.widen(s, jnp.int32(0))
        return self.zeros()

    def ready_values(self, s: Segment, t) -> None:
        """The place of the last tile is free: for the next one."""
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

    def weigh(self, i, s: Segment, following) -> None:
        """What either writes for the next segment, the other's results may be in."""
        super().weigh(i, s, following)
        plgpu.barrier_arrive(self.left)
        plgpu.barrier_wait(self.left)
