"""LatentCache, write_latent and gather_latent: byte for byte in every format, and what only the device knows."""

import dataclasses
import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from latents import FORMATS, dims_of, load, make, poison, store
from oracle import BF16, F16, F32

import pallas_attn as pa

N, S = 5, 16
# Two real slots at the very ends, three negative ones and two beyond the cache; -1 must not write the last row.
SLOTS = np.array([0, 17, -1, 33, N * S - 1, -N * S, 40, N * S, 2**31 - 1, -(2**31), 16], np.int32)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time


def bits(x):
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


def cache_of(pages, format, scale=None):
    scale = None if scale is None else jnp.float32(scale)
    return pa.LatentCache(jnp.asarray(pages), getattr(pa, format), scale, dims_of(format)[1])


def random_pages(rng, format):
    """Random bytes, none of them NaN, so that a changed neighbour is seen."""
    width = 656 if format == "FP8_DS_MLA" else 64 * np.dtype(FORMATS[format]).itemsize
    return rng.integers(0, 123, (N, S, width), np.uint8).view(FORMATS[format])


def rows_of(rng, format, dtype=BF16):
    """Latents and rotary parts [T', .], T' > T; some saturate FP8, and one row, a tile and a rotary part are zero."""
    latent, rope = (rng.standard_normal((len(SLOTS) + 2, d)).astype(F32) for d in dims_of(format))
    latent[0, 0], rope[1, 3], latent[3], latent[4, :128], rope[4] = 6e4, -6e4, 0, 0, 0
    return latent.astype(dtype), rope.astype(dtype)


# ---------------------------------------------------------------- the cache


def test_row_of_656_bytes():
    cache = pa.LatentCache.allocate(3, 64, format=pa.FP8_DS_MLA)
    assert (cache.pages.shape, cache.pages.dtype) == ((3, 64, 656), jnp.uint8)
    assert (cache.latent_dim, cache.rope_dim, cache.num_pages, cache.page_size) == (512, 64, 3, 64)
    assert cache.nbytes == 3 * 64 * 656
    assert len(jax.tree.leaves(cache)) == 1


def test_scale_of_its_own():
    cache = pa.LatentCache.allocate(3, 16, 32, 8, format=pa.E4M3_TENSOR, scale=0.5)
    assert (cache.latent_dim, cache.rope_dim, cache.nbytes) == (32, 8, 3 * 16 * 40 + 4)
    assert jax.tree.structure(cache) == jax.tree.structure(jax.tree.map(lambda x: x, cache))


@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR"])
def test_partition_spec_has_the_shape_of_the_cache(format):
    """All heads read one latent: nothing to shard over them."""
    cache = pa.LatentCache.allocate(2, 16, format=getattr(pa, format), scale=0.5 if "TENSOR" in format else None)
    spec = cache.partition_spec("tp")
    assert jax.tree.structure(spec) == jax.tree.structure(cache)
    assert set(jax.tree.leaves(spec)) == {PartitionSpec()}


# ---------------------------------------------------------------- writes


@pytest.mark.parametrize("name", ["concat_mla_fp8", "concat_ds_mla"])
def test_write_golden(name, backend):
    """vLLM's CUDA writers on an H100, every byte of the cache."""
    _, x, want = goldens.load(name)
    if name == "concat_ds_mla":
        cache = cache_like(x["cache"], "FP8_DS_MLA")
    else:
        cache = cache_like(x["cache"].view(FORMATS["E4M3_TENSOR"]), "E4M3_TENSOR", x["scale"][0])
    latent, rope, slots = (jnp.asarray(x[n]) for n in ("kv_c", "k_pe", "slot_mapping"))
    got = pa.write_latent(cache, latent, rope, slots, backend=backend)
    np.testing.assert_array_equal(bits(got.pages), want["cache"])


def cache_like(pages, format, scale=None):
    return pa.LatentCache(jnp.asarray(pages), getattr(pa, format), None if scale is None else jnp.float32(scale))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("format", FORMATS)
