"""The contract of logits over contiguous keys."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import Format, float_format
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.terms import check_quantized, check_rows, check_size, check_weights


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one call; hashable, and all that `supports` may look at."""

    tokens: int
    heads: int
    head_dim: int
    keys: int
    width: int | None  # None: absolute columns
    q_format: Format
    k_format: Format


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    q: Array | Quantized
    k: Array | Quantized
    weights: Array
    starts: Array
    ends: Array
    scale: Array


def prepare(q, k, weights, starts, ends, *, width=None, scale: Leaf = 1.0) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    check_quantized("q", q, 3, "[tokens, heads, head_dim]")
    check_quantized("k", k, 2, "[keys, head_dim]: index keys have one head")
    tokens, heads, dim = q.shape
    require(k.shape[1] == dim, "k", f"head_dim {k.shape[1]}", f"q has {dim}")
    require(k.shape[0] > 0 and heads > 0 and dim > 0, "q, k", f"{q.shape}, {k.shape}", "give at least one head and key")
    check_weights(weights, tokens, heads)
    check_rows("starts", starts, tokens)
    check_rows("ends", ends, tokens)
    if width is not None:
        check_size("width", width)
    require(jnp.shape(scale) == (), "scale", f"shape {jnp.shape(scale)}", "it is one number")
    problem = Problem(tokens, heads, dim, k.shape[0], None if width is None else int(width), format_of(q), format_of(k))
    return problem, Args(q, k, weights, starts, ends, jnp.float32(scale))


def format_of(x: Leaf | Quantized) -> Format:
    """The format of floats or of quantised values."""
    return x.format if isinstance(x, Quantized) else float_format(x.dtype)  # type: ignore[return-value]


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The logits."""
    return (jax.ShapeDtypeStruct((p.tokens, p.width or p.keys), jnp.float32),)


def ranges(p: Problem, args: Args) -> tuple[Array, Array]:
    """starts and ends [T, 1], kept inside the keys; clamped before the cast, for 64 bits must not wrap."""
    starts, ends = (jnp.clip(x, 0, p.keys).astype(jnp.int32)[:, None] for x in (args.starts, args.ends))
    return starts, ends


def columns(p: Problem, logits: Array, starts: Array) -> Array:
    """Rows [R, L] over absolute columns as the call wants them: column c of a compressed row is key start + c."""
    if p.width is None:
        return logits
    key = starts + jnp.arange(p.width)
    picked = jnp.take_along_axis(logits, jnp.minimum(key, p.keys - 1), axis=1)
    return jnp.where(key < p.keys, picked, -jnp.inf)
