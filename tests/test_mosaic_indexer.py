"""The Hopper kernels of the sparse indexer: what they refuse, that they lower to one launch, that they give what the
definition gives, and that the selection's search is bounded. No dispatch knows them: they are called by themselves."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_attn as pa
from bench import cases, indexing
from pallas_attn.ops.sparse_indexer import (
    mosaic_logits,
    mosaic_paged_logits,
    mosaic_topk,
    mosaic_topk_search,
)
from pallas_attn.ops.sparse_indexer.logits import problem as logits_problem
from pallas_attn.ops.sparse_indexer.logits import reference as logits_reference
from pallas_attn.ops.sparse_indexer.paged_logits import problem as paged_problem
from pallas_attn.ops.sparse_indexer.paged_logits import reference as paged_reference
from pallas_attn.ops.sparse_indexer.topk import problem as topk_problem
from pallas_attn.ops.sparse_indexer.topk import reference as topk_reference

S = jax.ShapeDtypeStruct
name = lambda cell: "-".join(map(str, cell))  # noqa: E731


def lower(kernel, p, args):
    """The program for a GPU, as text."""
    leaves, tree = jax.tree.flatten(args)
    step = jax.jit(lambda *xs: kernel.run(p, *jax.tree.unflatten(tree, xs)))
    return step.trace(*(S(x.shape, x.dtype) for x in leaves)).lower(lowering_platforms=("cuda",)).as_text()


def is_one_launch(text):
    """One kernel, and beside it only what moves no byte."""
    operations = ("add", "multiply", "concatenate", "gather", "select", "reduce", "pad", "slice", "convert")
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert not [x for x in operations if f"stablehlo.{x} " in text]


def on_cpu(args):
    return jax.device_put(args, jax.devices("cpu")[0])


def agrees(got, want, most=1e-6):
    """-inf in the same places; elsewhere the distance of 8-bit products at most."""
    got, want = np.asarray(got), np.asarray(want)
    seen = ~np.isneginf(want)
    np.testing.assert_array_equal(~np.isneginf(got), seen)
    if seen.any():
        got, want = (x[seen].astype(np.float64) for x in (got, want))
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= most * np.abs(want).max()
        assert 1 - 2 * (got @ want) / (got @ got + want @ want) < 1e-5


# Logits over cached keys

PAGED = (
    (1, 2, 4, 8),  # query tokens
    (8, 32, 64, 128),  # heads
    (32, 64, 128, 256),  # page size
    ("INDEX_K", "INDEX_K_F32", "INDEX_K_EXPONENT"),
    ("position", "row lengths"),
    (None, 128, 1000, 4096),  # columns
    (1, 3, 150),  # sequences
    ("group", "head", "tensor"),  # scale of the query
)
SCALES = {"group": pa.INDEX_Q, "head": pa.E4M3_HEAD, "tensor": pa.E4M3_TENSOR}


def some_query(rng, tokens, heads, scale):
    x = jnp.asarray(rng.standard_normal((tokens, heads, 128)), jnp.float32)
    return pa.quantize(x, SCALES[scale])


def abstract_query(tokens, heads, scale):
    shape = {"group": (tokens, heads, 1), "head": (heads,), "tensor": ()}[scale]
    return pa.Quantized(S((tokens, heads, 128), jnp.float8_e4m3fn), S(shape, jnp.float32), SCALES[scale])


def abstract_paged(next_n, heads, page_size, format, lens, max_len, seqs, scale, layout=pa.INDEX_NORMAL):
    i32, tokens = jnp.int32, seqs * next_n
    cache = pa.IndexCache(S((64, page_size, 132), jnp.uint8), layout, getattr(pa, format))
    batch = pa.RaggedBatch(S((seqs, 8192 // page_size), i32), S((seqs,), i32), S((seqs + 1,), i32), max_q_len=next_n)
    rows = S((tokens,), i32) if lens == "row lengths" else None
    weights = S((tokens, heads), jnp.float32)
    return paged_problem.prepare(
        abstract_query(tokens, heads, scale), weights, cache, batch, max_len=max_len, row_lens=rows
    )


def concrete_paged(rng, next_n, heads, page_size, format, lens, max_len, seqs, scale, most=400, lead=0, weights=None):
    """Ragged sequences, some without keys or queries, padding behind (and before) them; what nobody wrote is NaN."""
    kv_lens = rng.integers(1, most, seqs)
    q_lens = rng.integers(1, next_n + 1, seqs)
    q_lens[seqs // 2] = seqs == 1
    owned = -(-kv_lens // page_size)
    pages, width = int(owned.sum()) + 2, int(owned.max()) + 1
    order, at = rng.permutation(pages), 0
    table = np.full((seqs, width), 2**31 - 1, np.int32)
    for b, n in enumerate(owned):
        table[b, :n] = order[at : at + n]
        at += n
    slots = np.concatenate([table[b, np.arange(n) // page_size] * page_size + np.arange(n) % page_size
                            for b, n in enumerate(kv_lens)])  # fmt: skip
    cache = pa.IndexCache.allocate(pages, page_size, format=getattr(pa, format), layout=pa.INDEX_NORMAL)
    cache = cache.replace(jnp.full_like(cache.pages, 0xFF))
    k = jnp.asarray(rng.standard_normal((slots.size, 128)), jnp.float32)
    cache = pa.write_index(cache, k, jnp.asarray(slots, jnp.int32), backend="xla")
    tokens = int(q_lens.sum()) + lead + 2
    starts = jnp.asarray(lead + np.concatenate([[0], np.cumsum(q_lens)]), jnp.int32)
    batch = pa.RaggedBatch(jnp.asarray(table), jnp.asarray(kv_lens, jnp.int32), starts, max_q_len=next_n)
    rows = jnp.asarray(rng.integers(-3, most + 9, tokens), jnp.int32) if lens == "row lengths" else None
    w = jnp.asarray(rng.standard_normal((tokens, heads)), weights or jnp.float32)
    query = some_query(rng, tokens, heads, scale)
    return paged_problem.prepare(query, w, cache, batch, max_len=max_len, row_lens=rows, scale=0.25)


CELLS_PAGED = pairwise(PAGED, lambda cell: mosaic_paged_logits.supports(abstract_paged(*cell)[0]) is None)
INTERPRETED_PAGED = [
    ((1, 8, 64, "INDEX_K", "position", None, 3, "group"), None, {"most": 150, "weights": jnp.bfloat16}),
    ((3, 8, 32, "INDEX_K_EXPONENT", "row lengths", 200, 3, "head"), (128, 2, 1), {"most": 90, "lead": 1}),
]


@pytest.mark.parametrize(("cell", "config", "keywords"), INTERPRETED_PAGED, ids=["one", "several"])
def test_paged_interpreted(cell, config, keywords, rng, monkeypatch):
    monkeypatch.setattr(mosaic_paged_logits, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_paged_logits, "SMS", 1)
    p, args = concrete_paged(rng, *cell, **keywords)
    config = config and mosaic_paged_logits.Config(*config)
    agrees(mosaic_paged_logits.run(p, *args, config=config)[0], paged_reference.run(p, *args)[0])


@pytest.mark.parametrize("cell", CELLS_PAGED[::24], ids=name)
def test_paged_lowers_to_one_launch(cell):
    is_one_launch(lower(mosaic_paged_logits, *abstract_paged(*cell)))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS_PAGED, ids=name)
def test_every_paged_cell_lowers(cell):
    lower(mosaic_paged_logits, *abstract_paged(*cell))


REFUSED_PAGED = {
    "many tokens": ({0: 9}, "it needs batch.max_q_len <= 8"),
    "heads": ({1: 24}, "no 24 heads"),
    "pages": ({2: 16}, "no pages of 16"),
    "layout": ({"layout": pa.INDEX_SHUFFLE}, "no INDEX_SHUFFLE layout, whose rows the matrix unit cannot read"),
    "sequences": ({6: 4097}, "more than 4096 sequences"),
}


@pytest.mark.parametrize(("change", "reason"), list(REFUSED_PAGED.values()), ids=list(REFUSED_PAGED))
def test_paged_refuses(change, reason):
    cell = [1, 64, 64, "INDEX_K", "position", None, 2, "group"]
    for i, x in change.items():
        if isinstance(i, int):
            cell[i] = x
    keywords = {k: v for k, v in change.items() if isinstance(k, str)}
    assert mosaic_paged_logits.supports(abstract_paged(*cell, **keywords)[0]) == reason


# Logits over contiguous keys

PREFILL = (
    (1, 3, 64, 1000),  # query tokens
    (64, 100, 4096, 5001),  # keys
    (32, 64, 128),  # heads
    (None, 64, 2048, 2049),  # columns
    ("group", "head", "tensor"),
)


def abstract_prefill(tokens, keys, heads, width, scale, k_format=pa.INDEX_K):
    k = pa.Quantized(
        S((keys, 128), jnp.float8_e4m3fn), S((keys, 128 // (k_format.group or 128)), jnp.float32), k_format
    )
    rows, weights = S((tokens,), jnp.int32), S((tokens, heads), jnp.float32)
    return logits_problem.prepare(abstract_query(tokens, heads, scale), k, weights, rows, rows, width=width)


def concrete_prefill(rng, tokens, keys, heads, width, scale, weights=jnp.float32):
    """Ranges of any kind: empty, whole, out of bounds; keys that nobody sees are NaN."""
    starts, ends = rng.integers(-5, keys // 2 + 1, tokens), rng.integers(0, keys + 9, tokens)
    seen = np.any((np.arange(keys) >= starts[:, None]) & (np.arange(keys) < ends[:, None]), axis=0)
    k = pa.quantize(jnp.asarray(rng.standard_normal((keys, 128)), jnp.float32), pa.INDEX_K)
    values = jnp.where(seen[:, None], k.values.astype(jnp.float32), jnp.nan).astype(k.values.dtype)
    k = pa.Quantized(values, k.scale, k.format)
    w = jnp.asarray(rng.standard_normal((tokens, heads)), weights)
    bounds = (jnp.asarray(x, jnp.int32) for x in (starts, ends))
    return logits_problem.prepare(some_query(rng, tokens, heads, scale), k, w, *bounds, width=width, scale=0.5)


CELLS_PREFILL = pairwise(PREFILL, lambda cell: mosaic_logits.supports(abstract_prefill(*cell)[0]) is None)
INTERPRETED_PREFILL = [
    ((3, 300, 128, None, "group"), (2, 2, 2)),
    ((3, 150, 64, 96, "tensor"), (1, 2, 2)),
    ((2, 128, 128, None, "head"), (2, 3, 1)),
]


@pytest.mark.parametrize(("cell", "config"), INTERPRETED_PREFILL, ids=["odd keys", "compressed", "absolute"])
def test_prefill_interpreted(cell, config, rng, monkeypatch):
    monkeypatch.setattr(mosaic_logits, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_logits, "SMS", 2)
    p, args = concrete_prefill(rng, *cell, weights=jnp.bfloat16)
    agrees(mosaic_logits.run(p, *args, config=mosaic_logits.Config(*config))[0], logits_reference.run(p, *args)[0])


@pytest.mark.parametrize("cell", CELLS_PREFILL[::10], ids=name)
def test_prefill_lowers_to_one_launch(cell):
    is_one_launch(lower(mosaic_logits, *abstract_prefill(*cell)))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS_PREFILL, ids=name)
def test_every_prefill_cell_lowers(cell):
    lower(mosaic_logits, *abstract_prefill(*cell))


def test_prefill_refuses():
    refuses = lambda *cell, **k: mosaic_logits.supports(abstract_prefill(*cell, **k)[0])  # noqa: E731
    assert refuses(3, 63, 64, None, "group") == "fewer than 64 keys"
    assert refuses(3, 640, 16, None, "group") == "no 16 heads"
    p, _ = logits_problem.prepare(
        *(S(s, jnp.bfloat16) for s in ((3, 64, 128), (99, 128), (3, 64))), S((3,), jnp.int32), S((3,), jnp.int32)
    )
    assert mosaic_logits.supports(p) == "no BF16 query"


# Selection


def normal(rng, n):
    return rng.standard_normal(n)


ROWS = {
    "normal": normal,
    "all equal": lambda rng, n: np.full(n, 0.3),
    "zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "ten low bits": lambda rng, n: (0x3F800000 + rng.integers(0, 1024, n)).astype(np.int32).view(np.float32),
    "half -inf": lambda rng, n: np.where(rng.random(n) < 0.5, -np.inf, rng.standard_normal(n)),
    "nearly all -inf": lambda rng, n: np.where(rng.random(n) < 0.99, -np.inf, rng.standard_normal(n)),
    "all -inf": lambda rng, n: np.full(n, -np.inf),
    "infinities": lambda rng, n: rng.choice([-np.inf, np.inf, 1.0], n),
    "half NaN": lambda rng, n: np.where(rng.random(n) < 0.5, np.nan, rng.standard_normal(n)),
    "nearly all NaN": lambda rng, n: np.where(rng.random(n) < 0.99, np.nan, rng.standard_normal(n)),
    "all NaN": lambda rng, n: np.full(n, np.nan),
    "any bits": lambda rng, n: rng.integers(-(2**31), 2**31, n).astype(np.int32).view(np.float32),
    "two groups": lambda rng, n: np.where(rng.random(n) < 0.05, 100, 0) + rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "huge": lambda rng, n: (rng.random(n) * 2 - 1) * 3e38,
    "tiny": lambda rng, n: rng.standard_normal(n) * 1e-40,
    "two values": lambda rng, n: np.where(rng.random(n) < 0.03, 1e30, -1e30),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n) - 2, 0),
    "ascending": lambda rng, n: np.arange(n),
}
MOST_PASSES = 8 + 32 + 7


def exact_keys(x):
    """Order keys by the bits alone, -0 as 0 and NaN below all: a CPU's comparisons take the tiniest floats for 0."""
    size = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return jnp.where(size == 0, 0, jnp.where(size > 0x7F800000, -(2**31), mosaic_topk_search.key(x)))