def test_bytes(format, dtype, backend, rng):
    """Byte for byte; NaN stays NaN wherever a format has one."""
    pages, scale = random_pages(rng, format), 0.37 if "TENSOR" in format else None
    latent, rope = rows_of(rng, format, dtype)
    write = jax.jit(functools.partial(pa.write_latent, backend=backend))
    got = write(cache_of(pages, format, scale), jnp.asarray(latent), jnp.asarray(rope), jnp.asarray(SLOTS))
    want = pages.reshape(N * S, -1).copy()
    for row, slot in zip(store(latent, rope, format, scale), SLOTS, strict=False):
        if 0 <= slot < N * S:
            want[slot] = row
    np.testing.assert_array_equal(bits(got.pages), bits(want.reshape(pages.shape)))


def test_nan_stays_nan(backend):
    """In FP8_DS_MLA a NaN spoils its tile and no other."""
    cache = pa.LatentCache.allocate(1, 16, format=pa.FP8_DS_MLA)
    latent = jnp.ones((1, 512)).at[0, 130].set(jnp.nan)
    got = pa.write_latent(cache, latent, jnp.ones((1, 64)), jnp.zeros(1, jnp.int32), backend=backend)
    found = load(np.asarray(got.pages[0, 0]), "FP8_DS_MLA")
    assert np.isnan(found[130])
    np.testing.assert_array_equal(found[np.r_[0:128, 256:576]], 1)


def test_no_tokens(backend, rng):
    cache = cache_of(random_pages(rng, "FP8_DS_MLA"), "FP8_DS_MLA")
    got = pa.write_latent(cache, jnp.zeros((0, 512)), jnp.zeros((0, 64)), jnp.zeros(0, jnp.int32), backend=backend)
    np.testing.assert_array_equal(bits(got.pages), bits(cache.pages))


@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR", "FP8_DS_MLA"])
def test_donated_pages_are_reused(format):
    """In place: the same address, and no temporary of cache size but for XLA's CPU backend, which has no FP8."""
    scale = 0.5 if "TENSOR" in format else None
    cache = pa.LatentCache.allocate(64, 16, format=getattr(pa, format), scale=scale)
    latent, rope, slots = jnp.ones((8, 512)), jnp.ones((8, 64)), jnp.arange(8, dtype=jnp.int32)
    write = jax.jit(functools.partial(pa.write_latent, backend="xla"), donate_argnums=0)
    program = write.lower(cache, latent, rope, slots).compile()
    if format != "E4M3_TENSOR":
        assert program.memory_analysis().temp_size_in_bytes < cache.pages.nbytes / 2
    before = cache.pages.unsafe_buffer_pointer()
    got = write(cache, latent, rope, slots)
    assert got.pages.unsafe_buffer_pointer() == before
    assert cache.pages.is_deleted()


def test_gradient_of_a_write(backend, rng):
    """What is overwritten loses its gradient to what is written; dropped tokens have none."""
    weights = rng.standard_normal((N, S, 64)).astype(F32)
    cache, (latent, rope) = cache_of(rng.standard_normal((N, S, 64)).astype(F32), "F32"), rows_of(rng, "F32", F32)

    def loss(cache, latent, rope):
        return jnp.vdot(pa.write_latent(cache, latent, rope, jnp.asarray(SLOTS), backend=backend).pages, weights)

    by_cache, by_latent, by_rope = jit(jax.grad(loss, (0, 1, 2)))(cache, jnp.asarray(latent), jnp.asarray(rope))
    inside = (SLOTS >= 0) & (SLOTS < N * S)
    flat = weights.reshape(N * S, -1)
    want = np.zeros((len(SLOTS) + 2, 64), F32)
    want[: len(SLOTS)][inside] = flat[SLOTS[inside]]
    np.testing.assert_array_equal(np.concatenate([by_latent, by_rope], -1), want)
    kept = flat.copy()
    kept[SLOTS[inside]] = 0
    np.testing.assert_array_equal(np.asarray(by_cache.pages).reshape(N * S, -1), kept)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0), (0, None, None)], ids=str)
