"""The Hopper gather: what it refuses, that it lowers to one launch, and that it gives the definition's own bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import FORMATS, make
from test_gather_kv import assert_rounded_once
from test_gather_kv import test_golden as golden_gather

import pallas_attn as pa
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.gather_kv import mosaic, mosaic_plan, reference
from pallas_attn.ops.gather_kv.problem import prepare

S = jax.ShapeDtypeStruct
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
LISTS = (
    list(FORMATS),
    ("NHD", "HND", "INTERLEAVED", "PACKED"),
    (1, 10, 16, 64, 256),  # page size
    ((64, 64), (128, 128), (256, 256), (192, 128), (32, 32), (80, 80)),
    (1, 2, 5, 8, 96),  # kv heads
    list(DTYPES),
    ("whole", "starts", "padded"),
    (1, 3, 150),  # sequences
)


def abstract(format, layout, page_size, dims, heads, dtype, kind, seqs):
    """(arguments, keywords) of shapes only."""
    cache = abstract_cache(
        getattr(pa, format), getattr(pa, layout), page_size=page_size, heads=heads, dim=dims[0], seqs=seqs
    )
    if dims[1] != dims[0]:
        v = S((*cache.buffers[1].shape[:-1], dims[1]), cache.buffers[1].dtype)
        cache = cache.replace((cache.buffers[0], v))
    i32 = jnp.int32
    live = S((), i32) if kind == "padded" else None
    batch = pa.RaggedBatch(S((seqs, 300 // page_size + 2), i32), S((seqs,), i32), S((seqs + 1,), i32), live)
    starts = S((seqs,), i32) if kind == "starts" else None
    return (cache, batch, starts), {"max_tokens": 300, "dtype": DTYPES[dtype]}


def problem_of(*cell):
    (cache, batch, starts), keywords = abstract(*cell)
    return prepare(cache, batch, starts=starts, **keywords)[0]


def possible(cell):
    layout, dims = cell[1], cell[3]
    if dims[0] != dims[1] and layout not in ("NHD", "HND"):
        return False
    return mosaic.supports(problem_of(*cell)) is None


CELLS = pairwise(LISTS, possible)


def gather(cache, batch, starts, *, backend, **keywords):
    return pa.gather_kv(cache, batch, starts=starts, backend=backend, **keywords)


def lower(*cell):
    args, keywords = abstract(*cell)
    step = jax.jit(functools.partial(gather, backend="mosaic", **keywords))
    return step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def concrete(rng, format, layout, page_size, dims, heads, dtype, kind, seqs, most=300):
    """Ragged sequences, empty ones among them, more tokens than the result has rows where there are many of them."""
    kv_lens = rng.integers(0, most if seqs < 9 else 9, seqs)
    problem = make(
        rng, format, q_lens=(0,) * seqs, kv_lens=tuple(map(int, kv_lens)), heads=(heads, heads), dim=dims[0],
        v_dim=dims[1], page_size=page_size, spare_seqs=2 if kind == "padded" else 0, spare_tokens=1,
    )  # fmt: skip
    _, cache, batch = problem.arguments(layout)
    starts = jnp.asarray(rng.integers(0, 40, seqs), jnp.int32) if kind == "starts" else None
    return (cache, batch, starts), {"max_tokens": most, "dtype": DTYPES[dtype]}


def check(got, args, keywords):
    """Bit for bit the definition's, on a CPU; a NaN is a NaN."""
    with jax.default_device(jax.devices("cpu")[0]):
        cache, batch, starts = jax.device_put(args, jax.devices("cpu")[0])
        p, own = prepare(cache, batch, starts=starts, **keywords)
        want = [np.asarray(x) for x in reference.run(p, *own)]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g), w)


INTERPRETED = [
    # (cell, bytes of a tile)
    (("E4M3_TENSOR", "NHD", 16, (64, 64), 2, "bf16", "starts", 3), 8192),
    (("E4M3_HEAD", "HND", 16, (64, 64), 2, "f16", "padded", 3), 2048),
    (("INT8_TOKEN_HEAD", "PACKED", 16, (128, 128), 2, "bf16", "starts", 3), 16384),
    (("E5M2_SEQ_HEAD", "INTERLEAVED", 10, (128, 128), 3, "f32", "whole", 2), 16384),
    (("BF16", "NHD", 64, (64, 48), 5, "bf16", "starts", 2), 512),  # heads in two shares
    (("F32", "HND", 1, (32, 32), 1, "bf16", "whole", 1), 1024),
]