class Counted:
    """Stands in for the warps: a row's numbers as one array."""

    def __init__(self, x):
        self.keys = exact_keys(x)

    def count(self, least, turn):
        return jnp.sum(self.keys >= exact_keys(least)).astype(jnp.float32)

    def nearest(self, low, high, turn):
        least = jnp.min(jnp.where(self.keys >= exact_keys(low), self.keys, mosaic_topk_search.BEYOND - 1))
        below = (self.keys < exact_keys(high)) | jnp.isnan(high)
        return least, jnp.maximum(jnp.max(jnp.where(below, self.keys, -(2**31))), mosaic_topk_search.LEAST)


@functools.partial(jax.jit, static_argnums=1)
def search(x, form):
    some = x[:: form.units]
    finite = (some > -1e37) & (some < 1e37)
    kept = jnp.where(finite, some, 0.0)
    sample = jnp.sum(kept), jnp.sum(kept * kept), jnp.sum(finite).astype(jnp.float32)
    row = mosaic_topk_search.Row(form, Counted(x), jnp.int32(form.columns), sample)
    return jax.lax.while_loop(row.open, row.step, row.start(jnp.int32(0)))


@pytest.mark.parametrize("k", [64, 2048])
@pytest.mark.parametrize("kind", ROWS)
def test_search_is_bounded(kind, k, rng):
    """What the kernel's guesses lead to: the k-th largest number, in so many passes for any row."""
    with np.errstate(over="ignore"):
        x = ROWS[kind](rng, 8192).astype(np.float32)
    form = mosaic_topk.form_of(topk_problem.prepare(S((1, x.size), jnp.float32), k)[0])
    found = mosaic_topk_search.State(*search(jnp.asarray(x), form))
    assert found.passes <= MOST_PASSES
    kth = np.sort(np.where(np.isnan(x), -np.inf, x))[-k]
    threshold = np.asarray(mosaic_topk_search.value(found.low))
    if found.above == k:
        assert np.sum(x >= threshold) == k
    else:
        assert threshold == kth
        assert found.beyond == np.sum(x > kth)


