"""The sparse indexer's ops: upstream's bytes and answers, backends against each other, adversarial rows, bad input."""

import dataclasses
import functools

import goldens
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa

D = 128
# One compilation each, where eager calls would be dozens.
quantize = jax.jit(pa.quantize, static_argnums=1)
dequantize = jax.jit(pa.dequantize)
to_slots = jax.jit(pa.to_slots, static_argnames=("page_size", "compact"))
read_slots, read = jax.jit(pa.IndexCache.read_slots), jax.jit(pa.IndexCache.read)
CACHES = [
    (pa.INDEX_K, pa.INDEX_NORMAL, 1), (pa.INDEX_K, pa.INDEX_NORMAL, 5), (pa.INDEX_K, pa.INDEX_SHUFFLE, 16),
    (pa.INDEX_K_F32, pa.INDEX_SHUFFLE, 32), (pa.INDEX_K_EXPONENT, pa.INDEX_NORMAL, 16),
]  # fmt: skip
# The definition is held to on two of them, the portable backend on all.
CELLS = [(*cache, backend) for backend, caches in (("xla", CACHES), ("reference", CACHES[1:3])) for cache in caches]
IDS = [f"{f.name}-{layout.name}-{s}-{backend}" for f, layout, s, backend in CELLS]
of_every_cache = pytest.mark.parametrize(("format", "layout", "page_size", "backend"), CELLS, ids=IDS)


def poisoned(pages, page_size, format=pa.INDEX_K, layout=None, dim=D):
    """A cache whose unwritten bytes are all NaN, as values and as float32 scales."""
    cache = pa.IndexCache.allocate(pages, page_size, dim, format=format, layout=layout)
    return cache.replace(jnp.full_like(cache.pages, 0x7F if format.exponents else 0xFF))


def table(rng, seqs, pages_per_seq, spare=2):
    """Pages of the sequences, no page twice."""
    return rng.permutation(seqs * pages_per_seq + spare)[: seqs * pages_per_seq].reshape(seqs, -1).astype(np.int32)


