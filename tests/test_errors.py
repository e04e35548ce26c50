"""Bad input raises InvalidInput with argument, value and fix; what only run time knows never leaves the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import LAYOUTS, make

import pallas_attn as pa

pytestmark = pytest.mark.usefixtures("without_type_checks")

OK = {"num_pages": 4, "page_size": 16, "kv_heads": 2, "head_dim": 32}
BATCH = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3], jnp.int32), jnp.array([0, 1, 4], jnp.int32))
Q = jnp.zeros((4, 4, 32))
FP8 = jnp.zeros((4, 16, 2, 32), jnp.float8_e4m3fn)
ROWS = jnp.zeros((4, 2, 32))
SLOTS = jnp.arange(4, dtype=jnp.int32)


def cache(format=pa.F32, **changes):
    return pa.PagedKVCache.allocate(**{**OK, **changes}, format=format)


def quantized(scale, format=pa.E4M3_TENSOR, values=FP8):
    return pa.PagedKVCache(pa.Quantized(values, scale, format), pa.Quantized(values, scale, format))


def attend(q=Q, kv=None, batch=BATCH, **keywords):
    return pa.paged_attention(q, cache() if kv is None else kv, batch, **keywords)


def write(kv=None, k=ROWS, v=ROWS, slots=SLOTS):
    return pa.write_kv(cache() if kv is None else kv, k, v, slots)


def batch(**changes):
    return dataclasses.replace(BATCH, **changes)


def ones(*shape):
    return jnp.ones(shape)


def attend_fp8_query(scale, format):
    return attend(q=pa.Quantized(Q.astype(jnp.float8_e4m3fn), scale, format))


one = jnp.float32(1)
floats = cache()
# name: (call, the argument that the message names, a piece of the value that it shows)
BAD = {
    "query rank": (lambda: attend(q=Q[0]), r"\bq\b", r"\(4, 32\)"),
    "query head dim": (lambda: attend(q=Q[..., :16]), r"\bq\b", "16"),
    "query heads do not divide": (lambda: attend(q=jnp.zeros((4, 3, 32))), r"\bq\b", "3"),
    "integer query": (lambda: attend(q=Q.astype(jnp.int32)), r"\bq\b", "int32"),
    "fp8 query without scale": (lambda: attend(q=Q.astype(jnp.float8_e4m3fn)), r"\bq\b", "float8_e4m3fn"),
    "query scale shape": (lambda: attend_fp8_query(jnp.ones(3), pa.E4M3_HEAD), r"q.*scale", r"\(3,\)"),
    "query scale zero": (lambda: attend_fp8_query(one * 0, pa.E4M3_TENSOR), r"q.*scale", "0"),
    "fp8 cache without scale": (lambda: attend(kv=pa.PagedKVCache(FP8, FP8)), r"cache\.k", "float8_e4m3fn"),
    "fp8 values, float keys": (lambda: attend(kv=pa.PagedKVCache(floats.k, FP8)), r"cache\.v", "float8_e4m3fn"),
    "cache rank": (lambda: attend(kv=pa.PagedKVCache(Q, Q)), r"cache\.k", "rank 3"),
    "value shape": (lambda: attend(kv=pa.PagedKVCache(floats.k, floats.v[:3])), r"cache\.v", r"\(3, 16, 2, 32\)"),
    "cache scale shape": (lambda: attend(kv=quantized(jnp.ones(2))), r"cache\.k.*scale", r"\(2,\)"),
    "head scale shape": (lambda: attend(kv=quantized(jnp.ones(3), pa.E4M3_HEAD)), r"cache\.k.*scale", r"\(3,\)"),
    "sequence scale shape": (lambda: attend(kv=quantized(ones(5, 2), pa.E4M3_SEQ_HEAD)), r"k.*scale", r"\(5, 2\)"),
    "token scale shape": (lambda: attend(kv=quantized(ones(4, 2, 9), pa.E4M3_TOKEN_HEAD)), r"k.*scale", r"\(4, 2, 9\)"),
    "scale negative": (lambda: attend(kv=quantized(-one)), r"cache\.k.*scale", "-1"),
    "scale NaN": (lambda: attend(kv=quantized(one * jnp.nan)), r"cache\.k.*scale", "nan"),
    "storage type": (lambda: attend(kv=quantized(one, pa.E5M2_TENSOR)), r"cache\.k", "float8_e4m3fn"),
    "group format in a cache": (lambda: cache(pa.e4m3_group(64), k_scale=one, v_scale=one), "format", "GROUP64"),
    "scale forgotten": (lambda: cache(pa.E4M3_TENSOR), "k_scale", "None"),
    "layout cannot hold pages": (lambda: cache(layout=pa.SHUFFLE, page_size=10), "page_size", "10"),
    "layout cannot hold dims": (lambda: cache(layout=pa.SHUFFLE, head_dim=30), "head_dim", "30"),
    "layout of one buffer": (lambda: cache(layout=pa.PACKED, v_head_dim=16), "v_head_dim", "16"),
    "page table rank": (lambda: attend(batch=batch(page_table=jnp.zeros(3, jnp.int32))), "page_table", r"\(3,\)"),
    "page table type": (lambda: attend(batch=batch(page_table=jnp.zeros((2, 3)))), "page_table", "float32"),
    "page table too narrow": (lambda: attend(batch=batch(kv_lens=jnp.array([20, 49]))), "page_table|kv_lens", "49"),
    "kv_lens shape": (lambda: attend(batch=batch(kv_lens=jnp.zeros(3, jnp.int32))), "kv_lens", r"\(3,\)"),
    "cu_q_lens shape": (lambda: attend(batch=batch(cu_q_lens=jnp.zeros(2, jnp.int32))), "cu_q_lens", r"\(2,\)"),
    "sinks shape": (lambda: attend(sinks=jnp.zeros(2)), "sinks", r"\(2,\)"),
    "slopes shape": (lambda: attend(bias=pa.Bias(alibi_slopes=jnp.zeros(5))), "alibi_slopes", r"\(5,\)"),
    "query-query rank": (lambda: attend(bias=pa.Bias(query_query=jnp.zeros(5))), "query_query", r"\(5,\)"),
    "causal shape": (lambda: attend(mask=pa.Mask(causal=jnp.ones(3, bool))), "causal", r"\(3,\)"),
    "prefix ranges shape": (lambda: attend(mask=pa.Mask(prefix_ranges=SLOTS)), "prefix_ranges", r"\(4,\)"),
    "chunks without window": (lambda: attend(mask=pa.Mask(chunk_lookback=1)), "chunk_lookback|window", "None|1"),
    "chunks of nothing": (lambda: attend(mask=pa.Mask(window=1, chunk_lookback=1)), "chunk_lookback|window", "1"),
    "rswa shape": (lambda: attend(mask=pa.Mask(rswa=(jnp.zeros(3, jnp.int32), 4))), "rswa", r"\(3,\)"),
    "output format": (lambda: attend(out=(pa.E4M3_HEAD, jnp.ones(4))), r"\bout\b", "E4M3_HEAD"),
    "output fp8 without scale": (lambda: attend(out=jnp.float8_e4m3fn), r"\bout\b", "float8_e4m3fn"),
    "output scale shape": (lambda: attend(out=(pa.E4M3_TENSOR, jnp.ones(2))), r"\bout\b", r"\(2,\)"),
    "output scale zero": (lambda: attend(out=(pa.E4M3_TENSOR, one * 0)), r"\bout\b", "0"),
    "backend": (lambda: attend(backend="nonsense"), "backend", "nonsense"),
    "not a cache": (lambda: attend(kv=FP8), "cache", ""),
    "write rank": (lambda: write(k=ROWS[0]), r"\bk\b", r"\(2, 32\)"),
    "write heads": (lambda: write(k=jnp.zeros((4, 3, 32))), r"\bk\b", "3"),
    "write value dim": (lambda: write(v=jnp.zeros((4, 2, 16))), r"\bv\b", "16"),
    "write rows differ": (lambda: write(v=jnp.zeros((5, 2, 32))), r"\bv\b", r"5"),
    "write fp8 rows": (lambda: write(k=ROWS.astype(jnp.float8_e4m3fn)), r"\bk\b", "float8_e4m3fn"),
    "write too few rows": (lambda: write(k=ROWS[:2], v=ROWS[:2]), r"slots|\bk\b", "4"),
    "slots rank": (lambda: write(slots=SLOTS[None]), "slots", r"\(1, 4\)"),
    "slots type": (lambda: write(slots=SLOTS.astype(jnp.float32)), "slots", "float32"),
    "quantize to a float": (lambda: pa.quantize(Q, pa.BF16), "format", "BF16"),
    "quantize to sequence scales": (lambda: pa.quantize(Q, pa.E4M3_SEQ_HEAD), "format", "E4M3_SEQ_HEAD"),
    "quantize scale shape": (lambda: pa.quantize(Q, pa.E4M3_HEAD, jnp.ones(3)), "scale", r"\(3,\)"),
    "quantize scale sign": (lambda: pa.quantize(Q, pa.E4M3_TENSOR, -one), "scale", "-1"),
    "quantize groups": (lambda: pa.quantize(Q, pa.e4m3_group(128)), r"\bx\b", "32"),
    "from_pages of two buffers": (lambda: pa.PagedKVCache.from_pages(Q, pa.NHD), "layout", "NHD"),
    "csr too narrow": (lambda: pa.RaggedBatch.from_csr(np.array([0, 4]), np.arange(4), max_pages=2), "max_pages", "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_input(name):
    call, argument, value = BAD[name]
    with pytest.raises(pa.InvalidInput, match=argument) as error:
        call()
    assert error.match(value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["query rank", "head scale shape", "query heads do not divide", "write heads"])
def test_raised_while_tracing(name):
    with pytest.raises(pa.InvalidInput):
        jax.eval_shape(BAD[name][0])


def test_traced_scales_pass():
    jax.eval_shape(lambda s: attend(kv=quantized(s)), one)


def test_csr_of_a_traced_indptr_needs_a_bound():
    with pytest.raises(pa.InvalidInput, match="max_pages"):
        jax.eval_shape(lambda p: pa.RaggedBatch.from_csr(p, jnp.arange(4)), jnp.array([0, 4]))


def test_errors_are_builtin_errors():
    assert issubclass(pa.InvalidInput, ValueError)
    assert issubclass(pa.Unsupported, NotImplementedError)


def run(backend, q, cache, batch):
    return jax.jit(lambda *a: pa.paged_attention(*a, return_lse=True, backend=backend))(q, cache, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_numbers_outside_the_cache(layout, backend, rng):
    """They are known only at run time: other sequences are right, and a guarded neighbour is never written."""
    problem = make(rng, "E4M3_TENSOR", q_lens=(1, 4, 2), kv_lens=(20, 9, 33))
    wild = dataclasses.replace(problem, page_table=problem.page_table.copy())
    wild.page_table[1] = [2**31 - 1, -(2**31), len(problem.k), -1][: problem.page_table.shape[1]]
    q, cache, batch = wild.arguments(layout)
    out, _ = run(backend, q, cache, batch)
    want, _ = problem.expected()
    others = np.r_[0, 5, 6]
    np.testing.assert_allclose(np.asarray(out)[others], want[others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", [5, 2**31 - 1, -9])
def test_csr_out_of_range(end, backend, rng):
    """Page numbers and ends of CSR lists that only run time knows spoil nothing but their own sequence."""
    cache = pa.PagedKVCache(*(jnp.asarray(rng.standard_normal((8, 1, 2, 32)), jnp.float32) for _ in range(2)))
    q, indices = jnp.asarray(rng.standard_normal((2, 4, 32)), jnp.float32), jnp.array([3, 6, 2**30, -9, 1])
    build = jax.jit(lambda indptr: pa.RaggedBatch.from_csr(indptr, indices, max_pages=4))
    out, lse = run(backend, q, cache, build(jnp.array([0, 2, end])))
    want, _ = run(backend, q, cache, pa.RaggedBatch.from_csr(jnp.array([0, 2, 2]), indices, max_pages=4))
    np.testing.assert_array_equal(np.asarray(out[0]), np.asarray(want[0]))
    assert np.isfinite(np.asarray(out)).all()
    assert not np.isnan(np.asarray(lse)).any()


@pytest.mark.parametrize("changes", [
    {"kv_lens": [2**31 - 1, 9, 33]},
    {"kv_lens": [-5, 9, 33]},
    {"cu_q_lens": [0, 1, 2**30, 2**31 - 1]},
    {"num_seqs": 99},
    {"num_seqs": -1},
], ids=str)  # fmt: skip
def test_lengths_outside_the_table(changes, backend, rng):
    """Lengths beyond the page table are cut at it; every output stays finite where the cache is."""
    problem = make(rng, "F32", q_lens=(1, 4, 2), kv_lens=(20, 9, 33), spare_seqs=0, spare_tokens=0)
    problem.k[np.isnan(problem.k)], problem.v[np.isnan(problem.v)] = 0, 0
    problem.page_table = np.clip(problem.page_table, 0, len(problem.k) - 1)
    q, cache, batch = problem.arguments()
    changes = {n: jnp.asarray(x, jnp.int32) for n, x in changes.items()}
    out, lse = run(backend, q, cache, dataclasses.replace(batch, **changes))
    assert np.isfinite(np.asarray(out)).all()
    assert not np.isnan(np.asarray(lse)).any()


def test_wild_slots_write_nothing(backend):
    """Guard pages around a cache inside a larger array stay as they are, whatever the slots."""
    full = jnp.full((3, 16, 2, 32), 7.0)
    slots = jnp.array([-1, -16, -(2**31), 48, 2**31 - 1], jnp.int32)
    rows = jnp.ones((5, 2, 32))
    for donate in ((), (0,)):
        write = jax.jit(lambda c, k, s: pa.write_kv(c, k, k, s, backend=backend), donate_argnums=donate)
        got = write(pa.PagedKVCache(full + 0, full + 0), rows, slots)
        assert all((np.asarray(x) == 7).all() for x in jax.tree.leaves(got))


def test_slot_mapping_of_wild_tables_stays_inside(backend):
    """Slots of page numbers outside the cache are dropped by write_kv, never wrapped around."""
    batch = pa.RaggedBatch(jnp.array([[-3], [1000], [2**27]]), jnp.full(3, 4), jnp.array([0, 4, 8, 12]))
    slots = batch.slot_mapping(12, 16)
    cache = pa.PagedKVCache.allocate(3, 16, 2, 32, format=pa.F32)
    got = pa.write_kv(cache, jnp.ones((12, 2, 32)), jnp.ones((12, 2, 32)), slots, backend=backend)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


def test_nan_of_another_sequence_does_not_leak(backend, rng):
    """A live key of NaN spoils its own sequence only."""
    problem = make(rng, "F32", q_lens=(2, 3), kv_lens=(20, 20))
    problem.k[problem.page_table[0, 0], 3] = np.nan
    out, _ = run(backend, *problem.arguments())
    problem.k = np.nan_to_num(problem.k)
    want, _ = problem.expected()
    np.testing.assert_allclose(np.asarray(out)[2:5], want[2:5], rtol=1e-4, atol=1e-5)
    assert np.isnan(np.asarray(out)[:2]).all()
