"""RoPE and quantisation of index queries in one step: the bits of one step after the other, on every backend. And by
the Hopper kernel, and the one that writes keys, each called by itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_attn as pa
from bench import indexing
from pallas_attn.ops.sparse_indexer import mosaic_rope, mosaic_write, turns
from pallas_attn.ops.sparse_indexer.rope import reference, xla
from pallas_attn.ops.sparse_indexer.rope.problem import prepare
from pallas_attn.ops.sparse_indexer.write import problem as write_problem
from pallas_attn.ops.sparse_indexer.write import reference as write_reference

S = jax.ShapeDtypeStruct
D = 128
FORMATS = {"ue8m0": pa.INDEX_Q, "float32": dataclasses.replace(pa.INDEX_Q, ue8m0=False),
           "reciprocal": pa.e4m3_group(128)}  # fmt: skip
LISTS = (
    (1, 3, 64),  # tokens
    (8, 40, 64),  # heads
    (16, 32, 64),  # pairs
    ("bfloat16", "float16", "float32"),
    (False, True),  # neighbours
    (False, True),  # Hadamard matrix
    tuple(FORMATS),
)
CELLS = pairwise(LISTS)
name = lambda cell: "-".join(map(str, cell))  # noqa: E731


def abstract(tokens, heads, half, dtype, interleaved, hadamard, format):
    x, turn = S((tokens, heads, D), jnp.dtype(dtype)), S((tokens, half), jnp.float32)
    return prepare(x, turn, turn, interleaved=interleaved, hadamard=hadamard, format=FORMATS[format])


def concrete(rng, tokens, heads, half, dtype, interleaved, hadamard, format, wild=True):
    """Rows of many magnitudes, one of zeros, one of large numbers, and numbers that are none."""
    x = rng.standard_normal((tokens, heads, D)) * np.exp(rng.uniform(-20, 9, (tokens, heads, 1)))
    x[0, 0], x[0, 1] = 0, 60000 * np.sign(x[0, 1])
    if wild:
        x[0, 2, 1], x[0, 3, D - 1], x[0, 4, 2] = np.inf, -np.inf, np.nan
    angle = rng.uniform(-2000, 2000, (tokens, half))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    keywords = {"interleaved": interleaved, "hadamard": hadamard, "format": FORMATS[format]}
    return prepare(jnp.asarray(x, jnp.dtype(dtype)), cos, sin, **keywords)


def numbers(p, args):
    """What is quantised: queries after RoPE and the Hadamard matrix, as float32."""
    y = jax.jit(turns.rotate, static_argnums=3)(*args, p.interleaved)
    return np.asarray(jax.jit(turns.hadamard)(y) if p.hadamard else y).astype(np.float32)


def closed(got, want, y=None):
    """(got, want) of values, then of scales, as float32, without what no backend has to agree on: in a row of y with a
    NaN the scale is whatever the compiler's maximum makes of it, and only the NaN's own codes are known."""
    nan = np.zeros(want[0].shape, bool) if y is None else np.isnan(y)
    row = np.any(nan, axis=-1, keepdims=True)
    for g, w, free in zip(got, want, (row & ~nan, row), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        yield tuple(np.where(free, 0, np.asarray(x).astype(np.float32)) for x in (g, w))


def same_bits(got, want, y=None):
    """NaN has more codes than one."""
    for g, w in closed(got, want, y):
        np.testing.assert_array_equal(g, w)
        real = ~np.isnan(w)
        np.testing.assert_array_equal(np.signbit(g[real]), np.signbit(w[real]), "signs")


def stepwise(p, args):
    """Rotated by numpy, whose operations round one by one, then by the library's own parts, each by itself."""
    x, cos, sin = (np.asarray(a) for a in args)
    x32, dim = x.astype(np.float32), 2 * p.half
    first, second = (np.s_[..., 0:dim:2], np.s_[..., 1:dim:2]) if p.interleaved else (
        np.s_[..., : p.half], np.s_[..., p.half : dim])  # fmt: skip
    a, b, c, s = x32[first], x32[second], cos[:, None], sin[:, None]
    y = x32.copy()
    y[first], y[second] = a * c - b * s, b * c + a * s
    y = jnp.asarray(y).astype(p.dtype)
    y = jax.jit(turns.hadamard)(y) if p.hadamard else y
    return jax.jit(pa.quantize, static_argnums=1)(y, p.format)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("cell", CELLS[::4], ids=name)