def step(rng, cache, kv_lens, q_lens, num_seqs=None, padding=0, heads=4, pages_per_seq=3):
    """(written cache, batch, FP8 queries, weights, the sequences' keys as floats)."""
    kv_lens, q_lens = np.array(kv_lens, np.int32), np.array(q_lens, np.int32)
    pages = table(rng, len(kv_lens), pages_per_seq)
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    batch = pa.RaggedBatch(jnp.array(pages), jnp.array(kv_lens), jnp.array(cu), num_seqs)
    keys = [rng.normal(size=(n, D)).astype(np.float32) for n in kv_lens]
    x, size = np.arange(pages_per_seq * cache.page_size), cache.page_size
    slots = np.where(x < kv_lens[:, None], pages[:, x // size] * size + x % size, -1).astype(np.int32)
    rows = np.stack([np.pad(k, ((0, len(x) - len(k)), (0, 0))) for k in keys]).reshape(-1, D)
    cache = pa.write_index(cache, jnp.array(rows), jnp.array(slots.reshape(-1)), backend="xla")
    tokens = int(cu[-1]) + padding
    q = quantize(jnp.array(rng.normal(size=(tokens, heads, D)).astype(np.float32)), pa.INDEX_Q)
    return cache, batch, q, jnp.array(rng.normal(size=(tokens, heads)).astype(np.float32)), keys


def written_numbers(k, format):
    return np.asarray(dequantize(quantize(jnp.asarray(k), format)))


def defined_logits(q, weights, k):
    """The formula in float64."""
    q, k, w = (np.asarray(x, np.float64) for x in (q, k, weights))
    return np.einsum("th,thn->tn", w, np.maximum(np.einsum("thd,nd->thn", q, k), 0))


def assert_close(got, want):
    """-inf in the same places, and 1 - 2xy/(x^2 + y^2) below 1e-5 in every row."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert not np.isnan(got).any()
    got, want = (np.where(np.isneginf(x), 0, x) for x in (got, want))
    square = np.sum(got**2 + want**2, axis=1)
    assert np.all(np.where(square > 0, 1 - 2 * np.sum(got * want, axis=1) / np.maximum(square, 1e-30), 0) < 1e-5)


def defined_topk(logits, k, starts=0, ends=None, ordered=False):
    """Python's own stable sort, row by row."""
    logits = np.nan_to_num(np.asarray(logits, np.float32), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    rows, columns = logits.shape
    starts = np.clip(np.broadcast_to(starts, rows), 0, columns)
    ends = np.clip(np.broadcast_to(columns if ends is None else ends, rows), 0, columns)
    out = np.full((rows, k), -1, np.int32)
    for row, start, end, to in zip(logits, starts, ends, out, strict=True):
        best = np.argsort(-row[start:end], kind="stable")[:k]
        to[: len(best)] = best if ordered else np.sort(best)
    return out


# Goldens of the real upstream kernels.


def test_writer_and_gather_of_shuffled_pages(backend):
    _, x, want = goldens.load("indexer_writer_gather_triton_shuffle")
    pages = jnp.zeros(want["cache"].shape, jnp.uint8)
    cache = pa.IndexCache(pages, pa.INDEX_SHUFFLE, pa.INDEX_K)
    slots = jnp.asarray(x["slot_mapping"].astype(np.int32))
    cache = pa.write_index(cache, jnp.asarray(x["k"]), slots, backend=backend)
    np.testing.assert_array_equal(cache.pages, want["cache"])
    check_gather(cache, x, want, backend)


def test_writer_of_normal_pages(backend):
    _, x, want = goldens.load("indexer_k_quant_ue8m0")
    cache = pa.IndexCache(jnp.asarray(x["cache"]), pa.INDEX_NORMAL, pa.INDEX_K)
    slots = jnp.asarray(x["slot_mapping"].astype(np.int32))
    cache = pa.write_index(cache, jnp.asarray(x["k"]), slots, backend=backend)
    np.testing.assert_array_equal(cache.pages, want["cache"])


def test_gather_of_normal_pages(backend):
    _, x, want = goldens.load("indexer_k_gather")
    check_gather(pa.IndexCache(jnp.asarray(x["cache"]), pa.INDEX_NORMAL, pa.INDEX_K), x, want, backend)


def check_gather(cache, x, want, backend):
    lens = np.diff(x["cu_seqlens"])
    batch = pa.RaggedBatch(jnp.asarray(x["block_table"]), jnp.asarray(lens), jnp.arange(len(lens) + 1, dtype=jnp.int32))
    got = pa.gather_index(cache, batch, max_tokens=int(lens.sum()) + 3, backend=backend)
    np.testing.assert_array_equal(got.cu_lens, x["cu_seqlens"])
    rows = int(lens.sum())
    np.testing.assert_array_equal(np.asarray(got.k.values)[:rows].view(np.uint8), want["k_fp8"].view(np.uint8))
    np.testing.assert_array_equal(np.asarray(got.k.scale)[:rows, 0], want["k_scale"])
    assert not np.asarray(got.k.values[rows:], np.float32).any()


def unscaled(q):
    """Queries whose scale upstream has folded into the weights already."""
    return pa.Quantized(jnp.asarray(q), jnp.ones((*q.shape[:2], 1)), pa.INDEX_Q)


@pytest.mark.parametrize("name", ["paged_mqa_logits_triton", "deepgemm_paged_mqa_nn1", "deepgemm_paged_mqa_nn2"])
def test_paged_logits_of_upstream(name, backend):
    options, x, want = goldens.load(name)
    seqs, next_n, heads, dim = x["q"].shape
    batch = pa.RaggedBatch(
        jnp.asarray(x["block_table"]), jnp.asarray(x["context_lens"]),
        jnp.arange(seqs + 1, dtype=jnp.int32) * next_n, max_q_len=next_n,
    )  # fmt: skip
    cache = pa.IndexCache(jnp.asarray(x["cache"]), pa.INDEX_NORMAL, pa.INDEX_K_F32)
    q = unscaled(x["q"].reshape(-1, heads, dim))
    width = options["max_model_len"]
    got = pa.paged_indexer_logits(q, jnp.asarray(x["weights"]), cache, batch, max_len=width, backend=backend)
    assert_close(got, want["logits"])


def test_logits_of_upstream(backend):
    options, x, want = goldens.load("deepgemm_mqa")
    k = pa.Quantized(jnp.asarray(x["k"]), jnp.asarray(x["k_scale"])[:, None], pa.INDEX_K_F32)
    arguments = unscaled(x["q"]), k, *(jnp.asarray(x[n]) for n in ("weights", "ks", "ke"))
    got = pa.indexer_logits(*arguments, width=options["max_seqlen_k"], backend=backend)
    assert_close(got, want["logits"])
    wide = pa.indexer_logits(*arguments, backend=backend)
    for row, start, end, one in zip(np.asarray(wide), x["ks"], x["ke"], np.asarray(got), strict=True):
        assert np.isneginf(np.delete(row, np.arange(start, end))).all()
        np.testing.assert_array_equal(row[start:end], one[: end - start])


@pytest.mark.parametrize("name", ["topk_decode", "topk_prefill"])
def test_topk_of_upstream(name, backend):
    options, x, want = goldens.load(name)
    logits, ends = jnp.asarray(x["logits"]), jnp.asarray(x["row_ends"])
    starts = jnp.asarray(x["row_starts"]) if "row_starts" in x else None
    got = np.asarray(pa.indexer_topk(logits, options["k"], starts=starts, ends=ends, backend=backend))
    for row, ours, theirs, values, start in zip(
        x["logits"], got, want["indices"], want["values_sorted"], x.get("row_starts", np.zeros(len(got), int)),
        strict=True,
    ):  # fmt: skip
        assert (ours >= 0).sum() == (theirs >= 0).sum()
        mine = -np.sort(-row[start + ours[ours >= 0]])
        np.testing.assert_array_equal(mine, values[: len(mine)])
        if len(set(row)) == len(row):
            assert set(ours) == set(theirs)


def test_slots_of_upstream():
    options, x, want = goldens.load("req_index_to_global")
    pages = jnp.asarray(x["block_table"][x["req_id"]])
    batch = pa.RaggedBatch(pages, jnp.full(len(pages), 80), jnp.arange(len(pages) + 1, dtype=jnp.int32))
    got = to_slots(jnp.asarray(x["token_indices"]), batch, page_size=options["block_size"])
    np.testing.assert_array_equal(got, want["out"])
    front, counts = to_slots(jnp.asarray(x["token_indices"]), batch, page_size=options["block_size"], compact=True)
    for row, whole, count in zip(np.asarray(front), np.asarray(got), np.asarray(counts), strict=True):
        np.testing.assert_array_equal(row[:count], whole[whole >= 0])
        assert (row[count:] == -1).all()


# The cache.


@of_every_cache
def test_what_is_written_is_read(format, layout, page_size, backend, rng):
    cache = poisoned(7, page_size, format, layout)
    before = np.asarray(cache.pages)
    slots = rng.permutation(7 * page_size)[: max(page_size, 3)].astype(np.int32)
    slots = np.concatenate([slots, [-1, 7 * page_size, -page_size]]).astype(np.int32)
    k = jnp.asarray(rng.normal(size=(len(slots) + 2, D)).astype(np.float32))
    got = pa.write_index(cache, k, jnp.asarray(slots), backend=backend)
    real = slots[:-3]
    values, scale = read_slots(got, real // page_size, real % page_size)
    want = quantize(k[: len(real)], format)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(want.values).view(np.uint8))
    np.testing.assert_array_equal(scale, want.scale)
    whole, scales = read(got, jnp.arange(7))
    np.testing.assert_array_equal(
        np.asarray(whole).reshape(-1, D)[real].view(np.uint8), np.asarray(values).view(np.uint8)
    )
    np.testing.assert_array_equal(np.asarray(scales).reshape(-1, 1)[real], scale)
    changed = (np.asarray(got.pages) != before).sum()
    assert 0 < changed <= len(real) * (D + 4)
    if layout is pa.INDEX_NORMAL:  # all else is as it was: values of slot s at s D, its scale at S D + 4 s
        flat, old = (np.asarray(x).reshape(7, -1) for x in (got.pages, before))
        keep = np.ones_like(flat, bool)
        for page, slot in zip(real // page_size, real % page_size, strict=True):
            keep[page, slot * D : (slot + 1) * D] = False
            keep[page, page_size * D + 4 * slot : page_size * D + 4 * slot + 4] = False
        np.testing.assert_array_equal(flat[keep], old[keep])


def test_bytes_lie_where_upstream_has_them(rng):
    layout = pa.INDEX_SHUFFLE
    s, d = np.meshgrid(np.arange(32), np.arange(D), indexing="ij")
    want = (s // 16) * 16 * D + (d // 16) * 256 + (s % 16) * 16 + d % 16
    np.testing.assert_array_equal(layout.offsets(jnp.arange(32), 32, D), want)
    np.testing.assert_array_equal(pa.INDEX_NORMAL.offsets(jnp.arange(32), 32, D), s * D + d)


def test_scales_are_exponents_or_floats(backend):
    k = jnp.stack([jnp.full(D, 448.0), jnp.full(D, 449.0), jnp.zeros(D), jnp.full(D, 1e-3)])
    stored = {}
    for format in pa.INDEX_FORMATS:
        cache = pa.IndexCache.allocate(1, 16, format=format, layout=pa.INDEX_NORMAL)
        cache = pa.write_index(cache, k, jnp.arange(4), backend=backend)
        stored[format.name] = np.asarray(cache.pages).reshape(-1)[16 * D : 16 * D + 16]
    powers = np.array([1, 2, 2.0**-22, 2.0**-18], np.float32)
    np.testing.assert_array_equal(stored["INDEX_K"].view(np.float32), powers)
    exponents = [127, 128, 105, 109]
    np.testing.assert_array_equal(stored["INDEX_K_EXPONENT"], np.repeat(exponents, 4))
    floats = np.maximum([448, 449, 0, np.float32(1e-3)], np.float32(1e-4)) / np.float32(448)
    np.testing.assert_array_equal(stored["INDEX_K_F32"].view(np.float32), floats.astype(np.float32))


def test_default_layout_is_upstreams():
    assert pa.IndexCache.allocate(2, 1).layout is pa.INDEX_NORMAL
    assert pa.IndexCache.allocate(2, 16).layout is pa.INDEX_SHUFFLE
    assert pa.IndexCache.allocate(2, 64, layout=pa.INDEX_NORMAL).layout is pa.INDEX_NORMAL
    cache = pa.IndexCache.allocate(2, 64, 256)
    assert (cache.num_pages, cache.page_size, cache.head_dim, cache.groups) == (2, 64, 256, 2)
    assert cache.nbytes == 2 * 64 * (256 + 8)
    assert cache.partition_spec("cp").pages == jax.sharding.PartitionSpec("cp")


def test_a_donated_cache_is_written_in_place():
    cache = pa.IndexCache.allocate(64, 64)
    write = jax.jit(pa.write_index, donate_argnums=0)
    k, slots = jnp.ones((3, D)), jnp.array([5, 70, -1])
    pointer = cache.pages.unsafe_buffer_pointer()
    got = write(cache, k, slots)
    assert cache.pages.is_deleted()
    assert got.pages.unsafe_buffer_pointer() == pointer


def test_gather_starts_padding_and_overflow(backend, rng):
    cache, batch, _, _, keys = step(rng, poisoned(11, 16), [20, 0, 40], [1, 1, 1], num_seqs=jnp.int32(2))
    starts = jnp.array([7, 0, 0])
    got = pa.gather_index(cache, batch, max_tokens=20, starts=starts, backend=backend)
    np.testing.assert_array_equal(got.cu_lens, [0, 13, 13, 13])
    np.testing.assert_array_equal(np.asarray(dequantize(got.k))[:13], written_numbers(keys[0][7:], pa.INDEX_K))
    assert not np.asarray(dequantize(got.k))[13:].any()
    short = pa.gather_index(cache, batch, max_tokens=5, backend=backend)
    assert int(short.cu_lens[-1]) == 20
    np.testing.assert_array_equal(np.asarray(dequantize(short.k)), written_numbers(keys[0][:5], pa.INDEX_K))


def test_a_key_of_two_groups(backend, rng):
    k = rng.normal(size=(40, 256)).astype(np.float32) * np.repeat([1, 50], 128)
    cache = pa.write_index(poisoned(3, 16, dim=256), jnp.asarray(k), jnp.arange(40), backend=backend)
    pages = jnp.arange(3, dtype=jnp.int32)[None]
    batch = pa.RaggedBatch(pages, jnp.array([40]), jnp.array([0, 2]))
    q, w = rng.normal(size=(2, 3, 256)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    stored = quantize(jnp.asarray(q), pa.INDEX_Q)
    want = defined_logits(dequantize(stored), w, written_numbers(k, pa.INDEX_K))
    want[0, 39] = -np.inf
    got = pa.paged_indexer_logits(stored, jnp.asarray(w), cache, batch, max_len=40, backend=backend)
    assert_close(got, want)


# Logits.


@of_every_cache
def test_paged_logits(format, layout, page_size, backend, rng):
    pages_per_seq = -(-45 // page_size)
    cache = poisoned(5 * pages_per_seq + 2, page_size, format, layout)
    lens, q_lens = [45, 1, 17, 0, 30], [2, 1, 4, 1, 3]
    cache, batch, q, w, keys = step(rng, cache, lens, q_lens, jnp.int32(4), 2, pages_per_seq=pages_per_seq)
    got = pa.paged_indexer_logits(q, w, cache, batch, max_len=50, scale=0.25, backend=backend)
    want = np.full((13, 50), -np.inf)
    t = 0
    for k, n, m in list(zip(keys, lens, q_lens, strict=True))[:4]:
        for j in range(m):
            seen = max(n - m + j + 1, 0)
            numbers = written_numbers(k[:seen], format)
            want[t, :seen] = 0.25 * defined_logits(dequantize(q)[t : t + 1], w[t : t + 1], numbers)[0]
            t += 1
    assert_close(got, want)


def test_rows_of_their_own_lengths(backend, rng):
    cache, batch, q, w, keys = step(rng, poisoned(11, 16), [20, 33, 9], [2, 2, 1], padding=1)
    lens = jnp.array([3, 20, 0, 1000, 9, 5])
    got = pa.paged_indexer_logits(q, w, cache, batch, row_lens=lens, backend=backend)
    assert got.shape == (6, 48)
    np.testing.assert_array_equal(np.isfinite(np.asarray(got)).sum(1), [3, 20, 0, 33, 9, 0])
    assert_close(got[:1, :3], defined_logits(dequantize(q)[:1], w[:1], written_numbers(keys[0][:3], pa.INDEX_K)))


@pytest.mark.parametrize(("width", "floats"), [(None, False), (7, False), (90, True)])
def test_logits(width, floats, backend, rng):
    q, k, w = (rng.normal(size=s).astype(np.float32) for s in ((9, 5, D), (70, D), (9, 5)))
    starts = np.array([0, 3, 69, 70, -5, 10, 2, 2, 40], np.int32)
    ends = np.array([70, 9, 70, 70, 1000, 4, 3, 2, 60], np.int32)
    k[66:] *= 1000  # seen by some rows only
    stored = (
        (jnp.asarray(q), jnp.asarray(k))
        if floats
        else tuple(map(quantize, map(jnp.asarray, (q, k)), (pa.INDEX_Q, pa.INDEX_K)))
    )
    numbers = (q, k) if floats else tuple(dequantize(x) for x in stored)
    got = pa.indexer_logits(
        *stored, jnp.asarray(w), jnp.asarray(starts), jnp.asarray(ends), width=width, scale=0.5, backend=backend
    )
    every = 0.5 * defined_logits(numbers[0], w, numbers[1])
    n, (first, last) = np.arange(70), np.clip([starts, ends], 0, 70)
    want = np.where((n >= first[:, None]) & (n < last[:, None]), every, -np.inf)
    if width:
        want = np.pad(want, ((0, 0), (0, 90)), constant_values=-np.inf)
        want = np.stack([row[start : start + width] for row, start in zip(want, first, strict=True)])
    assert_close(got, want)


def test_many_blocks_are_one(rng, monkeypatch):
    """Rows and keys over several blocks, the last of each cut short. (No other test has these shapes.)"""
    from pallas_attn.ops.sparse_indexer.logits import xla
    from pallas_attn.ops.sparse_indexer.paged_logits import xla as paged

    for module in (xla, paged):
        monkeypatch.setattr(module, "MAX_KEYS", 32)
        monkeypatch.setattr(module, "ELEMENTS", 32 * D * 3)
    q, k, w = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((29, 2, D), (75, D), (29, 2)))
    starts, ends = jnp.arange(29), jnp.arange(29) * 2 + 5
    for width in (None, 40):
        call = functools.partial(pa.indexer_logits, q, k, w, starts, ends, width=width)
        assert_close(call(backend="xla"), call(backend="reference"))
    cache, batch, q, w, _ = step(rng, poisoned(20, 16), [90, 7, 64], [5, 3, 6], pages_per_seq=6)
    for width in (None, 50):
        call = functools.partial(pa.paged_indexer_logits, q, w, cache, batch, max_len=width)
        assert_close(call(backend="xla"), call(backend="reference"))


def test_scales_of_any_granularity_are_honoured(backend, rng):
    x, k = rng.normal(size=(6, 4, D)).astype(np.float32), rng.normal(size=(20, D)).astype(np.float32)
    w, ends = jnp.asarray(rng.normal(size=(6, 4)).astype(np.float32)), jnp.full(6, 20)
    for q_format, k_format in ((pa.E4M3_TENSOR, pa.E4M3_TENSOR), (pa.E4M3_TOKEN_HEAD, pa.e4m3_group(64))):
        q, keys = quantize(jnp.asarray(x), q_format), quantize(jnp.asarray(k), k_format)
        got = pa.indexer_logits(q, keys, w, jnp.zeros(6, jnp.int32), ends, backend=backend)
        assert_close(got, defined_logits(dequantize(q), w, dequantize(keys)))


def test_gradients(rng):
    """Through masks, blocks and NaN that no row sees; a bytes' cache has none."""
    q, k, w = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((6, 3, D), (20, D), (6, 3)))
    k = k.at[17:].set(jnp.nan)
    starts, ends = jnp.array([0, 2, 5, 0, 16, 3]), jnp.array([17, 9, 5, 1, 17, 12])
    aim = jnp.asarray(rng.normal(size=(6, 20)).astype(np.float32))

    def loss(q, k, w, scale):
        logits = pa.indexer_logits(q, k, w, starts, ends, scale=scale)
        return jnp.sum(jnp.where(jnp.isfinite(logits), logits * aim, 0))

    def plain(q, k, w, scale):
        product = jax.nn.relu(jnp.einsum("thd,nd->thn", q, k.at[17:].set(0), precision="highest"))
        n = jnp.arange(20)
        seen = (n >= starts[:, None]) & (n < ends[:, None])
        return jnp.sum(jnp.where(seen, scale * jnp.einsum("th,thn->tn", w, product), 0) * aim)

    want = jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(q, k, w, 0.5)
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, w, 0.5)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)
    cache, batch, stored, w, _ = step(rng, poisoned(11, 16), [20, 33, 9], [2, 2, 1])
    paged = lambda q, w: jnp.sum(jnp.maximum(pa.paged_indexer_logits(q, w, cache, batch), -1e3))  # noqa: E731
    grads = jax.jit(jax.grad(paged, argnums=(0, 1)))(dequantize(stored), w)
    assert all(bool(jnp.isfinite(g).all() & (jnp.abs(g).sum() > 0)) for g in grads)


def test_training_against_the_stored_bits(rng):
    """Fake-quantised floats give the logits of the quantised ones, and a gradient."""
    q, k = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((6, 3, D), (20, D)))
    w, starts, ends = jnp.ones((6, 3)), jnp.zeros(6, jnp.int32), jnp.full(6, 20)
    stored = pa.indexer_logits(quantize(q, pa.INDEX_Q), quantize(k, pa.INDEX_K), w, starts, ends)

    def logits(q, k):
        return pa.indexer_logits(pa.fake_quantize(q, pa.INDEX_Q), pa.fake_quantize(k, pa.INDEX_K), w, starts, ends)

    np.testing.assert_allclose(jax.jit(logits)(q, k), stored, rtol=1e-5, atol=1e-4)
    grads = jax.jit(jax.grad(lambda *x: jnp.sum(logits(*x)), argnums=(0, 1)))(q, k)
    assert all(float(jnp.abs(g).max()) > 0 for g in grads)


def test_no_array_of_tokens_x_heads_x_keys(rng):
    """The portable backend streams: its largest array is a block or the logits."""
    q, k = jax.ShapeDtypeStruct((64, 64, D), jnp.float32), jax.ShapeDtypeStruct((1 << 17, D), jnp.float32)
    rows, w = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    lowered = jax.jit(functools.partial(pa.indexer_logits, backend="xla")).lower(q, k, w, rows, rows)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * (64 * 2**17 * 3 + 2**17 * D * 2)


def test_vmap_is_a_loop(backend, rng):
    q, k, w = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((3, 5, 2, D), (3, 8, D), (5, 2)))
    starts, ends = jnp.zeros(5, jnp.int32), jnp.full(5, 8)
    call = functools.partial(pa.indexer_logits, backend=backend)
    got = jax.vmap(call, (0, 0, None, None, None))(q, k, w, starts, ends)
    for i in range(3):
        np.testing.assert_allclose(got[i], call(q[i], k[i], w, starts, ends), rtol=1e-5, atol=1e-5)


# Selection.


def adversarial(columns=300):
    """Rows that trouble a search for a threshold."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=columns).astype(np.float32)
    low_bits = (np.float32(1).view(np.int32) + rng.integers(0, 1024, columns)).astype(np.int32).view(np.float32)
    half = np.where(rng.random(columns) < 0.5, -np.inf, normal).astype(np.float32)
    nan = np.where(rng.random(columns) < 0.3, np.nan, normal).astype(np.float32)
    zeros = np.where(rng.random(columns) < 0.5, -0.0, 0.0).astype(np.float32)
    huge = (normal * 1e38).astype(np.float32)
    tiny = (rng.integers(-5, 5, columns) * 1e-45).astype(np.float32)
    few = np.full(columns, -np.inf, np.float32)
    few[::50] = normal[::50]
    return {
        "normal": normal, "all equal": np.full(columns, 3.5, np.float32), "ten low bits": low_bits, "half -inf": half,
        "all -inf": np.full(columns, -np.inf, np.float32), "NaN": nan, "all NaN": np.full(columns, np.nan, np.float32),
        "zeros of both signs": zeros, "huge": huge, "few values": np.round(normal), "few finite": few,
        "ascending": np.arange(columns, dtype=np.float32), "descending": -np.arange(columns, dtype=np.float32),
        "+inf": np.where(normal > 1, np.inf, normal).astype(np.float32), "denormal": tiny,
    }  # fmt: skip


@pytest.mark.parametrize(("k", "ordered"), [(1, False), (64, False), (300, True), (511, False)])
def test_topk_of_adversarial_rows(k, ordered, backend):
    names, rows = zip(*adversarial().items(), strict=True)
    rows = np.stack(rows)
    got = pa.indexer_topk(jnp.asarray(rows), k, sorted=ordered, backend=backend)
    for name, ours, want in zip(names, np.asarray(got), defined_topk(rows, k, ordered=ordered), strict=True):
        np.testing.assert_array_equal(ours, want, err_msg=name)


@pytest.mark.parametrize("ordered", [False, True])
def test_topk_inside_of_ranges(ordered, backend):
    rows = np.stack(list(adversarial().values())[:12])
    starts = np.array([0, 5, 299, 300, -7, 100, 3, 3, 250, 0, 17, 64], np.int32)
    ends = np.array([300, 60, 300, 300, 12, 90, 4, 3, 2**31 - 1, 1, 280, 128], np.int32)
    call = functools.partial(pa.indexer_topk, jnp.asarray(rows), 32, sorted=ordered, backend=backend)
    got = call(starts=jnp.asarray(starts), ends=jnp.asarray(ends))
    np.testing.assert_array_equal(got, defined_topk(rows, 32, starts, ends, ordered))
    np.testing.assert_array_equal(call(ends=jnp.asarray(ends)), defined_topk(rows, 32, 0, ends, ordered))


def test_topk_of_rows_in_pieces(rng, monkeypatch):
    from pallas_attn.ops.sparse_indexer.topk import xla

    monkeypatch.setattr(xla, "ELEMENTS", 3 * 50)
    rows = rng.normal(size=(10, 50)).astype(np.float32)
    np.testing.assert_array_equal(pa.indexer_topk(jnp.asarray(rows), 13, backend="xla"), defined_topk(rows, 13))


def test_topk_of_a_million_columns(rng):
    rows = rng.normal(size=(2, 1 << 20)).astype(np.float32)
    rows[1] = np.float32(1).view(np.int32) + 0 * rows[1]
    rows[1] = (np.float32(1).view(np.int32) + rng.integers(0, 1024, 1 << 20)).astype(np.int32).view(np.float32)
    ends = jnp.array([1 << 20, (1 << 20) - 77])
    got = pa.indexer_topk(jnp.asarray(rows), 4096, starts=jnp.array([1000, 0]), ends=ends, backend="xla")
    np.testing.assert_array_equal(got, defined_topk(rows, 4096, [1000, 0], np.asarray(ends)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_topk_of_any_row(data):
    values = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]),
        st.floats(width=32),
    )
    row = np.array(data.draw(st.lists(values, min_size=40, max_size=40)), np.float32)[None]
    start, end = data.draw(st.integers(-3, 45)), data.draw(st.integers(-3, 45))
    for backend in ("xla", "reference"):
        got = pa.indexer_topk(jnp.asarray(row), 7, starts=jnp.array([start]), ends=jnp.array([end]), backend=backend)
        np.testing.assert_array_equal(got, defined_topk(row, 7, start, end))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), min_size=3, max_size=3), st.integers(0, 2**31 - 1))
def test_ragged_batches(lens, seed):
    """Whatever the lengths: both backends agree, and each row sees what its position says."""
    rng = np.random.default_rng(seed)
    kv, new = ([n for n, _ in lens], [min(n, m) for n, m in lens])
    cache, batch, q, w, _ = step(rng, poisoned(11, 16), kv, new, padding=12 - sum(new), heads=2)
    got, want = (pa.paged_indexer_logits(q, w, cache, batch, backend=b) for b in ("xla", "reference"))
    assert_close(got, want)
    seen = [n - m + j + 1 for n, m in zip(kv, new, strict=True) for j in range(m)]
    np.testing.assert_array_equal(np.isfinite(np.asarray(got)).sum(1), seen + [0] * (12 - len(seen)))
    indices = pa.indexer_topk(got, 5, ends=jnp.array(seen + [0] * (12 - len(seen))))
    slots, counts = to_slots(indices, batch, page_size=16, compact=True)
    np.testing.assert_array_equal(counts, np.minimum(seen + [0] * (12 - len(seen)), 5))
    assert set(np.asarray(slots).ravel() // 16) <= {-1, *np.asarray(batch.page_table).ravel()}


def test_slots_of_padding_and_strange_positions():
    pages = jnp.array([[3, -1, 5], [7, 8, 9]], jnp.int32)
    batch = pa.RaggedBatch(pages, jnp.array([40, 40]), jnp.array([0, 1, 2]), jnp.int32(1))
    positions = jnp.array([[0, 17, 35, 48, -1, 2**30]] * 3)
    got, counts = to_slots(positions, batch, page_size=16, compact=True)
    np.testing.assert_array_equal(got[0], [48, 83, -1, -1, -1, -1])
    assert (np.asarray(got[1:]) == -1).all()
    np.testing.assert_array_equal(counts, [2, 0, 0])


# Context parallelism.


@pytest.mark.parametrize(("ranks", "interleave"), [(1, 1), (2, 1), (3, 4), (4, 16)])
def test_split_deals_out_every_token_once(ranks, interleave):
    split, x = pa.ContextSplit(ranks, interleave), jnp.arange(100)
    found = []
    for rank in range(ranks):
        local = split.local(x, rank)
        mine = np.flatnonzero(np.asarray(local) >= 0)
        np.testing.assert_array_equal(np.asarray(local)[mine], np.arange(len(mine)))
        np.testing.assert_array_equal(split.whole(local[mine], rank), mine)
        lengths = [(np.asarray(split.owner(x))[:n] == rank).sum() for n in range(100)]
        np.testing.assert_array_equal(split.local_len(x, rank), lengths)
        found += list(mine)
    assert sorted(found) == list(range(100))
    np.testing.assert_array_equal(split.local(jnp.array([-1]), 0), [-1])
    np.testing.assert_array_equal(split.whole(jnp.array([-1]), ranks - 1), [-1])


@pytest.mark.parametrize(
    ("ranks", "interleave", "k", "ordered"), [(2, 1, 40, True), (3, 4, 17, False), (4, 16, 280, False)]
)
def test_merge_of_parts_is_the_whole(ranks, interleave, k, ordered):
    """Under a named axis, as in shard_map: each rank has its own tokens' logits only."""
    rows = np.stack(list(adversarial().values()))
    lengths = np.array([300, 299, 1, 0, 50, 300, 7, 3, 100, 200, 280, 300, 300, 33, 300])
    split = pa.ContextSplit(ranks, interleave)
    width = -(-300 // (ranks * interleave)) * interleave
    local = np.full((ranks, len(rows), width), 9e9, np.float32)  # what is no rank's token must not be chosen
    for rank in range(ranks):
        mine = np.flatnonzero(np.asarray(split.owner(jnp.arange(300))) == rank)
        local[rank, :, : len(mine)] = rows[:, mine]

    def one(logits):
        ends = split.local_len(jnp.asarray(lengths), jax.lax.axis_index("cp"))
        return pa.split_topk(logits, k, split, "cp", ends=ends, sorted=ordered)

    got = jax.jit(jax.vmap(one, axis_name="cp"))(jnp.asarray(local))
    want = defined_topk(rows, k, 0, lengths, ordered)
    for of_rank in np.asarray(got):
        np.testing.assert_array_equal(of_rank, want)


# Bad input.


@pytest.fixture
def without_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


CACHE = pa.IndexCache.allocate(4, 16)
BATCH = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3], jnp.int32), jnp.array([0, 1, 4], jnp.int32))
Q, K, W, ROWS = jnp.zeros((4, 2, D)), jnp.zeros((9, D)), jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)
SLOTS = jnp.arange(4, dtype=jnp.int32)
with_pages = functools.partial(dataclasses.replace, CACHE)
float_cache = pa.PagedKVCache.allocate(4, 16, 1, D)

