"""The cases of the benchmark: shapes by name, with the floor of the machine and the times of the peers."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench.shape import Shape
from pallas_attn.core.arch import H100

PEERS = Path(__file__).parent / "peers" / "h100.json"
K_SCALE, V_SCALE, Q_SCALE = 0.5, 0.25, 0.75


@dataclasses.dataclass(frozen=True)
class Case(Shape):
    """One shape of paged attention: sequences of (query tokens, cached tokens), heads, and how it is stored."""

    name: str
    op: str  # "decode", "prefill", or "layers": a whole step of decode, see bench/layers.py
    seqs: tuple[tuple[int, int], ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    fp8_query: bool
    layout: pa.Layout = pa.NHD
    peers_us: tuple[tuple[str, float], ...] = ()
    layers: int = 1

    @property
    def tokens(self) -> int:
        """Query tokens of all sequences."""
        return sum(q for q, _ in self.seqs)

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: queries, cached keys and values once, page table, output; in a whole step for each
        layer, and its new keys and values read and written."""
        row = self.q_heads * self.head_dim
        kv = sum(kv for _, kv in self.seqs) * self.kv_heads * self.head_dim * 2
        pages = sum(-(-kv // self.page_size) for _, kv in self.seqs)
        new = self.tokens * self.kv_heads * self.head_dim * 2 * 3 if self.op == "layers" else 0
        return self.layers * (self.tokens * row * (3 if self.fp8_query else 4) + kv + 4 * pages + new)

    @property
    def flops(self) -> int:
        """Multiply-adds of both products over the visible pairs, times two."""
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in self.seqs)
        return self.layers * 4 * self.q_heads * self.head_dim * pairs

    @property
    def rate(self) -> float:
        """FLOP/s of the matrix unit for them."""
        return H100.fp8 if self.fp8_query else H100.bf16

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU; without peers."""
        seqs = tuple((min(q, 32), max(min(kv, 256), min(q, 32))) for q, kv in self.seqs[:2])
        layers = min(self.layers, 2)
        return dataclasses.replace(self, name=f"{self.name}_small", seqs=seqs, peers_us=(), layers=layers)


def _from_table(row: dict[str, Any]) -> Case:
    seqs = row.get("seqs") or [(1, row["ctx"])] * row["B"]
    peers = tuple((name, us) for name, us in row["peers_us"].items() if us)
    return Case(
        row["name"], row["op"], tuple((q, kv) for q, kv in seqs), row["Hq"], row["Hkv"], row["D"], row["page"],
        row["q"] == "fp8", pa.NHD, peers,
    )  # fmt: skip


def _ragged() -> Case:
    lengths = np.random.default_rng(0).integers(1, 8193, 64)
    seqs = tuple((1, int(n)) for n in lengths)
    return Case("dec_l8_b64_ragged8192_p64_qbf16", "decode", seqs, 32, 8, 128, 64, fp8_query=False)


def _csr(query: str) -> Case:
    """A page a token, listed as SGLang and aiter do."""
    return Case(
        f"csr_l8_b32_c8192_p1_q{query}", "decode", ((1, 8192),) * 32, 32, 8, 128, 1, fp8_query=query == "fp8"
    )  # fmt: skip


def _layers() -> Case:
    return Case("layers32_l8_b32_c8192", "layers", ((1, 8192),) * 32, 32, 8, 128, 64, fp8_query=False, layers=32)


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case of attention by name, each also in HND with the suffix `_hnd` (the peers' times are for NHD)."""
    rows = json.loads(PEERS.read_text())["cases"]
    cases = [*(_from_table(r) for r in rows if r["op"] in ("decode", "prefill"))]
    cases += [_ragged(), _csr("bf16"), _csr("fp8"), _layers()]
    hnd = [dataclasses.replace(c, name=f"{c.name}_hnd", layout=pa.HND) for c in cases]
    return {c.name: c for c in (*cases, *hnd)}


def arguments(case: Case, seed: int = 0) -> tuple[Any, pa.PagedKVCache, pa.RaggedBatch]:
    """Random (q, cache, batch) of a case: FP8 pages per tensor, in random order; the batch has its schedule, which a
    serving step computes once for all its layers."""
    rng = np.random.default_rng(seed)
    owned = [-(-kv // case.page_size) for _, kv in case.seqs]
    order = rng.permutation(sum(owned)).astype(np.int32)
    table = np.zeros((len(owned), max(owned)), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(owned), owned, strict=True)):
        table[row, :count] = order[end - count : end]
    keys = jax.random.split(jax.random.key(seed), 3)
    cache = pa.PagedKVCache.allocate(
        case.layers * sum(owned), case.page_size, case.kv_heads, case.head_dim,
        format=pa.E4M3_TENSOR, layout=case.layout, k_scale=K_SCALE, v_scale=V_SCALE,
    )  # fmt: skip
    cache = cache.replace(tuple(_random_fp8(k, x.shape) for k, x in zip(keys, cache.buffers, strict=False)))
    q = jax.random.normal(keys[2], (case.tokens, case.q_heads, case.head_dim), jnp.bfloat16)
    query = pa.quantize(q, pa.E4M3_STATIC, Q_SCALE) if case.fp8_query else q
    starts = np.cumsum([0, *(n for n, _ in case.seqs)]).astype(np.int32)
    lengths = np.array([kv for _, kv in case.seqs], np.int32)
    most = max(n for n, _ in case.seqs)
    if case.page_size == 1:
        ends = np.cumsum([0, *owned]).astype(np.int32)
        return query, cache, pa.RaggedBatch.from_csr(ends, jnp.asarray(order), cu_q_lens=starts, max_q_len=1)
    batch = pa.RaggedBatch(*map(jnp.asarray, (table, lengths, starts)), max_q_len=1 if most == 1 else None)
    return query, cache, batch.with_schedule()


@functools.partial(jax.jit, static_argnums=1)
def _random_fp8(key, shape):
    """Normal numbers of unit scale in FP8, made page by page so that no float32 array of the cache's size appears."""
    page = lambda k: jax.random.normal(k, shape[1:]).astype(jnp.float8_e4m3fn)  # noqa: E731
    return jax.lax.map(page, jax.random.split(key, shape[0]), batch_size=64)


def relative_error(case: Case, args: tuple, out: jax.Array, most: int = 4) -> float:
    """Relative L2 distance to the float32 definition on the stored values, over a few tokens across the step."""
    q, cache, batch = args
    picks = np.unique(np.linspace(0, case.tokens - 1, most).astype(int))
    seq, position, _ = (np.asarray(x) for x in batch.tokens(case.tokens))
    lengths = position[picks] + 1
    width = -(-int(lengths.max()) // case.page_size)
    table = np.asarray(batch.page_table)[seq[picks], :width]

    def truth(i: int, token: int) -> np.ndarray:
        one = pa.RaggedBatch(jnp.asarray(table[i : i + 1]), jnp.asarray(lengths[i : i + 1]), jnp.array([0, 1]))
        query = jax.tree.map(lambda x: x[token : token + 1] if x.ndim else x, q)
        return np.asarray(pa.reference.paged_attention(query, cache, one, out=jnp.float32), np.float64)[0]

    want = np.stack([truth(i, t) for i, t in enumerate(picks)])  # one at a time: the definition takes memory
    return float(np.linalg.norm(np.asarray(out[picks], np.float64) - want) / np.linalg.norm(want))


def operation(case: Case, backend: str | None) -> Callable[..., jax.Array]:
    """The timed function of (q, cache, batch)."""
    return lambda q, cache, batch: pa.paged_attention(q, cache, batch, backend=backend)  # type: ignore[return-value]


def calls(case: Case, args: tuple) -> list[tuple[Callable, tuple]]:
    """The ops that the operation calls, with their arguments: what `pa.explain` is asked."""
    return [(pa.paged_attention, args)]


def check(case: Case, args: tuple, backend: str | None) -> tuple[float, tuple]:
    """(relative error, the arguments to go on with)."""
    return relative_error(case, args, jax.jit(operation(case, backend))(*args)), args
