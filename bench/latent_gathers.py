"""The cases of `gather_latent`: cached rows of a batch as contiguous numbers, or as they are stored."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench.mla import CACHE_SCALE, LATENT, PAGE, ROPE, ROWS, row_bytes
from bench.shape import Shape
from bench.writes import flat


@dataclasses.dataclass(frozen=True)
class LatentGatherCase(Shape):
    """So many sequences of one length."""

    name: str
    seqs: int
    context: int
    format: pa.Format
    raw: bool
    layout: pa.Layout = pa.NHD
    op: str = "gather_latent"

    @property
    def tokens(self) -> int:
        """Rows of the result."""
        return self.seqs * self.context

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: rows read, and written as they are or in bf16, the page table."""
        stored = row_bytes(self.format)
        written = stored if self.raw else 2 * (LATENT + ROPE)
        return self.tokens * (stored + written) + 4 * self.seqs * -(-self.context // PAGE)

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU."""
        small = {"seqs": min(self.seqs, 2), "context": min(self.context, 128)}
        return dataclasses.replace(self, name=f"{self.name}_small", **small)


@functools.cache
def all_cases() -> dict[str, LatentGatherCase]:
    """Every case of latent gathers by name."""
    cases = [
        LatentGatherCase(f"gather_latent_b8_c8192_{name}{'_raw' if raw else ''}", 8, 8192, format, raw)
        for name, format in ROWS.items()
        for raw in (False, True)
        if not (raw and format == pa.BF16)
    ]
    return {c.name: c for c in cases}


def arguments(case: LatentGatherCase, seed: int = 0) -> tuple[Any, ...]:
    """Random (cache, batch), pages in random order."""
    pages = -(-case.context // PAGE)
    table = np.random.default_rng(seed).permutation(case.seqs * pages).reshape(case.seqs, pages)
    scale = CACHE_SCALE if case.format.granularity == "tensor" else None
    cache = pa.LatentCache.allocate(1, PAGE, format=case.format, scale=scale)
    x = jax.random.normal(jax.random.key(seed), (case.seqs * pages, PAGE, LATENT + ROPE))
    cache = dataclasses.replace(cache, pages=jax.jit(cache.rows)(x[..., :LATENT], x[..., LATENT:]))
    lengths = jnp.full(case.seqs, case.context, jnp.int32)
    return cache, pa.RaggedBatch(jnp.asarray(table, jnp.int32), lengths, jnp.zeros(case.seqs + 1, jnp.int32))


def operation(case: LatentGatherCase, backend: str | None) -> Callable[..., Any]:
    """The timed function of (cache, batch)."""
    return lambda cache, batch: pa.gather_latent(cache, batch, **_options(case), backend=backend)


def calls(case: LatentGatherCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with its arguments."""
    return [(functools.partial(pa.gather_latent, **_options(case)), args)]


def _options(case: LatentGatherCase) -> dict[str, Any]:
    return {"max_tokens": case.tokens, "raw": case.raw}


def check(case: LatentGatherCase, args: tuple, backend: str | None) -> tuple[float, tuple]:
    """(relative error to the portable backend on a CPU, the arguments to go on with). They are meant to be equal."""
    got = jax.jit(operation(case, backend))(*args)
    want = jax.jit(operation(case, "xla"))(*jax.device_put(args, jax.devices("cpu")[0]))
    pairs = [(flat(a), flat(b)) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
    return float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)), args
