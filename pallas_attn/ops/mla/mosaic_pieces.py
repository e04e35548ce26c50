"""Sequences of many query tokens in pieces: each is a sequence of a few of them, whose context ends with the last.

Pieces are as short as fills blocks of rows, so that a block reads next to nothing that its first token does not see:
of 128 heads, one token is two blocks. Neighbours share their context, which the L2 cache has by then."""

from typing import Any

import jax.numpy as jnp

from pallas_attn.core.batch import RaggedBatch, before_each, tiles_of
from pallas_attn.ops.mla.mosaic_form import Form
from pallas_attn.ops.mla.problem import Problem

BEGIN = 1  # tiles that take as long as a piece's query and result


def cut(p: Problem, form: Form, batch: RaggedBatch) -> dict[str, Any]:
    """What of the inputs tells of sequences, for pieces; those past the last have no tokens."""
    start, length = batch.bounds(p.tokens)
    first = jnp.pad(jnp.cumsum(-(-length // form.tokens)), (1, 0))  # piece of each sequence
    piece = jnp.arange(form.seqs + 1, dtype=jnp.int32)
    owner = jnp.searchsorted(first, piece, side="right", method="compare_all").astype(jnp.int32) - 1
    owner = jnp.clip(owner, 0, p.seqs - 1)
    offset = jnp.minimum((piece - first[owner]) * form.tokens, length[owner])
    cu_q_lens, owner = (start[owner] + offset).astype(jnp.int32), owner[:-1]
    kv_lens = jnp.clip(batch.kv_lens.astype(jnp.int32), 0, p.keys)[owner]
    kv_lens -= (start + length)[owner] - cu_q_lens[1:]
    tiles = tiles_of(kv_lens, cu_q_lens[1:] - cu_q_lens[:-1], p.pages_per_seq)
    return {
        "owners": owner, "kv_lens": kv_lens, "cu_q_lens": cu_q_lens, "live": jnp.full(1, form.seqs, jnp.int32),
        "before": before_each(jnp.where(tiles > 0, tiles + BEGIN, 0)),
    }  # fmt: skip
