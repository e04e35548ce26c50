"""The Triton kernels of MLA: what they refuse, what they compute (interpreted on a CPU, or on a GPU), and that they
compile ahead of time for every generation."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
from cover import pairwise
from oracle import BF16, F16
from problems import relative_error
from test_mosaic_mla import abstract, listed
from test_triton import SHARED, compiler, generation, interpreted, interpreter, launches_of  # noqa: F401

import pallas_attn as pa
from pallas_attn.core.arch import Arch
from pallas_attn.core.quantized import quantize
from pallas_attn.ops.mla import triton as mla
from pallas_attn.ops.mla.problem import outputs, prepare
from pallas_attn.runtime import dispatch
from pallas_attn.runtime import triton as bridge

S = jax.ShapeDtypeStruct
SCALE = 0.11
QUERIES = {"bf16": BF16, "f16": F16}


@pytest.fixture
def whole_rows(monkeypatch):
    """The width of rows that models have."""
    monkeypatch.setattr(latents, "dims_of", lambda format: (512, 64))


def runner(config=None):
    def run(*arguments, **options):
        p, args = prepare(*arguments, **options)
        assert mla.supports(p) is None
        return mla.run(p, *args, config=config)

    return run


def problem(rng, format, query, heads, page_size, shape):
    given = {"q_dtype": QUERIES[query]} if query in QUERIES else {"q_format": query}
    return latents.make(rng, format, **shape, heads=heads, page_size=page_size, **given)


def assert_close(got, want):
    (out, lse), (want, want_lse) = got, want
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    assert relative_error(out, want) <= 1e-2  # of any row
    np.testing.assert_allclose(lse, want_lse, atol=1e-2)


def check(rng, run, format, query, heads, page_size, shape):
    random = problem(rng, format, query, heads, page_size, shape)
    most = max(shape["q_lens"])
    got = run(*random.arguments(max_q_len=most), scale=SCALE, out=jnp.float32, return_lse=True)
    assert_close(got, random.expected(SCALE))


def check_listed(rng, run, format, query, heads, keys, by_slot, shape):
    random = problem(rng, format, query, heads, 16, shape)
    positions, slots, counts, seen = listed(rng, random, keys, cut=True)
    topk = pa.TopK(jnp.asarray(slots if by_slot else positions), jnp.asarray(counts), by_slot)
    got = run(*random.arguments(), scale=SCALE, out=jnp.float32, return_lse=True, topk=topk)
    assert_close(got, random.expected(SCALE, seen))


# ---------------------------------------------------------------- refusals, configurations, tracing

REFUSED = {
    "latent": ({"latent": 640}, "no latent of 640 with a rotary part of 64"),
    "integers": ({"q_format": pa.INT8_TOKEN_HEAD}, "no INT8_TOKEN_HEAD query"),
    "wide": ({"dtype": jnp.float32}, "no F32 query on a BF16 cache"),
    "no sequence": ({"seqs": 0}, "an empty call"),
}


def asked(latent=512, seqs=3, q_format=None, tokens=5, heads=16, dtype=jnp.bfloat16, **options):
    cache = pa.LatentCache(S((4, 16, latent + 64), jnp.bfloat16), pa.BF16)
    batch = pa.RaggedBatch(S((seqs, 4), jnp.int32), S((seqs,), jnp.int32), S((seqs + 1,), jnp.int32))

    def query(dim):
        if q_format is None:
            return S((tokens, heads, dim), dtype)
        return pa.Quantized(S((tokens, heads, dim), q_format.dtype), S((tokens, heads), jnp.float32), q_format)

    return prepare(query(latent), query(64), cache, batch, scale=SCALE, **options)[0]


@pytest.mark.parametrize(("change", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, reason):
    assert mla.supports(asked(**change)) == reason


DECODE, PREFILL, LISTED_BF16 = {}, {"tokens": None}, {"topk": S((8, 64), jnp.int32)}


@pytest.mark.parametrize(("change", "arch", "backend", "reason"), [
    (DECODE, Arch.HOPPER, "mosaic", None),
    (DECODE | {"w_uv": S((128, 512, 128), jnp.bfloat16)}, Arch.HOPPER, "mosaic", None),
    (PREFILL, Arch.HOPPER, "mosaic", None),
    ({"heads": 256}, Arch.HOPPER, "triton", "mosaic: no 256 heads"),
    (LISTED_BF16, Arch.HOPPER, "mosaic", None),
    ({"format": "F32", "heads": 64}, Arch.HOPPER, "xla", "triton: no BF16 query on a F32 cache"),
    (DECODE, Arch.AMPERE, "triton", "mosaic: only on HOPPER"),
], ids=["decode", "projected", "prefill", "many heads", "listed", "f32", "ampere"])  # fmt: skip
def test_what_a_gpu_runs(change, arch, backend, reason, monkeypatch):
    """Mosaic, then what it refuses; the packages are taken for granted."""
    monkeypatch.setattr(dispatch, "present_arch", lambda: arch)
    monkeypatch.setattr(dispatch, "missing", lambda needs: None)
    dispatch._warn_once.cache_clear()
    arguments, options = abstract(**change)
    p = prepare(*arguments, **options)[0]
    told = contextlib.nullcontext() if reason is None else pytest.warns(pa.FallbackWarning, match=reason)
    with told:
        assert dispatch.choose(dispatch.OPS["mla_attention"], p, "cuda").name == backend


def test_keys_are_shared_where_programs_are_few():
    """By powers of two, none shorter than four tiles of keys."""
    few = abstract("BF16", 128, 1, 64, seqs=1)
    p = prepare(*few[0], **few[1])[0]  # 512 tokens
    assert mla.choose(p).splits == 4
    assert mla.choose(dataclasses.replace(p, pages_per_seq=2)).splits == 1
    assert mla.choose(dataclasses.replace(p, seqs=200, tokens=200)).splits == 1


# (format, heads, tokens, page size, format of the query), options
COMPILED = {
    "bf16": (("BF16", 128, 1, 64), {}),
    "prefill": (("BF16", 16, None, 16), {"return_lse": True, "out": (pa.E4M3_STATIC, 0.5)}),
    "f16": (("F16", 40, 2, 64), {}),
    "fp8": (("E4M3_TENSOR", 128, 1, 64), {}),
    "fp8, bf16 query": (("E4M3_TENSOR", 128, 1, 64, "none"), {"out": pa.e4m3_group(128)}),
    "e5m2": (("E5M2_TENSOR", 16, None, 64, "E4M3_TOKEN_HEAD"), {}),
    "up-projected": (("BF16", 16, 1, 64), {"w_uv": S((16, 512, 128), jnp.bfloat16)}),
    "rows": (("FP8_DS_MLA", 128, 1, 64), {}),
    "listed rows": (("FP8_DS_MLA", 128, 1, 64), {"topk": pa.TopK(S((8, 2048), jnp.int32), slots=True)}),
    "listed": (("BF16", 16, None, 64), {"topk": pa.TopK(S((8, 100), jnp.int32), S((8,), jnp.int32))}),
}


def compiled_case(name):
    cell, keywords = COMPILED[name]
    bare = cell[4:] == ("none",)
    arguments, options = abstract(*(cell[:4] if bare else cell), **keywords)
    if bare:
        arguments = (*(S(q.shape, jnp.bfloat16) for q in arguments[:2]), *arguments[2:])
    return arguments, options


def launches(name):
    arguments, options = compiled_case(name)
    topk, w_uv = options.pop("topk", None), options.pop("w_uv", None)
    run = lambda arguments, topk, w_uv: runner()(*arguments, topk=topk, w_uv=w_uv, **options)  # noqa: E731
    p = prepare(*arguments, topk=topk, w_uv=w_uv, **options)[0]
    assert jax.eval_shape(run, arguments, topk, w_uv) == outputs(p)
    return launches_of(run, arguments, topk, w_uv)


@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize("name", COMPILED)
def test_traces_where_triton_is_missing(name, arch, generation):  # noqa: F811
    """Bytes stand for FP8 before Ada."""
    generation(arch)
    for launch, inputs in launches(name):
        every = {str(x.dtype) for x in (*inputs, *launch.out)}
        assert arch.has_fp8 or not any("float8" in x for x in every)
        assert launch.name in ("attend", "attend_listed", "merge")


@compiler
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_ahead_of_time(name, arch, generation):  # noqa: F811
    """Down to machine code, within the shared memory of the generation."""
    generation(arch)
    for launch, inputs in launches(name):
        kernel = bridge.compile_for(arch, launch, inputs)
        assert f".target {arch.sm}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED[arch] * 1024


# ---------------------------------------------------------------- results

SMALL = {"q_lens": (1, 5, 0, 17, 3, 2, 4), "kv_lens": (9, 5, 0, 40, 0, 33, 2)}
INTERPRETED = [
    ("BF16", "bf16", 3, 16), ("F16", "E4M3_HEAD", 5, 1),
    ("E4M3_TENSOR", "E4M3_TOKEN_HEAD", 3, 8), ("E4M3_TENSOR", "bf16", 20, 16), ("E5M2_TENSOR", "f16", 2, 16),
    ("BF16", "E4M3_TENSOR", 2, 64), ("FP8_DS_MLA", "bf16", 2, 16),
]  # fmt: skip
LISTED = [
    ("FP8_DS_MLA", "bf16", 3, 40, True), ("BF16", "bf16", 18, 40, False), ("E4M3_TENSOR", "E4M3_TENSOR", 2, 20, False),
    ("FP8_DS_MLA", "E4M3_HEAD", 1, 40, False),
]  # fmt: skip
name = lambda cell: "-".join(map(str, cell))  # noqa: E731


@interpreter
@pytest.mark.parametrize("cell", INTERPRETED, ids=name)
def test_interpreted(cell, rng, interpreted, generation):  # noqa: F811
    """Sequences of several tiles and of none, blocks of rows that share tokens, padding."""
    i = INTERPRETED.index(cell)
    generation(Arch.AMPERE if i % 2 else Arch.HOPPER)
    check(rng, runner(mla.Config(16, 16, 1 + i // 2 % 2, 4, 2)), *cell, SMALL)


@interpreter
@pytest.mark.parametrize("cell", LISTED, ids=name)
def test_interpreted_listed(cell, rng, interpreted, generation):  # noqa: F811
    odd = LISTED.index(cell) % 2
    generation(Arch.AMPERE if odd else Arch.HOPPER)
    shape = {"q_lens": (1, 3, 0, 4), "kv_lens": (9, 50, 0, 40)}
    check_listed(rng, runner(mla.Config(16, 16, 1 + odd, 4, 2)), *cell, shape)


OUTPUTS = [(pa.E4M3_STATIC, 0.01), (pa.E5M2_STATIC, 0.01), pa.e4m3_group(64, order="tma"), jnp.float16]


def check_output(rng, run, out, projected):
    """What the float32 result becomes by its one rounding, but for its own error."""
    random = problem(rng, "BF16", "bf16", 4, 16, SMALL)
    w_uv = jnp.asarray(rng.standard_normal((4, random.dims[0], 64)), jnp.bfloat16) if projected else None
    got = run(*random.arguments(), scale=SCALE, out=out, w_uv=w_uv, return_lse=True)
    want = random.expected(SCALE)[0]
    if projected:
        want = np.einsum("thc,hcv->thv", want, np.asarray(w_uv, np.float64))
    format, scale = out if isinstance(out, tuple) else (out, None)
    want = np.asarray(want, np.float32)
    if out is jnp.float16:
        assert relative_error(np.asarray(got[0]).reshape(want.shape), want) < 1e-2
        return
    if projected or scale is None:
        want = want.reshape(len(want), -1)
    whole = quantize(jnp.asarray(want), format, scale)
    codes = np.asarray(got[0], np.float32)
    assert np.mean(codes != np.asarray(whole.values, np.float32).reshape(codes.shape)) < 0.05
    if scale is None:
        np.testing.assert_allclose(got[1], whole.scale, rtol=1e-2)


@interpreter
@pytest.mark.parametrize("projected", [False, True], ids=["latents", "projected"])
@pytest.mark.parametrize("out", OUTPUTS, ids=["static", "e5m2", "groups", "f16"])
def test_interpreted_output(out, projected, rng, interpreted, generation, monkeypatch):  # noqa: F811
    generation(Arch.AMPERE)
    monkeypatch.setattr(latents, "dims_of", lambda format: (64, 16))  # a group
    check_output(rng, runner(mla.Config(16, 32, 2 if projected else 1, 4, 2)), out, projected)


def jitted(config=None):
    run = runner(config)
    return lambda *a, topk=None, w_uv=None, **k: jax.jit(
        lambda a, topk, w_uv: run(*a, topk=topk, w_uv=w_uv, **k)
    )(a, topk, w_uv)  # fmt: skip


SHAPES = {
    "mixed": {"q_lens": (1, 70, 0, 130, 3, 2, 4), "kv_lens": (200, 70, 0, 300, 0, 133, 2)},
    "decode": {"q_lens": (1, 1, 1, 1, 0, 1, 1), "kv_lens": (300, 64, 0, 1, 9, 3000, 65)},
    "speculative": {"q_lens": (4, 1, 4, 3, 0, 2, 4), "kv_lens": (300, 64, 0, 3, 9, 700, 2)},
}
KINDS_ON_GPU = (
    ("BF16", "bf16"), ("F16", "f16"), ("BF16", "E4M3_TENSOR"), ("E4M3_TENSOR", "bf16"), ("E4M3_TENSOR", "f16"),
    ("E4M3_TENSOR", "E4M3_TOKEN_HEAD"), ("E5M2_TENSOR", "E4M3_HEAD"), ("FP8_DS_MLA", "bf16"),
    ("FP8_DS_MLA", "E4M3_TENSOR"),
)  # fmt: skip
# Cache and query, heads, page size, shape: every pair of these.
ON_GPU = [(*c[0], *c[1:]) for c in pairwise((KINDS_ON_GPU, (128, 16, 5), (64, 16, 1), list(SHAPES)))]
LISTED_ON_GPU = [(*c[0], *c[1:]) for c in pairwise((
    (("FP8_DS_MLA", "bf16"), ("BF16", "bf16"), ("E4M3_TENSOR", "E4M3_HEAD"), ("FP8_DS_MLA", "E4M3_TENSOR")),
    (128, 16, 40), (2048, 100), (False, True), list(SHAPES),
))]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ON_GPU, ids=name)
def test_on_gpu(cell, rng, whole_rows):
    check(rng, jitted(), *cell[:-1], SHAPES[cell[-1]])


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("cell", ON_GPU[::4], ids=name)
def test_as_on_ampere_on_gpu(cell, splits, rng, whole_rows, generation):  # noqa: F811
    """Conversion by integer arithmetic and the configuration of old GPUs, on whatever GPU is here."""
    generation(Arch.AMPERE)
    check(rng, jitted(mla.Config(32, 32, splits, 8, 2)), *cell[:-1], SHAPES["speculative"])


@pytest.mark.gpu
@pytest.mark.parametrize("cell", LISTED_ON_GPU, ids=name)
def test_listed_on_gpu(cell, rng, whole_rows):
    check_listed(rng, jitted(), *cell[:-1], SHAPES[cell[-1]])


@pytest.mark.gpu
@pytest.mark.parametrize("projected", [False, True], ids=["latents", "projected"])
@pytest.mark.parametrize("out", OUTPUTS, ids=["static", "e5m2", "groups", "f16"])
def test_output_on_gpu(out, projected, rng, whole_rows):
    check_output(rng, jitted(), out, projected)


@pytest.mark.gpu
def test_same_bits_every_time_on_gpu(rng, whole_rows):
    random = problem(rng, "BF16", "bf16", 128, 64, SHAPES["decode"])
    run, arguments = jitted(), random.arguments(max_q_len=1)
    first, *others = (jax.tree.map(np.asarray, run(*arguments, scale=SCALE, return_lse=True)) for _ in range(5))
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))
