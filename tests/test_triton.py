"""The Triton kernels: what they refuse, what they compute (interpreted on a CPU, or on a GPU), and that they compile
ahead of time for every generation."""

import dataclasses
import functools
import importlib.util
import itertools
import os

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_gather_kv
import test_mosaic_gather
import test_mosaic_write
from cover import pairwise
from problems import FORMATS, LAYOUTS, library_options, make, relative_error
from test_conformance import OPTIONS
from test_golden import assert_matches_upstream, library_problem
from test_golden import test_write_kv as golden_write

import pallas_attn as pa
from pallas_attn.core.arch import Arch
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.gather_kv import reference as gather_reference
from pallas_attn.ops.gather_kv import triton as gather
from pallas_attn.ops.gather_kv.problem import prepare as prepare_gather
from pallas_attn.ops.kv_cache import triton as write
from pallas_attn.ops.kv_cache.problem import prepare as prepare_write
from pallas_attn.ops.paged_attention import triton as attention
from pallas_attn.ops.paged_attention.problem import prepare
from pallas_attn.runtime import dispatch
from pallas_attn.runtime import triton as bridge

S = jax.ShapeDtypeStruct
HERE = importlib.util.find_spec("triton") is not None
INTERPRETED = HERE and os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="`make triton` runs it, with triton and TRITON_INTERPRET=1")
compiler = pytest.mark.skipif(not HERE or INTERPRETED, reason="`make triton` runs it, with triton")

# Query tokens and cached tokens of the real sequences; two of padding follow.
BATCHES = {
    "mixed": ((1, 70, 0, 130, 3, 2, 4), (200, 70, 0, 300, 0, 133, 2)),
    "decode": ((1, 1, 1, 1, 0, 1, 1), (300, 64, 0, 1, 9, 1000, 65)),
    "few tokens": ((4, 1, 4, 3, 0, 2, 4), (300, 64, 0, 3, 9, 700, 2)),
}
MOST = {"mixed": None, "decode": 1, "few tokens": 4}
SMALL = {  # the same, shorter
    "mixed": ((1, 5, 0, 17, 3, 2, 4), (9, 5, 0, 40, 0, 33, 2)),
    "decode": ((1, 1, 1, 1, 0, 1, 1), (40, 16, 0, 1, 9, 33, 2)),
    "few tokens": ((4, 1, 4, 3, 0, 2, 4), (40, 16, 0, 3, 9, 33, 2)),
}
QUERIES = {"bf16": oracle.BF16, "f16": oracle.F16, "f32": oracle.F32}
LISTS = (
    list(FORMATS),
    LAYOUTS,
    (1, 16, 32, 64, 256),  # page size
    ((64, 64), (128, 128), (256, 256), (80, 80), (192, 128)),  # head dims
    ((4, 1), (4, 4), (6, 2), (16, 2), (16, 1), (5, 1), (64, 1)),  # heads
    (*QUERIES, "E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD", "E5M2_TENSOR"),
    list(BATCHES),
)


def possible(cell):
    format, layout, page_size, (dim, v_dim) = cell[:4]
    return oracle.can_hold(layout, page_size, dim, v_dim, np.dtype(FORMATS[format][0]).itemsize)


# Every pair of these; the options take turns.
CELLS = [(*cell[:-1], option, cell[-1]) for cell, option in zip(pairwise(LISTS, possible), itertools.cycle(OPTIONS))]


def options_for(name, heads):
    """Of a name, for so many heads and for the longest of the sequences above."""
    options = dict(OPTIONS[name])
    if "query_query" in options:
        options["query_query"] = np.random.default_rng(7).standard_normal((130, 90)).astype(np.float32)
    return {n: np.resize(x, heads) if n in ("sinks", "alibi_slopes") else x for n, x in options.items()}


def check(rng, run, format, layout, page_size, dims, heads, query, option, kind, batches=BATCHES):
    q_lens, kv_lens = batches[kind]
    random = make(
        rng, format, q_lens, kv_lens, heads=heads, dim=dims[0], v_dim=dims[1], page_size=page_size,
        q_format=None if query in QUERIES else query, q_dtype=QUERIES.get(query, oracle.F32),
    )  # fmt: skip
    options = options_for(option, heads[0])
    args = random.arguments(layout, max_q_len=MOST[kind])
    out, lse = run(*args, out=jnp.float32, return_lse=True, **library_options(**options))
    want, want_lse = random.expected(**options)
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    assert relative_error(out, want) <= 1e-2  # of any row
    np.testing.assert_allclose(lse, want_lse, atol=1e-2)


