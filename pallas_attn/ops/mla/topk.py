"""TopK: which cached tokens each query token attends to, instead of all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_attn.core.errors import require
from pallas_attn.core.leaf import Leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=("indices", "lengths"), meta_fields=("slots",))
@dataclasses.dataclass(frozen=True)
class TopK:
    """The keys of every query token by number, in any order.

    indices: int32 `[T, k]`. A number that names no token, such as -1, is passed over wherever it stands; one that
      stands twice counts twice. What a token lists it sees: there is no causal mask besides.
    lengths: int32 `[T]`, only the first so many of a row count; None for all.
    slots: static; False: numbers are positions in the token's own sequence, 0 to kv_len - 1 (what an indexer finds);
      True: they are slots of the cache, page * page_size + slot in page.
    """

    indices: Leaf
    lengths: Leaf = None
    slots: bool = False


def check_topk(topk, tokens: int) -> TopK | None:
    """A TopK, or a bare array of positions, whose arrays fit the query."""
    if topk is None:
        return None
    topk = topk if isinstance(topk, TopK) else TopK(topk)
    require(isinstance(topk.slots, bool), "topk.slots", topk.slots, "it is static: True or False")
    indices, lengths = topk.indices, topk.lengths
    require(hasattr(indices, "shape"), "topk", type(indices).__name__, "pass indices or a pa.TopK")
    ok = len(indices.shape) == 2 and indices.shape[0] == tokens
    require(ok, "topk.indices", f"shape {indices.shape}", f"it is [{tokens}, k]: a row for each query token")
    require(indices.shape[1] > 0, "topk.indices", f"shape {indices.shape}", "k is at least 1")
    require(jnp.issubdtype(indices.dtype, jnp.signedinteger), "topk.indices", indices.dtype, "use int32")
    if lengths is not None:
        require(lengths.shape == (tokens,), "topk.lengths", f"shape {lengths.shape}", f"it is [{tokens}]")
        require(jnp.issubdtype(lengths.dtype, jnp.integer), "topk.lengths", lengths.dtype, "use int32")
    return topk