def test_one_step_is_all_steps(cell, backend, rng):
    tokens, heads, *rest = cell
    p, args = concrete(rng, min(tokens, 5), heads, *rest, wild=False)
    keywords = {"interleaved": p.interleaved, "hadamard": p.hadamard, "format": p.format, "backend": backend}
    got = jax.jit(lambda *a: pa.rope_quantize(*a, **keywords))(*args)
    want = stepwise(p, args)
    assert got.format == p.format
    same_bits((got.values, got.scale), (want.values, want.scale))


def test_the_layer_quantises_what_it_projects(rng):
    """`project` and quantisation give the queries that `__call__` takes in one step."""
    indexer = pa.Indexer.init(jax.random.key(0), 32, 24, heads=4, hadamard=True, interleaved=True, dtype=jnp.bfloat16)
    hidden, latent = (jnp.asarray(rng.standard_normal((6, n)), jnp.bfloat16) for n in (32, 24))
    positions = jnp.arange(6) * 1000
    q = jax.jit(pa.Indexer.project)(indexer, hidden, latent, positions)[0]
    raw = jax.jit(jnp.matmul)(latent, indexer.wq).reshape(6, 4, D)
    turn = jax.jit(turns.angles)(positions, indexer.frequencies)
    got = jax.jit(lambda *a: pa.rope_quantize(*a, interleaved=True, hadamard=True))(raw, *turn)
    want = jax.jit(pa.quantize, static_argnums=1)(q, pa.INDEX_Q)
    same_bits((got.values, got.scale), (want.values, want.scale))


def test_copies_and_derivatives(rng):
    """vmap is a loop over calls; scales have the gradient of the steps that make them."""
    p, (x, cos, sin) = concrete(rng, 3, 8, 32, "float32", False, False, "float32", wild=False)
    one = jax.jit(functools.partial(pa.rope_quantize, format=p.format))
    both = jax.jit(jax.vmap(lambda x: one(x, cos, sin)))(jnp.stack([x, 2 * x]))
    for i, given in enumerate((x, 2 * x)):
        want = one(given, cos, sin)
        same_bits((both.values[i], both.scale[i]), (want.values, want.scale))
    steps = lambda x: pa.quantize(turns.rotate(x, cos, sin, False), p.format).scale.sum()  # noqa: E731
    got, want = (jax.jit(jax.grad(f))(x) for f in (lambda x: one(x, cos, sin).scale.sum(), steps))
    np.testing.assert_array_equal(got, want)
    assert np.any(got)