@pytest.fixture
def generation(monkeypatch):
    """Sets the GPU that kernels are made for."""
    return lambda arch: monkeypatch.setattr(dispatch, "present_arch", lambda: arch)


@pytest.fixture
def interpreted(monkeypatch):
    from triton_interpreter import interpret

    monkeypatch.setattr(bridge, "INTERPRET", interpret)


def run_attention(*args, config=None, **options):
    p, args = prepare(*args, **options)
    assert attention.supports(p) is None
    return attention.run(p, *args, config=config)


def run_write(*args):
    p, args = prepare_write(*args)
    assert write.supports(p) is None
    return write.run(p, *args)


# The interpreter takes a program at a time: cells that are small.
FEW = [c for c in CELLS if c[2] <= 64 and max(c[3]) <= 128 and c[4][0] <= 6]


@interpreter
@pytest.mark.parametrize("cell", FEW[::3], ids=lambda c: "-".join(map(str, c)))
def test_interpreted(cell, rng, interpreted, generation):
    generation(Arch.AMPERE if FEW.index(cell) % 2 else Arch.HOPPER)
    run = functools.partial(run_attention, config=attention.Config(16, 32, 1, 4, 3))
    check(rng, run, *cell, batches=SMALL)


@interpreter
@pytest.mark.parametrize("option", [*list(OPTIONS)[::3], "everything"])
def test_interpreted_option(option, rng, interpreted, generation):
    """Of a configuration with two shares, so that each is seen by parts and merged."""
    generation(Arch.ADA)
    config = attention.Config(16, 16, 2, 4, 3)
    run = functools.partial(run_attention, config=config)
    cell = ("E4M3_HEAD", "NHD", 16, (64, 64), (2, 1), "f32", option, "mixed")
    check(rng, run, *cell, batches=SMALL)


WRITE_LAYOUTS = [c for c in test_mosaic_write.CELLS if c[-1] < 100 and c[4] <= 12]
WRITE_SHUFFLED = [(f, "SHUFFLE", 16, (64, 64), 2, "bf16", 7) for f in ("E4M3_TENSOR", "INT8_TOKEN_HEAD", "BF16")]


@interpreter
@pytest.mark.parametrize("cell", WRITE_LAYOUTS[::5] + WRITE_SHUFFLED, ids=lambda c: "-".join(map(str, c)))
def test_interpreted_write(cell, rng, interpreted, generation, monkeypatch):
    monkeypatch.setattr(write, "PROGRAMS", 10)  # so that some have several rows
    generation(Arch.AMPERE if len(cell[0]) % 2 else Arch.HOPPER)
    test_mosaic_write.check(rng, run_write, *cell)


def asked(head_dim=128, group=4, tokens=4, seqs=3, **options):
    """The problem of an attention call of shapes only."""
    cache = abstract_cache(pa.E4M3_TENSOR, pa.NHD, dim=head_dim)
    batch = pa.RaggedBatch(S((seqs, 4), jnp.int32), S((seqs,), jnp.int32), S((seqs + 1,), jnp.int32))
    return prepare(S((tokens, 2 * group, head_dim), jnp.bfloat16), cache, batch, **options)[0]


INTEGERS = dataclasses.replace(pa.E4M3_STATIC, name="INT8_STATIC", dtype=pa.INT8_TOKEN_HEAD.dtype)
REFUSED = {
    "dim": ({"head_dim": 320}, "no head dims (320, 320)"),
    "group": ({"group": 129}, "no 129 query heads per kv head"),
    "output": ({"out": (INTEGERS, 0.5)}, "no INT8_STATIC output"),
    "no token": ({"tokens": 0}, "an empty call"),
    "no sequence": ({"seqs": 0}, "an empty call"),
}


