"""Paged attention in plain jnp, streaming over pages with an online softmax: the portable backend.

The ragged queries are cut into tiles of one sequence each; a loop runs over blocks of pages up to the longest
sequence of the step. Memory is (tiles x block), whatever the context.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.masks import Mask
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.ops.paged_attention.stored import cache_numbers, finish, query_numbers
from pallas_attn.ops.paged_attention.terms import Where, dot, scores, visible

MAX_TILE = 64  # queries of a tile
MAX_BLOCK = 256  # keys of a block
BLOCK_ELEMENTS = 1 << 23  # float32 elements of one block of keys over all tiles, at most about


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


class Tiles(NamedTuple):
    """Tiles of queries, each of one sequence."""

    seq: Array  # [NT]
    context: Array  # [NT]
    kv_len: Array  # [NT] 0 for empty tiles
    pages: Array  # [NT, M'] M' a multiple of the block's pages
    token: Array  # [NT, BQ]
    q_pos: Array  # [NT, BQ]
    real: Array  # [NT, BQ]
    home: Array  # [T] which row of the flattened tiles a token is
    live: Array  # [T]


def tile_size(p: Problem) -> int:
    """Queries of a tile: the longest sequence's if known, else the average one's, as a power of two."""
    most = p.max_q_len or -(-p.tokens // max(p.seqs, 1))
    return min(1 << max(most - 1, 0).bit_length(), MAX_TILE)


def block_pages(p: Problem, tiles: int) -> int:
    """Pages of a block: up to MAX_BLOCK keys, fewer when there are many tiles."""
    keys = min(BLOCK_ELEMENTS // max(tiles * p.kv_heads * p.head_dim, 1), MAX_BLOCK)
    return max(min(keys // p.page_size, p.pages_per_seq), 1)


def cut(p: Problem, batch: RaggedBatch) -> tuple[Tiles, int]:
    """Cut the queries into tiles; also the pages of a block."""
    size = tile_size(p)
    count = max((p.tokens + p.seqs * (size - 1)) // size, 1)  # no batch has more tiles than this
    start, length = batch.bounds(p.tokens)
    ends = jnp.cumsum((length + size - 1) // size)
    index = jnp.arange(count)
    seq = jnp.clip(jnp.searchsorted(ends, index, side="right", method="compare_all"), 0, p.seqs - 1).astype(jnp.int32)
    first = (index - (ends[seq] - (length[seq] + size - 1) // size)) * size
    offset = first[:, None] + jnp.arange(size)
    real = (offset < length[seq][:, None]) & (index < ends[-1])[:, None]
    kv_len = jnp.clip(batch.kv_lens, 0, p.pages_per_seq * p.page_size)[seq]
    context = batch.kv_lens[seq] - length[seq]
    block = block_pages(p, count)
    pages = jnp.pad(batch.page_table, ((0, 0), (0, -p.pages_per_seq % block)))[seq]
    token_seq, token_pos, live = batch.tokens(p.tokens)
    inside = token_pos - (batch.kv_lens - length)[token_seq]
    home = (ends - (length + size - 1) // size)[token_seq] * size + inside
    tiles = Tiles(
        seq, context, jnp.where(real[:, 0], kv_len, 0), pages, jnp.clip(start[seq][:, None] + offset, 0, p.tokens - 1),
        context[:, None] + offset, real, jnp.clip(home, 0, count * size - 1), live,
    )  # fmt: skip
    return tiles, block


def gather_queries(p: Problem, args: Args, tiles: Tiles) -> Array:
    """The query numbers by tile: [NT, K, G, BQ, D]."""
    return query_numbers(args.q, p.kv_heads, tiles.live)[tiles.token].transpose(0, 2, 3, 1, 4)


def to_tokens(p: Problem, x: Array, tiles: Tiles, fill: float) -> Array:
    """[NT, K, G, BQ, ...] by tile back to [T, H, ...] by token, padding filled."""
    rows = jnp.moveaxis(x, 3, 1).reshape(-1, p.q_heads, *x.shape[4:])
    live = tiles.live.reshape(-1, *(1 for _ in rows.shape[1:]))
    return jnp.where(live, rows[tiles.home], fill)


def where(p: Problem, tiles: Tiles, block: int, j: Array) -> Where:
    """Places of the j-th block's logits."""
    keys = j * block * p.page_size + jnp.arange(block * p.page_size)
    return Where(tiles.seq, tiles.context, tiles.kv_len, tiles.q_pos, tiles.real, keys)


