"""Context parallelism: each rank owns a part of every sequence's tokens, and the parts' best are the whole's best."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_attn.core.errors import require
from pallas_attn.ops.sparse_indexer.terms import check_size
from pallas_attn.ops.sparse_indexer.topk import indexer_topk
from pallas_attn.ops.sparse_indexer.topk.problem import ordered


@dataclasses.dataclass(frozen=True)
class ContextSplit:
    """Token x of a sequence belongs to rank (x // interleave) % ranks, which numbers its own tokens from 0.

    A rank keeps the keys of its own tokens, by their local positions, in pages of its own; all methods work on arrays
    of any shape. Source: vLLM v1/attention/backends/mla/sparse_utils.py and backends/utils.py (DCP).
    """

    ranks: int
    interleave: int = 1

    def __post_init__(self) -> None:
        require(self.ranks > 0, "ranks", self.ranks, "there is at least one")
        require(self.interleave > 0, "interleave", self.interleave, "a rank takes at least one token in turn")

    def owner(self, position: Array) -> Array:
        """The rank that keeps a token."""
        return position // self.interleave % self.ranks

    def local(self, position: Array, rank: Array | int) -> Array:
        """Local positions on a rank; -1 for what another rank keeps, or what is no position."""
        turn = position // (self.ranks * self.interleave)
        mine = (position >= 0) & (self.owner(position) == rank)
        return jnp.where(mine, turn * self.interleave + position % self.interleave, -1)

    def whole(self, local: Array, rank: Array | int) -> Array:
        """The position in the sequence of a rank's local one; -1 stays."""
        turn = local // self.interleave
        position = (turn * self.ranks + rank) * self.interleave + local % self.interleave
        return jnp.where(local < 0, -1, position)

    def local_len(self, length: Array, rank: Array | int) -> Array:
        """How many of a sequence's first `length` tokens a rank keeps."""
        whole_turns = length // self.interleave // self.ranks
        rest = length - whole_turns * self.ranks * self.interleave - rank * self.interleave
        return whole_turns * self.interleave + jnp.clip(rest, 0, self.interleave)


def merge_topk(
    logits: Float[Array, "P T c"], positions: Int[Array, "P T c"], k: int, *, sorted: bool = False
) -> Int[Array, "T k"]:
    """The k best of the candidates of P parts: exactly what `indexer_topk` finds in the whole rows.

    Exact because a column that is among the k best of its row is among the k best of its part: give every part's own k
    best (all that it has, if fewer). Ties go to the lowest position, as there.

    Args:
      logits: float32, the candidates' logits; where the position is -1 they mean nothing.
      positions: positions in the whole sequence, -1 for no candidate. No position may come twice in a row.
      k: static int.
      sorted: False gives positions in ascending order, True by descending logit.
    Returns: int32 `[T, k]`, -1 behind the last.
    """
    require(logits.ndim == 3, "logits", f"shape {logits.shape}", "they are [parts, rows, candidates]")
    require(positions.shape == logits.shape, "positions", f"shape {positions.shape}", f"logits has {logits.shape}")
    check_size("k", k)
    logits, positions = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in (logits, positions))
    positions = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions.astype(jnp.int32))
    none = positions == jnp.iinfo(jnp.int32).max
    # What is no candidate has the last position of all.
    _, best = lax.sort((~ordered(jnp.where(none, -jnp.inf, logits)), positions), num_keys=2)
    best = jnp.pad(best, ((0, 0), (0, max(k - best.shape[1], 0))), constant_values=jnp.iinfo(jnp.int32).max)[:, :k]
    best = best if sorted else jnp.sort(best, axis=1)
    return jnp.where(best == jnp.iinfo(jnp.int32).max, -1, best)


def split_topk(
    logits: Float[Array, "T W"], k: int, split: ContextSplit, axis: str, *,
    ends: Int[Array, "T"] | None = None, sorted: bool = False, backend: str | None = None,
) -> Int[Array, "T k"]:  # fmt: skip
    """`indexer_topk` where each rank of the mesh axis has the logits of its own tokens: one exchange of k candidates.

    Call it inside of `jax.shard_map`. Then `split.local(positions, rank)` are a rank's own to attend to.

    Args:
      logits: float32, this rank's own; column c is its local position c.
      k, sorted: as in `indexer_topk`.
      split: how tokens are dealt out; its ranks are those of the axis.
      axis: name of the mesh axis.
      ends: int32 `[T]`, how many local tokens row t sees: `split.local_len(length, rank)`; None for all columns.
    Returns: int32 `[T, k]` positions in the whole sequence, the same on every rank.
    """
    rank = lax.axis_index(axis)
    mine = indexer_topk(logits, min(k, logits.shape[1]), ends=ends, backend=backend)
    values = jnp.take_along_axis(logits, jnp.maximum(mine, 0), axis=1)
    values, positions = (lax.all_gather(x, axis) for x in (values, split.whole(mine, rank)))
    return merge_topk(values, positions, k, sorted=sorted)
