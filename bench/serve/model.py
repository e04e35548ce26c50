"""The model: a byte-level decoder-only transformer (GQA, RoPE, RMSNorm, gated MLP, tied embeddings).

It has two forwards over the same weights: `dense`, plain causal attention in float32 (the yardstick), and `paged`,
one ragged step through a paged KV cache (what is served and what is trained).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa

type Params = dict[str, Any]
type View = Callable[[pa.PagedKVCache], pa.PagedKVCache]

WEIGHTS = Path(__file__).with_name("weights.npz")
MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class Config:
    """Sizes of the model. `context` is the length it is trained on."""

    vocab: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 448
    context: int = 512
    rope_base: float = 10_000.0


class LayerScales(NamedTuple):
    """Scales of queries, keys and values, a leading layer axis on each; None where the format needs none given."""

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None


class Scales(NamedTuple):
    """The scales that values are stored with, and those they are read with. They differ only to emulate a bug."""

    stored: LayerScales = LayerScales()
    read: LayerScales = LayerScales()


NO_SCALES = Scales()


class Step(NamedTuple):
    """One ragged step: token t of `tokens` [T] is a query at `positions` [T] of its sequence; T is padded."""

    tokens: Array
    positions: Array
    batch: pa.RaggedBatch


@dataclass(frozen=True)
class Numerics:
    """How `paged` runs attention; static. `view` is what attention sees of a layer's cache (None: the cache itself)."""

    backend: str | None = None
    query: pa.Format | None = None
    view: View | None = None


PLAIN = Numerics()


def init(key: Array, config: Config) -> Params:
    """Random float32 weights; projections back into the residual stream start smaller, by the depth."""
    width, depth = config.width, config.layers
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {
        "wq": (width, q_width), "wk": (width, kv_width), "wv": (width, kv_width), "wo": (q_width, width),
        "w_gate": (width, config.hidden), "w_up": (width, config.hidden), "w_down": (config.hidden, width),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes) + 1)
    layers = {
        name: jax.random.normal(k, (depth, *shape)) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    for name in ("wo", "w_down"):
        layers[name] = layers[name] * (2 * depth) ** -0.5
    layers |= {name: jnp.ones((depth, width)) for name in ("norm_attention", "norm_mlp")}
    embed = jax.random.normal(keys[0], (config.vocab, width)) * 0.02
    return {"embed": embed, "norm": jnp.ones(width), "layers": layers}


def save(path: Path, params: Params) -> None:
    """Writes the weights as bf16, bit for bit in uint16 (numpy has no bf16), in one .npz file."""
    flat = {name: leaf for name, leaf in params.items() if name != "layers"}
    flat |= {f"layers/{name}": leaf for name, leaf in params["layers"].items()}
    bits = {name: np.asarray(jnp.asarray(leaf, jnp.bfloat16)).view(np.uint16) for name, leaf in flat.items()}
    np.savez_compressed(path, allow_pickle=False, **bits)


def load(path: Path = WEIGHTS) -> Params:
    """Reads `save`'s file; the weights come back in float32, which holds every bf16 exactly."""
    params: Params = {"layers": {}}
    with np.load(path) as file:
        for name in file.files:
            leaf = jnp.asarray(file[name].view(jnp.bfloat16), jnp.float32)
            (params["layers"] if name.startswith("layers/") else params)[name.removeprefix("layers/")] = leaf
    return params


def rms_norm(x: Array, weight: Array) -> Array:
    """Root-mean-square norm in float32, rounded to the dtype of the weights."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x.astype(weight.dtype) * weight


def rotations(positions: Array, config: Config) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding, float32 [T, 1, head_dim / 2]."""
    half = config.head_dim // 2
    angles = positions[:, None, None] * config.rope_base ** (-jnp.arange(half) / half)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Applies the rotary embedding to x [T, heads, head_dim]; dimension i pairs with i + head_dim / 2."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def dropout(x: Array, key: Array | None, rate: float) -> Array:
    """Inverted dropout; nothing without a key."""
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def block[Aux](
    x: Array,
    w: Params,
    rotation: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], tuple[Array, Aux]],
    drop: Callable[[Array, int], Array] = lambda x, _: x,
) -> tuple[Array, Aux]:
    """One layer on the residual stream x [T, width]; `attend` maps q, k, v to the heads' outputs and an extra."""
    tokens, head_dim = x.shape[0], 2 * rotation[0].shape[-1]
    h = rms_norm(x, w["norm_attention"])
    q, k, v = ((h @ w[name]).reshape(tokens, -1, head_dim) for name in ("wq", "wk", "wv"))
    heads, extra = attend(rotate(q, rotation), rotate(k, rotation), v)
    x = x + drop(heads.reshape(tokens, -1).astype(h.dtype) @ w["wo"], 0).astype(x.dtype)
    h = rms_norm(x, w["norm_mlp"])
    x = x + drop((jax.nn.silu(h @ w["w_gate"]) * (h @ w["w_up"])) @ w["w_down"], 1).astype(x.dtype)
    return x, extra


