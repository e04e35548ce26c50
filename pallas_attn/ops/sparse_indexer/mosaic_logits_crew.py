"""The warpgroups of the prefill logits kernel: one loads, the others compute (see `mosaic_logits`)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.ops.sparse_indexer.logits.problem import Problem
from pallas_attn.ops.sparse_indexer.mosaic_parts import FILL, clear, factors, put, put_some
from pallas_attn.runtime.mosaic import ACC, OVER_ROWS, ROWS

SCALES = 4  # their copies begin at multiples of 16 bytes
STRETCH = 16 * FILL  # columns of -inf that a warpgroup writes in its turn


class Form(NamedTuple):
    """The static shape of the kernel for one problem."""

    rows: int  # query tokens of a job
    computes: int  # warpgroups that compute
    stages: int
    parts: int
    registers: tuple[int, int]
    groups: int  # of query tokens

    @property
    def block(self) -> int:
        """Keys of a step."""
        return ROWS * self.computes

    @property
    def jobs(self) -> int:
        """Jobs of all CTAs."""
        return self.groups * self.parts

    def limit_registers(self, action) -> None:
        """Give registers of the loader's to those that compute: five warpgroups begin with 96 of a thread."""
        if self.computes == 4:
            plgpu.set_max_registers(self.registers[action == "decrease"], action=action)


class Job(NamedTuple):
    """Some query tokens over a part of their keys; every number is kept inside the problem."""

    part: Any
    token: Any  # the first of its query tokens; those of the last group begin early enough to be whole
    low: Any  # first key of the group's blocks
    count: Any  # of the group's blocks
    first: Any  # the job's first block
    end: Any  # and the one past its last
    whole_from: Any  # blocks that every row sees whole
    whole_to: Any


