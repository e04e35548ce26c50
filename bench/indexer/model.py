"""One layer of sparse attention over a log of writes: embeddings, attention with RoPE, and an indexer beside it.

All questions of a log stand at the position behind its last write, each for itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

import pallas_attn as pa
from bench.indexer import task

WEIGHTS = Path(__file__).with_name("weights.npz")
WIDTH, HEADS, HEAD_DIM, INDEX_HEADS, TOPK = 96, 4, 64, 4, 32
PAGE = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "asked", "wq", "wkv", "wo", "out", "indexer"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Params:
    """Weights: embeddings of keys, values and of a question; attention (one kv head); the output; the indexer."""

    key: Array
    value: Array
    asked: Array
    wq: Array
    wkv: Array
    wo: Array
    out: Array
    indexer: pa.Indexer


class Tokens(NamedTuple):
    """A log's hidden states, `[n, WIDTH]` of writes and `[QUERIES, WIDTH]` of questions."""

    writes: Array
    questions: Array


def init(seed: int = 0) -> Params:
    """Random float32 weights."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape: int, scale: float) -> Array:
        return jax.random.normal(next(keys), shape) * scale

    return Params(
        normal(task.KEYS, WIDTH, scale=1.0), normal(task.VALUES, WIDTH, scale=1.0), normal(WIDTH, scale=1.0),
        normal(WIDTH, HEADS * HEAD_DIM, scale=WIDTH**-0.5), normal(WIDTH, 2 * HEAD_DIM, scale=WIDTH**-0.5),
        normal(HEADS * HEAD_DIM, WIDTH, scale=(HEADS * HEAD_DIM) ** -0.5),
        normal(WIDTH, task.VALUES, scale=WIDTH**-0.5),
        pa.Indexer.init(next(keys), WIDTH, WIDTH, heads=INDEX_HEADS, topk=TOPK),
    )  # fmt: skip


def save(path: Path, params: Params) -> None:
    """Writes the weights as bf16, bit for bit in uint16 (numpy has no bf16), in one .npz file."""
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(params)}
    bits = {name: np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16) for name, x in leaves.items()}
    np.savez_compressed(path, allow_pickle=False, **bits)


def load(path: Path = WEIGHTS) -> Params:
    """Reads `save`'s file; the weights come back in float32, which holds every bf16 exactly."""
    with np.load(path) as file:
        names = {n: jnp.asarray(file[n].view(jnp.bfloat16), jnp.float32) for n in file.files}
    like = jax.eval_shape(init)
    return jax.tree_util.tree_map_with_path(
        lambda p, _: names[jax.tree_util.keystr(p, simple=True, separator=".")], like
    )


def embed(params: Params, keys: ArrayLike, values: ArrayLike, asked: ArrayLike) -> Tokens:
    """Hidden states of one log, normed."""
    return Tokens(
        _norm(params.key[jnp.asarray(keys)] + params.value[jnp.asarray(values)]),
        _norm(params.key[jnp.asarray(asked)] + params.asked),
    )


def _norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _rotate(x: Array, positions: Array) -> Array:
    half = HEAD_DIM // 2
    angle = positions[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def projections(params: Params, tokens: Tokens) -> tuple[Array, Array, Array]:
    """Attention's queries [QUERIES, HEADS, D], keys and values [n, 1, D].

    Queries grow with the logarithm of the length: else the softmax over more writes would blur what one of them says.
    """
    n = tokens.writes.shape[0]
    q = (tokens.questions @ params.wq).reshape(-1, HEADS, HEAD_DIM) * (math.log(n) / math.log(1024))
    k, v = jnp.split((tokens.writes @ params.wkv)[:, None], 2, -1)
    return _rotate(q, jnp.full(q.shape[0], n)), _rotate(k, jnp.arange(n)), v


def paged(k: Array, v: Array, page_size: int) -> pa.PagedKVCache:
    """The log's keys and values in pages 0, 1, ..."""
    n = k.shape[0]
    cache = pa.PagedKVCache.allocate(n // page_size, page_size, 1, HEAD_DIM, format=pa.F32)
    return pa.write_kv(cache, k, v, jnp.arange(n, dtype=jnp.int32))


def dense(params: Params, tokens: Tokens) -> Array:
    """Logits over values [QUERIES, VALUES], every question attending to every write."""
    q, k, v = projections(params, tokens)
    n = k.shape[0]
    batch = pa.RaggedBatch(
        jnp.arange(n // PAGE, dtype=jnp.int32)[None], jnp.array([n], jnp.int32), jnp.array([0, len(q)], jnp.int32)
    )
    return finish(params, tokens, pa.paged_attention(q, paged(k, v, PAGE), batch, mask=pa.Mask(causal=False)))


def sparse(params: Params, tokens: Tokens, positions: Array) -> Array:
    """Logits over values, every question attending to its own positions [QUERIES, k] only (-1: none)."""
    q, k, v = projections(params, tokens)
    slots, counts = pa.to_slots(positions, each_alone(q.shape[0], k.shape[0], 1), page_size=1, compact=True)
    rows = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    batch = pa.RaggedBatch(slots, counts, rows, max_q_len=1)  # a page is a token: a row's pages are what it chose
    return finish(params, tokens, pa.paged_attention(q, paged(k, v, 1), batch))


def each_alone(questions: int, length: int, page_size: int) -> pa.RaggedBatch:
    """Every question as the last token of a sequence of its own; all have the log's pages."""
    pages = jnp.broadcast_to(jnp.arange(length // page_size, dtype=jnp.int32), (questions, length // page_size))
    rows = jnp.arange(questions + 1, dtype=jnp.int32)
    return pa.RaggedBatch(pages, jnp.full(questions, length, jnp.int32), rows, max_q_len=1)


def finish(params: Params, tokens: Tokens, heads: object) -> Array:
    """Attention's output to logits."""
    assert isinstance(heads, Array)  # neither quantised nor with its LSE: nobody asked
    x = tokens.questions + heads.reshape(heads.shape[0], -1) @ params.wo
    return _norm(x) @ params.out


def attention_weights(params: Params, tokens: Tokens) -> Array:
    """What the heads attend to on average, [QUERIES, n]."""
    q, k, _ = projections(params, tokens)
    return jnp.mean(jax.nn.softmax(jnp.einsum("qhd,nd->hqn", q, k[:, 0]) * HEAD_DIM**-0.5), axis=0)


def index_parts(indexer: pa.Indexer, tokens: Tokens) -> tuple[Array, Array, Array]:
    """(index queries of the questions, index keys of the writes, weights of the questions), not yet quantised."""
    writes, questions = tokens
    n, count = writes.shape[0], questions.shape[0]
    _, k, _ = indexer.project(writes, writes, jnp.arange(n, dtype=jnp.int32))
    q, _, weights = indexer.project(questions, questions, jnp.full(count, n, jnp.int32))
    return q, k, weights


def index_logits(indexer: pa.Indexer, tokens: Tokens) -> Array:
    """The indexer's logits [QUERIES, n], differentiable, as they are after FP8."""
    q, k, weights = index_parts(indexer, tokens)
    q, k = pa.fake_quantize(q, pa.INDEX_Q), pa.fake_quantize(k, pa.INDEX_K)
    starts = jnp.zeros(q.shape[0], jnp.int32)
    return pa.indexer_logits(q, k, weights, starts, starts + k.shape[0], scale=indexer.scale)
