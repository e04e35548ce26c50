"""The cases of quantisation in groups: activations [T, N] to FP8, with scales in rows (gq_*) or packed (gq_*_packed).

No dispatch knows the Hopper kernel yet: `--backend mosaic` calls it by itself. Every case has a copy of as many bytes
timed beside it, in the same process: what the kernel could reach.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import timing
from bench.cases import PEERS
from bench.side import Side
from pallas_attn.core.arch import H100
from pallas_attn.ops.quantize_output import mosaic
from pallas_attn.ops.quantize_output.problem import prepare

UNREGISTERED = ("mosaic",)
FORMATS = {"": pa.e4m3_group(128), "_packed": pa.e4m3_group(128, ue8m0=True, order="tma", packed=True)}


@dataclasses.dataclass(frozen=True)
class QuantizeCase:
    """bf16 numbers [tokens, width]."""

    name: str
    tokens: int
    width: int
    format: pa.Format
    peers_us: tuple[tuple[str, float], ...] = ()
    op: str = "quantize"
    layout: pa.Layout = pa.NHD
    flops: int = 0

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: bf16 read, FP8 written, a float32 or a byte for every group."""
        groups = self.tokens * self.width // 128
        return 3 * self.tokens * self.width + (4 if self.format.scale_type == "float32" else 1) * groups

    @property
    def floor_us(self) -> float:
        """Bytes over the bandwidth of an H100."""
        return 1e6 * self.bytes / H100.memory

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The fastest peer's name and microseconds."""
        return min(self.peers_us, key=lambda p: p[1], default=None)

    def small(self) -> "QuantizeCase":
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
        for r in rows for suffix, format in FORMATS.items()
    ]  # fmt: skip
    return {c.name: c for c in cases}


def arguments(case: QuantizeCase, seed: int = 0) -> tuple[jax.Array]:
    """Normal numbers."""
    return (jax.random.normal(jax.random.key(seed), (case.tokens, case.width), jnp.bfloat16),)


def operation(case: QuantizeCase, backend: str | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The timed function of x: (codes, scales)."""

    def known(x):
        q = pa.quantize(x, case.format, backend=backend)
        return q.values, q.scale

    def alone(x):
        p, args = prepare(x, case.format)
        reason = mosaic.supports(p)
        if reason is not None:
            raise ValueError(f"the kernel refuses: {reason}")
        return mosaic.run(p, *args)

    return alone if backend in UNREGISTERED else known


def calls(case: QuantizeCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with its arguments."""
    return [(pa.quantize, (*args, case.format))]


def check(case: QuantizeCase, args: tuple, backend: str | None, most: int = 64) -> tuple[float, tuple]:
    """(share of some rows' numbers that differ from the reference on a CPU, the arguments to go on with)."""
    codes, scale = jax.jit(operation(case, backend))(*args)
    got = pa.Quantized(codes, scale, case.format)
    picks = np.unique(np.linspace(0, case.tokens - 1, most).astype(int))
    x = jax.device_put(np.asarray(args[0][picks]), jax.devices("cpu")[0])
    want = jax.jit(lambda x: pa.dequantize(pa.quantize(x, case.format, backend="reference")))(x)
    return float(np.mean(np.asarray(jax.jit(pa.dequantize)(got)[picks]) != np.asarray(want))), args


def beside(case: QuantizeCase, backend: str | None, repeat: int) -> Iterator[Side]:
    """A copy of as many bytes, half of them read and half written; by XLA, whatever the backend."""
    del backend
    words = jnp.zeros(case.bytes // 8, jnp.uint32)
    us = timing.measure(lambda x: x + 1, words, repeat=repeat).us
    yield Side(f"copy of as many bytes: {case.floor_us / us:.3f} of floor", us, 0.0)
