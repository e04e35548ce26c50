"""The Hopper prefill kernel and mixed steps: what is refused, that they lower, what they compute (interpreted on a CPU,
or on a GPU)."""

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
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import FORMATS, library_options, make
from test_golden import assert_matches_upstream, library_problem
from test_mosaic_decode import (
    DTYPES,
    OPTIONS,
    SEQS,
    SINKS,
    S,
    abstract,
    compare,
    into_nan,
    lowered,
    on_gpu,
    options_for,
)

import pallas_attn as pa
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.paged_attention import (
    mosaic,
    mosaic_decode,
    mosaic_prefill,
    mosaic_prefill_compute,
    mosaic_prefill_config,
    mosaic_tables,
)
from pallas_attn.ops.paged_attention.problem import prepare

LENGTHS = {  # query tokens and context of each sequence; two more are padding
    "mixed": ((1, 5, 0, 170, 64, 1, 33), (9, 5, 7, 500, 64, 700, 300)),
    "prefill": ((40, 129, 31, 0, 64, 16, 15), (40, 129, 300, 0, 64, 400, 16)),
    "short of keys": ((3, 70, 1, 2, 1, 1, 9), (2, 10, 0, 2, 64, 65, 0)),
}
QUERIES = ("bf16", "f16", "f32", "E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD", "E5M2_TENSOR")
LISTS = (
    [f for f in FORMATS if f != "F32"],
    ("NHD", "HND", "INTERLEAVED", "PACKED"),
    (16, 32, 64, 128, 256),
    (64, 128, 256),
    ((4, 1), (4, 4), (6, 2), (16, 2), (16, 1), (20, 2), (128, 1)),
    QUERIES,
    list(OPTIONS),
    tuple(LENGTHS),
)


def call(cell):
    """(q, cache, batch) of shapes only and the options of a cell: nothing bounds the query tokens."""
    q, cache, batch, options = abstract(*cell[:-1], 1, tokens=sum(LENGTHS[cell[-1]][0]) + 3)
    return q, cache, dataclasses.replace(batch, max_q_len=None), options


def possible(cell):
    *arguments, options = call(cell)
    return mosaic_prefill.supports(prepare(*arguments, **options)[0]) is None


CELLS = pairwise(LISTS, possible)


def check(rng, run, format, layout, page_size, dim, heads, query, option, lengths, max_q_len=None, v_dim=None):
    q_lens, kv_lens = LENGTHS[lengths] if isinstance(lengths, str) else lengths
    random = make(
        rng, format, q_lens, kv_lens, heads=heads, dim=dim, v_dim=v_dim, page_size=page_size, spare_tokens=3,
        q_format=None if query in DTYPES else query, q_dtype=DTYPES.get(query, oracle.F32),
    )  # fmt: skip
    options = options_for(option, heads)
    q, cache, batch = random.arguments(layout, max_q_len=max_q_len)
    out, lse = run(q, cache, batch, out=jnp.float32, return_lse=True, **library_options(**options))
    if not options.get("soft_cap", 1):
        del options["soft_cap"]  # a cap of 0 is none
    if not options.get("window", 1):
        del options["window"]
    # The worst of up to 35,000 rows, ten times as many as decode has.
    compare(out, lse, *random.expected(**options), worst=1.2e-2, off=1.5e-2)


def interpreted(q, cache, batch, **options):
    p, args = prepare(q, cache, batch, **options)
    assert mosaic.supports(p) is None
    return mosaic.run(p, *args)


