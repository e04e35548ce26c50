"""Which rows a CTA of the prefill kernel takes and what they see; its static form and what it reads."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_attn.core.formats import INT8
from pallas_attn.ops.paged_attention.problem import Problem

WARPGROUPS = 2  # that compute
EVER = 2**30  # tokens: more than any sequence has


class Form(NamedTuple):
    """The static shape of the kernel for one problem: row i * part + g of a warpgroup is head g of its token i."""

    tile: int  # tokens of a step
    part: int  # query heads of a block
    parts: int  # blocks that a group of heads takes
    span: int  # tokens of a warpgroup
    terms: int  # of the query, which add up
    operand: Any  # dtype of Q and K in the matrix unit
    wide_type: Any  # dtype of V and P in the matrix unit
    keys: int
    values: int
    wide: int
    ahead: bool  # the next block's query has memory of its own
    few: int  # sequences of no more query tokens are somebody else's
    blocks: int  # of all sequences and of what is padding, at most
    registers: tuple[int, int, int]  # of a thread that computes, prepares or loads
    mirrored: bool = False  # a window bounds what lies ahead too, where a sequence is not causal

    @property
    def tokens(self) -> int:
        """Query tokens of a block."""
        return WARPGROUPS * self.span

    def columns(self, p: Problem) -> list[int]:
        """Columns of the accumulators of values: a kernel of 512 threads has no wider ones."""
        width = min(p.v_head_dim, 128)
        return [width] * (p.v_head_dim // width)

    def cells(self, p: Problem) -> int:
        """Blocks of all heads."""
        return self.blocks * p.kv_heads * self.parts

    def value_slots(self, p: Problem) -> int:
        """Tiles of values that the matrix unit can read."""
        return self.wide if p.kv_format.dtype.itemsize == 1 else self.values

    def relays_keys(self, p: Problem) -> bool:
        """Whether keys pass through the third warpgroup's hands."""
        return p.kv_format.dtype == INT8 or p.kv_format.granularity == "token_head"


class Inputs(NamedTuple):
    """What the kernel reads from global memory; what is absent is one number."""

    q: Any  # [T, V, part, D]
    buffers: tuple  # the cache's, heads and dims of a token that lie together merged
    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    live: Any  # [1]
    scale: Any  # [1]
    q_scale: Any  # [1], [V, part] or [T, V, part]
    k_scale: Any  # as the cache has it, at least [1]
    v_scale: Any
    cap: Any  # [1]
    window: Any  # [1]
    causal: Any  # [B] or absent
    sinks: Any  # [V, part] or absent
    out_scale: Any  # [1]


class Block(NamedTuple):
    """Query tokens of one sequence and a group of heads, and the tiles that they see."""

    unit: Any  # virtual kv head
    head: Any  # kv head
    b: Any  # the sequence's place in the batch
    real: Any  # no padding
    start: Any  # first query token of the sequence in the step
    q_len: Any
    at: Any  # first query token of the block in the sequence
    kv_len: Any
    end: Any  # no row sees this token or one behind it
    clear: Any  # every row sees those before it, from
    low_clear: Any  # here on
    tile0: Any  # first tile
    count: Any  # tiles

    @property
    def context(self):
        """Cached tokens before the step's."""
        return self.kv_len - self.q_len

    def tile(self, t):
        """The t-th tile to be worked on: from the last one down, so that where a mask is needed, nothing else waits."""
        return self.tile0 + self.count - 1 - t

    def put(self, to) -> None:
        """Into shared memory, int32 [NUMBERS]."""
        for i, x in enumerate(self):
            to[i] = x.astype(jnp.int32)

    @classmethod
    def get(cls, at) -> "Block":
        """From shared memory."""
        s = cls(*(at[i] for i in range(NUMBERS)))
        return s._replace(real=s.real != 0)


NUMBERS = len(Block._fields)


def locate(p: Problem, form: Form, x: Inputs, cell) -> tuple[Any, Block]:
    """(whether there is one, the block of a cell). Sequence b has the blocks from floor(first token / a block's tokens)
    + b on: enough of them, and they are found by a search. The last ones see most and come first."""
    units = jnp.int32(p.kv_heads * form.parts)
    index, unit = form.blocks - 1 - lax.div(cell, units), lax.rem(cell, units)
    live = jnp.clip(x.live[0], 0, p.seqs)
    # Where the queries of a sequence begin; past the last they end.
    first_token = lambda b: jnp.clip(x.cu_q_lens[jnp.minimum(b, live)], 0, p.tokens)  # noqa: E731
    first_block = lambda b: lax.div(first_token(b), jnp.int32(form.tokens)) + b  # noqa: E731

    def halve(_, bounds):
        low, high = bounds  # low begins in time, high does not
        middle = lax.div(low + high, jnp.int32(2))
        begins = first_block(middle) <= index
        return jnp.where(begins, middle, low), jnp.where(begins, high, middle)

    number, _ = lax.fori_loop(0, (p.seqs + 1).bit_length(), halve, (jnp.int32(0), live + 1))
    # What comes after the last sequence is padding: it sees no key.
    b, real = jnp.minimum(number, p.seqs - 1), number < live
    start = first_token(number)
    q_len = jnp.where(real, first_token(number + 1), p.tokens) - start
    at = (index - first_block(number)) * form.tokens
    kv_len = jnp.where(real, jnp.clip(x.kv_lens[b], 0, p.pages_per_seq * p.page_size), 0)
    some = (at < q_len) & (jnp.logical_not(real) | (q_len > form.few))
    head = lax.div(unit, jnp.int32(form.parts))
    block = Block(unit, head, b, real, start, q_len, at, kv_len, *[jnp.int32(0)] * 5)
    return some, _with_tiles(p, form, x, block)


def sight(p: Problem, form: Form, x: Inputs, b) -> tuple[Any, Any]:
    """(tokens ahead, tokens behind) that rows of a sequence see: those less than so far from a row's own token."""
    ever = jnp.int32(EVER)
    behind = ever
    if "window" in p.options:
        behind = jnp.where(x.window[0] > 0, jnp.minimum(x.window[0], ever), ever)
    free = behind if form.mirrored else ever
    if "per-sequence causal" in p.options:
        return jnp.where(x.causal[b] != 0, 1, free), behind
    return free if "non-causal" in p.options else jnp.int32(1), behind


def _with_tiles(p: Problem, form: Form, x: Inputs, s: Block) -> Block:
    first = s.context + s.at  # position of the first row
    last = jnp.minimum(first + form.tokens, s.kv_len) - 1
    ahead, behind = sight(p, form, x, s.b)
    end, clear = (jnp.minimum(row + ahead, s.kv_len) for row in (last, first))
    low, low_clear = (jnp.maximum(row - behind + 1, 0) for row in (first, last))
    tile = jnp.int32(form.tile)
    tile0 = lax.div(low, tile)
    # A block that sees nothing has one tile, all of it masked.
    count = jnp.maximum(lax.div(end + (form.tile - 1), tile) - tile0, 1)
    return s._replace(end=end, clear=clear, low_clear=low_clear, tile0=tile0, count=count)
