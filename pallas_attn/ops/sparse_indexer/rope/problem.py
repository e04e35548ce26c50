"""The contract of RoPE and quantisation."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import INDEX_Q, Format, float_format
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized, check_quantize, quantized_arrays


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one call; hashable, and all that `supports` may look at."""

    tokens: int
    heads: int
    head_dim: int
    half: int  # pairs of dims that are rotated
    dtype: Any
    interleaved: bool
    hadamard: bool
    format: Format


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    x: Array
    cos: Array
    sin: Array


def prepare(
    x: Leaf, cos: Leaf, sin: Leaf, *, interleaved: bool = False, hadamard: bool = False, format: Format = INDEX_Q
) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    require(not isinstance(x, Quantized), "x", "Quantized", "pass floats: this quantises them")
    require(float_format(x.dtype) is not None, "x", f"a bare {x.dtype} array", "pass floats: this quantises them")
    require(x.ndim == 3, "x", f"shape {x.shape}", "it is [tokens, heads, head_dim]")
    tokens, heads, dim = x.shape
    fits = cos.ndim == 2 and cos.shape[0] == tokens and 0 < 2 * cos.shape[1] <= dim
    require(fits, "cos", f"shape {cos.shape}", f"one for each pair of rotated dims: ({tokens}, at most {dim // 2})")
    require(sin.shape == cos.shape, "sin", f"shape {sin.shape}", f"as cos: {cos.shape}")
    for name, t in (("cos", cos), ("sin", sin)):
        require(t.dtype == jnp.float32, name, t.dtype, "use float32")
    require(not hadamard or dim & (dim - 1) == 0, "hadamard", f"head_dim {dim}", "it needs a power of two")
    rows = format.granularity == "group" and format.order == "row" and format.scale_type == "float32"
    fix = "use INDEX_Q or one like it: e4m3 with a float32 scale per group, in rows"
    require(rows and format.dtype == INDEX_Q.dtype, "format", format, fix)
    check_quantize(x, format, None)
    return Problem(tokens, heads, dim, cos.shape[1], x.dtype, interleaved, hadamard, format), Args(x, cos, sin)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(values, scales)."""
    return quantized_arrays(p.format, (p.tokens, p.heads, p.head_dim), False)
