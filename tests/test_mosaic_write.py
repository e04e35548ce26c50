"""The Hopper cache writer: what it refuses, that it lowers, and that it writes the reference's own bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import FORMATS
from test_golden import test_write_kv as golden_write

import pallas_attn as pa
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.kv_cache import mosaic, reference
from pallas_attn.ops.kv_cache.problem import prepare

S = jax.ShapeDtypeStruct
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
LISTS = (
    [f for f, (_, granularity) in FORMATS.items() if granularity != "seq_head"],
    ("NHD", "HND", "INTERLEAVED", "PACKED"),
    (1, 16, 64),  # page size
    ((64, 64), (128, 128), (256, 256), (192, 128), (32, 32), (80, 80)),
    (1, 2, 8, 12, 37, 128),  # kv heads
    list(DTYPES),
    (3, 70, 700),  # tokens
)


def abstract(format, layout, page_size, dims, heads, dtype, tokens):
    cache = abstract_cache(getattr(pa, format), getattr(pa, layout), page_size=page_size, heads=heads, dim=dims[0])
    k = S((tokens, heads, dims[0]), DTYPES[dtype])
    return cache, k, k, S((tokens,), jnp.int32)


def possible(cell):
    layout, dims = cell[1], cell[3]
    if dims[0] != dims[1]:
        return layout in ("NHD", "HND")
    return mosaic.supports(prepare(*abstract(*cell))[0]) is None


CELLS = pairwise(LISTS, possible)


def problem(rng, format, layout, page_size, dims, heads, dtype, tokens):
    """(cache full of random bytes, k, v, slots): rows of zeros, of large and of small numbers; slots that are none."""
    dtype_in_cache, granularity = FORMATS[format]
    pages = -(-(tokens + 20) // page_size)
    scales = {"tensor": (), "head": (heads,)}.get(granularity)
    given = (
        {} if scales is None else {f"{n}_scale": jnp.asarray(rng.uniform(0.01, 0.1, scales), jnp.float32) for n in "kv"}
    )
    cache = pa.PagedKVCache.allocate(
        pages,
        page_size,
        heads,
        dims[0],
        format=getattr(pa, format),
        layout=getattr(pa, layout),
        v_head_dim=dims[1],
        **given,
    )
    size = np.dtype(dtype_in_cache).itemsize
    noise = [
        np.asarray(rng.integers(0, 256, (*x.shape, size), np.uint8)).view(dtype_in_cache)[..., 0] for x in cache.buffers
    ]
    # No NaN: where XLA has no FP8, moving one gives it another code.
    noise = [np.where(np.isnan(x.astype(np.float32)), np.ones((), x.dtype), x) for x in noise]
    cache = cache.replace(tuple(map(jnp.asarray, noise)))
    size = np.exp(rng.uniform(-9, 3, (tokens, heads, 1)))
    k, v = (rng.standard_normal((tokens, heads, d)) * np.where(rng.random(size.shape) < 0.1, 0, size) for d in dims)
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    slots[:3] = [-1, pages * page_size, -(2**31)]
    return cache, *(jnp.asarray(x, DTYPES[dtype]) for x in (k, v)), jnp.asarray(slots)


def check(rng, run, *cell):
    args = problem(rng, *cell)
    with jax.default_device(jax.devices("cpu")[0]):
        args = jax.tree.map(lambda x: jax.device_put(x, jax.devices("cpu")[0]), args)
        want = jax.tree.leaves(pa.write_kv(*args, backend="reference"))
        want = [np.asarray(x) for x in want]
    got = run(*(jax.device_put(x, jax.devices()[0]) for x in args))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(*(np.atleast_1d(x).view(np.uint8) for x in (g, w)))


def interpreted(*args):
    p, args = prepare(*args)
    return mosaic.run(p, *args)


INTERPRETED = [
    ("E4M3_TENSOR", "NHD", 16, (64, 64), 2, "bf16", 6),
    ("INT8_TOKEN_HEAD", "HND", 16, (128, 128), 4, "f32", 4),
    ("E5M2_HEAD", "PACKED", 1, (64, 64), 3, "f16", 5),
    ("BF16", "INTERLEAVED", 16, (64, 64), 2, "f32", 5),
    ("E4M3_TOKEN_HEAD", "NHD", 16, (80, 48), 35, "bf16", 3),  # heads in two shares, of which one is in both
]


@pytest.mark.parametrize("cell", INTERPRETED, ids=lambda c: "-".join(map(str, c)))
def test_interpreted(cell, rng, monkeypatch):
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    check(rng, interpreted, *cell)


def one_of_many(format, slots):
    """What the kernel and the definition write of three tokens of random numbers."""
    cache = pa.PagedKVCache.allocate(4, 16, 2, 64, format=format)
    k = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 64)), jnp.float32)
    p, args = prepare(cache, k, k, slots)
    for got, want in zip(mosaic.run(p, *args), reference.run(p, *args), strict=True):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


def test_scales_that_are_powers_of_two(monkeypatch):
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    one_of_many(dataclasses.replace(pa.E4M3_TOKEN_HEAD, name="E4M3_UE8M0", ue8m0=True), jnp.array([5, -1, 7]))


def test_wide_slots_do_not_wrap_into_the_cache(monkeypatch):
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    with jax.enable_x64(True):
        one_of_many(pa.E4M3_TOKEN_HEAD, jnp.array([2**32 + 5, 6, -(2**32) + 7], jnp.int64))
    one_of_many(pa.E4M3_TOKEN_HEAD, jnp.array([2**32 - 1, 6, 2**31 + 7], jnp.uint32))


def lower(*cell):
    step = jax.jit(lambda *args: pa.write_kv(*args, backend="mosaic"), donate_argnums=0)
    return step.trace(*abstract(*cell)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cell", CELLS[::6], ids=lambda c: "-".join(map(str, c)))
def test_lowers_to_one_launch(cell):
    text = lower(*cell)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert "output_operand_alias" in text


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_every_cell_lowers(cell):
    lower(*cell)


REFUSED = {
    "shuffle": (("E4M3_TENSOR", "SHUFFLE", 16, (128, 128), 2, "bf16", 4), "no SHUFFLE layout"),
    "odd dim": (("E4M3_TENSOR", "NHD", 16, (72, 72), 2, "bf16", 4), "no head dims (72, 72)"),
    "wide dim": (("E4M3_TENSOR", "NHD", 16, (320, 320), 2, "bf16", 4), "no head dims (320, 320)"),
    "no token": (("E4M3_TENSOR", "NHD", 16, (128, 128), 2, "bf16", 0), "an empty call"),
}


@pytest.mark.parametrize(("cell", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(cell, reason):
    assert mosaic.supports(prepare(*abstract(*cell))[0]) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    check(rng, lambda *args: jax.tree.leaves(jax.jit(lambda *a: pa.write_kv(*a, backend="mosaic"))(*args)), *cell)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rcf_triton_fp8", "rcf_triton_pth_fp8", "rcf_cuda_fp8_perhead"])
def test_goldens_on_gpu(name):
    golden_write(name, "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "INT8_TOKEN_HEAD"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED", "PACKED"])
def test_in_place_on_gpu(layout, format):
    """One kernel and nothing of the cache's size besides."""
    cell = (format, layout, 64, (128, 128), 8, "bf16", 32)
    step = jax.jit(lambda *args: pa.write_kv(*args, backend="mosaic"), donate_argnums=0)
    compiled = step.lower(*abstract(*cell)).compile()
    text = compiled.as_text()
    assert "copy(" not in text
    assert "fusion(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 1024