BAD = {
    "tiles": (lambda: pa.IndexCache.allocate(4, 1, layout=pa.INDEX_SHUFFLE), "page_size: got 1; INDEX_SHUFFLE"),
    "head_dim": (lambda: pa.IndexCache.allocate(4, 16, 100), "head_dim: got 100"),
    "cache format": (lambda: pa.IndexCache.allocate(4, 16, format=pa.E4M3_TENSOR), "cache.format: got E4M3_TENSOR"),
    "exponents of floats": (
        lambda: pa.IndexCache.allocate(4, 16, format=dataclasses.replace(pa.INDEX_K_F32, exponents=True)),
        "only a power of two is its exponent",
    ),
    "no cache": (lambda: pa.write_index(float_cache, K, SLOTS), "cache: got PagedKVCache"),
    "typed pages": (
        lambda: pa.write_index(with_pages(pages=jnp.zeros((4, 16, 132))), K, SLOTS), "cache.pages: got float32"
    ),
    "width of a token": (
        lambda: pa.write_index(with_pages(pages=jnp.zeros((4, 16, 128), jnp.uint8)), K, SLOTS), "multiple of 132 bytes"
    ),
    "rank of pages": (
        lambda: pa.write_index(with_pages(pages=jnp.zeros((4, 2112), jnp.uint8)), K, SLOTS), "cache.pages: got shape"
    ),
    "no page": (lambda: pa.write_index(with_pages(pages=CACHE.pages[:0]), K, SLOTS), "it holds no token"),
    "layout": (lambda: pa.write_index(with_pages(layout=pa.NHD), K, SLOTS), "cache.layout: got NHD"),
    "FP8 keys": (lambda: pa.write_index(CACHE, pa.quantize(K, pa.INDEX_K), SLOTS), "k: got Quantized"),
    "bare FP8 keys": (lambda: pa.write_index(CACHE, K.astype(jnp.float8_e4m3fn), SLOTS), "k: got a bare float8_e4m3fn"),
    "keys with heads": (lambda: pa.write_index(CACHE, Q, SLOTS), "k: got shape"),
    "fewer keys": (lambda: pa.write_index(CACHE, K[:2], SLOTS), "k: got 2 tokens; slots names 4"),
    "keys' dim": (lambda: pa.write_index(CACHE, K[:, :64], SLOTS), "k: got head_dim 64"),
    "float slots": (lambda: pa.write_index(CACHE, K, jnp.zeros(4)), "slots: got float32"),
    "rank of slots": (lambda: pa.write_index(CACHE, K, SLOTS[None]), "slots: got shape"),
    "max_tokens": (lambda: pa.gather_index(CACHE, BATCH, max_tokens=0), "max_tokens: got 0"),
    "traced max_tokens": (
        lambda: jax.jit(lambda n: pa.gather_index(CACHE, BATCH, max_tokens=n))(3), "max_tokens: got a traced value"
    ),
    "starts": (lambda: pa.gather_index(CACHE, BATCH, max_tokens=4, starts=ROWS), "starts: got shape"),
    "negative starts": (
        lambda: pa.gather_index(CACHE, BATCH, max_tokens=4, starts=jnp.array([0, -1])), "starts: got -1"
    ),
    "kv_lens": (
        lambda: pa.gather_index(CACHE, dataclasses.replace(BATCH, kv_lens=jnp.array([49, 1])), max_tokens=4),
        "batch.kv_lens: got 49",
    ),
    "bare FP8 query": (
        lambda: pa.indexer_logits(Q.astype(jnp.float8_e4m3fn), K, W, ROWS, ROWS), "q: got a bare float8_e4m3fn array"
    ),
    "scale's shape": (
        lambda: pa.indexer_logits(pa.Quantized(Q.astype(jnp.float8_e4m3fn), W, pa.INDEX_Q), K, W, ROWS, ROWS),
        r"q.scale: got shape \(4, 2\)",
    ),
    "negative scale": (
        lambda: pa.indexer_logits(
            pa.Quantized(Q.astype(jnp.float8_e4m3fn), -jnp.ones((4, 2, 1)), pa.INDEX_Q), K, W, ROWS, ROWS
        ), "scales must be positive and finite",
    ),
    "k of other dim": (lambda: pa.indexer_logits(Q, K[:, :64], W, ROWS, ROWS), "k: got head_dim 64; q has 128"),
    "no key": (lambda: pa.indexer_logits(Q, K[:0], W, ROWS, ROWS), "at least one head and key"),
    "weights": (lambda: pa.indexer_logits(Q, K, W[:2], ROWS, ROWS), "weights: got shape"),
    "integer weights": (lambda: pa.indexer_logits(Q, K, W.astype(jnp.int32), ROWS, ROWS), "weights: got int32"),
    "ends": (lambda: pa.indexer_logits(Q, K, W, ROWS, ROWS[:3]), "ends: got shape"),
    "width": (lambda: pa.indexer_logits(Q, K, W, ROWS, ROWS, width=0), "width: got 0"),
    "scale": (lambda: pa.indexer_logits(Q, K, W, ROWS, ROWS, scale=jnp.ones(4)), "scale: got shape"),
    "query's dim": (lambda: pa.paged_indexer_logits(Q[..., :64], W, CACHE, BATCH), "q: got head_dim 64"),
    "max_len": (lambda: pa.paged_indexer_logits(Q, W, CACHE, BATCH, max_len=-1), "max_len: got -1"),
    "row_lens": (lambda: pa.paged_indexer_logits(Q, W, CACHE, BATCH, row_lens=ROWS[:1]), "row_lens: got shape"),
    "k": (lambda: pa.indexer_topk(W, 0), "k: got 0"),
    "logits": (lambda: pa.indexer_topk(W.astype(jnp.bfloat16), 2), "logits: got bfloat16"),
    "rank of logits": (lambda: pa.indexer_topk(ROWS.astype(jnp.float32), 2), "logits: got shape"),
    "sorted": (lambda: pa.indexer_topk(W, 2, sorted=1), "sorted: got 1"),
    "float starts": (lambda: pa.indexer_topk(W, 2, starts=jnp.zeros(4)), "starts: got float32"),
    "float indices": (lambda: pa.to_slots(W, BATCH, page_size=16), "indices: got float32"),
    "page_size": (lambda: pa.to_slots(ROWS[:, None], BATCH, page_size=0), "page_size: got 0"),
    "ranks": (lambda: pa.ContextSplit(0), "ranks: got 0"),
    "interleave": (lambda: pa.ContextSplit(2, 0), "interleave: got 0"),
    "parts": (lambda: pa.merge_topk(W, ROWS, 2), "logits: got shape"),
    "positions": (lambda: pa.merge_topk(W[None], ROWS[None, :, None], 2), "positions: got shape"),
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(pa.InvalidInput, match=message):
        call()


def test_what_only_run_time_knows_stays_inside(backend, rng):
    """Pages, lengths and slots out of range are clamped or dropped."""
    cache, batch, q, w, _ = step(rng, poisoned(11, 16), [20, 33, 9], [2, 2, 1])
    wild = dataclasses.replace(
        batch, page_table=jnp.array([[2**31 - 1, -5, 99]] * 3), kv_lens=jnp.array([2**31 - 1, -4, 10**6])
    )
    run = jax.jit(lambda b: pa.paged_indexer_logits(q, w, cache, b, backend=backend))
    assert run(wild).shape == (5, 48)
    run = jax.jit(lambda b: pa.gather_index(cache, b, max_tokens=60, backend=backend))
    np.testing.assert_array_equal(run(wild).cu_lens, [0, 48, 48, 96])
    slots = jnp.array([-1, -(2**31), 11 * 16, 2**31 - 1], jnp.int32)
    got = pa.write_index(cache, jnp.ones((4, D)), slots, backend=backend)
    np.testing.assert_array_equal(got.pages, cache.pages)


def test_nothing_to_do(backend):
    none = jnp.zeros(0, jnp.int32)
    assert pa.indexer_logits(Q[:0], K, W[:0], none, none, backend=backend).shape == (0, 9)
    batch = dataclasses.replace(BATCH, cu_q_lens=jnp.zeros(3, jnp.int32))
    assert pa.paged_indexer_logits(Q[:0], W[:0], CACHE, batch, backend=backend).shape == (0, 48)
    assert pa.indexer_topk(W[:0], 3, backend=backend).shape == (0, 3)
    np.testing.assert_array_equal(pa.write_index(CACHE, K[:0], none, backend=backend).pages, CACHE.pages)


def test_explain_knows_the_ops():
    here = {"mosaic": "not on cpu", "triton": "not on cpu", "xla": "chosen", "reference": "supported"}
    assert pa.explain(pa.indexer_topk, W, 2) == pa.explain(pa.write_index, CACHE, K, SLOTS) == here