GROUP32 = dataclasses.replace(pa.INDEX_Q, group=32)
X, TURN = jnp.zeros((3, 4, D)), jnp.zeros((3, 32))
QUANTIZED: Any = pa.quantize(X, pa.INDEX_Q)
BAD = {
    "quantised": (lambda: pa.rope_quantize(QUANTIZED, TURN, TURN), "x: got Quantized; pass floats"),
    "bare FP8": (lambda: pa.rope_quantize(X.astype(jnp.float8_e4m3fn), TURN, TURN), "x: got a bare float8_e4m3fn"),
    "rank": (lambda: pa.rope_quantize(X[0], TURN, TURN), "x: got shape"),
    "tokens": (lambda: pa.rope_quantize(X, TURN[:2], TURN[:2]), r"cos: got shape \(2, 32\)"),
    "pairs": (lambda: pa.rope_quantize(X, jnp.zeros((3, 65)), TURN), r"cos: got shape \(3, 65\)"),
    "sin": (lambda: pa.rope_quantize(X, TURN, TURN[:, 1:]), "sin: got shape"),
    "wide": (lambda: pa.rope_quantize(X, TURN, TURN.astype(jnp.bfloat16)), "sin: got bfloat16; use float32"),
    "power": (
        lambda: pa.rope_quantize(X[..., :96], TURN, TURN, hadamard=True, format=GROUP32),
        "hadamard: got head_dim 96",
    ),
    "format": (lambda: pa.rope_quantize(X, TURN, TURN, format=pa.E4M3_TENSOR), "format: got E4M3_TENSOR"),
    "group": (lambda: pa.rope_quantize(X[..., :64], TURN, TURN), "128"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    wrong, message = BAD[case]
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(pa.InvalidInput, match=message):
            wrong()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# The Hopper kernel

INTERPRETED = [
    (2, 40, 32, "bfloat16", False, True, "ue8m0"),
    (1, 8, 16, "float32", True, False, "float32"),
    (1, 16, 64, "float16", True, True, "reciprocal"),
]


@pytest.mark.parametrize("cell", INTERPRETED, ids=name)
def test_interpreted(cell, rng, monkeypatch):
    monkeypatch.setattr(mosaic_rope, "INTERPRET", plgpu.InterpretGPUParams())
    p, args = concrete(rng, *cell)
    same_bits(mosaic_rope.run(p, *args), jax.jit(lambda *a: reference.run(p, *a))(*args), numbers(p, args))


def lower(cell):
    p, args = abstract(*cell)
    assert mosaic_rope.supports(p) is None
    step = jax.jit(lambda *a: mosaic_rope.run(p, *a))
    return step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cell", CELLS[::6], ids=name)
def test_lowers_to_one_launch(cell):
    assert lower(cell).count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_cell_lowers(cell):
    lower(cell)


@pytest.mark.parametrize("early", [False, True])
def test_a_decode_step_is_three_launches(early):
    """Of which two, where they overlap, begin beside the one before. Each waits for what came before it."""
    case = indexing.all_cases()["indexer_b64_c131072"]
    args = jax.eval_shape(functools.partial(indexing.arguments, case))
    text = jax.jit(indexing.operation(case, "mosaic", early=early)).trace(*args).lower(lowering_platforms=("cuda",))
    text = text.as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 3
    assert text.count("griddepcontrol.wait") == 3 * early
    assert text.count("griddepcontrol.launch_dependents") == 2 * early


def test_refuses():
    turn = S((3, 32), jnp.float32)
    refuses = lambda shape, turn=turn, **k: mosaic_rope.supports(prepare(S(shape, jnp.bfloat16), turn, turn, **k)[0])  # noqa: E731
    assert refuses((3, 8, 256)) == "no head dim 256"
    assert refuses((3, 8, D), format=pa.e4m3_group(64)) == "no group of 64"
    assert refuses((3, 12, D)) == "no 12 heads, which are no multiple of 8"
    assert refuses((3, 8, D), S((3, 24), jnp.float32)) == "no 24 pairs of neighbours apart"
    assert refuses((0, 8, D), S((0, 32), jnp.float32)) == "an empty call"


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_ops_lower_to_the_kernels():
    x, turn = S((3, 8, D), jnp.bfloat16), S((3, 32), jnp.float32)
    cache = jax.eval_shape(lambda: pa.IndexCache.allocate(4, 64, layout=pa.INDEX_NORMAL))
    k, slots = S((3, D), jnp.bfloat16), S((3,), jnp.int32)
    for text in (lowered(pa.rope_quantize, x, turn, turn), lowered(pa.write_index, cache, k, slots)):
        assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


def wanted(rng, cell):
    """(problem, arguments on the GPU, what the definition gives on the CPU, the numbers that are quantised)."""
    with jax.default_device(jax.devices("cpu")[0]):
        p, args = concrete(rng, *cell)
        want = [np.asarray(w) for w in jax.jit(lambda *a: reference.run(p, *a))(*args)]
        y = numbers(p, args)
    return p, jax.device_put(args, jax.devices()[0]), want, y


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_on_gpu(cell, rng):
    p, args, want, y = wanted(rng, cell)
    same_bits(jax.jit(lambda *a: mosaic_rope.run(p, *a))(*args), want, y)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_xla_on_gpu(cell, rng):
    """XLA's division is approximate there: exact for powers of two, else two units of a scale's last place off, which
    now and then is the next code."""
    p, args, want, y = wanted(rng, cell)
    got = jax.jit(lambda *a: xla.run(p, *a))(*args)
    if p.format.ue8m0:
        return same_bits(got, want, y)
    (g, w), (g_scale, w_scale) = closed(got, want, y)
    np.testing.assert_allclose(g_scale, w_scale, rtol=2**-21)
    np.testing.assert_allclose(g, w, rtol=2**-3, atol=2**-9)
    assert np.mean((g == w) | np.isnan(w)) > 0.99


@pytest.mark.gpu
def test_kernels_that_overlap_choose_the_same():
    case = indexing.all_cases()["indexer_b32_c32768"]
    args = indexing.arguments(case)
    apart, overlapping = (jax.jit(indexing.operation(case, "mosaic", early=early)) for early in (False, True))
    want = np.asarray(apart(*args))
    for _ in range(20):
        np.testing.assert_array_equal(overlapping(*args), want)


# Index writes

WRITES = (
    (1, 8, 77),  # keys
    (32, 64, 96),  # page size
    ("bfloat16", "float16", "float32"),
    ("INDEX_K", "INDEX_K_F32", "INDEX_K_EXPONENT"),
    (jnp.int32, jnp.uint32),  # slots
)
CELLS_WRITE = pairwise(WRITES)
WRITE_IDS = [name((*cell[:-1], cell[-1].__name__)) for cell in CELLS_WRITE]


def keys_to_write(rng, tokens, page_size, dtype, format, slot_dtype):
    """Slots in any order, some of them outside the cache, in pages of bytes that nobody wrote; wild keys among them."""
    pages = -(-tokens // page_size) + 2
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int64)
    slots[::6] += pages * page_size * (tokens > 1)
    slots[tokens // 3 : tokens // 2] = -1 if slot_dtype is jnp.int32 else 2**32 - 5
    k = rng.standard_normal((tokens, D)) * np.exp(rng.uniform(-20, 9, (tokens, 1)))
    k[0, 3] = np.inf
    cache = pa.IndexCache.allocate(pages, page_size, format=getattr(pa, format), layout=pa.INDEX_NORMAL)
    cache = cache.replace(jnp.asarray(rng.integers(0, 256, cache.pages.shape), jnp.uint8))
    return write_problem.prepare(cache, jnp.asarray(k, jnp.dtype(dtype)), jnp.asarray(slots, slot_dtype))


def same_pages(got, want):
    """Of NaN codes, one is as good as the other."""
    got, want = (np.asarray(x) for x in (got, want))
    both = np.isin(got, (0x7F, 0xFF)) & np.isin(want, (0x7F, 0xFF))
    np.testing.assert_array_equal(np.where(both, 0, got), np.where(both, 0, want))


@pytest.mark.parametrize(
    "cell", [(11, 32, "bfloat16", "INDEX_K", jnp.int32), (5, 64, "float32", "INDEX_K_EXPONENT", jnp.uint32)]
)
def test_write_interpreted(cell, rng, monkeypatch):
    monkeypatch.setattr(mosaic_write, "INTERPRET", plgpu.InterpretGPUParams())
    p, args = keys_to_write(rng, *cell)
    (got,) = jax.jit(lambda *a: mosaic_write.run(p, *a))(*args)
    same_pages(got, jax.jit(lambda *a: write_reference.run(p, *a)[0])(*args))


def test_slots_of_any_width_that_are_none_write_nothing(monkeypatch):
    monkeypatch.setattr(mosaic_write, "INTERPRET", plgpu.InterpretGPUParams())
    cache, k = pa.IndexCache.allocate(2, 32, layout=pa.INDEX_NORMAL), jnp.ones((3, D))
    for slots, dtype in (([-1, 2**32 + 5, 7], jnp.int64), ([-1, -128, 7], jnp.int8)):
        with jax.enable_x64(True):
            p, args = write_problem.prepare(cache, k, jnp.array(slots, dtype))
            (got,) = mosaic_write.run(p, *args)
        got = np.asarray(got).reshape(2, -1)
        assert np.flatnonzero(got[1]).size == 0
        np.testing.assert_array_equal(np.flatnonzero(got[0, : 32 * D]), np.arange(7 * D, 8 * D))


@pytest.mark.parametrize("cell", CELLS_WRITE[::3], ids=WRITE_IDS[::3])
def test_write_lowers_to_one_launch(cell, rng):
    p, args = keys_to_write(rng, *cell)
    assert mosaic_write.supports(p) is None
    text = jax.jit(lambda *a: mosaic_write.run(p, *a)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


def test_write_refuses():
    def refuses(page_size=32, dim=D, format=pa.INDEX_K, layout=pa.INDEX_NORMAL, tokens=3):
        cache = jax.eval_shape(lambda: pa.IndexCache.allocate(4, page_size, dim, format=format, layout=layout))
        k, slots = S((tokens, dim), jnp.bfloat16), S((tokens,), jnp.int32)
        return mosaic_write.supports(write_problem.prepare(cache, k, slots)[0])

    assert refuses() is None
    assert refuses(page_size=16) == "no pages of 16, which is no multiple of 32"
    assert refuses(dim=256) == "no head dim 256"
    assert refuses(format=dataclasses.replace(pa.INDEX_K, group=64)) == "no group of 64"
    assert refuses(format=pa.e4m3_group(128)) == "no E4M3_GROUP128"
    assert refuses(layout=pa.INDEX_SHUFFLE) == "no INDEX_SHUFFLE layout"
    assert refuses(tokens=0) == "an empty call"


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_WRITE, ids=WRITE_IDS)
def test_write_on_gpu(cell, rng):
    with jax.default_device(jax.devices("cpu")[0]):
        p, args = keys_to_write(rng, *cell)
        want = np.asarray(jax.jit(lambda *a: write_reference.run(p, *a)[0])(*args))
    there = jax.device_put(args, jax.devices()[0])
    same_pages(jax.jit(lambda *a: mosaic_write.run(p, *a)[0])(*there), want)