def test_the_key_of_a_float_rises_with_it():
    x = np.array([-np.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, np.inf], np.float32)
    keys = mosaic_topk_search.key(jnp.asarray(x))
    assert (np.diff(np.asarray(keys)) > 0).all()
    assert (keys[0], keys[-1]) == (mosaic_topk_search.LEAST, mosaic_topk_search.BEYOND - 1)
    np.testing.assert_array_equal(np.asarray(mosaic_topk_search.value(keys)), x)


class Plain(Counted):
    """Stands in for all that the warps do, with rows of one array each."""

    def __init__(self, form, x, out):
        self.form, self.x, self.out = form, x, out

    def fetch(self, row):
        pass

    def take(self, row, first, end):
        column = jnp.arange(self.form.columns)
        self.row, self.first, self.inside = row, first, (column >= first) & (column < end)
        self.numbers = jnp.where(self.inside, self.x[row], jnp.nan)
        self.keys = exact_keys(self.numbers)

    def sample(self, turn):
        kept = jnp.where(jnp.isfinite(self.numbers), self.numbers, 0.0)[:: self.form.units]
        some = jnp.isfinite(self.numbers)[:: self.form.units]
        return jnp.sum(kept), jnp.sum(kept * kept), jnp.sum(some).astype(jnp.float32)

    def write(self, chosen):
        nth = jnp.arange(1, self.form.k + 1)
        self.out[self.row] = jnp.searchsorted(jnp.cumsum(chosen), nth).astype(jnp.int32) - self.first

    def place(self, least, turn):
        self.write(self.keys >= exact_keys(least))

    def place_with_ties(self, least, need, turn):
        above = self.keys > exact_keys(least)
        equal = self.inside & jnp.logical_not(above) & ((self.keys == exact_keys(least)) | (least == -jnp.inf))
        self.write(above | (equal & (jnp.cumsum(equal) <= need)))

    def place_all(self, count):
        position = jnp.arange(self.form.k)
        self.out[self.row] = jnp.where(position < count, position, -1)