def load(args: Args, tiles: Tiles, block: int, j: Array, seen: Array) -> tuple[Array, Array]:
    """Keys and values of the j-th block in float32, zero where no query of the tile sees them."""
    pages = lax.dynamic_slice_in_dim(tiles.pages, j * block, block, axis=1)
    return cache_numbers(args.cache, pages, tiles.seq, jnp.any(seen, axis=-2))


def blocks(p: Problem, mask: Mask, tiles: Tiles, block: int) -> tuple[Array, Array]:
    """The blocks [first, last) that any tile of this step needs."""
    keys = block * p.page_size
    last = (jnp.max(tiles.kv_len) + keys - 1) // keys
    if set(mask.names()) - {"window", "non-causal", "per-sequence causal"} or mask.window is None:
        return jnp.zeros_like(last), last
    behind = jnp.min(jnp.where(tiles.real, tiles.q_pos, jnp.iinfo(jnp.int32).max)) - mask.window + 1
    first = jnp.where(jnp.asarray(mask.window) > 0, jnp.maximum(behind, 0) // keys, 0)
    return jnp.minimum(first.astype(last.dtype), last), last


def forward(p: Problem, args: Args, tiles: Tiles, block: int) -> tuple[Array, Array]:
    """(out [NT, K, G, BQ, DV], lse [NT, K, G, BQ]) in float32."""
    q = gather_queries(p, args, tiles)
    rows = q.shape[:-1]
    sink = jnp.full(p.q_heads, -jnp.inf) if args.sinks is None else args.sinks.astype(jnp.float32)
    top = jnp.broadcast_to(sink.reshape(1, p.kv_heads, -1, 1), rows)
    total = jnp.where(jnp.isfinite(top), 1.0, 0.0)

    def body(j, state):
        top, total, acc = state
        w = where(p, tiles, block, j)
        seen = visible(args.mask, w)
        k, v = load(args, tiles, block, j, seen)
        s = scores(dot("nkgqd,nxkd->nkgqx", q, k), args.scale, args.bias, args.soft_cap, w)
        s = jnp.where(seen[:, None, None], s, -jnp.inf)
        new = jnp.maximum(top, jnp.max(s, axis=-1))
        shift = jnp.where(jnp.isfinite(new), new, 0.0)
        weight = jnp.exp(s - shift[..., None])
        keep = jnp.exp(top - shift)
        acc = acc * keep[..., None] + dot("nkgqx,nxkd->nkgqd", weight, v)
        return new, total * keep + jnp.sum(weight, axis=-1), acc

    state = (top, total, jnp.zeros((*rows, p.v_head_dim)))
    first, last = blocks(p, args.mask, tiles, block)
    top, total, acc = lax.fori_loop(first, last, body, state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return acc / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def run(p: Problem, *arrays):
    """(out [T, H, DV], lse [T, H] if asked)."""
    args = Args(*arrays)
    if not p.tokens or not p.seqs:
        return nothing(p, args)
    tiles, block = cut(p, args.batch)
    out, lse = forward(p, args, tiles, block)
    out = finish(p, to_tokens(p, out, tiles, 0.0), args.out_scale)
    return (*out, to_tokens(p, lse, tiles, -jnp.inf)) if p.return_lse else out


def nothing(p: Problem, args: Args):
    """The answer where there is no query or no sequence."""
    out = finish(p, jnp.zeros((p.tokens, p.q_heads, p.v_head_dim)), args.out_scale)
    return (*out, jnp.full((p.tokens, p.q_heads), -jnp.inf)) if p.return_lse else out
