"""gather_kv: one rounding, every format and layout, chunks of a context, and what only the device knows."""

import dataclasses
import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import BF16, F16, F32
from problems import FORMATS, LAYOUTS, library_cache, make

import pallas_attn as pa

LENS = {"q_lens": (0,) * 5, "kv_lens": (9, 40, 0, 33, 16), "dim": 32, "spare_seqs": 2, "spare_tokens": 1}
STARTS = np.array([0, 17, 0, 40, 3, 5, 5], np.int32)  # in a page, past the end, of padding

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time


def expected(problem, max_tokens, dtype, starts=None):
    """(k, v, cu_lens) in numpy: float32 times scale, rounded once; for float formats the stored numbers."""
    count = problem.num_seqs
    first = np.zeros(count, int) if starts is None else np.minimum(starts[:count], problem.kv_lens[:count])
    lens = np.concatenate([problem.kv_lens[:count] - first, np.zeros(len(problem.kv_lens) - count, int)])
    rows = []
    for x, scale in ((problem.k, problem.k_scale), (problem.v, problem.v_scale)):
        out = np.zeros((max_tokens + int(lens.sum()), *x.shape[2:]), dtype)
        for b in range(count):
            position = np.arange(first[b], problem.kv_lens[b])
            where = problem.page_table[b, position // x.shape[1]], position % x.shape[1]
            number = oracle.gather(x, scale, *where, b).astype(F32)
            at = int(lens[:b].sum())
            out[at : at + len(position)] = number.astype(dtype)
        rows.append(out[:max_tokens])
    return *rows, np.concatenate([[0], np.cumsum(lens)])


def check(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        np.testing.assert_array_equal(np.asarray(g), w)


def gather(cache, batch, starts=None, **keywords):
    return pa.gather_kv(cache, batch, starts=starts, **keywords)


FULL = ("BF16", "E4M3_TENSOR", "INT8_TOKEN_HEAD")  # in every layout; the others in one each, the rest on demand
CELLS = [
    pytest.param(format, layout, marks=() if format in FULL or i % 5 == j else pytest.mark.slow)
    for i, format in enumerate(FORMATS)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("format", "layout"), CELLS)
def test_gather(format, layout, backend, rng):
    """Bit for bit, zeros behind the last token; a start for half of the cells, a result that is too short for some."""
    problem = make(rng, format, **LENS)
    i = list(FORMATS).index(format) + LAYOUTS.index(layout)
    starts, dtype, most = (STARTS, None)[i % 2], (BF16, F16, F32)[i % 3], (120, 50)[i % 5 == 0]
    _, cache, batch = problem.arguments(layout)
    given = None if starts is None else jnp.asarray(starts)
    run = jit(functools.partial(gather, max_tokens=most, dtype=dtype, backend=backend))
    check(run(cache, batch, given), expected(problem, most, dtype, starts))


@pytest.mark.parametrize("format", ["BF16", "F16", "F32", "E4M3_TENSOR"])
def test_default_type(format, backend, rng):
    """A float cache comes out as it is, NaN payloads included; a quantised one as bf16."""
    problem = make(rng, format, **LENS)
    _, cache, batch = problem.arguments("HND")
    got = gather(cache, batch, max_tokens=98, backend=backend)
    assert got.k.dtype == (BF16 if format == "E4M3_TENSOR" else FORMATS[format][0])
    check(got, expected(problem, 98, got.k.dtype.type))


def test_value_head_dim_of_its_own(backend, rng):
    problem = make(rng, "E4M3_HEAD", **LENS | {"dim": 48}, v_dim=32)
    _, cache, batch = problem.arguments("SHUFFLE")
    check(gather(cache, batch, max_tokens=99, backend=backend), expected(problem, 99, BF16))


# ---------------------------------------------------------------- one rounding


def one_token(codes, scale, format="E4M3_TENSOR"):
    """A cache whose first token holds these codes, as keys and values, and its batch."""
    x = np.zeros((1, 16, 1, 16 * -(-codes.size // 16)), codes.dtype)
    x[0, 0, 0, : codes.size] = codes
    cache = library_cache(x, x, F32(scale), F32(scale), format, "NHD")
    return cache, pa.RaggedBatch(jnp.zeros((1, 1), jnp.int32), jnp.array([1]), jnp.array([0, 0]))


SCALES = (0.3, 1.7, 1.0009765625, 2.0**-14 / 3, 113.0)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E5M2_TENSOR"])
def test_rounded_once(format, dtype, backend):
    """Every code times a scale is the exact product, rounded to float32 and to the result."""
    assert_rounded_once(format, dtype, backend, SCALES)


def assert_rounded_once(format, dtype, backend, scales):
    stored = FORMATS[format][0]
    codes = np.arange(256, dtype=np.uint8).view(stored)
    codes = np.where(np.isfinite(codes.astype(F32)), codes, stored(0))
    run = jax.jit(functools.partial(gather, max_tokens=1, dtype=dtype, backend=backend))
    for scale in scales:
        got = np.asarray(run(*one_token(codes, scale, format)).k)[0, 0]
        product = codes.astype(np.float64) * np.float64(F32(scale))  # exact: 4 bits of mantissa times 24
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(got, product.astype(F32).astype(dtype))


def test_not_rounded_to_fp8_again(backend):
    """The bug this op must not have: the dequantised value cast to FP8 on its way. With scale 0.3 the code 1.125 stands
    for 0.3375, which bf16 keeps to within 2**-10; the nearest FP8 numbers are 0.34375 and 0.3125."""
    codes = np.array([1.125, 448.0, 0.001953125, -13.0], oracle.E4M3)
    cache, batch = one_token(codes, 0.3)
    got = np.asarray(gather(cache, batch, max_tokens=1, backend=backend).v)[0, 0, :4].astype(F32)
    exact = codes.astype(F32) * F32(0.3)
    np.testing.assert_array_equal(got, exact.astype(BF16).astype(F32))
    twice = exact.astype(oracle.E4M3).astype(BF16).astype(F32)
    assert (got != twice).all()
    assert (np.abs(got - exact) < 0.2 * np.abs(twice - exact)).all()


# ---------------------------------------------------------------- upstream


@pytest.mark.parametrize("name", goldens.names("gather"))
def test_golden(name, backend):
    """vLLM's kernel on an H100, bit for bit."""
    options, x, want = goldens.load(name)
    scales = [jnp.float32(options[n]) for n in ("k_scale", "v_scale")]
    k, v = x["k_cache"], x["v_cache"]
    n, page, heads, dim = k.shape
    if options["layout"] == "SHUFFLE":  # the golden's bytes, in their own shape
        k, v = k.reshape(n, heads, dim // 16, page, 16), v.reshape(n, heads, page // 16, dim, 16)
    k, v = (pa.Quantized(jnp.asarray(a), s, pa.E4M3_TENSOR) for a, s in zip((k, v), scales, strict=True))
    cache = pa.PagedKVCache(k, v, getattr(pa, options["layout"]))
    lens, starts = (np.array(options[n], np.int32) for n in ("lens", "seq_starts"))
    batch = pa.RaggedBatch(jnp.asarray(x["block_table"]), jnp.asarray(starts + lens), jnp.zeros(len(lens) + 1, int))
    got = gather(cache, batch, jnp.asarray(starts), max_tokens=int(sum(lens)), dtype=want["key"].dtype, backend=backend)
    np.testing.assert_array_equal(np.asarray(got.k), want["key"])
    np.testing.assert_array_equal(np.asarray(got.v), want["value"])
    np.testing.assert_array_equal(np.asarray(got.cu_lens), x["cu_seqlens"])


# ---------------------------------------------------------------- what only the device knows


def test_surplus_is_dropped_and_told(backend, rng):
    problem = make(rng, "E4M3_HEAD", **LENS)
    _, cache, batch = problem.arguments("NHD")
    got = jit(functools.partial(gather, max_tokens=30, backend=backend))(cache, batch)
    check(got, expected(problem, 30, BF16))
    assert int(got.cu_lens[-1]) == 98


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wild_numbers(layout, backend):
    """Pages, lengths and starts from anywhere: clamped, and nothing outside the cache is read."""
    cache = pa.PagedKVCache.allocate(4, 16, 2, 64, format=pa.BF16, layout=getattr(pa, layout))
    cache = cache.replace(tuple(jnp.full_like(x, 7) for x in cache.buffers))
    table = jnp.array([[2**31 - 1, -1, 3], [0, -(2**31), 99], [4, 1, 2]], jnp.int32)
    batch = pa.RaggedBatch(table, jnp.array([2**31 - 1, -5, 48], jnp.int32), jnp.zeros(4, jnp.int32), jnp.int32(99))
    starts = jnp.array([-7, 3, 2**31 - 1], jnp.int32)
    got = jit(functools.partial(gather, max_tokens=64, backend=backend))(cache, batch, starts)
    np.testing.assert_array_equal(np.asarray(got.cu_lens), [0, 48, 48, 48])
    assert (np.asarray(got.k[:48]) == 7).all()
    assert not np.asarray(got.k[48:]).any()


def test_csr_with_wild_pages(backend, rng):
    """Page size 1, ids out of range: their own rows only."""
    x = rng.standard_normal((8, 1, 1, 16)).astype(F32)
    cache = pa.PagedKVCache(jnp.asarray(x), jnp.asarray(x))
    batch = pa.RaggedBatch.from_csr(jnp.array([0, 2, 5]), jnp.array([3, 2**30, 6, -9, 1]), max_pages=4)
    got = np.asarray(jit(functools.partial(gather, max_tokens=6, backend=backend))(cache, batch).k)
    np.testing.assert_array_equal(got[[0, 2, 4]], x[[3, 6, 1], 0])
    np.testing.assert_array_equal(got[5], 0)


# ---------------------------------------------------------------- transforms


def test_new_lengths_do_not_retrace(backend, rng):
    run = jit(functools.partial(gather, max_tokens=120, dtype=F32, backend=backend))
    problem = make(rng, "E4M3_TENSOR", **LENS)
    for lens in ((9, 40, 0, 33, 16), (3, 4, 0, 6, 7)):
        problem.kv_lens[:5] = lens
        _, cache, batch = problem.arguments("NHD")
        check(run(cache, batch, jnp.asarray(STARTS)), expected(problem, 120, F32, STARTS))
    assert run._cache_size() == 1


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, None), (0, None, None)], ids=str)
def test_vmap_equals_a_loop(axes, backend, rng):
    problems = [make(rng, "E4M3_TOKEN_HEAD", **LENS).clean().arguments("HND")[1:] for _ in range(2)]
    starts = [jnp.asarray(STARTS), jnp.asarray(STARTS[::-1].copy())]
    each = [(*problem, s) for problem, s in zip(problems, starts, strict=True)]
    run = functools.partial(gather, max_tokens=90, backend=backend)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    mapped = [s if a == 0 else one for s, one, a in zip(stacked, each[0], axes, strict=True)]
    got = jit(jax.vmap(run, in_axes=axes))(*mapped)
    for i in range(2):
        want = jit(run)(*(each[i][j] if a == 0 else each[0][j] for j, a in enumerate(axes)))
        check([x[i] for x in got], [np.asarray(x) for x in want])


@pytest.mark.parametrize("layout", ["NHD", "PACKED", "SHUFFLE"])
def test_gradient_of_a_float_cache(layout, backend, rng):
    """The transpose: every gathered number's weight lands where it was stored, dropped and padding ones nowhere."""
    problem = make(rng, "F32", **LENS)
    _, cache, batch = problem.arguments(layout)
    weights = [rng.standard_normal((60, 2, 32)).astype(F32) for _ in range(2)]

    def loss(cache):
        got = gather(cache, batch, jnp.asarray(STARTS), max_tokens=60, backend=backend)
        return jnp.vdot(got.k, weights[0]) + jnp.vdot(got.v, weights[1])

    grad = jit(jax.grad(loss))(cache)
    where = np.arange(problem.k.size, dtype=F32).reshape(problem.k.shape)  # each number names its own place
    names = dataclasses.replace(problem, k=where, v=where)
    rows, _, _ = expected(names, 60, F32, STARTS)
    real = int(expected(names, 60, F32, STARTS)[2][-1])
    for got, weight in zip(grad.read(jnp.arange(grad.num_pages)), weights, strict=True):
        want = np.zeros(problem.k.size, F32)
        want[rows[:real].astype(int).ravel()] = weight[:real].ravel()
        np.testing.assert_array_equal(np.asarray(got).ravel(), want)


@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E4M3_HEAD", "E4M3_SEQ_HEAD", "E4M3_TOKEN_HEAD"])
def test_gradient_of_scales(format, rng):
    """With NaN in every code and scale that is not read; the codes themselves get none."""
    problem = make(rng, format, **LENS)
    _, cache, batch = problem.arguments("NHD")
    grad = jit(jax.grad(lambda c: jnp.sum(gather(c, batch, max_tokens=120, dtype=F32).k), allow_int=True))(cache)
    assert np.isfinite(np.asarray(grad.k.scale)).all()
    assert not np.asarray(grad.v.scale).any()
    assert not np.asarray(grad.k.values, F32).any()
    read = expected(dataclasses.replace(problem, k_scale=None, v_scale=None), 120, F32)[0]
    np.testing.assert_allclose(np.asarray(grad.k.scale).sum(), read.sum(), rtol=1e-4)


# ---------------------------------------------------------------- bad input


CACHE = pa.PagedKVCache.allocate(4, 16, 2, 32, format=pa.F32)
BATCH = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3], jnp.int32), jnp.array([0, 1, 4], jnp.int32))
# name: (changed arguments, the argument that the message names, a piece of the value that it shows)
BAD = {
    "no row": ({"max_tokens": 0}, "max_tokens", "0"),
    "rows of a float": ({"max_tokens": 2.0}, "max_tokens", "2.0"),
    "rows of an array": ({"max_tokens": jnp.arange(2)}, "max_tokens", "0 1"),
    "starts shape": ({"starts": jnp.zeros(3, jnp.int32)}, "starts", r"\(3,\)"),
    "starts type": ({"starts": jnp.zeros(2)}, "starts", "float32"),
    "starts negative": ({"starts": jnp.array([0, -4])}, "starts", "-4"),
    "result type": ({"dtype": jnp.float8_e4m3fn}, "dtype", "float8_e4m3fn"),
    "integer result": ({"dtype": jnp.int32}, "dtype", "int32"),
    "not a batch": ({"batch": BATCH.page_table}, "batch", "Array"),
    "not a cache": ({"cache": CACHE.k}, "cache", "Array"),
    "page table too narrow": ({"batch": dataclasses.replace(BATCH, kv_lens=jnp.array([20, 49]))}, "kv_lens", "49"),
    "page table without pages": (
        {"batch": dataclasses.replace(BATCH, page_table=jnp.zeros((2, 0), jnp.int32), kv_lens=jnp.zeros(2, jnp.int32))},
        "page_table", r"\(2, 0\)",
    ),
    "page table too wide": (
        {"batch": dataclasses.replace(BATCH, page_table=jax.ShapeDtypeStruct((2, 2**26), jnp.int32))},
        "page_table", "2147483648",
    ),
    "cache without pages": ({"cache": pa.PagedKVCache.allocate(0, 16, 2, 32)}, r"cache\.k", "no page"),
    "scales of other sequences": (
        {"cache": make(np.random.default_rng(0), "E4M3_SEQ_HEAD", **LENS).arguments()[1]}, r"k.*scale", r"\(7, 2\)",
    ),
    "backend": ({"backend": "nonsense"}, "backend", "nonsense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("without_type_checks")
def test_invalid_input(name):
    changes, argument, value = BAD[name]
    arguments = {"cache": CACHE, "batch": BATCH, "max_tokens": 23} | changes
    with pytest.raises(pa.InvalidInput, match=argument) as error:
        pa.gather_kv(**arguments)
    assert error.match(value)
    assert len(str(error.value)) < 300


@pytest.mark.usefixtures("without_type_checks")
def test_rows_must_be_static():
    with pytest.raises(pa.InvalidInput, match="max_tokens: got a traced value"):
        jax.eval_shape(lambda n: pa.gather_kv(CACHE, BATCH, max_tokens=n), 3)


# ---------------------------------------------------------------- hypothesis

WIDTH, PAGE, PAGES = 4, 16, 20


@functools.cache
def compiled(backend, most):
    return jit(functools.partial(gather, max_tokens=most, dtype=F32, backend=backend))


@pytest.mark.parametrize("name", ["reference", "xla"])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 2**32), st.lists(st.integers(0, WIDTH * PAGE), min_size=1, max_size=4),
    st.lists(st.integers(0, 80), min_size=4, max_size=4), st.sampled_from([7, 150]), st.integers(0, 4),
)  # fmt: skip
def test_ragged(name, seed, lens, starts, most, kind):
    format, layout = ("E4M3_HEAD", "INT8_TOKEN_HEAD", "F32", "E5M2_SEQ_HEAD", "E4M3_TENSOR")[kind], LAYOUTS[kind]
    problem = make(
        np.random.default_rng(seed), format, (0,) * len(lens), lens, dim=16, page_size=PAGE, table_width=WIDTH,
        num_pages=PAGES, spare_seqs=4 - len(lens), spare_tokens=1,
    )  # fmt: skip
    _, cache, batch = problem.arguments(layout)
    starts = np.array(starts, np.int32)
    got = compiled(name, most)(cache, batch, jnp.asarray(starts))
    check(got, expected(problem, most, F32, starts))


