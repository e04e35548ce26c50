"""MLA on Hopper for sequences of many query tokens, which are cut into pieces: where they are cut, that the kernels
lower, what they compute (interpreted, or on a GPU)."""

import dataclasses

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import relative_error
from test_mosaic_mla import SCALE, S, abstract, check, check_groups, lowered, problem, runner
from test_mosaic_prefill import LENGTHS
from test_mosaic_up import check_whole

import pallas_attn as pa
from pallas_attn.core.batch import TILE
from pallas_attn.ops.mla import mosaic, mosaic_merge, mosaic_pieces
from pallas_attn.ops.mla.mosaic_form import MOST_SEQS, form_of
from pallas_attn.ops.mla.problem import prepare


@pytest.fixture(autouse=True)
def set_up(monkeypatch):
    """The kernels know one width of rows."""
    monkeypatch.setattr(latents, "dims_of", lambda format: (512, 64))


@pytest.fixture
def interpreted(monkeypatch):
    """Tall tiles of the merge, of which there are few."""
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_merge, "SMS", 1)


# ---------------------------------------------------------------- where they are cut


def form(heads, tokens, seqs, max_q_len=None):
    """The form of a problem of shapes only."""
    arguments, options = abstract("BF16", heads, seqs=seqs)
    query = S((tokens, heads, 512), jnp.bfloat16), S((tokens, heads, 64), jnp.bfloat16)
    batch = dataclasses.replace(arguments[-1], max_q_len=max_q_len)
    p = prepare(*query, arguments[2], batch, **options)[0]
    return p, form_of(p)


@pytest.mark.parametrize(("heads", "tokens", "columns"), [(128, 1, 2), (16, 4, 1), (40, 8, 5), (1, 8, 1), (96, 2, 3)])
def test_pieces_fill_blocks(heads, tokens, columns):
    form_ = form(heads, 1000, 7)[1]
    assert (form_.tokens, form_.columns, form_.rows) == (tokens, columns, 64)
    assert form_.seqs == (1000 + 7 * (tokens - 1)) // tokens


@pytest.mark.parametrize(("max_q_len", "tokens"), [(1, 1), (8, 8), (9, 1), (None, 1)])
def test_few_tokens_stay_whole(max_q_len, tokens):
    assert form(128, 20, 3, max_q_len)[1].tokens == tokens


@pytest.mark.parametrize(("tokens", "seqs"), [(8193, 1), (40000, 8192), (2**20, 100), (10, 8192)])
def test_pieces_are_never_too_many(tokens, seqs):
    p, form_ = form(128, tokens, seqs)
    assert form_.seqs <= MOST_SEQS
    assert mosaic.supports(p) is None


BATCHES = {  # cu_q_lens, kv_lens, real sequences, tokens
    "mixed": ([0, 1, 11, 11, 40, 41], [9, 70, 7, 300, 64], 5, 41),
    "padding before and behind": ([3, 3, 20, 22, 0, 0], [5, 90, 2, 10**6, 10**6], 3, 30),
    "before the first key": ([0, 20, 29, 29, 29, 29], [5, 0, 0, 0, 0], 5, 29),
    "longer than its pages": ([0, 9, 9, 9, 9, 9], [10**6, 0, 0, 0, 0], 1, 9),
    "none": ([4] * 6, [1] * 5, 5, 8),
}


