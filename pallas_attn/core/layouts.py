"""Layouts: where the value of (page, slot, head, dim) lies in a cache. Every reader and writer indexes through here.

A buffer is told by its axes in memory order. Letters: N pages, S slots of a page, K kv heads, P the part (0 = key,
1 = value), D head dim. A capital alone is the whole axis; `S1 S0` and `D1 D0` are the axis split in blocks of x = 16
bytes, slow and fast. Axes in one string are merged into one array axis.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_attn.core.errors import require

Sizes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array of a cache: its axes, each a merge of the atomic axes named in the string."""

    axes: tuple[str, ...]

    @property
    def atoms(self) -> tuple[str, ...]:
        """The atomic axes in memory order."""
        return tuple(atom for axis in self.axes for atom in axis.split())

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Array shape for these atomic sizes."""
        return tuple(math.prod(sizes[a] for a in axis.split()) for axis in self.axes)

    def strides(self, sizes: Sizes) -> Sizes:
        """Elements between neighbours along each atomic axis."""
        return {a: math.prod(sizes[b] for b in self.atoms[i + 1 :]) for i, a in enumerate(self.atoms)}

    def read(self, array: Array, sizes: Sizes, pages: Array) -> Array:
        """Gather whole pages: `[*pages.shape, S, K, (P,) D]`, stored values; page numbers are clamped."""
        got = self.logical(as_bytes(array).at[pages.reshape(-1)].get(mode="clip"), sizes)
        return from_bytes(got.reshape(*pages.shape, *got.shape[1:]), array.dtype)

    def logical(self, stored: Array, sizes: Sizes) -> Array:
        """Pages as this buffer stores them `[n, ..]`, in their logical order `[n, S, K, (P,) D]`."""
        n, inner = stored.shape[0], self.atoms[1:]
        split = stored.reshape(n, *(sizes[a] for a in inner))
        ordered = split.transpose(0, *(1 + inner.index(a) for a in sorted(inner, key=_LOGICAL.index)))
        return ordered.reshape(n, *self._dims("SKPD", sizes))

    def lay(self, rows: Array, sizes: Sizes) -> Array:
        """Logical pages `[n, S, K, (P,) D]` as this buffer stores them `[n, ..]`."""
        n, inner = rows.shape[0], self.atoms[1:]
        ordered = sorted(inner, key=_LOGICAL.index)
        laid = rows.reshape(n, *(sizes[a] for a in ordered)).transpose(0, *(1 + ordered.index(a) for a in inner))
        return laid.reshape(n, *self.shape(sizes)[1:])

    def read_slots(self, array: Array, sizes: Sizes, page: Array, slot: Array) -> Array:
        """Gather tokens `[T]` by page and slot in page: `[T, K, (P,) D]`, stored values; page numbers are clamped."""
        block = sizes.get("S0", 1)
        where = {"N": page, "S": slot, "S1": slot // block, "S0": slot % block}
        atomic = as_bytes(array).reshape([sizes[a] for a in self.atoms])
        # The axes that are not indexed come out behind the tokens, and every layout has them in logical order.
        got = atomic.at[tuple(where.get(a, slice(None)) for a in self.atoms)].get(mode="clip")
        return from_bytes(got.reshape(page.shape[0], *self._dims("KPD", sizes)), array.dtype)

    def write(self, array: Array, sizes: Sizes, page: Array, slot: Array, rows: Array) -> Array:
        """Scatter token rows `[T, K, (P,) D]` to (page, slot); a page number >= N is dropped."""
        atoms = self.atoms
        # Axes up to the last slot axis are all indexed, so that the scattered window is contiguous: XLA would
        # otherwise transpose, and so copy, the whole cache.
        last = max(i for i, a in enumerate(atoms) if a[0] == "S")
        block = sizes.get("S0", 1)
        slots = {"S": slot, "S1": slot // block, "S0": slot % block}
        loops = [a for a in atoms[: last + 1] if a[0] not in "NS"]
        rank = 1 + len(loops)
        along = lambda x, axis: x.reshape([-1 if i == axis else 1 for i in range(rank)])  # noqa: E731
        index = [
            along(jnp.arange(sizes[a]), 1 + loops.index(a)) if a in loops else along(page if a == "N" else slots[a], 0)
            for a in atoms[: last + 1]
        ]
        logical = [a for a in sorted(atoms, key=_LOGICAL.index) if a[0] not in "NS"]
        rows = rows.reshape(rows.shape[0], *(sizes[a] for a in logical))
        rows = rows.transpose(0, *(1 + logical.index(a) for a in (*loops, *atoms[last + 1 :])))
        atomic = as_bytes(array).reshape([sizes[a] for a in atoms])
        atomic = atomic.at[tuple(index)].set(as_bytes(rows), mode="drop", wrap_negative_indices=False)
        return from_bytes(atomic.reshape(array.shape), array.dtype)

    def _dims(self, letters: str, sizes: Sizes) -> list[int]:
        """Sizes of the logical axes, those this buffer has."""
        atoms = {c: [sizes[a] for a in self.atoms if a[0] == c] for c in letters}
        return [math.prod(found) for found in atoms.values() if found]


def as_bytes(x: Array) -> Array:
    """FP8 as bytes: where XLA has no FP8 it would convert the whole cache to a wider type, and back, to move a row."""
    fp8 = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1
    return lax.bitcast_convert_type(x, jnp.uint8) if fp8 else x


def from_bytes(x: Array, dtype) -> Array:
    """The bytes of `as_bytes` as what they were."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