# ---------------------------------------------------------------- its use: a context in chunks


def chunked(q, cache, batch, sinks, chunk, dtype, backend, longest=48):
    """Prefill by chunks of at most `longest` tokens of context: gather one, attend to it as to a cache, merge."""
    context, seqs = batch.kv_lens - (batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]), batch.kv_lens.shape[0]
    parts = []
    for first in range(0, longest, chunk):
        ends = jnp.minimum(context, first + chunk)
        begins = jnp.full_like(ends, first)
        now = dataclasses.replace(batch, kv_lens=ends)
        got = pa.gather_kv(cache, now, max_tokens=seqs * chunk, starts=begins, dtype=dtype, backend=backend)
        parts.append(attend_contiguous(q, got, batch, sinks=None, mask=pa.Mask(causal=False), backend=backend))
    own = pa.gather_kv(cache, batch, max_tokens=q.shape[0], starts=context, dtype=dtype, backend=backend)
    parts.append(attend_contiguous(q, own, batch, sinks=sinks, mask=pa.Mask(), backend=backend))
    return pa.merge_attention(*zip(*parts, strict=True))


def attend_contiguous(q, got, batch, **options):
    """Attention to gathered tokens: pages of one token, which every sequence has in a row."""
    rows = got.k.shape[0]
    lens = got.cu_lens[1:] - got.cu_lens[:-1]
    table = jnp.minimum(got.cu_lens[:-1, None] + jnp.arange(rows), rows - 1)
    pages = pa.PagedKVCache(got.k[:, None], got.v[:, None])
    view = pa.RaggedBatch(table, lens, batch.cu_q_lens, batch.num_seqs)
    return pa.paged_attention(q, pages, view, out=jnp.float32, return_lse=True, **options)