def test_rows_of_a_cluster_interpreted(rng):
    """The walk over rows, their ranges, the search and the choice among equals; the warps' own part needs a GPU."""
    kinds = ["normal", "all equal", "half -inf", "nearly all NaN", "all NaN", "ten low bits", "relu", "normal"]
    x = jnp.asarray(np.stack([ROWS[kind](rng, 300) for kind in kinds]), jnp.float32)
    starts = jnp.array([0, -5, 40, 0, 3, 299, 7, 200], jnp.int32)
    ends = jnp.array([300, 999, 290, 300, 280, 300, 260, 100], jnp.int32)
    p, args = topk_problem.prepare(x, 64, starts=starts, ends=ends)
    form = mosaic_topk.form_of(p)._replace(clusters=3)

    def select(x, starts, ends, out):
        mosaic_topk.select(form, {"starts": starts, "ends": ends}, Plain(form, x, out))

    kernel = plgpu.kernel(
        select, out_type=S((len(kinds), 64), jnp.int32), grid=(3,), grid_names=("cluster",),
        interpret=plgpu.InterpretGPUParams(),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(kernel(x, starts, ends)), sorted_rows(p, args))


TOPK = (
    (1, 5, 300),  # rows
    (512, 1000, 2048, 4096),  # k
    (100, 1000, 4096, 32768, 40960, 131072, 300001, 1 << 20),  # columns
    ("whole", "ends", "starts and ends"),
)


