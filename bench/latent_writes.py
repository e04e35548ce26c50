"""The cases of `write_latent`: new latents of a step put into the cache of MLA, in place."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench.mla import LATENT, PAGE, ROPE, ROWS, row_bytes
from bench.shape import Shape
from bench.writes import flat

CARRY = True


@dataclasses.dataclass(frozen=True)
class LatentWriteCase(Shape):
    """So many tokens: of one prompt (as many as fill pages in a row), or of as many sequences at random places."""

    name: str
    tokens: int
    format: pa.Format
    layout: pa.Layout = pa.NHD
    op: str = "write_latent"

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: latents read in bf16 and written as they are stored, slots."""
        return self.tokens * (2 * (LATENT + ROPE) + row_bytes(self.format) + 4)

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU."""
        return dataclasses.replace(self, name=f"{self.name}_small", tokens=min(self.tokens, 128))


@functools.cache
def all_cases() -> dict[str, LatentWriteCase]:
    """Every case of latent writes by name."""
    cases = [
        LatentWriteCase(f"write_latent_t{tokens}_{name}", tokens, format)
        for name, format in ROWS.items()
        for tokens in (32, 128, 8192)
    ]
    return {c.name: c for c in cases}


def arguments(case: LatentWriteCase, seed: int = 0) -> tuple[Any, ...]:
    """Random (cache, latent, rope, slots)."""
    rng = np.random.default_rng(seed)
    pages = 4 * max(case.tokens // PAGE, 64)
    scale = 0.02 if case.format.granularity == "tensor" else None
    cache = pa.LatentCache.allocate(pages, PAGE, format=case.format, scale=scale)
    if case.tokens >= 1024:
        slots = (rng.permutation(pages)[: case.tokens // PAGE, None] * PAGE + np.arange(PAGE)).reshape(-1)
    else:
        slots = rng.choice(pages * PAGE, case.tokens, replace=False)
    keys = jax.random.split(jax.random.key(seed))
    parts = (jax.random.normal(k, (case.tokens, d), jnp.bfloat16) for k, d in zip(keys, (LATENT, ROPE), strict=True))
    return cache, *parts, jnp.asarray(slots, jnp.int32)


def operation(case: LatentWriteCase, backend: str | None) -> Callable[..., tuple]:
    """The timed function of (cache, latent, rope, slots)."""
    return lambda *args: (pa.write_latent(*args, backend=backend),)


def calls(case: LatentWriteCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with its arguments."""
    return [(pa.write_latent, args)]


def check(case: LatentWriteCase, args: tuple, backend: str | None) -> tuple[float, tuple]:
    """(relative error of the stored numbers, or bytes, to those of the portable backend on a CPU, the arguments with
    the cache as written). They are meant to be equal."""
    there = jax.device_put(args, jax.devices("cpu")[0])
    (want,) = jax.jit(operation(case, "xla"))(*there)
    (cache,) = jax.jit(operation(case, backend), donate_argnums=0)(*args)
    a, b = flat(cache.pages), flat(want.pages)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), (cache, *args[1:])
