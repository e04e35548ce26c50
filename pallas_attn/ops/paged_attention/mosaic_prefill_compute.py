"""The warpgroups of the prefill kernel that compute: 64 rows each, block after block (see `mosaic_prefill`)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.ops.paged_attention.mosaic_config import FP8
from pallas_attn.ops.paged_attention.mosaic_merge import round_to
from pallas_attn.ops.paged_attention.mosaic_prefill_crew import Crew
from pallas_attn.ops.paged_attention.mosaic_prefill_plan import Block, sight
from pallas_attn.ops.paged_attention.mosaic_worker import FAR, SCALE_RANK, scale_at, via_f32
from pallas_attn.runtime.mosaic import ACC, LOG2E, OVER_COLUMNS, OVER_ROWS, ROWS, Layout, row_layout
from pallas_attn.runtime.mosaic_softmax import added, lifted, rescaled, summed

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
FLOOR = -1e29  # least running maximum: weights of logits that are FAR below any are 0


class _Rows(NamedTuple):
    """Running result of a warpgroup's rows besides the sum of values: maximum and sum [64], weights [64, tile]."""

    top: Any
    total: Any
    weights: Any


class Computer(Crew):
    """One of the warpgroups that compute."""

    role: Any
    s: Block  # at work
    before: Any  # tiles of the blocks before it
    mine: Any  # first token of the rows

    def run(self, role) -> None:
        """The warpgroup's 64 rows of every block."""
        plgpu.set_max_registers(self.form.registers[0], action="increase")
        self.role = role

        def block(s: Block, tiles) -> None:
            self.s, self.before = s, tiles
            self.mine = s.at + role * self.form.span  # first token of the rows
            self.take_query()
            self.finish(*self.accumulate(lambda *sums: self.all_tiles(sums), 1))
            if not self.form.ahead:  # the memory of the result is that of the next query
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(self.q_used.at[role])

        self.each_block(block)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def all_tiles(self, sums):
        """(sums of values, maximum, sum) of the rows over all tiles of the block."""
        form, s = self.form, self.s
        factor, tile = self.row_factor(), jnp.int32(form.tile)
        # Tiles that end past what every row sees, then those that all see, then those that begin before it.
        ahead = jnp.clip(s.count - (lax.div(s.clear, tile) - s.tile0), 1, s.count)
        behind = jnp.clip(s.count - (lax.div(s.low_clear + (tile - 1), tile) - s.tile0), ahead, s.count)
        floor = plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), OVER_ROWS)
        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), OVER_ROWS)

        def first(logits):
            self.multiply_keys(logits, jnp.int32(0))
            return self.taken(logits, 0, jnp.int32(0))

        rows, _ = self.soften(self.accumulate(first, 0), factor, jnp.int32(0), floor, zero, masked=True)
        rows = rows._replace(weights=rows.weights.astype(form.wide_type))

        def step(t, rows, masked):
            return self.accumulate(lambda logits: self.step(sums, logits, factor, t, rows, masked), 0)

        rows = lax.fori_loop(1, ahead, lambda t, r: step(t, r, True), rows)
        rows = lax.fori_loop(ahead, behind, lambda t, r: step(t, r, False), rows)
        if "window" in self.p.options:
            rows = lax.fori_loop(behind, s.count, lambda t, r: step(t, r, True), rows)
        self.multiply_values(sums, s.count - 1, rows.weights)
        result = [acc[...] for acc in sums]
        self.release_values(s.count - 1)
        return result, rows.top, summed(rows.total, INTERPRET is not None)

    def step(self, sums, logits, factor, t, rows, masked: bool):
        """The logits of tile t become weights while those of the tile before meet their values."""
        self.multiply_keys(logits, t)
        self.multiply_values(sums, t - 1, rows.weights)
        s = self.taken(logits, 1, t)
        rows, keep = self.soften(s, factor, t, rows.top, rows.total, masked)
        # Weights become what the matrix unit reads only when it has read the ones before.
        now, weights = lax.optimization_barrier(([acc[...] for acc in sums], rows.weights))
        rows = rows._replace(weights=weights.astype(self.form.wide_type))
        self.release_values(t - 1)
        for acc, x in zip(sums, now, strict=True):
            acc[...] = rescaled(x, keep, INTERPRET is not None)
        return rows

    def slot(self, t, slots: int):
        """Where tile t of the block lies in a ring."""
        return lax.rem(self.before + t, jnp.int32(slots))

    def accumulate(self, body, which: int):
        """body with zero accumulators: that of a tile's logits (0), or those of the values' columns."""
        if INTERPRET is None:
            columns = ([self.form.tile], self.form.columns(self.p))[which]
            return pl.run_scoped(body, *[ACC((ROWS, width), jnp.float32) for width in columns])
        accs = [x.at[self.role] for x in self.stand_ins[which]]
        for acc in accs:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
        return body(*accs)

    def multiply(self, acc, a, b) -> None:
        """Start acc += a b in the matrix unit."""
        if INTERPRET is None:
            plgpu.wgmma(acc, a, b)
        else:
            acc[...] += jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))

    def multiply_keys(self, logits, t) -> None:
        """Start S = Q K^T of tile t."""
        form = self.form
        slot = self.slot(t, form.keys)
        plgpu.barrier_wait((self.k_ready if self.relays else self.k_here).at[slot])
        keys = (self.k_ring if self.k_wide is None else self.k_wide).at[slot].transpose((1, 0))
        for term in range(form.terms):
            self.multiply(logits, self.q_tile.at[self.role, pl.ds(term * ROWS, ROWS)], keys)

    def multiply_values(self, sums, t, weights) -> None:
        """Start O += P V of tile t."""
        slot = self.slot(t, self.form.value_slots(self.p))
        plgpu.barrier_wait(self.v_ready.at[slot])
        values = (self.v_wide if self.narrow else self.v_ring).at[slot]
        for i, acc in enumerate(sums):
            width = acc.shape[1]
            self.multiply(acc, weights, values.at[:, pl.ds(i * width, width)] if len(sums) > 1 else values)

    def taken(self, logits, running: int, t):
        """The logits, once no more than `running` products are under way; the keys' slot is free then."""
        s = plgpu.wgmma_accumulator_load(logits, wait_n=running) if INTERPRET is None else logits[...]
        s = lax.optimization_barrier(s)
        if not self.per_token:
            self.release_keys(t)
        return s

    def release_keys(self, t) -> None:
        """Tile t's keys, and its scales, are not wanted any more."""
        plgpu.barrier_arrive(self.k_used.at[self.slot(t, self.form.keys)])

    def release_values(self, t) -> None:
        """Tile t's values are not wanted any more."""
        plgpu.barrier_arrive(self.v_used.at[self.slot(t, self.form.value_slots(self.p))])

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
                plgpu.load(ref.at[self.slot(t, form.keys)], layout=OVER_COLUMNS, optimized=False)
                for ref in (self.k_scales, self.v_scales)
            )
            self.release_keys(t)
            log_scale = jnp.log2(jnp.maximum(v_scale, 2.0**-100))
            s = s * over(factor) * along(k_scale)
            s = (self.cap(s) if capped else s) + along(log_scale)
        elif capped:
            s = self.cap(s * over(factor))
        elif masked:
            s = s * over(factor)
        late = not (capped or self.per_token or masked)  # the factor comes with the subtraction of the maximum
        if seen is not None:
            s = jnp.where(seen, s, FAR)
        peak = lifted(s, factor if late else None, top, INTERPRET is not None)
        keep = jnp.exp2(top - peak)
        mass = weights = jnp.exp2((s * over(factor) if late else s) - over(peak))
        if log_scale is not None:  # the weight carries the value's scale, the sum must not
            mass = weights * along(jnp.exp2(-log_scale))
            if seen is not None:  # scales of tokens that are not there may be NaN
                mass = jnp.where(seen, mass, 0.0)
        total = added(total * keep, mass, INTERPRET is not None)
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
        position = self.s.context + self.mine + lax.div(row, jnp.int32(form.part))
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=Layout.WGMMA) + self.s.tile(t) * form.tile
        over = lambda x: lax.broadcast_in_dim(x, shape, [0])  # noqa: E731
        ahead, behind = sight(p, form, self.x, self.s.b)
        seen = token < over(jnp.minimum(position + ahead, self.s.kv_len))
        if "window" in p.options:
            seen &= token > over(position - behind)
        return seen

    # Query and result

    def take_query(self) -> None:
        """The rows as stacked terms in `q_tile`, and in `row_values` what turns a row's sums to logits."""
        layout = row_layout(self.p.head_dim)
        plgpu.barrier_wait(self.q_here.at[self.role])
        x = plgpu.load(self.raw_q.at[self.role, pl.ds(0, ROWS)], layout=layout, optimized=False)
        if self.form.ahead:
            plgpu.barrier_arrive(self.q_used.at[self.role])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last block's result has left
        plgpu.commit_smem()  # the memory of the terms is free
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
            to(0)[...] = x.astype(form.operand) if form.operand != jnp.bfloat16 else via_f32(x, form.operand)
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
        """The scales of a quantised query: each head's or each row's own, unless there is one of all rows."""
        p, scale = self.p, self.x.q_scale

        def of_row(i, g):
            if len(scale.shape) == 2:
                return scale[self.s.unit, g]
            return scale[jnp.clip(self.s.start + self.mine + i, 0, p.tokens - 1), self.s.unit, g]

        if len(scale.shape) > 1:
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
            scale = scale * scale_at(x.k_scale, rank, self.s.b, self.s.head)
        if "soft cap" not in p.options:
            scale = scale * jnp.float32(LOG2E)
        if p.q_format.quantized and len(x.q_scale.shape) == 1:
            return plgpu.layout_cast(jnp.full((ROWS,), scale * x.q_scale[0], jnp.float32), OVER_ROWS)
        return plgpu.load(self.row_values.at[self.role], layout=OVER_ROWS, optimized=False) * scale

    def finish(self, sums, top, total) -> None:
        """The rows' result leaves, with its one rounding."""
        p, form, x = self.p, self.form, self.x
        values = self.row_values.at[self.role]
        if "sinks" in p.options:
            self.each_row(lambda i, g: x.sinks[self.s.unit, g])
            plgpu.commit_smem()
            sink = plgpu.load(values, layout=OVER_ROWS, optimized=False) * jnp.float32(LOG2E)
            sink = jnp.maximum(sink + jnp.where(self.s.real, 0.0, FAR), FAR)
            peak = jnp.maximum(top, sink)
            keep = jnp.exp2(top - peak)
            sums, total = [acc * lax.broadcast_in_dim(keep, acc.shape, [0]) for acc in sums], total * keep
            total += jnp.where(sink > FAR, jnp.exp2(sink - peak), 0.0)
            top = peak
        some = jnp.where(total > 0, total, 1.0)
        rank = SCALE_RANK.get(p.kv_format.granularity)
        value_scale = 1.0 if rank is None else scale_at(x.v_scale, rank, self.s.b, self.s.head)
        factor = value_scale / some
        sums = [acc * lax.broadcast_in_dim(factor, acc.shape, [0]) for acc in sums]
        sums = [round_to(acc, p.out_format, p.out_dtype, x.out_scale[0]) for acc in sums]
        count = jnp.clip(self.s.q_len - self.mine, 0, form.span)  # real tokens of the rows
        first, out = self.s.start + self.mine, self.o_tile.at[self.role, pl.ds(0, ROWS)]
        if p.return_lse:
            values[...] = jnp.where(total > 0, (top + jnp.log2(some)) / jnp.float32(LOG2E), -jnp.inf)
        width, part = out.shape[1], sums[0].shape[1]
        step = min(width, part)
        for at in range(0, p.v_head_dim, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # the memory is free: of the query, or of the columns before
            for column in range(at, at + width, step):
                piece = sums[column // part][:, column % part : column % part + step]
                (out.at[:, pl.ds(column - at, step)] if step < width else out)[...] = piece
            plgpu.commit_smem()
            self.put(out, first, count, pl.ds(at, width))
        if p.return_lse:

            def lse(i, carry):
                for g in range(form.part):
                    self.outs[1][first + i, self.s.unit, g] = self.row_values[self.role, i * form.part + g]
                return carry

            lax.fori_loop(0, count, lse, jnp.int32(0))

    def put(self, out, first, count, columns) -> None:
        """Some columns of the rows of the first `count` tokens to where they belong."""
        form, to = self.form, self.outs[0]

        def token(i, carry):
            source = out.at[pl.ds(i * form.part, form.part)]
            plgpu.copy_smem_to_gmem(source, to.at[first + i, self.s.unit, pl.ds(0, form.part), columns])
            return carry

        if form.part == 1:
            full = count == ROWS
            pl.when(full)(lambda: plgpu.copy_smem_to_gmem(out, to.at[pl.ds(first, ROWS), self.s.unit, 0, columns]))
            count = jnp.where(full, 0, count)
        lax.fori_loop(0, count, token, jnp.int32(0))
