"""Queries: floats, or quantised with a scale per tensor, head, or token and head."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.quantized import Quantized, check_positive, spread


def check_query(name: str, q) -> Format:
    """Refuse what is no query; returns its format."""
    require(len(q.shape) == 3, name, f"shape {q.shape}", "it is [tokens, heads, head_dim]")
    if not isinstance(q, Quantized):
        format = float_format(q.dtype)
        fix = "pass bfloat16, float16 or float32, or pa.Quantized(values, scale, format)"
        require(format is not None, name, f"a bare {q.dtype} array", fix)
        return format  # type: ignore[return-value]
    shapes = {"tensor": (), "head": q.shape[1:2], "token_head": q.shape[:2]}
    granularity, scale = q.format.granularity, f"{name}.scale"
    fix = "a query has scales per tensor, head, or token and head"
    require(granularity in shapes, f"{name}.format", q.format, fix)
    expected = shapes[granularity]
    require(q.scale.shape == expected, scale, f"shape {q.scale.shape}", f"{q.format} for q {q.shape} needs {expected}")
    fix = f"{q.format} is stored as {q.format.dtype}"
    require(q.values.dtype == q.format.dtype, f"{name}.values", q.values.dtype, fix)
    if granularity != "token_head":
        check_positive(q.scale, scale)
    return q.format


def query_numbers(q: Array | Quantized, real: Array) -> Array:
    """The query in float32 as [T, H, D], its scale applied; padding (not real [T]) is zero, whatever it holds."""
    real = real[:, None, None]
    x = q.values if isinstance(q, Quantized) else q
    number = jnp.where(real, x.astype(jnp.float32), 0.0)
    if isinstance(q, Quantized):
        number = number * jnp.where(real, spread(q.format, q.scale, x.shape), 0.0)
    return number
