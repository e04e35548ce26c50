"""The body of the prefill kernel: one block of query tokens against all that it sees (see `mosaic_prefill`)."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import INT8
from pallas_attn.ops.paged_attention.mosaic_config import FP8
from pallas_attn.ops.paged_attention.mosaic_merge import _round
from pallas_attn.ops.paged_attention.mosaic_worker import FAR, SCALE_RANK, _via_f32, scale_at
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import ACC, LOG2E, OVER_COLUMNS, OVER_ROWS, ROWS, Layout, row_layout, token_layout

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
WARPGROUPS = 2  # that compute; one more loads and widens
COMPUTES, LOADS = 216, 72  # registers of a thread, of three times 168: if they asked for more they would wait for ever
EVER = 2**30  # tokens: more than any sequence has


class Form(NamedTuple):
    """The static shape of the kernel for one problem: row i * part + g of a warpgroup is head g of its token i."""

    tile: int  # tokens of a step
    part: int  # query heads of a block
    parts: int  # blocks that a group of heads takes
    span: int  # tokens of a warpgroup
    terms: int  # of the query, which add up
    operand: Any  # dtype of Q and K in the matrix unit
    wide_type: Any  # dtype of V and P in the matrix unit
    keys: int
    values: int
    wide: int

    def value_slots(self, p: Problem) -> int:
        """Tiles of values that the matrix unit can read."""
        return self.wide if p.kv_format.dtype.itemsize == 1 else self.values

    def relays_keys(self, p: Problem) -> bool:
        """Whether keys pass through the third warpgroup's hands."""
        return p.kv_format.dtype == INT8 or p.kv_format.granularity == "token_head"


class Inputs(NamedTuple):
    """What the kernel reads from global memory; what is absent is one number."""

    q: Any  # [T, V, part, D]
    buffers: tuple  # the cache's, heads and dims of a token that lie together merged
    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    live: Any  # [1]
    scale: Any  # [1]
    q_scale: Any  # [1], [V, part] or [T, V, part]
    k_scale: Any  # as the cache has it, at least [1]
    v_scale: Any
    cap: Any  # [1]
    window: Any  # [1]
    causal: Any  # [B] or absent
    sinks: Any  # [V, part] or absent
    out_scale: Any  # [1]


class _Rows(NamedTuple):
    """Running result of a warpgroup's rows besides the sum of values: maximum and sum [64], weights [64, tile]."""

    top: Any
    total: Any
    weights: Any