_LOGICAL = ("N", "S1", "S", "S0", "K", "P", "D1", "D", "D0")  # logical order of the atomic axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A cache layout: one buffer for keys and one for values, or a single buffer (`v` None) holding both."""

    name: str
    k: Buffer
    v: Buffer | None
    head_major: bool = False  # scales per token and head are [N, K, S], not [N, S, K]

    @property
    def single(self) -> bool:
        """Whether one buffer holds both keys and values."""
        return self.v is None

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The key and the value buffer, or the single one."""
        return (self.k,) if self.v is None else (self.k, self.v)

    @property
    def blocked(self) -> bool:
        """Whether axes are split in blocks of 16 bytes."""
        return any(a[-1] == "0" for a in self.k.atoms)

    def sizes(self, pages: int, page_size: int, heads: int, dim: int, itemsize: int) -> Sizes:
        """Atomic sizes for one buffer of this cache; refuses what the blocks of the layout do not divide."""
        x = 16 // itemsize
        if self.blocked:
            fix = f"{self.name} stores blocks of {x} values of {itemsize} bytes: use a multiple of {x}"
            require(page_size % x == 0, "page_size", page_size, fix)
            require(dim % x == 0, "head_dim", dim, fix)
        return {"N": pages, "S": page_size, "S1": page_size // x, "S0": x, "K": heads, "P": 2,
                "D": dim, "D1": dim // x, "D0": x}  # fmt: skip

    def scale_shape(self, pages: int, page_size: int, heads: int) -> tuple[int, int, int]:
        """Shape of a scale per token and head."""
        return (pages, heads, page_size) if self.head_major else (pages, page_size, heads)

    def measure(self, k_shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int, int]:
        """(pages, page size, heads, key head dim) told by the shape of the key (or single) buffer."""
        axes, x = self.k.axes, 16 // itemsize
        require(len(k_shape) == len(axes), "cache.k", f"rank {len(k_shape)}", f"{self.name} is [{', '.join(axes)}]")
        found = {"P": 2, "S0": x, "D0": x}
        for axis, n in zip(axes, k_shape, strict=True):
            atoms = axis.split()
            known = math.prod(found[a] for a in atoms if a in found)
            fix = f"axis {axis} of {self.name} is a multiple of {known}"
            require(n % known == 0, "cache.k", f"shape {k_shape}", fix)
            found.update({a: n // known for a in atoms if a not in found})
        slots = found.get("S") or found["S1"] * x
        dim = found.get("D") or found["D1"] * x
        return found["N"], slots, found["K"], dim

    def __repr__(self) -> str:
        return self.name


NHD = Layout("NHD", Buffer(("N", "S", "K", "D")), Buffer(("N", "S", "K", "D")))
HND = Layout("HND", Buffer(("N", "K", "S", "D")), Buffer(("N", "K", "S", "D")), head_major=True)
# Heads of keys and values alternate: K0 V0 K1 V1 ... (tpu-inference, sglang-jax, levanter).
INTERLEAVED = Layout("INTERLEAVED", Buffer(("N", "S", "K P", "D")), None)
# Each row is a key followed by its value (vLLM 0.33).
PACKED = Layout("PACKED", Buffer(("N", "K", "S", "P D")), None, head_major=True)
# Keys in columns of 16 bytes, values in rows of 16 bytes of slots (aiter on AMD GPUs).
SHUFFLE = Layout("SHUFFLE", Buffer(("N", "K", "D1", "S", "D0")), Buffer(("N", "K", "S1", "D", "S0")), head_major=True)

LAYOUTS = (NHD, HND, INTERLEAVED, PACKED, SHUFFLE)
