"""The cases of the sparse indexer: logits over cached keys (pmqa_*), over contiguous ones (mqa_*), selections (topk_*),
rotation and quantisation of queries (rope_*),
and a decode step of all three parts (indexer_*).

`--backend mosaic` calls the Hopper kernels by themselves; `python -m bench.indexing 'pmqa_*'` times their variants.
"""

import dataclasses
import fnmatch
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import timing
from bench.cases import PEERS
from bench.shape import Shape
from pallas_attn.core.arch import H100
from pallas_attn.ops.sparse_indexer import mosaic_logits, mosaic_paged_logits, mosaic_rope, mosaic_topk, turns
from pallas_attn.ops.sparse_indexer.logits import problem as logits_problem
from pallas_attn.ops.sparse_indexer.paged_logits import problem as paged_problem
from pallas_attn.ops.sparse_indexer.rope import problem as rope_problem
from pallas_attn.ops.sparse_indexer.topk import problem as topk_problem

UNREGISTERED = ("mosaic",)
KINDS = {"paged_mqa_logits": "pmqa", "mqa_logits": "mqa", "topk": "topk"}
PAGE, TOKEN = 64, 132  # tokens of a page, bytes of a token
HALF = 32  # pairs of dims that RoPE turns
PARTS_US = {"indexer_b64_c131072": ("parts of the peers", 470.0)}  # without quantisation


@dataclasses.dataclass(frozen=True)
class IndexingCase(Shape):
    """One shape: so many rows over so many keys each."""

    name: str
    kind: str  # "pmqa", "mqa", "topk", "rope" or "indexer"
    rows: int
    lens: tuple[int, ...]  # keys of each sequence; of the one there is (mqa); or of each row (topk)
    next_n: int = 1
    k: int = 2048
    numbers: str = "normal"  # what rows of a selection are made of
    heads: int = 64
    dim: int = 128
    layout: pa.IndexLayout = pa.INDEX_NORMAL
    peers_us: tuple[tuple[str, float], ...] = ()
    op: str = "indexer"

    @property
    def keys(self) -> int:
        """Columns of a row."""
        return max(self.lens)

    @property
    def pairs(self) -> int:
        """Logits that are not -inf by shape alone; a prompt's rows are the last of its keys."""
        if self.kind == "mqa":
            return self.rows * self.keys - self.rows * (self.rows - 1) // 2
        return self.next_n * sum(self.lens) - len(self.lens) * self.next_n * (self.next_n - 1) // 2

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: keys and queries once, the logits once, the positions."""
        queries = self.rows * self.heads * (self.dim + 4)
        positions = 4 * self.rows * self.k
        match self.kind:
            case "topk":
                return 4 * self.rows * self.keys + positions
            case "rope":
                return queries + self.rows * (2 * self.heads * self.dim + 8 * HALF)
            case "mqa":
                return TOKEN * self.keys + queries + 4 * self.rows * self.keys
        cached = sum(TOKEN * n + 4 * -(-n // PAGE) for n in self.lens)
        if self.kind == "indexer":  # float queries in, positions out: logits may stay where they are
            return cached + queries + self.rows * self.heads * self.dim + positions
        return cached + queries + 4 * self.pairs

    @property
    def flops(self) -> int:
        """Multiply-adds of the products, times two."""
        return 0 if self.kind in ("topk", "rope") else 2 * self.pairs * self.heads * self.dim

    @property
    def rate(self) -> float:
        """FLOP/s of the matrix unit for them."""
        return H100.fp8

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU; without peers."""
        lens = tuple(min(n, 320 + 64 * i) for i, n in enumerate(self.lens[:2]))
        rows = len(lens) * self.next_n if self.kind != "mqa" else 16
        return dataclasses.replace(
            self, name=f"{self.name}_small", rows=rows, lens=lens, k=128, heads=min(self.heads, 32), peers_us=()
        )


def _from_table(r: dict[str, Any]) -> IndexingCase:
    peers = tuple((name, us) for name, us in r["peers_us"].items() if us)
    kind, rows = KINDS[r["op"]], int(r["M"] if "M" in r else r["B"])
    lens = (r["N"],) if kind == "mqa" else (r["ctx"],) * rows
    return IndexingCase(r["name"], kind, rows, lens, k=r.get("k", 2048), peers_us=peers)


