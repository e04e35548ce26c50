"""What the Hopper kernels of both logits ops share: operands, a query's factors, and how logits leave."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import Format
from pallas_attn.core.quantized import Quantized
from pallas_attn.runtime.mosaic import OVER_COLUMNS, Layout, swizzled

DIM = 128  # of a head: one row of the matrix unit's operands
FILL = 128  # columns that are cleared at once: one for each thread


def no_queries(format: Format, heads: int, dim: int, fewest: int) -> dict[str, bool]:
    """Refusals that both ops share; one of them takes no fewer than `fewest` heads."""
    return {
        f"no {format} query": not format.quantized or format.dtype != jnp.float8_e4m3fn or format.group not in (0, DIM),
        f"no {heads} heads": heads < fewest or heads not in (8, 16, 32, 64, 128),
        f"no head dim {dim}": dim != DIM,
    }


def query_scale(q: Quantized) -> jax.Array:
    """The query's scale as [1], [H] or [T, H]."""
    scale = q.scale
    return scale.reshape(scale.shape[:2] if scale.ndim == 3 else scale.shape or (1,))


def factors(weights, q_scale, scale):
    """[H]: a token's weights times the scales of its queries, one or [H], and the logits' factor: `terms.fold`."""
    load = lambda ref: plgpu.load(ref, layout=OVER_COLUMNS, optimized=False)  # noqa: E731
    w = load(weights)
    w = w if w.dtype == jnp.float32 else w.astype(jnp.float32)
    return w * (load(q_scale) if q_scale.shape[0] > 1 else q_scale[0]) * scale[0]


def key_ring(stages: int, keys: int, interpret: bool) -> Any:
    """Shared memory of blocks of keys: as copies fill it and as the matrix unit reads it, which the interpreter has no
    need to tell apart. Keys that begin, or end, at no multiple of 8 could not be copied into the matrix unit's tiles of
    8 rows; rows of 128 bytes lie alike without those tiles."""
    shape, dtype = (stages, keys, DIM), jnp.float8_e4m3fn
    tiles = plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, DIM))
    return tiles if interpret else plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, DIM)[1:]), tiles)


def put(ref, x) -> None:
    """ref = x in global memory, straight from registers."""
    store: Any = getattr(plgpu, "store", None)  # jax 0.12
    if store is None:
        ref[...] = x
    else:
        store(ref, x, optimized=False)


def put_some(out, row, column, line, low, high) -> None:
    """out[row, column + i] = line[i], low <= i < high, from shared memory: for lines that stick out."""

    def one(i, carry):
        out[row, column + i] = line[i]
        return carry

    lax.fori_loop(low, high, one, jnp.int32(0))


def clear(out, row, first, end) -> None:
    """-inf in the columns first to end of a row."""
    strided = Layout.WG_STRIDED((FILL,), vec_size=1)
    nothing = plgpu.layout_cast(jnp.full((FILL,), -jnp.inf, jnp.float32), strided)
    low = jnp.minimum(lax.div(first + (FILL - 1), jnp.int32(FILL)), lax.div(jnp.maximum(end, 0), jnp.int32(FILL)))
    high = jnp.maximum(lax.div(jnp.maximum(end, 0), jnp.int32(FILL)), low)

    def block(i, carry):
        put(out.at[row, pl.ds(i * FILL, FILL)], nothing)
        return carry

    def one(i, carry):
        out[row, i] = jnp.float32(-jnp.inf)
        return carry

    lax.fori_loop(low, high, block, jnp.int32(0))
    # What is left on either side, or all where no whole block is inside.
    lax.fori_loop(first, jnp.minimum(low * FILL, end), one, jnp.int32(0))
    lax.fori_loop(jnp.maximum(high * FILL, first), end, one, jnp.int32(0))
