"""Continuous batching: a page allocator, a scheduler, and one jitted step over a donated paged cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from bench.serve import model


@dataclass(frozen=True)
class Limits:
    """The padded shapes of a step and the size of the cache."""

    sequences: int = 8  # rows of a step
    tokens: int = 64  # tokens of a step, prefill and decode together
    chunk: int = 32  # prompt tokens that one sequence may feed in a step
    page_size: int = 16
    pages: int = 128  # pages of the cache, per layer
    pages_per_sequence: int = 32


@dataclass(frozen=True)
class Variant:
    """One way to run the same model: how the cache is stored, and how attention reads it."""

    name: str
    format: pa.Format = pa.BF16
    scales: model.Scales = model.NO_SCALES
    how: model.Numerics = model.PLAIN
    against: str | None = None  # the variant it differs from in one thing; None for a plain KV format
    bug: bool = False

    def cache(self, config: model.Config, limits: Limits) -> pa.PagedKVCache:
        """An empty cache of all layers. The scales in it are placeholders: each layer brings its own."""
        given = {"tensor": (), "head": (config.kv_heads,)}.get(self.format.granularity)
        k, v = (None if given is None else jnp.ones(given, jnp.float32) for _ in "kv")  # donated: two buffers, not one
        sizes = (config.layers * limits.pages, limits.page_size, config.kv_heads, config.head_dim)
        return pa.PagedKVCache.allocate(*sizes, format=self.format, k_scale=k, v_scale=v)

    def bytes_per_token(self, config: model.Config, limits: Limits) -> float:
        """Bytes that one token takes in the cache, all layers, scales of the cache included."""
        return self.cache(config, limits).nbytes / (limits.pages * limits.page_size)


@dataclass(eq=False)
class Request:
    """A prompt to continue by `max_new` tokens, arriving at engine step `arrival`; with max_new 0 it is only scored.

    chunks: tokens fed in each of its steps. `script`, another request's `chunks`, makes it repeat that schedule.
    """

    prompt: bytes
    max_new: int
    arrival: int = 0
    script: list[int] | None = None
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    pages_used: int = 0
    chunks: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)  # of each next byte that is known when its predecessor is fed

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def target(self) -> int:
        """Length at which it is finished."""
        return len(self.prompt) + self.max_new

    @property
    def pending(self) -> int:
        """Tokens that are known and not yet in the cache."""
        return len(self.tokens) - self.cached

    @property
    def finished(self) -> bool:
        """Whether nothing is left to feed; the last generated token is never fed."""
        return self.pending == 0 if self.max_new == 0 else len(self.tokens) == self.target

    @property
    def output(self) -> bytes:
        """What was generated so far."""
        return bytes(self.tokens[len(self.prompt) :])


class PageAllocator:
    """A free list. Admission reserves what a request may need at most; pages are taken only when they are written."""

    def __init__(self, limits: Limits):
        self.page_size, self.free, self.promised = limits.page_size, list(range(limits.pages))[::-1], 0

    def worst(self, request: Request) -> int:
        """Pages of the finished request."""
        return -(-request.target // self.page_size)

    def admit(self, request: Request) -> bool:
        """Reserves room for the whole request, or returns False."""
        if self.worst(request) > len(self.free) - self.promised:
            return False
        self.promised += self.worst(request)
        return True

    def extend(self, request: Request, length: int) -> None:
        """Gives the request the pages that `length` tokens need."""
        while len(request.pages) * self.page_size < length:
            request.pages.append(self.free.pop())
            request.pages_used += 1
            self.promised -= 1

    def release(self, request: Request) -> None:
        """Takes all its pages back, and what was promised and not used."""
        self.promised -= self.worst(request) - len(request.pages)
        self.free.extend(reversed(request.pages))
        request.pages = []


class Scheduler:
    """Decides which tokens make up a step: one of every decoding sequence, then prompt chunks, first come first."""

    def __init__(self, requests: Iterable[Request], limits: Limits):
        self.limits, self.allocator, self.now = limits, PageAllocator(limits), 0
        self.waiting = deque(sorted(requests, key=lambda r: r.arrival))
        self.running: list[Request] = []
        self.finished: list[Request] = []
        fits = min(limits.pages, limits.pages_per_sequence)
        if any(self.allocator.worst(r) > fits for r in self.waiting):
            raise ValueError(f"a request is longer than {fits} pages of {limits.page_size} tokens")

    @property
    def arrived(self) -> int:
        """Requests that have arrived and wait to be admitted."""
        return sum(r.arrival <= self.now for r in self.waiting)

    @property
    def pages_in_use(self) -> int:
        """Pages that hold tokens of running requests."""
        return self.limits.pages - len(self.allocator.free)

    def plan(self) -> list[tuple[Request, int]]:
        """The requests of this step with the number of tokens each feeds; decoding ones come first."""
        while self.waiting and self.waiting[0].arrival <= self.now and len(self.running) < self.limits.sequences:
            if not self.allocator.admit(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
        budget, picks = self.limits.tokens, []
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            count = min(request.pending, self.limits.chunk, budget)
            if request.script is not None:
                count = request.script[len(request.chunks)]
            if count:
                self.allocator.extend(request, request.cached + count)
                picks.append((request, count))
                budget -= count
        return picks

    def retire(self) -> None:
        """Lets finished requests leave, their pages free for others."""
        for request in [r for r in self.running if r.finished]:
            self.allocator.release(request)
            self.running.remove(request)
            self.finished.append(request)
        self.now += 1


@partial(jax.jit, static_argnames=("config", "how"), donate_argnames="cache")
def run_step(
    params: model.Params,
    cache: pa.PagedKVCache,
    scales: model.Scales,
    step: model.Step,
    targets: Array,
    *,
    config: model.Config,
    how: model.Numerics,
) -> tuple[Array, Array, pa.PagedKVCache]:
    """Greedy next token [T] after every token of the step, the nats of `targets` [T] there, and the updated cache."""
    logits, cache = model.paged(params, step, cache, config, scales=scales, how=how)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]
    return jnp.argmax(logits, -1), nats, cache


@dataclass
class Stats:
    """What a run did."""

    seconds: float = 0.0
    steps: int = 0
    mixed_steps: int = 0  # with prompt chunks and decoding sequences
    fed: int = 0
    generated: int = 0
    peak_pages: int = 0
    timeline: list[tuple[int, int, int]] = field(default_factory=list)  # running, waiting, pages in use, of every step

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.generated / max(self.seconds, 1e-9)


class Server:
    """Serves requests with one variant of the model."""

    def __init__(self, params: model.Params, variant: Variant, config: model.Config, limits: Limits = Limits()):
        self.params, self.variant, self.config, self.limits = params, variant, config, limits
        self.cache = variant.cache(config, limits)
        self.stats = Stats()
        self.scheduler = Scheduler([], limits)

    def warm_up(self) -> float:
        """Compiles the step by running it on padding alone, which writes nothing; returns the seconds it took."""
        start = time.perf_counter()
        self._run([])
        return time.perf_counter() - start

    def serve(self, requests: list[Request], watch: Callable[[Server], None] = lambda _: None) -> Stats:
        """Runs until every request has finished; `watch` is called after each step."""
        self.scheduler, self.stats = Scheduler(requests, self.limits), Stats()
        start = time.perf_counter()
        while self.scheduler.waiting or self.scheduler.running:
            picks = self.scheduler.plan()
            if picks:
                self._advance(picks)
            self._note(picks)
            self.scheduler.retire()
            self.stats.seconds = time.perf_counter() - start
            watch(self)
        return self.stats

    def _note(self, picks: list[tuple[Request, int]]) -> None:
        """Counts the step."""
        stats, scheduler = self.stats, self.scheduler
        decoding = [request.cached > len(request.prompt) for request, _ in picks]
        stats.steps += bool(picks)
        stats.mixed_steps += any(decoding) and not all(decoding)
        stats.fed += sum(count for _, count in picks)
        stats.peak_pages = max(stats.peak_pages, scheduler.pages_in_use)
        stats.timeline.append((len(scheduler.running), scheduler.arrived, scheduler.pages_in_use))

    def _advance(self, picks: list[tuple[Request, int]]) -> None:
        """Runs one step and hands every request its results."""
        chosen, nats = self._run(picks)
        end = 0
        for request, count in picks:
            known = request.tokens[request.cached + 1 : request.cached + count + 1]
            request.nats += nats[end : end + len(known)].tolist()
            end += count
            request.cached += count
            request.chunks.append(count)
            if request.pending == 0 and not request.finished:
                request.tokens.append(int(chosen[end - 1]))
                self.stats.generated += 1

    def _run(self, picks: list[tuple[Request, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Packs the picks into the padded arrays of a step and runs it."""
        step, targets = pack(picks, self.limits)
        chosen, nats, self.cache = run_step(
            self.params, self.cache, self.variant.scales, step, targets, config=self.config, how=self.variant.how
        )
        return np.asarray(chosen), np.asarray(nats)


