"""The cases of MLA over latents: decode, whole sequences or listed keys, and prefill; `_gq` are those with group-FP8
results."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench.cases import PEERS
from bench.shape import Shape
from pallas_attn.core.arch import H100

PAGE, LATENT, ROPE = 64, 512, 64
SCALE = 192**-0.5
CACHE_SCALE, Q_SCALE = 0.02, 0.02
PREFILL = (  # heads, name, sequences, context, query tokens of each
    (128, "1x2k", 1, 2048, 2048), (128, "1x8k", 1, 8192, 8192), (128, "4xchunk512_16k", 4, 16384, 512),
    (128, "b32_spec16_c4096", 32, 4096, 16), (16, "1x2k", 1, 2048, 2048), (16, "4x2k", 4, 2048, 2048),
)  # fmt: skip
ROWS = {"bf16": pa.BF16, "fp8": pa.E4M3_TENSOR, "rows": pa.FP8_DS_MLA}


def row_bytes(format: pa.Format) -> int:
    """Bytes of a cached token."""
    return 656 if format == pa.FP8_DS_MLA else (LATENT + ROPE) * format.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class MlaCase(Shape):
    """So many sequences of one length; their last tokens are the queries."""

    name: str
    op: str  # "mla", "mla_sparse" with `topk` keys a token, or "mla_prefill" with more than one query token a sequence
    seqs: int
    context: int
    heads: int
    kv: str  # a key of ROWS
    topk: int | None = None
    grouped: bool = False
    peers_us: tuple[tuple[str, float], ...] = ()
    layout: pa.Layout = pa.NHD
    q_len: int = 1  # query tokens of a sequence

    @property
    def tokens(self) -> int:
        """Query tokens of all sequences."""
        return self.seqs * self.q_len

    @property
    def fp8_query(self) -> bool:
        """Whether logits are products of FP8."""
        return self.kv == "fp8"

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: queries, rows that are attended to once, the bf16 latents."""
        row = row_bytes(ROWS[self.kv])
        query = (LATENT + ROPE) * (1 if self.fp8_query else 2)
        return self.seqs * (self.topk or self.context) * row + self.tokens * self.heads * (query + 2 * LATENT)

    @property
    def flops(self) -> int:
        """Multiply-adds of both products, times two."""
        unseen = self.seqs * self.q_len * (self.q_len - 1) // 2  # what lies behind a token
        return 2 * self.heads * (2 * LATENT + ROPE) * (self.tokens * (self.topk or self.context) - unseen)

    @property
    def rate(self) -> float:
        """FLOP/s of the matrix unit for them."""
        return H100.fp8 if self.fp8_query else H100.bf16

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU; without peers."""
        topk = None if self.topk is None else min(self.topk, 96)
        small = {"seqs": min(self.seqs, 2), "context": min(self.context, 256), "heads": min(self.heads, 16)}
        small["q_len"] = min(self.q_len, 40)
        return dataclasses.replace(self, name=f"{self.name}_small", topk=topk, peers_us=(), **small)


@functools.cache
def all_cases() -> dict[str, MlaCase]:
    """Every case of MLA by name; results in groups, and prefill, have no peers."""
    rows = [r for r in json.loads(PEERS.read_text())["cases"] if r["op"] in ("mla", "mla_sparse")]
    cases = [
        MlaCase(
            r["name"], r["op"], r["B"], r["ctx"], r["Hq"], r.get("kv", "rows"), r.get("topk"),
            peers_us=tuple((name, us) for name, us in r["peers_us"].items() if us),
        )
        for r in rows
    ]  # fmt: skip
    groups = [dataclasses.replace(c, name=f"{c.name}_gq", grouped=True, peers_us=()) for c in cases]
    prefill = [
        MlaCase(f"mla_h{heads}_{name}_kv{kv}", "mla_prefill", seqs, context, heads, kv, q_len=q_len)
        for heads, name, seqs, context, q_len in PREFILL
        for kv in ("bf16", "fp8")
    ]
    return {c.name: c for c in (*cases, *groups, *prefill)}


def arguments(case: MlaCase, seed: int = 0) -> tuple[Any, ...]:
    """Random (q_latent, q_rope, cache, batch), and slots of keys in no order where they are listed; pages in random
    order; the batch has its schedule, which a serving step computes once for all its layers."""
    rng = np.random.default_rng(seed)
    pages = -(-case.context // PAGE)
    table = rng.permutation(case.seqs * pages).reshape(case.seqs, pages).astype(np.int32)
    keys = jax.random.split(jax.random.key(seed), 2)
    format = ROWS[case.kv]
    scale = jnp.float32(CACHE_SCALE) if case.fp8_query else None
    cache = pa.LatentCache(_random_pages(keys[0], case.seqs * pages, format), format, scale)
    q = jax.random.normal(keys[1], (case.tokens, case.heads, LATENT + ROPE), jnp.bfloat16)
    parts = (q[..., :LATENT], q[..., LATENT:])
    query = tuple(pa.quantize(x, pa.E4M3_STATIC, Q_SCALE) for x in parts) if case.fp8_query else parts
    lengths = jnp.full(case.seqs, case.context, jnp.int32)
    starts = case.q_len * jnp.arange(case.seqs + 1, dtype=jnp.int32)
    batch = pa.RaggedBatch(jnp.asarray(table), lengths, starts, max_q_len=case.q_len)
    if case.topk is None:
        return *query, cache, batch.with_schedule()
    found = np.stack([rng.choice(case.context, case.topk, replace=False) for _ in range(case.seqs)])
    slots = np.take_along_axis(table, found // PAGE, axis=1) * PAGE + found % PAGE
    return *query, cache, batch.with_schedule(), jnp.asarray(slots, jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_pages(key, count: int, format: pa.Format):
    """Normal numbers as the cache stores them, page by page, so that no float32 array of the cache's size appears."""
    like = pa.LatentCache.allocate(1, PAGE, format=format, scale=CACHE_SCALE if format == pa.E4M3_TENSOR else None)

    def page(key):
        x = jax.random.normal(key, (PAGE, LATENT + ROPE))
        return like.rows(x[:, :LATENT], x[:, LATENT:])

    return jax.lax.map(page, jax.random.split(key, count), batch_size=min(64, count))


