"""Every option, format, layout, page size and head shape of paged attention, against the float64 oracle.

Nearly all the time goes into compiling, a program a cell. So the tests of every day take a part of the pairs in which
each value of both sides occurs (every granularity in every layout; every option; every format of a query) and leave
the other pairs to `make test-slow`; hypothesis (test_properties.py) mixes the rest. Unread slots, pages, scales, table
entries and padding are poison in all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import FORMATS, LAYOUTS, assert_close, library_options, make, relative_error

import pallas_attn as pa

# For the batch of problems.make: seven sequences and two of padding, four heads.
CAUSAL = np.array([True, False, True, False, True, True, False, True, False])
RANGES = np.array([[0, 4, 6, 8], [1, 3, 0, 0], [0, 9, 0, 0], [20, 33, 30, 39], *[[3, 1, 0, 40]] * 5], np.int32)
RANGES = RANGES.reshape(9, 2, 2)
PREFIX_LENS = np.array([2, 0, 0, 11, 5, 1, 0, 7, 7], np.int32)
SLOPES = np.array([0.5, 0.25, 0.0625, 0.03], np.float32)
SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
QUERY_QUERY = np.random.default_rng(7).standard_normal((17, 13)).astype(np.float32)

OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "causal per sequence": {"causal": CAUSAL},
    "scale": {"scale": 0.3},
    "scale array": {"scale": np.float32(0.3)},
    "window": {"window": 6},
    "window array": {"window": np.int32(6)},
    "window 1": {"window": 1},
    "window not causal": {"causal": False, "window": 6},
    "window one-sided": {"causal": False, "window": 6, "symmetric": False},
    "window causal per sequence": {"causal": CAUSAL, "window": 9},
    "chunked": {"window": 8, "chunk_lookback": 0},
    "chunked lookback": {"window": 13, "chunk_lookback": 1},
    "chunked not causal": {"window": 9, "chunk_lookback": 2, "causal": False},
    "prefix ranges": {"prefix_ranges": RANGES},
    "prefix ranges window": {"prefix_ranges": RANGES, "window": 5},
    "prefix ranges clamped": {"prefix_ranges": RANGES, "window": 5, "clamp_prefix": True},
    "rswa": {"rswa": (PREFIX_LENS, 4)},
    "rswa over window": {"rswa": (PREFIX_LENS, 4), "window": 2},
    "rswa not causal": {"rswa": (PREFIX_LENS, 4), "causal": False},
    "soft cap": {"soft_cap": 2.0},
    "soft cap array": {"soft_cap": np.float32(0.7)},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi sqrt": {"alibi_slopes": SLOPES, "alibi_sqrt": True},
    "alibi sqrt not causal": {"alibi_slopes": SLOPES, "alibi_sqrt": True, "causal": False},
    "alibi before cap": {"alibi_slopes": SLOPES, "soft_cap": 2.0, "before_soft_cap": True},
    "alibi after cap": {"alibi_slopes": SLOPES, "soft_cap": 2.0},
    "query-query": {"query_query": QUERY_QUERY},
    "query-query before cap": {"query_query": QUERY_QUERY, "soft_cap": 2.0, "before_soft_cap": True},
    "sinks": {"sinks": SINKS},
    "sinks window": {"sinks": SINKS, "window": 3},
    "everything": {
        "causal": CAUSAL, "window": np.int32(11), "prefix_ranges": RANGES, "soft_cap": 3.0, "alibi_slopes": SLOPES,
        "query_query": QUERY_QUERY, "sinks": SINKS, "scale": 0.2,
    },
}  # fmt: skip


def cell(kept, backend, *values):
    """The parameters of a cell; one that is not kept for every day is slow."""
    id = "-".join(map(str, (backend, *values)))
    return pytest.param(*values, backend, id=id, marks=() if kept else pytest.mark.slow)


FAST = {"xla_backend_optimization_level": 0}  # halves the time of the suite; the other tests run what users run


def check(problem, layout, backend, tolerance=1e-5, out=jnp.float32, **options):
    q, cache, batch = problem.arguments(layout)
    keywords = library_options(**options)
    static = {n: keywords.pop(n) for n in list(keywords) if isinstance(keywords[n], float)}
    static |= {"out": out, "return_lse": True, "backend": backend}

    def run(q, cache, batch, traced):
        return pa.paged_attention(q, cache, batch, **traced, **static)

    try:
        got = jax.jit(run, compiler_options=FAST)(q, cache, batch, keywords)
    except pa.Unsupported as reason:
        pytest.skip(str(reason))
    assert_close(got, problem.expected(**options), tolerance)


def skip_unless_held(layout, dim, v_dim, page_size, format):
    itemsize = np.dtype(FORMATS[format][0]).itemsize
    if not oracle.can_hold(layout, page_size, dim, v_dim, itemsize):
        pytest.skip(f"{layout} cannot hold pages of {page_size} with dims {dim}/{v_dim} of {itemsize} bytes")


# Neighbours in FORMATS share a granularity (test_cells_of_every_day_cover says so); the reference reads all layouts by
# the same function as the other does.
FORMAT_CELLS = [
    cell((i + j) % 2 == 0 if backend == "xla" else i % 5 == j, backend, format, layout)
    for i, format in enumerate(FORMATS)
    for j, layout in enumerate(LAYOUTS)
    for backend in ("reference", "xla")
]


def test_cells_of_every_day_cover():
    kept = [p.values for p in FORMAT_CELLS if not p.marks and p.values[2] == "xla"]
    granularities = {granularity for _, granularity in FORMATS.values()}
    assert {format for format, _, _ in kept} == set(FORMATS)
    assert {(FORMATS[f][1], layout) for f, layout, _ in kept} == {(g, x) for g in granularities for x in LAYOUTS}
    assert {name for p in CELLS if not p.marks for name in p.values[:1]} == set(OPTIONS)


@pytest.mark.parametrize(("format", "layout", "backend"), FORMAT_CELLS, indirect=["backend"])
def test_format_in_layout(format, layout, backend, rng):
    check(make(rng, format), layout, backend)


GRANULARITIES = ("F32", "E4M3_TENSOR", "E5M2_HEAD", "E4M3_SEQ_HEAD", "INT8_TOKEN_HEAD")
CELLS = [
    cell(near == 0 or (near == 2 and backend == "reference"), backend, name, format, LAYOUTS[(i + j) % 5])
    for i, name in enumerate(OPTIONS)
    for j, format in enumerate(GRANULARITIES)
    for near in [(i - 2 * j) % 5]
    for backend in {0: ["xla"], 1: ["xla"], 2: ["reference", "xla"]}.get(near, [])
]


@pytest.mark.parametrize(("name", "format", "layout", "backend"), CELLS, indirect=["backend"])
def test_option(name, format, layout, backend, rng):
    check(make(rng, format), layout, backend, **OPTIONS[name])


QUERY_CELLS = [
    cell((i - j) % 5 in ((0, 2) if backend == "xla" else (0,)), backend, q_format, format)
    for i, q_format in enumerate(("E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD", "E5M2_TENSOR"))
    for j, format in enumerate(("BF16", "E4M3_TENSOR", "E5M2_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD"))
    for backend in ("reference", "xla")
]


@pytest.mark.parametrize(("q_format", "format", "backend"), QUERY_CELLS, indirect=["backend"])
def test_quantized_query(q_format, format, backend, rng):
    check(make(rng, format, q_format=q_format), "NHD", backend, soft_cap=5.0, sinks=SINKS)


HALF_CELLS = [
    cell((i + j) % 2 == 0 and (backend == "xla" or i < 2), backend, dtype, format)
    for i, format in enumerate(("BF16", "F16", "E4M3_TENSOR", "E4M3_TOKEN_HEAD", "INT8_TOKEN_HEAD"))
    for j, dtype in enumerate(("BF16", "F16"))
    for backend in ("reference", "xla")
]


@pytest.mark.parametrize(("dtype", "format", "backend"), HALF_CELLS, indirect=["backend"])
def test_half_query_and_output(dtype, format, backend, rng):
    problem = make(rng, format, q_dtype=getattr(oracle, dtype))
    check(problem, "NHD", backend, tolerance=5e-3, out=None, sinks=SINKS)


def test_default_output_of_a_quantized_query_is_bfloat16(backend, rng):
    problem = make(rng, "E4M3_TENSOR", q_format="E4M3_TENSOR")
    out = pa.paged_attention(*problem.arguments(), backend=backend)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, problem.expected()[0]) <= 5e-3


@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E4M3_STATIC", "E5M2_TENSOR"])
def test_fp8_output(format, backend, rng):
    problem, scale = make(rng, "E4M3_TENSOR", q_format="E4M3_TENSOR"), 0.3 / getattr(pa, format).qmax
    out = getattr(pa, format), jnp.float32(scale)
    run = jax.jit(lambda *args: pa.paged_attention(*args, out=out, backend=backend), compiler_options=FAST)
    got = run(*problem.arguments())
    want = problem.expected()[0]
    codes = oracle.to_fp8(np.float32(want / scale), got.values.dtype.type).astype(np.float64)
    assert np.abs(codes).max() == getattr(pa, format).qmax  # the small scale makes some saturate
    step = np.abs(codes) * (0.125 if format.startswith("E4") else 0.25) + 2.0**-9
    difference = np.abs(np.asarray(got.values, np.float64) - codes)
    assert np.mean(difference == 0) > 0.999  # the float32 sums cross a rounding boundary now and then
    assert np.all(difference <= step)


SHAPES = {  # heads (query, kv), head dim, value head dim, page size
    "page 1": ((4, 2), 64, 64, 1),
    "page 32": ((4, 2), 64, 64, 32),
    "page 64": ((4, 2), 64, 64, 64),
    "dim 80": ((4, 2), 80, 80, 16),
    "dim 128": ((4, 2), 128, 128, 16),
    "dim 192/128": ((4, 4), 192, 128, 16),
    "dim 256": ((2, 1), 256, 256, 16),
    "dim 576/512": ((2, 1), 576, 512, 16),
    "MHA": ((2, 2), 64, 64, 16),
    "GQA 3": ((6, 2), 64, 64, 16),
    "GQA 5": ((5, 1), 64, 64, 16),
    "GQA 8": ((16, 2), 64, 64, 16),
    "MQA 16": ((16, 1), 64, 64, 16),
}
SHAPE_CELLS = [
    cell(i % 2 == j, backend, name, format, LAYOUTS[(i + 2 * j) % 5])
    for i, name in enumerate(SHAPES)
    for j, format in enumerate(("E4M3_TENSOR", ("BF16", "E4M3_HEAD", "INT8_TOKEN_HEAD")[i % 3]))
    for backend in ("reference", "xla")
]


@pytest.mark.parametrize(("name", "format", "layout", "backend"), SHAPE_CELLS, indirect=["backend"])
def test_shape(name, format, layout, backend, rng):
    heads, dim, v_dim, page_size = SHAPES[name]
    skip_unless_held(layout, dim, v_dim, page_size, format)
    check(make(rng, format, heads=heads, dim=dim, v_dim=v_dim, page_size=page_size), layout, backend, window=14)


@pytest.mark.parametrize("format", ["E4M3_TENSOR", "INT8_TOKEN_HEAD"])
def test_decode(format, backend, rng):
    """One token per sequence, told by the static max_q_len."""
    problem = make(rng, format, q_lens=(1, 1, 1, 1), kv_lens=(1, 70, 0, 33))
    q, cache, batch = problem.arguments("PACKED", max_q_len=1)
    got = pa.paged_attention(q, cache, batch, sinks=jnp.asarray(SINKS), return_lse=True, backend=backend)
    assert_close(got, problem.expected(sinks=SINKS))


@pytest.mark.parametrize("page_size", [1, 16])
def test_ragged_form(page_size, backend, rng):
    """The aiter/SGLang call: CSR pages and one query each; the layer's own scale, cap and scales are honoured."""
    lens = {"q_lens": (1, 1, 1), "kv_lens": (20, 7, 33), "spare_seqs": 0, "spare_tokens": 0}
    problem = make(rng, "E4M3_TENSOR", **lens, page_size=page_size)
    q, cache, batch = problem.arguments()
    pages = -(-problem.kv_lens // page_size)
    indptr = jnp.asarray(np.concatenate([[0], np.cumsum(pages)]).astype(np.int32))
    indices = jnp.asarray(np.concatenate([row[:n] for row, n in zip(problem.page_table, pages, strict=True)]))
    last = jnp.asarray(problem.kv_lens - (pages - 1) * page_size, jnp.int32)
    batch = pa.RaggedBatch.from_csr(indptr, indices, None if page_size == 1 else last, page_size=page_size)
    got = pa.paged_attention(q, cache, batch, scale=0.2, soft_cap=1.5, return_lse=True, backend=backend)
    assert_close(got, problem.expected(scale=0.2, soft_cap=1.5))


def test_num_seqs_may_be_omitted(backend, rng):
    problem = make(rng, spare_seqs=0, spare_tokens=0)
    q, cache, batch = problem.arguments()
    batch = pa.RaggedBatch(batch.page_table, batch.kv_lens, batch.cu_q_lens)
    assert_close(pa.paged_attention(q, cache, batch, return_lse=True, backend=backend), problem.expected())


def test_nothing_but_padding(backend, rng):
    problem = make(rng)
    q, cache, batch = problem.arguments()
    batch = pa.RaggedBatch(batch.page_table, batch.kv_lens, batch.cu_q_lens, jnp.int32(0))
    out, lse = pa.paged_attention(q, cache, batch, sinks=jnp.asarray(SINKS), return_lse=True, backend=backend)
    assert not np.asarray(out).any()
    assert np.all(np.asarray(lse) == -np.inf)


def test_memory_does_not_grow_with_queries_times_context():
    """4096 query tokens over a context of 32768 at 8 heads, in under 3 GiB, arguments included."""
    shape = jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: pa.PagedKVCache.allocate(2048, 16, 8, 128))
    batch = pa.RaggedBatch(shape((1, 2048), jnp.int32), shape((1,), jnp.int32), shape((2,), jnp.int32))
    run = jax.jit(lambda q, cache, batch: pa.paged_attention(q, cache, batch, backend="xla"))
    used = run.lower(shape((4096, 8, 128), jnp.bfloat16), cache, batch).compile().memory_analysis()
    assert used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes < 3 * 2**30
