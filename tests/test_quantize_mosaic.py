"""The Hopper kernel for groups: what it refuses, that it lowers, and that it makes the reference's own bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cover import pairwise, some_slow
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_attn as pa
from pallas_attn.core.arch import Arch
from pallas_attn.core.formats import GROUP_FORMATS
from pallas_attn.ops.quantize_output import mosaic, reference
from pallas_attn.ops.quantize_output.problem import prepare
from pallas_attn.runtime import dispatch

S = jax.ShapeDtypeStruct
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
FORMATS = {f.name: f for f in GROUP_FORMATS}
LISTS = (
    list(FORMATS),
    ((8, 128), (12, 256), (28, 1152), (40, 640), (128, 16384), (4096, 16384)),
    list(DTYPES),
)
CELLS = pairwise(LISTS)


def interesting(rng, shape, dtype):
    """Numbers of many magnitudes, with a row of zeros, one of large numbers, and an infinity."""
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-20, 9, (*shape[:-1], 1)))
    x[..., 0, :], x[..., 1, :], x[..., 3, 3] = 0, 60000 * np.sign(x[..., 1, :]), np.inf
    return jnp.asarray(x, dtype)


def same_bytes(got, want):
    """NaN, which infinity over infinity is, has more codes than one."""
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        equal = np.signbit(g) == np.signbit(w) if g.dtype != jnp.int32 else True
        g, w = (np.asarray(x).astype(np.float32) if x.dtype.itemsize == 1 else np.asarray(x) for x in (g, w))
        assert np.all(np.isnan(g) & np.isnan(w) | (g == w) & equal)


INTERPRETED = [
    ("E4M3_GROUP128", (2, 4, 256), "bf16"),
    ("E4M3_GROUP64", (36, 64), "f32"),
    ("E4M3_GROUP64_COLUMN", (40, 128), "f16"),
    ("E4M3_GROUP128_UE8M0_TMA", (12, 256), "bf16"),
    ("E4M3_GROUP128_UE8M0_TMA_PACKED", (28, 640), "bf16"),
    ("E4M3_GROUP64_UE8M0_TMA_PACKED", (8, 256), "f32"),
]


@pytest.mark.parametrize(
    "case", some_slow([*((c, 0) for c in INTERPRETED), (INTERPRETED[2], mosaic.BUSY)], 3, 5),
    ids=lambda c: "-".join(map(str, (*c[0], c[1]))),
)  # fmt: skip
def test_interpreted(case, rng, monkeypatch):
    """With several tiles to a CTA as for large problems, and one."""
    (name, shape, dtype), busy = case
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic, "BUSY", busy)
    p, args = prepare(interesting(rng, shape, DTYPES[dtype]), FORMATS[name])
    same_bytes(mosaic.run(p, *args), reference.run(p, *args))


@pytest.mark.parametrize(("name", "shape", "cut"), [
    ("E4M3_GROUP128", (4096, 16384), (4096 * 128, 1, 32, 4)),
    ("E4M3_GROUP128", (128, 16384), (128 * 128, 1, 32, 1)),
    ("E4M3_GROUP128", (32, 16384), (32 * 128, 1, 8, 1)),
    ("E4M3_GROUP128_UE8M0_TMA_PACKED", (128, 16384), (128, 128, 8, 4)),
])  # fmt: skip
def test_small_problems_have_small_ctas(name, shape, cut):
    p, _ = prepare(S(shape, jnp.bfloat16), FORMATS[name])
    assert mosaic.cut_of(p) == cut
    assert np.prod(mosaic.grid_of(p, mosaic.cut_of(p))) >= mosaic.BUSY


def lower(name, shape, dtype):
    p, _ = prepare(S(shape, DTYPES[dtype]), FORMATS[name])
    assert mosaic.supports(p) is None
    step = jax.jit(lambda x: mosaic.run(p, x, None))
    return step.trace(S(shape, DTYPES[dtype])).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cell", CELLS[::16], ids=lambda c: "-".join(map(str, c)))
def test_lowers_to_one_launch(cell):
    assert lower(*cell).count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_every_cell_lowers(cell):
    lower(*cell)


REFUSED = {
    "tensor": (pa.E4M3_STATIC, (32, 128), None, "no E4M3_STATIC"),
    "NVFP4": (pa.NVFP4, (32, 128), None, "no NVFP4"),
    "division": (pa.INDEX_K, (32, 128), None, "no INDEX_K"),
    "known scales": (pa.e4m3_group(64), (32, 128), S((32, 2), jnp.float32), "no known scales"),
    "few rows": (pa.e4m3_group(64), (4, 64), None, "fewer than 8 rows: 4"),
    "odd rows": (pa.e4m3_group(64, order="tma"), (35, 64), None, "no 35 rows, which are no multiple of 4"),
    "columns of copies": (
        pa.e4m3_group(64, order="column"), (2, 32, 64), None, "no E4M3_GROUP64_COLUMN for more than two axes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    format, shape, scale, reason = REFUSED[name]
    assert mosaic.supports(prepare(S(shape, jnp.bfloat16), format, scale)[0]) == reason


def chosen(x, format, scale=None):
    return dispatch.choose(dispatch.OPS["quantize"], prepare(x, format, scale)[0], "cuda").name


def test_what_a_gpu_runs(monkeypatch):
    """Formats without groups and known scales are XLA's, without a word; few rows are its too, with one."""
    monkeypatch.setattr(dispatch, "present_arch", lambda: Arch.HOPPER)
    x = S((32, 128), jnp.bfloat16)
    assert chosen(x, pa.e4m3_group(128)) == "mosaic"
    assert [chosen(x, pa.E4M3_STATIC), chosen(x, pa.INDEX_Q), chosen(x, pa.E4M3_TENSOR, S((), jnp.float32))] == [
        "xla"
    ] * 3
    with pytest.warns(pa.FallbackWarning, match="quantize runs on 'xla' .* since mosaic: fewer than 8 rows: 4"):
        assert chosen(S((4, 128), jnp.bfloat16), pa.e4m3_group(128)) == "xla"
    monkeypatch.setattr(dispatch, "present_arch", lambda: Arch.AMPERE)
    assert chosen(x, pa.E4M3_STATIC) == "xla"
    with pytest.warns(pa.FallbackWarning, match="since mosaic: only on HOPPER"):
        assert chosen(x, pa.e4m3_group(128)) == "xla"


def test_the_op_lowers_to_the_kernel():
    """Mapped, and between other steps of a program too."""
    quantise = lambda x: pa.quantize(x, pa.e4m3_group(128))  # noqa: E731
    for step, shape in ((quantise, (32, 256)), (jax.vmap(quantise), (2, 16, 256))):
        text = jax.jit(step).trace(S(shape, jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    name, shape, dtype = cell
    with jax.default_device(jax.devices("cpu")[0]):
        x = interesting(rng, shape, DTYPES[dtype])
        p, args = prepare(x, FORMATS[name])
        want = [np.asarray(w) for w in jax.jit(lambda x: reference.run(p, x, None))(args.x)]
    same_bytes(jax.jit(lambda x: mosaic.run(p, x, None))(jax.device_put(x, jax.devices()[0])), want)
