"""What sparse attention answers with the indexer's positions, and with what two real bugs make of them.

`python -m bench indexer-accuracy`: shares of right answers of the trained model, over lengths, for common keys (the
latest of hundreds of writes) and rare ones (the only write).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tabulate import tabulate

import pallas_attn as pa
from bench.indexer import model, task
from bench.indexer.model import Params, Tokens

LENGTHS = (2048, 4096, 8192)
PAGE = 1  # of the index cache: where upstream's layout bug was


class Score(NamedTuple):
    """Shares of the questions: right answers, and answers that the chosen positions hold at all."""

    common: float
    rare: float
    kept: float


def cached(indexer: pa.Indexer, k: Array, page_size: int = PAGE) -> pa.IndexCache:
    """The log's index keys in pages 0, 1, ..."""
    cache = pa.IndexCache.allocate(k.shape[0] // page_size, page_size, indexer.head_dim)
    return pa.write_index(cache, k, jnp.arange(k.shape[0], dtype=jnp.int32))


def in_tiles(cache: pa.IndexCache) -> pa.IndexCache:
    """Upstream's bug: the same keys, pages of one token, written at the places that tiles of 16 x 16 would have.

    Value d of a token goes 256 (d // 16) + d % 16 bytes behind the beginning of its page of 132 bytes, so into other
    tokens' pages; what lies past the cache is dropped. The library refuses this layout for such pages.
    """
    pages, dim = cache.num_pages, cache.head_dim
    rows = cache.pages.reshape(pages, -1)
    start, d = jnp.arange(pages)[:, None] * rows.shape[1], jnp.arange(dim)
    flat = jnp.zeros(rows.size, jnp.uint8)
    flat = flat.at[start + d // 16 * 256 + d % 16].set(rows[:, :dim], mode="drop")
    flat = flat.at[start + dim + jnp.arange(rows.shape[1] - dim)].set(rows[:, dim:])
    return cache.replace(flat.reshape(cache.pages.shape))


def chosen(params: Params, tokens: Tokens, spoil: Callable[[pa.IndexCache], pa.IndexCache] = lambda x: x) -> Array:
    """The indexer's positions [QUERIES, TOPK] through its FP8 cache, which a bug may spoil."""
    q, k, weights = model.index_parts(params.indexer, tokens)
    batch = model.each_alone(q.shape[0], k.shape[0], PAGE)
    cache, stored = spoil(cached(params.indexer, k)), pa.quantize(q, pa.INDEX_Q)
    logits = pa.paged_indexer_logits(stored, weights, cache, batch, scale=params.indexer.scale)
    return pa.indexer_topk(logits, params.indexer.topk)


def without_rotation(params: Params) -> Params:
    """Upstream's other bug: rotated index queries and keys were dropped, as an angle of 0 does."""
    still = dataclasses.replace(params.indexer, frequencies=jnp.zeros_like(params.indexer.frequencies))
    return dataclasses.replace(params, indexer=still)


def latest(params: Params, tokens: Tokens) -> Array:
    """The last TOPK positions: what a sliding window would keep."""
    n, k = tokens.writes.shape[0], params.indexer.topk
    return jnp.broadcast_to(jnp.arange(n - k, n, dtype=jnp.int32), (task.QUERIES, k))


VARIANTS: dict[str, Callable[[Params, Tokens], Array] | None] = {
    "dense attention": None,
    "indexer": chosen,
    "bug: rotated values dropped": lambda params, tokens: chosen(without_rotation(params), tokens),
    "bug: written in tiles, read in rows": lambda params, tokens: chosen(params, tokens, in_tiles),
    "a window as large": latest,
}


@functools.partial(jax.jit, static_argnames="variant")
def answers(params: Params, logs: task.Logs, variant: str) -> tuple[Array, Array]:
    """(right, kept) bool [B, QUERIES]."""

    def one(log: task.Logs) -> tuple[Array, Array]:
        tokens, choose = model.embed(params, log.keys, log.values, log.asked), VARIANTS[variant]
        if choose is None:
            return model.dense(params, tokens).argmax(-1) == log.answers, jnp.ones(task.QUERIES, bool)
        positions = choose(params, tokens)
        kept = jnp.any(positions == log.latest[:, None], axis=1)
        return model.sparse(params, tokens, positions).argmax(-1) == log.answers, kept

    return jax.lax.map(one, logs)


def score(params: Params, logs: task.Logs, variant: str) -> Score:
    """The shares of one variant on some logs."""
    right, kept = map(np.asarray, answers(params, jax.tree.map(jnp.asarray, logs), variant))
    half = task.QUERIES // 2
    return Score(right[:, :half].mean(), right[:, half:].mean(), kept.mean())


def show(logs: int, lengths: Sequence[int]) -> None:
    """Prints the table: `logs` random logs of every length."""
    params, start = model.load(), time.monotonic()
    rows = []
    for variant in VARIANTS:
        row: list[str | float] = [variant]
        for length in lengths:
            row += score(params, task.logs(np.random.default_rng(length), logs, length), variant)
        rows.append(row)
    heads = [f"{length}: {name}" for length in lengths for name in Score._fields]
    print(tabulate(rows, headers=["right answers", *heads], floatfmt=".3f"))
    print(f"{params.indexer.topk} positions of each length; {time.monotonic() - start:.0f} s")