def _own() -> list[IndexingCase]:
    ragged = tuple(map(int, np.random.default_rng(0).integers(1, 131073, 64)))
    pmqa = lambda name, lens, n=1: IndexingCase(name, "pmqa", len(lens) * n, lens, n)  # noqa: E731
    topk = lambda name, rows, keys, numbers="normal", k=2048: IndexingCase(  # noqa: E731
        name, "topk", rows, (keys,) * rows, k=k, numbers=numbers
    )
    whole = [
        IndexingCase(name, "indexer", rows, (keys,) * rows, peers_us=(PARTS_US[name],) if name in PARTS_US else ())
        for name, rows, keys in (("indexer_b64_c131072", 64, 131072), ("indexer_b32_c32768", 32, 32768))
    ]
    sizes = ((64, 32768), (64, 131072), (1, 131072))
    adversarial = [topk(f"topk_b{b}_c{c}_{x}", b, c, x) for b, c in sizes for x in NUMBERS if x != "normal"]
    return [
        *(IndexingCase(f"rope_b{n}", "rope", n, (1,) * n) for n in (64, 4096)),
        pmqa("pmqa_b64_ragged131072", ragged), pmqa("pmqa_b32_c32768_n2", (32768,) * 32, 2),
        pmqa("pmqa_b8_c32768_n8", (32768,) * 8, 8), *whole, *adversarial,
        topk("topk_b8_c1048576", 8, 1 << 20), topk("topk_b8_c1048576_k4096", 8, 1 << 20, k=4096),
        topk("topk_b4096_c32768_lowbits", 4096, 32768, "lowbits"),
    ]  # fmt: skip


NUMBERS: dict[str, Callable] = {
    "normal": jax.random.normal,
    "equal": lambda key, shape: jnp.full(shape, 0.3),
    "lowbits": lambda key, shape: jax.lax.bitcast_convert_type(
        0x3F800000 + jax.random.randint(key, shape, 0, 1024), jnp.float32
    ),
    "ascending": lambda key, shape: jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.float32), shape),
    "heavy": jax.random.cauchy,
    "groups": lambda key, shape: jax.random.normal(key, shape) + 100.0 * (jax.random.uniform(key, shape) < 0.05),
    "infinite": lambda key, shape: jnp.where(
        jax.random.uniform(key, shape) < 0.99, -jnp.inf, jax.random.normal(key, shape)
    ),
}


@functools.cache
def all_cases() -> dict[str, IndexingCase]:
    """Every case by name."""
    rows = [r for r in json.loads(PEERS.read_text())["cases"] if r["op"] in KINDS]
    return {c.name: c for c in (*map(_from_table, rows), *_own())}


