"""The Hopper decode kernel: what it refuses, that it lowers, what it computes (interpreted on a CPU, or on a GPU)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import library_options, make, relative_error
from test_golden import assert_matches_upstream, library_problem

import pallas_attn as pa
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.paged_attention import mosaic_decode
from pallas_attn.ops.paged_attention.problem import prepare

SINKS = np.linspace(-1, 2, 32).astype(np.float32)
OPTIONS = {
    "plain": {},
    "window": {"window": 70},
    "window 1": {"window": 1},
    "window not causal": {"causal": False, "window": 70},
    "soft cap": {"soft_cap": np.float32(2.0)},
    "no soft cap": {"soft_cap": np.float32(0.0)},
    "sinks": {"sinks": SINKS},
    "all": {"window": 150, "soft_cap": np.float32(3.0), "sinks": SINKS, "scale": np.float32(0.2)},
}
QUERIES = (None, "E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD")
FORMATS = ("E4M3_TENSOR", "E4M3_HEAD", "E4M3_SEQ_HEAD")
PAGES = (16, 32, 64, 128, 256)
HEADS = ((4, 1), (4, 4), (6, 2), (16, 2), (16, 1), (20, 2))


def cells(count):
    """A spread of (format, layout, page size, heads, query, option): each value of each meets many of the others."""
    lists = (FORMATS, ("NHD", "HND"), PAGES, HEADS, QUERIES, list(OPTIONS))
    steps = (1, 1, 2, 5, 3, 4)
    for i in range(count):
        yield tuple(x[(i * s + i // len(x)) % len(x)] for x, s in zip(lists, steps, strict=True))


def problem(rng, format, page_size, heads, q_format, kv_lens=(1, 64, 0, 63, 200, 65, 5), q_lens=(1, 1, 1, 1, 1, 0, 1)):
    return make(rng, format, q_lens, kv_lens, heads=heads, dim=128, page_size=page_size, q_format=q_format)


def options_for(name, heads):
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = options["sinks"][: heads[0]]
    return options


def check(rng, run, format, layout, page_size, heads, q_format, option, **shape):
    random = problem(rng, format, page_size, heads, q_format, **shape)
    q, cache, batch = random.arguments(layout, max_q_len=1)
    options = options_for(option, heads)
    out, lse = run(q, cache, batch, out=jnp.float32, return_lse=True, **library_options(**options))
    if not options.get("soft_cap", 1):
        del options["soft_cap"]  # a cap of 0 is none
    want, want_lse = random.expected(**options)
    assert relative_error(out, want) < 2.5e-3
    # An error of 3e-4 in a product of the matrix unit is one of the logits' magnitude here.
    np.testing.assert_allclose(lse, want_lse, atol=1e-2)


def interpreted(q, cache, batch, **options):
    return mosaic_decode.run(*_flat(*prepare(q, cache, batch, **options)))


def _flat(p, args):
    assert mosaic_decode.supports(p) is None
    return (p, *args)


@pytest.mark.parametrize("cell", list(cells(6)), ids=lambda c: "-".join(map(str, c)))
def test_interpreted(cell, rng, monkeypatch):
    monkeypatch.setattr(mosaic_decode, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_decode, "SMS", 2)
    check(rng, interpreted, *cell, kv_lens=(1, 64, 0, 130), q_lens=(1, 1, 1, 1))


S = jax.ShapeDtypeStruct


def lower(layout, page_size, group, q, format=pa.E4M3_TENSOR, **options):
    """Lower for a GPU that is not there: layouts, transforms and shared memory are checked."""
    cache = abstract_cache(format, layout, pages=64, page_size=page_size, heads=2, dim=128, seqs=4)
    batch = pa.RaggedBatch(S((4, 8), jnp.int32), S((4,), jnp.int32), S((5,), jnp.int32), max_q_len=1)
    values = S((4, 2 * group, 128), jnp.float8_e4m3fn if q == "fp8" else q)
    query = pa.Quantized(values, S((), jnp.float32), pa.E4M3_STATIC) if q == "fp8" else values
    step = jax.jit(lambda *args: pa.paged_attention(*args, backend="mosaic", **options))
    return step.trace(query, cache, batch).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("layout", "page_size"), list(itertools.product((pa.NHD, pa.HND), PAGES)), ids=str)
def test_lowers_for_every_page(layout, page_size):
    text = lower(layout, page_size, 4, jnp.bfloat16).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2  # the kernel and the combine


@pytest.mark.parametrize("q", ["fp8", jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize("group", [1, 8, 16])
def test_lowers_for_every_query(q, group):
    lower(pa.HND, 64, group, q, return_lse=True)


def test_lowers_with_every_option():
    lower(
        pa.HND, 64, 4, jnp.bfloat16, mask=pa.Mask(window=9), soft_cap=5.0, sinks=jnp.zeros(8), out=(pa.E4M3_STATIC, 0.5)
    )


REFUSED = {
    "prefill": ({"max_q_len": None}, "max_q_len == 1"),
    "bf16 cache": ({"format": pa.BF16}, "no BF16 cache"),
    "e5m2 cache": ({"format": pa.E5M2_TENSOR}, "no E5M2_TENSOR cache"),
    "token-head": ({"format": pa.E4M3_TOKEN_HEAD}, "no E4M3_TOKEN_HEAD cache"),
    "packed": ({"layout": pa.PACKED}, "no PACKED layout"),
    "dim": ({"dim": 64}, "no head dim 64"),
    "page": ({"page_size": 8}, "no page size 8"),
    "group": ({"group": 17}, "no 17 query heads per kv head"),
    "ALiBi": ({"bias": pa.Bias(alibi_slopes=S((8,), jnp.float32))}, "no ALiBi"),
}


@pytest.mark.parametrize(("change", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, reason):
    new = {
        "max_q_len": 1,
        "format": pa.E4M3_TENSOR,
        "layout": pa.NHD,
        "page_size": 64,
        "dim": 128,
        "group": 4,
        **change,
    }
    max_q_len, format, layout, page_size, dim, group = (
        new.pop(n) for n in ("max_q_len", "format", "layout", "page_size", "dim", "group")
    )
    cache = abstract_cache(format, layout, page_size=page_size, dim=dim)
    batch = pa.RaggedBatch(S((4, 8), jnp.int32), S((4,), jnp.int32), S((5,), jnp.int32), max_q_len=max_q_len)
    q = S((4, 2 * group, dim), jnp.bfloat16)
    assert reason in mosaic_decode.supports(prepare(q, cache, batch, **new)[0])
    with pytest.raises(pa.Unsupported, match=reason):
        jax.eval_shape(
            lambda q, cache, batch: pa.paged_attention(q, cache, batch, backend="mosaic", **new), q, cache, batch
        )


def on_gpu(q, cache, batch, **options):
    return jax.jit(lambda *args: pa.paged_attention(*args, backend="mosaic", **options))(q, cache, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", list(cells(120)), ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    check(rng, on_gpu, *cell)


@pytest.mark.gpu
def test_ragged_batches_on_gpu(rng):
    """Lengths from nothing to many tiles, more sequences than workers and fewer; one compilation each."""
    for seqs, longest in ((1, 9000), (7, 3000), (200, 300)):
        for _ in range(4):
            lens = tuple(int(x) for x in rng.integers(0, longest, seqs))
            live = tuple(int(x) for x in rng.integers(0, 2, seqs))
            shape = {"kv_lens": lens, "q_lens": live}
            check(rng, on_gpu, "E4M3_HEAD", "HND", 64, (8, 2), None, "plain", **shape)


@pytest.mark.gpu
def test_same_input_same_bits(rng):
    args = problem(rng, "E4M3_TENSOR", 64, (32, 8), None, kv_lens=(5000, 77, 1200), q_lens=(1, 1, 1)).arguments(
        "HND", max_q_len=1
    )
    step = jax.jit(lambda *args: pa.paged_attention(*args, backend="mosaic", return_lse=True))
    first = [np.asarray(x) for x in step(*args)]
    for _ in range(100):
        for x, y in zip(first, step(*args), strict=True):
            np.testing.assert_array_equal(x, np.asarray(y))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ua_3d_kvfp8", "flashinfer_decode", "flashinfer_decode_softcap"])
def test_goldens_on_gpu(name):
    (q, cache, batch), options = library_problem(name)
    out, lse = on_gpu(q, cache, dataclasses.replace(batch, max_q_len=1), **options)
    # FP8 products are summed in less than float32 by the matrix unit.
    assert_matches_upstream(name, out, lse, lse_atol=1e-3)


@pytest.mark.gpu
def test_fp8_output_on_gpu(rng):
    random = problem(rng, "E4M3_TENSOR", 64, (8, 2), "E4M3_TENSOR")
    out = on_gpu(*random.arguments("NHD", max_q_len=1), out=(pa.E4M3_STATIC, jnp.float32(0.01)))
    assert out.format == pa.E4M3_STATIC
    assert relative_error(pa.dequantize(out), random.expected()[0]) < 0.04
