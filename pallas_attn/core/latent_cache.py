"""LatentCache: what multi-head latent attention (MLA) keeps of a token, in pages: the latent, which stands for the keys
and values of all heads, and the rotary part of the key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import BF16, E4M3_TENSOR, E5M2_TENSOR, FLOAT_FORMATS, FP8_DS_MLA, Format
from pallas_attn.core.layouts import as_bytes, from_bytes
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import check_positive, find_scale, spread, to_storage

LATENT_FORMATS = (*FLOAT_FORMATS, E4M3_TENSOR, E5M2_TENSOR, FP8_DS_MLA)

DS_LATENT, DS_ROPE = 512, 64  # dims of an FP8_DS_MLA row, and where in its bytes they end
DS_CODES = DS_LATENT
DS_SCALES = DS_CODES + 4 * DS_LATENT // 128
DS_BYTES = DS_SCALES + 2 * DS_ROPE


@functools.partial(jax.tree_util.register_dataclass, data_fields=("pages", "scale"), meta_fields=("format", "rope_dim"))
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """N pages of S token slots, each a row of the latent (C values) and the rotary part of the key (R values).

    pages: `[N, S, C + R]` of `format.dtype`; in FP8_DS_MLA raw bytes, uint8 `[N, S, 656]`: 512 e4m3 values of the
      latent, the four float32 scales of its tiles of 128, powers of two, and 64 bfloat16 values of the rotary part.
    format: BF16, F16, F32, E4M3_TENSOR, E5M2_TENSOR or FP8_DS_MLA.
    scale: float32 `[]` of a format per tensor, for both parts; None in the others.
    rope_dim: R.
    """

    pages: Leaf
    format: Format
    scale: Leaf = None
    rope_dim: int = DS_ROPE

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, latent_dim: int = DS_LATENT, rope_dim: int = DS_ROPE, *,
        format: Format = BF16, scale=None,
    ) -> "LatentCache":  # fmt: skip
        """A cache of zeros; a format per tensor needs its calibrated `scale`, FP8_DS_MLA finds its own by writing."""
        width, dtype = latent_dim + rope_dim, format.dtype
        if format == FP8_DS_MLA:
            fixed = (latent_dim, rope_dim) == (DS_LATENT, DS_ROPE)
            require(fixed, "latent_dim, rope_dim", (latent_dim, rope_dim), f"{format} has {(DS_LATENT, DS_ROPE)}")
            width, dtype = DS_BYTES, jnp.uint8
        # A copy of the scale: one buffer given twice could not be donated.
        scale = None if scale is None else jnp.array(scale, jnp.float32)
        return check_latent_cache(cls(jnp.zeros((num_pages, page_size, width), dtype), format, scale, rope_dim))

    num_pages = property(lambda self: self.pages.shape[0], doc="N.")
    page_size = property(lambda self: self.pages.shape[1], doc="S, tokens of a page.")

    @property
    def width(self) -> int:
        """C + R."""
        return DS_LATENT + DS_ROPE if self.format == FP8_DS_MLA else self.pages.shape[2]

    @property
    def latent_dim(self) -> int:
        """C."""
        return self.width - self.rope_dim

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the scale included."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def partition_spec(self, heads: str = "tp") -> "LatentCache":
        """PartitionSpecs as a cache-shaped pytree: all heads read one latent, so each device along the mesh axis
        `heads` holds the whole cache."""
        return dataclasses.replace(self, pages=PartitionSpec(), scale=None if self.scale is None else PartitionSpec())

    def stored(self, slots: Array) -> Array:
        """The rows `[*slots.shape, W]` as they are stored; slots (page * S + slot in page) are clamped."""
        flat = as_bytes(self.pages).reshape(-1, self.pages.shape[2])
        return from_bytes(flat.at[slots].get(mode="clip", wrap_negative_indices=False), self.pages.dtype)

    def numbers(self, rows: Array, real: Array, dtype=jnp.float32) -> Array:
        """What stored rows stand for, `[.., C + R]` in `dtype`: float32 times scale, rounded once. Rows that are not
        real `[..]` are zero, whatever they hold."""
        # Cleared before anything is computed, so that no NaN of an unread slot reaches a gradient either.
        cleared = jnp.where(real[..., None], as_bytes(rows), jnp.zeros((), as_bytes(rows).dtype))
        rows = from_bytes(cleared, rows.dtype)
        if not self.format.quantized:
            return rows.astype(dtype)
        if self.format == FP8_DS_MLA:
            return _ds_numbers(rows, dtype)
        return (rows.astype(jnp.float32) * self.scale).astype(dtype)

    def rows(self, latent: Array, rope: Array) -> Array:
        """Float latents `[.., C]` and rotary parts `[.., R]` as they are stored: rows `[.., W]`."""
        if self.format == FP8_DS_MLA:
            return _ds_rows(latent, rope)
        x = jnp.concatenate([latent, rope], axis=-1)
        return to_storage(x, self.scale, self.format) if self.format.quantized else x.astype(self.format.dtype)


def _ds_numbers(rows: Array, dtype) -> Array:
    codes = lax.bitcast_convert_type(rows[..., :DS_CODES], FP8_DS_MLA.dtype)
    scale = _of_bytes(rows[..., DS_CODES:DS_SCALES], jnp.float32)
    rope = _of_bytes(rows[..., DS_SCALES:], jnp.bfloat16)
    latent = codes.astype(jnp.float32) * spread(FP8_DS_MLA, scale, codes.shape)
    return jnp.concatenate([latent.astype(dtype), rope.astype(dtype)], axis=-1)


def _ds_rows(latent: Array, rope: Array) -> Array:
    scale = find_scale(latent, FP8_DS_MLA)
    codes = to_storage(latent, spread(FP8_DS_MLA, scale, latent.shape), FP8_DS_MLA)
    return jnp.concatenate([_to_bytes(x) for x in (codes, scale, rope.astype(jnp.bfloat16))], axis=-1)


def _to_bytes(x: Array) -> Array:
    """[.., n] of wider numbers as bytes [.., n * size], the lowest of each first."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)