def logits_of(x: Array, params: Params) -> Array:
    """float32 logits [T, vocab] through the tied embedding."""
    return (rms_norm(x, params["norm"]) @ params["embed"].T).astype(jnp.float32)


def dense(params: Params, tokens: Array, config: Config) -> tuple[Array, tuple[Array, Array, Array]]:
    """Causal float32 forward of one text [T], without pages: logits [T, vocab], and all layers' q, k, v [L, T, ...]."""
    rotation = rotations(jnp.arange(len(tokens)), config)
    causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        group = config.heads // config.kv_heads
        scores = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, group, 1)) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
        return jnp.einsum("hqk,khd->qhd", weights, jnp.repeat(v, group, 1)), (q, k, v)

    x = params["embed"][tokens] * config.width**0.5
    x, qkv = jax.lax.scan(lambda x, w: block(x, w, rotation, attend), x, params["layers"])
    return logits_of(x, params), qkv


def with_scales(cache: pa.PagedKVCache, scales: LayerScales) -> pa.PagedKVCache:
    """The cache with one layer's own scales of keys and values, where its format takes them from outside."""
    if scales.k is None:
        return cache
    assert isinstance(cache.k, pa.Quantized)
    assert isinstance(cache.v, pa.Quantized)
    k, v = dataclasses.replace(cache.k, scale=scales.k), dataclasses.replace(cache.v, scale=scales.v)
    return dataclasses.replace(cache, k=k, v=v)


def attend_paged(
    qkv: tuple[Array, Array, Array],
    slots: Array,
    batch: pa.RaggedBatch,
    cache: pa.PagedKVCache,
    scales: Scales,
    how: Numerics,
) -> tuple[Array, pa.PagedKVCache]:
    """Writes a layer's keys and values into its pages and attends over them; q, k and v are rounded to bf16 first."""
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    cache = pa.write_kv(with_scales(cache, scales.stored), k, v, slots, backend=how.backend)
    seen = with_scales(cache, scales.read)
    seen = how.view(seen) if how.view else seen
    query: Array | pa.Quantized = q
    if how.query is not None:
        query = dataclasses.replace(pa.quantize(q, how.query, scales.stored.q), scale=scales.read.q)
    heads = pa.paged_attention(query, seen, batch, backend=how.backend)
    assert isinstance(heads, Array)  # neither quantised nor with its LSE: nobody asked
    return heads, cache


def paged(
    params: Params,
    step: Step,
    cache: pa.PagedKVCache,
    config: Config,
    *,
    scales: Scales = NO_SCALES,
    how: Numerics = PLAIN,
    key: Array | None = None,
    rate: float = 0.0,
) -> tuple[Array, pa.PagedKVCache]:
    """One ragged step: logits [T, vocab] and the cache, which holds all layers folded into its page axis.

    Layer l owns pages l * N to (l + 1) * N - 1, so that the whole cache is one buffer that `lax.scan` carries and
    updates in place. `key` and `rate` switch dropout on, for training.
    """
    pages = cache.num_pages // config.layers
    slots = step.batch.slot_mapping(len(step.tokens), cache.page_size)
    rotation = rotations(step.positions, config)
    keys = None if key is None else jax.random.split(key, (config.layers, 2))

    def layer(carry: tuple[Array, pa.PagedKVCache], inputs: Any) -> tuple[tuple[Array, pa.PagedKVCache], None]:
        (x, cache), (w, own, index, keys) = carry, inputs
        batch = dataclasses.replace(step.batch, page_table=step.batch.page_table + index * pages)
        own_slots = jnp.where(slots < 0, -1, slots + index * pages * cache.page_size)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, pa.PagedKVCache]:
            return attend_paged((q, k, v), own_slots, batch, cache, own, how)

        return block(x, w, rotation, attend, lambda x, i: dropout(x, None if keys is None else keys[i], rate)), None

    x = params["embed"].astype(jnp.float32)[step.tokens] * config.width**0.5
    inputs = (params["layers"], scales, jnp.arange(config.layers, dtype=jnp.int32), keys)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), inputs)
    return logits_of(x, params), cache
