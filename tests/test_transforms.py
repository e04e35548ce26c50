"""jit, grad, vmap, donation, scan over layers and export."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import assert_close, library_options, make

import pallas_attn as pa
from pallas_attn.ops.paged_attention import problem as contract
from pallas_attn.ops.paged_attention import reference as definition

LENS = {"q_lens": (1, 5, 0, 3), "kv_lens": (9, 5, 0, 33), "dim": 16, "spare_seqs": 1, "spare_tokens": 2}


SLOW = pytest.mark.slow  # what another cell shows nearly as well

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time


def attend(q, cache, batch, **keywords):
    return pa.paged_attention(q, cache, batch, out=jnp.float32, return_lse=True, **keywords)


# ---------------------------------------------------------------- jit


@pytest.mark.parametrize("name", ["soft_cap", "scale", "window", "sinks", "alibi_slopes", "rswa window"])
def test_new_values_do_not_retrace(name, rng):
    problem = make(rng, **LENS)
    traces = []

    @jit
    def run(q, cache, batch, options):
        traces.append(1)
        return attend(q, cache, batch, **options)

    for x in (2, 3):
        value = {
            "soft_cap": np.float32(x), "scale": np.float32(x / 10), "window": np.int32(x),
            "sinks": np.full(4, x, np.float32), "alibi_slopes": np.full(4, x / 20, np.float32),
            "rswa window": (np.arange(5, dtype=np.int32), np.int32(x)),
        }[name]  # fmt: skip
        flat = {name.split()[0]: value}
        assert_close(run(*problem.arguments(), library_options(**flat)), problem.expected(**flat))
    assert len(traces) == 1


def test_new_cache_scales_do_not_retrace(backend, rng):
    run = jit(lambda *a: attend(*a, backend=backend))
    for scale in (0.5, 0.3):
        problem = make(rng, "E4M3_TENSOR", **LENS)
        problem.k_scale = np.float32(scale)
        assert_close(run(*problem.arguments()), problem.expected())
    assert run._cache_size() == 1


# ---------------------------------------------------------------- grad

OPTIONAL = ("scale", "soft_cap", "sinks", "alibi_slopes", "query_query")


def leaves_of(rng):
    """A problem, everything differentiable in it in float32, and the weights of a scalar loss of (out, lse)."""
    problem = make(rng, **LENS).clean()
    x = {
        "q": problem.q, "k": problem.k, "v": problem.v, "scale": 0.3, "soft_cap": 1.5, "sinks": rng.standard_normal(4),
        "alibi_slopes": rng.uniform(0.1, 0.5, 4), "query_query": rng.standard_normal((5, 5)),
    }  # fmt: skip
    weights = rng.standard_normal((11, 4, 16)).astype(np.float32), rng.standard_normal((11, 4)).astype(np.float32)
    return problem, {name: np.asarray(value, np.float32) for name, value in x.items()}, weights


def weighted(results, weights, xp=jnp):
    out, lse = results
    return xp.vdot(out, weights[0]) + xp.vdot(xp.where(xp.isfinite(lse), lse, 0), weights[1])


def call_of(problem, x, **options):
    """(arguments, options) of the library for differentiable leaves x."""
    _, _, batch = problem.arguments()
    options = library_options(**{n: x[n] for n in OPTIONAL}, window=7, **options)
    return (x["q"], pa.PagedKVCache(x["k"], x["v"]), batch), options


GRADIENTS = [("xla", False), ("xla", True), ("reference", True), pytest.param("reference", False, marks=SLOW)]


@pytest.mark.parametrize(("backend", "before"), GRADIENTS, indirect=["backend"])
def test_gradients(before, backend, rng):
    """Of every differentiable input, against central differences of the float64 oracle along random directions."""
    problem, x, weights = leaves_of(rng)

    def loss(x):
        arguments, options = call_of(problem, x, before_soft_cap=before)
        return weighted(attend(*arguments, **options, backend=backend), weights)

    def exact(x):
        where = problem.page_table, problem.kv_lens, problem.cu_q_lens, problem.num_seqs
        options = {n: x[n] for n in OPTIONAL} | {"window": 7, "before_soft_cap": before}
        return weighted(oracle.attention(x["q"], x["k"], x["v"], *where, **options), weights, np)

    grads = jit(jax.grad(loss))(x)
    for name, value in x.items():
        assert grads[name].dtype == jnp.float32
        assert_slope(grads[name], lambda v, n=name: exact(x | {n: v}), value, rng)


def assert_slope(grad, function, value, rng, step=1e-4):
    """The gradient along a random direction against a central difference in float64."""
    direction, grad = rng.standard_normal(np.shape(value)), np.asarray(grad, np.float64)
    slope = (function(value + step * direction) - function(value - step * direction)) / (2 * step)
    size = np.linalg.norm(grad) * np.linalg.norm(direction)
    assert abs(np.vdot(grad, direction) - slope) <= 1e-4 * max(size, 0.05)


def test_gradients_equal_autodiff_of_the_definition(rng):
    """The hand-written vjp against jax.grad straight through the naive implementation."""
    problem, x, weights = leaves_of(rng)

    def ours(x):
        arguments, options = call_of(problem, x)
        return weighted(attend(*arguments, **options), weights)

    def naive(x):
        arguments, options = call_of(problem, x)
        statics, arrays = contract.prepare(*arguments, **options, out=jnp.float32, return_lse=True)
        return weighted(definition.run(statics, *arrays), weights)

    got, want = jit(jax.grad(ours))(x), jit(jax.grad(naive))(x)
    for name in x:
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(want[name]), rtol=1e-4, atol=1e-4, err_msg=name)


SCALED = [
    ("E4M3_TENSOR", None), ("E4M3_HEAD", "E4M3_TENSOR"), ("E4M3_SEQ_HEAD", "E4M3_HEAD"),
    ("E4M3_TOKEN_HEAD", "E4M3_TOKEN_HEAD"), ("INT8_TOKEN_HEAD", None),
]  # fmt: skip


@pytest.mark.parametrize(("format", "q_format"), SCALED)
def test_gradients_of_scales(format, q_format, rng):
    """Of q, k and v scales, with NaN codes and NaN scales in what is not read."""
    problem = make(rng, format, q_format=q_format, **LENS)
    weights = rng.standard_normal((11, 4, 16))
    q, cache, batch = problem.arguments()
    scales = {"k_scale": cache.k.scale, "v_scale": cache.v.scale} | ({"q_scale": q.scale} if q_format else {})

    def loss(scales):
        k = pa.Quantized(cache.k.values, scales["k_scale"], cache.format)
        v = pa.Quantized(cache.v.values, scales["v_scale"], cache.format)
        query = pa.Quantized(q.values, scales["q_scale"], q.format) if q_format else q
        return jnp.vdot(attend(query, pa.PagedKVCache(k, v), batch)[0], weights)

    def exact(name, value):
        return np.vdot(dataclasses.replace(problem, **{name: value}).expected()[0], weights)

    for name, grad in jit(jax.grad(loss))(scales).items():
        value = getattr(problem, name)
        step = 1e-5 * float(np.nanmean(value))
        assert np.isfinite(np.asarray(grad)).all(), name
        assert_slope(grad, lambda v, n=name: exact(n, v), value.astype(np.float64), rng, step)


@pytest.mark.parametrize("format", ["E4M3_TENSOR", pytest.param("E5M2_HEAD", marks=SLOW), "INT8_TOKEN_HEAD"])
def test_no_gradient_through_a_quantized_cache(format, rng):
    q, cache, batch = make(rng, format, **LENS).arguments()
    (out, lse), pull = jax.vjp(lambda cache, batch: jax.jit(attend)(q, cache, batch), cache, batch)
    into_cache, into_batch = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    for cotangent in (into_cache.k.values, into_cache.v.values, into_batch.page_table):
        assert cotangent.dtype == jax.dtypes.float0 or not np.asarray(cotangent, np.float32).any()


def test_training_through_a_fake_quantized_cache(rng):
    """The gradient of the keys passes straight through the rounding, at the rounded values."""
    problem, _, weights = leaves_of(rng)
    q, cache, batch = problem.arguments()

    def fake(x):
        return pa.fake_quantize(x, pa.E4M3_TENSOR, jnp.float32(0.01))

    def loss(k, v):
        return weighted(attend(q, pa.PagedKVCache(k, v), batch), weights)

    got = jit(jax.grad(lambda k, v: loss(fake(k), fake(v)), (0, 1)))(cache.k, cache.v)
    want = jit(jax.grad(loss, (0, 1)))(fake(cache.k), fake(cache.v))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


def test_padding_gives_no_gradient(rng):
    """NaN in padding and unread slots stays out of the gradients too."""
    problem = make(rng, **LENS)
    q, cache, batch = problem.arguments()
    by_q, by_cache = jit(jax.grad(lambda q, cache: jnp.sum(attend(q, cache, batch)[0]), (0, 1)))(q, cache)
    assert np.isfinite(np.asarray(by_q)).all()
    assert not np.asarray(by_q)[9:].any()
    for x in (by_cache.k, by_cache.v):
        assert np.isfinite(np.asarray(x)).all()
        assert not np.asarray(x)[np.isnan(problem.k)].any()


# ---------------------------------------------------------------- vmap

MAPPED = {  # in_axes of (q, cache, page_table, soft_cap)
    "query": (0, None, None, None),
    "query on axis 1": (1, None, None, None),
    "query and table": (0, None, 0, None),
    "cache": (None, 0, None, None),
    "all": (0, 0, 0, 0),
    "soft cap": (None, None, None, 0),
}
MAPS = [(name, "F32") for name in MAPPED] + [
    ("cache", "E4M3_HEAD"), ("all", "INT8_TOKEN_HEAD"),
    pytest.param("cache", "INT8_TOKEN_HEAD", marks=SLOW), pytest.param("all", "E4M3_HEAD", marks=SLOW),
]  # fmt: skip


def attend_capped(q, cache, table, cap, like):
    batch = pa.RaggedBatch(table, like.kv_lens, like.cu_q_lens, like.num_seqs)
    return attend(q, cache, batch, soft_cap=cap)


attend_capped_once = jit(attend_capped)  # compiled once for all maps: their single calls have the same shapes


def pick(x, axis, i):
    """Element i of every array in x along its mapped axis; x itself where it is not mapped."""
    return x if axis is None else jax.tree.map(lambda a: jnp.take(a, i, axis=axis), x)


def stack(xs, axis=0):
    return jax.tree.map(lambda *x: jnp.stack(x, axis), *xs)


@pytest.mark.parametrize(("name", "format"), MAPS)
def test_vmap_equals_a_loop(name, format, rng):
    axes = MAPPED[name]
    queries, caches, batches = zip(*(make(rng, format, **LENS).clean().arguments() for _ in range(3)), strict=True)
    tables = stack([b.page_table for b in batches])
    stacked = stack(queries, axes[0] or 0), stack(caches), tables, jnp.array([1.0, 2.0, 5.0])

    # What is not mapped is the first problem's.
    given = [pick(x, 0 if axis is None else None, 0) for x, axis in zip(stacked, axes, strict=True)]
    got = jit(jax.vmap(attend_capped, in_axes=(*axes, None)))(*given, batches[0])
    for i in range(3):
        want = attend_capped_once(*(pick(x, axis, i) for x, axis in zip(given, axes, strict=True)), batches[0])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(np.asarray(a)[i], np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None)], ids=str)
def test_vmap_of_write_kv(axes, backend, rng):
    caches = [pa.PagedKVCache.allocate(4, 16, 2, 16, format=pa.E4M3_TOKEN_HEAD, layout=pa.HND) for _ in range(3)]
    k, v = (jnp.asarray(rng.standard_normal((3, 4, 2, 16)), jnp.float32) for _ in range(2))
    slots = jnp.array([[0, 5, -1, 63], [64, 1, 2, 3], [-64, 20, 21, 22]], jnp.int32)
    stacked = stack(caches), k, v, slots
    given = [pick(x, 0 if axis is None else None, 0) for x, axis in zip(stacked, axes, strict=True)]
    write = functools.partial(pa.write_kv, backend=backend)
    got, single = jit(jax.vmap(write, in_axes=axes))(*given), jit(write)
    for i in range(3):
        want = single(*(pick(x, axis, i) for x, axis in zip(given, axes, strict=True)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(np.asarray(a[i]), np.asarray(b))


def test_vmap_of_grad(rng):
    q, cache, batch = make(rng, **LENS).clean().arguments()
    grad = jax.grad(lambda q: jnp.sum(attend(q, cache, batch)[0] ** 2))
    queries = jnp.stack([q, 2 * q])
    got, single = jit(jax.vmap(grad))(queries), jit(grad)
    for i in range(2):
        np.testing.assert_allclose(np.asarray(got[i]), np.asarray(single(queries[i])), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- layers in a scan

LAYERS, N, S, K, D = 3, 512, 16, 2, 32


def layers_step(cache, q, k, v, batch, scanned):
    """Write and attend in every layer; layer i owns the pages [i * N, (i + 1) * N)."""

    def layer(carry, i):
        cache, x = carry
        mine = pa.RaggedBatch(batch.page_table + i * N, batch.kv_lens, batch.cu_q_lens, batch.num_seqs)
        cache = pa.write_kv(cache, k + i, v - i, mine.slot_mapping(q.shape[0], S), backend="xla")
        return (cache, pa.paged_attention(x, cache, mine, backend="xla")), None

    if scanned:
        return jax.lax.scan(layer, (cache, q), jnp.arange(LAYERS))[0]
    for i in range(LAYERS):
        (cache, q), _ = layer((cache, q), i)
    return cache, q


SCANS = [
    ("BF16", "NHD"), ("E4M3_TENSOR", "PACKED"), ("E4M3_TOKEN_HEAD", "HND"), ("INT8_TOKEN_HEAD", "INTERLEAVED"),
    pytest.param("E4M3_TENSOR", "NHD", marks=SLOW), pytest.param("E4M3_TENSOR", "SHUFFLE", marks=SLOW),
]  # fmt: skip


@pytest.mark.parametrize(("format", "layout"), SCANS)
def test_scan_over_layers_copies_no_cache(format, layout, rng):
    """XLA's CPU backend keeps no FP8 in place: it takes the array through f16, so only other formats are held to it."""
    kind = {"format": getattr(pa, format), "layout": getattr(pa, layout)}

    def allocate():
        scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(0.25)} if "TENSOR" in format else {}
        return pa.PagedKVCache.allocate(LAYERS * N, S, K, D, **kind, **scales)

    batch = pa.RaggedBatch(jnp.array([[3, 9], [5, 0]], jnp.int32), jnp.array([20, 4]), jnp.array([0, 2, 6]))
    q, k, v = (jnp.asarray(rng.standard_normal((6, h, D)), jnp.bfloat16) for h in (4, K, K))
    step = jax.jit(layers_step, donate_argnums=0, static_argnums=5)
    program = step.lower(allocate(), q, k, v, batch, True).compile()
    elements = allocate().buffers[0].size
    copies = [
        line.strip()
        for line in program.as_text().splitlines()
        if (found := re.search(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(", line))
        and np.prod([int(n) for n in found[1].split(",")]) >= elements
    ]
    if not format.startswith("E"):
        assert not copies
        assert program.memory_analysis().temp_size_in_bytes < allocate().buffers[0].nbytes
    scanned_cache, scanned = step(allocate(), q, k, v, batch, True)
    cache, looped = jit(layers_step, static_argnums=5)(allocate(), q, k, v, batch, False)
    np.testing.assert_allclose(np.asarray(scanned, np.float32), np.asarray(looped, np.float32), rtol=2e-2, atol=1e-2)
    for a, b in zip(jax.tree.leaves(scanned_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("format", ["E4M3_HEAD", "INT8_TOKEN_HEAD"])
def test_export_round_trip(format, backend, rng):
    problem = make(rng, format, **LENS)
    arguments = problem.arguments("PACKED")
    leaves, tree = jax.tree.flatten(arguments)

    def step(*leaves):
        q, cache, batch = jax.tree.unflatten(tree, leaves)
        rows = jnp.zeros((q.shape[0], cache.kv_heads, cache.head_dim))
        written = pa.write_kv(cache, rows, rows, jnp.full(q.shape[0], -1, jnp.int32), backend=backend)
        return attend(q, written, batch, backend=backend)

    exported = jax.export.export(jax.jit(step))(*leaves)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(*leaves), problem.expected())
