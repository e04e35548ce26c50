"""The streaming form of the Hopper selection, for many long rows: a row is read once, and what may be chosen is kept.

A cluster takes a row, each of its CTAs a share of neighbouring columns, in pieces. What is large enough goes, with its
column, to a list in the CTA's shared memory, in ascending order of columns. At first everything is large enough. When
the next piece does not fit any more, the list is searched, only about its k largest stay, and from then on only what is
greater than the least of them can be among the chosen: what equals it comes later, and loses. In the end one search
over all lists of the cluster finds the row's threshold. A row in random order has its list searched once or twice, the
worst one for every piece.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.ops.sparse_indexer.mosaic_topk_list import CAPACITY, PIECE, RING
from pallas_attn.ops.sparse_indexer.mosaic_topk_search import Row, key, value

SPARE = 256  # numbers more than k that a shortened list may have


def stream_row(lanes, number, first, end, turns: tuple) -> Any:
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
    lanes.leave(found)
    return turn, 1 - found.turn


def gather(lanes, turn) -> tuple:
    """Fill the list with what of the share may be among the k; returns its length and the next turn."""

    def look(carry):
        piece, listed, least, turn = carry
        now = lanes.read(piece)
        found = lanes.survey(now, least, turn)

        def take():
            lanes.fetch(piece + RING)
            whole = (found.total == PIECE) & ((listed & 3) == 0)
            pl.when(whole)(lambda: lanes.extend(now, listed, piece))
            pl.when(jnp.logical_not(whole))(lambda: lanes.append(now, least, found, listed, piece))
            return piece + 1, listed + found.total, least, 1 - turn

        return lax.cond(listed + found.total <= CAPACITY, take, lambda: (piece, *shorten(lanes, listed, 1 - turn)))

    for i in range(RING):
        lanes.fetch(jnp.int32(i))
    start = jnp.int32(0), jnp.int32(0), jnp.float32(-jnp.inf), turn
    _, listed, _, turn = lax.while_loop(lambda carry: carry[0] < lanes.pieces, look, start)
    return listed, turn


def shorten(lanes, listed, turn) -> tuple:
    """Keep the k largest of a list of more, and maybe some others, for any bound that so many reach will do; returns
    the list's length, what a later number has to reach, and the next turn."""
    lanes.hold(listed)
    row = Row(lanes.form, lanes.alone, listed, lanes.alone.sample(turn), spare=max(lanes.form.k // 4, SPARE))
    found = row.find(1 - turn)
    lanes.keep(found)
    least = key(found.threshold)
    return found.chosen, value(jnp.where(least == -1, 0, least) + 1), 1 - found.turn  # -0 is 0
