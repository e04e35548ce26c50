"""What the Triton backends of the indexer share, for Ampere, Ada and Hopper: how queries and keys meet, and how pages
are cut."""

from typing import Any

import numpy as np

from pallas_attn.core.index_cache import IndexCache
from pallas_attn.runtime.triton import KINDS, arch, kind, operand, power_of_two

SMS = 132  # of the largest of these GPUs
MOST_HEADS, MOST_DIM = 256, 256


def refuses(heads: int, dim: int, tokens: int, *dtypes: np.dtype) -> str | None:
    """None, or why neither kernel takes such queries and keys."""
    refusals = {
        f"no {heads} heads": heads > MOST_HEADS,
        f"no head dim {dim}": dim > MOST_DIM,
        "no integers": any(np.issubdtype(t, np.integer) for t in dtypes),
        "an empty call": not tokens,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def numbers(q: np.dtype, k: np.dtype, heads: int, dim: int) -> dict[str, Any]:
    """How stored values become operands of the matrix unit: FP8 as it is where the GPU multiplies it, else in the
    narrowest type that holds both sides exactly, f16 for FP8; f32 as three TF32 terms."""
    dtype, precision = (q, "tf32") if q == k and q in KINDS and arch().has_fp8 else operand(q, k)
    return {
        "H": heads, "HP": max(power_of_two(heads), 16), "D": dim, "DP": max(power_of_two(dim), 16), "Q_KIND": kind(q),
        "K_KIND": kind(k), "OPERAND": dtype, "PRECISION": precision,
    }  # fmt: skip


def tile(constants: dict[str, Any]) -> int:
    """Keys of a tile: 128, fewer where a program's registers would not hold the products or the keys."""
    return 128 if constants["HP"] <= 64 and constants["DP"] <= 128 and constants["OPERAND"].itemsize < 4 else 64


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