CHUNKED = [
    # (format, layout, tokens of a chunk, type of what is gathered, relative error)
    ("E4M3_HEAD", "SHUFFLE", 16, BF16, 4e-3),
    ("E5M2_TENSOR", "PACKED", 30, F16, 6e-4),
    ("E4M3_TOKEN_HEAD", "HND", 20, F32, 1e-5),
]


@pytest.mark.parametrize(("format", "layout", "chunk", "dtype", "tolerance"), CHUNKED)
def test_a_context_in_chunks(format, layout, chunk, dtype, tolerance, rng):
    """Equals one call but for the rounding of what is gathered; sinks count once, and chunks for which some sequences
    have no more tokens are harmless, a padding sequence among them."""
    problem = make(rng, format, q_lens=(5, 3, 1, 4), kv_lens=(50, 20, 1, 9), dim=32, spare_seqs=1, spare_tokens=2)
    q, cache, batch = problem.arguments(layout)
    sinks = rng.standard_normal(4).astype(F32) + 2
    run = jit(functools.partial(chunked, chunk=chunk, dtype=dtype, backend="xla"))
    out, lse = run(q, cache, batch, jnp.asarray(sinks))
    want, want_lse = pa.paged_attention(q, cache, batch, sinks=jnp.asarray(sinks), out=jnp.float32, return_lse=True)
    distance = lambda x, y: np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y)  # noqa: E731
    assert distance(out, np.asarray(want)) < tolerance
    np.testing.assert_allclose(np.asarray(lse), np.asarray(want_lse), atol=5 * tolerance)
    assert distance(out, problem.expected(sinks=sinks)[0]) < tolerance
    without, _ = run(q, cache, batch, jnp.full(4, -jnp.inf))
    assert distance(without, np.asarray(want)) > 0.05


def test_chunks_past_every_context_change_nothing(rng):
    """Nor does a step without any context."""
    problem = make(rng, "E4M3_TENSOR", q_lens=(5, 3), kv_lens=(21, 3), dim=32, spare_seqs=0, spare_tokens=0)
    q, cache, batch = problem.arguments("NHD")
    sinks = jnp.zeros(4)
    few, many = (functools.partial(chunked, chunk=16, dtype=BF16, backend="xla", longest=n) for n in (16, 48))
    for lens in (batch.kv_lens, jnp.array([5, 3])):
        own = dataclasses.replace(batch, kv_lens=lens)
        for x, y in zip(jit(few)(q, cache, own, sinks), jit(many)(q, cache, own, sinks), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-6)
