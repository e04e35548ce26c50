"""Which tiles of the flat list a worker takes, and where each sequence's begin: from the schedule, or counted here."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import padded, tiles_of
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import Layout, token_layout

MOST_COUNTED = 255  # sequences that every worker counts for itself; of more, XLA counts once
CHUNK = 1024  # sequences that the search for a worker's first one looks at at once


def share(before, seqs: int, workers: int):
    """(tiles in all, tiles of each worker)."""
    total = before[seqs]
    return total, jnp.maximum(lax.div(total + (workers - 1), jnp.int32(workers)), 1)


def find(before, first, last):
    """The sequences that tiles `first` and `last` of the flat list belong to, by one vote of all threads."""
    votes = jnp.int32(0)
    for at in range(0, before.shape[0], CHUNK):
        size = min(CHUNK, before.shape[0] - at)
        starts = plgpu.load(before.at[pl.ds(at, size)], layout=Layout.WG_STRIDED((size,), vec_size=1), optimized=False)
        votes += jnp.sum((starts <= first).astype(jnp.int32) + (starts <= last).astype(jnp.int32) * 2**16)
    return (votes & (2**16 - 1)) - 1, lax.shift_right_logical(votes, jnp.int32(16)) - 1


def tiles(p: Problem, x, b, kv_lens, q_lens):
    """Tiles of sequence b, or of a vector of sequences, from its lengths as the batch has them."""
    window = x.window[0] if "window" in p.options else None
    own = (b < x.live[0]) & (q_lens <= (p.max_q_len or 1))
    return jnp.where(own, tiles_of(kv_lens, q_lens, p.pages_per_seq, window), 0)


def tally(p: Problem, x, scratch):
    """The part of `scratch`, int32 [2 n], that now holds what a schedule's `before` would; past the sequences, the
    total. Any memory may have been there."""
    n = padded(p.seqs)
    strided = Layout.WG_STRIDED((n,), vec_size=1)
    for at in (0, n):
        scratch[pl.ds(at, n)] = plgpu.layout_cast(jnp.zeros((n,), jnp.int32), strided)
    plgpu.commit_smem()
    at = 0
    for size, found in _in_vectors(p, x):
        scratch[n + at if size == 1 else pl.ds(n + at, size)] = found
        at += size
    plgpu.commit_smem()
    # Each step doubles how many numbers every sum has, the first leaves out its own; before the list there are zeros.
    for i in range((n - 1).bit_length()):
        last = n - 1 if i == 0 else n
        here, there = (
            plgpu.load(scratch.at[pl.ds(at, n)], layout=strided, optimized=False) for at in (last, last - 2**i)
        )
        plgpu.commit_smem()
        scratch[pl.ds(n, n)] = here + there
        plgpu.commit_smem()
    return scratch.at[pl.ds(n, n)]


def _in_vectors(p: Problem, x) -> list:
    """[(size, tiles of the next so many sequences)]: multiples of 32, then powers of two, as registers hold them, which
    also begin where stores into shared memory may; the last may be a number. Nothing past the sequences is read."""
    found, at = [], 0
    for size in (p.seqs // 32 * 32, 16, 8, 4, 2, 1):
        if 0 < size <= p.seqs - at:
            found.append((size, _tiles_from(p, x, at, size)))
            at += size
    return found


def _tiles_from(p: Problem, x, at: int, size: int):
    if size == 1:
        return tiles(p, x, at, x.kv_lens[at], x.cu_q_lens[at + 1] - x.cu_q_lens[at])
    layout = token_layout(size)
    load = lambda ref, at: plgpu.load(ref.at[pl.ds(at, size)], layout=layout, optimized=False)  # noqa: E731
    b = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) + at
    return tiles(p, x, b, load(x.kv_lens, at), load(x.cu_q_lens, at + 1) - load(x.cu_q_lens, at))