@pytest.mark.parametrize("format", ["F32", "E4M3_TENSOR"])
def test_vmap_of_a_write(format, axes, backend, rng):
    """Also over scales that differ, which is a loop."""
    scales = (0.5, 0.3) if "TENSOR" in format else (None, None)
    caches = [cache_of(random_pages(rng, format), format, s) for s in scales]
    new = [[jnp.asarray(x[: len(SLOTS)]) for x in rows_of(rng, format)] for _ in range(2)]
    latent, rope = (jnp.stack(x) for x in zip(*new, strict=True))
    given = [jax.tree.map(lambda *x: jnp.stack(x), *caches), latent, rope]
    given = [x if a == 0 else jax.tree.map(lambda y: y[0], x) for x, a in zip(given, axes, strict=True)]
    run = functools.partial(pa.write_latent, slots=jnp.asarray(SLOTS), backend=backend)
    got = jit(jax.vmap(run, in_axes=axes))(*given)
    for i in range(2):
        each = [jax.tree.map(lambda y, i=i: y[i], x) if a == 0 else x for x, a in zip(given, axes, strict=True)]
        np.testing.assert_array_equal(bits(got.pages[i]), bits(run(*each).pages))


# ---------------------------------------------------------------- gathers

LENS = {"q_lens": (0,) * 5, "kv_lens": (9, 40, 0, 33, 16), "spare_seqs": 2, "spare_tokens": 1}
STARTS = np.array([0, 17, 0, 40, 3, 5, 5], np.int32)  # in a page, past the end, of padding


def expected(problem, max_tokens, dtype, starts=None):
    """(rows, cu_lens): float32 times scale, rounded once; dtype None: the stored rows."""
    count = problem.num_seqs
    first = np.zeros(count, int) if starts is None else np.minimum(starts[:count], problem.kv_lens[:count])
    lens = np.concatenate([problem.kv_lens[:count] - first, np.zeros(len(problem.kv_lens) - count, int)])
    flat = problem.pages.reshape(-1, problem.pages.shape[-1])
    found = [flat[problem.slots(b, np.arange(first[b], problem.kv_lens[b]))] for b in range(count)]
    found = np.concatenate(found)
    found = found if dtype is None else load(found, problem.format, problem.scale).astype(dtype)
    spare = np.zeros((max_tokens, found.shape[1]), found.dtype)
    return np.concatenate([found, spare])[:max_tokens], np.concatenate([[0], np.cumsum(lens)])


def gather(cache, batch, starts=None, **keywords):
    return pa.gather_latent(cache, batch, starts=starts, **keywords)


@pytest.mark.parametrize("format", FORMATS)
def test_gather(format, backend, rng):
    """Bit for bit, zeros behind the last token; a start for half of the cells, a result that is too short for some."""
    problem, i = make(rng, format, **LENS), list(FORMATS).index(format)
    starts, dtype, most = (STARTS, None)[i % 2], (BF16, F16, F32)[i % 3], (120, 50)[i == 5]
    run = jit(functools.partial(gather, max_tokens=most, dtype=dtype, backend=backend))
    got = run(problem.cache(), problem.batch(), None if starts is None else jnp.asarray(starts))
    want, cu_lens = expected(problem, most, dtype, starts)
    np.testing.assert_array_equal(np.asarray(got.rows), want)
    np.testing.assert_array_equal(np.asarray(got.cu_lens), cu_lens)


