"""The streaming form of the Hopper selection, for many long rows: a row is read once, and what may be chosen is kept.

A cluster takes a row, each of its CTAs a share of neighbouring columns, in pieces. What is large enough goes, with its
column, to a list in the CTA's shared memory, in ascending order of columns. At first everything is large enough. When
the next piece does not fit any more, the list is searched, only its k largest stay, and from then on only what is
greater than the least of them can be among the chosen: what equals it comes later, and loses. In the end one search
over all lists of the cluster finds the row's threshold. Of a row in random order the list keeps k and a few, so that
it is searched once or twice; the worst row has it searched for every piece.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.ops.sparse_indexer.mosaic_topk_list import CAPACITY, Survey
from pallas_attn.ops.sparse_indexer.mosaic_topk_search import Row, key, value

AHEAD = 2  # pieces on their way while one is looked at


def stream(lanes, number, first, end, turns: tuple) -> Any:
    """Find and place the k largest of a row's columns first to end; returns the next turns of the CTA and cluster."""
    lanes.take(number, first, end)
    few = end - first <= lanes.form.k
    pl.when(few)(lambda: lanes.together.place_all(end - first))
    return lax.cond(few, lambda: turns, lambda: choose(lanes, end - first, *turns))


def choose(lanes, length, turn, joint) -> tuple:
    """The k largest of a row of more."""
    listed, turn = gather(lanes, turn)
    lanes.wait()
    lanes.hold(listed)
    row = Row(lanes.form, lanes.together, length, lanes.together.sample(joint))
    found = row.find(1 - joint)
    lanes.leave(found.threshold, found.equals, found.turn)
    return turn, 1 - found.turn


def gather(lanes, turn) -> tuple:
    """Fill the list with what of the share may be among the k; returns its length and the next turn."""

    def piece(i, carry):
        (now, *ahead), listed, least, turn = carry
        now = lanes.clean(now, i)
        ahead.append(lanes.load(i + AHEAD))
        found = lanes.survey(now, least, turn)

        def full():
            raised, turn_ = shorten(lanes, listed, 1 - turn)
            return jnp.int32(lanes.form.k), raised, *lanes.survey(now, raised, turn_), 1 - turn_

        fits = listed + found.total <= CAPACITY
        listed, least, *found, turn = lax.cond(fits, lambda: (listed, least, *found, 1 - turn), full)
        found = Survey(*found)
        lanes.append(now, least, found, listed, i)
        return tuple(ahead), listed + found.total, least, turn

    ahead = tuple(lanes.load(jnp.int32(i)) for i in range(AHEAD))
    start = ahead, jnp.int32(0), jnp.float32(-jnp.inf), turn
    _, listed, _, turn = lax.fori_loop(0, lanes.pieces, piece, start)
    return listed, turn


def shorten(lanes, listed, turn) -> tuple:
    """Keep the k largest of a list of more; returns what a later number has to reach, and the next turn."""
    lanes.hold(listed)
    row = Row(lanes.form, lanes.alone, listed, lanes.alone.sample(turn))
    found = row.find(1 - turn)
    lanes.keep(found.threshold, found.equals, found.turn)
    least = key(found.threshold)
    return value(jnp.where(least == -1, 0, least) + 1), 1 - found.turn  # -0 is 0
