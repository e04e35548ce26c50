"""The indexer's formula, and the steps that the two logits ops share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.formats import float_format
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized, check_positive, dequantize, scale_shape

ELEMENTS = 1 << 22  # float32 elements of one block of products, at most about


def check_quantized(name: str, x, rank: int, axes: str) -> None:
    """Refuse what is neither floats nor `Quantized` with a scale that its own shape determines."""
    if isinstance(x, Quantized):
        require(x.format.granularity != "seq_head", f"{name}.format", x.format, "its scale needs a batch")
        require(x.values.dtype == x.format.dtype, name, x.values.dtype, f"{x.format} is stored as {x.format.dtype}")
        expected = scale_shape(x.format, x.shape)
        require(x.scale.shape == expected, f"{name}.scale", f"shape {x.scale.shape}", f"it needs {expected}")
        check_positive(x.scale, f"{name}.scale")
    else:
        fix = "wrap values and scale as pa.Quantized(values, scale, format)"
        require(float_format(x.dtype) is not None, name, f"a bare {x.dtype} array", fix)
    require(x.ndim == rank, name, f"shape {x.shape}", f"it is {axes}")


def check_weights(weights: Leaf, tokens: int, heads: int) -> None:
    """Refuse weights of another shape than one for each query head."""
    fix = f"one for each query head: ({tokens}, {heads})"
    require(weights.shape == (tokens, heads), "weights", f"shape {weights.shape}", fix)
    require(float_format(weights.dtype) is not None, "weights", weights.dtype, "use floats")


def check_rows(name: str, x: Leaf | None, rows: int) -> None:
    """Refuse what is not one integer for each row."""
    if x is not None:
        require(x.shape == (rows,), name, f"shape {x.shape}", f"one for each row: ({rows},)")
        require(jnp.issubdtype(x.dtype, jnp.integer), name, x.dtype, "use int32")


def check_size(name: str, x: Leaf) -> None:
    """Refuse what is not a static int of at least 1."""
    found = x if x is None or is_concrete(x) else "a traced value"
    good = isinstance(x, int | np.integer) and not isinstance(x, bool) and x > 0
    require(bool(good), name, found, "it is a static int of at least 1")


def numbers(x: Array | Quantized) -> Array:
    """What stored values stand for, float32."""
    return dequantize(x) if isinstance(x, Quantized) else x.astype(jnp.float32)


def apart(x: Array | Quantized) -> tuple[Array, Array]:
    """(values [.., D], scale [..]) with x = values * scale; several scales along D are multiplied in, leaving 1."""
    rows = x.shape[:-1]
    if not isinstance(x, Quantized):
        return x, jnp.ones(rows)
    if x.format.granularity == "group":
        return (x.values, x.scale[..., 0]) if x.scale.shape[-1] == 1 else (numbers(x), jnp.ones(rows))
    return x.values, jnp.broadcast_to(x.scale, rows)


def fold(q: Array | Quantized, weights: Array, scale: Array | float) -> tuple[Array, Array]:
    """(query values [T, H, D], weights float32 [T, H] * scale of the query * scale): the one place where the factors
    of a logit that belong to a query meet. relu commutes with them, since scales are positive."""
    values, q_scale = apart(q)
    return values, weights.astype(jnp.float32) * q_scale * scale


def scored(queries: Array, weights: Array, keys: Array, k_scale: Array) -> Array:
    """sum_h weights[t, h] * relu(queries[t, h] . keys[n]) * k_scale[n] in float32.

    queries [T, H, D], weights [T, H]; keys [N, D] and k_scale [N] seen by all rows, or [T, N, D] and [T, N] by row.
    """
    axes = "thd,nd->thn" if keys.ndim == 2 else "thd,tnd->thn"
    wide = (x.astype(jnp.float32) for x in (queries, keys))
    product = jax.nn.relu(jnp.einsum(axes, *wide, precision=lax.Precision.HIGHEST))
    return jnp.sum(product * weights[..., None], axis=1) * k_scale


def masked(seen: Array, logits: Callable[[], Array]) -> Array:
    """`logits()` where seen, else -inf; not computed at all where nothing is."""
    nothing = jnp.full(seen.shape, -jnp.inf)
    return lax.cond(jnp.any(seen), lambda: jnp.where(seen, logits(), nothing), lambda: nothing)


def in_blocks(fn: Callable, size: int, arrays: tuple[Array, ...], fill: int = 0) -> Array:
    """`fn` on blocks of `size` along the first axis of the arrays, which are padded with `fill`: stacked [blocks, ..].

    Blocks are computed again for their gradient, so that none keeps its products.
    """
    count = -(-arrays[0].shape[0] // size)
    short = count * size - arrays[0].shape[0]
    cut = [
        jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1)), constant_values=fill).reshape(count, size, *x.shape[1:])
        for x in arrays
    ]
    return lax.map(jax.checkpoint(lambda xs: fn(*xs)), tuple(cut))
