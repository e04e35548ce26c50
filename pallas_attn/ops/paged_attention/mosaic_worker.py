"""The body of the decode kernel: one worker's walk over its tiles (see `mosaic_decode`)."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.core.formats import INT8
from pallas_attn.ops.paged_attention.mosaic_config import FP8, Config, Form
from pallas_attn.ops.paged_attention.mosaic_share import find, share, tally, tiles
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import (
    ACC,
    LOG2E,
    OVER_COLUMNS,
    OVER_ROWS,
    Layout,
    row_layout,
    token_layout,
)  # fmt: skip

FAR = -1e30  # stands for -inf in the running maximum: -inf less -inf is NaN


class Inputs(NamedTuple):
    """What the kernel reads from global memory; what is absent is one number."""

    q: Any  # [T, V, part, D]
    buffers: tuple  # the cache's, heads and dims of a token that lie together merged
    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    live: Any  # [1]
    before: Any  # Schedule.before, or None: the workers count
    scale: Any  # [1]
    q_scale: Any  # [1], or [T, V, part]
    k_scale: Any  # as the cache has it, at least [1]
    v_scale: Any  # the same where it is one per token, else absent
    cap: Any  # [1]
    window: Any  # [1]
    causal: Any  # [B] or absent


def scale_at(ref, rank: int, b, head):
    """The scale of a (sequence, kv head) from one per tensor, head or (sequence, head)."""
    return ref[0] if rank == 0 else ref[head] if rank == 1 else ref[b, head]


SCALE_RANK = {"tensor": 0, "head": 1, "seq_head": 2}


class Sequence(NamedTuple):
    """One sequence of the step, every number kept inside the step and the page table."""

    kv_len: Any
    start: Any  # first query token
    q_len: Any

    @classmethod
    def read(cls, p: Problem, x: Inputs, b) -> "Sequence":
        """Sequence b; padding has no query tokens, nor has one that is too long: in a mixed step it is prefill's."""
        start = jnp.clip(x.cu_q_lens[b], 0, p.tokens)
        end = jnp.clip(x.cu_q_lens[b + 1], 0, p.tokens)
        own = (b < x.live[0]) & (end - start <= (p.max_q_len or 1))
        q_len = jnp.where(own, jnp.maximum(end - start, 0), 0)
        return cls(jnp.clip(x.kv_lens[b], 0, p.pages_per_seq * p.page_size), start, q_len)


class _Segment(NamedTuple):
    """The part of one sequence that a worker reads."""

    b: Any
    seq: Sequence
    tile0: Any  # its first tile of the sequence
    count: Any  # tiles
    low: Any  # the first token that any row sees


class _State(NamedTuple):
    """Running result of one kv head: O^T [D, rows], maximum [rows], sum by token [TILE, rows]."""

    acc: Any
    top: Any
    total: Any