@dataclasses.dataclass
class Block:
    """The body of the kernel: one CTA's block."""

    p: Problem
    form: Form
    blocks: int
    x: Inputs
    outs: tuple
    of_query: Any
    row_values: Any
    k_ring: Any
    v_ring: Any
    q_here: Any
    k_here: Any
    v_here: Any
    k_used: Any
    v_ready: Any
    v_used: Any
    v_wide: Any = None
    k_ready: Any = None
    k_wide: Any = None
    stand_ins: Any = None  # for accumulators, in the interpreter
    k_scales: Any = None
    v_scales: Any = None

    def run(self) -> None:
        """Find the block's sequence and, if there is something to do, do each warpgroup's part."""
        p, form, x = self.p, self.form, self.x
        self.narrow = p.kv_format.dtype.itemsize == 1
        self.per_token = p.kv_format.granularity == "token_head"
        self.relays = form.relays_keys(p)
        self.wide_layout = row_layout(p.head_dim, 2)
        self.raw_q, self.q_tile, self.o_tile = self.of_query
        cell, units = lax.axis_index("cell"), jnp.int32(p.kv_heads * form.parts)
        # The last blocks of a sequence see most: they begin first.
        index = self.blocks - 1 - lax.div(cell, units)
        self.unit = lax.rem(cell, units)
        self.head = lax.div(self.unit, jnp.int32(form.parts))
        self.live = jnp.clip(x.live[0], 0, p.seqs)
        tokens = WARPGROUPS * form.span
        number = self.find(index, tokens)
        self.b = jnp.minimum(number, p.seqs - 1)
        # What comes after the last sequence is padding: it sees no key.
        self.real = number < self.live
        self.start = self.first_token(number)
        self.q_len = jnp.where(self.real, self.first_token(number + 1), p.tokens) - self.start
        self.at = (index - self.offset(number, tokens)) * tokens  # first token of the block in its sequence
        self.kv_len = jnp.where(self.real, jnp.clip(x.kv_lens[self.b], 0, p.pages_per_seq * p.page_size), 0)
        self.context = self.kv_len - self.q_len
        pl.when(self.at < self.q_len)(self.work)

    def first_token(self, number):
        """Where the queries of a sequence begin; past the last they end."""
        return jnp.clip(self.x.cu_q_lens[jnp.minimum(number, self.live)], 0, self.p.tokens)

    def offset(self, number, tokens: int):
        """The first block of a sequence."""
        return lax.div(self.first_token(number), jnp.int32(tokens)) + number

    def find(self, index, tokens: int):
        """The last sequence whose blocks begin at or before `index`; the number of sequences for padding."""

        def halve(_, bounds):
            low, high = bounds  # low begins in time, high does not
            middle = lax.div(low + high, jnp.int32(2))
            begins = self.offset(middle, tokens) <= index
            return jnp.where(begins, middle, low), jnp.where(begins, high, middle)

        steps = (self.p.seqs + 1).bit_length()
        return lax.fori_loop(0, steps, halve, (jnp.int32(0), self.live + 1))[0]

    def work(self) -> None:
        """The tiles that the block sees, and the two roles."""
        p, form = self.p, self.form
        first = self.context + self.at  # position of the first row
        last = jnp.minimum(first + WARPGROUPS * form.span, self.kv_len) - 1
        self.end, self.clear = self.kv_len, jnp.minimum(first + 1, self.kv_len)  # clear: seen by every row
        if "per-sequence causal" in p.options:
            causal = self.x.causal[self.b] != 0
            self.end = jnp.where(causal, last + 1, self.end)
            self.clear = jnp.where(causal, self.clear, self.kv_len)
        elif "non-causal" in p.options:
            self.clear = self.kv_len
        else:
            self.end = last + 1
        low = jnp.int32(0)
        self.low_clear = jnp.int32(0)
        if "window" in p.options:
            window = self.x.window[0]
            low = jnp.where(window > 0, jnp.maximum(first - window + 1, 0), 0)
            self.low_clear = jnp.where(window > 0, jnp.maximum(last - window + 1, 0), 0)
        tile = jnp.int32(form.tile)
        self.tile0 = lax.div(low, tile)
        # A block that sees nothing has one tile, all of it masked.
        self.count = jnp.maximum(lax.div(self.end + (form.tile - 1), tile) - self.tile0, 1)
        role = lax.axis_index("warpgroup")
        pl.when(role < WARPGROUPS)(lambda: self.compute(role))
        pl.when(role == WARPGROUPS)(self.load)

    # Loading and widening

    def page_of(self, tile, j: int):
        """Page of the j-th part of a tile as the table has it; the last real page past the end."""
        p = self.p
        column = lax.div(tile * self.form.tile, jnp.int32(p.page_size)) + j
        column = jnp.minimum(column, lax.div(jnp.maximum(self.kv_len - 1, 0), jnp.int32(p.page_size)))
        return self.x.page_table[self.b, column]

    def inside(self, tile):
        """Slots of a page that a tile takes."""
        p, size = self.p, self.form.tile
        if p.page_size <= size:
            return pl.ds(0, p.page_size)
        return pl.ds(lax.rem(tile * size, jnp.int32(p.page_size)), size)

    def source(self, side: int, page, tile):
        """Slots of a page: keys (side 0) or values of the head, in global memory."""
        p, depth, inside = self.p, self.p.head_dim, self.inside(tile)
        where = (page, self.head, inside) if p.layout.head_major else (page, inside)
        at = 0 if p.layout.head_major else self.head * depth
        if p.layout.single:
            return self.x.buffers[0].at[(*where, pl.ds(2 * at + side * depth, depth))]
        return self.x.buffers[side].at[(*where, pl.ds(at, depth))]

    def pages(self, t):
        """The pages of tile t of the block's; those of a tile that is not there are the last one's."""
        tile = self.tile0 + jnp.minimum(t, self.count - 1)
        return tuple(self.page_of(tile, j) for j in range(max(self.form.tile // self.p.page_size, 1)))

    def fetch(self, side: int, t, pages) -> None:
        """Start the copies of keys or values of tile t."""
        ring, here, slots = ((self.k_ring, self.k_here, self.form.keys), (self.v_ring, self.v_here, self.form.values))[
            side
        ]
        slot, size = lax.rem(t, jnp.int32(slots)), min(self.p.page_size, self.form.tile)
        for j, page in enumerate(pages):
            source = self.source(side, jnp.clip(page, 0, self.p.pages - 1), self.tile0 + t)
            plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * size, size)], here.at[slot])

    def load(self) -> None:
        """The third warpgroup: tiles are copied as slots become free, and become what the matrix unit takes."""
        form = self.form
        plgpu.set_max_registers(LOADS, action="decrease")
        for t in range(max(form.keys, form.values)):
            pages = self.pages(jnp.int32(t))
            for side, slots in enumerate((form.keys, form.values)):
                if t < slots:
                    pl.when(t < self.count)(lambda t=t, side=side, pages=pages: self.fetch(side, jnp.int32(t), pages))
        slots = form.value_slots(self.p)

        def step(t, carry):
            next_keys, next_values = carry  # pages, looked up one step before they are wanted
            if self.relays:
                self.relay_keys(t)
            slot, out = lax.rem(t, jnp.int32(form.values)), lax.rem(t, jnp.int32(slots))
            plgpu.barrier_wait(self.v_here.at[slot])
            if self.narrow:
                pl.when(t >= slots)(lambda: plgpu.barrier_wait(self.v_used.at[out]))
            self.pass_values(t, slot, out)
            plgpu.barrier_arrive(self.v_ready.at[out])
            if self.narrow:
                pl.when(t + form.values < self.count)(lambda: self.fetch(1, t + form.values, next_values))
            before = t - 1

            def refill() -> None:
                plgpu.barrier_wait(self.k_used.at[lax.rem(before, jnp.int32(form.keys))])
                pl.when(before + form.keys < self.count)(lambda: self.fetch(0, before + form.keys, next_keys))
                if not self.narrow:
                    plgpu.barrier_wait(self.v_used.at[lax.rem(before, jnp.int32(slots))])
                    pl.when(before + form.values < self.count)(lambda: self.fetch(1, before + form.values, next_values))

            pl.when(t > 0)(refill)
            return self.pages(t + form.keys), self.pages(t + form.values + self.narrow)

        pages = self.pages(jnp.int32(form.keys - 1)), self.pages(jnp.int32(form.values - 1 + self.narrow))
        lax.fori_loop(0, self.count, step, pages)
        # What is still to come: no barrier is left in the middle of a phase that nobody saw.
        plgpu.barrier_wait(self.k_used.at[lax.rem(self.count - 1, jnp.int32(form.keys))])
        left = jnp.maximum(self.count - (slots if self.narrow else 1), 0)

        def drain(t, carry):
            plgpu.barrier_wait(self.v_used.at[lax.rem(t, jnp.int32(slots))])
            return carry

        lax.fori_loop(left, self.count, drain, jnp.int32(0))

    def pass_values(self, t, slot, out) -> None:
        """Values of a tile where the matrix unit can read them, zero where no row looks: 0 x NaN is NaN."""
        form, first = self.form, (self.tile0 + t) * self.form.tile
        ends = first + form.tile > self.end
        source = self.v_ring.at[slot]

        def real(layout):
            token = plgpu.broadcasted_iota(jnp.int32, source.shape, 0, layout=layout)
            return token + first < self.end

        def widen(masked: bool) -> None:
            x = plgpu.load(source, layout=self.wide_layout, optimized=False).astype(form.wide_type)
            self.v_wide[out] = jnp.where(real(self.wide_layout), x, jnp.zeros((), x.dtype)) if masked else x
            plgpu.commit_smem()

        def clean() -> None:
            x = plgpu.load(source, layout=Layout.WGMMA)
            source[...] = jnp.where(real(Layout.WGMMA), x, jnp.zeros((), x.dtype))
            plgpu.commit_smem()

        if self.narrow:
            pl.when(ends)(lambda: widen(True))
            pl.when(jnp.logical_not(ends))(lambda: widen(False))
        else:
            pl.when(ends)(clean)

    def relay_keys(self, t) -> None:
        """Keys that are widened, or whose scales come with them."""
        form = self.form
        slot = lax.rem(t, jnp.int32(form.keys))
        plgpu.barrier_wait(self.k_here.at[slot])
        if self.k_wide is not None:
            x = plgpu.load(self.k_ring.at[slot], layout=self.wide_layout, optimized=False)
            self.k_wide[slot] = x.astype(form.operand)
        if self.per_token:
            for side in range(2):
                self.fetch_scales(side, t, slot)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.k_ready.at[slot])

    def fetch_scales(self, side: int, t, slot) -> None:
        """Scales per token of a tile; copies by TMA would have to begin at multiples of 128 bytes."""
        size, tile = min(self.p.page_size, self.form.tile), self.tile0 + t
        scale, to, inside = (
            (self.x.k_scale, self.x.v_scale)[side],
            (self.k_scales, self.v_scales)[side],
            self.inside(tile),
        )
        for j, page in enumerate(self.pages(t)):
            page = jnp.clip(page, 0, self.p.pages - 1)
            where = (page, self.head, inside) if self.p.layout.head_major else (page, inside, self.head)
            to[slot, pl.ds(j * size, size)] = plgpu.load(scale.at[where], layout=token_layout(size), optimized=False)

    # Computing

    def compute(self, role) -> None:
        """One warpgroup's 64 rows."""
        form, p = self.form, self.p
        plgpu.set_max_registers(COMPUTES, action="increase")
        self.role = role
        self.mine = self.at + role * form.span  # first token of the rows
        self.load_query()
        factor = self.row_factor()
        whole_from = jnp.clip(
            lax.div(self.low_clear + (form.tile - 1), jnp.int32(form.tile)) - self.tile0, 1, self.count
        )
        whole_to = jnp.clip(lax.div(self.clear, jnp.int32(form.tile)) - self.tile0, whole_from, self.count)
        far = plgpu.layout_cast(jnp.full((ROWS,), FAR, jnp.float32), OVER_ROWS)
        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), OVER_ROWS)

        def all_tiles(acc):
            def first(logits):
                self.multiply_keys(logits, jnp.int32(0))
                return self.taken(logits, 0, jnp.int32(0))

            s = self.accumulate(first, 0)
            rows, _ = self.soften(s, factor, jnp.int32(0), far, zero, masked=True)
            rows = rows._replace(weights=rows.weights.astype(form.wide_type))

            def step(t, rows, masked):
                return self.accumulate(lambda logits: self.step(acc, logits, factor, t, rows, masked), 0)

            if "window" in p.options:
                rows = lax.fori_loop(1, whole_from, lambda t, r: step(t, r, True), rows)
            rows = lax.fori_loop(whole_from, whole_to, lambda t, r: step(t, r, False), rows)
            rows = lax.fori_loop(whole_to, self.count, lambda t, r: step(t, r, True), rows)
            self.multiply_values(acc, self.count - 1, rows.weights)
            result = acc[...]
            self.release_values(self.count - 1)
            return result, rows.top, rows.total

        acc, top, total = self.accumulate(all_tiles, 1)
        self.finish(acc, top, total)

    def step(self, acc, logits, factor, t, rows, masked: bool):
        """The logits of tile t become weights while those of the tile before meet their values."""
        self.multiply_keys(logits, t)
        self.multiply_values(acc, t - 1, rows.weights)
        s = self.taken(logits, 1, t)
        rows, keep = self.soften(s, factor, t, rows.top, rows.total, masked)
        # Weights become what the matrix unit reads only when it has read the ones before.
        now, weights = lax.optimization_barrier((acc[...], rows.weights))
        rows = rows._replace(weights=weights.astype(self.form.wide_type))
        self.release_values(t - 1)
        acc[...] = now * lax.broadcast_in_dim(keep, now.shape, [0])
        return rows

    def accumulate(self, body, which: int):
        """body with a zero accumulator: of logits (0) or of values."""
        if INTERPRET is None:
            width = (self.form.tile, self.p.v_head_dim)[which]
            return pl.run_scoped(body, ACC((ROWS, width), jnp.float32))
        acc = self.stand_ins[which].at[self.role]
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        return body(acc)

    def multiply(self, acc, a, b) -> None:
        """Start acc += a b in the matrix unit."""
        if INTERPRET is None:
            plgpu.wgmma(acc, a, b)
        else:
            acc[...] += jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))

    def multiply_keys(self, logits, t) -> None:
        """Start S = Q K^T of tile t."""
        form = self.form
        slot = lax.rem(t, jnp.int32(form.keys))
        plgpu.barrier_wait((self.k_ready if self.relays else self.k_here).at[slot])
        keys = (self.k_ring if self.k_wide is None else self.k_wide).at[slot].transpose((1, 0))
        for term in range(form.terms):
            self.multiply(logits, self.q_tile.at[self.role, pl.ds(term * ROWS, ROWS)], keys)

    def multiply_values(self, acc, t, weights) -> None:
        """Start O += P V of tile t."""
        slot = lax.rem(t, jnp.int32(self.form.value_slots(self.p)))
        plgpu.barrier_wait(self.v_ready.at[slot])
        self.multiply(acc, weights, (self.v_wide if self.narrow else self.v_ring).at[slot])

    def taken(self, logits, running: int, t):
        """The logits, once no more than `running` products are under way; the keys' slot is free then."""
        s = plgpu.wgmma_accumulator_load(logits, wait_n=running) if INTERPRET is None else logits[...]
        s = lax.optimization_barrier(s)
        if not self.per_token:
            self.release_keys(t)
        return s

    def release_keys(self, t) -> None:
        """Tile t's keys, and its scales, are not wanted any more."""
        plgpu.barrier_arrive(self.k_used.at[lax.rem(t, jnp.int32(self.form.keys))])

    def release_values(self, t) -> None:
        """Tile t's values are not wanted any more."""
        plgpu.barrier_arrive(self.v_used.at[lax.rem(t, jnp.int32(self.form.value_slots(self.p)))])

    def soften(self, s, factor, t, top, total, masked: bool):
        """(the rows with the weights of tile t, what is kept of the sums so far)."""
        p, form = self.p, self.form
        over = lambda row: lax.broadcast_in_dim(row, s.shape, [0])  # noqa: E731
        along = lambda column: lax.broadcast_in_dim(column, s.shape, [1])  # noqa: E731
        seen = self.visible(t) if masked else None
        capped = "soft cap" in p.options
        log_scale = None
        if self.per_token:
            k_scale, v_scale = (
                plgpu.load(ref.at[lax.rem(t, jnp.int32(form.keys))], layout=OVER_COLUMNS, optimized=False)
                for ref in (self.k_scales, self.v_scales)
            )
            self.release_keys(t)
            log_scale = jnp.log2(jnp.maximum(v_scale, 2.0**-100))
            s = s * over(factor) * along(k_scale)
            s = (self.cap(s) if capped else s) + along(log_scale)
        elif capped:
            s = self.cap(s * over(factor))
        plain = not capped and not self.per_token
        if seen is not None:
            s = jnp.where(seen, s, FAR)
        peak = jnp.max(s, axis=1)
        peak = jnp.maximum(top, peak * factor if plain else peak)
        keep = jnp.exp2(top - peak)
        weights = jnp.exp2((s * over(factor) if plain else s) - over(peak))
        # The weight carries the value's scale, the sum must not; scales of tokens that are not there may be NaN.
        mass = weights if log_scale is None else weights * along(jnp.exp2(-log_scale))
        if seen is not None:
            mass = jnp.where(seen, mass, 0.0)
            weights = mass if log_scale is None else jnp.where(seen, weights, 0.0)
        total = total * keep + jnp.sum(mass, axis=1)
        return _Rows(peak, total, weights), keep

    def cap(self, s):
        """The soft cap, to base 2; one that is not positive is none."""
        cap = self.x.cap[0]
        bound, on = jnp.where(cap > 0, cap, 1.0), jnp.where(cap > 0, 1.0, 0.0)
        tanh = 1.0 - 2.0 / (jnp.exp2(s * (2.0 * jnp.float32(LOG2E) / bound)) + 1.0)
        return (tanh * (bound * on) + s * (1.0 - on)) * jnp.float32(LOG2E)

    def visible(self, t):
        """bool [64, tile]: which tokens of tile t each row sees."""
        p, form = self.p, self.form
        shape = (ROWS, form.tile)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OVER_ROWS)
        position = self.context + self.mine + lax.div(row, jnp.int32(form.part))
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=Layout.WGMMA) + (self.tile0 + t) * form.tile
        over = lambda x: lax.broadcast_in_dim(x, shape, [0])  # noqa: E731
        beyond = jnp.int32(1)  # the row's own token
        if "per-sequence causal" in p.options:
            beyond = jnp.where(self.x.causal[self.b] != 0, 1, EVER)
        elif "non-causal" in p.options:
            beyond = jnp.int32(EVER)
        seen = token < over(jnp.minimum(position + beyond, self.kv_len))
        if "window" in p.options:
            window = self.x.window[0]
            seen &= token > over(position - jnp.where(window > 0, window, EVER))
        return seen

    # Query and result

    def load_query(self) -> None:
        """The rows as stacked terms in `q_tile`, and in `row_values` what turns a row's sums to logits."""
        p, form = self.p, self.form
        raw = self.raw_q.at[self.role, pl.ds(0, ROWS)]
        first, here = self.start + self.mine, self.q_here.at[self.role]
        if form.part == 1:
            plgpu.copy_gmem_to_smem(self.x.q.at[pl.ds(first, ROWS), self.unit, 0], raw, here)
        else:
            for i in range(form.span):
                source = self.x.q.at[jnp.minimum(first + i, p.tokens - 1), self.unit]
                plgpu.copy_gmem_to_smem(source, raw.at[pl.ds(i * form.part, form.part)], here)
        plgpu.barrier_wait(self.q_here.at[self.role])
        layout = row_layout(p.head_dim)
        x = plgpu.load(raw, layout=layout, optimized=False)
        plgpu.commit_smem()  # terms go where the rows were
        self.split_query(x, layout)
        plgpu.commit_smem()

    def split_query(self, x, layout) -> None:
        """Rows as terms of the matrix unit's type, the first the row rounded, the next what is left."""
        p, form = self.p, self.form
        to = lambda term: self.q_tile.at[self.role, pl.ds(term * ROWS, ROWS)]  # noqa: E731
        # The sign of the scale goes with the query: the factor of a row's sums is not negative then.
        sign = jnp.where(self.x.scale[0] < 0, -1.0, 1.0)
        if p.q_format.quantized:
            x = x.astype(jnp.float16) * sign.astype(jnp.float16)
            to(0)[...] = x.astype(form.operand) if form.operand != jnp.bfloat16 else _via_f32(x, form.operand)
            self.given_factor()
            return
        x = x.astype(jnp.float32)
        # Rows are scaled by a power of two, which is exact, to at least half of what FP8 holds.
        top = jnp.max(jnp.abs(x), axis=1)
        power = lax.bitcast_convert_type(jnp.clip(top, 2.0**-100, 2.0**100), jnp.int32) & 0x7F800000
        up = lax.bitcast_convert_type(jnp.int32(254 << 23) - power + jnp.int32(7 << 23), jnp.float32)
        self.row_values[self.role] = lax.bitcast_convert_type(power - jnp.int32(7 << 23), jnp.float32)
        x = x * lax.broadcast_in_dim(up * sign, x.shape, [0])
        for term in range(form.terms):
            part = x.astype(form.operand)
            to(term)[...] = part
            if term + 1 < form.terms:
                x = x - (part.astype(jnp.float16) if form.operand in FP8 else part).astype(jnp.float32)

    def given_factor(self) -> None:
        """The scales of a quantised query: one of all rows, each head's or each row's own."""
        p, scale = self.p, self.x.q_scale

        def of_row(i, g):
            match len(scale.shape):
                case 1:
                    return scale[0]
                case 2:
                    return scale[self.unit, g]
            return scale[jnp.clip(self.start + self.mine + i, 0, p.tokens - 1), self.unit, g]

        self.each_row(of_row)

    def each_row(self, number) -> None:
        """`row_values` of the warpgroup: one number for every token and head."""

        def token(i, carry):
            for g in range(self.form.part):
                self.row_values[self.role, i * self.form.part + g] = number(i, g)
            return carry

        lax.fori_loop(0, self.form.span, token, jnp.int32(0))

    def row_factor(self):
        """[64]: what turns the sums of codes to logits; to base 2 unless the soft cap comes between."""
        p, x = self.p, self.x
        rank = SCALE_RANK.get(p.kv_format.granularity)
        scale = jnp.abs(x.scale[0])
        if rank is not None:
            scale = scale * scale_at(x.k_scale, rank, self.b, self.head)
        if "soft cap" not in p.options:
            scale = scale * jnp.float32(LOG2E)
        return plgpu.load(self.row_values.at[self.role], layout=OVER_ROWS, optimized=False) * scale

    def finish(self, acc, top, total) -> None:
        """The rows' result leaves, with its one rounding."""
        p, form, x = self.p, self.form, self.x
        values = self.row_values.at[self.role]
        if "sinks" in p.options:
            self.each_row(lambda i, g: x.sinks[self.unit, g])
            plgpu.commit_smem()
            sink = plgpu.load(values, layout=OVER_ROWS, optimized=False) * jnp.float32(LOG2E)
            sink = jnp.maximum(sink + jnp.where(self.real, 0.0, FAR), FAR)
            peak = jnp.maximum(top, sink)
            keep = jnp.exp2(top - peak)
            acc, total = acc * lax.broadcast_in_dim(keep, acc.shape, [0]), total * keep
            total += jnp.where(sink > FAR, jnp.exp2(sink - peak), 0.0)
            top = peak
        some = jnp.where(total > 0, total, 1.0)
        rank = SCALE_RANK.get(p.kv_format.granularity)
        value_scale = 1.0 if rank is None else scale_at(x.v_scale, rank, self.b, self.head)
        result = acc * lax.broadcast_in_dim(value_scale / some, acc.shape, [0])
        result = _round(result, p.out_format, p.out_dtype, x.out_scale[0])
        count = jnp.clip(self.q_len - self.mine, 0, form.span)  # real tokens of the rows
        first, out = self.start + self.mine, self.o_tile.at[self.role, pl.ds(0, ROWS)]
        if p.return_lse:
            values[...] = jnp.where(total > 0, (top + jnp.log2(some)) / jnp.float32(LOG2E), -jnp.inf)
        width = out.shape[1]
        for at in range(0, p.v_head_dim, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # the memory is free: of the query, or of the columns before
            out[...] = result[:, at : at + width]
            plgpu.commit_smem()
            self.put(out, first, count, pl.ds(at, width))
        if p.return_lse:

            def lse(i, carry):
                for g in range(form.part):
                    self.outs[1][first + i, self.unit, g] = self.row_values[self.role, i * form.part + g]
                return carry

            lax.fori_loop(0, count, lse, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def put(self, out, first, count, columns) -> None:
        """Some columns of the rows of the first `count` tokens to where they belong."""
        form, to = self.form, self.outs[0]

        def token(i, carry):
            source = out.at[pl.ds(i * form.part, form.part)]
            plgpu.copy_smem_to_gmem(source, to.at[first + i, self.unit, pl.ds(0, form.part), columns])
            return carry

        if form.part == 1:
            full = count == ROWS
            pl.when(full)(lambda: plgpu.copy_smem_to_gmem(out, to.at[pl.ds(first, ROWS), self.unit, 0, columns]))
            count = jnp.where(full, 0, count)
        lax.fori_loop(0, count, token, jnp.int32(0))