@pytest.mark.parametrize(
    ("cell", "tile"), INTERPRETED, ids=lambda c: "-".join(map(str, c)) if isinstance(c, tuple) else ""
)
def test_interpreted(cell, tile, rng, monkeypatch):
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic, "SMS", 2)
    monkeypatch.setattr(mosaic_plan, "TILE_BYTES", tile)
    mosaic_plan.plan.cache_clear()
    (cache, batch, starts), keywords = concrete(rng, *cell, most=60)
    p, own = prepare(cache, batch, starts=starts, **keywords)
    got = mosaic.run(p, *own)
    mosaic_plan.plan.cache_clear()
    check(got, (cache, batch, starts), keywords)


@pytest.mark.parametrize("cell", CELLS[::15], ids=lambda c: "-".join(map(str, c)))
def test_lowers_to_one_launch(cell):
    assert lower(*cell).count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_every_cell_lowers(cell):
    lower(*cell)


REFUSED = {
    "shuffle": (("E4M3_TENSOR", "SHUFFLE", 16, (128, 128), 2, "bf16", "whole", 2), "no SHUFFLE layout"),
    "odd dim": (("E4M3_TENSOR", "NHD", 16, (72, 72), 2, "bf16", "whole", 2), "no head dims (72, 72)"),
    "wide dim": (("E4M3_TENSOR", "NHD", 16, (320, 320), 2, "bf16", "whole", 2), "no head dims (320, 320)"),
    "short columns": (
        ("E4M3_TENSOR", "HND", 1, (64, 64), 2, "bf16", "whole", 2), "no HND pages of 1 with head dims (64, 64)",
    ),
    "many": (("E4M3_TENSOR", "NHD", 16, (128, 128), 2, "bf16", "whole", 4097), "more than 4096 sequences"),
}  # fmt: skip


@pytest.mark.parametrize(("cell", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(cell, reason):
    assert mosaic.supports(problem_of(*cell)) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    args, keywords = concrete(rng, *cell)
    check(jax.jit(functools.partial(gather, backend="mosaic", **keywords))(*args), args, keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["mosaic", "xla"])
def test_wild_numbers_on_gpu(backend):
    """Pages, lengths and starts from anywhere: nothing outside the cache is read, and every row that is there is."""
    cache = pa.PagedKVCache.allocate(4, 16, 2, 64, format=pa.E4M3_TENSOR, k_scale=0.5, v_scale=0.25)
    table = jnp.array([[2**31 - 1, -1, 3], [0, -(2**31), 99], [4, 1, 2]], jnp.int32)
    batch = pa.RaggedBatch(table, jnp.array([2**31 - 1, -5, 48], jnp.int32), jnp.zeros(4, jnp.int32), jnp.int32(99))
    starts = jnp.array([-7, 3, 2**31 - 1], jnp.int32)
    got = jax.jit(functools.partial(gather, backend=backend, max_tokens=64))(cache, batch, starts)
    np.testing.assert_array_equal(np.asarray(got.cu_lens), [0, 48, 48, 48])
    assert not np.asarray(got.k, np.float32).any()


@pytest.mark.gpu
def test_golden_on_gpu():
    golden_gather("cp_mha_gather_nhd_starts", "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E5M2_TENSOR"])
@pytest.mark.parametrize("backend", ["mosaic", "xla"])
def test_every_code_is_rounded_once_on_gpu(format, dtype, backend):
    assert_rounded_once(format, np.dtype(DTYPES[dtype]).type, backend, scales=(0.3, 1.7, 1.0009765625, 113.0))


@pytest.mark.gpu
def test_one_kernel_on_gpu():
    cell = ("E4M3_TENSOR", "NHD", 64, (128, 128), 8, "bf16", "whole", 3)
    args, keywords = abstract(*cell)
    text = jax.jit(functools.partial(gather, backend="mosaic", **keywords)).lower(*args).compile().as_text()
    assert "fusion(" not in text
    assert "copy(" not in text