@dataclasses.dataclass
class Worker:
    """The body of the kernel: one CTA's walk over its tiles."""

    p: Problem
    form: Form
    config: Config
    workers: int
    x: Inputs
    partial: Any
    stats: Any
    q_tile: Any
    rings: Any
    phases: Any
    p_tile: Any
    row_values: Any
    q_ready: Any
    ready: Any
    token_scales: Any = None
    counted: Any = None  # where the tiles before each sequence go for the merge if there is no schedule

    def run(self) -> None:
        """All sequences that the worker has tiles of; the last results may still be on their way."""
        p, form, x = self.p, self.form, self.x
        self.narrow = p.kv_format.dtype.itemsize == 1
        self.widen_keys = p.kv_format.dtype == INT8
        self.per_token = p.kv_format.granularity == "token_head"
        self.raw_q, self.o_tile = self.phases[0], self.phases[1]
        self.factor, self.stats_tile = self.row_values
        self.wide: Any = self.phases[2] if self.narrow else None
        self.worker, column = lax.axis_index("worker"), lax.axis_index("column")
        self.block = lax.rem(column, jnp.int32(form.blocks)) if form.blocks > 1 else jnp.int32(0)
        self.unit = lax.div(column, jnp.int32(form.blocks)) * self.config.heads  # first of V = K * parts virtual heads
        self.head = lax.div(self.unit, jnp.int32(form.parts))
        # Numbers that are wanted late are asked for early.
        rank = SCALE_RANK.get(p.kv_format.granularity)
        self.scale = x.scale[0] * x.k_scale[0] if rank == 0 else x.scale[0]
        before = self.count(column) if x.before is None else x.before
        total, each = share(before, p.seqs, self.workers)
        self.start = jnp.minimum(self.worker * each, total)
        self.end = jnp.minimum(self.start + each, total)
        first, last = find(before, self.start, self.end - 1)
        touched = jnp.where(self.end > self.start, last - first + 1, 0)
        lax.fori_loop(0, touched, lambda i, begin: self.segment(first + i, begin), before[first])

    def count(self, column):
        """What the schedule would hold, here until the first query comes, and by the first worker for the merge."""
        before = tally(self.p, self.x, self.phases[-1])

        def leave() -> None:
            for at in range(0, before.shape[0], 128):
                plgpu.copy_smem_to_gmem(before.at[pl.ds(at, 128)], self.counted.at[pl.ds(at, 128)])

        pl.when((self.worker == 0) & (column == 0))(leave)
        return before

    # Loading

    def page_of(self, s: _Segment, tile, j: int):
        """Page of the j-th part of a tile, kept inside the table and the cache; the last real page past the end."""
        p = self.p
        column = lax.div(tile * TILE, jnp.int32(p.page_size)) + j
        column = jnp.minimum(column, lax.div(jnp.maximum(s.seq.kv_len - 1, 0), jnp.int32(p.page_size)))
        return jnp.clip(self.x.page_table[s.b, column], 0, p.pages - 1)

    def inside(self, tile):
        """Slots of a page that a tile takes."""
        p = self.p
        if p.page_size <= TILE:
            return pl.ds(0, p.page_size)
        return pl.ds(lax.rem(tile * TILE, jnp.int32(p.page_size)), TILE)

    def sources(self, page, tile) -> list:
        """What fills each ring: slots of a page by columns, from global memory."""
        p, depth, heads, inside = self.p, self.p.head_dim, self.config.heads, self.inside(tile)
        where = (page, self.head, inside) if p.layout.head_major else (page, inside)
        cut = lambda ref, at, width: ref.at[(*where, pl.ds(at, width))]  # noqa: E731
        base = 0 if p.layout.head_major else self.head * depth
        if not p.layout.single:
            return [cut(ref, base, heads * depth) for ref in self.x.buffers]
        pages = self.x.buffers[0]
        if self.form.merged:
            return [cut(pages, 2 * base, 2 * depth)]
        return [cut(pages, 2 * base, depth), cut(pages, 2 * base + depth, depth)]

    def fetch(self, s: _Segment, tile, slot) -> None:
        """Start the copies of one tile; scales per token come at once."""
        size = min(self.p.page_size, TILE)
        for j in range(TILE // size):
            page, to = self.page_of(s, tile, j), pl.ds(j * size, size)
            for source, ring in zip(self.sources(page, tile), self.rings, strict=True):
                plgpu.copy_gmem_to_smem(source, ring.at[slot, to], self.ready.at[slot])
            if self.per_token:
                self.fetch_scales(page, tile, slot, to, size)

    def fetch_scales(self, page, tile, slot, to, size: int) -> None:
        """Scales per token of one page's part of a tile; copies by TMA would have to begin at multiples of 128."""
        inside = self.inside(tile)
        for h in range(self.config.heads):
            head = self.head + h
            where = (page, head, inside) if self.p.layout.head_major else (page, inside, head)
            for side, scale in enumerate((self.x.k_scale, self.x.v_scale)):
                got = plgpu.load(scale.at[where], layout=token_layout(size), optimized=False)
                self.token_scales[slot, side, h, to] = got

    def load_query(self, s: _Segment) -> None:
        """The block's query rows as stacked terms in `q_tile`, and the factor that turns a row's sums to logits."""
        p, form = self.p, self.form
        first = self.block * form.span
        for h in range(self.config.heads):
            for i in range(form.span):
                token = jnp.clip(s.seq.start + first + i, 0, p.tokens - 1)
                rows = self.raw_q.at[h, pl.ds(i * form.part, form.part)]
                plgpu.copy_gmem_to_smem(self.x.q.at[token, self.unit + h], rows, self.q_ready)
        plgpu.barrier_wait(self.q_ready)
        for h in range(self.config.heads):
            self.split_query(s, h)
        plgpu.commit_smem()

    def split_query(self, s: _Segment, h: int) -> None:
        """One head's rows as terms of the matrix unit's type, the first the row rounded, the next what is left."""
        p, form = self.p, self.form
        rows, shape = form.rows, (form.rows, p.head_dim)
        layout = row_layout(p.head_dim)
        x = plgpu.load(self.raw_q.at[h], layout=layout, optimized=False)
        if p.q_format.dtype != jnp.float32:
            x = x.astype(jnp.float16 if p.q_format.quantized else jnp.float32)
        if form.part * form.span < rows:  # rows past the block's hold anything
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            x = jnp.where(row < form.part * form.span, x, jnp.zeros((), x.dtype))
        if p.q_format.quantized:
            self.q_tile[h] = x.astype(form.operand) if form.operand != jnp.bfloat16 else via_f32(x, form.operand)
            return self.given_factor(s, h)
        # Rows are scaled by a power of two, which is exact, to at least half of what FP8 holds.
        top = jnp.max(jnp.abs(x), axis=1)
        power = lax.bitcast_convert_type(jnp.clip(top, 2.0**-100, 2.0**100), jnp.int32) & 0x7F800000
        up = lax.bitcast_convert_type(jnp.int32(254 << 23) - power + jnp.int32(7 << 23), jnp.float32)
        self.factor[h] = lax.bitcast_convert_type(power - jnp.int32(7 << 23), jnp.float32)
        x = x * lax.broadcast_in_dim(up, shape, [0])
        for term in range(form.terms):
            part = x.astype(form.operand)
            self.q_tile[h, pl.ds(term * rows, rows)] = part
            if term + 1 < form.terms:
                x = x - (part.astype(jnp.float16) if form.operand in FP8 else part).astype(jnp.float32)
        return None

    def given_factor(self, s: _Segment, h: int) -> None:
        """The scales of a quantised query, one of all rows or each row's own."""
        p, form, scale = self.p, self.form, self.x.q_scale
        for row in range(form.rows):
            i, g = divmod(row, form.part)
            if scale.ndim > 1 and i < form.span:
                token = jnp.clip(s.seq.start + self.block * form.span + i, 0, p.tokens - 1)
                self.factor[h, row] = scale[token, self.unit + h, g]
            else:
                self.factor[h, row] = scale[0] if scale.ndim == 1 else jnp.float32(0)

    # Computing

    def segment(self, b, begin):
        """One sequence of the worker's, whose tiles begin at `begin` of the flat list: its partial result goes to slot
        worker + b. Returns where the next one's tiles begin."""
        p, x, config = self.p, self.x, self.config
        seq = Sequence.read(p, x, b)
        # Both worker and sequence rise along the list, so no two pairs share a slot.
        slot = self.worker + b
        low, skipped = jnp.int32(0), jnp.int32(0)
        if "window" in p.options:
            window, oldest = x.window[0], seq.kv_len - seq.q_len + 1
            skipped = lax.div(jnp.where(window > 0, jnp.maximum(oldest - window, 0), 0), jnp.int32(TILE))
            low = jnp.where(window > 0, jnp.maximum(oldest + self.block * self.form.span - window, 0), 0)
        following = begin + tiles(p, x, b, x.kv_lens[b], x.cu_q_lens[b + 1] - x.cu_q_lens[b])
        tile0 = skipped + jnp.maximum(self.start - begin, 0)
        count = skipped + jnp.minimum(self.end, following) - begin - tile0
        s = _Segment(b, seq, tile0, count, low)
        for stage in range(config.stages):
            pl.when(stage < count)(lambda stage=stage: self.fetch(s, tile0 + stage, stage))
        plgpu.wait_smem_to_gmem(0)  # the last segment's result has left
        plgpu.commit_smem()  # and every warp is done with its query
        self.load_query(s)
        factors = [self.row_factor(s, h) for h in range(config.heads)]
        rows, depth = self.form.rows, p.head_dim
        state = tuple(
            _State(
                plgpu.layout_cast(jnp.zeros((depth, rows), jnp.float32), Layout.WGMMA),
                plgpu.layout_cast(jnp.full((rows,), FAR, jnp.float32), OVER_COLUMNS),
                plgpu.layout_cast(jnp.zeros((TILE, rows), jnp.float32), Layout.WGMMA),
            )
            for _ in range(config.heads)
        )
        # Tiles that every row sees whole need no mask.
        seen = self.last_of_all(seq)
        whole = jnp.clip(lax.div(seen, jnp.int32(TILE)) - tile0, 0, count)
        if "window" in p.options:
            whole = jnp.int32(0)
        state = lax.fori_loop(0, whole, lambda t, c: self.step(s, factors, t, c, masked=False), state)
        state = lax.fori_loop(whole, count, lambda t, c: self.step(s, factors, t, c, masked=True), state)
        for h in range(config.heads):
            acc, top, total = state[h]
            self.o_tile.at[h].transpose((1, 0))[...] = plgpu.layout_cast(acc, Layout.WGMMA_TRANSPOSED)
            self.stats_tile[h, 0] = top
            self.stats_tile[h, 1] = jnp.sum(total, axis=0)
        plgpu.commit_smem()
        for h in range(config.heads):
            column = self.form.column(self.unit, h, self.block)
            plgpu.copy_smem_to_gmem(self.o_tile.at[h], self.partial.at[slot, column])
            plgpu.copy_smem_to_gmem(self.stats_tile.at[h], self.stats.at[slot, column])
        return following

    def last_of_all(self, seq: Sequence):
        """How many tokens from the first every row of the block sees, a window aside."""
        if self.p.max_q_len == 1 or "non-causal" in self.p.options:
            return seq.kv_len
        return jnp.clip(seq.kv_len - seq.q_len + self.block * self.form.span + 1, 0, seq.kv_len)

    def row_factor(self, s: _Segment, h: int):
        """[rows]: what turns the sums of codes to logits; to base 2 unless the soft cap comes between."""
        p, x = self.p, self.x
        scale, rank = self.scale, SCALE_RANK.get(p.kv_format.granularity)
        if rank:
            scale = scale * scale_at(x.k_scale, rank, s.b, self.head + h)
        if "soft cap" not in p.options:
            scale = scale * jnp.float32(LOG2E)
        return plgpu.load(self.factor.at[h], layout=OVER_COLUMNS, optimized=False) * scale

    def part_of(self, slot, h: int, value: bool):
        """Keys or values [TILE, D] of a ring's slot."""
        depth = self.p.head_dim
        ring = self.rings[-1 if value else 0].at[slot]
        at = depth * value if self.form.merged else h * depth
        return ring if ring.shape[1] == depth else ring.at[:, pl.ds(at, depth)]

    def spread(self, row, count: int):
        """[rows] as [count, rows]."""
        return lax.broadcast_in_dim(row, (count, self.form.rows), [1])

    def cap(self, s):
        """The soft cap, to base 2; one that is not positive is none."""
        cap = self.x.cap[0]
        bound, on = jnp.where(cap > 0, cap, 1.0), jnp.where(cap > 0, 1.0, 0.0)
        tanh = 1.0 - 2.0 / (jnp.exp2(s * (2.0 * jnp.float32(LOG2E) / bound)) + 1.0)
        return (tanh * (bound * on) + s * (1.0 - on)) * jnp.float32(LOG2E)

    def visible(self, s: _Segment, tile):
        """bool [TILE, rows]."""
        p, rows = self.p, self.form.rows
        token = plgpu.broadcasted_iota(jnp.int32, (TILE, rows), 0, layout=Layout.WGMMA) + tile * TILE
        if p.max_q_len == 1:
            return (token < s.seq.kv_len) & (token >= s.low)
        row = plgpu.broadcasted_iota(jnp.int32, (TILE, rows), 1, layout=Layout.WGMMA)
        position = s.seq.kv_len - s.seq.q_len + self.block * self.form.span + lax.div(row, jnp.int32(self.form.part))
        seen = token < s.seq.kv_len
        if "per-sequence causal" in p.options:
            seen &= (token <= position) | (self.x.causal[s.b] == 0)
        elif "non-causal" not in p.options:
            seen &= token <= position
        if "window" in p.options:
            window = self.x.window[0]
            seen &= (token > position - window) | (window <= 0)
        return seen

    def real_tokens(self, s: _Segment, tile, layout, shape):
        """bool, whether a token (axis 0) is one that some row sees: what else is there may be NaN."""
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + tile * TILE
        return (token < s.seq.kv_len) & (token >= s.low)

    def step(self, s: _Segment, factors, t, states, *, masked: bool):
        """One tile."""
        config, rows, depth = self.config, self.form.rows, self.p.head_dim
        slot, tile = lax.rem(t, jnp.int32(config.stages)), s.tile0 + t
        plgpu.barrier_wait(self.ready.at[slot])
        if self.widen_keys:
            plgpu.commit_smem()  # every warp is done with the last tile's widened values
            for h in range(config.heads):
                self.wide[h] = self.widen(slot, h, value=False)
            plgpu.commit_smem()
        seen: Any = self.visible(s, tile) if masked else None
        logits = self.logits(slot, factors)
        new = []
        for h in range(config.heads):
            logit, log_scale = self.scaled_by_token(s, tile, slot, h, logits[h], masked)
            logit = jnp.where(seen, logit, FAR) if masked else logit
            acc, top, total = states[h]
            peak = jnp.maximum(top, jnp.max(logit, axis=0))
            keep, weight = jnp.exp2(top - peak), jnp.exp2(logit - self.spread(peak, TILE))
            weight = jnp.where(seen, weight, 0.0) if masked else weight
            mass = weight
            if log_scale is not None:  # the weight carries the value's scale, the sum must not
                mass = weight * lax.broadcast_in_dim(jnp.exp2(-log_scale), (TILE, rows), [0])
            total = total * self.spread(keep, TILE) + mass
            self.p_tile.at[h].transpose((1, 0))[...] = plgpu.layout_cast(
                weight.astype(self.form.wide), Layout.WGMMA_TRANSPOSED
            )
            self.prepare_values(s, tile, slot, h, masked)
            new.append((acc, peak, total, keep))
        plgpu.commit_smem()
        if self.narrow:  # the ring's slot is free once its values are widened
            self.refill(s, t, slot)
        done = []
        for h, (acc, peak, total, keep) in enumerate(new):
            product = self.weighted_values(slot, h)
            done.append(_State(acc * self.spread(keep, depth) + product, peak, total))
        if not self.narrow:
            plgpu.commit_smem()  # every warp is done with the slot
            self.refill(s, t, slot)
        return tuple(done)

    def refill(self, s: _Segment, t, slot) -> None:
        """Start the copies of the tile that comes next in the slot of tile t."""
        ahead = t + self.config.stages
        pl.when(ahead < s.count)(lambda: self.fetch(s, s.tile0 + ahead, slot))

    def logits(self, slot, factors) -> list:
        """S^T [TILE, rows] of each head, in float32."""
        rows, n = self.form.rows, self.form.terms * self.form.rows

        def multiply(*accs):
            for h, acc in enumerate(accs):
                keys = self.wide.at[h] if self.widen_keys else self.part_of(slot, h, value=False)
                plgpu.wgmma(acc, keys, self.q_tile.at[h].transpose((1, 0)))
            return [acc[...] for acc in accs]

        sums = pl.run_scoped(multiply, *[ACC((TILE, n), jnp.float32)] * self.config.heads)
        out = []
        for s, factor in zip(sums, factors, strict=True):
            total = s[:, :rows]
            for term in range(1, self.form.terms):
                total = total + s[:, term * rows : (term + 1) * rows]
            s = total * self.spread(factor, TILE)
            out.append(s)
        return out

    def scaled_by_token(self, s: _Segment, tile, slot, h: int, logit, masked: bool):
        """(logits to base 2 with the keys' scales and the logarithm of the values', that logarithm or None)."""
        capped = "soft cap" in self.p.options
        if not self.per_token:
            return (self.cap(logit) if capped else logit), None
        k_scale, v_scale = (
            plgpu.load(self.token_scales.at[slot, side, h], layout=OVER_ROWS, optimized=False) for side in (0, 1)
        )
        if masked:
            real = self.real_tokens(s, tile, OVER_ROWS, (TILE,))
            k_scale, v_scale = jnp.where(real, k_scale, 0.0), jnp.where(real, v_scale, 1.0)
        over = lambda v: lax.broadcast_in_dim(v, (TILE, self.form.rows), [0])  # noqa: E731
        logit = logit * over(k_scale)
        logit = self.cap(logit) if capped else logit
        log_scale = jnp.log2(jnp.maximum(v_scale, 2.0**-100))
        return logit + over(log_scale), log_scale

    def widen(self, slot, h: int, value: bool):
        """A narrow tile as f16 registers."""
        return plgpu.load(self.part_of(slot, h, value), layout=Layout.WGMMA_UPCAST_2X).astype(self.form.wide)

    def prepare_values(self, s: _Segment, tile, slot, h: int, masked: bool) -> None:
        """Values where the matrix unit can read them; an unwritten slot may hold NaN, and 0 x NaN is NaN."""
        shape = (TILE, self.p.head_dim)
        if self.narrow:
            wide = self.widen(slot, h, value=True)
            if masked:
                real = self.real_tokens(s, tile, Layout.WGMMA_UPCAST_2X, shape)
                wide = jnp.where(real, wide, jnp.zeros((), self.form.wide))
            self.wide[h] = wide
        elif masked:
            ref = self.part_of(slot, h, value=True)
            real = self.real_tokens(s, tile, Layout.WGMMA, shape)
            ref[...] = jnp.where(real, plgpu.load(ref, layout=Layout.WGMMA), jnp.zeros((), self.form.wide))

    def weighted_values(self, slot, h: int):
        """V^T P^T [D, rows]."""

        def multiply(acc):
            values = self.wide.at[h] if self.narrow else self.part_of(slot, h, value=True)
            plgpu.wgmma(acc, values.transpose((1, 0)), self.p_tile.at[h].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, ACC((self.p.head_dim, self.form.rows), jnp.float32))


def via_f32(x, dtype):
    """No unit converts FP8 to bf16 directly."""
    return x.astype(jnp.float32).astype(dtype)
