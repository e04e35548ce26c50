"""The ways of running the model that are compared: KV formats, FP8 queries, and three bugs of real systems.

The bugs are built here, outside the library: its scales travel with the values, so it cannot make these mistakes by
itself. They were found and fixed in vLLM (its Triton and ROCm attention backends) and asked about in SGLang's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

import pallas_attn as pa
from bench.serve import model
from bench.serve.engine import Variant
from bench.serve.text import training_text, windows

CALIBRATION_WINDOWS = 16


def calibrate(params: model.Params, config: model.Config) -> dict[pa.Format, model.LayerScales]:
    """Each layer's own scales of q, k and v: its largest magnitudes in the dense model on training text, over 448.

    Per tensor [L], per kv head [L, K]; queries are always scaled per tensor.
    """
    text = jnp.asarray(windows(training_text(), CALIBRATION_WINDOWS, config.context), jnp.int32)
    _, qkv = jax.jit(lambda text: jax.lax.map(lambda tokens: model.dense(params, tokens, config), text))(text)
    q, k, v = (jnp.concatenate(list(x), axis=1) for x in qkv)  # [L, windows * T, heads, D]

    def scales(x: Array, format: pa.Format) -> Array:
        return jnp.stack([pa.quantize(layer, format).scale for layer in x])

    queries = scales(q, pa.E4M3_TENSOR)
    return {f: model.LayerScales(queries, scales(k, f), scales(v, f)) for f in (pa.E4M3_TENSOR, pa.E4M3_HEAD)}


def round_trip(cache: pa.PagedKVCache) -> pa.PagedKVCache:
    """A bf16 cache of dequantised keys and values that were rounded to FP8 a second time, now without a scale."""

    def twice(part: Array | pa.Quantized | None) -> Array:
        assert isinstance(part, pa.Quantized)
        return pa.fake_quantize(pa.dequantize(part), pa.E4M3_TENSOR, 1.0).astype(jnp.bfloat16)

    return dataclasses.replace(cache, k=twice(cache.k), v=twice(cache.v))


def all_variants(params: model.Params, config: model.Config, backend: str | None) -> list[Variant]:
    """Every variant of the report: plain KV formats first, then what differs from one of them in one thing."""
    scales = calibrate(params, config)
    plain, fp8_query = model.Numerics(backend), model.Numerics(backend, query=pa.E4M3_TENSOR)

    def stored(format: pa.Format) -> model.Scales:
        given = scales[format]
        return model.Scales(given, given)

    tensor, head = stored(pa.E4M3_TENSOR), stored(pa.E4M3_HEAD)
    ones = jax.tree.map(jnp.ones_like, scales[pa.E4M3_TENSOR])
    no_query_scale = tensor._replace(read=tensor.read._replace(q=ones.q))
    no_layer_scales = tensor._replace(read=tensor.read._replace(k=ones.k, v=ones.v))
    again = dataclasses.replace(plain, view=round_trip)
    return [
        Variant("BF16", pa.BF16, how=plain),
        Variant("E4M3_TENSOR", pa.E4M3_TENSOR, tensor, plain),
        Variant("E4M3_HEAD", pa.E4M3_HEAD, head, plain),
        Variant("E4M3_TOKEN_HEAD", pa.E4M3_TOKEN_HEAD, how=plain),
        Variant("INT8_TOKEN_HEAD", pa.INT8_TOKEN_HEAD, how=plain),
        Variant("FP8 query", pa.E4M3_TENSOR, tensor, fp8_query, "E4M3_TENSOR"),
        Variant("FP8 query, cache per head", pa.E4M3_HEAD, head, fp8_query, "E4M3_HEAD"),
        Variant("query scale ignored", pa.E4M3_TENSOR, no_query_scale, fp8_query, "FP8 query", bug=True),
        Variant("FP8 round trip", pa.E4M3_TENSOR, tensor, again, "E4M3_TENSOR", bug=True),
        Variant("layer scales replaced by 1", pa.E4M3_TENSOR, no_layer_scales, plain, "E4M3_TENSOR", bug=True),
    ]