INTERPRETED = [
    ("E4M3_TENSOR", "NHD", 16, 64, (4, 2), "bf16", "sinks", ((1, 20, 0), (9, 70, 0))),
    ("E5M2_TOKEN_HEAD", "HND", 128, 64, (4, 1), "E4M3_TOKEN_HEAD", "window", ((66,), (140,))),
    # Scales of queries that are not there are NaN; a window that is not causal bounds what lies ahead too.
    ("F16", "HND", 64, 64, (8, 1), "E4M3_TOKEN_HEAD", "sinks", ((9,), (40,))),
    ("BF16", "HND", 64, 64, (2, 1), "bf16", "window not causal", ((100,), (100,))),
]
SLOW = [
    ("INT8_TOKEN_HEAD", "PACKED", 64, 64, (2, 2), "f16", "plain", ((2, 70), (2, 90))),
    ("BF16", "INTERLEAVED", 32, 64, (16, 1), "bf16", "all", ((9, 1), (140, 65))),
    ("E4M3_TENSOR", "HND", 64, 256, (4, 1), "bf16", "plain", ((40,), (140,))),
]
INTERPRETED += [pytest.param(cell, marks=pytest.mark.slow) for cell in SLOW]


@pytest.mark.parametrize("cell", INTERPRETED, ids=lambda c: "-".join(map(str, c)))
def test_interpreted(cell, rng, monkeypatch):
    """Two CTAs: each has blocks one after the other."""
    for module in (mosaic_decode, mosaic_prefill_compute):
        monkeypatch.setattr(module, "INTERPRET", plgpu.InterpretGPUParams())
    for module in (mosaic_decode, mosaic_prefill):
        monkeypatch.setattr(module, "SMS", 2)
    check(rng, interpreted, *cell)


UNEQUAL = [
    ("E4M3_TENSOR", "NHD", 64, 192, (2, 2), "bf16", "plain", ((5, 40), (70, 40))),
    ("BF16", "HND", 32, 192, (4, 2), "bf16", "sinks", ((33,), (65,))),
]


@pytest.mark.parametrize("cell", some_slow(UNEQUAL, 1), ids=lambda c: "-".join(map(str, c)))
def test_keys_of_192_and_values_of_128(cell, rng, monkeypatch):
    """As MLA has them before its heads are absorbed."""
    monkeypatch.setattr(mosaic_prefill_compute, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_prefill, "SMS", 3)
    check(rng, interpreted, *cell, v_dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", UNEQUAL, ids=lambda c: "-".join(map(str, c)))
def test_keys_of_192_and_values_of_128_on_gpu(cell, rng):
    check(rng, on_gpu, *cell[:-1], "mixed", v_dim=128)


@pytest.mark.parametrize("format", some_slow(["BF16", "E4M3_TENSOR", "INT8_TOKEN_HEAD"], 1, 2))
def test_unequal_dims_lower(format):
    q, cache, batch, options = call((format, "NHD", 64, 192, (16, 16), "bf16", "plain", "mixed"))
    values = abstract_cache(getattr(pa, format), pa.NHD, pages=64, page_size=64, heads=16, dim=128, seqs=SEQS).v
    cache = dataclasses.replace(cache, v=values)
    text = lowered(mosaic, None, q, cache, batch, options)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


def test_heads_of_a_block():
    """Three heads of 64 FP8 numbers do not begin where copies may: then each is a block of its own."""
    cell = ("E4M3_TENSOR", "NHD", 64, 64, (6, 2), "E4M3_TENSOR", "plain", "mixed")
    *arguments, options = call(cell)
    assert mosaic_prefill_config.part_of(prepare(*arguments, **options)[0]) == 1
    *arguments, options = call((*cell[:5], "bf16", *cell[6:]))
    assert mosaic_prefill_config.part_of(prepare(*arguments, **options)[0]) == 3


def test_a_head_of_its_own_where_sequences_are_long():
    *arguments, options = call(("E4M3_TENSOR", "NHD", 64, 64, (6, 2), "bf16", "plain", "mixed"))
    p = prepare(*arguments, **options)[0]

    def part(tokens):
        config = mosaic_prefill_config.choose(dataclasses.replace(p, tokens=tokens))
        return mosaic_prefill_config.form_of(p, config).part

    assert [part(40 * p.seqs), part(400 * p.seqs)] == [3, 1]


def lower(cell, config=None):
    return lowered(mosaic_prefill, config, *call(cell))


LOWERED = [
    ("E4M3_TENSOR", "HND", 64, 128, (32, 8), "bf16", "plain", "mixed"),
    ("E4M3_HEAD", "NHD", 16, 128, (32, 8), "E4M3_TENSOR", "all", "mixed"),
    ("INT8_TOKEN_HEAD", "NHD", 32, 128, (16, 1), "bf16", "sinks", "prefill"),
    ("E5M2_TENSOR", "PACKED", 256, 256, (8, 2), "f16", "soft cap", "mixed"),
    ("BF16", "INTERLEAVED", 128, 64, (6, 2), "f32", "causal per sequence", "mixed"),
    ("E4M3_TENSOR", "HND", 64, 128, (128, 1), "bf16", "window not causal", "mixed"),
    ("E4M3_HEAD", "HND", 64, 128, (8, 2), "f32", "plain", "mixed"),
]


@pytest.mark.parametrize("cell", some_slow(LOWERED, 2, 3, 5), ids=lambda c: "-".join(map(str, c)))
def test_lowers(cell):
    """Prefill, decode and its merge, and nothing between them but the counter's zero."""
    text = lower(cell)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 3
    around = {"constant", "broadcast_in_dim", "reshape"}
    around |= {"convert"} if "causal per sequence" in cell else set()
    assert set(re.findall(r"= stablehlo\.(\w+)", text)) <= {"custom_call", *around}


def test_one_sequence_is_one_launch():
    q, cache, batch, options = call(LOWERED[0])
    batch = dataclasses.replace(batch, page_table=S((1, 8), jnp.int32), kv_lens=S((1,), jnp.int32))
    batch = dataclasses.replace(batch, cu_q_lens=S((2,), jnp.int32))
    text = lowered(mosaic, None, q, cache, batch, options)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_every_cell_lowers(cell):
    lower(cell)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "INT8_TOKEN_HEAD", "BF16"])
