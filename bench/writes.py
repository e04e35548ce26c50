"""The cases of `write_kv`: new keys and values of a step quantised and scattered into the cache, in place."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench.shape import Shape

CARRY = True
PAGE = 64


@dataclasses.dataclass(frozen=True)
class WriteCase(Shape):
    """So many tokens: of one prompt (as many as fill pages in a row), or of as many sequences at random places."""

    name: str
    tokens: int
    format: pa.Format
    layout: pa.Layout
    kv_heads: int = 8
    head_dim: int = 128
    op: str = "write"

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: keys and values read in bf16 and written in the cache's format, scales, slots. What
        stays in the L2 may be faster."""
        rows = 2 * self.tokens * self.kv_heads
        scale = 4 if self.format.granularity == "token_head" else 0
        return rows * (self.head_dim * (2 + self.format.dtype.itemsize) + scale) + 4 * self.tokens

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU."""
        return dataclasses.replace(self, name=f"{self.name}_small", tokens=min(self.tokens, 128))


@functools.cache
def all_cases() -> dict[str, WriteCase]:
    """Every case of cache writes by name; `_hnd` are those in HND."""
    cases = [
        WriteCase(f"write_t{tokens}_{name}{suffix}", tokens, format, layout)
        for name, format in (("tensor", pa.E4M3_TENSOR), ("token", pa.E4M3_TOKEN_HEAD))
        for tokens in (32, 128, 8192)
        for layout, suffix in ((pa.NHD, ""), (pa.HND, "_hnd"))
    ]
    return {c.name: c for c in cases}


def arguments(case: WriteCase, seed: int = 0) -> tuple[Any, ...]:
    """Random (cache, k, v, slots)."""
    rng = np.random.default_rng(seed)
    pages = 4 * max(case.tokens // PAGE, 64)
    k_scale, v_scale = (0.5, 0.25) if case.format.granularity == "tensor" else (None, None)
    cache = pa.PagedKVCache.allocate(
        pages, PAGE, case.kv_heads, case.head_dim,
        format=case.format, layout=case.layout, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    if case.tokens >= 1024:
        slots = (rng.permutation(pages)[: case.tokens // PAGE, None] * PAGE + np.arange(PAGE)).reshape(-1)
    else:
        slots = rng.choice(pages * PAGE, case.tokens, replace=False)
    shape = (case.tokens, case.kv_heads, case.head_dim)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(seed)))
    return cache, k, v, jnp.asarray(slots, jnp.int32)


def operation(case: WriteCase, backend: str | None) -> Callable[..., tuple]:
    """The timed function of (cache, k, v, slots)."""
    return lambda *args: (pa.write_kv(*args, backend=backend),)


def calls(case: WriteCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with its arguments."""
    return [(pa.write_kv, args)]


def check(case: WriteCase, args: tuple, backend: str | None) -> tuple[float, tuple]:
    """(relative error of the stored codes and scales to those of the portable backend on a CPU, the arguments with the
    cache as written). They are meant to be equal."""
    there = jax.device_put(args, jax.devices("cpu")[0])
    want = jax.tree.leaves(jax.jit(operation(case, "xla"))(*there))
    (cache,) = jax.jit(operation(case, backend), donate_argnums=0)(*args)
    pairs = [(flat(a), flat(b)) for a, b in zip(jax.tree.leaves(cache), want, strict=True)]
    error = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
    return float(error), (cache, *args[1:])


def flat(x: jax.Array) -> np.ndarray:
    """Stored numbers in a line, as float32."""
    return np.asarray(x).astype(np.float32).reshape(-1)
