"""The Hopper decode kernel: what it refuses, that it lowers, what it computes (interpreted on a CPU, or on a GPU)."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cover import pairwise, some_slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import FORMATS, library_options, make, relative_error
from test_golden import assert_matches_upstream, library_problem

import pallas_attn as pa
from pallas_attn.core.batch import padded
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.paged_attention import mosaic_config, mosaic_decode, mosaic_share
from pallas_attn.ops.paged_attention.mosaic_worker import Inputs
from pallas_attn.ops.paged_attention.problem import prepare

SEQS = 9  # of problem(), padding included
SINKS = np.linspace(-1, 2, 128).astype(np.float32)
OPTIONS = {
    "plain": {},
    "window": {"window": 70},
    "window 1": {"window": np.int32(1)},
    "no window": {"window": np.int32(0)},
    "not causal": {"causal": False},
    "causal per sequence": {"causal": np.arange(SEQS) % 2 == 0},
    "window not causal": {"causal": False, "window": 70},
    "soft cap": {"soft_cap": np.float32(2.0)},
    "no soft cap": {"soft_cap": np.float32(0.0)},
    "sinks": {"sinks": SINKS},
    "all": {"window": 90, "soft_cap": np.float32(3.0), "sinks": SINKS, "scale": np.float32(0.2)},
}
QUERIES = ("bf16", "f16", "f32", "E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD", "E5M2_TENSOR")
DTYPES = {"bf16": oracle.BF16, "f16": oracle.F16, "f32": oracle.F32}
LISTS = (
    [f for f in FORMATS if f != "F32"],
    ("NHD", "HND", "INTERLEAVED", "PACKED"),
    (16, 32, 64, 128, 256),
    (64, 128, 256),
    ((4, 1), (4, 4), (6, 2), (16, 2), (16, 1), (20, 2), (128, 1)),
    QUERIES,
    list(OPTIONS),
    (1, 2, 3, 8),
)
S = jax.ShapeDtypeStruct


def abstract(format, layout, page_size, dim, heads, query, option, q_tokens, tokens=20):
    """(q, cache, batch) of shapes only, and the options."""
    batch = pa.RaggedBatch(S((SEQS, 8), jnp.int32), S((SEQS,), jnp.int32), S((SEQS + 1,), jnp.int32))
    batch = dataclasses.replace(batch, max_q_len=q_tokens)
    cache = abstract_cache(
        getattr(pa, format), getattr(pa, layout), pages=64, page_size=page_size, heads=heads[1], dim=dim, seqs=SEQS
    )
    values = S((tokens, heads[0], dim), DTYPES.get(query) or FORMATS[query][0])
    if query not in DTYPES:
        shape = {"tensor": (), "head": (heads[0],), "token_head": (tokens, heads[0])}[FORMATS[query][1]]
        values = pa.Quantized(values, S(shape, jnp.float32), getattr(pa, query))
    return values, cache, batch, library_options(**options_for(option, heads), return_lse=True)


def options_for(name, heads):
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = options["sinks"][: heads[0]]
    return options


def possible(cell):
    *arguments, options = abstract(*cell)
    return mosaic_decode.supports(prepare(*arguments, **options)[0]) is None


# Every pair of format, layout, page size, head dim, heads, query, option and tokens that the kernel takes.
CELLS = pairwise(LISTS, possible)


def problem(rng, format, page_size, heads, query, q_tokens=1, dim=128, kv_lens=None, q_lens=None):
    n = q_tokens
    kv_lens = kv_lens or (200, 64, max(n - 1, 1), 63, 0, 65, 5)
    q_lens = q_lens or (n, 1, n, max(n - 1, 1), 1, 0, n)
    q_format = None if query in DTYPES else query
    return make(
        rng, format, q_lens, kv_lens, heads=heads, dim=dim, page_size=page_size, q_format=q_format,
        q_dtype=DTYPES.get(query, oracle.F32),
    )  # fmt: skip


def check(rng, run, format, layout, page_size, dim, heads, query, option, q_tokens, scheduled=False, **shape):
    random = problem(rng, format, page_size, heads, query, q_tokens, dim, **shape)
    q, cache, batch = random.arguments(layout, max_q_len=q_tokens)
    options = options_for(option, heads)
    if scheduled:
        window = options.get("window")
        batch = batch.with_schedule(window if isinstance(window, int) else None)
    out, lse = run(q, cache, batch, out=jnp.float32, return_lse=True, **library_options(**options))
    if not options.get("soft_cap", 1):
        del options["soft_cap"]  # a cap of 0 is none
    if not options.get("window", 1):
        del options["window"]
    compare(out, lse, *random.expected(**options))


def compare(out, lse, want, want_lse, worst=8e-3, off=1e-2):
    """Against the definition: all together, the worst row, the LSE of any row."""
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    assert relative_error(out, want) <= worst
    # An error of 3e-4 in a product of the matrix unit is one of the logits' magnitude here.
    np.testing.assert_allclose(lse, want_lse, atol=off)


def interpreted(q, cache, batch, **options):
    p, args = prepare(q, cache, batch, **options)
    assert mosaic_decode.supports(p) is None
    return mosaic_decode.run(p, *args)


INTERPRETED = [
    ("E4M3_TENSOR", "NHD", 16, 128, (4, 2), "bf16", "sinks", 1),
    ("E5M2_TOKEN_HEAD", "HND", 128, 64, (4, 1), "E4M3_TOKEN_HEAD", "window", 1),
    ("E4M3_SEQ_HEAD", "INTERLEAVED", 32, 64, (6, 2), "f32", "soft cap", 3),
    ("INT8_TOKEN_HEAD", "PACKED", 64, 64, (4, 2), "f16", "plain", 1),
    ("BF16", "NHD", 64, 64, (16, 1), "bf16", "all", 4),
]


@pytest.mark.parametrize("cell", INTERPRETED, ids=lambda c: "-".join(map(str, c)))
def test_interpreted(cell, rng, monkeypatch):
    monkeypatch.setattr(mosaic_decode, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_decode, "SMS", 2)
    n = cell[-1]
    check(rng, interpreted, *cell, scheduled=cell[1] == "HND", kv_lens=(n, 64, 0, 66), q_lens=(n, 1, n, 1))


def lower(*cell, config=None):
    return lowered(mosaic_decode, config, *abstract(*cell))


def lowered(module, config, q, cache, batch, options):
    """Lower for a GPU that is not there: layouts, transforms and shared memory are checked."""

    def step(q, cache, batch):
        if config is None:
            return pa.paged_attention(q, cache, batch, backend="mosaic", **options)
        p, args = prepare(q, cache, batch, **options)
        return module.run(p, *args, config=config)

    return jax.jit(step).trace(q, cache, batch).lower(lowering_platforms=("cuda",)).as_text()


LOWERED = [
    ("E4M3_TENSOR", "HND", 64, 128, (32, 8), "bf16", "plain", 1),
    ("E4M3_HEAD", "NHD", 16, 128, (32, 8), "E4M3_TENSOR", "all", 2),
    ("INT8_TOKEN_HEAD", "NHD", 32, 128, (16, 1), "bf16", "sinks", 1),
    ("E5M2_TENSOR", "PACKED", 256, 256, (8, 2), "f16", "soft cap", 8),
    ("BF16", "INTERLEAVED", 128, 64, (6, 2), "f32", "causal per sequence", 3),
    ("E4M3_TENSOR", "HND", 64, 128, (128, 1), "bf16", "window", 1),
]


@pytest.mark.parametrize("cell", some_slow(LOWERED, 2, 3, 5), ids=lambda c: "-".join(map(str, c)))
def test_lowers(cell):
    text = lower(*cell)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2  # the kernel and the combine
    around = {"constant", "broadcast_in_dim", "reshape"}  # cost no launch
    around |= {"convert"} if "causal per sequence" in cell else set()
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {"custom_call", *around}


def test_vmapped_decode_stays_on_the_kernel():
    """Two batches of one token a sequence are one of twice as many."""
    q, cache, batch, _ = abstract(*LOWERED[0])
    twice = jax.tree.map(lambda x: S((2, *x.shape), x.dtype), (q, batch))
    step = jax.vmap(lambda q, batch, cache: pa.paged_attention(q, cache, batch, backend="mosaic"), (0, 0, None))
    text = jax.jit(step).trace(*twice, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2
    assert "stablehlo.while" not in text


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_every_cell_lowers(cell):
    lower(*cell)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "INT8_TOKEN_HEAD", "BF16"])
def test_every_config_lowers(format):
    cell = (format, "NHD", 64, 128, (32, 8), "bf16", "plain", 1)
    *arguments, options = abstract(*cell)
    configs = set(mosaic_config.candidates(prepare(*arguments, **options)[0]))
    assert len(configs) > 2
    for config in configs:
        lower(*cell, config=config)


def test_at_most_300_cells_hold_every_pair():
    assert len(CELLS) <= 300
    for i, j in itertools.combinations(range(len(LISTS)), 2):
        met = {(cell[i], cell[j]) for cell in CELLS}
        # Only a window that is not causal and more than one token never meet.
        assert len(met) >= len(LISTS[i]) * len(LISTS[j]) - 3, (i, j)


REFUSED = {
    "prefill": ({"max_q_len": None}, "max_q_len <= 8"),
    "nine tokens": ({"max_q_len": 9}, "max_q_len <= 8"),
    "f32 cache": ({"format": pa.F32}, "no F32 cache"),
    "shuffle": ({"layout": pa.SHUFFLE}, "no SHUFFLE layout"),
    "dim": ({"dim": 80}, "no head dim 80"),
    "page": ({"page_size": 8}, "no page size 8"),
    "group": ({"group": 37}, "no 37 query heads per kv head"),
    "ALiBi": ({"bias": pa.Bias(alibi_slopes=S((8,), jnp.float32))}, "no ALiBi"),
    "window": ({"max_q_len": 2, "mask": pa.Mask(causal=False, window=9)}, "no non-causal window for 2 query tokens"),
}


@pytest.mark.parametrize(("change", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, reason):
    new = {"max_q_len": 1, "format": pa.E4M3_TENSOR, "layout": pa.NHD, "page_size": 64, "dim": 128, "group": 4}
    new |= change
    names = ("max_q_len", "format", "layout", "page_size", "dim", "group")
    max_q_len, format, layout, page_size, dim, group = (new.pop(n) for n in names)
    cache = abstract_cache(format, layout, page_size=page_size, dim=dim)
    batch = pa.RaggedBatch(S((4, 8), jnp.int32), S((4,), jnp.int32), S((5,), jnp.int32), max_q_len=max_q_len)
    q = S((4, 2 * group, dim), jnp.bfloat16)
    assert reason in mosaic_decode.supports(prepare(q, cache, batch, **new)[0])


@pytest.mark.parametrize("window", [None, 70])
def test_schedule_counts_tiles(window):
    """Of a padded batch; with and without a window, static or traced."""
    starts = np.array([0, 1, 3, 3, 4, 0], np.int32)
    lens = np.array([200, 65, 64, 0, 10**6], np.int32)
    batch = pa.RaggedBatch(jnp.zeros((5, 4), jnp.int32), jnp.asarray(lens), jnp.asarray(starts), jnp.int32(4))
    before = np.asarray(jax.jit(lambda b: b.with_schedule(window).schedule.before)(batch))
    first = [0, 0, 0, 0, 0] if window is None else [(200 - 70) // 64, 0, 0, 0, 0]
    tiles = [4 - first[0], 2, 0, 0, 0]  # the third has no query, the last is padding
    assert before.shape == (128,)
    np.testing.assert_array_equal(before[:6], np.cumsum([0, *tiles]))
    assert np.all(before[6:] == np.iinfo(np.int32).max)
    if window is not None:
        np.testing.assert_array_equal(np.asarray(batch.tiles_before(jnp.int32(window))), before)


@pytest.mark.parametrize(("seqs", "window"), [(1, None), (2, 70), (37, 0), (63, 3), (130, None), (255, 100)])
def test_kernels_count_the_tiles_of_the_schedule(seqs, window, rng):
    """Of garbage lengths, padding sequences and sequences without a query too."""
    n = padded(seqs)
    mask = pa.Mask(window=None if window is None else np.int32(window))
    lens = np.array([500, *rng.integers(-100, 3000, seqs - 1)])
    starts = np.cumsum([0, 1, *rng.integers(0, 3, seqs - 1)])
    lens, starts, table = (jnp.asarray(x, jnp.int32) for x in (lens, starts, np.zeros((seqs, 8))))
    batch = pa.RaggedBatch(table, lens, starts, jnp.int32(max(seqs - 2, 1)), max_q_len=2)
    q, cache, _, _ = abstract(*LOWERED[0])
    shapes = jax.tree.map(lambda x: S(x.shape, x.dtype), batch)  # a known batch would be refused
    p, _ = prepare(S((3 * seqs, *q.shape[1:]), q.dtype), cache, shapes, mask=mask)

    def body(lens, starts, live, window, out, scratch):
        none = dict.fromkeys(Inputs._fields)
        x = Inputs(**none)._replace(kv_lens=lens, cu_q_lens=starts, live=live, window=window)
        counted = mosaic_share.tally(p, x, scratch)
        for at in range(0, n, 128):
            plgpu.copy_smem_to_gmem(counted.at[pl.ds(at, 128)], out.at[pl.ds(at, 128)])
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body, out_type=S((n,), jnp.int32), scratch_types=[plgpu.SMEM((2 * n,), jnp.int32)],
        interpret=plgpu.InterpretGPUParams(),
    )  # fmt: skip
    got = np.asarray(kernel(lens, starts, batch.live.reshape(1), jnp.full(1, window or 0, jnp.int32)))
    want = np.asarray(batch.tiles_before(window))
    np.testing.assert_array_equal(got[: seqs + 1], want[: seqs + 1])
    assert got[seqs] > 0
    assert np.all(got[seqs:] == got[seqs])


def on_gpu(q, cache, batch, **options):
    return jax.jit(lambda *args: pa.paged_attention(*args, backend="mosaic", **options))(q, cache, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    check(rng, on_gpu, *cell, scheduled=cell[1] == "NHD")


@pytest.mark.gpu
def test_ragged_batches_on_gpu(rng):
    """Lengths from nothing to many tiles, more sequences than workers and fewer; one compilation each."""
    for seqs, longest in ((1, 9000), (7, 3000), (200, 300)):
        for _ in range(4):
            lens = tuple(int(x) for x in rng.integers(0, longest, seqs))
            live = tuple(int(x) for x in rng.integers(0, 2, seqs))
            shape = {"kv_lens": lens, "q_lens": live}
            check(rng, on_gpu, "E4M3_HEAD", "HND", 64, 128, (8, 2), "f32", "plain", 1, **shape)


# Shapes of `test_any_lengths_on_gpu`: fixed, for each kind is a compilation.
MOST, WIDTH = 6, 12
RAGGED = {  # format, layout, heads, query, query tokens, scheduled, option
    "counted": ("E4M3_TENSOR", "HND", (8, 2), "bf16", 1, False, "sinks"),
    "scheduled": ("E4M3_HEAD", "NHD", (8, 2), "E4M3_TENSOR", 3, True, "plain"),
    "window": ("INT8_TOKEN_HEAD", "PACKED", (4, 2), "f16", 1, False, "window 1"),
    "windows of several tokens": ("E5M2_SEQ_HEAD", "INTERLEAVED", (6, 2), "f32", 4, False, "window 1"),
}
lengths = st.one_of(st.integers(0, 64 * WIDTH), st.sampled_from([0, 1, 63, 64, 65, 128, 64 * WIDTH]))


@functools.cache
def ragged_step(scheduled, sinks):
    def step(q, cache, batch, window):
        options = library_options(sinks=SINKS[: q.shape[1]]) if sinks else {"mask": pa.Mask(window=window)}
        batch = batch.with_schedule() if scheduled else batch
        return pa.paged_attention(q, cache, batch, backend="mosaic", out=jnp.float32, return_lse=True, **options)

    return jax.jit(step)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", RAGGED)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_lengths_on_gpu(kind, data):
    format, layout, heads, query, n, scheduled, option = RAGGED[kind]
    kv_lens = data.draw(st.lists(lengths, min_size=1, max_size=MOST))
    q_lens = [data.draw(st.integers(0, n)) for _ in kv_lens]
    options = options_for(option, heads)
    if "window" in options:
        options["window"] = np.int32(data.draw(st.one_of(st.integers(1, 64 * WIDTH), st.integers(1, 3))))
    rng = np.random.default_rng(sum(kv_lens))
    random = make(
        rng, format, q_lens, kv_lens, heads=heads, dim=128, page_size=64, num_pages=MOST * WIDTH, table_width=WIDTH,
        spare_seqs=MOST - len(kv_lens), spare_tokens=MOST * n + 1 - sum(q_lens), q_dtype=DTYPES.get(query, oracle.F32),
        q_format=None if query in DTYPES else query,
    )  # fmt: skip
    args = random.arguments(layout, max_q_len=n)
    out, lse = ragged_step(scheduled, option == "sinks")(*args, options.get("window"))
    compare(out, lse, *random.expected(**options))


def into_nan(q, cache, batch, **options):
    """As `on_gpu`, the results in memory that held NaN, and the partial ones most likely too."""

    def step(out, lse, q, cache, batch):
        return pa.paged_attention(q, cache, batch, backend="mosaic", **options)

    results = jax.eval_shape(functools.partial(step, None, None), q, cache, batch)
    held = [jnp.full(x.shape, jnp.nan, x.dtype) for x in results]
    args = (*held, q, cache, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(*args).compile()
    copies = re.findall(r"= (\S+) copy\(", compiled.as_text())
    assert set(copies) <= {"s32[1]{0}"}  # of a counter's zero, where CTAs take tickets
    jax.block_until_ready([jnp.full(2**size, jnp.nan) for size in range(8, 24) for _ in range(8)])
    where = [x.unsafe_buffer_pointer() for x in held]
    got = compiled(*args)
    assert [x.unsafe_buffer_pointer() for x in got] == where
    return got


@pytest.mark.gpu
@pytest.mark.parametrize("cell", [LOWERED[0], LOWERED[4], LOWERED[1]], ids=lambda c: "-".join(map(str, c)))
def test_every_row_is_written(cell, rng):
    """Those of padding, of sequences without keys, and where no query sees a key too."""
    check(rng, into_nan, *cell)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_same_input_same_bits(layout, rng):
    random = problem(rng, "E4M3_TENSOR", 64, (32, 8), "bf16", kv_lens=(5000, 77, 1200), q_lens=(1, 1, 1))
    args = random.arguments(layout, max_q_len=1)
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
@pytest.mark.parametrize("format", ["E4M3_STATIC", "E4M3_TENSOR", "E5M2_STATIC"])
def test_fp8_output_on_gpu(format, rng):
    random = problem(rng, "E4M3_TENSOR", 64, (8, 2), "E4M3_TENSOR")
    args = random.arguments("NHD", max_q_len=1)
    scale = jnp.float32(0.3 / getattr(pa, format).qmax)
    out = on_gpu(*args, out=(getattr(pa, format), scale))
    # The same float32 result, rounded by the library's own quantiser: the same codes.
    want = pa.quantize(on_gpu(*args, out=jnp.float32), getattr(pa, format), scale)
    assert np.abs(np.asarray(want.values, np.float32)).max() == getattr(pa, format).qmax  # some saturate
    same = np.asarray(out.values).view(np.uint8) == np.asarray(want.values).view(np.uint8)
    assert np.mean(same) > (0.999 if format == "E4M3_TENSOR" else 0.9999)  # XLA's division on a GPU is approximate
