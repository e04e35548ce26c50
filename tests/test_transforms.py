"""jit, grad, vmap, donation, scan over layers and export."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import assert_close, library_options, make

import pallas_attn as pa

LENS = {"q_lens": (1, 5, 0, 3), "kv_lens": (9, 5, 0, 33), "dim": 16, "spare_seqs": 1, "spare_tokens": 2}


def attend(q, cache, batch, **keywords):
    return pa.paged_attention(q, cache, batch, out=jnp.float32, return_lse=True, **keywords)


# ---------------------------------------------------------------- jit


@pytest.mark.parametrize("name", ["soft_cap", "scale", "window", "sinks", "alibi_slopes", "rswa window"])
def test_new_values_do_not_retrace(name, backend, rng):
    problem = make(rng, **LENS)
    traces = []

    @jax.jit
    def run(q, cache, batch, options):
        traces.append(1)
        return attend(q, cache, batch, **options, backend=backend)

    for x in (2, 3):
        value = {
            "soft_cap": np.float32(x), "scale": np.float32(x / 10), "window": np.int32(x),
            "sinks": np.full(4, x, np.float32), "alibi_slopes": np.full(4, x / 20, np.float32),
            "rswa window": (np.arange(5, dtype=np.int32), np.int32(x)),
        }[name]  # fmt: skip
        flat = {name.split()[0]: value}
        assert_close(run(*problem.arguments(), library_options(**flat)), problem.expected(**flat))
    assert len(traces) == 1


def test_new_scales_do_not_retrace(backend, rng):
    run = jax.jit(lambda *a: attend(*a, backend=backend))
    for scale in (0.5, 0.3):
        problem = make(rng, "E4M3_TENSOR", **LENS)
        problem.k_scale = np.float32(scale)
        assert_close(run(*problem.arguments()), problem.expected())
    assert run._cache_size() == 1


# ---------------------------------------------------------------- grad


def leaves_of(rng):
    """Everything differentiable, in float32, and the statics around it."""
    problem = make(rng, **LENS)
    x = {
        "q": problem.q[:9], "k": np.nan_to_num(problem.k), "v": np.nan_to_num(problem.v), "scale": 0.3, "soft_cap": 1.5,
        "sinks": rng.standard_normal(4), "alibi_slopes": rng.uniform(0.1, 0.5, 4),
        "query_query": rng.standard_normal((5, 5)),
    }  # fmt: skip
    return problem, {name: np.asarray(value, np.float32) for name, value in x.items()}


OPTIONAL = ("scale", "soft_cap", "sinks", "alibi_slopes", "query_query")


def library_loss(problem, x, weights, backend, before_soft_cap):
    options = library_options(**{n: x[n] for n in OPTIONAL}, before_soft_cap=before_soft_cap, window=7)
    _, _, batch = problem.arguments()
    out, lse = attend(x["q"], pa.PagedKVCache(x["k"], x["v"]), batch, **options, backend=backend)
    return jnp.vdot(out, weights[0]) + jnp.vdot(jnp.where(jnp.isfinite(lse), lse, 0), weights[1])


def oracle_loss(problem, x, weights, before_soft_cap):
    where = problem.page_table, problem.kv_lens, problem.cu_q_lens, problem.num_seqs
    options = {n: x[n] for n in OPTIONAL} | {"window": 7, "before_soft_cap": before_soft_cap}
    out, lse = oracle.attention(x["q"], x["k"], x["v"], *where, **options)
    return np.vdot(out, weights[0]) + np.vdot(np.where(np.isfinite(lse), lse, 0), weights[1])


@pytest.mark.parametrize("before_soft_cap", [False, True], ids=["bias after cap", "bias before cap"])
def test_gradients(before_soft_cap, backend, rng):
    """Of every differentiable input, against central differences of the float64 oracle along random directions."""
    problem, x = leaves_of(rng)
    weights = rng.standard_normal((9, 4, 16)), rng.standard_normal((9, 4))
    grads = jax.jit(jax.grad(lambda x: library_loss(problem, x, weights, backend, before_soft_cap)))(x)
    for name, value in x.items():
        direction = rng.standard_normal(np.shape(value))
        moved = (x | {name: value + step * direction} for step in (1e-4, -1e-4))
        up, down = (oracle_loss(problem, y, weights, before_soft_cap) for y in moved)
        slope = (up - down) / 2e-4
        got = float(np.vdot(np.asarray(grads[name], np.float64), direction))
        size = np.linalg.norm(np.asarray(grads[name], np.float64)) * np.linalg.norm(direction)
        assert grads[name].dtype == jnp.float32
        assert abs(got - slope) <= 1e-4 * max(size, 1e-3), name


def test_xla_gradients_equal_the_reference(rng):
    problem, x = leaves_of(rng)
    weights = rng.standard_normal((9, 4, 16)), rng.standard_normal((9, 4))
    one, other = (jax.grad(lambda x, b=b: library_loss(problem, x, weights, b, False))(x) for b in ("reference", "xla"))
    for name in x:
        np.testing.assert_allclose(np.asarray(one[name]), np.asarray(other[name]), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E4M3_HEAD", "E4M3_SEQ_HEAD", "E4M3_TOKEN_HEAD", "INT8_TOKEN_HEAD"])
@pytest.mark.parametrize("q_format", [None, "E4M3_TENSOR", "E4M3_TOKEN_HEAD"])
def test_gradients_of_scales(q_format, format, backend, rng):
    problem = make(rng, format, q_format=q_format, **(LENS | {"spare_tokens": 0}))
    if problem.k_scale.ndim == 3:
        problem.k_scale, problem.v_scale = np.nan_to_num(problem.k_scale), np.nan_to_num(problem.v_scale)
    weights = rng.standard_normal((9, 4, 16))
    q, cache, batch = problem.arguments()
    scales = {"k_scale": cache.k.scale, "v_scale": cache.v.scale} | ({"q_scale": q.scale} if q_format else {})

    def loss(scales):
        k = pa.Quantized(cache.k.values, scales["k_scale"], cache.format)
        v = pa.Quantized(cache.v.values, scales["v_scale"], cache.format)
        query = pa.Quantized(q.values, scales["q_scale"], q.format) if q_format else q
        return jnp.vdot(attend(query, pa.PagedKVCache(k, v), batch, backend=backend)[0], weights)

    for name, got in jax.grad(loss)(scales).items():
        value = getattr(problem, name)
        direction = rng.standard_normal(np.shape(value))
        ends = []
        for step in (1e-5, -1e-5):
            setattr(problem, name, value + step * direction)
            ends.append(np.vdot(problem.expected()[0], weights))
        setattr(problem, name, value)
        slope, size = (ends[0] - ends[1]) / 2e-5, np.linalg.norm(np.asarray(got)) * np.linalg.norm(direction)
        assert abs(float(np.vdot(np.asarray(got, np.float64), direction)) - slope) <= 1e-4 * max(size, 1e-3), name


@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E5M2_HEAD", "INT8_TOKEN_HEAD"])
def test_no_gradient_through_a_quantized_cache(format, backend, rng):
    problem = make(rng, format, **LENS)
    q, cache, batch = problem.arguments()
    (out, _), pull = jax.vjp(lambda cache, batch: attend(q, cache, batch, backend=backend), cache, batch)
    into_cache, into_batch = pull((jnp.ones_like(out), jnp.ones(out.shape[:2])))
    for cotangent in (into_cache.k.values, into_cache.v.values, into_batch.page_table):
        assert cotangent.dtype == jax.dtypes.float0 or not np.asarray(cotangent, np.float32).any()


def test_training_through_a_fake_quantized_cache(backend, rng):
    """The gradient of the keys passes straight through the rounding, at the rounded values."""
    problem, x = leaves_of(rng)
    _, _, batch = problem.arguments()

    def fake(x):
        return pa.fake_quantize(x, pa.E4M3_TENSOR, jnp.float32(0.01))

    def loss(k, v):
        return jnp.sum(attend(x["q"], pa.PagedKVCache(k, v), batch, backend=backend)[0] ** 2)

    got = jax.grad(lambda k, v: loss(fake(k), fake(v)), (0, 1))(x["k"], x["v"])
    want = jax.grad(loss, (0, 1))(fake(x["k"]), fake(x["v"]))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def test_padding_gives_no_gradient(backend, rng):
    """NaN in padding and unread slots stays out of the gradients too."""
    problem = make(rng, **LENS)
    q, cache, batch = problem.arguments()

    def loss(q, cache):
        return jnp.sum(attend(q, cache, batch, backend=backend)[0])

    by_q, by_cache = jax.grad(loss, (0, 1))(q, cache)
    unread = np.isnan(problem.k)
    assert np.isfinite(np.asarray(by_q)).all()
    assert not np.asarray(by_q)[9:].any()
    for x in (by_cache.k, by_cache.v):
        assert np.isfinite(np.asarray(x)).all()
        assert not np.asarray(x)[unread].any()


# ---------------------------------------------------------------- vmap

MAPPED = {  # in_axes of (q, cache, page_table, soft_cap)
    "query": (0, None, None, None),
    "query and table": (0, None, 0, None),
    "cache": (None, 0, None, None),
    "all": (0, 0, 0, 0),
    "query on axis 1": (1, None, None, None),
    "soft cap": (None, None, None, 0),
}


def pick(x, axis, i):
    """Element i of every array in x along its mapped axis; x itself where it is not mapped."""
    return x if axis is None else jax.tree.map(lambda a: jnp.take(a, i, axis=axis), x)


@pytest.mark.parametrize("format", ["F32", "E4M3_HEAD", "INT8_TOKEN_HEAD"])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_equals_a_loop(name, format, backend, rng):
    axes = MAPPED[name]
    problems = [make(rng, format, **LENS) for _ in range(3)]
    queries, caches, batches = zip(*(p.arguments() for p in problems), strict=True)
    stacked = [
        jnp.stack(queries, axes[0] or 0),
        jax.tree.map(lambda *x: jnp.stack(x), *caches),
        jnp.stack([b.page_table for b in batches]),
        jnp.array([1.0, 2.0, 5.0]),
    ]

    def run(q, cache, table, cap):
        batch = pa.RaggedBatch(table, batches[0].kv_lens, batches[0].cu_q_lens, batches[0].num_seqs)
        return attend(q, cache, batch, soft_cap=cap, backend=backend)

    # What is not mapped is the first problem's.
    given = [pick(x, 0 if axis is None else None, 0) for x, axis in zip(stacked, axes, strict=True)]
    got = jax.vmap(run, in_axes=axes)(*given)
    for i in range(3):
        single = [pick(x, axis, i) for x, axis in zip(given, axes, strict=True)]
        for a, b in zip(got, run(*single), strict=True):
            np.testing.assert_allclose(np.asarray(a)[i], np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None)], ids=str)
def test_vmap_of_write_kv(axes, backend, rng):
    caches = [pa.PagedKVCache.allocate(4, 16, 2, 16, format=pa.E4M3_TOKEN_HEAD, layout=pa.HND) for _ in range(3)]
    cache = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    k, v = (jnp.asarray(rng.standard_normal((3, 4, 2, 16)), jnp.float32) for _ in range(2))
    slots = jnp.array([[0, 5, -1, 63], [64, 1, 2, 3], [-64, 20, 21, 22]], jnp.int32)
    given = [pick(x, 0 if axis is None else None, 0) for x, axis in zip((cache, k, v, slots), axes, strict=True)]
    got = jax.vmap(lambda *a: pa.write_kv(*a, backend=backend), in_axes=axes)(*given)
    for i in range(3):
        single = [pick(x, axis, i) for x, axis in zip(given, axes, strict=True)]
        want = pa.write_kv(*single, backend=backend)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(np.asarray(a[i]), np.asarray(b))


def test_vmap_of_grad(backend, rng):
    problem, x = leaves_of(rng)
    _, _, batch = problem.arguments()

    def loss(q):
        return jnp.sum(attend(q, pa.PagedKVCache(x["k"], x["v"]), batch, backend=backend)[0] ** 2)

    queries = jnp.stack([x["q"], 2 * x["q"]])
    got = jax.vmap(jax.grad(loss))(queries)
    for i in range(2):
        np.testing.assert_allclose(np.asarray(got[i]), np.asarray(jax.grad(loss)(queries[i])), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- layers in a scan

LAYERS, N, S, K, D = 3, 32, 16, 2, 32


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


@pytest.mark.parametrize("layout", ["NHD", "PACKED", "SHUFFLE"])
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR", "E4M3_TOKEN_HEAD"])
def test_scan_over_layers_copies_no_cache(format, layout, rng):
    scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(0.25)} if "TENSOR" in format else {}
    kind = {"format": getattr(pa, format), "layout": getattr(pa, layout)}

    def allocate():
        return pa.PagedKVCache.allocate(LAYERS * N, S, K, D, **kind, **scales)

    batch = pa.RaggedBatch(jnp.array([[3, 9], [5, 0]], jnp.int32), jnp.array([20, 4]), jnp.array([0, 2, 6]))
    q, k, v = (jnp.asarray(rng.standard_normal((6, h, D)), jnp.bfloat16) for h in (4, K, K))
    step = jax.jit(layers_step, donate_argnums=0, static_argnums=5)
    program = step.lower(allocate(), q, k, v, batch, True).compile()
    elements = allocate().buffers[0].size
    copies = [
        line.strip()
        for line in program.as_text().splitlines()
        if (found := re.search(r"= \w+\[([\d,]+)\]\S* (copy|transpose|convert)\(", line))
        and np.prod([int(n) for n in found[1].split(",")]) >= elements
    ]
    assert not copies
    assert program.memory_analysis().temp_size_in_bytes < allocate().buffers[0].nbytes
    scanned_cache, scanned = step(allocate(), q, k, v, batch, True)
    cache, looped = layers_step(allocate(), q, k, v, batch, False)
    np.testing.assert_allclose(np.asarray(scanned, np.float32), np.asarray(looped, np.float32), rtol=2e-2, atol=1e-2)
    for a, b in zip(jax.tree.leaves(scanned_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("format", ["BF16", "E4M3_HEAD", "INT8_TOKEN_HEAD"])
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
