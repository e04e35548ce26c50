"""The search of the Hopper selection for one row's threshold (see `mosaic_topk`)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.ops.sparse_indexer.mosaic_topk_lanes import SAMPLE, Form

LEAST, BEYOND = -2139095041, 2139095041  # the keys of -inf, and past that of inf
GUESSES = 8  # after which keys are halved
SNAP_FROM, SNAP_EVERY = 5, 6  # guesses after which both ends move to numbers that there are
LOW, HIGH, ROSE = 1, 2, 4  # flags: that end has been counted; the low end moved last


class State(NamedTuple):
    """Of the search: at least k numbers reach the key `low`, fewer reach `high`."""

    passes: Any
    low: Any
    high: Any
    above: Any  # how many reach `low`, float32
    beyond: Any  # how many reach `high`
    low_value: Any  # the ends as the secant rule sees them
    high_value: Any
    guess: Any
    turn: Any
    flags: Any
    low_weight: Any
    high_weight: Any


class Found(NamedTuple):
    """What the search ends with: all numbers above the threshold are chosen, and the first of its equals."""

    threshold: Any
    equals: Any  # how many of them, at most
    chosen: Any  # how many numbers
    every: Any  # whether all equals are chosen
    turn: Any


def key(x):
    """The order key of a float: an int32 that rises with it."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value(k):
    """The float of an order key."""
    return lax.bitcast_convert_type(k ^ ((k >> 31) & 0x7FFFFFFF), jnp.float32)


def root(x):
    """The square root of a positive float."""
    return x * lax.rsqrt(x)


