"""The cases of quantisation in groups: activations [T, N] to FP8, with scales in rows (gq_*) or packed (gq_*_packed),
and what MLA's up-projection makes of latents (gq_up_*).

`--backend mosaic` makes gq_up_* by the kernel that does so inside of `mla_attention`, the others by a product and the
op. Every case has a copy of as many bytes timed beside it, in the same process: what a kernel could reach.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import timing
from bench.cases import PEERS
from bench.mla import LATENT, PAGE, ROPE
from bench.shape import Shape
from bench.side import Side
from pallas_attn.ops.mla import mosaic_up
from pallas_attn.ops.mla import problem as mla_problem

HEAD = 128  # values of an up-projected head
FORMATS = {"": pa.e4m3_group(128), "_packed": pa.e4m3_group(128, ue8m0=True, order="tma", packed=True)}


@dataclasses.dataclass(frozen=True)
class QuantizeCase(Shape):
    """bf16 numbers [tokens, width]; with heads, those that an up-projection of 512 to 128 makes of latents first."""

    name: str
    tokens: int
    width: int
    format: pa.Format
    peers_us: tuple[tuple[str, float], ...] = ()
    heads: int | None = None
    op: str = "quantize"
    layout: pa.Layout = pa.NHD

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: bf16 read, FP8 written, a float32 or a byte for every group."""
        groups, read = self.tokens * self.width // 128, self.tokens * self.width
        if self.heads is not None:
            read = self.heads * LATENT * (self.tokens + HEAD)
        return 2 * read + self.tokens * self.width + (4 if self.format.scale_type == "float32" else 1) * groups

    @property
    def flops(self) -> int:
        """Multiply-adds of the up-projection, times two."""
        return 0 if self.heads is None else 2 * self.tokens * self.heads * LATENT * HEAD

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU; without peers."""
        return dataclasses.replace(
            self, name=f"{self.name}_small", tokens=min(self.tokens, 32), width=1024, peers_us=()
        )


@functools.cache
def all_cases() -> dict[str, QuantizeCase]:
    """Every case by name; peers write scales in rows."""
    rows = [r for r in json.loads(PEERS.read_text())["cases"] if r["op"] == "group_quant"]
    cases = [
        QuantizeCase(
            r["name"] + suffix, r["T"], r["N"], format,
            () if suffix else tuple((name, us) for name, us in r["peers_us"].items() if us),
        )
        for r in rows for suffix, format in FORMATS.items() if r["T"] > 1 or not suffix
    ]  # fmt: skip
    up = [
        QuantizeCase(f"gq_up_t{t}_h{h}{suffix}", t, h * HEAD, format, heads=h)
        for t, h in ((32, 128), (128, 128), (4096, 128), (128, 16)) for suffix, format in FORMATS.items()
    ]  # fmt: skip
    return {c.name: c for c in (*cases, *up)}


def arguments(case: QuantizeCase, seed: int = 0) -> tuple[jax.Array, ...]:
    """Normal numbers x, or (latents, weights)."""
    keys = jax.random.split(jax.random.key(seed))
    if case.heads is None:
        return (jax.random.normal(keys[0], (case.tokens, case.width), jnp.bfloat16),)
    shapes = (case.tokens, case.heads, LATENT), (case.heads, LATENT, HEAD)
    return tuple(jax.random.normal(*given, jnp.bfloat16) for given in zip(keys, shapes, strict=True))


def operation(case: QuantizeCase, backend: str | None) -> Callable[..., tuple]:
    """The timed function of the arguments: (codes, scales)."""

    def quantized(x, w=None):
        if w is not None:
            x, w = (a.astype(jnp.float32) if backend == "reference" else a for a in (x, w))
            x = jnp.einsum("thc,hcv->thv", x, w).reshape(case.tokens, -1)
        q = pa.quantize(x, case.format, backend=backend)
        return q.values, q.scale

    def projected(x, w):
        return mosaic_up.project(_attention(case), x, w, jnp.ones(1), None)

    return projected if backend == "mosaic" and case.heads is not None else quantized


def _attention(case: QuantizeCase) -> mla_problem.Problem:
    """A decode whose latents are up-projected."""
    shape, t, h = jax.ShapeDtypeStruct, case.tokens, case.heads
    i32 = lambda *n: shape(n, jnp.int32)  # noqa: E731
    batch = pa.RaggedBatch(i32(t, 1), i32(t), i32(t + 1), max_q_len=1)
    cache = pa.LatentCache(shape((t, PAGE, LATENT + ROPE), jnp.bfloat16), pa.BF16)
    latent, rope = (shape((t, h, n), jnp.bfloat16) for n in (LATENT, ROPE))
    weights = shape((h, LATENT, HEAD), jnp.bfloat16)
    return mla_problem.prepare(latent, rope, cache, batch, scale=1.0, w_uv=weights, out=case.format)[0]


def calls(case: QuantizeCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with arguments of its shapes."""
    x = args[0] if case.heads is None else jax.ShapeDtypeStruct((case.tokens, case.width), jnp.float32)
    return [(pa.quantize, (x, case.format))]


def check(case: QuantizeCase, args: tuple, backend: str | None, most: int = 64) -> tuple[float, tuple]:
    """(relative L2 distance of some rows' numbers to the reference's on a CPU, the arguments to go on with)."""
    codes, scale = jax.jit(operation(case, backend))(*args)
    picks = np.unique(np.linspace(0, case.tokens - 1, most).astype(int))
    few = operation(dataclasses.replace(case, tokens=len(picks)), "reference")
    there = jax.device_put((np.asarray(args[0][picks]), *map(np.asarray, args[1:])), jax.devices("cpu")[0])
    number = jax.jit(lambda codes, scale: pa.dequantize(pa.Quantized(codes, scale, case.format)))
    got, want = (np.asarray(number(*q), np.float64) for q in ((codes, scale), jax.jit(few)(*there)))
    return float(np.linalg.norm(got[picks] - want) / np.linalg.norm(want)), args


def beside(case: QuantizeCase, backend: str | None, repeat: int) -> Iterator[Side]:
    """A copy of as many bytes, half of them read and half written; by XLA, whatever the backend."""
    del backend
    words = jnp.zeros(case.bytes // 8, jnp.uint32)
    us = timing.measure(lambda x: x + 1, words, repeat=repeat).us
    yield Side(f"copy of as many bytes: {case.floor_us / us:.3f} of floor", us, 0.0)
