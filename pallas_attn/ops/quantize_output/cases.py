"""The cases of quantisation: one list for the support table, the tests and the bench."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_attn.core.formats import (
    E4M3_HEAD,
    E4M3_STATIC,
    E4M3_TENSOR,
    E4M3_TOKEN_HEAD,
    E5M2_HEAD,
    E5M2_STATIC,
    E5M2_TENSOR,
    E5M2_TOKEN_HEAD,
    GROUP_FORMATS,
    INT8_TOKEN_HEAD,
    NVFP4,
)  # fmt: skip
from pallas_attn.ops.quantize_output.problem import Problem, prepare

STATIC = (E4M3_STATIC, E5M2_STATIC, E4M3_TENSOR, E5M2_TENSOR)
DYNAMIC = (*STATIC, E4M3_HEAD, E5M2_HEAD, E4M3_TOKEN_HEAD, E5M2_TOKEN_HEAD, INT8_TOKEN_HEAD, *GROUP_FORMATS, NVFP4)


def support_cases() -> Iterator[tuple[str, str, Problem]]:
    """(dimension, name, problem) of every format, with a scale to be found and with a known one."""
    x, scale = jax.ShapeDtypeStruct((32, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
    for format in DYNAMIC:
        yield "format", format.name, prepare(x, format)[0]
    for format in (*STATIC, NVFP4):
        yield "known scale", format.name, prepare(x, format, scale)[0]
