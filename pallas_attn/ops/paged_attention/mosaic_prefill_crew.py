"""The warpgroups of the prefill kernel that feed the others: one loads, one prepares (see `mosaic_prefill`)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.ops.paged_attention.mosaic_prefill_plan import NUMBERS, WARPGROUPS, Block, Form, Inputs, locate
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import ROWS, Layout, row_layout, take_ticket, token_layout

NEWS = 2  # blocks that the other warpgroups are told of and have yet to see


@dataclasses.dataclass
class Crew:
    """What all warpgroups of a CTA share."""

    p: Problem
    form: Form
    workers: int
    x: Inputs
    counter: Any  # [1], of the blocks that are taken, or None: the CTAs take turns
    outs: tuple
    of_query: Any
    row_values: Any
    k_ring: Any
    v_ring: Any
    news: Any
    ticket: Any
    news_here: Any
    news_used: Any
    q_here: Any
    q_used: Any
    k_here: Any
    k_used: Any
    v_here: Any
    v_ready: Any
    v_used: Any
    raw_q: Any = None
    v_free: Any = None
    v_wide: Any = None
    k_ready: Any = None
    k_wide: Any = None
    stand_ins: Any = None  # for accumulators, in the interpreter
    k_scales: Any = None
    v_scales: Any = None

    def __post_init__(self) -> None:
        p = self.p
        self.narrow = p.kv_format.dtype.itemsize == 1
        self.per_token = p.kv_format.granularity == "token_head"
        self.relays = self.form.relays_keys(p)
        if self.raw_q is None:
            self.raw_q, self.q_tile, self.o_tile = self.of_query
        else:
            self.q_tile, self.o_tile = self.of_query

    def each_block(self, body) -> Any:
        """body(block, tiles of the blocks before) for every block of the CTA; the tiles of all."""

        def receive(n) -> Block:
            slot = lax.rem(n, NEWS)
            plgpu.barrier_wait(self.news_here.at[slot])
            block = Block.get(self.news.at[slot])
            plgpu.barrier_arrive(self.news_used.at[slot])
            return block

        def step(state):
            n, tiles, block = state
            body(block, tiles)
            return n + 1, tiles + block.count, receive(n + 1)

        first = jnp.int32(0), jnp.int32(0), receive(jnp.int32(0))
        return lax.while_loop(lambda state: state[2].count > 0, step, first)[1]

    def drain(self, barriers, slots: int, count) -> None:
        """Wait for the last uses of `slots` slots, of `count`."""

        def wait(i, carry):
            plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(slots))])
            return carry

        lax.fori_loop(jnp.maximum(count - slots, 0), count, wait, jnp.int32(0))

    def page_of(self, s: Block, tile, j: int):
        """Page of the j-th part of a tile as the table has it; the last real page past the end."""
        p = self.p
        column = lax.div(tile * self.form.tile, jnp.int32(p.page_size)) + j
        column = jnp.minimum(column, lax.div(jnp.maximum(s.kv_len - 1, 0), jnp.int32(p.page_size)))
        return self.x.page_table[s.b, column]

    def inside(self, tile):
        """Slots of a page that a tile takes."""
        p, size = self.p, self.form.tile
        if p.page_size <= size:
            return pl.ds(0, p.page_size)
        return pl.ds(lax.rem(tile * size, jnp.int32(p.page_size)), size)

    def source(self, s: Block, side: int, page, tile):
        """Slots of a page: keys (side 0) or values of the head, in global memory."""
        p, inside = self.p, self.inside(tile)
        depth = (p.head_dim, p.v_head_dim)[side]
        where = (page, s.head, inside) if p.layout.head_major else (page, inside)
        at = 0 if p.layout.head_major else s.head * depth
        if p.layout.single:  # keys and values are as deep there
            return self.x.buffers[0].at[(*where, pl.ds(2 * at + side * depth, depth))]
        return self.x.buffers[side].at[(*where, pl.ds(at, depth))]

    def pages(self, s: Block, t):
        """The pages of tile t of the block's; those of a tile that is not there are the last one's."""
        tile = s.tile(jnp.minimum(t, s.count - 1))
        return tuple(self.page_of(s, tile, j) for j in range(max(self.form.tile // self.p.page_size, 1)))


class Loader(Crew):
    """Takes blocks, tells the others, and copies what they need as memory becomes free."""

    def run(self) -> None:
        """All blocks that the CTA gets."""
        plgpu.set_max_registers(self.form.registers[2], action="decrease")
        cells = self.form.cells(self.p)

        def step(state):
            cell, n, tiles = state
            some, block = locate(self.p, self.form, self.x, cell)

            def work() -> None:
                self.tell(n, block)
                self.load_block(block, n, tiles)

            pl.when(some)(work)
            own = some.astype(jnp.int32)
            return self.following(cell), n + own, tiles + own * block.count

        first = lax.axis_index("worker"), jnp.int32(0), jnp.int32(0)
        _, n, tiles = lax.while_loop(lambda state: state[0] < cells, step, first)
        self.tell(n, Block(*[jnp.int32(0)] * NUMBERS))  # no tiles: the end
        # No barrier is left in the middle of a phase that nobody saw.
        self.drain(self.news_used, NEWS, n + 1)
        self.drain(self.k_used, self.form.keys, tiles)
        self.drain(self.v_free if self.narrow else self.v_used, self.form.values, tiles)
        for role in range(WARPGROUPS):
            pl.when(n > 0)(lambda role=role: plgpu.barrier_wait(self.q_used.at[role]))

    def tell(self, n, block: Block) -> None:
        """Hand the CTA's n-th block to the other warpgroups."""
        slot = lax.rem(n, NEWS)
        pl.when(n >= NEWS)(lambda: plgpu.barrier_wait(self.news_used.at[slot]))
        block.put(self.news.at[slot])
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.news_here.at[slot])

    def following(self, cell):
        """The next cell. It is taken only when the last one's tiles are on their way, a few tiles before the others are
        done: whoever takes it sooner keeps it from those that are idle."""
        if self.counter is None:
            return cell + self.workers
        plgpu.commit_smem()  # the last ticket is read
        take_ticket(self.counter, self.ticket)
        plgpu.commit_smem()
        return self.ticket[0] + self.workers

    def load_block(self, s: Block, blocks, tiles) -> None:
        """All that one block sees, and its queries."""
        form = self.form
        rings = (
            (self.k_ring, self.k_here, self.k_used, form.keys),
            (self.v_ring, self.v_here, self.v_free if self.narrow else self.v_used, form.values),
        )

        def step(t, pages):
            following = self.pages(s, t + 1)  # looked up one step before they are wanted
            for side, (ring, here, free, slots) in enumerate(rings):
                slot = lax.rem(tiles + t, jnp.int32(slots))
                pl.when(tiles + t >= slots)(lambda free=free, slot=slot: plgpu.barrier_wait(free.at[slot]))
                size = min(self.p.page_size, form.tile)
                for j, page in enumerate(pages):
                    source = self.source(s, side, jnp.clip(page, 0, self.p.pages - 1), s.tile(t))
                    plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * size, size)], here.at[slot])
            pl.when(t == 0)(lambda: self.load_queries(s, blocks))
            return following

        lax.fori_loop(0, s.count, step, self.pages(s, jnp.int32(0)))

    def load_queries(self, s: Block, blocks) -> None:
        """The rows of both warpgroups."""
        p, form = self.p, self.form
        for role in range(WARPGROUPS):
            pl.when(blocks > 0)(lambda role=role: plgpu.barrier_wait(self.q_used.at[role]))
            raw, here = self.raw_q.at[role, pl.ds(0, ROWS)], self.q_here.at[role]
            first = s.start + s.at + role * form.span
            if form.part == 1:
                plgpu.copy_gmem_to_smem(self.x.q.at[pl.ds(first, ROWS), s.unit, 0], raw, here)
                continue

            def token(i, carry, first=first, raw=raw, here=here):
                source = self.x.q.at[jnp.minimum(first + i, p.tokens - 1), s.unit]
                plgpu.copy_gmem_to_smem(source, raw.at[pl.ds(i * form.part, form.part)], here)
                return carry

            lax.fori_loop(0, form.span, token, jnp.int32(0))


