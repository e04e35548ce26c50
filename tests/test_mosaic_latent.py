"""The Hopper kernels of the latent cache: what they refuse, that they lower to one launch, that they give the
definition's own bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu
from latents import FORMATS, load

import pallas_attn as pa
from pallas_attn.ops.latent_cache import (
    gather_problem,
    gather_reference,
    mosaic_gather,
    mosaic_write,
    write_problem,
    write_reference,
)

S = jax.ShapeDtypeStruct
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
DIMS = ((512, 64), (48, 16), (256, 32), (1024, 128))


def allocate(format, pages, page_size, dims):
    scale = 0.37 / 16 if "TENSOR" in format else None
    return pa.LatentCache.allocate(pages, page_size, *dims, format=getattr(pa, format), scale=scale)


def random_cache(rng, format, pages, page_size, dims):
    """Random bytes. No NaN: where XLA has no FP8, moving one gives it another code. Nothing subnormal: XLA takes it for
    0 on a CPU."""
    cache = allocate(format, pages, page_size, dims)
    size = cache.pages.dtype.itemsize
    noise = rng.integers(8, 123, (*cache.pages.shape, size), np.uint8).view(cache.pages.dtype)[..., 0]
    return pa.LatentCache(jnp.asarray(noise), cache.format, cache.scale, cache.rope_dim)


def on_cpu(args):
    return jax.device_put(args, jax.devices("cpu")[0])


def fits(cell):
    """FP8_DS_MLA has dims of its own."""
    return cell[0] != "FP8_DS_MLA" or (512, 64) in cell


def same_bytes(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(*(np.atleast_1d(np.asarray(x)).view(np.uint8) for x in (g, w)))


# ---------------------------------------------------------------- writes

WRITES = pairwise((list(FORMATS), (1, 16, 64), DIMS, list(DTYPES), (3, 70, 700)), fits)


def writing(format, page_size, dims, dtype, tokens):
    """Arguments of shapes only."""
    cache = jax.eval_shape(lambda: allocate(format, -(-(tokens + 20) // page_size), page_size, dims))
    return cache, *(S((tokens, d), DTYPES[dtype]) for d in dims), S((tokens,), jnp.int32)


def write_args(rng, format, page_size, dims, dtype, tokens):
    """(cache, latent, rope, slots): rows of zeros, of large and of small numbers; slots that are none."""
    pages = -(-(tokens + 20) // page_size)
    size = np.exp(rng.uniform(-9, 3, (tokens, 1)))
    size = np.where(rng.random(size.shape) < 0.1, 0, size)
    latent, rope = (rng.standard_normal((tokens, d)) * size for d in dims)
    latent[-1, :2] = 6e4, -6e4
    latent[0] *= np.exp(rng.uniform(-20, 20, dims[0]))  # every tile has its own power of two
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    slots[:3] = [-1, pages * page_size, -(2**31)] if tokens > 5 else slots[:3]
    cache = random_cache(rng, format, pages, page_size, dims)
    return cache, *(jnp.asarray(np.clip(x, -6e4, 6e4), DTYPES[dtype]) for x in (latent, rope)), jnp.asarray(slots)


def written_by_definition(*args):
    p, args = write_problem.prepare(*args)
    return write_reference.run(p, *args)


def write_mosaic(*args):
    p, args = write_problem.prepare(*args)
    assert mosaic_write.supports(p) is None
    return mosaic_write.run(p, *args)


def check_write(rng, run, *cell):
    with jax.default_device(jax.devices("cpu")[0]):
        args = on_cpu(write_args(rng, *cell))
        want = [np.asarray(x) for x in written_by_definition(*args)]
    same_bytes(run(*jax.device_put(args, jax.devices()[0])), want)


@pytest.mark.parametrize("cell", [
    ("FP8_DS_MLA", 16, (512, 64), "bf16", 11),
    ("FP8_DS_MLA", 1, (512, 64), "f32", 3),
    ("E4M3_TENSOR", 64, (512, 64), "bf16", 9),
    ("E5M2_TENSOR", 16, (48, 16), "f32", 8),
    ("F16", 16, (48, 16), "bf16", 9),
    ("BF16", 16, (512, 64), "bf16", 9),
], ids=lambda c: "-".join(map(str, c)))  # fmt: skip
def test_write_interpreted(cell, rng, monkeypatch):
    monkeypatch.setattr(mosaic_write, "INTERPRET", plgpu.InterpretGPUParams())
    check_write(rng, write_mosaic, *cell)


def test_wide_slots_do_not_wrap_into_the_cache(rng, monkeypatch):
    monkeypatch.setattr(mosaic_write, "INTERPRET", plgpu.InterpretGPUParams())
    cache, latent, rope, _ = write_args(rng, "BF16", 16, (48, 16), "bf16", 3)
    for dtype, slots in ((jnp.int64, [2**32 + 5, 6, -(2**32) + 7]), (jnp.uint32, [2**32 - 1, 6, 2**31 + 7])):
        with jax.enable_x64(True):
            args = cache, latent, rope, jnp.array(slots, dtype)
            same_bytes(write_mosaic(*args), written_by_definition(*args))


def lower_write(*cell):
    step = jax.jit(write_mosaic, donate_argnums=0)
    return step.trace(*writing(*cell)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cell", WRITES[::6], ids=lambda c: "-".join(map(str, c)))
def test_write_lowers_to_one_launch(cell):
    text = lower_write(*cell)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert "output_operand_alias" in text


@pytest.mark.slow
@pytest.mark.parametrize("cell", WRITES, ids=lambda c: "-".join(map(str, c)))
def test_every_write_lowers(cell):
    lower_write(*cell)


@pytest.mark.parametrize(("cell", "reason"), [
    (("BF16", 16, (40, 16), "bf16", 4), "no latent of 40 with a rotary part of 16"),
    (("BF16", 16, (48, 0), "bf16", 4), "no latent of 48 with a rotary part of 0"),
    (("BF16", 16, (2048, 64), "bf16", 4), "no latent of 2048 with a rotary part of 64"),
    (("BF16", 16, (48, 16), "bf16", 0), "an empty call"),
], ids=str)  # fmt: skip
def test_write_refuses(cell, reason):
    assert mosaic_write.supports(write_problem.prepare(*writing(*cell))[0]) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("cell", WRITES, ids=lambda c: "-".join(map(str, c)))
def test_write_on_gpu(cell, rng):
    check_write(rng, jax.jit(write_mosaic), *cell)


@pytest.mark.gpu
def test_nan_stays_in_its_tile_on_gpu():
    cache = pa.LatentCache.allocate(1, 16, format=pa.FP8_DS_MLA)
    latent = jnp.ones((1, 512)).at[0, 130].set(jnp.nan)
    pages, *_ = write_mosaic(cache, latent, jnp.ones((1, 64)), jnp.zeros(1, jnp.int32))
    found = load(np.asarray(pages[0, 0]), "FP8_DS_MLA")
    assert np.isnan(found[130])
    np.testing.assert_array_equal(found[np.r_[0:128, 256:576]], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["FP8_DS_MLA", "E4M3_TENSOR"])
def test_write_in_place_on_gpu(format):
    """One kernel and nothing of the cache's size besides."""
    compiled = jax.jit(write_mosaic, donate_argnums=0).lower(*writing(format, 64, (512, 64), "bf16", 32)).compile()
    text = compiled.as_text()
    assert "copy(" not in text
    assert "fusion(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


