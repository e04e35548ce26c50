"""The contract of the selection."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.ops.sparse_indexer.terms import check_rows, check_size

HIGH = np.uint32(1 << 31)  # the highest bit


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and statics of one selection; hashable, and all that `supports` may look at."""

    rows: int
    columns: int
    k: int
    sorted: bool
    ranged: bool  # whether rows have starts or ends


class Args(NamedTuple):
    """The arrays of one call, in the order in which a backend's `run` takes them."""

    logits: Array
    starts: Array | None
    ends: Array | None


def prepare(logits, k, *, starts=None, ends=None, sorted=False) -> tuple[Problem, Args]:
    """Check a call; returns what a backend decides on and what it computes with."""
    require(logits.ndim == 2, "logits", f"shape {logits.shape}", "they are [rows, columns]")
    require(logits.dtype == jnp.float32, "logits", logits.dtype, "use float32, as the logits ops return")
    require(0 < logits.shape[1] < 2**31, "logits", f"shape {logits.shape}", "give at least one column")
    check_size("k", k)
    require(isinstance(sorted, bool), "sorted", sorted, "it is a static bool")
    check_rows("starts", starts, logits.shape[0])
    check_rows("ends", ends, logits.shape[0])
    ranged = starts is not None or ends is not None
    return Problem(logits.shape[0], logits.shape[1], int(k), sorted, ranged), Args(logits, starts, ends)


def outputs(p: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The columns."""
    return (jax.ShapeDtypeStruct((p.rows, p.k), jnp.int32),)


def ranges(p: Problem, args: Args) -> tuple[Array, Array]:
    """starts and ends [T, 1], kept inside the row; clamped before the cast, for 64 bits must not wrap."""
    starts = jnp.zeros(p.rows, jnp.int32) if args.starts is None else args.starts
    ends = jnp.full(p.rows, p.columns, jnp.int32) if args.ends is None else args.ends
    starts, ends = (jnp.clip(x, 0, p.columns).astype(jnp.int32)[:, None] for x in (starts, ends))
    return starts, ends


def ordered(x: Array) -> Array:
    """uint32 in the order of the floats, all above 0; NaN as -inf, -0 as +0."""
    bits = lax.bitcast_convert_type(jnp.where(jnp.isnan(x), -jnp.inf, x), jnp.uint32)
    bits = jnp.where(bits == HIGH, 0, bits)  # not x == 0, which a subnormal may be too
    return jnp.where(bits >> 31 == 1, ~bits, bits | HIGH)


def vjp(p: Problem, args: Args, cotangents: tuple) -> list[None]:
    """Positions carry no gradient."""
    return [None] * len(jax.tree.leaves(args))