def sorted_rows(p, args):
    """The definition in numpy, which knows the tiniest floats: a stable sort of each row."""
    x, k = np.asarray(args.logits), p.k
    starts, ends = (x if x is None else np.asarray(x) for x in (args.starts, args.ends))
    out = np.full((len(x), k), -1, np.int32)
    starts = np.zeros(len(x), int) if starts is None else np.clip(starts, 0, x.shape[1])
    ends = np.full(len(x), x.shape[1]) if ends is None else np.clip(ends, 0, x.shape[1])
    for row, first, end, to in zip(x, starts, ends, out, strict=True):
        numbers = row[first:end]
        best = np.argsort(-np.where(np.isnan(numbers), -np.inf, numbers), kind="stable")[:k]
        to[: best.size] = np.sort(best)
    return out


def abstract_topk(rows, k, columns, kind):
    bound = S((rows,), jnp.int32)
    given = {"whole": {}, "ends": {"ends": bound}, "starts and ends": {"starts": bound, "ends": bound}}[kind]
    return topk_problem.prepare(S((rows, columns), jnp.float32), k, **given)


def concrete_topk(rng, rows, k, columns, kind, rows_of=normal):
    x = jnp.asarray(np.stack([rows_of(rng, columns) for _ in range(rows)]), jnp.float32)
    bounds = {"starts": rng.integers(-5, columns, rows), "ends": rng.integers(0, columns + 9, rows)}
    bounds = {n: jnp.asarray(b, jnp.int32) for n, b in bounds.items() if n in kind}
    return topk_problem.prepare(x, k, **bounds)


