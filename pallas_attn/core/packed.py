"""Tokens of many sequences laid one after the other: what every gather computes and checks.

Sequence b contributes its tokens starts[b] to kv_lens[b]. How many there are is known only on the device, while the
rows of the result are static: too many are dropped, the rest of the rows is empty.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch, check_batch, check_kv_lens
from pallas_attn.core.errors import is_concrete, require


class Rows(NamedTuple):
    """Where every row of the result comes from, each `[max_tokens]`: its sequence, page and slot in page, and whether
    there is such a token."""

    seq: Array
    page: Array
    slot: Array
    real: Array


def check_gather(batch: RaggedBatch, page_size: int, max_tokens, starts) -> None:
    """Refuse a gather whose arguments do not fit each other."""
    check_batch(batch)
    check_kv_lens(batch, page_size)
    _check_max_tokens(max_tokens)
    _check_starts(starts, batch)
    seqs, pages_per_seq = batch.page_table.shape
    require(seqs * pages_per_seq > 0, "batch.page_table", f"shape {batch.page_table.shape}", "it has room for no token")
    room = seqs * pages_per_seq * page_size
    require(room < 2**31, "batch.page_table", f"room for {room} tokens", "gather fewer sequences at once: below 2**31")


def _check_max_tokens(max_tokens) -> None:
    fix = "it is a static int of at least 1: the rows of the result"
    number = isinstance(max_tokens, int | np.integer) and not isinstance(max_tokens, bool)
    require(
        number and int(max_tokens) > 0, "max_tokens", max_tokens if is_concrete(max_tokens) else "a traced value", fix
    )


def _check_starts(starts, batch: RaggedBatch) -> None:
    if starts is None:
        return
    seqs, live = batch.page_table.shape[0], batch.known_live
    require(starts.shape == (seqs,), "starts", f"shape {starts.shape}", f"one for each sequence: ({seqs},)")
    require(jnp.issubdtype(starts.dtype, jnp.integer), "starts", starts.dtype, "use int32: they count tokens")
    if live is not None and is_concrete(starts):
        least = int(np.min(np.asarray(starts)[:live], initial=0))
        require(least >= 0, "starts", least, "a sequence begins at its token 0")


def spans(kv_lens: Array, starts: Array | None, num_seqs: Array | None, room: int) -> tuple[Array, Array]:
    """(first [B], cu_lens [B + 1]): where in each sequence its tokens begin, and in which row of the result.

    room: tokens that the page table of one sequence has pages for; lengths and starts are clamped to it.
    """
    # Clamped before the cast: 64 bits must not wrap.
    kv_lens = jnp.clip(kv_lens, 0, room).astype(jnp.int32)
    first = 0 if starts is None else jnp.clip(starts, 0, room).astype(jnp.int32)
    first = jnp.minimum(first, kv_lens)
    seqs = kv_lens.shape[0]
    live = seqs if num_seqs is None else jnp.asarray(num_seqs)
    lens = jnp.where(jnp.arange(seqs) < live, kv_lens - first, 0)
    return first, jnp.pad(jnp.cumsum(lens, dtype=jnp.int32), (1, 0))


def rows(first: Array, cu_lens: Array, page_table: Array, max_tokens: int, page_size: int, pages: int) -> Rows:
    """The rows of the result; page numbers are kept inside the `pages` of the cache."""
    t = jnp.arange(max_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(cu_lens, t, side="right", method="compare_all").astype(jnp.int32) - 1
    seq = jnp.minimum(seq, page_table.shape[0] - 1)
    position = jnp.where(t < cu_lens[-1], first[seq] + t - cu_lens[seq], 0)
    page = jnp.clip(page_table[seq, position // page_size], 0, pages - 1).astype(jnp.int32)
    return Rows(seq, page, position % page_size, t < cu_lens[-1])
