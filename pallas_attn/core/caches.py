"""PagedKVCache: the keys and values of all sequences in pages, together with their scales."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_attn.core.errors import require
from pallas_attn.core.formats import BF16, Format, float_format
from pallas_attn.core.layouts import NHD, Layout, Sizes
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized, check_positive


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """N pages of S token slots for K heads.

    k, v: arrays, or `Quantized` when the format has scales; shapes as the layout tells: NHD `[N, S, K, D]`, HND
      `[N, K, S, D]`, SHUFFLE `[N, K, D/x, S, x]` and `[N, K, S/x, D, x]` with x = 16 bytes. Layouts of a single buffer
      (INTERLEAVED `[N, S, 2 K, D]`, PACKED `[N, K, S, 2 D]`) hold it in `k`, and `v` has no values: build them with
      `from_pages`.
    Scales: per tensor `[]`, per head `[K]`, per (sequence, head) `[B, K]`, per token and head `[N, S, K]`
      (`[N, K, S]` in head-major layouts: HND, PACKED, SHUFFLE).
    """

    k: Leaf | Quantized
    v: Leaf | Quantized | None
    layout: Layout = NHD

    @classmethod
    def from_pages(
        cls, pages, layout: Layout, *, format: Format | None = None, k_scale=None, v_scale=None
    ) -> "PagedKVCache":  # fmt: skip
        """A cache in a single-buffer layout; `format`, `k_scale` and `v_scale` are needed when it is quantised."""
        require(layout.single, "layout", layout, "from_pages is for INTERLEAVED and PACKED")
        if format is None or not format.quantized:
            return cls(pages, None, layout)
        missing = k_scale is None or v_scale is None
        require(not missing, "k_scale, v_scale", "None", f"{format} needs both")
        return cls(Quantized(pages, k_scale, format), Quantized(None, v_scale, format), layout)

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, kv_heads: int, head_dim: int, *,
        format: Format = BF16, layout: Layout = NHD, k_scale=None, v_scale=None, v_head_dim: int | None = None,
    ) -> "PagedKVCache":  # fmt: skip
        """A cache of zeros.

        k_scale, v_scale: the calibrated scales of a format per tensor `[]` or per head `[K]`; required, for a scale of
          1 that nobody chose is how accuracy is lost. Scales per token and head are the cache's own (1 until written).
        """
        v_dim = head_dim if v_head_dim is None else v_head_dim
        require(not layout.single or v_dim == head_dim, "v_head_dim", v_dim, f"{layout} needs it equal to head_dim")
        dims = (head_dim, v_dim)
        arrays = [
            jnp.zeros(b.shape(layout.sizes(num_pages, page_size, kv_heads, d, format.dtype.itemsize)), format.dtype)
            for b, d in zip(layout.buffers, dims, strict=False)
        ]
        if format.granularity == "token_head":
            given = k_scale is None and v_scale is None
            require(given, "k_scale, v_scale", "given", f"{format} finds its own scales while writing: leave them out")
            shape = layout.scale_shape(num_pages, page_size, kv_heads)
            k_scale, v_scale = jnp.ones(shape, jnp.float32), jnp.ones(shape, jnp.float32)
        if format.quantized:
            missing = k_scale is None or v_scale is None
            require(not missing, "k_scale, v_scale", "None", f"{format} needs both: calibrate them")
            # Copies: one buffer given twice could not be donated.
            k_scale, v_scale = jnp.array(k_scale, jnp.float32), jnp.array(v_scale, jnp.float32)
        if layout.single:
            cache = cls.from_pages(arrays[0], layout, format=format, k_scale=k_scale, v_scale=v_scale)
        elif format.quantized:
            cache = cls(Quantized(arrays[0], k_scale, format), Quantized(arrays[1], v_scale, format), layout)
        else:
            cache = cls(arrays[0], arrays[1], layout)
        return check_cache(cache)

    @property
    def format(self) -> Format:
        """The format of keys and values."""
        if isinstance(self.k, Quantized):
            return self.k.format
        format = float_format(self.k.dtype)
        fix = "wrap values and scale as pa.Quantized(values, scale, format)"
        require(format is not None, "cache.k", f"a bare {self.k.dtype} array", fix)
        return format  # type: ignore[return-value]

    @property
    def buffers(self) -> tuple[Leaf, ...]:
        """The stored arrays: keys and values, or the single buffer."""
        k = self.k.values if isinstance(self.k, Quantized) else self.k
        v = self.v.values if isinstance(self.v, Quantized) else self.v
        return (k,) if self.layout.single else (k, v)

    @property
    def pages(self) -> Array:
        """The buffer of a single-buffer layout."""
        require(self.layout.single, "layout", self.layout, "it has two buffers: use k and v")
        return self.buffers[0]

    @property
    def scales(self) -> tuple[Leaf, Leaf] | None:
        """(k scale, v scale), or None for a float format."""
        if isinstance(self.k, Quantized) and isinstance(self.v, Quantized):
            return self.k.scale, self.v.scale
        return None

    def replace(self, buffers: tuple[Leaf, ...], scales: tuple[Leaf, Leaf] | None = None) -> "PagedKVCache":
        """The same kind of cache around other arrays; scales stay unless given."""
        k, v = (*buffers, None)[:2]
        if not isinstance(self.k, Quantized):
            return PagedKVCache(k, v, self.layout)
        k_scale, v_scale = scales or self.scales or (None, None)
        return PagedKVCache(Quantized(k, k_scale, self.format), Quantized(v, v_scale, self.format), self.layout)

    @property
    def _measure(self) -> tuple[int, int, int, int]:
        k = self.buffers[0]
        return self.layout.measure(k.shape, k.dtype.itemsize)

    num_pages = property(lambda self: self._measure[0], doc="N.")
    page_size = property(lambda self: self._measure[1], doc="S, tokens of a page.")
    kv_heads = property(lambda self: self._measure[2], doc="K.")
    head_dim = property(lambda self: self._measure[3], doc="D of the keys.")

    @property
    def v_head_dim(self) -> int:
        """DV of the values."""
        if self.layout.single:
            return self.head_dim
        return self.buffers[1].shape[self.layout.v.axes.index("D")]  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, scales included."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def sizes(self) -> tuple[Sizes, ...]:
        """Atomic sizes of each buffer."""
        n, s, k, d = self._measure
        dims = (d,) if self.layout.single else (d, self.v_head_dim)
        return tuple(self.layout.sizes(n, s, k, dim, self.buffers[0].dtype.itemsize) for dim in dims)

    def read(self, pages: Array) -> tuple[Array, Array]:
        """Stored keys and values of whole pages, `[*pages.shape, S, K, D]` and `[.., DV]`; page numbers are clamped."""
        got = [b.read(x, s, pages) for b, x, s in zip(self.layout.buffers, self.buffers, self.sizes(), strict=True)]
        return (got[0][..., 0, :], got[0][..., 1, :]) if self.layout.single else (got[0], got[1])

    def read_slots(self, page: Array, slot: Array) -> tuple[Array, Array]:
        """Stored keys and values of tokens `[T]` at (page, slot in page): `[T, K, D]` and `[.., DV]`; clamped."""
        buffers = zip(self.layout.buffers, self.buffers, self.sizes(), strict=True)
        got = [b.read_slots(x, s, page, slot) for b, x, s in buffers]
        return (got[0][..., 0, :], got[0][..., 1, :]) if self.layout.single else (got[0], got[1])

    def partition_spec(self, heads: str = "tp") -> "PagedKVCache":
        """PartitionSpecs that shard the kv heads over mesh axis `heads`, as a cache-shaped pytree."""
        spec = [PartitionSpec(*(heads if "K" in a.split() else None for a in b.axes)) for b in self.layout.buffers]
        match self.format.granularity:
            case "head":
                scale = PartitionSpec(heads)
            case "seq_head":
                scale = PartitionSpec(None, heads)
            case "token_head":
                scale = PartitionSpec(None, heads) if self.layout.head_major else PartitionSpec(None, None, heads)
            case _:
                scale = PartitionSpec()
        return self.replace(tuple(spec), (scale, scale))


def check_cache(cache: PagedKVCache, num_seqs: int | None = None) -> PagedKVCache:
    """Refuse a cache whose arrays and scales do not fit each other; returns it."""
    require(isinstance(cache, PagedKVCache), "cache", type(cache).__name__, "pass a pa.PagedKVCache")
    format, buffers = cache.format, cache.buffers
    both = isinstance(cache.k, Quantized) == isinstance(cache.v, Quantized) or (cache.layout.single and cache.v is None)
    require(both, "cache.v", type(cache.v).__name__, "quantise keys and values alike")
    for part in (cache.k, cache.v):
        same = not isinstance(part, Quantized) or part.format == format
        require(same, "cache.v.format", getattr(part, "format", None), f"use {format} as the keys do")
    n, s, heads, _ = cache._measure
    for name, x in zip(("cache.k", "cache.v"), buffers, strict=False):
        fix = f"{format} is stored as {format.dtype}"
        require(x is not None and x.dtype == format.dtype, name, getattr(x, "dtype", None), fix)
    for name, b, x, sizes in zip(("cache.k", "cache.v"), cache.layout.buffers, buffers, cache.sizes(), strict=False):
        fix = f"{cache.layout} needs {b.shape(sizes)} for {n} pages of {s} tokens, {heads} heads"
        require(x.shape == b.shape(sizes), name, f"shape {x.shape}", fix)
    for name, scale in zip(("cache.k.scale", "cache.v.scale"), cache.scales or (), strict=False):
        _check_scale(name, scale, format, cache.layout, (n, s, heads), num_seqs)
    return cache


def _check_scale(name, scale, format: Format, layout: Layout, measure, num_seqs: int | None) -> None:
    n, s, heads = measure
    b = num_seqs if num_seqs is not None else scale.shape[0] if scale.ndim else 0
    shapes = {"tensor": (), "head": (heads,), "seq_head": (b, heads), "token_head": layout.scale_shape(n, s, heads)}
    require(format.granularity in shapes, "cache.k.format", format, "a KV cache has scales per tensor, head or token")
    expected = shapes[format.granularity]
    require(scale.shape == expected, name, f"shape {scale.shape}", f"{format} in {layout} needs {expected}")
    require(scale.dtype == jnp.float32, name, scale.dtype, "scales are float32")
    if format.granularity != "token_head":  # those of unwritten slots mean nothing
        check_positive(scale, name)


def to_token_major(cache: PagedKVCache, scale: Array) -> Array:
    """A scale per token and head as [N, S, K], whatever the layout keeps."""
    return jnp.swapaxes(scale, 1, 2) if cache.layout.head_major else scale


def abstract_cache(
    format: Format, layout: Layout, *, pages=16, page_size=32, heads=2, dim=128, seqs: int | None = None
) -> PagedKVCache:
    """A cache of shapes only, for questions that need no data."""

    def allocate() -> PagedKVCache:
        shape = {"tensor": (), "head": (heads,), "seq_head": (seqs, heads)}.get(format.granularity)
        scale = None if shape is None else jnp.ones(shape)
        return PagedKVCache.allocate(
            pages, page_size, heads, dim, format=format, layout=layout, k_scale=scale, v_scale=scale
        )

    return jax.eval_shape(allocate)