class Row:
    """One row: its length and sample, and what finds and places its k largest numbers, or up to `spare` more."""

    def __init__(self, form: Form, lanes, length, sample, spare: int = 0) -> None:
        self.form, self.lanes, self.length, self.k = form, lanes, length, jnp.float32(form.k)
        self.most, self.aim = self.k + spare, self.k + spare // 2
        total, squares, count = sample
        count = jnp.maximum(count, 1.0)
        self.mean = total / count
        self.deviation = root(jnp.maximum(squares / count - self.mean * self.mean, 1e-30))
        population = count * max(form.units * 8 * form.segments // SAMPLE, 1)
        # The quantile of a normal distribution: Abramowitz and Stegun, 26.2.23.
        tail = jnp.minimum(self.aim / population, 0.5)
        square = -2.0 * 0.6931472 * jnp.log2(tail)
        u = root(square)
        ratio = (2.515517 + 0.802853 * u + 0.010328 * square) / (
            1.0 + 1.432788 * u + 0.189269 * square + 0.001308 * u * square
        )
        self.quantile = u - ratio
        density = jnp.exp2(-0.7213475 * self.quantile * self.quantile) * 0.3989 / self.deviation
        self.slope = population * density

    def select(self, turn):
        """Find and place; returns the next turn."""
        found = self.find(turn)
        few = self.length <= self.form.k
        pl.when(few)(lambda: self.lanes.place_all(self.length))
        many = jnp.logical_not(few)
        pl.when(many & found.every)(lambda: self.lanes.place(found.threshold, found.turn))
        pl.when(many & jnp.logical_not(found.every))(
            lambda: self.lanes.place_with_ties(found.threshold, found.equals, found.turn)
        )
        return jnp.where(few, found.turn, 1 - found.turn)

    def find(self, turn) -> Found:
        """What is among the k largest."""
        found = State(*lax.while_loop(self.open, self.step, self.start(turn)))
        every = found.above <= self.most
        chosen = jnp.where(every, found.above, self.k).astype(jnp.int32)
        return Found(value(found.low), chosen - found.beyond.astype(jnp.int32), chosen, every, found.turn)

    def start(self, turn) -> State:
        """Nothing is known but that the whole row reaches -inf."""
        zero, one = jnp.float32(0), jnp.float32(1)
        return State(
            jnp.int32(0), jnp.int32(LEAST), jnp.int32(BEYOND), self.length.astype(jnp.float32), zero,
            self.mean - 6 * self.deviation, self.mean + 8 * self.deviation, self.mean + self.quantile * self.deviation,
            turn, jnp.int32(0), one, one,
        )  # fmt: skip

    def open(self, s) -> Any:
        """Whether the search goes on."""
        s = State(*s)
        return (self.length > self.form.k) & (s.above > self.most) & (s.high != s.low + 1)

    def step(self, s) -> State:
        """One count, at a guess or in the middle."""
        s = State(*s)
        snaps = (s.passes >= SNAP_FROM) & (lax.rem(s.passes - SNAP_FROM, jnp.int32(SNAP_EVERY)) == 0)
        moved = lax.cond(snaps, lambda: self.snap(s), lambda: self.plain(s))
        low, high, probe, turn = moved
        s = s._replace(
            low=low, high=high, turn=turn,
            low_value=jnp.where(snaps & (low > LEAST), value(low), s.low_value),
            high_value=jnp.where(snaps & (high < BEYOND), value(high), s.high_value),
        )  # fmt: skip
        return self.probe(s, probe)

    def plain(self, s: State) -> tuple:
        """(low, high, where to count, turn): the guess, if it is inside and not too late."""
        guessed = key(s.guess)
        fits = (guessed > s.low) & (guessed < s.high) & (s.passes < GUESSES)
        return s.low, s.high, jnp.where(fits, guessed, middle(s.low, s.high)), s.turn

    def snap(self, s: State) -> tuple:
        """The same with both ends at numbers of the row, if its low end is known to be reached: NaN reaches nothing."""
        least, most = self.lanes.nearest(value(s.low), value(s.high), s.turn)
        least, most = jnp.where(least == -1, 0, least), jnp.where(most == -1, 0, most)  # -0 is 0
        counted = (s.flags & LOW) != 0
        high = jnp.clip(most, s.low, s.high - 1) + 1
        least = jnp.clip(least, s.low, high - 1)
        low = jnp.where(counted, least, s.low)
        after = jnp.where(s.passes == SNAP_FROM, middle(low, high), low + 1)
        probe = jnp.where(counted, after, jnp.maximum(least, s.low + 1))
        return low, high, jnp.clip(probe, low, high), 1 - s.turn

    def probe(self, s: State, at) -> State:
        """Count what reaches the key `at`, and guess again."""
        number = value(at)
        count = self.lanes.count(number, s.turn)
        reaches, one = count >= self.k, jnp.float32(1)
        rose = (s.flags & ROSE) != 0
        again = jnp.where(reaches, rose, jnp.logical_not(rose) & (s.passes > 0))
        low_weight = jnp.where(reaches, one, jnp.where(again, s.low_weight * 0.5, one))
        high_weight = jnp.where(reaches, jnp.where(again, s.high_weight * 0.5, one), one)
        pick = lambda a, b: jnp.where(reaches, a, b)  # noqa: E731
        flags = pick(s.flags | LOW | ROSE, (s.flags | HIGH) & (LOW | HIGH))
        s = s._replace(
            passes=s.passes + 1, low=pick(at, s.low), high=pick(s.high, at),
            above=pick(count, s.above), beyond=pick(s.beyond, count),
            low_value=pick(number, s.low_value), high_value=pick(s.high_value, number),
            turn=1 - s.turn, flags=flags, low_weight=low_weight, high_weight=high_weight,
        )  # fmt: skip
        return s._replace(guess=self.guess(s, number, count))

    def guess(self, s: State, number, count):
        """Where as many numbers as wanted might reach: between the ends by the Illinois rule, or, while one of them is
        unknown, further on by the density of a normal distribution, with a stride that doubles."""
        short = count - self.aim
        error = jnp.maximum(short, -short) + 1.0
        stride = lax.bitcast_convert_type((126 + jnp.minimum(s.passes, 7)) << 23, jnp.float32)
        margin = jnp.where(short > 0, jnp.float32(3), jnp.float32(-3)) * root(error)
        further = number + stride * (1.25 * short + margin) / self.slope
        a = (s.above - self.aim) * s.low_weight + 0.25
        b = (self.aim - s.beyond) * s.high_weight
        between = s.low_value + (s.high_value - s.low_value) * (a / (a + b))
        return jnp.where((s.flags & (LOW | HIGH)) == (LOW | HIGH), between, further)


def middle(low, high):
    """Halfway between two keys, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)