@dataclasses.dataclass
class Crew:
    """What all warpgroups of a CTA share."""

    p: Problem
    form: Form
    workers: int
    x: dict
    out: Any
    jobs: Any  # as numbers
    queries: Any
    weights: Any
    rowwise: Any  # the ring as copies fill it
    keys: Any  # and as the matrix unit reads it
    key_scales: Any
    line: Any
    q_here: Any
    q_used: Any
    k_here: Any
    k_used: Any
    q_scales: Any = None  # where every query has its own

    def bounds(self, token):
        """(first key, key past the last) that a query token sees."""
        first, end = (jnp.clip(self.x[name][token], 0, self.p.keys) for name in ("starts", "ends"))
        return first, jnp.maximum(first, end)

    def job(self, number) -> Job:
        """Job `number` of all."""
        p, form, block = self.p, self.form, jnp.int32(self.form.block)
        group, part = lax.div(number, jnp.int32(form.parts)), lax.rem(number, jnp.int32(form.parts))
        token = jnp.minimum(group * form.rows, p.tokens - form.rows)
        low, high, clear_from, clear_to = jnp.int32(p.keys), jnp.int32(0), jnp.int32(0), jnp.int32(p.keys)
        for i in range(form.rows):
            first, end = self.bounds(token + i)
            some = first < end
            low = jnp.where(some, jnp.minimum(low, first), low)
            high = jnp.where(some, jnp.maximum(high, end), high)
            clear_from, clear_to = jnp.maximum(clear_from, first), jnp.minimum(clear_to, end)
        low = jnp.minimum(low, high)
        step = ROWS if p.width is None else SCALES  # lines of the result, or copies of scales, begin at multiples
        low = lax.div(low, jnp.int32(step)) * step
        if p.width is not None:
            clear_to = jnp.minimum(clear_to, self.bounds(token)[0] + p.width)
            for i in range(1, form.rows):
                clear_to = jnp.minimum(clear_to, self.bounds(token + i)[0] + p.width)
        count = lax.div(high - low + block - 1, block)
        each = lax.div(count + (form.parts - 1), jnp.int32(form.parts))
        first = jnp.minimum(part * each, count)
        end = jnp.minimum(first + each, count)
        # The last block may begin earlier than its number says, so that it is whole: it counts as one in part seen.
        whole = jnp.minimum(clear_to, p.keys) - low
        whole_from = jnp.clip(lax.div(jnp.maximum(clear_from - low, 0) + block - 1, block), first, end)
        whole_to = jnp.clip(lax.div(jnp.maximum(whole, 0), block), whole_from, end)
        return Job(part, token, low, count, first, end, whole_from, whole_to)

    def key_of(self, low, block):
        """The first key of a block of a group whose blocks begin at key `low`."""
        last = -(-(self.p.keys - self.form.block) // SCALES) * SCALES  # of keys past the end nothing counts
        return jnp.minimum(low + block * self.form.block, last)

    def each_job(self, body: Callable) -> tuple:
        """body(i, jobs' blocks before) -> blocks, for each of the CTA's jobs; (how many jobs, how many blocks)."""
        mine = lax.div(self.form.jobs - lax.axis_index("worker") + self.workers - 1, jnp.int32(self.workers))
        return mine, lax.fori_loop(0, mine, lambda i, blocks: blocks + body(i, blocks), jnp.int32(0))


class Loader(Crew):
    """Finds out what is to be done, and copies what the others need for it as memory becomes free."""

    def run(self, drains: bool) -> None:
        """All jobs of the CTA."""
        self.form.limit_registers("decrease")
        jobs, blocks = self.each_job(self.load)
        if drains:  # the interpreter wants every phase of a barrier seen
            for barrier, slots, count in ((self.k_used, self.form.stages, blocks), (self.q_used, 2, jobs)):
                lax.fori_loop(jnp.maximum(count - slots, 0), count, _wait(barrier, slots), jnp.int32(0))

    def load(self, i, blocks):
        """One job's queries, weights and keys."""
        p, form, x = self.p, self.form, self.x
        slot, job = lax.rem(i, jnp.int32(2)), self.job(lax.axis_index("worker") + i * self.workers)
        pl.when(i >= 2)(lambda: plgpu.barrier_wait(self.q_used.at[slot]))
        for field, value in enumerate(job):
            self.jobs[slot, field] = value
        here, rows = self.q_here.at[slot], pl.ds(job.token, form.rows)
        queries = x["q"].at[pl.ds(job.token * p.heads, form.rows * p.heads)]
        plgpu.copy_gmem_to_smem(queries, self.queries.at[slot], here)
        plgpu.copy_gmem_to_smem(x["weights"].at[rows], self.weights.at[slot, pl.ds(0, form.rows)], here)
        if len(x["q_scale"].shape) == 2:
            plgpu.copy_gmem_to_smem(x["q_scale"].at[rows], self.q_scales.at[slot, pl.ds(0, form.rows)], here)
        plgpu.commit_smem()
        plgpu.barrier_arrive(here)

        def fetch(t, n):
            at, key = lax.rem(n, jnp.int32(form.stages)), self.key_of(job.low, t)
            pl.when(n >= form.stages)(lambda: plgpu.barrier_wait(self.k_used.at[at]))
            here = self.k_here.at[at]
            plgpu.copy_gmem_to_smem(x["k"].at[pl.ds(key, form.block)], self.rowwise.at[at], here)
            plgpu.copy_gmem_to_smem(x["k_scale"].at[pl.ds(key, form.block)], self.key_scales.at[at], here)
            return n + 1

        lax.fori_loop(job.first, job.end, fetch, blocks)
        return job.end - job.first


def _wait(barrier, slots: int) -> Callable:
    """A step of a loop over the last uses of a ring."""

    def step(i, carry):
        plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(slots))])
        return carry

    return step


