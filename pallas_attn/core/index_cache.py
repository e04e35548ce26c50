"""IndexCache: the sparse indexer's FP8 keys in pages of raw bytes, and where each byte of a key lies.

A page of S tokens is `S * D` values, then for every token its scales, 4 bytes for each `format.group` values: 132 bytes
a token at D = 128. The bytes `[s, :]` of a page are therefore NOT those of token s.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import INDEX_K, Format
from pallas_attn.core.layouts import Buffer, Sizes
from pallas_attn.core.leaf import Leaf

TILE = 16  # tokens and values of a SHUFFLE tile
SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class IndexLayout:
    """Where a page keeps the values of its tokens; the scales behind them lie in token order in every layout."""

    name: str
    values: Buffer

    @property
    def tiled(self) -> bool:
        """Whether values lie in tiles of 16 tokens by 16 values."""
        return "S0" in self.values.atoms

    def sizes(self, pages: int, page_size: int, dim: int) -> Sizes:
        """Atomic sizes of the values."""
        return {"N": pages, "S": page_size, "S1": page_size // TILE, "S0": TILE,
                "D": dim, "D1": dim // TILE, "D0": TILE}  # fmt: skip

    def offsets(self, slot: Array, page_size: int, dim: int) -> Array:
        """Byte of each value of the tokens in these slots of a page: int32 `[*slot.shape, D]`."""
        slot, d = slot[..., None].astype(jnp.int32), jnp.arange(dim, dtype=jnp.int32)
        at = {"S": slot, "S1": slot // TILE, "S0": slot % TILE, "D": d, "D1": d // TILE, "D0": d % TILE}
        strides = self.values.strides(self.sizes(1, page_size, dim))
        return sum((at[a] * strides[a] for a in self.values.atoms[1:]), jnp.zeros_like(slot + d))

    def __repr__(self) -> str:
        return self.name


INDEX_NORMAL = IndexLayout("INDEX_NORMAL", Buffer(("N", "S", "D")))
# vLLM on AMD GPUs (rocm_aiter_mla_sparse.py): tiles of 16 tokens by 16 values, value by value inside.
INDEX_SHUFFLE = IndexLayout("INDEX_SHUFFLE", Buffer(("N", "S1", "D1", "S0", "D0")))
INDEX_LAYOUTS = (INDEX_NORMAL, INDEX_SHUFFLE)


def default_layout(page_size: int) -> IndexLayout:
    """NORMAL for pages of one token, which no tile divides, and SHUFFLE for all others: upstream's rule."""
    return INDEX_NORMAL if page_size == 1 else INDEX_SHUFFLE


