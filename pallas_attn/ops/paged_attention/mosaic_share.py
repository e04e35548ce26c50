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
    return jnp.where(b < x.live[0], tiles_of(kv_lens, q_lens, p.pages_per_seq, window), 0)


def tally(p: Problem, x, scratch):
    """The part of `scratch`, int32 [2 n], that now holds what a schedule's `before` would; past the sequences, the
    total. Any memory may have been there."""
    n = padded(p.seqs)
    strided = Layout.WG_STRIDED((n,), vec_size=1)
    for at in (0, n):
        scratch[pl.ds(at, n)] = plgpu.layout_cast(jnp.zeros((n,), jnp.int32), strided)
    plgpu.commit_smem()
    _write_tiles(p, x, scratch, n + 1)
    plgpu.commit_smem()
    # Each step doubles how many numbers every sum has; before the list there are zeros.
    for shift in (2**i for i in range((n - 1).bit_length())):
        here, there = (plgpu.load(scratch.at[pl.ds(at, n)], layout=strided, optimized=False) for at in (n, n - shift))
        plgpu.commit_smem()
        scratch[pl.ds(n, n)] = here + there
        plgpu.commit_smem()
    return scratch.at[pl.ds(n, n)]


def _write_tiles(p: Problem, x, scratch, first: int) -> None:
    """The tiles of each sequence, from element `first` of `scratch`."""
    if p.seqs == 1:
        scratch[first] = tiles(p, x, 0, x.kv_lens[0], x.cu_q_lens[1] - x.cu_q_lens[0])
        return
    # Two vectors cover the sequences, overlapping where they must: what both hold is the same.
    size = p.seqs // 32 * 32 or 1 << (p.seqs.bit_length() - 1)
    layout = token_layout(size)
    load = lambda ref, at: plgpu.load(ref.at[pl.ds(at, size)], layout=layout, optimized=False)  # noqa: E731
    for at in dict.fromkeys((0, p.seqs - size)):
        b = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) + at
        q_lens = load(x.cu_q_lens, at + 1) - load(x.cu_q_lens, at)
        scratch[pl.ds(first + at, size)] = tiles(p, x, b, load(x.kv_lens, at), q_lens)
