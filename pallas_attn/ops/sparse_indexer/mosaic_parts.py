"""What the Hopper kernels of both logits ops share: operands, a query's factors, and how logits leave."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import Format
from pallas_attn.core.quantized import Quantized
from pallas_attn.runtime.mosaic import OVER_COLUMNS, Layout

DIM = 128  # of a head: one row of the matrix unit's operands
FILL = 128  # columns that are cleared at once: one for each thread


def no_queries(format: Format, heads: int, dim: int) -> dict[str, bool]:
    """Refusals that both ops share."""
    return {
        f"no {format} query": not format.quantized or format.dtype != jnp.float8_e4m3fn or format.group not in (0, DIM),
        f"no {heads} heads": heads not in (8, 16, 32, 64, 128),
        f"no head dim {dim}": dim != DIM,
    }


def query_scale(q: Quantized) -> jax.Array:
    """The query's scale as [1], [H] or [T, H]."""
    scale = q.scale
    return scale.reshape(scale.shape[:2] if scale.ndim == 3 else scale.shape or (1,))


def int32(x, most: int) -> jax.Array:
    """What the kernel clamps; wider numbers, and unsigned ones, are clamped first, for nothing may wrap into range."""
    return x if x.dtype == jnp.int32 else jnp.clip(x, 0, most).astype(jnp.int32)


def factors(weights, q_scale, scale, token):
    """[H]: weights of a token times the scales of its queries and the logits' factor, as `terms.fold` has it."""
    load = lambda ref: plgpu.load(ref, layout=OVER_COLUMNS, optimized=False)  # noqa: E731
    w = load(weights.at[token])
    w = w if w.dtype == jnp.float32 else w.astype(jnp.float32)
    match len(q_scale.shape):
        case 2:
            w = w * load(q_scale.at[token])
        case _ if q_scale.shape[0] > 1:
            w = w * load(q_scale)
        case _:
            w = w * q_scale[0]
    return w * scale[0]


def put(ref, x) -> None:
    """ref = x in global memory, straight from registers."""
    store: Any = getattr(plgpu, "store", None)  # jax 0.12
    if store is None:
        ref[...] = x
    else:
        store(ref, x, optimized=False)


def put_some(out, row, column, line, low, high) -> None:
    """out[row, column + i] = line[i], low <= i < high, from shared memory; for the few lines that stick out of a row."""

    def one(i, carry):
        out[row, column + i] = line[i]
        return carry

    lax.fori_loop(low, high, one, jnp.int32(0))


def clear(out, row, first, end) -> None:
    """-inf in the columns first to end of a row."""
    strided = Layout.WG_STRIDED((FILL,), vec_size=1)
    nothing = plgpu.layout_cast(jnp.full((FILL,), -jnp.inf, jnp.float32), strided)
    blocks = lax.div(jnp.maximum(end - first, 0), jnp.int32(FILL))

    def block(i, carry):
        put(out.at[row, pl.ds(first + i * FILL, FILL)], nothing)
        return carry

    def one(i, carry):
        out[row, i] = jnp.float32(-jnp.inf)
        return carry

    lax.fori_loop(0, blocks, block, jnp.int32(0))
    lax.fori_loop(first + blocks * FILL, end, one, jnp.int32(0))