def pack(picks: list[tuple[Request, int]], limits: Limits) -> tuple[model.Step, np.ndarray]:
    """The step's padded arrays, and the byte known to follow each of its tokens (0 where there is none)."""
    rows, width = limits.sequences, limits.tokens
    tokens, positions, targets = (np.zeros(width, np.int32) for _ in range(3))
    table, lengths, starts = np.zeros((rows, limits.pages_per_sequence), np.int32), np.zeros(rows, np.int32), [0]
    for row, (request, count) in enumerate(picks):
        first, where = request.cached, slice(starts[-1], starts[-1] + count)
        tokens[where] = request.tokens[first : first + count]
        positions[where] = np.arange(first, first + count)
        known = request.tokens[first + 1 : first + count + 1]
        targets[where.start : where.start + len(known)] = known
        table[row, : len(request.pages)] = request.pages
        lengths[row] = first + count
        starts.append(where.stop)
    starts += [starts[-1]] * (rows + 1 - len(starts))
    batch = pa.RaggedBatch(table, lengths, np.array(starts, np.int32), np.int32(len(picks)))  # type: ignore[arg-type]
    return model.Step(tokens, positions, batch), targets  # type: ignore[arg-type]


def serve_alone(make: Callable[[], Server], request: Request) -> Request:
    """The same request in an otherwise idle server with the same padded shapes, fed by the same chunk schedule."""
    alone = Request(request.prompt, request.max_new, script=request.chunks)
    make().serve([alone])
    return alone


def interference(make: Callable[[], Server], served: Iterable[Request]) -> list[Request]:
    """The served requests whose tokens differ from those they get alone: none, if sequences do not touch each other."""
    return [request for request in served if serve_alone(make, request).tokens != request.tokens]
