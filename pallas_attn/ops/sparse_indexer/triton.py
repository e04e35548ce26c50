"""What the Triton backends of the indexer share, for Ampere, Ada and Hopper: how queries and keys meet, and how pages
are cut."""

from typing import Any

import numpy as np

from pallas_attn.core.arch import Arch
from pallas_attn.core.index_cache import IndexCache
from pallas_attn.runtime.triton import KINDS, arch, kind, operand, power_of_two

SMS = 132  # of the largest of these GPUs
MOST_HEADS, MOST_DIM = 256, 256
SHARED = {Arch.AMPERE: 163, Arch.ADA: 99, Arch.HOPPER: 227}  # KiB that a program may have


def refuses(q: np.dtype, k: np.dtype, heads: int, dim: int, tokens: int, paged: bool) -> str | None:
    """None, or why a kernel, over pages or not, does not take such queries and keys."""
    refusals = {
        f"no {heads} heads": heads > MOST_HEADS,
        f"no head dim {dim}": dim > MOST_DIM,
        "no integers": any(np.issubdtype(t, np.integer) for t in (q, k)),
        "an empty call": not tokens,
    }
    reason = next((reason for reason, refused in refusals.items() if refused), None)
    if reason is None and not _fits(q, k, heads, dim, paged, *tile(q, k, heads, dim, paged)):
        return f"no {heads} {q} heads of {dim}: a program has {_shared()} KiB of shared memory"
    return reason


def numbers(q: np.dtype, k: np.dtype, heads: int, dim: int) -> dict[str, Any]:
    """How stored values become operands of the matrix unit: FP8 as it is where the GPU multiplies it, else in the
    narrowest type that holds both sides exactly, f16 for FP8; f32 as three TF32 terms."""
    dtype, precision = (q, "tf32") if q == k and q in KINDS and arch().has_fp8 else operand(q, k)
    return {
        "H": heads, "HP": max(power_of_two(heads), 16), "D": dim, "DP": max(power_of_two(dim), 16), "Q_KIND": kind(q),
        "K_KIND": kind(k), "OPERAND": dtype, "PRECISION": precision,
    }  # fmt: skip


def tile(q: np.dtype, k: np.dtype, heads: int, dim: int, paged: bool) -> tuple[int, int]:
    """(keys of a tile, stages of the pipeline): the first that fit the shared memory, or the least. 128 keys, fewer
    where a program's registers would not hold the products or the keys."""
    own = numbers(q, k, heads, dim)
    most = 128 if own["HP"] <= 64 and own["DP"] <= 128 and own["OPERAND"].itemsize < 4 else 64
    choices = (most, 3), (most, 2), (most, 1), (32, 1), (16, 1)
    return next((c for c in choices if _fits(q, k, heads, dim, paged, *c)), choices[-1])


def _fits(q: np.dtype, k: np.dtype, heads: int, dim: int, paged: bool, keys: int, stages: int) -> bool:
    """Whether both operands, in two terms where TF32 has three products, and stored numbers on their way, of the keys
    if those are paged, else of the queries, fit the shared memory. The compiler may need less."""
    own = numbers(q, k, heads, dim)
    operand = own["OPERAND"].itemsize * (2 if own["PRECISION"] == "tf32x3" else 1)
    ahead = keys * k.itemsize if paged else own["HP"] * q.itemsize
    used = own["DP"] * ((own["HP"] + keys) * operand + (stages - 1) * ahead) + 2048  # for weights, scales and sums
    return used <= _shared() * 1024


def _shared() -> int:
    return SHARED.get(arch(), min(SHARED.values()))


def page_constants(cache: IndexCache) -> dict[str, Any]:
    """What the kernels that move keys want to know of a cache."""
    assert cache.format.group is not None
    return {
        "G": cache.groups, "D": cache.head_dim, "GROUP": cache.format.group, "GP": power_of_two(cache.format.group),
        "S": cache.page_size, "PAGE": cache.page_size * cache.pages.shape[2], "SHUFFLED": cache.layout.tiled,
        "EXPONENTS": cache.format.exponents,
    }  # fmt: skip


def rows_of(total: int) -> int:
    """Rows of a program, each one token and group, of so many."""
    return min(max(power_of_two(total // (4 * SMS)), 1), 16)