@pytest.mark.parametrize("format", FORMATS)
def test_raw_gather(format, backend, rng):
    """The stored bytes, the scale beside them where the format has one."""
    problem = make(rng, format, **LENS)
    got = gather(problem.cache(), problem.batch(), max_tokens=110, raw=True, backend=backend)
    rows = got.rows
    if "TENSOR" in format:
        assert rows.format == getattr(pa, format)
        assert rows.scale == problem.scale
        rows = rows.values
    want, cu_lens = expected(problem, 110, None)
    assert rows.dtype == FORMATS[format]
    np.testing.assert_array_equal(bits(rows), bits(want))
    np.testing.assert_array_equal(np.asarray(got.cu_lens), cu_lens)


@pytest.mark.parametrize("format", FORMATS)
def test_default_type(format, backend, rng):
    problem = make(rng, format, **LENS)
    got = gather(problem.cache(), problem.batch(), max_tokens=98, backend=backend).rows
    assert got.dtype == (FORMATS[format] if format in ("BF16", "F16", "F32") else BF16)
    np.testing.assert_array_equal(np.asarray(got), expected(problem, 98, got.dtype)[0])


def test_gather_golden(backend):
    """vLLM's kernel on an H100, bit for bit."""
    options, x, want = goldens.load("gather_dequant_mla_fp8")
    lens, starts = (np.array(options[n], np.int32) for n in ("lens", "seq_starts"))
    batch = pa.RaggedBatch(jnp.asarray(x["block_table"]), jnp.asarray(starts + lens), jnp.zeros(4, jnp.int32))
    cache = cache_like(x["cache"], "E4M3_TENSOR", x["scale"][0])
    got = gather(cache, batch, jnp.asarray(starts), max_tokens=int(sum(lens)), backend=backend)
    np.testing.assert_array_equal(bits(got.rows), bits(want["out"]))


@pytest.mark.parametrize("name", ["concat_mla_fp8", "concat_ds_mla"])
def test_write_then_gather(name, backend):
    """What upstream wrote comes back within the rounding of its format, the rotary part of FP8_DS_MLA exactly."""
    _, x, _ = goldens.load(name)
    ds = name == "concat_ds_mla"
    cache = pa.LatentCache.allocate(2, 16, format=pa.FP8_DS_MLA if ds else pa.E4M3_TENSOR, scale=None if ds else 0.37)
    latent, rope = (jnp.asarray(x[n][:20]) for n in ("kv_c", "k_pe"))
    batch = pa.RaggedBatch(jnp.array([[1, 0]]), jnp.array([20]), jnp.array([0, 20]))
    cache = pa.write_latent(cache, latent, rope, batch.slot_mapping(20, 16), backend=backend)
    got = np.asarray(gather(cache, batch, max_tokens=20, backend=backend).rows, F32)
    latent, rope = (np.asarray(a, F32) for a in (latent, rope))
    # Half a step of e4m3 is a 16th, around zero 2**-10 of the scale; that of a tile is at most amax / 224.
    scale = np.abs(latent).max() / 224 if ds else 0.37
    np.testing.assert_allclose(got[:, :512], latent, rtol=1 / 15, atol=scale * 2**-10)
    if ds:
        np.testing.assert_array_equal(got[:, 512:], rope)
    else:
        np.testing.assert_allclose(got[:, 512:], rope, rtol=1 / 15, atol=scale * 2**-10)


def test_surplus_is_dropped_and_told(backend, rng):
    problem = make(rng, "E4M3_TENSOR", **LENS)
    got = gather(problem.cache(), problem.batch(), max_tokens=30, backend=backend)
    np.testing.assert_array_equal(np.asarray(got.rows), expected(problem, 30, BF16)[0])
    assert int(got.cu_lens[-1]) == 98


def test_wild_numbers(backend):
    """Pages, lengths and starts from anywhere: clamped, and nothing outside the cache is read."""
    cache = pa.LatentCache(jnp.full((4, 16, 64), 7.0), pa.F32, rope_dim=16)
    table = jnp.array([[2**31 - 1, -1, 3], [0, -(2**31), 99], [4, 1, 2]], jnp.int32)
    batch = pa.RaggedBatch(table, jnp.array([2**31 - 1, -5, 48], jnp.int32), jnp.zeros(4, jnp.int32), jnp.int32(99))
    got = jit(functools.partial(gather, max_tokens=64, backend=backend))(cache, batch, jnp.array([-7, 3, 2**31 - 1]))
    np.testing.assert_array_equal(np.asarray(got.cu_lens), [0, 48, 48, 48])
    assert (np.asarray(got.rows[:48]) == 7).all()
    assert not np.asarray(got.rows[48:]).any()