@pytest.mark.parametrize("ring", [(64, 4, 3, 2, True), (64, 2, 1, 1, False), (128, 2, 1, 1, True)])
def test_configs_lower(format, ring):
    lower((format, "NHD", 64, 128, (32, 8), "bf16", "plain", "prefill"), mosaic_prefill_config.Config(*ring))


@pytest.mark.slow
@pytest.mark.parametrize("query", ["bf16", "E4M3_TENSOR"])
def test_every_candidate_lowers(query):
    cell = ("E4M3_TENSOR", "NHD", 64, 128, (32, 8), query, "plain", "prefill")
    *arguments, options = call(cell)
    configs = set(mosaic_prefill_config.candidates(prepare(*arguments, **options)[0]))
    assert {config.alone for config in configs} == {True, False}
    for config in configs:
        lower(cell, config)


def test_the_nearest_entry_of_the_table_is_taken(monkeypatch):
    *arguments, options = call(("E4M3_TENSOR", "NHD", 64, 128, (32, 8), "bf16", "plain", "prefill"))
    p = prepare(*arguments, **options)[0]
    key, sizes = mosaic_prefill_config.key_of(p), mosaic_prefill_config.sizes_of(p)
    near, far = (128, 2, 1, 1, False, False), (128, 2, 2, 2, False, True)
    entry = lambda key, config, **more: {"key": key, **sizes, **more, "config": list(config)}  # noqa: E731
    known = [entry(key, near, seqs=2 * p.seqs), entry(key, far, seqs=8 * p.seqs), entry(key[1:], far)]
    monkeypatch.setattr(mosaic_tables, "entries", lambda table: known)
    assert mosaic_prefill_config.choose(p) == mosaic_prefill_config.Config(*near)
    known[0]["config"][1] = 9  # tiles that no shared memory holds
    assert mosaic_prefill_config.choose(p) == mosaic_prefill_config.heuristic(p)
    known[:] = [entry(key, near, tokens=32 * p.tokens)]
    assert mosaic_prefill_config.choose(p) == mosaic_prefill_config.heuristic(p)


def test_at_most_300_cells_hold_every_pair():
    assert len(CELLS) <= 300
    for i, j in itertools.combinations(range(len(LISTS)), 2):
        met = {(cell[i], cell[j]) for cell in CELLS}
        assert len(met) >= len(LISTS[i]) * len(LISTS[j]) - 1, (i, j)


