"""What the attention kernels of MLA share: three warpgroups that walk over tiles of 64 tokens.

Two warpgroups hold half of the value columns of a block's result each, 64 rows of 256; the third has the queries:

    S = Q K^T, weights = exp2(S - max)          the third; the weights go through shared memory
    O = O alpha + weights V                     the first two

Tiles are read through a ring; whoever has read a part of a tile last asks for the one that comes next in its place.
At the end of a sequence the two divide by the sum of the weights. If a worker had all its tiles that is the result,
which is rounded and put in its place; else it is left in float32 for `mosaic_merge` with the logarithm of the sum.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla.mosaic_finish import finish, groups, leave_rows, leave_scales, scatter_scales
from pallas_attn.ops.mla.mosaic_form import HALF, Form, Inputs, Segment, Sequence, find, segment, share
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ACC, LOG2E, OVER_ROWS, ROWS, Layout, swizzled
from pallas_attn.runtime.mosaic_softmax import added, lifted, rescaled, summed

FAR = -1e30  # stands for -inf in the running maximum: -inf less -inf is NaN
PART = 128  # value columns that are finished together
FACTOR, LSE = 2, 3  # rows of shared memory, after those of two tiles


def state(p: Problem, form: Form) -> dict[str, Any]:
    """What the warpgroups tell each other, in shared memory."""
    return {
        "of_rows": plgpu.SMEM((4, ROWS), jnp.float32),  # alpha of two tiles, what to multiply by in the end, the LSE
        "scale_tile": plgpu.SMEM((2, groups(p, HALF) or 1, ROWS), jnp.float32),
        "known": plgpu.SMEM((3, 3, 8), jnp.int32),  # by each warpgroup: of two sequences, and of its own share
        "q_ready": plgpu.Barrier(num_arrivals=2 * (ROWS // form.chunk)),
        "alpha_ready": plgpu.Barrier(num_barriers=2),
        "p_ready": plgpu.Barrier(num_barriers=2),
        "p_free": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "ended": plgpu.Barrier(),
        "taken": plgpu.Barrier(num_arrivals=2),
    }


def stages(p: Problem, columns: int, places: tuple[int, ...] = (2,)) -> list:
    """Where results of each half pass on their way out, as many bytes for each type: partial ones, then final ones."""
    shape = lambda d: (*places, 4 // d.itemsize, ROWS, columns)  # noqa: E731
    types = (jnp.dtype(jnp.float32), jnp.dtype(p.out_dtype))
    return [plgpu.SMEM(shape(d), d, transforms=swizzled(d, columns)) for d in types]


def spread(row, columns: int):
    """[64] as [64, columns]."""
    return lax.broadcast_in_dim(row, (ROWS, columns), [0])


def add_product(acc, multiply, interpret):
    """`acc` plus the products that `multiply` starts. The interpreter cannot begin with a sum that is not 0."""
    if interpret is None:
        return pl.run_state(multiply)(ACC.init(acc))

    def apart(ref):
        multiply(ref)
        return ref[...]

    return acc + pl.run_scoped(apart, ACC(acc.shape, jnp.float32))


@dataclasses.dataclass
class Worker:
    """The body of a kernel: one CTA's walk over its tiles. What kinds of caches do differently is in subclasses."""

    p: Problem
    form: Form
    x: Inputs
    out: Any
    scales: Any  # of groups, or None
    partial: Any  # [2 workers, columns, 64, C]
    stats: Any  # [workers + B, columns, 64]
    interpret: Any
    of_rows: Any
    scale_tile: Any
    known: Any
    q_ready: Any
    alpha_ready: Any
    p_ready: Any
    p_free: Any
    ended: Any
    taken: Any
    memory: Any  # a union with the stages of results: partial ones and final ones come last

    @property
    def plain(self) -> bool:
        """Whether the queries' warpgroup does without branches of its warps."""
        return self.interpret is not None

    def run(self) -> None:
        """All sequences that the worker has tiles of."""
        form, x = self.form, self.x
        self.worker, self.column = lax.axis_index("worker"), lax.axis_index("column")
        self.role = lax.axis_index("role")
        self.cache_scale = x.cache_scale[0]
        self.scale = x.scale[0] * self.cache_scale * jnp.float32(LOG2E)
        total, each = share(x, form)
        start = jnp.minimum(self.worker * each, total)
        end = jnp.minimum(start + each, total)
        first, last = find(x, form, start, end - 1)
        own = first, start, end, jnp.where(end > start, last - first + 1, 0)
        if x.before is None:  # the same for all of a warp, which has registers of its own for such numbers
            self.own = lambda n: own[n]
        else:
            self.remember(2, own)
            self.own = lambda n: self.known[self.role, 2, n]
        pl.when(self.role < 2)(lambda: self.walk(self.prime_values, self.weigh))
        pl.when(self.role == 2)(lambda: self.walk(self.prime_scores, self.score))

    def remember(self, place, numbers) -> None:
        """Numbers to a place in shared memory."""
        for n, number in enumerate(numbers):
            self.known[self.role, place, n] = number
        plgpu.commit_smem()

    def look(self, i) -> None:
        """Find out about the worker's i-th sequence. Global memory is far away where a sequence ends and the next one
        begins, and what all three warpgroups leave in local memory is not found in the L1 any more: so numbers wait
        in shared memory, and are read again after a loop over tiles."""
        b = jnp.clip(self.own(0) + i, 0, self.form.seqs - 1)
        numbers, self.fields = jax.tree.flatten(Sequence.read(self.p, self.form, self.x, b))
        self.remember(lax.rem(i, jnp.int32(2)), numbers)

    def segment(self, i) -> Segment:
        """The worker's i-th sequence, which it has looked at."""
        place = lax.rem(i, jnp.int32(2))
        numbers = [self.known[self.role, place, n] for n in range(self.fields.num_leaves)]
        seq = jax.tree.unflatten(self.fields, numbers)
        first, start, end = map(self.own, range(3))
        return segment(self.p, self.form, seq, first + i, self.worker, self.column, start, end)

    def walk(self, prime, body) -> None:
        """One sequence after the other. `prime(s)` asks for its first tiles; `body(i, s, following)` looks at the next
        one, and calls `following` when there is room for its first tiles."""
        touched = self.own(3)

        def prepare(i) -> None:
            pl.when(i < touched)(lambda: prime(self.segment(i)))

        def none(i) -> None:
            self.look(i + 1)
            prepare(i + 1)

        def one(i, carry):
            s = self.segment(i)
            pl.when(s.count > 0)(lambda: body(i, s, lambda: prepare(i + 1)))
            pl.when(s.count == 0)(lambda: none(i))
            return carry

        self.look(jnp.int32(0))
        prepare(jnp.int32(0))
        lax.fori_loop(0, touched, one, jnp.int32(0))

    # The warpgroup of the queries

    def in_registers(self, ref, layout):
        """An operand of the matrix unit; the interpreter reads them from shared memory only."""
        return plgpu.load(ref, layout=layout) if self.interpret is None else ref

    def fetch_halves(self, s: Segment, latent, rope) -> None:
        """The block's rows of the query, the latent in halves; past the real ones, rows of others."""
        chunk, last = self.form.chunk, self.p.tokens * self.form.heads - self.form.chunk
        for at in range(0, ROWS, chunk):
            row = pl.multiple_of(jnp.minimum(s.row + at, last), chunk)
            rows, to = pl.ds(row, chunk), pl.ds(at, chunk)
            for half in range(2):
                source = self.x.q_latent.at[rows, pl.ds(half * HALF, HALF)]
                plgpu.copy_gmem_to_smem(source, latent.at[half, to], self.q_ready)
            plgpu.copy_gmem_to_smem(self.x.q_rope.at[rows], rope.at[to], self.q_ready)

    def prime_scores(self, s: Segment) -> None:
        """Ask for the first tiles of a segment, as far as this warpgroup does."""
        raise NotImplementedError

    def ask_query(self, s: Segment) -> None:
        """Ask for the block's query."""
        raise NotImplementedError

    def take_query(self, s: Segment) -> Any:
        """What `logits` wants of it, once it is there."""
        raise NotImplementedError

    def logits(self, s: Segment, query, t) -> Any:
        """S [64, TILE] of tile t, to base 2."""
        raise NotImplementedError

    def weights_at(self, t) -> Any:
        """Where the weights [64, TILE] of tile t go."""
        raise NotImplementedError

    def make_room(self, s: Segment, t) -> None:
        """Wait until the weights of tile t may be put there."""

    def after_weights(self, s: Segment, t) -> None:
        """What is left to do once the weights of tile t are there."""

    def after_scores(self, s: Segment) -> None:
        """What is left to do once the last tile's weights are there."""

    def score(self, i, s: Segment, following) -> None:
        """Weights of all the segment's tiles, then the rows' sums."""
        self.ask_query(s)
        self.look(i + 1)
        plgpu.barrier_wait(self.q_ready)
        query = self.take_query(s)
        plain = self.unmasked(s)
        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), OVER_ROWS)
        state = (zero + FAR, zero)

        def loop(low, high, state, masked: bool):
            return lax.fori_loop(low, high, lambda t, c: self.score_tile(s, query, t, c, masked), state)

        if plain is None:
            top, total = loop(0, s.count, state, masked=True)
        else:
            top, total = loop(plain, s.count, loop(0, plain, state, masked=False), masked=True)
        total = summed(total, self.plain)
        some = jnp.where(total > 0, total, 1.0)
        self.of_rows[FACTOR] = jnp.where(total > 0, 1.0 / some, 0.0) * self.cache_scale
        self.of_rows[LSE] = jnp.where(total > 0, top + jnp.log2(some), FAR)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ended)
        s = self.segment(i)
        plgpu.copy_smem_to_gmem(self.of_rows.at[LSE], self.stats.at[s.slot, self.column])
        self.after_scores(s)
        plgpu.barrier_wait(self.p_free.at[lax.rem(s.count - 1, jnp.int32(2))])
        following()
        plgpu.barrier_wait(self.taken)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def score_tile(self, s: Segment, query, t, state, masked: bool) -> tuple:
        """Weights of one tile."""
        top, total = state
        peak, keep, weight = self.weights(s, t, self.logits(s, query, t), top, masked)
        self.leave_weights(s, t, weight)
        total = added(total * keep, weight, self.plain)
        self.after_weights(s, t)
        return peak, total

    def weights(self, s: Segment, t, x, top, masked: bool) -> tuple:
        """(maximum of the rows, what is left of earlier weights, weights of tile t), of its logits."""
        slot = lax.rem(t, jnp.int32(2))
        x = self.masked(s, t, x) if masked else x
        peak = lifted(x, None, top, self.plain)
        keep = jnp.exp2(top - peak)
        self.of_rows[slot] = keep
        plgpu.barrier_arrive(self.alpha_ready.at[slot])
        return peak, keep, jnp.exp2(x - spread(peak, TILE))

    def leave_weights(self, s: Segment, t, weight) -> None:
        """Weights to where the others read them."""
        self.make_room(s, t)
        target = self.weights_at(t)
        target[...] = weight.astype(target.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.p_ready.at[lax.rem(t, jnp.int32(2))])

    def unmasked(self, s: Segment) -> Any:
        """How many tiles at the segment's beginning every row sees whole; None where each one needs a mask."""
        token = lax.div(self.column * ROWS, jnp.int32(self.form.heads))
        seen = jnp.clip(s.seq.kv_len - s.seq.q_len + token + 1, 0, s.seq.kv_len)
        return jnp.clip(lax.div(seen, jnp.int32(TILE)) - s.tile0, 0, s.count)

    def masked(self, s: Segment, t, x):
        """Logits of tile t, so far below any maximum where a row does not see a token that nothing is left of them. No
        row sees past its own token."""
        token = plgpu.broadcasted_iota(jnp.int32, (ROWS, TILE), 1, layout=Layout.WGMMA) + (s.tile0 + t) * TILE
        seen = token < s.seq.kv_len
        if self.form.tokens > 1:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS, TILE), 0, layout=Layout.WGMMA) + self.column * ROWS
            seen &= token <= s.seq.kv_len - s.seq.q_len + lax.div(row, jnp.int32(self.form.heads))
        return jnp.where(seen, x, 2 * FAR)

    def wait_free(self, t) -> None:
        """Until the weights of tile t have been used."""
        pl.when(t >= 0)(lambda: plgpu.barrier_wait(self.p_free.at[lax.rem(t, jnp.int32(2))]))

    # The warpgroups of the values

    def zeros(self):
        """A result that nothing has been added to."""
        return plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), Layout.WGMMA)

    def prime_values(self, s: Segment) -> None:
        """Ask for the first tiles of a segment, as far as these warpgroups do."""
        raise NotImplementedError

    def begin_values(self, s: Segment) -> Any:
        """`zeros`, and what else a segment begins with."""
        raise NotImplementedError

    def ready_values(self, s: Segment, t) -> None:
        """What can be done for tile t before its weights are known."""

    def add_values(self, s: Segment, t, acc) -> Any:
        """`acc` plus weights times values of tile t."""
        raise NotImplementedError

    def after_values(self, s: Segment) -> None:
        """What is left to do once the last tile's products are done."""

    def weigh(self, i, s: Segment, following) -> None:
        """The segment's half of the value columns."""
        acc = self.begin_values(s)
        self.look(i + 1)
        acc = lax.fori_loop(0, s.count, lambda t, c: self.weigh_tile(s, t, c), acc)
        self.after_values(s)
        following()
        plgpu.barrier_wait(self.ended)
        factor = plgpu.load(self.of_rows.at[FACTOR], layout=OVER_ROWS, optimized=False)
        plgpu.barrier_arrive(self.taken)
        parts = [acc[:, at : at + PART] * spread(factor, PART) for at in range(0, HALF, PART)]
        s = self.segment(i)
        pl.when(s.whole)(lambda: self.leave_result(s, parts))
        pl.when(~s.whole)(lambda: self.leave_partial(s, parts))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def weigh_tile(self, s: Segment, t, acc):
        """One tile."""
        slot = lax.rem(t, jnp.int32(2))
        self.ready_values(s, t)
        plgpu.barrier_wait(self.alpha_ready.at[slot])
        keep = plgpu.load(self.of_rows.at[slot], layout=OVER_ROWS, optimized=False)
        acc = rescaled(acc, keep, self.interpret is not None)
        plgpu.barrier_wait(self.p_ready.at[slot])
        acc = self.add_values(s, t, acc)
        plgpu.barrier_arrive(self.p_free.at[slot])
        return acc

    def real_tokens(self, s: Segment, tile, layout, shape):
        """bool, whether a token (axis 0) is one that some row sees: what else is there may be NaN."""
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + tile * TILE < s.seq.kv_len

    # Results

    def leave_result(self, s: Segment, parts: list) -> None:
        """The final values of the half, and their scales."""
        scales = []

        def values():
            for part in parts:
                rounded, own = finish(self.p, part, self.x.out_scale[0], Layout.WGMMA, self.interpret)
                scales.extend(own)
                yield rounded

        self.leave(values(), self.memory[-1], lambda tile, columns: leave_rows(
            tile, self.out, s.row, s.rows, self.form.chunk, columns
        ))  # fmt: skip
        self.leave_groups(s, scales)

    def leave_groups(self, s: Segment, scales: list) -> None:
        """The scales of all groups of columns; through shared memory where rows are of several tokens."""
        p, form, first = self.p, self.form, self.role * len(scales)
        if form.chunk == ROWS and self.interpret is None:
            for i, scale in enumerate(scales):
                scatter_scales(p, form, scale, self.scales, s.row, first + i)
            return
        for i, scale in enumerate(scales):  # every warp is done with the last ones
            self.scale_tile[self.role, i] = scale
        plgpu.commit_smem()
        for i in range(len(scales)):
            leave_scales(p, form, self.scale_tile.at[self.role, i], self.scales, s.row, s.rows, form.chunk, first + i)

    def leave_partial(self, s: Segment, parts: list) -> None:
        """The half's share of the result in float32."""
        to = self.partial.at[s.partial_slot, self.column]
        self.leave(parts, self.memory[-2], lambda tile, columns: leave_rows(
            tile, to, jnp.int32(0), s.rows, self.form.chunk, columns
        ))  # fmt: skip

    def leave(self, parts, stage, copy) -> None:
        """Send the half [64, PART] by [64, PART] through shared memory, as many columns at once as fit."""
        places, width = stage.shape[1], stage.shape[-1]
        pieces = (part[:, at : at + width] for part in parts for at in range(0, PART, width))
        for first in range(0, HALF // width, places):
            if first:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()  # what was there has left, for every warp
            some = list(itertools.islice(pieces, places))
            for i, piece in enumerate(some):
                stage[self.role, i] = piece
            plgpu.commit_smem()
            for i in range(len(some)):
                copy(stage.at[self.role, i], pl.ds(self.role * HALF + (first + i) * width, width))