def test_gradient_of_a_gather(backend, rng):
    """Into a float cache the transpose, NaN in unread slots or not; of the scale the sum of what it multiplies."""
    problem = make(rng, "F32", **LENS)
    weights = rng.standard_normal((60, 64)).astype(F32)

    def loss(cache, batch):
        got = gather(cache, batch, jnp.asarray(STARTS), max_tokens=60, dtype=F32, backend=backend)
        return jnp.vdot(got.rows, weights)

    grad = np.asarray(jit(jax.grad(loss))(problem.cache(), problem.batch()).pages)
    where = np.arange(problem.pages.size, dtype=F32).reshape(problem.pages.shape)  # each number names its own place
    places, cu_lens = expected(dataclasses.replace(problem, pages=where), 60, F32, STARTS)
    real = int(cu_lens[-1])
    want = np.zeros(problem.pages.size, F32)
    want[places[:real].astype(int).ravel()] = weights[:real].ravel()
    np.testing.assert_array_equal(grad.ravel(), want)
    quantized = make(rng, "E4M3_TENSOR", **LENS)
    by_scale = jit(jax.grad(loss, allow_int=True))(quantized.cache(), quantized.batch())
    assert not np.asarray(by_scale.pages, F32).any()
    exact = np.vdot(expected(dataclasses.replace(quantized, scale=F32(1)), 60, F32, STARTS)[0], weights)
    np.testing.assert_allclose(float(by_scale.scale), exact, rtol=1e-4)


def test_no_gradient_through_stored_bytes(backend, rng):
    """Of a raw gather and of a write of a quantised cache; the scale beside raw rows is passed on."""
    problem = make(rng, "E4M3_TENSOR", **LENS)
    cache, batch = problem.cache(), problem.batch()
    rows, pull = jax.vjp(lambda c: gather(c, batch, max_tokens=9, raw=True, backend=backend).rows, cache)
    (into,) = pull(pa.Quantized(jnp.ones_like(rows.values), jnp.float32(3), rows.format))
    assert not np.asarray(into.pages, F32).any()
    assert float(into.scale) == 3
    latent, rope = (jnp.asarray(x) for x in rows_of(rng, "E4M3_TENSOR"))
    written, pull = jax.vjp(
        lambda x: pa.write_latent(cache, x, rope, jnp.asarray(SLOTS), backend=backend).pages, latent
    )
    assert not np.asarray(pull(jnp.ones_like(written))[0], F32).any()


def test_vmap_of_a_gather(backend, rng):
    problems = [make(rng, "FP8_DS_MLA", **LENS) for _ in range(2)]
    stack = lambda *x: jnp.stack(x)  # noqa: E731
    cache, batch = (jax.tree.map(stack, *x) for x in zip(*((p.cache(), p.batch()) for p in problems), strict=True))
    got = jit(jax.vmap(functools.partial(gather, max_tokens=100, backend=backend)))(cache, batch)
    for i, problem in enumerate(problems):
        np.testing.assert_array_equal(np.asarray(got.rows[i]), expected(problem, 100, BF16)[0])


@functools.cache
def compiled(backend, most):
    return jit(functools.partial(gather, max_tokens=most, dtype=F32, backend=backend))