class Computer(Crew):
    """One of the warpgroups that compute."""

    role: Any

    def run(self, role) -> None:
        """The warpgroup's 64 keys of every block."""
        self.form.limit_registers("increase")
        self.role = role

        def work(i, blocks):
            slot = lax.rem(i, jnp.int32(2))
            plgpu.barrier_wait(self.q_here.at[slot])
            job = Job(*(self.jobs[slot, field] for field in range(len(Job._fields))))
            self.compute(job, slot, blocks)
            plgpu.barrier_arrive(self.q_used.at[slot])
            for row in range(self.form.rows):
                self.clear(job, row)
            return job.end - job.first

        self.each_job(work)

    def compute(self, job: Job, slot, blocks) -> None:
        """All blocks of a job."""
        p, weights = self.p, [self.factors(slot, i) for i in range(self.form.rows)]

        def step(t, n, masked):
            at = lax.rem(n, jnp.int32(self.form.stages))
            plgpu.barrier_wait(self.k_here.at[at])
            mine = pl.ds(self.role * ROWS, ROWS)
            scale = plgpu.load(self.key_scales.at[at, mine], layout=OVER_ROWS, optimized=False)
            product = self.product(self.keys.at[at, mine], self.queries.at[slot])
            plgpu.barrier_arrive(self.k_used.at[at])
            key = (self.key_of(job.low, t) if masked else job.low + t * self.form.block) + self.role * ROWS
            for i, w in enumerate(weights):
                own = product[:, i * p.heads : (i + 1) * p.heads]
                z = jnp.sum(jnp.maximum(own, 0.0) * lax.broadcast_in_dim(w, own.shape, [1]), axis=1) * scale
                self.leave(job.token + i, i, key, z, masked)
            return n + 1

        n = lax.fori_loop(job.first, job.whole_from, lambda t, n: step(t, n, True), blocks)
        n = lax.fori_loop(job.whole_from, job.whole_to, lambda t, n: step(t, n, False), n)
        lax.fori_loop(job.whole_to, job.end, lambda t, n: step(t, n, True), n)

    def factors(self, slot, i: int):
        """[H]: weights of the job's query token i times the scales of its queries and the logits' factor."""
        q_scale = self.x["q_scale"]
        own = self.q_scales.at[slot, i] if self.q_scales is not None else q_scale
        return factors(self.weights.at[slot, i], own, self.x["scale"])

    def product(self, keys, queries):
        """S^T [64, rows * heads]."""

        def multiply(acc):
            plgpu.wgmma(acc, keys, queries.transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, ACC((ROWS, queries.shape[0]), jnp.float32))

    def leave(self, token, i: int, key, z, masked: bool) -> None:
        """64 keys' logits to the row of the job's query token i."""
        p, absolute = self.p, self.p.width is None
        first, end = (jnp.int32(0), jnp.int32(0)) if absolute and not masked else self.bounds(token)
        if masked:
            at = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OVER_ROWS) + key
            z = jnp.where((at >= first) & (at < end), z, -jnp.inf)
        if absolute and (not masked or p.keys % ROWS == 0):
            put(self.out.at[token, pl.ds(key, ROWS)], z)
            return
        pitch, column = p.width or p.keys, key - (0 if absolute else first)
        fits = (column >= 0) & (column + ROWS <= pitch)

        @pl.when(fits)
        def _whole():
            put(self.out.at[token, pl.ds(column, ROWS)], z)

        @pl.when(~fits)
        def _some():  # registers leave for multiples of 64 only: through shared memory
            line = self.line.at[self.role, i]
            line[...] = z
            plgpu.commit_smem()
            put_some(self.out, token, column, line, jnp.maximum(-column, 0), jnp.minimum(pitch - column, ROWS))
            plgpu.commit_smem()

    def clear(self, job: Job, i: int) -> None:
        """-inf in the row's columns that no block of the group has, in turn with all that share them."""
        p, form = self.p, self.form
        token, width = job.token + i, p.width or p.keys
        shift = jnp.int32(0) if p.width is None else self.bounds(token)[0]
        some = job.count > 0
        left = jnp.where(some, jnp.clip(self.key_of(job.low, jnp.int32(0)) - shift, 0, width), 0)
        right = jnp.where(some, jnp.clip(self.key_of(job.low, job.count - 1) + form.block - shift, 0, width), 0)
        turn, turns = job.part * form.computes + self.role, form.parts * form.computes

        def stretch(n, carry):
            at = (turn + n * turns) * STRETCH

            def both() -> None:
                clear(self.out, token, at, jnp.minimum(at + STRETCH, left))
                clear(self.out, token, jnp.maximum(at, right), jnp.minimum(at + STRETCH, width))

            # Most turns have nothing to clear, and all warps that compute are here once a job.
            pl.when((at < left) | (jnp.minimum(at + STRETCH, width) > right))(both)
            return carry

        lax.fori_loop(0, -(-width // (STRETCH * turns)), stretch, jnp.int32(0))
