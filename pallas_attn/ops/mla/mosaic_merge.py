"""The second launch of MLA: sequences that several workers have read are added up, and what no worker writes is
written: the LSE, and zeros for tokens without keys or without a sequence."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.ops.mla.mosaic_finish import filled, finish, grouped, leave_rows, leave_scales
from pallas_attn.ops.mla.mosaic_form import LATENT, Form, Inputs, Sequence, share
from pallas_attn.ops.mla.mosaic_worker import FAR, PART
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import LOG2E, ROWS, SMS, row_layout

REGISTERS = 96  # of each thread for values that are on their way
BANDS = LATENT // PART
WAVES = 4  # CTAs for each SM that keep the memory busy


def merge(p: Problem, form: Form, x: Inputs, results, partial, stats, interpret, following=None) -> list[jax.Array]:
    """The results, and the LSE [T * heads] if asked, from what the workers left. A CTA takes some rows of a sequence,
    of those PART columns.

    following: what a next launch reads before this one has ended, which therefore has to be there when this one begins.
    """
    tall = ROWS
    while tall > form.rows or (tall > 8 and form.seqs * (form.heads * form.tokens // tall) * BANDS < WAVES * SMS):
        tall //= 2
    tiles = -(-form.heads * form.tokens // tall)
    # All loads of a step overlap; as few steps as the registers allow, of the partial results to be expected.
    expected = form.workers // form.seqs + 2
    fit = (REGISTERS // (tall // 8), REGISTERS // (tall * PART // 128))  # of sums, of values
    together = tuple(-(-expected // -(-expected // max(n, 1))) for n in fit)
    memory = [jax.new_ref(r) for r in results]
    out = [jax.ShapeDtypeStruct((p.tokens * form.heads,), jnp.float32)] if p.return_lse else []
    nothing: Any = [None] * len(Inputs._fields)
    needed = ("cu_q_lens", "kv_lens", "live", "before", "out_scale", "listed")
    read = Inputs(*nothing)._replace(**{name: getattr(x, name) for name in needed})
    arrays, tree = jax.tree.flatten((partial, stats, read))
    more = () if following is None else (following,)

    def combine(*refs):
        ins, refs = refs[: len(arrays)], refs[len(arrays) + len(more) :]
        places, rest = refs[: len(memory)], refs[len(memory) :]
        body = Merge(
            p, form, tall, together, jax.tree.unflatten(tree, ins), places, rest[:-2], rest[-2], rest[-1], interpret
        )
        body.run(followed=bool(more))

    kernel = plgpu.kernel(
        combine, out_type=tuple(out), grid=(form.seqs, tiles, BANDS), grid_names=("seq", "tile", "band"),
        scratch_types=[plgpu.SMEM((tall, PART), p.out_dtype), plgpu.SMEM((tall,), jnp.float32)], interpret=interpret,
    )  # fmt: skip
    lse = kernel(*arrays, *more, *memory)
    return [*(jax.freeze(m) for m in memory), *lse]


class Merge:
    """The body of the kernel."""

    def __init__(self, p: Problem, form: Form, tall: int, together: tuple, ins, places, lse, tile, row_tile, interpret):
        self.p, self.form, self.tall, self.together, self.interpret = p, form, tall, together, interpret
        self.partial, self.stats, self.x = ins
        self.out, self.scales = places[0], places[1] if grouped(p) else None
        self.lse: Any = lse[0] if lse else None
        self.tile, self.row_tile = tile, row_tile
        self.layout = row_layout(PART)
        self.of_rows = self.layout.reduce(1)

    def run(self, followed: bool) -> None:
        """One tile."""
        p, form = self.p, self.form
        self.b, self.number, self.band = (lax.axis_index(name) for name in ("seq", "tile", "band"))
        b = self.b
        seq = Sequence.read(p, form, self.x, b).completed(form, b)
        first = self.number * self.tall  # of the sequence's rows
        self.row, self.real = seq.start * form.heads + first, jnp.clip(seq.q_len * form.heads - first, 0, self.tall)
        self.column, self.at = lax.div(first, jnp.int32(ROWS)), lax.rem(first, jnp.int32(ROWS))
        _, each = share(self.x, form)
        self.low = lax.div(seq.begin, each)
        self.parts = jnp.where(seq.tiles > 0, lax.div(seq.begin + seq.tiles - 1, each) - self.low + 1, 0)
        if self.interpret is None:  # launched before the workers have ended: nothing of theirs is read sooner
            plgpu.griddepcontrol_wait()
            if followed:
                plgpu.griddepcontrol_launch_dependents()
        wanted = (self.parts != 1) if self.lse is None else (self.parts != 1) | (self.band == 0)
        pl.when((self.real > 0) & wanted)(self.add_up)
        pl.when(self.number == 0)(lambda: self.clear(b))

    def readers(self, i, together: int) -> list:
        """(worker, what keeps it out of the sum) of the i-th partial results of those that are read together."""
        index = [i * together + j for j in range(together)]
        return [(self.low + jnp.minimum(j, self.parts - 1), jnp.where(j < self.parts, 0.0, FAR)) for j in index]

    def sums(self, readers: list) -> list:
        """The logarithms [tall] of partial results' sums."""
        rows = pl.ds(self.at, self.tall)
        load = lambda s: plgpu.load(self.stats.at[s, self.column, rows], layout=self.of_rows, optimized=False)  # noqa: E731
        return [load(worker + self.b) + far for worker, far in readers]

    def values(self, worker):
        """The tile of a worker's partial result: the first one has the sequence's beginning."""
        slot = 2 * worker + (worker == self.low).astype(jnp.int32)
        at = slot, self.column, pl.ds(self.at, self.tall), pl.ds(self.band * PART, PART)
        return plgpu.load(self.partial.at[at], layout=self.layout, optimized=False)

    def steps(self, together: int):
        """How often so many have to be read."""
        return lax.div(self.parts + (together - 1), jnp.int32(together))

    def add_up(self) -> None:
        """The tile's LSE, then, if there are several partial results or none, its values."""
        zero = plgpu.layout_cast(jnp.zeros((self.tall,), jnp.float32), self.of_rows)

        def count(i, state):
            top, total = state
            each = self.sums(self.readers(i, self.together[0]))
            peak = top
            for s in each:
                peak = jnp.maximum(peak, s)
            total = total * jnp.exp2(top - peak)
            for s in each:
                total = total + jnp.exp2(s - peak)
            return peak, total

        top, total = lax.fori_loop(0, self.steps(self.together[0]), count, (zero + FAR, zero))
        some = top > FAR / 2
        base = jnp.where(some, top + jnp.log2(jnp.where(some, total, 1.0)), 0.0)
        if self.lse is not None:
            lse = jnp.where(some, base / jnp.float32(LOG2E), -jnp.inf)
            pl.when(self.band == 0)(lambda: self.leave_lse(self.row, self.real, lse))
        pl.when(self.parts != 1)(lambda: self.add_values(base))

    def add_values(self, base) -> None:
        """The sum of partial results, each with its weight."""
        shape = (self.tall, PART)
        spread = lambda v: lax.broadcast_in_dim(v, shape, [0])  # noqa: E731

        def add(i, acc):
            readers = self.readers(i, self.together[1])
            weights = [jnp.exp2(s - base) for s in self.sums(readers)]
            values = [self.values(worker) for worker, _ in readers]
            for value, weight in zip(values, weights, strict=True):
                # A partial result that does not count may be anything.
                acc = acc + jnp.where(spread(weight) > 0, value, 0.0) * spread(weight)
            return acc

        acc = lax.fori_loop(
            0, self.steps(self.together[1]), add, plgpu.layout_cast(jnp.zeros(shape, jnp.float32), self.layout)
        )
        self.leave(acc, self.row, self.real, self.real)

    def leave(self, acc, row, real, scaled) -> None:
        """Values [tall, PART] in float32 to so many rows of the result, with the scales of so many."""
        p, chunk = self.p, math.gcd(self.tall, self.form.chunk)
        values, scales = finish(p, acc, self.x.out_scale[0], self.layout, self.interpret)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        self.tile[...] = values
        plgpu.commit_smem()
        leave_rows(self.tile, self.out, row, real, chunk, pl.ds(self.band * PART, PART))
        for j, scale in enumerate(scales):
            self.row_tile[...] = scale
            plgpu.commit_smem()
            group = self.band * len(scales) + j
            leave_scales(p, self.form, self.row_tile, self.scales, row, scaled, chunk, group)
            plgpu.commit_smem()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def leave_lse(self, row, real, values) -> None:
        """The LSE [tall] of so many rows."""
        self.row_tile[...] = values
        plgpu.commit_smem()

        def one(r, carry):
            self.lse[row + r] = self.row_tile[r]
            return carry

        lax.fori_loop(0, real, one, jnp.int32(0))
        plgpu.commit_smem()

    def clear(self, b) -> None:
        """Every seqs-th token that belongs to no sequence is zero; rows that fill up the scales have those of zeros."""
        p, form = self.p, self.form
        start, end = jnp.int32(0), jnp.int32(p.tokens)
        if self.x.cu_q_lens is not None:
            start = jnp.clip(self.x.cu_q_lens[0], 0, p.tokens)
            end = jnp.clip(self.x.cu_q_lens[jnp.clip(self.x.live[0], 0, form.seqs)], start, p.tokens)
        zero = plgpu.layout_cast(jnp.zeros((self.tall, PART), jnp.float32), self.layout)
        nothing = plgpu.layout_cast(jnp.full((self.tall,), -jnp.inf, jnp.float32), self.of_rows)

        def rows(t, j) -> None:
            first = j * self.tall
            scaled = jnp.clip(form.heads - first, 0, self.tall)
            row, real = t * form.heads + first, jnp.where(t < p.tokens, scaled, 0)
            self.leave(zero, row, real, scaled)
            if self.lse is not None:
                pl.when(self.band == 0)(lambda: self.leave_lse(row, real, nothing))

        def token(i, carry):
            free = b + i * form.seqs
            t = jnp.where(free < start, free, end + free - start)
            return lax.fori_loop(0, -(-form.heads // self.tall), lambda j, carry: rows(t, j) or carry, carry)

        count = lax.div(filled(p) - end + start - b + (form.seqs - 1), jnp.int32(form.seqs))
        lax.fori_loop(0, count, token, jnp.int32(0))
