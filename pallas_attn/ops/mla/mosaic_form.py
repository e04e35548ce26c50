"""How the kernels of MLA are cut to a problem, and what they read."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ROWS, SMS, token_layout

LATENT, ROPE = 512, 64  # the one shape of a row that the kernels know
HALF = LATENT // 2  # value columns of one warpgroup
SLACK = 8  # tiles more for a worker, which take as long as what whole sequences spare
CHUNK = 512  # sequences that the search for a worker's first one looks at at once
MOST_SEQS = 8192
MOST_TOKENS = 8  # of a sequence that is not cut into pieces


class Form(NamedTuple):
    """The static shape of the kernels for one problem.

    All heads of all query tokens of a sequence are rows: row t * heads + h is head h of its token t. They are cut into
    blocks of 64, one for each CTA of those that share a stretch of tiles. A sequence may be a piece of one: some of its
    query tokens (`mosaic_pieces`).
    """

    heads: int  # rounded up to 8
    chunk: int  # rows that are copied at once, all of one token
    columns: int  # blocks of a sequence
    rows: int  # real rows of a block, at most
    workers: int  # stretches of tiles
    tokens: int  # of a sequence, at most
    seqs: int  # where keys are listed, every token is a sequence of its own; or pieces, at most
    tiles: int = 0  # of each token's list


def form_of(p: Problem, workers: int | None = None) -> Form:
    """The form of a problem that `supports` takes."""
    heads = padded_heads(p)
    chunk = math.gcd(heads, ROWS)
    tokens, seqs = (1, p.tokens) if p.topk else (p.max_q_len or 1, p.seqs)
    if in_pieces(p):
        tokens, seqs = pieces(p, ROWS // chunk)
    columns = -(-heads * tokens // ROWS)
    tiles = -(-(p.topk or 0) // TILE)
    workers = workers or max(SMS // columns, 1)
    return Form(heads, chunk, columns, min(heads * tokens, ROWS), workers, tokens, seqs, tiles)


def in_pieces(p: Problem) -> bool:
    """Whether sequences may have so many query tokens that they are cut."""
    return not p.topk and (p.max_q_len or MOST_TOKENS + 1) > MOST_TOKENS


def pieces(p: Problem, fill: int) -> tuple[int, int]:
    """(query tokens of a piece, pieces at most), where `fill` tokens fill blocks of rows: more only where there would
    be too many pieces."""
    tokens = fill
    while (count := (p.tokens + p.seqs * (tokens - 1)) // tokens) > MOST_SEQS and tokens < p.tokens:
        tokens *= 2
    return tokens, count


def padded_heads(p: Problem) -> int:
    """Heads, rounded up to the 8 rows that a tile in shared memory is made of."""
    return -(-p.heads // 8) * 8


class Listed(NamedTuple):
    """What the kernels themselves ask of the batch where keys are listed; page table and lengths only for positions."""

    cu_q_lens: Any
    live: Any  # [1]
    kv_lens: Any
    page_table: Any


class Inputs(NamedTuple):
    """What the kernels read from global memory; what is absent is one number, or None where that is said."""

    q_latent: Any  # [T * heads, C]
    q_rope: Any  # [T * heads, R]
    pages: Any  # [N, S, C + R], or rows of bytes [N * S, 656]
    page_table: Any  # where keys are listed, the list [T, tiles, TILE]
    owners: Any  # the row of the page table of each piece; None where sequences are whole
    kv_lens: Any  # where keys are listed, how many; None for as many as there are, of every real token
    cu_q_lens: Any  # this and what follows: None for a token a sequence, and as many tiles
    live: Any  # [1]
    before: Any  # Schedule.before
    scale: Any  # [1], of the logits
    cache_scale: Any  # [1]
    q_scales: Any  # of both parts: [1], or [T * heads + 64]
    out_scale: Any  # [1]
    listed: Any = None  # Listed, where a token's own sequence has to be known


def owner(x: Listed, token):
    """(sequence, whether there is such a one) of a query token: in a decode step its own number, else by halving."""
    seqs = x.cu_q_lens.shape[0] - 1
    live = jnp.clip(x.live[0], 0, seqs)
    guess = jnp.minimum(token, seqs - 1)
    right = (x.cu_q_lens[guess] <= token) & (token < x.cu_q_lens[guess + 1]) & (guess < live)

    def halve(bounds):
        low, high = bounds
        middle = lax.div(low + high, jnp.int32(2))
        further = x.cu_q_lens[middle] <= token
        return jnp.where(further, middle, low), jnp.where(further, high, middle)

    bounds = jnp.where(right, guess, 0), jnp.where(right, guess, live) + 1
    low, _ = lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, halve, bounds)
    b = jnp.minimum(low, seqs - 1)
    return b, (low < live) & (x.cu_q_lens[b] <= token) & (token < x.cu_q_lens[b + 1])


class Sequence(NamedTuple):
    """One sequence of the step, every number kept inside the step and the page table. What its number alone tells is
    None until it is `completed`."""

    kv_len: Any
    start: Any = None  # first query token
    q_len: Any = None
    begin: Any = None  # its first tile of the list
    end: Any = None  # and the one past its last
    pages: Any = None  # its row of the page table
    owner: Any = None  # of a token with listed keys: its sequence, and the cached tokens of that
    context: Any = None

    @classmethod
    def read(cls, p: Problem, form: Form, x: Inputs, b) -> "Sequence":
        """Sequence b; padding has no query tokens, or no keys."""
        tiles = (None, None) if x.before is None else (x.before[b], x.before[b + 1])
        if x.listed is not None:
            seq, real = owner(x.listed, b)
            room = p.pages_per_seq * p.page_size
            context = None if x.listed.kv_lens is None else jnp.clip(x.listed.kv_lens[seq], 0, room)
            keys = p.keys if x.kv_lens is None else jnp.clip(x.kv_lens[b], 0, p.keys)
            return cls(jnp.where(real, keys, 0), None, None, *tiles, None, seq, context)
        start = jnp.clip(x.cu_q_lens[b], 0, p.tokens)
        end = jnp.clip(x.cu_q_lens[b + 1], 0, p.tokens)
        q_len = jnp.where(b < x.live[0], jnp.clip(end - start, 0, form.tokens), 0)
        pages = None if x.owners is None else x.owners[b]
        return cls(jnp.clip(x.kv_lens[b], 0, p.keys), start, q_len, *tiles, pages)

    def completed(self, form: Form, b) -> "Sequence":
        """Sequence b with all its numbers."""
        told = {
            "start": b, "q_len": jnp.int32(1), "pages": b,
            "begin": jnp.int32(b * form.tiles), "end": jnp.int32((b + 1) * form.tiles),
        }  # fmt: skip
        return self._replace(**{name: x for name, x in told.items() if getattr(self, name) is None})

    @property
    def tiles(self):
        """How many it has: a schedule may count more of them than there are."""
        return jnp.minimum(self.end - self.begin, lax.div(self.kv_len + (TILE - 1), jnp.int32(TILE)))


class Segment(NamedTuple):
    """The part of one sequence that a worker reads, for its block of rows."""

    b: Any
    seq: Sequence
    worker: Any
    tile0: Any  # its first tile of the sequence
    count: Any  # tiles; none where the sequence has no such rows
    whole: Any  # whether those are all tiles of the sequence
    row: Any  # the block's first row among those of the step
    rows: Any  # real ones

    @property
    def slot(self):
        """Where the sums of its rows go: worker and sequence both rise along the list, so no two pairs share one."""
        return self.worker + self.b

    @property
    def partial_slot(self):
        """Where a partial result goes: a worker has no more than the end of a sequence and the beginning of one."""
        return 2 * self.worker + (self.tile0 == 0).astype(jnp.int32)


def begins(x: Inputs, form: Form, b):
    """Tiles before sequence b."""
    return jnp.int32(b * form.tiles) if x.before is None else x.before[b]


def share(x: Inputs, form: Form):
    """(tiles in all, tiles of each worker): equal shares, but whole sequences where all are of one length and that
    costs a worker no more than a few tiles. A part of a sequence leaves its result in memory in float32."""
    total, one = begins(x, form, form.seqs), begins(x, form, 1)
    live = form.seqs if x.live is None else x.live[0]
    each = jnp.maximum(lax.div(total + (form.workers - 1), jnp.int32(form.workers)), 1)
    whole = lax.div(each + one - 1, jnp.maximum(one, 1)) * one
    return total, jnp.where((total == one * live) & (whole >= each) & (whole <= each + SLACK), whole, each)


def find(x: Inputs, form: Form, first, last):
    """The sequences that tiles `first` and `last` of the flat list belong to, by a vote inside of each warp: sums
    across warps would share their memory with those of the other warpgroups."""
    if x.before is None:
        return lax.div(first, jnp.int32(form.tiles)), lax.div(last, jnp.int32(form.tiles))
    before, votes = x.before, jnp.int32(0)
    for at in range(0, before.shape[0], CHUNK):
        size = min(CHUNK, before.shape[0] - at)
        starts = plgpu.load(before.at[pl.ds(at, size)], layout=token_layout(size), optimized=False)
        votes += jnp.sum((starts <= first).astype(jnp.int32) + (starts <= last).astype(jnp.int32) * 2**16)
    return (votes & (2**16 - 1)) - 1, lax.shift_right_logical(votes, jnp.int32(16)) - 1


def segment(p: Problem, form: Form, seq: Sequence, b, worker, column, start, end) -> Segment:
    """What a worker that has the tiles `start` to `end` of the list reads of sequence b."""
    seq = seq.completed(form, b)
    tile0 = jnp.maximum(start - seq.begin, 0)
    rows = jnp.clip(seq.q_len * form.heads - column * ROWS, 0, ROWS)
    if p.topk:  # counted exactly; said otherwise, the same is too much for the registers of `mosaic_sparse_rows`
        tiles, rows = seq.end - seq.begin, jnp.where(seq.kv_len > 0, rows, 0)
        last = jnp.minimum(end, seq.end) - seq.begin
    else:
        tiles = seq.tiles
        last = jnp.maximum(jnp.minimum(end - seq.begin, tiles), tile0)
    count = jnp.where(rows > 0, last - tile0, 0)
    whole = (tile0 == 0) & (last == tiles)
    return Segment(b, seq, worker, tile0, count, whole, seq.start * form.heads + column * ROWS, rows)


def inside(p: Problem, tile):
    """Slots of a page that a tile takes."""
    if p.page_size <= TILE:
        return pl.ds(0, p.page_size)
    return pl.ds(lax.rem(tile * TILE, jnp.int32(p.page_size)), TILE)