@pytest.mark.parametrize("name", ["reference", "xla"])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 2**32), st.lists(st.integers(0, 64), min_size=1, max_size=4),
    st.lists(st.integers(0, 80), min_size=4, max_size=4), st.sampled_from([7, 150]),
    st.sampled_from(["F32", "E4M3_TENSOR", "FP8_DS_MLA"]),
)  # fmt: skip
def test_ragged(name, seed, lens, starts, most, format):
    problem = make(
        np.random.default_rng(seed), format, (0,) * len(lens), lens, table_width=4, num_pages=20,
        spare_seqs=4 - len(lens), spare_tokens=1,
    )  # fmt: skip
    starts = np.array(starts, np.int32)
    got = compiled(name, most)(problem.cache(), problem.batch(), jnp.asarray(starts))
    want, cu_lens = expected(problem, most, F32, starts)
    np.testing.assert_array_equal(np.asarray(got.rows), want)
    np.testing.assert_array_equal(np.asarray(got.cu_lens), cu_lens)


# ---------------------------------------------------------------- layers in a scan


def test_scan_over_layers_copies_no_cache(rng):
    """Layer i owns the pages [i * M, (i + 1) * M) of one cache, which a loop carries and updates in place."""
    layers, pages = 3, 256
    latent, rope = jnp.asarray(rng.standard_normal((2, 512)), BF16), jnp.asarray(rng.standard_normal((2, 64)), BF16)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache):
        def layer(cache, i):
            slots = i * pages * 16 + jnp.array([5, 20])
            return pa.write_latent(cache, latent * 2 ** i.astype(BF16), rope, slots, backend="xla"), None

        return jax.lax.scan(layer, cache, jnp.arange(layers))[0]

    cache = pa.LatentCache.allocate(layers * pages, 16, format=pa.FP8_DS_MLA)
    assert step.lower(cache).compile().memory_analysis().temp_size_in_bytes < cache.nbytes / 2
    got = np.asarray(step(cache).pages).reshape(layers, pages * 16, 656)
    for i in range(layers):
        want = store(np.asarray(latent, F32) * 2**i, np.asarray(rope, F32), "FP8_DS_MLA")
        np.testing.assert_array_equal(got[i, [5, 20]], want)
        assert np.count_nonzero(got[i].any(-1)) == 2


# ---------------------------------------------------------------- bad input


CACHE = pa.LatentCache.allocate(4, 16, 32, 8, format=pa.F32)
BATCH = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3], jnp.int32), jnp.array([0, 1, 4], jnp.int32))
WRITE = {"latent": jnp.zeros((4, 32)), "rope": jnp.zeros((4, 8)), "slots": jnp.arange(4)}
FP8 = jnp.zeros((4, 16, 40), jnp.float8_e4m3fn)
one = jnp.float32(1)


def write(**changes):
    return pa.write_latent(**{"cache": CACHE} | WRITE | changes)


def collect(**changes):
    return pa.gather_latent(**{"cache": CACHE, "batch": BATCH, "max_tokens": 23} | changes)


def cached(pages, *rest):
    return collect(cache=pa.LatentCache(pages, *rest))