def _of_bytes(x: Array, dtype) -> Array:
    size = np.dtype(dtype).itemsize
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // size, size), dtype)


def check_latent_cache(cache: LatentCache) -> LatentCache:
    """Refuse a cache whose arrays do not fit its format; returns it."""
    require(isinstance(cache, LatentCache), "cache", type(cache).__name__, "pass a pa.LatentCache")
    format, shape = cache.format, cache.pages.shape
    require(format in LATENT_FORMATS, "cache.format", format, f"use one of {', '.join(f.name for f in LATENT_FORMATS)}")
    raw = format == FP8_DS_MLA
    dtype = np.dtype(jnp.uint8) if raw else format.dtype
    require(len(shape) == 3, "cache.pages", f"shape {shape}", "it is [pages, page_size, latent_dim + rope_dim]")
    require(cache.pages.dtype == dtype, "cache.pages", cache.pages.dtype, f"{format} is stored as {dtype}")
    if raw:
        require(shape[2] == DS_BYTES, "cache.pages", f"rows of {shape[2]} bytes", f"a row of {format} has {DS_BYTES}")
        require(cache.rope_dim == DS_ROPE, "cache.rope_dim", cache.rope_dim, f"{format} has {DS_ROPE}")
    inside = 0 <= cache.rope_dim < cache.width
    require(inside, "cache.rope_dim", cache.rope_dim, f"rows have {cache.width} values, the latent's first")
    if format.granularity != "tensor":
        require(cache.scale is None, "cache.scale", "given", f"{format} has none beside its rows: leave it out")
        return cache
    require(cache.scale is not None, "cache.scale", None, f"{format} needs one: calibrate it")
    scale: Leaf = cache.scale
    require(scale.shape == (), "cache.scale", f"shape {scale.shape}", f"{format} has one number")
    require(scale.dtype == jnp.float32, "cache.scale", scale.dtype, "scales are float32")
    check_positive(scale, "cache.scale")
    return cache


def abstract_latent_cache(format: Format, *, pages: int = 16, page_size: int = 64) -> LatentCache:
    """A cache of shapes only, for questions that need no data."""
    scale = 1.0 if format.granularity == "tensor" else None
    return jax.eval_shape(lambda: LatentCache.allocate(pages, page_size, format=format, scale=scale))