@functools.partial(jax.tree_util.register_dataclass, data_fields=("pages",), meta_fields=("layout", "format"))
@dataclasses.dataclass(frozen=True)
class IndexCache:
    """N pages of S index keys, as upstream's bytes.

    pages: uint8 `[N, S, D + 4 D / format.group]`; see the head of this module for what lies where.
    layout: of the values in a page; static, so that no reader can take another than the writer's. Whoever wraps
      foreign bytes has to say it.
    format: INDEX_K (scales are powers of two, kept as float32), INDEX_K_F32 (any float32) or INDEX_K_EXPONENT (powers
      of two, kept as the exponent's byte four times).
    """

    pages: Leaf
    layout: IndexLayout
    format: Format = INDEX_K

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, head_dim: int = 128, *,
        format: Format = INDEX_K, layout: IndexLayout | None = None,
    ) -> "IndexCache":  # fmt: skip
        """A cache of zero bytes.

        layout: default INDEX_NORMAL for pages of one token, else INDEX_SHUFFLE; kernels that read whole pages by TMA,
          DeepGEMM's for one, want INDEX_NORMAL at any size.
        """
        layout = default_layout(page_size) if layout is None else layout
        group = _check_format(format)
        fix = f"{format} has a scale for every {group} values: use a multiple"
        require(head_dim > 0 and head_dim % group == 0, "head_dim", head_dim, fix)
        width = head_dim + SCALE_BYTES * (head_dim // group)
        return check_index_cache(cls(jnp.zeros((num_pages, page_size, width), jnp.uint8), layout, format))

    num_pages = property(lambda self: self.pages.shape[0], doc="N.")
    page_size = property(lambda self: self.pages.shape[1], doc="S, tokens of a page.")
    groups = property(lambda self: self.pages.shape[2] // (self.format.group + SCALE_BYTES), doc="Scales of a key.")
    head_dim = property(lambda self: self.groups * self.format.group, doc="D.")
    nbytes = property(lambda self: self.pages.nbytes, doc="Bytes of the pages, scales included.")

    def replace(self, pages: Leaf) -> "IndexCache":
        """The same kind of cache around other pages."""
        return dataclasses.replace(self, pages=pages)

    def partition_spec(self, pages: str | None = None) -> "IndexCache":
        """PartitionSpecs as a cache-shaped pytree: index keys have no heads to shard; `pages` is the mesh axis over
        which context-parallel ranks own pages, None for a copy on every device."""
        return self.replace(PartitionSpec(pages))

    def rows(self, values: Array, scale: Array) -> Array:
        """Keys `[T, D]` of the format's type and float32 scales `[T, G]` as bytes `[T, D + 4 G]`, values first."""
        bits = lax.bitcast_convert_type(scale, jnp.int32)
        four = lax.bitcast_convert_type(scale, jnp.uint8)
        if self.format.exponents:
            four = jnp.broadcast_to(((bits >> 23) & 0xFF).astype(jnp.uint8)[..., None], four.shape)
        values = lax.bitcast_convert_type(values, jnp.uint8)
        return jnp.concatenate([values, four.reshape(scale.shape[0], SCALE_BYTES * self.groups)], axis=-1)

    def read_rows(self, page: Array, slot: Array) -> Array:
        """The bytes `[*slot.shape, D + 4 G]` of the tokens at (page, slot in page); page numbers are clamped."""
        page = jnp.clip(page, 0, self.num_pages - 1)
        return self._flat.at[page[..., None], self._offsets(slot)].get(mode="promise_in_bounds")

    def write_rows(self, page: Array, slot: Array, rows: Array) -> "IndexCache":
        """Scatter bytes `[T, D + 4 G]` to (page, slot in page); a page number >= N is dropped."""
        index = page[:, None], self._offsets(slot)
        flat = self._flat.at[index].set(rows, mode="drop", wrap_negative_indices=False)
        return self.replace(flat.reshape(self.pages.shape))

    def read_slots(self, page: Array, slot: Array) -> tuple[Array, Array]:
        """(values `[*slot.shape, D]`, float32 scales `[.., G]`) of the tokens at (page, slot in page); clamped."""
        values, scales = jnp.split(self.read_rows(page, slot), [self.head_dim], axis=-1)
        return self._values(values), self._scales(scales)

    def read(self, pages: Array) -> tuple[Array, Array]:
        """(values `[*pages.shape, S, D]`, float32 scales `[.., S, G]`) of whole pages; page numbers are clamped."""
        got = self._flat.at[pages.reshape(-1)].get(mode="clip")
        values, scales = jnp.split(got, [self.page_size * self.head_dim], axis=1)
        sizes = self.layout.sizes(self.num_pages, self.page_size, self.head_dim)
        values = self._values(self.layout.values.logical(values, sizes))
        scales = self._scales(scales.reshape(-1, self.page_size, SCALE_BYTES * self.groups))
        return values.reshape(*pages.shape, *values.shape[1:]), scales.reshape(*pages.shape, *scales.shape[1:])

    @property
    def _flat(self) -> Array:
        return self.pages.reshape(self.num_pages, -1)

    def _offsets(self, slot: Array) -> Array:
        """Bytes of a token in its page, in the order of a row: its values, then its scales."""
        width = SCALE_BYTES * self.groups
        scales = slot[..., None] * width + jnp.arange(width) + self.page_size * self.head_dim
        values = self.layout.offsets(slot, self.page_size, self.head_dim)
        return jnp.concatenate([values, scales.astype(jnp.int32)], axis=-1)

    def _values(self, stored: Array) -> Array:
        return lax.bitcast_convert_type(stored, self.format.dtype)

    def _scales(self, stored: Array) -> Array:
        """Scale bytes `[.., 4 G]` as float32 `[.., G]`."""
        four = stored.reshape(*stored.shape[:-1], self.groups, SCALE_BYTES)
        if self.format.exponents:
            return lax.bitcast_convert_type(four[..., 0].astype(jnp.int32) << 23, jnp.float32)
        return lax.bitcast_convert_type(four, jnp.float32)


def _check_format(format: Format) -> int:
    """Refuse a format that index keys cannot have; returns its values per scale."""
    fits = format.granularity == "group" and format.dtype == INDEX_K.dtype
    require(fits, "cache.format", format, "use INDEX_K, INDEX_K_F32 or INDEX_K_EXPONENT: e4m3 with a scale per group")
    fix = "only a power of two is its exponent: set ue8m0 as well"
    require(format.ue8m0 or not format.exponents, "cache.format", format, fix)
    return format.group or 0


def check_index_cache(cache: IndexCache) -> IndexCache:
    """Refuse a cache whose bytes cannot be what its layout and format say; returns it."""
    require(isinstance(cache, IndexCache), "cache", type(cache).__name__, "pass a pa.IndexCache")
    unit = _check_format(cache.format) + SCALE_BYTES
    layout, pages = cache.layout, cache.pages
    require(isinstance(layout, IndexLayout), "cache.layout", layout, "use pa.INDEX_NORMAL or pa.INDEX_SHUFFLE")
    require(pages.dtype == jnp.uint8, "cache.pages", pages.dtype, "they are raw bytes: uint8")
    require(pages.ndim == 3, "cache.pages", f"shape {pages.shape}", "they are [pages, page_size, bytes of a token]")
    fix = f"a token of {cache.format} takes a multiple of {unit} bytes, its scales included"
    require(pages.shape[2] > 0 and pages.shape[2] % unit == 0, "cache.pages", f"shape {pages.shape}", fix)
    require(cache.num_pages > 0 and cache.page_size > 0, "cache.pages", f"shape {pages.shape}", "it holds no token")
    fix = f"{layout} has tiles of {TILE} tokens: use a multiple of {TILE}, or INDEX_NORMAL"
    require(not layout.tiled or cache.page_size % TILE == 0, "page_size", cache.page_size, fix)
    require(not layout.tiled or cache.head_dim % TILE == 0, "head_dim", cache.head_dim, f"use a multiple of {TILE}")
    return cache


def place(slots: Array, pages: int, page_size: int) -> tuple[Array, Array]:
    """(page, slot in page) of each token; what is negative or past the end gets the page N, which a write drops."""
    inside = (slots >= 0) & (slots < pages * page_size)
    slots = jnp.where(inside, slots, pages * page_size).astype(jnp.int32)
    return slots // page_size, slots % page_size
