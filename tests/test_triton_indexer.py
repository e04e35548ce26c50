"""The Triton kernels of the sparse indexer: what they refuse, that they give what the definition gives (interpreted on
a CPU, or on a GPU), and that they compile ahead of time for every generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mosaic_indexer as mosaic
from cover import pairwise
from test_triton import SHARED, compiler, generation, interpreted, interpreter, launches_of  # noqa: F401

import pallas_attn as pa
from pallas_attn.core.arch import Arch
from pallas_attn.ops.sparse_indexer import triton as indexer
from pallas_attn.ops.sparse_indexer.gather import problem as gather_problem
from pallas_attn.ops.sparse_indexer.gather import triton as gather
from pallas_attn.ops.sparse_indexer.gather import xla as gather_xla
from pallas_attn.ops.sparse_indexer.logits import problem as logits_problem
from pallas_attn.ops.sparse_indexer.logits import reference as logits_reference
from pallas_attn.ops.sparse_indexer.logits import triton as logits
from pallas_attn.ops.sparse_indexer.paged_logits import problem as paged_problem
from pallas_attn.ops.sparse_indexer.paged_logits import reference as paged_reference
from pallas_attn.ops.sparse_indexer.paged_logits import triton as paged
from pallas_attn.ops.sparse_indexer.topk import problem as topk_problem
from pallas_attn.ops.sparse_indexer.topk import triton as topk
from pallas_attn.ops.sparse_indexer.write import problem as write_problem
from pallas_attn.ops.sparse_indexer.write import triton as write
from pallas_attn.ops.sparse_indexer.write import xla as write_xla
from pallas_attn.runtime import dispatch
from pallas_attn.runtime import triton as bridge

S = jax.ShapeDtypeStruct
GATHER, LOGITS, PAGED, TOPK, WRITE = (
    dispatch.OPS[op].backend("triton")
    for op in ("gather_index", "indexer_logits", "paged_indexer_logits", "indexer_topk", "write_index")
)
name = lambda cell: "-".join(map(str, cell))  # noqa: E731
LAYOUTS = {"normal": pa.INDEX_NORMAL, "shuffle": pa.INDEX_SHUFFLE}
KINDS = ("group", "head", "bf16", "f32")  # of queries
FLOATS = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


# Queries are quantised by "group", "head" or "tensor", or floats.


def some_query(rng, tokens, heads, kind):
    if kind not in FLOATS:
        return mosaic.some_query(rng, tokens, heads, kind)
    return jnp.asarray(rng.standard_normal((tokens, heads, 128)), FLOATS[kind])


def paged_call(rng, next_n, heads, page_size, layout, format, lens, max_len, seqs, kind, most=400):
    """The ragged problem of the Hopper kernel's tests, in any layout and with any query."""
    cell = next_n, heads, page_size, format, lens, max_len, seqs, "tensor"
    p, args = mosaic.concrete_paged(rng, *cell, most=most)
    cache = args.cache
    if layout == "shuffle":
        values, scale = cache.read(jnp.arange(p.pages))
        cache = pa.IndexCache.allocate(p.pages, page_size, format=p.format, layout=pa.INDEX_SHUFFLE)
        rows = cache.rows(values.reshape(-1, 128), scale.reshape(-1, 1))
        every = np.arange(p.pages * page_size)
        cache = cache.write_rows(jnp.asarray(every // page_size), jnp.asarray(every % page_size), rows)
    return paged_problem.prepare(
        some_query(rng, p.tokens, heads, kind), args.weights, cache, args.batch, max_len=max_len,
        row_lens=args.row_lens, scale=0.25,
    )  # fmt: skip


def prefill_call(rng, tokens, keys, heads, width, kind, k_kind="index"):
    """Ranges of any kind, keys that nobody sees being NaN."""
    _, args = mosaic.concrete_prefill(rng, tokens, keys, heads, width, "tensor")
    k = args.k if k_kind == "index" else pa.dequantize(args.k).astype(FLOATS[k_kind])
    query = some_query(rng, tokens, heads, kind)
    return logits_problem.prepare(query, k, args.weights, args.starts, args.ends, width=width, scale=0.5)


def some_cache(rng, format, layout, page_size, dim):
    """Any bytes, with scales of any size."""
    cache = pa.IndexCache.allocate(9, page_size, dim, format=getattr(pa, format), layout=LAYOUTS[layout])
    return cache.replace(jnp.asarray(rng.integers(0, 256, cache.pages.shape), jnp.uint8))


def write_call(rng, format, layout, page_size, dim, dtype, tokens):
    """Keys of any size, zeros among them, into slots of which some are none."""
    cache = some_cache(rng, format, layout, page_size, dim)
    k = rng.standard_normal((tokens, dim)) * 10.0 ** rng.integers(-6, 3, (tokens, 1))
    k[::5] = 0
    slots = rng.permutation(cache.num_pages * page_size + 9)[:tokens] - 4
    return write_problem.prepare(cache, jnp.asarray(k, FLOATS[dtype]), jnp.asarray(slots, jnp.int32))


def gather_call(rng, format, layout, page_size, dim, dtype, tokens):
    """Three sequences, one empty, from anywhere in their pages, page numbers from anywhere."""
    cache = some_cache(rng, format, layout, page_size, dim)
    table = jnp.asarray(rng.choice([0, 3, 8, 5, -1, 2**31 - 1], (3, 5)), jnp.int32)
    lens, starts = (jnp.asarray(x, jnp.int32) for x in ([5 * page_size, 0, page_size + 1], [2, 0, 1]))
    batch = pa.RaggedBatch(table, lens, jnp.arange(4, dtype=jnp.int32))
    return gather_problem.prepare(cache, batch, max_tokens=tokens, starts=starts)


# ---------------------------------------------------------------- refusals, tracing, compiling


def query_shape(tokens, heads, kind):
    if kind in FLOATS:
        return S((tokens, heads, 128), FLOATS[kind])
    return mosaic.abstract_query(tokens, heads, kind)


def paged_shapes(next_n, heads, page_size, layout, format, lens, max_len, seqs, kind):
    """`paged_call` of shapes only, as the following ones are."""
    cell = next_n, heads, page_size, format, lens, max_len, seqs, "tensor"
    p, args = mosaic.abstract_paged(*cell, layout=LAYOUTS[layout])
    return paged_problem.prepare(
        query_shape(p.tokens, heads, kind), args.weights, args.cache, args.batch, max_len=max_len,
        row_lens=args.row_lens,
    )  # fmt: skip


def prefill_shapes(tokens, keys, heads, width, kind, k_kind):
    _, args = mosaic.abstract_prefill(tokens, keys, heads, width, "tensor")
    k = args.k if k_kind == "index" else S((keys, 128), FLOATS[k_kind])
    query = query_shape(tokens, heads, kind)
    return logits_problem.prepare(query, k, args.weights, args.starts, args.ends, width=width)


def cache_shape(format, layout, page_size, dim):
    pages = S((9, page_size, dim + dim // 32), jnp.uint8)
    return pa.IndexCache(pages, LAYOUTS[layout], getattr(pa, format))


def write_shapes(format, layout, page_size, dim, dtype, tokens):
    k = S((tokens, dim), FLOATS[dtype])
    return write_problem.prepare(cache_shape(format, layout, page_size, dim), k, S((tokens,), jnp.int32))


def gather_shapes(format, layout, page_size, dim, dtype, tokens):
    batch = pa.RaggedBatch(S((3, 5), jnp.int32), S((3,), jnp.int32), S((4,), jnp.int32))
    return gather_problem.prepare(cache_shape(format, layout, page_size, dim), batch, max_tokens=tokens)


def launch_of(kernel, p, args):
    """The one launch of a call."""
    leaves, tree = jax.tree.flatten(args)
    (found,) = launches_of(lambda *xs: kernel.run(p, *jax.tree.unflatten(tree, xs)), *leaves)
    return found


def asked(tokens=2, heads=8, dim=128, dtype=jnp.bfloat16):
    q = S((tokens, heads, dim), dtype)
    rows = S((tokens,), jnp.int32)
    return logits_problem.prepare(q, S((64, dim), jnp.bfloat16), S((tokens, heads), jnp.float32), rows, rows)[0]


def test_refuses():
    refuses = lambda **change: dispatch.supports(LOGITS, asked(**change))  # noqa: E731
    assert refuses() is None
    assert refuses(heads=300) == "no 300 heads"
    assert refuses(dim=512) == "no head dim 512"
    assert refuses(tokens=0) == "an empty call"
    integers = dataclasses.replace(asked(), k_format=pa.INT8_TOKEN_HEAD)
    assert dispatch.supports(LOGITS, integers) == "no integers"


OF_PAGES = 64, "normal", "INDEX_K", "position", None, 3, "f32"


@pytest.mark.parametrize(("arch", "most"), [(Arch.AMPERE, 128), (Arch.ADA, 64), (Arch.HOPPER, 128)], ids=str)
def test_refuses_queries_that_no_shared_memory_holds(arch, most, generation):  # noqa: F811
    generation(arch)
    refuses = lambda heads, **change: dispatch.supports(LOGITS, asked(heads=heads, **change))  # noqa: E731
    assert refuses(most, dtype=jnp.float32) is None
    said = str(refuses(2 * most, dtype=jnp.float32))
    assert said.startswith(f"no {2 * most} float32 heads of 128: a program has ")
    assert dispatch.supports(PAGED, paged_shapes(1, most, *OF_PAGES)[0]) is None
    assert dispatch.supports(PAGED, paged_shapes(1, 2 * most, *OF_PAGES)[0]) == said


def test_paged_refuses():
    cache = pa.IndexCache(S((4, 16, 264), jnp.uint8), pa.INDEX_NORMAL)
    batch = pa.RaggedBatch(S((2, 2), jnp.int32), S((2,), jnp.int32), S((3,), jnp.int32))
    p, _ = paged_problem.prepare(S((2, 8, 256), jnp.bfloat16), S((2, 8), jnp.float32), cache, batch)
    assert dispatch.supports(PAGED, p) == "no keys with 2 scales"


def test_write_and_gather_refuse_next_to_nothing():
    p, _ = write_shapes("INDEX_K", "normal", 64, 128, "bf16", 3)
    assert dispatch.supports(WRITE, p) is None
    assert dispatch.supports(WRITE, dataclasses.replace(p, tokens=0)) == "an empty call"
    assert dispatch.supports(GATHER, gather_shapes("INDEX_K", "normal", 64, 128, "bf16", 3)[0]) is None


def test_topk_refuses():
    refuses = lambda *a, **k: dispatch.supports(TOPK, topk_problem.prepare(*a, **k)[0])  # noqa: E731
    assert refuses(S((2, 9000), jnp.float32), 2048) is None
    assert refuses(S((2, 9000), jnp.float32), 2048, sorted=True) == "no order by value: sorted=False"
    assert refuses(S((0, 9000), jnp.float32), 2048) == "an empty call"


PAGED_COMPILED = [
    (1, 64, 64, "normal", "INDEX_K", "position", None, 3, "group"),
    (2, 128, 16, "shuffle", "INDEX_K_EXPONENT", "row lengths", 1000, 3, "head"),
    (1, 32, 1, "normal", "INDEX_K_F32", "position", 128, 3, "bf16"),
    (1, 8, 64, "shuffle", "INDEX_K", "position", None, 3, "f32"),
]
PREFILL_COMPILED = [
    (64, 1000, 64, None, "group", "index"), (5, 300, 128, 96, "head", "index"), (3, 100, 16, None, "bf16", "bf16"),
    (3, 100, 32, 64, "f16", "bf16"), (7, 100, 1, None, "f32", "index"),
]  # fmt: skip
CALLS = [
    *((paged, paged_shapes(*cell)) for cell in PAGED_COMPILED),
    *((logits, prefill_shapes(*cell)) for cell in PREFILL_COMPILED),
    *(
        (kernel, call(*cell))
        for kernel, call in ((write, write_shapes), (gather, gather_shapes))
        for cell in (("INDEX_K", "normal", 64, 128, "bf16", 90), ("INDEX_K_EXPONENT", "shuffle", 16, 256, "f32", 3))
    ),
    *((topk, mosaic.abstract_topk(*cell)) for cell in ((5, 2048, 32768, "ends"), (3, 100, 1000, "whole"))),
]
CALL_IDS = [f"{kernel.__name__.split('.')[-2]}-{i}" for i, (kernel, _) in enumerate(CALLS)]


@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize(("kernel", "call"), CALLS, ids=CALL_IDS)
def test_traces_where_triton_is_missing(kernel, call, arch, generation):  # noqa: F811
    """As one launch, to which bytes stand for FP8 before Ada."""
    generation(arch)
    assert kernel.supports(call[0]) is None
    launch, inputs = launch_of(kernel, *call)
    assert arch.has_fp8 or not any("float8" in str(x.dtype) for x in inputs)
    assert dict(launch.aliases) == ({2: 0} if kernel is write else {})


@compiler
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize(("kernel", "call"), CALLS, ids=CALL_IDS)
def test_compiles_ahead_of_time(kernel, call, arch, generation):  # noqa: F811
    """Down to machine code, within the shared memory of the generation."""
    generation(arch)
    binary = bridge.compile_for(arch, *launch_of(kernel, *call))
    assert f".target {arch.sm}" in binary.asm["ptx"]
    assert binary.metadata.shared <= SHARED[arch] * 1024


@compiler
def test_writes_divide_exactly():
    cell = "INDEX_K_F32", "normal", 64, 128, "bf16", 3
    ptx = bridge.compile_for(Arch.HOPPER, *launch_of(write, *write_shapes(*cell))).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx
    assert "div.approx" not in ptx


# No FP8 that becomes bf16: Triton keeps the conversion of the first generation that a process compiles one for, and
# Hopper's is an instruction that Ada lacks.
WIDE = ("group", "index"), ("group", "f16"), ("bf16", "f16"), ("f32", "index"), ("f32", "f16")
WIDEST = [
    *((logits, prefill_shapes(5, 300, 128, None, *kinds)) for kinds in WIDE),
    (logits, prefill_shapes(5, 300, 64, None, "f32", "index")),
    *((paged, paged_shapes(1, heads, *OF_PAGES[:-1], kind)) for heads in (64, 128) for kind in ("group", "f32")),
]


@compiler
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
@pytest.mark.parametrize(("kernel", "call"), WIDEST)
def test_the_widest_queries_fit_the_shared_memory(kernel, call, arch, generation):  # noqa: F811
    """Those of the tests on a GPU, or they are refused."""
    generation(arch)
    reason = kernel.supports(call[0])
    if reason is not None:
        assert arch == Arch.ADA
        assert "shared memory" in reason
        return
    assert bridge.compile_for(arch, *launch_of(kernel, *call)).metadata.shared <= SHARED[arch] * 1024


# ---------------------------------------------------------------- results

INTERPRETED_PAGED = [
    (3, 5, 16, "shuffle", "INDEX_K", "position", None, 4, "group"),
    (1, 8, 1, "normal", "INDEX_K_F32", "row lengths", 200, 3, "tensor"),
    (2, 20, 32, "normal", "INDEX_K_EXPONENT", "position", 70, 3, "bf16"),
]
INTERPRETED_PREFILL = [
    (9, 300, 5, None, "group", "index"), (5, 300, 8, 96, "head", "index"), (5, 130, 3, 300, "bf16", "f16"),
]  # fmt: skip


@interpreter
@pytest.mark.parametrize("cell", INTERPRETED_PAGED, ids=name)
def test_interpreted_paged(cell, rng, interpreted, generation):  # noqa: F811
    i = INTERPRETED_PAGED.index(cell)
    generation(Arch.AMPERE if i % 2 else Arch.HOPPER)
    p, args = paged_call(rng, *cell, most=200)
    mosaic.agrees(paged.run(p, *args, tiles=1 + i % 2)[0], paged_reference.run(p, *args)[0], most=1e-5)


@interpreter
def test_interpreted_paged_takes_wild_numbers(interpreted):  # noqa: F811
    """Nothing outside the cache is read, nor outside the result written."""
    p, args = mosaic.wild(8)
    got = np.asarray(paged.run(p, *args)[0])
    np.testing.assert_array_equal(got == 0, np.arange(192) < np.array([[192], [0], [0]]))
    np.testing.assert_array_equal(np.isneginf(got), got != 0)


@interpreter
@pytest.mark.parametrize("cell", INTERPRETED_PREFILL, ids=name)
def test_interpreted_prefill(cell, rng, interpreted, generation):  # noqa: F811
    generation(Arch.AMPERE if INTERPRETED_PREFILL.index(cell) % 2 else Arch.HOPPER)
    p, args = prefill_call(rng, *cell)
    mosaic.agrees(logits.run(p, *args, tokens=4)[0], logits_reference.run(p, *args)[0], most=1e-5)


def check_bytes(kernel, portable, p, args):
    """The portable backend's own bytes, on a CPU: on a GPU XLA's division is approximate."""
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = portable.run(p, *mosaic.on_cpu(args))
    for got, want in zip(kernel.run(p, *args), wanted, strict=True):
        got, want = (np.asarray(x) for x in (got, want))
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@interpreter
@pytest.mark.parametrize("cell", [
    ("INDEX_K", "normal", 5, 128, "bf16", 40), ("INDEX_K_F32", "shuffle", 16, 256, "f32", 70),
    ("INDEX_K_EXPONENT", "shuffle", 32, 128, "f16", 90),
], ids=name)  # fmt: skip
def test_interpreted_write_and_gather(cell, rng, interpreted, monkeypatch):  # noqa: F811
    monkeypatch.setattr(indexer, "SMS", 2)  # so that programs have several rows
    check_bytes(write, write_xla, *write_call(rng, *cell))
    check_bytes(gather, gather_xla, *gather_call(rng, *cell))


def check_topk(p, args, **config):
    got = jax.jit(lambda *xs: topk.run(p, *xs, **config)[0])(*args)
    np.testing.assert_array_equal(np.asarray(got), mosaic.sorted_rows(p, args))


@interpreter
@pytest.mark.parametrize("k", [1, 64, 400])
def test_interpreted_topk(k, rng, interpreted):  # noqa: F811
    """Adversarial rows, whole and in parts, of more columns than a block."""
    with np.errstate(over="ignore"):
        x = np.stack([kind(rng, 300) for kind in mosaic.ROWS.values()]).astype(np.float32)
    bounds = (jnp.asarray(rng.integers(low, high, len(x)), jnp.int32) for low, high in ((-5, 200), (0, 320)))
    starts, ends = bounds
    check_topk(*topk_problem.prepare(jnp.asarray(x), k), block=256)
    check_topk(*topk_problem.prepare(jnp.asarray(x), k, starts=starts, ends=ends), block=256)


# ---------------------------------------------------------------- on a GPU

CELLS_PAGED = pairwise((
    (1, 2, 8), (5, 64, 128), (1, 16, 64), list(LAYOUTS), ("INDEX_K", "INDEX_K_F32", "INDEX_K_EXPONENT"),
    ("position", "row lengths"), (None, 1000), (3, 150), KINDS,
), lambda c: c[2] >= 16 or c[3] == "normal", tries=8)  # fmt: skip
CELLS_PREFILL = pairwise((
    (1, 64, 300), (1, 100, 5001), (8, 64, 128), (None, 64, 2048), KINDS, ("index", "f16"),
), lambda c: c[0] * c[1] * c[2] <= 1 << 26, tries=8)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_PAGED, ids=name)
def test_paged_on_gpu(cell, rng):
    p, args = paged_call(rng, *cell, most=1500 if cell[7] < 9 else 300)
    mosaic.agrees(mosaic.twice(paged, p, args), paged_reference.run(p, *mosaic.on_cpu(args))[0], most=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_PAGED[::4], ids=name)
def test_paged_as_on_ampere_on_gpu(cell, rng, generation):  # noqa: F811
    """Conversion by integer arithmetic, on whatever GPU is here."""
    generation(Arch.AMPERE)
    p, args = paged_call(rng, *cell, most=300)
    mosaic.agrees(mosaic.twice(paged, p, args), paged_reference.run(p, *mosaic.on_cpu(args))[0], most=1e-3)


@pytest.mark.gpu
def test_paged_takes_wild_numbers_on_gpu():
    got = mosaic.twice(paged, *mosaic.wild(64))
    np.testing.assert_array_equal(got == 0, np.arange(192) < np.array([[192], [0], [0]]))
    np.testing.assert_array_equal(np.isneginf(got), got != 0)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_PREFILL, ids=name)
def test_prefill_on_gpu(cell, rng):
    p, args = prefill_call(rng, *cell)
    mosaic.agrees(mosaic.twice(logits, p, args), logits_reference.run(p, *mosaic.on_cpu(args))[0], most=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_PREFILL[::4], ids=name)
def test_prefill_as_on_ampere_on_gpu(cell, rng, generation):  # noqa: F811
    generation(Arch.AMPERE)
    p, args = prefill_call(rng, *cell)
    mosaic.agrees(mosaic.twice(logits, p, args), logits_reference.run(p, *mosaic.on_cpu(args))[0], most=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", mosaic.CELLS_TOPK, ids=name)
def test_topk_on_gpu(cell, rng):
    check_topk(*mosaic.concrete_topk(rng, *cell))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 512, 2048, 5000])
@pytest.mark.parametrize("columns", [100, 4096, 40000, 400000])
def test_adversarial_rows_on_gpu(columns, k, rng):
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.stack([kind(rng, columns) for kind in mosaic.ROWS.values()]).astype(np.float32)
    check_topk(*topk_problem.prepare(jnp.asarray(x), k))


CELLS_BYTES = pairwise((
    ("INDEX_K", "INDEX_K_F32", "INDEX_K_EXPONENT"), list(LAYOUTS), (1, 16, 64), (128, 256), list(FLOATS), (1, 9, 500),
), lambda c: c[2] >= 16 or c[1] == "normal", tries=8)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS_BYTES, ids=name)
def test_write_and_gather_on_gpu(cell, rng):
    check_bytes(write, write_xla, *write_call(rng, *cell))
    check_bytes(gather, gather_xla, *gather_call(rng, *cell))