class Preparer(Crew):
    """Makes tiles what the matrix unit takes."""

    def run(self) -> None:
        """All tiles of all blocks."""
        plgpu.set_max_registers(self.form.registers[1], action="decrease")

        def block(s: Block, tiles) -> None:
            def step(t, carry):
                if self.relays:
                    self.relay_keys(s, t, tiles + t)
                self.relay_values(s, t, tiles + t)
                return carry

            lax.fori_loop(0, s.count, step, jnp.int32(0))

        tiles = self.each_block(block)
        if self.narrow:
            self.drain(self.v_used, self.form.wide, tiles)

    def relay_values(self, s: Block, t, n) -> None:
        """Values of a tile where the matrix unit can read them, zero where no row looks: 0 x NaN is NaN."""
        form, first = self.form, s.tile(t) * self.form.tile
        ends = first + form.tile > s.end
        slot, out = lax.rem(n, jnp.int32(form.values)), lax.rem(n, jnp.int32(form.value_slots(self.p)))
        plgpu.barrier_wait(self.v_here.at[slot])
        source = self.v_ring.at[slot]

        def real(layout):
            token = plgpu.broadcasted_iota(jnp.int32, source.shape, 0, layout=layout)
            return token + first < s.end

        def widen(masked: bool) -> None:
            layout = row_layout(self.p.v_head_dim, 2)
            x = plgpu.load(source, layout=layout, optimized=False).astype(form.wide_type)
            self.v_wide[out] = jnp.where(real(layout), x, jnp.zeros((), x.dtype)) if masked else x

        def clean() -> None:
            x = plgpu.load(source, layout=Layout.WGMMA)
            source[...] = jnp.where(real(Layout.WGMMA), x, jnp.zeros((), x.dtype))
            plgpu.commit_smem()

        if self.narrow:
            pl.when(n >= form.wide)(lambda: plgpu.barrier_wait(self.v_used.at[out]))
            pl.when(ends)(lambda: widen(True))
            pl.when(jnp.logical_not(ends))(lambda: widen(False))
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.v_free.at[slot])
        else:
            pl.when(ends)(clean)
        plgpu.barrier_arrive(self.v_ready.at[out])

    def relay_keys(self, s: Block, t, n) -> None:
        """Keys that are widened, or whose scales come with them."""
        slot = lax.rem(n, jnp.int32(self.form.keys))
        plgpu.barrier_wait(self.k_here.at[slot])
        if self.k_wide is not None:
            x = plgpu.load(self.k_ring.at[slot], layout=row_layout(self.p.head_dim, 2), optimized=False)
            self.k_wide[slot] = x.astype(self.form.operand)
        if self.per_token:
            self.fetch_scales(s, self.x.k_scale, self.k_scales, t, slot)
            self.fetch_scales(s, self.x.v_scale, self.v_scales, t, slot)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.k_ready.at[slot])

    def fetch_scales(self, s: Block, scale, to, t, slot) -> None:
        """Scales per token of a tile; copies by TMA would have to begin at multiples of 128 bytes."""
        size, tile = min(self.p.page_size, self.form.tile), s.tile(t)
        inside = self.inside(tile)
        for j, page in enumerate(self.pages(s, t)):
            page = jnp.clip(page, 0, self.p.pages - 1)
            where = (page, s.head, inside) if self.p.layout.head_major else (page, inside, s.head)
            to[slot, pl.ds(j * size, size)] = plgpu.load(scale.at[where], layout=token_layout(size), optimized=False)