def keywords(case: MlaCase, args: tuple) -> dict[str, Any]:
    """The options of a call with these arguments."""
    given: dict[str, Any] = {"scale": SCALE}
    if case.grouped:
        given["out"] = pa.e4m3_group(128)
    return given | ({"topk": pa.TopK(args[4], slots=True)} if len(args) > 4 else {})


def operation(case: MlaCase, backend: str | None) -> Callable[..., Any]:
    """The timed function of the arguments."""
    return lambda *args: pa.mla_attention(*args[:4], **keywords(case, args), backend=backend)


def calls(case: MlaCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op with its arguments."""
    return [(functools.partial(pa.mla_attention, **keywords(case, args)), args[:4])]


def check(case: MlaCase, args: tuple, backend: str | None, most: int = 4) -> tuple[float, tuple]:
    """(relative L2 distance of a few tokens to the portable backend's float32, the arguments to go on with)."""
    out = jax.jit(operation(case, backend))(*args)
    out = pa.dequantize(out).reshape(case.tokens, case.heads, LATENT) if case.grouped else out
    picks = np.unique(np.linspace(0, case.tokens - 1, most).astype(int))
    seqs, after = picks // case.q_len, case.q_len - 1 - picks % case.q_len
    few = dataclasses.replace(case, grouped=False)
    query = [jax.tree.map(lambda x: x[picks] if x.ndim else x, q) for q in args[:2]]
    batch = pa.RaggedBatch(
        args[3].page_table[seqs], args[3].kv_lens[seqs] - after, jnp.arange(len(picks) + 1), max_q_len=1
    )
    those = (*query, args[2], batch, *(x[picks] for x in args[4:]))
    truth = jax.jit(lambda *a: pa.mla_attention(*a[:4], **keywords(few, a), out=jnp.float32, backend="xla"))
    want, got = (np.asarray(x, np.float64) for x in (truth(*those), out[picks]))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)), args