@pytest.mark.parametrize("heads", [128, 16, 8])
@pytest.mark.parametrize("name", BATCHES)
def test_cut(name, heads):
    """Every token is in one piece, which has its sequence's pages and ends with its own last token."""
    cu, kv_lens, live, tokens = BATCHES[name]
    p, form_ = form(heads, tokens, len(kv_lens))
    batch = pa.RaggedBatch(jnp.zeros((5, 8), jnp.int32), jnp.asarray(kv_lens), jnp.asarray(cu), jnp.int32(live))
    x = jax.tree.map(np.asarray, jax.jit(lambda b: mosaic_pieces.cut(p, form_, b))(batch))
    found, n, keys = {}, form_.tokens, 8 * 64
    for b in range(form_.seqs):
        start, end = x["cu_q_lens"][b : b + 2]
        assert 0 <= end - start <= n
        for t in range(start, end):
            assert t not in found
            found[t] = (x["owners"][b], x["kv_lens"][b] - end + t + 1)
        tiles = max(-(-x["kv_lens"][b] // TILE), 0) * (end > start)
        assert x["before"][b + 1] - x["before"][b] == (tiles + mosaic_pieces.BEGIN if tiles else 0)
    want = {
        t: (b, min(kv_lens[b], keys) - cu[b + 1] + t + 1) for b in range(live) for t in range(cu[b], cu[b + 1])
    }  # fmt: skip
    assert found == want
    assert (x["cu_q_lens"][0], x["cu_q_lens"][-1]) == (cu[0], cu[live])
    assert x["live"] == form_.seqs
    assert set(x["before"][form_.seqs + 1 :]) == {2**31 - 1}


def test_what_makes_no_sense_stays_inside():
    """Lengths that fall, and more tokens than there are."""
    p, form_ = form(16, 20, 5)
    batch = pa.RaggedBatch(jnp.zeros((5, 8), jnp.int32), jnp.full(5, -3), jnp.asarray([0, 15, 2, 50, -9, 17]))
    x = jax.tree.map(np.asarray, mosaic_pieces.cut(p, form_, batch))
    assert np.all((x["owners"] >= 0) & (x["owners"] < 5))
    assert np.all((x["cu_q_lens"] >= 0) & (x["cu_q_lens"] <= 20))
    assert np.all(np.diff(x["before"][: form_.seqs + 1]) >= 0)


# ---------------------------------------------------------------- lowering

LOWERED = {
    "fp8": (("E4M3_TENSOR", 16, 40, 16, "E4M3_TOKEN_HEAD"), {"return_lse": True, "out": pa.e4m3_group(128)}),
}
MORE_LOWERED = {
    "bf16": (("BF16", 128, None, 64), {}),
    "f16": (("F16", 12, None, 128), {"out": jnp.float32, "return_lse": True}),
    "fp8, 128 heads": (("E4M3_TENSOR", 128, None, 64), {"out": pa.e4m3_group(64, ue8m0=True, order="tma")}),
    "static": (("BF16", 40, 9, 32), {"out": (pa.E4M3_STATIC, 0.5)}),
}


@pytest.mark.parametrize("name", [*LOWERED, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_LOWERED)])
def test_lowers(name):
    cell, keywords = (LOWERED | MORE_LOWERED)[name]
    assert lowered(*cell, **keywords).count("stablehlo.custom_call @mosaic_gpu_v2") == 2


# ---------------------------------------------------------------- results

MIXED = {"q_lens": (10, 1, 0, 3), "kv_lens": (75, 66, 5, 2)}  # pieces of 8 tokens, one before the first key


def test_interpreted(rng, interpreted):
    """A prompt behind a cached context beside decode, tokens without keys, padding; two workers share a piece."""
    check(rng, runner(2), "BF16", 8, None, 64, **MIXED)


def test_interpreted_fp8(rng, interpreted):
    """Groups of results, one worker: none is partial. Scales differ from row to row."""
    out = pa.e4m3_group(128, order="tma")
    check_groups(rng, runner(1), out, "E4M3_TENSOR", 16, None, 64, "E4M3_TOKEN_HEAD", q_lens=(5, 1), kv_lens=(66, 65))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [("BF16", 128, None, 64), ("F16", 16, 20, 16), ("E4M3_TENSOR", 40, None, 32)], ids=str)
def test_more_interpreted(cell, rng, interpreted):
    check(rng, runner(3), *cell, q_lens=(3, 1), kv_lens=(130, 65))


STEPS = LENGTHS | {"long": ((1, 600, 9), (5000, 900, 3000)), "one prompt": ((300,), (300,))}
LISTS = (
    (("BF16", None), ("F16", None), ("E4M3_TENSOR", None), ("E4M3_TENSOR", "E4M3_TOKEN_HEAD")),
    ((128, 64), (16, 16), (40, 32), (1, 128), (96, 256)),
    tuple(STEPS),
    (None, 1, 7),
)
CELLS = pairwise(LISTS)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_a_gpu(cell, rng):
    (format, q_format), (heads, page_size), step, workers = cell
    q_lens, kv_lens = STEPS[step]
    check(rng, runner(workers), format, heads, None, page_size, q_format, q_lens=q_lens, kv_lens=kv_lens)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [None, 1])
@pytest.mark.parametrize("out", [pa.e4m3_group(128), pa.e4m3_group(64, ue8m0=True, order="tma")], ids=str)
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR"])
def test_groups_on_a_gpu(format, out, workers, rng):
    q_lens, kv_lens = LENGTHS["mixed"]
    for heads, page_size in ((128, 64), (24, 16)):
        check_groups(rng, runner(workers), out, format, heads, None, page_size, q_lens=q_lens, kv_lens=kv_lens)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [128, 16])
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR"])
def test_same_bits_every_time(format, heads, rng):
    q_lens, kv_lens = LENGTHS["mixed"]
    random = problem(rng, format, heads, None, 64, None, q_lens=q_lens, kv_lens=kv_lens)
    step = jax.jit(lambda *a: runner(None)(*a, scale=SCALE, return_lse=True))
    first, *others = (jax.tree.map(np.asarray, step(*random.arguments())) for _ in range(10))
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
def test_up_projected_on_a_gpu(rng):
    check_whole(rng, "BF16", 16, *LENGTHS["mixed"])


@pytest.mark.gpu
def test_more_pieces_than_sequences_may_be(rng, monkeypatch):
    """Pieces of more rows, and the same results as where they are cut."""
    random = problem(rng, "BF16", 128, None, 64, None, q_lens=(40, 1, 100), kv_lens=(40, 700, 300))
    step = lambda: runner(None)(*random.arguments(), scale=SCALE, out=jnp.float32)[0]  # noqa: E731
    short = step()
    monkeypatch.setattr("pallas_attn.ops.mla.mosaic_form.MOST_SEQS", 30)
    long = step()
    assert np.linalg.norm(long - short) <= 4e-3 * np.linalg.norm(short)
    assert relative_error(np.asarray(long), np.asarray(short)) <= 1.2e-2