CELLS_TOPK = pairwise(TOPK, lambda cell: cell[0] * cell[2] <= 1 << 24)


@pytest.mark.parametrize("cell", CELLS_TOPK[::6], ids=name)
def test_topk_lowers_to_one_launch(cell):
    is_one_launch(lower(mosaic_topk, *abstract_topk(*cell)))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS_TOPK, ids=name)
def test_every_topk_cell_lowers(cell):
    lower(mosaic_topk, *abstract_topk(*cell))


def test_topk_refuses():
    refuses = lambda *a, **k: mosaic_topk.supports(topk_problem.prepare(*a, **k)[0])  # noqa: E731
    assert refuses(S((2, 9000), jnp.float32), 2048, sorted=True) == "no order by value: sorted=False"
    assert refuses(S((2, 9000), jnp.float32), 4097) == "no k of 4097"
    assert refuses(S((2, 2**20 + 1), jnp.float32), 2048) == "no rows of 1048577 columns"


def test_rows_are_shared_as_they_fit():
    problem = lambda columns: topk_problem.prepare(S((9, columns), jnp.float32), 2048)[0]  # noqa: E731
    form = lambda columns: mosaic_topk.form_of(problem(columns), stream=False)  # noqa: E731
    for columns in (1, 4096, 4097, 32768, 32769, 131072, 131073, 262144, 262145, 1 << 20):
        f = form(columns)
        assert f.ctas * f.part >= columns > f.ctas * f.part - f.ctas * f.segments * mosaic_topk.UNIT
        assert f.clusters * f.ctas <= mosaic_topk.SMS
    assert (form(32768).ctas, form(131072).ctas, form(1 << 20).segments) == (1, 4, 4)


def test_the_definition_by_sorting_is_the_reference(rng):
    p, args = concrete_topk(rng, 5, 64, 300, "starts and ends", ROWS["half NaN"])
    np.testing.assert_array_equal(sorted_rows(p, args), np.asarray(topk_reference.run(p, *args)[0]))


# The bench

TABLE = [r for r in json.loads(cases.PEERS.read_text())["cases"] if r["op"] in indexing.KINDS]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: r["name"])
def test_cases_have_the_floors_of_the_table(row):
    case = indexing.all_cases()[row["name"]]
    assert case.floor_us == pytest.approx(row["floor_us"], abs=0.011, rel=0.001)
    assert case.flops == row["flops"]
    assert case.best_peer[0] == row["best_peer"]


@pytest.mark.parametrize(
    "case", ["pmqa_b32_c32768_n2", "mqa_m4096_n32768", "topk_b64_c32768_lowbits", "rope_b64", "indexer_b64_c131072"]
)
def test_small_cases_are_right(case):
    small = indexing.all_cases()[case].small()
    args = indexing.arguments(small)
    assert len(indexing.calls(small, args)) == (3 if small.kind == "indexer" else 1)
    assert indexing.check(small, args, None, most=2)[0] < 1e-5