# ---------------------------------------------------------------- gathers

RESULTS = {"raw": None, **DTYPES}
GATHERS = pairwise(
    (list(FORMATS), (1, 10, 16, 64, 256), DIMS, list(RESULTS), ("whole", "starts", "padded"), (1, 3, 150)), fits
)


def keywords(result, most=300):
    return {"max_tokens": most, **({"raw": True} if result == "raw" else {"dtype": RESULTS[result]})}


def gathering(format, page_size, dims, result, kind, seqs):
    """Arguments of shapes only."""
    cache = jax.eval_shape(lambda: allocate(format, 40, page_size, dims))
    live = S((), jnp.int32) if kind == "padded" else None
    table = S((seqs, 300 // page_size + 2), jnp.int32)
    batch = pa.RaggedBatch(table, S((seqs,), jnp.int32), S((seqs + 1,), jnp.int32), live)
    return cache, batch, S((seqs,), jnp.int32) if kind == "starts" else None


def gather_args(rng, format, page_size, dims, result, kind, seqs, most=300):
    """Ragged sequences, empty ones among them, more tokens than the result has rows where there are many of them."""
    kv_lens = rng.integers(0, most if seqs < 9 else 9, seqs).astype(np.int32)
    cache = random_cache(rng, format, 7 + most // page_size, page_size, dims)
    table = rng.integers(-3, cache.num_pages + 3, (seqs, most // page_size + 2), np.int32)
    live = jnp.int32(max(seqs - 1, 1)) if kind == "padded" else None
    batch = pa.RaggedBatch(jnp.asarray(table), jnp.asarray(kv_lens), jnp.zeros(seqs + 1, jnp.int32), live)
    starts = jnp.asarray(rng.integers(0, 40, seqs), jnp.int32) if kind == "starts" else None
    return cache, batch, starts


def gathered_by_definition(cache, batch, starts, **options):
    p, args = gather_problem.prepare(cache, batch, starts=starts, **options)
    return gather_reference.run(p, *args)


def gather_mosaic(cache, batch, starts, **options):
    p, args = gather_problem.prepare(cache, batch, starts=starts, **options)
    assert mosaic_gather.supports(p) is None
    return mosaic_gather.run(p, *args)


def check_gather(run, args, **options):
    """Bit for bit the definition's, on a CPU; a NaN is a NaN."""
    with jax.default_device(jax.devices("cpu")[0]):
        want = [np.asarray(x) for x in gathered_by_definition(*on_cpu(args), **options)]
    for g, w in zip(run(*args, **options), want, strict=True):
        np.testing.assert_array_equal(np.asarray(g), w)


@pytest.mark.parametrize(("cell", "tile"), [
    (("FP8_DS_MLA", 16, (512, 64), "bf16", "starts", 3), 16384),
    (("FP8_DS_MLA", 64, (512, 64), "raw", "padded", 3), 8192),
    (("E4M3_TENSOR", 16, (48, 16), "f16", "starts", 3), 1024),
    (("E5M2_TENSOR", 1, (48, 16), "f32", "whole", 2), 2048),
    (("BF16", 10, (48, 16), "bf16", "starts", 3), 2048),
], ids=lambda c: "-".join(map(str, c)) if isinstance(c, tuple) else "")  # fmt: skip
def test_gather_interpreted(cell, tile, rng, monkeypatch):
    monkeypatch.setattr(mosaic_gather, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_gather, "SMS", 2)
    monkeypatch.setattr(mosaic_gather, "MOST_CTAS", 1)
    monkeypatch.setattr(mosaic_gather, "TILE_BYTES", tile)
    mosaic_gather.plan.cache_clear()
    check_gather(gather_mosaic, gather_args(rng, *cell, most=90), **keywords(cell[3], 90))
    mosaic_gather.plan.cache_clear()


def lower_gather(*cell):
    step = jax.jit(functools.partial(gather_mosaic, **keywords(cell[3])))
    return step.trace(*gathering(*cell)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cell", GATHERS[::12], ids=lambda c: "-".join(map(str, c)))
def test_gather_lowers_to_one_launch(cell):
    assert lower_gather(*cell).count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", GATHERS, ids=lambda c: "-".join(map(str, c)))
def test_every_gather_lowers(cell):
    lower_gather(*cell)


@pytest.mark.parametrize(("cell", "reason"), [
    (("BF16", 16, (56, 16), "bf16", "whole", 2), "no rows of 72 numbers"),
    (("BF16", 16, (1152, 64), "bf16", "whole", 2), "no rows of 1216 numbers"),
    (("BF16", 16, (48, 16), "bf16", "whole", 4097), "more than 4096 sequences"),
], ids=str)  # fmt: skip
def test_gather_refuses(cell, reason):
    cache, batch, starts = gathering(*cell)
    p, _ = gather_problem.prepare(cache, batch, starts=starts, **keywords(cell[3]))
    assert mosaic_gather.supports(p) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("cell", GATHERS, ids=lambda c: "-".join(map(str, c)))
def test_gather_on_gpu(cell, rng):
    run = jax.jit(gather_mosaic, static_argnames=("max_tokens", "raw", "dtype"))
    check_gather(run, gather_args(rng, *cell), **keywords(cell[3]))


@pytest.mark.gpu
@pytest.mark.parametrize("result", ["raw", "bf16"])
def test_long_sequences_on_gpu(result, rng):
    """Every CTA has many tiles of each."""
    cell = ("FP8_DS_MLA", 64, (512, 64), result, "starts", 4)
    check_gather(gather_mosaic, gather_args(rng, *cell, most=30000), **keywords(result, 100000))


@pytest.mark.gpu
def test_wild_numbers_on_gpu():
    """Pages, lengths and starts from anywhere: nothing outside the cache is read, and every row that is there is."""
    cache = pa.LatentCache(jnp.full((4, 16, 64), 7.0), pa.F32, rope_dim=16)
    table = jnp.array([[2**31 - 1, -1, 3], [0, -(2**31), 99], [4, 1, 2]], jnp.int32)
    batch = pa.RaggedBatch(table, jnp.array([2**31 - 1, -5, 48], jnp.int32), jnp.zeros(4, jnp.int32), jnp.int32(99))
    gather = jax.jit(functools.partial(gather_mosaic, max_tokens=64))
    rows, cu_lens = gather(cache, batch, jnp.array([-7, 3, 2**31 - 1]))
    np.testing.assert_array_equal(np.asarray(cu_lens), [0, 48, 48, 48])
    np.testing.assert_array_equal(np.asarray(rows, np.float32)[:48], 7)
    assert not np.asarray(rows, np.float32)[48:].any()


@pytest.mark.gpu
def test_one_gather_kernel_on_gpu():
    args = gathering("FP8_DS_MLA", 64, (512, 64), "bf16", "whole", 3)
    text = jax.jit(functools.partial(gather_mosaic, **keywords("bf16"))).lower(*args).compile().as_text() or ""
    assert "mosaic_gpu" in text
    assert "fusion(" not in text
    assert "copy(" not in text