REFUSED = {
    "f32 cache": ({"format": pa.F32}, "no F32 cache"),
    "shuffle": ({"layout": pa.SHUFFLE}, "no SHUFFLE layout"),
    "dim": ({"dim": 80}, "no head dim 80"),
    "page": ({"page_size": 8}, "no page size 8"),
    "ALiBi": ({"bias": pa.Bias(alibi_slopes=S((8,), jnp.float32))}, "no ALiBi"),
    "prefix ranges": ({"mask": pa.Mask(prefix_ranges=S((4, 2, 2), jnp.int32))}, "no prefix ranges"),
    "narrow": ({"dim": 64, "group": 3, "out": (pa.E4M3_STATIC, 0.5)}, "no FP8 rows of 64 for an odd group of 3"),
    "wide": ({"dim": 256, "format": pa.INT8_TOKEN_HEAD, "dtype": jnp.float32}, "no head dim 256 with a F32 query"),
}


@pytest.mark.parametrize(("change", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, reason):
    new = {"format": pa.E4M3_TENSOR, "layout": pa.NHD, "page_size": 64, "dim": 128, "dtype": jnp.bfloat16}
    new |= {"group": 4} | change
    names = ("format", "layout", "page_size", "dim", "dtype", "group")
    format, layout, page_size, dim, dtype, group = (new.pop(n) for n in names)
    cache = abstract_cache(format, layout, page_size=page_size, dim=dim)
    batch = pa.RaggedBatch(S((4, 8), jnp.int32), S((4,), jnp.int32), S((5,), jnp.int32))
    q = S((40, 2 * group, dim), dtype)
    assert reason in mosaic.supports(prepare(q, cache, batch, **new)[0])
    with pytest.raises(pa.Unsupported, match=reason):
        jax.eval_shape(
            lambda q, cache, batch: pa.paged_attention(q, cache, batch, backend="mosaic", **new), q, cache, batch
        )


def test_tiles_of_short_rows_only():
    """What a mixed step leaves to the decode kernel of many sequences."""
    starts = jnp.asarray(np.cumsum([0, 1, 3, 2, 0]), jnp.int32)
    batch = pa.RaggedBatch(jnp.zeros((4, 4), jnp.int32), jnp.full(4, 200, jnp.int32), starts)
    np.testing.assert_array_equal(np.asarray(batch.tiles_before(most=2))[:5], [0, 4, 4, 8, 8])


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_gpu(cell, rng):
    check(rng, on_gpu, *cell)


@pytest.mark.gpu
def test_more_blocks_than_ctas_on_gpu(rng):
    """CTAs take one block after the other, from one long sequence and from many short ones."""
    for lengths in (((3000,), (3000,)), ((700,), (9000,)), ((40, 1) * 100, (50, 700) * 100)):
        for query in ("f32", "E4M3_TENSOR"):
            check(rng, on_gpu, "E4M3_HEAD", "HND", 64, 128, (8, 2), query, "plain", lengths)


# Shapes of `test_any_lengths_on_gpu`: fixed, for each kind is a compilation.
MOST, WIDTH, TOKENS = 6, 12, 400
RAGGED = {  # format, layout, heads, query, option
    "plain": ("E4M3_TENSOR", "HND", (8, 2), "bf16", "sinks"),
    "window": ("INT8_TOKEN_HEAD", "PACKED", (4, 2), "f16", "window 1"),
    "bf16": ("BF16", "NHD", (6, 2), "f32", "window 1"),
}
lengths = st.one_of(st.integers(0, 64 * WIDTH), st.sampled_from([0, 1, 63, 64, 65, 128, 64 * WIDTH]))


@functools.cache
def ragged_step(sinks):
    def step(q, cache, batch, window):
        options = library_options(sinks=SINKS[: q.shape[1]]) if sinks else {"mask": pa.Mask(window=window)}
        return pa.paged_attention(q, cache, batch, backend="mosaic", out=jnp.float32, return_lse=True, **options)

    return jax.jit(step)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", RAGGED)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_lengths_on_gpu(kind, data):
    format, layout, heads, query, option = RAGGED[kind]
    kv_lens = data.draw(st.lists(lengths, min_size=1, max_size=MOST))
    q_lens = []
    for _ in kv_lens:
        most = TOKENS - sum(q_lens)
        q_lens.append(data.draw(st.one_of(st.integers(0, min(3, most)), st.integers(0, most))))
    options = options_for(option, heads)
    if "window" in options:
        options["window"] = np.int32(data.draw(st.one_of(st.integers(1, 64 * WIDTH), st.integers(1, 3))))
    rng = np.random.default_rng(sum(kv_lens))
    random = make(
        rng, format, q_lens, kv_lens, heads=heads, dim=128, page_size=64, num_pages=MOST * WIDTH, table_width=WIDTH,
        spare_seqs=MOST - len(kv_lens), spare_tokens=TOKENS - sum(q_lens), q_dtype=DTYPES.get(query, oracle.F32),
        q_format=None if query in DTYPES else query,
    )  # fmt: skip
    out, lse = ragged_step(option == "sinks")(*random.arguments(layout), options.get("window"))
    # The worst of up to 35,000 rows, ten times as many as decode has.
    compare(out, lse, *random.expected(**options), worst=1.2e-2, off=1.5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", [LOWERED[0], LOWERED[4], LOWERED[1]], ids=lambda c: "-".join(map(str, c)))
def test_every_row_is_written(cell, rng):
    """Those of padding, of sequences without keys, and where no query sees a key too."""
    check(rng, into_nan, *cell)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_same_input_same_bits(layout, rng):
    q_lens, kv_lens = (700, 1, 50, 1), (2000, 77, 50, 1200)
    random = make(rng, "E4M3_TENSOR", q_lens, kv_lens, heads=(32, 8), dim=128, page_size=64, q_dtype=oracle.BF16)
    args = random.arguments(layout)
    step = jax.jit(lambda *args: pa.paged_attention(*args, backend="mosaic", return_lse=True))
    first = [np.asarray(x) for x in step(*args)]
    for _ in range(100):
        for x, y in zip(first, step(*args), strict=True):
            np.testing.assert_array_equal(x, np.asarray(y))


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["E4M3_STATIC", "E4M3_TENSOR", "E5M2_STATIC"])
def test_fp8_output_on_gpu(format, rng):
    q_lens, kv_lens = LENGTHS["mixed"]
    random = make(rng, "E4M3_TENSOR", q_lens, kv_lens, heads=(8, 2), dim=128, page_size=64, q_format="E4M3_TENSOR")
    args = random.arguments("NHD")
    scale = jnp.float32(0.3 / getattr(pa, format).qmax)
    out = on_gpu(*args, out=(getattr(pa, format), scale))
    # The same float32 result, rounded by the library's own quantiser: the same codes.
    want = pa.quantize(on_gpu(*args, out=jnp.float32), getattr(pa, format), scale)
    same = np.asarray(out.values).view(np.uint8) == np.asarray(want.values).view(np.uint8)
    assert np.mean(same) > (0.999 if format == "E4M3_TENSOR" else 0.9999)  # XLA's division on a GPU is approximate


GOLDENS = [
    "ua_bf16", "ua_bf16_kvfp8", "ua_qfp8_kvfp8", "ua_fp16_d64", "ua_window", "ua_softcap_kvfp8", "ua_sinks",
    "ua_per_seq_causal", "ua_fp8_out", "ua_fp8_pth", "ua_int8_pth", "fa3_fp8_lse", "flashinfer_prefill",
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_on_gpu(name):
    (q, cache, batch), options = library_problem(name)
    out, lse = on_gpu(q, cache, batch, **options)
    out = out.values if isinstance(out, pa.Quantized) else out
    # FP8 products are summed in less than float32 by the matrix unit.
    assert_matches_upstream(name, out, lse, lse_atol=1e-3)