# name: (call, the argument that the message names, a piece of the value that it shows)
BAD = {
    "not a cache": (lambda: collect(cache=FP8), "cache", "Array"),
    "format": (lambda: cached(FP8, pa.E4M3_HEAD, one), r"cache\.format", "E4M3_HEAD"),
    "rank": (lambda: cached(FP8[0], pa.E4M3_TENSOR, one), r"cache\.pages", r"\(16, 40\)"),
    "storage": (lambda: cached(FP8, pa.BF16), r"cache\.pages", "float8_e4m3fn"),
    "no scale": (lambda: cached(FP8, pa.E4M3_TENSOR, None, 8), r"cache\.scale", "None"),
    "a needless scale": (lambda: cached(CACHE.pages, pa.F32, one, 8), r"cache\.scale", "given"),
    "scale shape": (lambda: cached(FP8, pa.E4M3_TENSOR, jnp.ones(1), 8), r"cache\.scale", r"\(1,\)"),
    "scale type": (lambda: cached(FP8, pa.E4M3_TENSOR, one.astype(BF16), 8), r"cache\.scale", "bfloat16"),
    "scale negative": (lambda: cached(FP8, pa.E4M3_TENSOR, -one, 8), r"cache\.scale", "-1"),
    "all rotary": (lambda: cached(FP8, pa.E4M3_TENSOR, one, 40), r"cache\.rope_dim", "40"),
    "rows of other bytes": (lambda: cached(jnp.zeros((4, 16, 584), jnp.uint8), pa.FP8_DS_MLA), "pages", "584"),
    "raw rows without their type": (lambda: cached(jnp.zeros((4, 16, 656)), pa.FP8_DS_MLA), "pages", "float32"),
    "rotary dim of FP8_DS_MLA": (
        lambda: cached(jnp.zeros((4, 16, 656), jnp.uint8), pa.FP8_DS_MLA, None, 32), r"cache\.rope_dim", "32",
    ),
    "dims of FP8_DS_MLA": (lambda: pa.LatentCache.allocate(1, 16, 256, format=pa.FP8_DS_MLA), "latent_dim", "256"),
    "calibrate": (lambda: pa.LatentCache.allocate(1, 16, format=pa.E4M3_TENSOR), "scale", "None"),
    "write rank": (lambda: write(latent=jnp.zeros((4, 1, 32))), "latent", r"\(4, 1, 32\)"),
    "write dim": (lambda: write(rope=jnp.zeros((4, 9))), "rope", "9"),
    "write fp8": (lambda: write(latent=jnp.zeros((4, 32), jnp.float8_e4m3fn)), "latent", "float8_e4m3fn"),
    "write quantised": (
        lambda: write(latent=pa.Quantized(WRITE["latent"], one, pa.E4M3_TENSOR)), "latent", "Quantized",
    ),
    "write types": (lambda: write(rope=jnp.zeros((4, 8), BF16)), "rope", "bfloat16"),
    "write too few": (lambda: write(rope=jnp.zeros((3, 8))), "rope", "3 tokens"),
    "slots rank": (lambda: write(slots=jnp.zeros((2, 2), jnp.int32)), "slots", r"\(2, 2\)"),
    "slots type": (lambda: write(slots=jnp.zeros(4)), "slots", "float32"),
    "no row": (lambda: collect(max_tokens=0), "max_tokens", "0"),
    "starts shape": (lambda: collect(starts=jnp.zeros(3, jnp.int32)), "starts", r"\(3,\)"),
    "result type": (lambda: collect(dtype=jnp.float8_e4m3fn), "dtype", "float8_e4m3fn"),
    "raw with a type": (lambda: collect(raw=True, dtype=jnp.float32), "dtype", "float32"),
    "raw traced": (lambda: collect(raw=one), "raw", "1.0"),
    "no page": (lambda: collect(cache=pa.LatentCache.allocate(0, 16, 32, 8)), r"cache\.pages", "no page"),
    "page table too narrow": (
        lambda: collect(batch=dataclasses.replace(BATCH, kv_lens=jnp.array([20, 49]))), "kv_lens", "49",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("without_type_checks")
def test_invalid_input(name):
    call, argument, value = BAD[name]
    with pytest.raises(pa.InvalidInput, match=argument) as error:
        call()
    assert error.match(value)
    assert len(str(error.value)) < 300


def test_poison_is_nan():
    """The tests above rest on it."""
    for format in FORMATS:
        width = 656 if format == "FP8_DS_MLA" else 64
        assert np.isnan(load(np.full((1, width), poison(format)), format, 1.0)).all()


@pytest.mark.parametrize("op", [pa.write_latent, pa.gather_latent])
def test_explain(op):
    arguments = (*WRITE.values(),) if op is pa.write_latent else (BATCH,)
    keywords = {} if op is pa.write_latent else {"max_tokens": 8}
    expected = {"mosaic": "not on cpu", "xla": "chosen", "reference": "supported"}
    assert pa.explain(op, CACHE, *arguments, **keywords) == expected
