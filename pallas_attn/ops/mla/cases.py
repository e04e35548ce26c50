"""The cases of MLA: one list for the support table, the tests and the bench."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.formats import BF16, E4M3_STATIC, E4M3_TENSOR, FP8_DS_MLA, NVFP4, e4m3_group
from pallas_attn.core.latent_cache import LATENT_FORMATS, abstract_latent_cache
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.mla.problem import Problem, prepare
from pallas_attn.ops.mla.topk import TopK

S = jax.ShapeDtypeStruct
TOKENS, HEADS = 32, 16


def options() -> Iterator[tuple[str, dict]]:
    """Every option that a backend may refuse, by name, with abstract arrays."""
    listed, lengths = S((TOKENS, 128), jnp.int32), S((TOKENS,), jnp.int32)
    yield "topk", {"topk": TopK(listed)}
    yield "topk slots", {"topk": TopK(listed, slots=True)}
    yield "topk lengths", {"topk": TopK(listed, lengths)}
    yield "up-projection", {"w_uv": S((HEADS, 512, 128), jnp.bfloat16)}
    yield "FP8 output", {"out": (E4M3_STATIC, 0.5)}
    yield "group FP8 output", {"out": e4m3_group(128)}
    yield "NVFP4 output", {"out": (NVFP4, 0.01)}
    yield "LSE", {"return_lse": True}


def support_cases() -> Iterator[tuple[str, str, Problem]]:
    """(dimension, name, problem) of each format of the cache and the query, and of each option on a bf16 and an
    FP8_DS_MLA cache; for mixed batches and for pure decode (max_q_len 1)."""
    for kind, most in (("mixed", None), ("decode", 1)):
        batch = RaggedBatch(S((3, 4), jnp.int32), S((3,), jnp.int32), S((4,), jnp.int32), max_q_len=most)
        for format in LATENT_FORMATS:
            yield f"{kind}, format", format.name, _problem(format, batch)
        for format in (BF16, E4M3_TENSOR):
            yield f"{kind}, FP8 query", format.name, _problem(format, batch, fp8=True)
        for format in (BF16, FP8_DS_MLA):
            for name, keywords in options():
                yield f"{kind}, {format}", name, _problem(format, batch, **keywords)


def _problem(format, batch, fp8=False, **keywords) -> Problem:
    def query(dim: int):
        if not fp8:
            return S((TOKENS, HEADS, dim), jnp.bfloat16)
        return Quantized(S((TOKENS, HEADS, dim), jnp.float8_e4m3fn), S((), jnp.float32), E4M3_TENSOR)

    cache = abstract_latent_cache(format)
    return prepare(query(512), query(64), cache, batch, scale=192**-0.5, **keywords)[0]
