"""The cases of `gather_kv`: FP8 pages of a batch as contiguous bf16 keys and values."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

import pallas_attn as pa
from bench.cases import PEERS, Case
from bench.cases import arguments as cached
from bench.shape import Shape


@dataclasses.dataclass(frozen=True)
class GatherCase(Shape):
    """So many sequences of one length."""

    name: str
    seqs: int
    context: int
    kv_heads: int
    head_dim: int
    page_size: int
    layout: pa.Layout = pa.NHD
    peers_us: tuple[tuple[str, float], ...] = ()
    op: str = "gather"

    @property
    def tokens(self) -> int:
        """Rows of the result."""
        return self.seqs * self.context

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: keys and values read as FP8 and written as bf16, the page table."""
        pages = self.seqs * -(-self.context // self.page_size)
        return 2 * self.tokens * self.kv_heads * self.head_dim * 3 + 4 * pages

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU; without peers."""
        small = {"seqs": min(self.seqs, 2), "context": min(self.context, 128), "peers_us": ()}
        return dataclasses.replace(self, name=f"{self.name}_small", **small)


@functools.cache
def all_cases() -> dict[str, GatherCase]:
    """Every case of the gather by name; `_hnd` are those in HND (the peers' times are for NHD)."""
    rows = [r for r in json.loads(PEERS.read_text())["cases"] if r["op"] == "gather"]
    cases = [
        GatherCase(
            r["name"], r["B"], r["ctx"], r["Hkv"], r["D"], r["page"],
            peers_us=tuple((name, us) for name, us in r["peers_us"].items() if us),
        )
        for r in rows
    ]  # fmt: skip
    hnd = [dataclasses.replace(c, name=f"{c.name}_hnd", layout=pa.HND) for c in cases]
    return {c.name: c for c in (*cases, *hnd)}


def arguments(case: GatherCase, seed: int = 0) -> tuple[Any, ...]:
    """Random (cache, batch), pages in random order."""
    lens = ((1, case.context),) * case.seqs
    like = Case(
        case.name, "decode", lens, case.kv_heads, case.kv_heads, case.head_dim, case.page_size, False, case.layout
    )
    _, cache, batch = cached(like, seed)
    return cache, dataclasses.replace(batch, schedule=None)


def operation(case: GatherCase, backend: str | None) -> Callable[..., pa.Gathered]:
    """The timed function of (cache, batch)."""
    return lambda cache, batch: pa.gather_kv(cache, batch, max_tokens=case.tokens, backend=backend)


def calls(case: GatherCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with its arguments."""
    return [(functools.partial(pa.gather_kv, max_tokens=case.tokens), args)]


def check(case: GatherCase, args: tuple, backend: str | None) -> tuple[float, tuple]:
    """(relative error to the portable backend on a CPU, the arguments to go on with). They are meant to be equal."""
    got = jax.jit(operation(case, backend))(*args)
    there = jax.device_put(args, jax.devices("cpu")[0])
    want = jax.jit(operation(case, "xla"))(*there)
    pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(got, want, strict=True)]
    return float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)), args