@pytest.mark.parametrize(("change", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, reason):
    assert attention.supports(asked(**change)) == reason


def test_write_refuses():
    wide = test_mosaic_write.abstract("E4M3_TENSOR", "NHD", 16, (2048, 2048), 2, "bf16", 4)
    assert write.supports(prepare_write(*wide)[0]) == "no head dims (2048, 2048)"
    nothing = test_mosaic_write.abstract("E4M3_TENSOR", "NHD", 16, (128, 128), 2, "bf16", 0)
    assert write.supports(prepare_write(*nothing)[0]) == "an empty call"


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_takes_every_cell(cell):
    """And cuts the kernel to it."""
    args, options = abstract(*cell)
    p, _ = prepare(*args, **options)
    assert attention.supports(p) is None
    for arch in bridge.ARCHS:
        config = attention.choose(p, arch)
        assert config.rows >= p.group
        assert config.keys >= 16


def test_a_context_is_shared_where_programs_are_few():
    """By powers of two, none shorter than four tiles of keys."""
    batch = pa.RaggedBatch(S((1, 2048), jnp.int32), S((1,), jnp.int32), S((2,), jnp.int32), max_q_len=1)
    p, _ = prepare(S((1, 8, 128), jnp.bfloat16), abstract_cache(pa.E4M3_TENSOR, pa.NHD), batch)
    assert attention.choose(p, Arch.HOPPER).splits == attention.MOST_SPLITS
    short = dataclasses.replace(p, pages_per_seq=16)  # 512 tokens
    assert attention.choose(short, Arch.HOPPER).splits == 2
    assert attention.choose(dataclasses.replace(p, tokens=8192, max_q_len=None), Arch.HOPPER).splits == 1


SHARED = {Arch.AMPERE: 163, Arch.ADA: 99, Arch.HOPPER: 227}  # KiB that a program may have


def launches_of(function, *args):
    """Every launch of a call, with its inputs: traced, so that no GPU is needed."""
    return bridge.launches(jax.make_jaxpr(function)(*args).jaxpr)


def abstract(format, layout, page_size, dims, heads, query, option, kind):
    """(q, cache, batch) of shapes only, and the options."""
    random = make(
        np.random.default_rng(0), format, *BATCHES[kind], heads=heads, dim=dims[0], v_dim=dims[1], page_size=page_size,
        q_format=None if query in QUERIES else query, q_dtype=QUERIES.get(query, oracle.F32),
    )  # fmt: skip
    args = random.arguments(layout, max_q_len=MOST[kind])
    return args, library_options(**options_for(option, heads[0]))


COMPILED = [
    ("E4M3_TENSOR", "NHD", 64, (128, 128), (32, 8), "E4M3_TENSOR", "causal", "mixed"),
    ("E5M2_TENSOR", "HND", 16, (256, 256), (8, 1), "bf16", "window", "decode"),
    ("E4M3_TOKEN_HEAD", "SHUFFLE", 16, (128, 128), (16, 2), "E5M2_TENSOR", "everything", "few tokens"),
    ("INT8_TOKEN_HEAD", "PACKED", 1, (64, 64), (32, 8), "f16", "prefix ranges clamped", "mixed"),
    ("BF16", "INTERLEAVED", 32, (80, 80), (64, 1), "f32", "rswa", "decode"),
    ("F32", "NHD", 16, (192, 128), (4, 4), "bf16", "chunked lookback", "decode"),
]


@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize("cell", COMPILED, ids=lambda c: "-".join(map(str, c)))
def test_traces_where_triton_is_missing(cell, arch, generation):
    """Bytes stand for FP8 before Ada."""
    generation(arch)
    args, options = abstract(*cell)
    out = (pa.E5M2_STATIC, jnp.float32(0.5))
    (launch, inputs), *_ = launches_of(lambda *args: run_attention(*args, out=out, **options), *args)
    fp8 = {"uint8"} if arch is Arch.AMPERE else {"float8_e4m3fn", "float8_e5m2"}
    assert {str(x.dtype) for x in (*inputs, *launch.out) if x.dtype.itemsize == 1} - {"int8"} <= fp8
    got = jax.eval_shape(lambda *args: run_attention(*args, out=out, return_lse=True, **options), *args)
    assert [(x.shape[:2], str(x.dtype)) for x in got] == [
        (args[0].shape[:2], "float8_e5m2"),
        (args[0].shape[:2], "float32"),
    ]


@pytest.mark.parametrize("cell", WRITE_LAYOUTS[::5] + WRITE_SHUFFLED, ids=lambda c: "-".join(map(str, c)))
def test_write_traces_where_triton_is_missing(cell, generation):
    """In place: every leaf that is written is one that comes in."""
    generation(Arch.AMPERE)
    args = test_mosaic_write.abstract(*cell)
    ((launch, _),) = launches_of(run_write, *args)
    assert len(launch.aliases) == (1 if args[0].layout.single else 2) + 2 * (args[0].format.granularity == "token_head")
    assert jax.eval_shape(run_write, *args) == [S(x.shape, x.dtype) for x in jax.tree.leaves(args[0])]


@compiler
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize("cell", COMPILED, ids=lambda c: "-".join(map(str, c)))
def test_compiles_ahead_of_time(cell, arch, generation):
    """Down to machine code, within the shared memory of the generation."""
    generation(arch)
    args, options = abstract(*cell)
    out = (pa.E5M2_STATIC, jnp.float32(0.5)) if cell[-1] == "decode" else None
    found = launches_of(lambda *args: run_attention(*args, out=out, **options), *args)
    for launch, inputs in found:
        kernel = bridge.compile_for(arch, launch, inputs)
        assert kernel.asm["cubin"]
        assert f".target {arch.sm}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED[arch] * 1024
    assert [launch.name for launch, _ in found] == (["attend"] if cell[-1] == "mixed" else ["attend", "merge"])


@compiler
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E5M2_HEAD", "E4M3_TOKEN_HEAD", "INT8_TOKEN_HEAD", "BF16"])
def test_write_compiles_ahead_of_time(format, arch, generation):
    generation(arch)
    cell = (format, "PACKED" if format == "BF16" else "NHD", 16, (128, 128), 8, "bf16", 7)
    args = test_mosaic_write.abstract(*cell)
    ((launch, inputs),) = launches_of(run_write, *args)
    assert bridge.compile_for(arch, launch, inputs).asm["cubin"]


def on_gpu(*args, **options):
    return jax.jit(lambda *args: pa.paged_attention(*args, backend="triton", **options))(*args)


def write_on_gpu(*args):
    return jax.tree.leaves(jax.jit(lambda *args: pa.write_kv(*args, backend="triton"))(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    check(rng, on_gpu, *cell)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS[::10], ids=lambda c: "-".join(map(str, c)))
def test_as_on_ampere_on_gpu(cell, rng, generation):
    """Conversion by integer arithmetic, on whatever GPU is here."""
    generation(Arch.AMPERE)
    check(rng, lambda *args, **options: jax.jit(lambda *a: run_attention(*a, **options))(*args), *cell)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", test_mosaic_write.CELLS[::2] + WRITE_SHUFFLED, ids=lambda c: "-".join(map(str, c)))
def test_write_on_gpu(cell, rng):
    test_mosaic_write.check(rng, write_on_gpu, *cell)


@pytest.mark.gpu
@pytest.mark.parametrize("name", goldens.names("attention"))
def test_goldens_on_gpu(name):
    arguments, options = library_problem(name)
    out, lse = on_gpu(*arguments, **options)
    assert_matches_upstream(name, out.values if isinstance(out, pa.Quantized) else out, lse, lse_atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rcf_triton_fp8", "rcf_triton_pth_fp8", "rcf_cuda_fp8_perhead"])
def test_write_goldens_on_gpu(name):
    golden_write(name, "triton")


# ---------------------------------------------------------------- the gather

# (format, layout, page size, head dims, kv heads, type of the result, kind, sequences): every pair of these
GATHERS = pairwise(
    (
        list(FORMATS), LAYOUTS, (1, 10, 16, 64), ((64, 64), (128, 128), (80, 80), (192, 128), (32, 32)), (1, 2, 5, 8),
        list(test_mosaic_gather.DTYPES), ("whole", "starts", "padded"), (1, 3, 150),
    ),
    lambda c: oracle.can_hold(c[1], c[2], *c[3], np.dtype(FORMATS[c[0]][0]).itemsize)
    and (c[3][0] == c[3][1] or c[1] in ("NHD", "HND")),
)  # fmt: skip
FEW_GATHERS = [c for c in GATHERS if c[4] <= 5]


def run_gather(cache, batch, starts=None, *, backend=None, **keywords):
    """Under the arguments of `test_gather_kv.gather`, whatever the backend."""
    p, args = prepare_gather(cache, batch, starts=starts, **keywords)
    assert gather.supports(p) is None
    return pa.Gathered(*gather.run(p, *args))


def check_gather(rng, run, cell, most=300):
    (cache, batch, starts), keywords = test_mosaic_gather.concrete(rng, *cell, most=most)
    test_mosaic_gather.check(run(cache, batch, starts, **keywords), (cache, batch, starts), keywords)


@interpreter
@pytest.mark.parametrize("cell", FEW_GATHERS[::8], ids=lambda c: "-".join(map(str, c)))
def test_interpreted_gather(cell, rng, interpreted, generation, monkeypatch):
    """The definition's own bits."""
    monkeypatch.setattr(gather, "PROGRAMS", 10)  # so that some have several rows
    generation(Arch.AMPERE if FEW_GATHERS.index(cell) % 2 else Arch.HOPPER)
    check_gather(rng, run_gather, cell, most=40)


@interpreter
@pytest.mark.parametrize("arch", [Arch.AMPERE, Arch.HOPPER])
@pytest.mark.parametrize("dtype", [oracle.BF16, oracle.F16, oracle.F32])
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "E5M2_TENSOR"])
def test_interpreted_gather_rounds_once(format, dtype, arch, interpreted, generation):
    """Every code times a scale, in one rounding; NaN codes too."""
    generation(arch)
    codes = np.arange(256, dtype=np.uint8).view(FORMATS[format][0])
    for scale in test_gather_kv.SCALES[:2]:
        args = test_gather_kv.one_token(codes, scale, format)
        p, own = prepare_gather(*args, max_tokens=1, dtype=dtype)
        for got, want in zip(gather.run(p, *own), gather_reference.run(p, *own), strict=True):
            np.testing.assert_array_equal(np.asarray(got, oracle.F32), np.asarray(want, oracle.F32))


@interpreter
@pytest.mark.parametrize("name", goldens.names("gather"))
def test_interpreted_gather_golden(name, interpreted, monkeypatch):
    """vLLM's own bits."""
    monkeypatch.setattr(test_gather_kv, "gather", run_gather)
    test_gather_kv.test_golden(name, "triton")


@interpreter
@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
def test_interpreted_gather_of_wild_numbers(layout, interpreted, monkeypatch):
    """Nothing outside the cache is read."""
    monkeypatch.setattr(test_gather_kv, "gather", run_gather)
    test_gather_kv.test_wild_numbers(layout, "triton")


def test_gather_takes_every_layout_and_refuses_wide_heads():
    cell = ("E4M3_TENSOR", "NHD", 16, (1040, 1040), 2, "bf16", "whole", 3)
    assert gather.supports(test_mosaic_gather.problem_of(*cell)) == "no head dims (1040, 1040)"
    assert all(gather.supports(test_mosaic_gather.problem_of(*cell)) is None for cell in GATHERS)


def gather_launches(cell):
    """The one launch of a call, and the shapes of its result."""
    args, keywords = test_mosaic_gather.abstract(*cell)
    run = functools.partial(run_gather, **keywords)
    (launch,) = launches_of(run, *args)
    return launch, jax.eval_shape(run, *args)


@pytest.mark.parametrize("cell", GATHERS[::7], ids=lambda c: "-".join(map(str, c)))
def test_gather_traces_where_triton_is_missing(cell, generation):
    """As one launch, to which bytes stand for FP8 before Ada."""
    generation(Arch.AMPERE)
    (launch, inputs), got = gather_launches(cell)
    assert not any("float8" in str(x.dtype) for x in inputs)
    dims, dtype = cell[3], np.dtype(test_mosaic_gather.DTYPES[cell[5]])
    assert got == (*(S((300, cell[4], d), dtype) for d in dims), S((cell[-1] + 1,), jnp.int32))
    assert launch.out == got[:2]
    assert dict(launch.constants)["ROWS"] * launch.grid[0] >= 300 * cell[4]


GATHER_COMPILED = [
    ("E4M3_TENSOR", "NHD", 16, (128, 128), 8, "bf16", "starts", 3),
    ("E5M2_HEAD", "SHUFFLE", 64, (128, 128), 8, "f16", "whole", 3),
    ("E4M3_TOKEN_HEAD", "HND", 16, (192, 128), 5, "f32", "padded", 150),
    ("INT8_TOKEN_HEAD", "INTERLEAVED", 1, (80, 80), 2, "bf16", "whole", 1),
    ("E4M3_SEQ_HEAD", "PACKED", 16, (64, 64), 1, "bf16", "whole", 3),
    ("BF16", "SHUFFLE", 16, (128, 128), 8, "f16", "whole", 3),
]


@compiler
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize("cell", GATHER_COMPILED, ids=lambda c: "-".join(map(str, c)))
def test_gather_compiles_ahead_of_time(cell, arch, generation):
    generation(arch)
    kernel = bridge.compile_for(arch, *gather_launches(cell)[0])
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED[arch] * 1024


def gather_on_gpu(*args, **keywords):
    return jax.jit(functools.partial(test_gather_kv.gather, **keywords, backend="triton"))(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", GATHERS, ids=lambda c: "-".join(map(str, c)))
def test_gather_on_gpu(cell, rng):
    check_gather(rng, gather_on_gpu, cell)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", GATHERS[::4], ids=lambda c: "-".join(map(str, c)))
def test_gather_as_on_ampere_on_gpu(cell, rng, generation):
    generation(Arch.AMPERE)
    check_gather(rng, lambda *args, **keywords: jax.jit(functools.partial(run_gather, **keywords))(*args), cell)


@pytest.mark.gpu
@pytest.mark.parametrize("name", goldens.names("gather"))
def test_gather_goldens_on_gpu(name):
    test_gather_kv.test_golden(name, "triton")
