"""The end of every kernel of MLA: results are rounded once, quantised in groups where asked, and put in their place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import Format
from pallas_attn.core.group_scales import MANTISSA
from pallas_attn.core.quantized import scale_of, to_codes
from pallas_attn.ops.mla.mosaic_form import LATENT, Form
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import divide, token_layout

WORD = 4  # exponents of an int32


def grouped(p: Problem) -> bool:
    """Whether the result's scales are found here."""
    return p.out_format is not None and p.out_format.granularity == "group"


def groups(p: Problem, columns: int) -> int:
    """Groups of a row's columns whose scales are found here."""
    if not grouped(p):
        return 0
    assert p.out_format is not None
    assert p.out_format.group is not None
    return columns // p.out_format.group


def filled(p: Problem) -> int:
    """Tokens that have scales: all, and those that fill up the last row of the format."""
    return p.tokens if p.out_format is None else p.tokens + -p.tokens % p.out_format.rows


def packed(p: Problem) -> bool:
    """Whether scales are exponents, several to a word."""
    return p.out_format is not None and p.out_format.scale_type == "int32"


def scale_array(p: Problem, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Scales as kernels write them: float32, or words taken apart [.., 4], that each group may write its own byte."""
    if packed(p):
        return jax.ShapeDtypeStruct((*shape, WORD), jnp.uint8)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def as_words(p: Problem, scales: jax.Array) -> jax.Array:
    """What `scale_array` tells of, put together."""
    return lax.bitcast_convert_type(scales, jnp.int32) if packed(p) else scales


def as_stored(p: Problem, scale):
    """Scales as they lie in memory: packed ones are exponents."""
    if not packed(p):
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    shift = lax.broadcast_in_dim(jnp.int32(MANTISSA), bits.shape, [])
    return lax.shift_right_logical(bits, shift).astype(jnp.uint8)


def result_arrays(p: Problem, form: Form) -> list[jax.ShapeDtypeStruct]:
    """The results as kernels write them: rows [T * heads, C], and scales [T, heads, groups] or [heads, groups, T'],
    packed ones in words of four groups."""
    arrays = [jax.ShapeDtypeStruct((p.tokens * form.heads, LATENT), p.out_dtype)]
    if grouped(p):
        assert p.out_format is not None
        count = groups(p, LATENT)
        words = count // WORD if packed(p) else count
        by_row = p.out_format.order == "row"
        arrays.append(scale_array(p, (p.tokens, form.heads, count) if by_row else (form.heads, words, filled(p))))
    return arrays


def as_results(p: Problem, form: Form, arrays) -> tuple[jax.Array, ...]:
    """What the kernels wrote in the shapes of the op's outputs."""
    values, *scales = arrays
    values = values.reshape(p.tokens, form.heads, LATENT)[:, : p.heads]
    if not grouped(p):
        return (values,)
    assert p.out_format is not None
    if p.out_format.order == "row":
        scale = scales[0][:, : p.heads].reshape(p.tokens, -1)
    else:
        scale = as_words(p, scales[0])[: p.heads].reshape(-1, filled(p))
    return values.reshape(p.tokens, -1), scale


def rounded(x, format: Format | None, dtype, scale, layout, interpret):
    """The one rounding of a result [rows, n] whose scale, if any, is known."""
    if format is None:
        return x.astype(dtype)
    shape, how = (x.shape[:1], layout.reduce(1)) if format.apply_scale == "reciprocal" else (x.shape, layout)
    full = lambda v: plgpu.layout_cast(jnp.full(shape, v, jnp.float32), how)  # noqa: E731
    if format.apply_scale != "reciprocal":
        return to_codes(divide(x, full(scale), how, interpret is not None), format)
    factor = divide(full(1.0), full(scale), how, interpret is not None)
    return to_codes(x * lax.broadcast_in_dim(factor, x.shape, [0]), format)


def quantised(x, format: Format, layout, interpret) -> tuple[Any, Any]:
    """(codes, scales [rows]) of one group: x [rows, group] in registers that keep a row inside of a warp."""
    of_rows = layout.reduce(1)
    over = lambda a, b: divide(a, b, of_rows, interpret is not None, midrange=True)  # noqa: E731
    amax = jnp.max(jnp.abs(x), axis=1)
    full = lambda v: plgpu.layout_cast(jnp.full(amax.shape, v, jnp.float32), of_rows)  # noqa: E731
    scale = scale_of(amax, format, lambda a, b: over(a, full(b)))
    factor = over(full(1.0), scale)
    # No clamp: what has this scale rounds to no more than the largest code.
    return (x * lax.broadcast_in_dim(factor, x.shape, [0])).astype(format.dtype), scale


def finish(p: Problem, x, out_scale, layout, interpret) -> tuple[Any, list]:
    """(values, scales [rows] of each group) of a result [rows, 128 n] in float32."""
    if not grouped(p):
        return rounded(x, p.out_format, p.out_dtype, out_scale, layout, interpret), []
    assert p.out_format is not None
    assert p.out_format.group is not None
    group = p.out_format.group
    parts = [quantised(x[:, at : at + group], p.out_format, layout, interpret) for at in range(0, x.shape[1], group)]
    codes, scales = zip(*parts, strict=True)
    return jnp.concatenate(codes, axis=1), list(scales)


def leave_rows(tile, out, row, real, chunk: int, columns) -> None:
    """Copy the real rows of a tile [rows, n] in shared memory to rows of the result, `chunk` at a time."""
    for at in range(0, tile.shape[0], chunk):
        to = out.at[pl.ds(row + at, chunk), columns]
        pl.when(at < real)(lambda at=at, to=to: plgpu.copy_smem_to_gmem(tile.at[pl.ds(at, chunk)], to))


def leave_scales(p: Problem, form: Form, tile, out, row, real, chunk: int, group) -> None:
    """Write the scales [rows] of one group, in shared memory, to where the format has them."""
    for at in range(0, tile.shape[0], chunk):

        def some(at=at) -> None:
            scales = plgpu.load(tile.at[pl.ds(at, chunk)], layout=token_layout(chunk), optimized=False)
            scatter_scales(p, form, scales, out, row + at, group)

        pl.when(at < real)(some)


def scatter_scales(p: Problem, form: Form, scales, out, row, group) -> None:
    """The same from registers, for rows of one token."""
    assert p.out_format is not None
    token, head = lax.div(row, jnp.int32(form.heads)), lax.rem(row, jnp.int32(form.heads))
    heads = pl.ds(head, scales.shape[0])
    if packed(p):
        word, byte = lax.div(group, jnp.int32(WORD)), lax.rem(group, jnp.int32(WORD))
        scatter(out.at[heads, word, token, byte], as_stored(p, scales))
    elif p.out_format.order == "row":
        scatter(out.at[token, heads, group], scales)
    else:
        scatter(out.at[heads, group, token], scales)


def scatter(ref, x) -> None:
    """Store numbers that do not lie together; JAX 0.12 wants to be told that they need not."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)  # type: ignore[attr-defined]
    else:
        ref[...] = x