@pytest.mark.parametrize("case", ["pmqa_b1_c32768", "mqa_m4096_n32768", "topk_b1_c131072"])
def test_variants_lower(case):
    """Every variant that the bench times is one that the kernels can be built for."""
    case = indexing.all_cases()[case]
    args = jax.eval_shape(functools.partial(indexing.arguments, case))
    for choice in list(indexing.variants(case).values())[::9]:
        traced = jax.jit(indexing.operation(case, "mosaic", **choice)).trace(*args)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


# On a GPU


def twice(kernel, p, args):
    """The kernel's result, the same bits in two runs."""
    leaves, tree = jax.tree.flatten(args)
    step = jax.jit(lambda *xs: kernel.run(p, *jax.tree.unflatten(tree, xs))[0])
    first, second = (np.asarray(step(*leaves)) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.int32), second.view(np.int32))
    return first


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_PAGED, ids=name)
def test_paged_on_gpu(cell, rng):
    p, args = concrete_paged(rng, *cell, most=1500 if cell[6] < 9 else 300)
    agrees(twice(mosaic_paged_logits, p, args), paged_reference.run(p, *on_cpu(args))[0], most=1e-3)


def wild(heads):
    """A call whose pages, lengths and rows come from anywhere, as only the device sees them."""
    cache = pa.IndexCache.allocate(4, 64, layout=pa.INDEX_NORMAL)
    table = jnp.array([[2**31 - 1, -1, 3], [0, -(2**31), 99], [4, 1, 2]], jnp.int32)
    batch = pa.RaggedBatch(table, jnp.zeros(3, jnp.int32), jnp.arange(4, dtype=jnp.int32), jnp.int32(99), max_q_len=2)
    q = pa.quantize(jnp.ones((3, heads, 128)), pa.INDEX_Q)
    p, args = paged_problem.prepare(q, jnp.ones((3, heads)), cache, batch)
    starts, lens = (jnp.array(x, jnp.int32) for x in ([-9, 1, 99, 2**31 - 1], [2**31 - 1, -5, 48]))
    return p, args._replace(batch=dataclasses.replace(batch, kv_lens=lens, cu_q_lens=starts))


@pytest.mark.gpu
def test_paged_takes_wild_numbers_on_gpu():
    """Nothing outside the cache is read, nor outside the result written."""
    got = twice(mosaic_paged_logits, *wild(64))
    np.testing.assert_array_equal(got == 0, np.arange(192) < np.array([[192], [0], [0]]))
    np.testing.assert_array_equal(np.isneginf(got), got != 0)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_PREFILL, ids=name)
def test_prefill_on_gpu(cell, rng):
    if cell[0] * cell[1] * cell[2] > 1 << 26:
        cell = (16, *cell[1:])  # the definition takes all products at once
    p, args = concrete_prefill(rng, *cell)
    agrees(twice(mosaic_logits, p, args), logits_reference.run(p, *on_cpu(args))[0], most=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_TOPK, ids=name)
def test_topk_on_gpu(cell, rng):
    p, args = concrete_topk(rng, *cell)
    np.testing.assert_array_equal(twice(mosaic_topk, p, args), sorted_rows(p, args))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [512, 2048])
@pytest.mark.parametrize("columns", [4096, 32768, 40000, 131072, 400000])
def test_adversarial_rows_on_gpu(columns, k, rng):
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.stack([kind(rng, columns) for kind in ROWS.values()]).astype(np.float32)
    p, args = topk_problem.prepare(jnp.asarray(x), k)
    np.testing.assert_array_equal(twice(mosaic_topk, p, args), sorted_rows(p, args))


@pytest.mark.gpu
@pytest.mark.parametrize("ctas", [2, 4, 8])
def test_clusters_choose_alike_on_gpu(ctas, rng):
    """How many CTAs share a row is no part of the answer."""
    p, args = concrete_topk(rng, 70, 1000, 32768, "starts and ends", ROWS["relu"])
    got = jax.jit(lambda *xs: mosaic_topk.run(p, *xs, ctas=ctas)[0])(*args)
    np.testing.assert_array_equal(np.asarray(got), sorted_rows(p, args))