def arguments(case: IndexingCase, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments: (queries, weights, cache, batch), of a decode step (queries, cos, sin, weights, cache, batch);
    (queries, keys, weights, starts, ends); (logits, ends); (queries, cos, sin)."""
    keys = jax.random.split(jax.random.key(seed), 4)
    if case.kind == "topk":
        return NUMBERS[case.numbers](keys[0], (case.rows, case.keys)), jnp.asarray(case.lens, jnp.int32)
    shape = (case.rows, case.heads, case.dim)
    q, weights = jax.random.normal(keys[0], shape, jnp.bfloat16), jax.random.normal(keys[1], shape[:2])
    turn = turns.angles(131072 + jnp.arange(case.rows), 10_000.0 ** (-jnp.arange(HALF) / HALF))
    if case.kind == "rope":
        return q, *turn
    if case.kind == "indexer":
        return q, *turn, weights, *_cached(case, keys[2], seed)
    query = jax.jit(lambda x: pa.quantize(x, pa.INDEX_Q))(q)
    if case.kind == "pmqa":
        return query, weights, *_cached(case, keys[2], seed)
    k = pa.quantize(jax.random.normal(keys[2], (case.keys, case.dim)), pa.INDEX_K)
    ends = case.keys - case.rows + 1 + jnp.arange(case.rows, dtype=jnp.int32)
    return query, k, weights, jnp.zeros_like(ends), ends


def _cached(case: IndexingCase, key, seed: int) -> tuple[pa.IndexCache, pa.RaggedBatch]:
    """Pages in random order."""
    owned = [-(-n // PAGE) for n in case.lens]
    order = np.random.default_rng(seed).permutation(sum(owned)).astype(np.int32)
    table = np.zeros((len(owned), max(owned)), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(owned), owned, strict=True)):
        table[row, :count] = order[end - count : end]
    starts = case.next_n * np.arange(len(owned) + 1, dtype=np.int32)
    batch = pa.RaggedBatch(
        *map(jnp.asarray, (table, np.array(case.lens, np.int32), starts)), max_q_len=case.next_n
    )  # fmt: skip
    return pa.IndexCache(_pages(key, sum(owned)), pa.INDEX_NORMAL), batch


@functools.partial(jax.jit, static_argnums=1)
def _pages(key, pages: int):
    """Normal keys with scales of a quarter to two, made page by page."""

    def page(key):
        values = jax.random.normal(key, (PAGE, 128)).astype(jnp.float8_e4m3fn)
        scales = jnp.exp2(jax.random.randint(key, (PAGE,), -2, 2).astype(jnp.float32))
        parts = (jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1) for x in (values, scales))
        return jnp.concatenate(list(parts)).reshape(PAGE, TOKEN)

    return jax.lax.map(page, jax.random.split(key, pages), batch_size=64)


def variants(case: IndexingCase) -> dict[str, dict[str, Any]]:
    """What a tuner may choose for a case's kernel, by name."""
    match case.kind:
        case "pmqa":
            configs = [(tile, s, c) for tile in (64, 128) for s in (2, 3, 4) for c in (2, 3, 4) if tile * s <= 256]
            return {str(c): {"config": mosaic_paged_logits.Config(*c)} for c in configs}
        case "mqa":
            configs = [(4, s, parts, r) for s in (2, 3, 4) for parts in (1, 4, 8) for r in ((112, 24), (104, 40))]
            return {str(c): {"config": mosaic_logits.Config(*c)} for c in configs}
        case "topk":
            most = mosaic_topk.MOST_UNITS * mosaic_topk.UNIT
            fits = [n for n in (1, 2, 4, 8) if n * most >= case.keys or n == 8]
            held = {f"{n} CTAs": {"ctas": n, "stream": False} for n in fits}
            return held | {f"{n} CTAs, streamed": {"ctas": n, "stream": True} for n in (1, 2, 4, 8)}
        case "indexer":
            return {"one after the other": {}, "overlapping": {"early": True}}
    return {}


def sweep(pattern: str, repeat: int = 7) -> None:
    """Time every variant of the kernels of the cases that a pattern names; prints microseconds."""
    for case in all_cases().values():
        if not fnmatch.fnmatch(case.name, pattern):
            continue
        args = arguments(case)
        for name, choice in variants(case).items():
            timed = timing.measure(operation(case, "mosaic", **choice), *args, repeat=repeat)
            print(f"{case.name:30s} {name:24s} {timed.us:8.1f} us  {case.floor_us / timed.us:.3f} of floor", flush=True)


def _turned(q, cos, sin, backend: str | None, choice: dict) -> tuple[jax.Array, ...]:
    """(values, scales) of rotated queries."""
    if backend not in UNREGISTERED:
        query = pa.rope_quantize(q, cos, sin, backend=backend)
        return query.values, query.scale
    p, args = rope_problem.prepare(q, cos, sin)
    return _whole(mosaic_rope, p, args, choice)


def _logits(q, weights, cache, batch, width: int, backend: str | None, choice: dict):
    if backend not in UNREGISTERED:
        return pa.paged_indexer_logits(q, weights, cache, batch, max_len=width, backend=backend)
    p, args = paged_problem.prepare(q, weights, cache, batch, max_len=width)
    return _run(mosaic_paged_logits, p, args, choice)


def _topk(case: IndexingCase, logits, ends, backend: str | None, choice: dict):
    if backend not in UNREGISTERED:
        return pa.indexer_topk(logits, case.k, ends=ends, backend=backend)
    return _run(mosaic_topk, *topk_problem.prepare(logits, case.k, ends=ends), choice)


def _run(kernel, p, args, choice: dict) -> jax.Array:
    return _whole(kernel, p, args, choice)[0]


def _whole(kernel, p, args, choice: dict) -> tuple[jax.Array, ...]:
    reason = kernel.supports(p)
    if reason is not None:
        raise ValueError(f"the kernel refuses: {reason}")
    leaves, tree = jax.tree.flatten(args)
    return kernel.run(p, *jax.tree.unflatten(tree, leaves), **choice)


def operation(case: IndexingCase, backend: str | None, **choice) -> Callable[..., Any]:
    """The timed function of the arguments; `choice` is one of `variants`."""
    width = -(-case.keys // PAGE) * PAGE

    def paged(q, weights, cache, batch):
        return _logits(q, weights, cache, batch, width, backend, choice)

    def prefill(q, k, weights, starts, ends):
        if backend not in UNREGISTERED:
            return pa.indexer_logits(q, k, weights, starts, ends, backend=backend)
        return _run(mosaic_logits, *logits_problem.prepare(q, k, weights, starts, ends), choice)

    def rope(q, cos, sin):
        return _turned(q, cos, sin, backend, choice)

    def whole(q, cos, sin, weights, cache, batch):
        values, scale = rope(q, cos, sin)
        logits = paged(pa.Quantized(values, scale, pa.INDEX_Q), weights, cache, batch)
        return _topk(case, logits, batch.kv_lens, backend, choice)

    def topk(logits, ends):
        return _topk(case, logits, ends, backend, choice)

    return {"pmqa": paged, "mqa": prefill, "topk": topk, "rope": rope, "indexer": whole}[case.kind]


def calls(case: IndexingCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The ops that the operation calls, with their arguments."""
    match case.kind:
        case "pmqa":
            return [(pa.paged_indexer_logits, args)]
        case "mqa":
            return [(pa.indexer_logits, args)]
        case "topk":
            return [(functools.partial(pa.indexer_topk, k=case.k), args[:1])]
        case "rope":
            return [(pa.rope_quantize, args)]
    query = jax.eval_shape(pa.rope_quantize, *args[:3])
    logits = jax.ShapeDtypeStruct((case.rows, case.keys), jnp.float32)
    choose = functools.partial(pa.indexer_topk, k=case.k)
    return [(pa.rope_quantize, args[:3]), (pa.paged_indexer_logits, (query, *args[3:])), (choose, (logits,))]


def check(case: IndexingCase, args: tuple, backend: str | None, most: int = 4) -> tuple[float, tuple]:
    """(error of a few rows to the portable backend on a CPU, the arguments to go on with): the relative L2 distance of
    logits, infinite where a -inf differs; of positions, or of bytes of queries, the share that is not the same."""
    got = jax.jit(operation(case, backend))(*args)
    picks = np.unique(np.linspace(0, case.rows - 1, most).astype(int))
    row = lambda t: jax.tree.map(lambda x: np.asarray(x[t]), got)  # noqa: E731
    return max(_error(case, args, row(int(t)), int(t)) for t in picks), args


def _error(case: IndexingCase, args: tuple, got: Any, t: int) -> float:
    one = _row(case, args, t)
    there = jax.device_put(one, jax.devices("cpu")[0])
    alone = dataclasses.replace(case, rows=1, next_n=1, lens=(case.keys,))
    want = jax.tree.map(lambda x: np.asarray(x[0]), jax.jit(operation(alone, "xla"))(*there))
    if case.kind == "rope":
        return float(max(np.mean(g.view(np.uint8) != w.view(np.uint8)) for g, w in zip(got, want, strict=True)))
    if case.kind in ("topk", "indexer"):
        same = np.intersect1d(got, want).size if case.kind == "indexer" else np.sum(got == want)
        return float(1 - same / np.unique(want).size) if case.kind == "indexer" else float(1 - same / want.size)
    if not np.array_equal(np.isneginf(got), np.isneginf(want)):
        return float("inf")
    seen = ~np.isneginf(want)
    return float(np.linalg.norm(got[seen] - want[seen]) / np.linalg.norm(want[seen]))


def _row(case: IndexingCase, args: tuple, t: int) -> tuple:
    """The arguments of row t alone."""
    own = lambda x: jax.tree.map(lambda a: a[t : t + 1], x)  # noqa: E731
    if case.kind in ("topk", "rope"):
        return own(args)
    if case.kind == "mqa":
        q, k, *rest = args
        return own(q), k, *own(tuple(rest))
    *rows, cache, batch = args
    b, i = divmod(t, case.next_n)
    pages = cache.replace(cache.pages[batch.page_table[b]])
    table = jnp.arange(batch.page_table.shape[1], dtype=jnp.int32)[None]
    seen = batch.kv_lens[b : b + 1] - (case.next_n - 1 - i)
    return *own(tuple(rows)), pages, pa.RaggedBatch(table, seen, jnp.array([0, 1]), max_q_len=1)


if __name__ == "__main__":
    sweep(sys.argv[1])
