"""The indexer layer: its parts, whole steps, the failure of the fourth seed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.ops.sparse_indexer import indexer as layer
from pallas_attn.ops.sparse_indexer import turns

D, R, WIDTH, LATENT, HEADS = 128, 64, 32, 24, 4

# One compilation each, where eager calls would be dozens.
quantize = jax.jit(pa.quantize, static_argnums=1)
dequantize = jax.jit(pa.dequantize)
project = jax.jit(pa.Indexer.project)


def make(topk=8, **statics):
    return pa.Indexer.init(jax.random.key(0), WIDTH, LATENT, heads=HEADS, topk=topk, **statics)


def inputs(rng, tokens, dtype=jnp.float32):
    return tuple(jnp.asarray(rng.normal(size=(tokens, n)), dtype) for n in (WIDTH, LATENT))


def ragged(rng, kv_lens, q_lens, page_size, max_q_len=None, padding=0, pages_per_seq=4):
    count = len(kv_lens) * pages_per_seq
    pages = rng.permutation(count).reshape(len(kv_lens), -1).astype(np.int32)
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    return pa.RaggedBatch(
        jnp.asarray(pages), jnp.asarray(kv_lens, jnp.int32), jnp.asarray(cu), jnp.int32(len(kv_lens)), max_q_len
    )


@functools.partial(jax.jit, static_argnames=("sorted", "backend"))
def call(indexer, *args, **keywords):
    return indexer(*args, **keywords)


def run(indexer, rng_inputs, batch, cache, **keywords):
    hidden, latent = rng_inputs
    _, positions, _ = batch.tokens(hidden.shape[0])
    slots = batch.slot_mapping(hidden.shape[0], cache.page_size)
    return call(indexer, hidden, latent, positions, cache, batch, slots, **keywords)


def defined(indexer, hidden, latent, positions, pages_of=None):
    """The layer in numpy's float64, up to and with quantisation: (queries, keys, weights) as numbers."""
    x, c, p = (np.asarray(a, np.float64) for a in (hidden, latent, positions))
    q = (c @ np.asarray(indexer.wq, np.float64)).reshape(-1, HEADS, D)
    k, w = np.split(x @ np.asarray(indexer.wk, np.float64), [D], axis=1)
    k = (k - k.mean(1, keepdims=True)) / np.sqrt(k.var(1, keepdims=True) + 1e-6)
    k = k * np.asarray(indexer.norm) + np.asarray(indexer.norm_bias)

    def turn(x):
        turns = np.exp(1j * p[:, None] * np.asarray(indexer.frequencies, np.float64))
        turns = turns[:, None] if x.ndim == 3 else turns
        a, b = (x[..., :R:2], x[..., 1:R:2]) if indexer.interleaved else (x[..., : R // 2], x[..., R // 2 : R])
        z = (a + 1j * b) * turns
        out = x.copy()
        if indexer.interleaved:
            out[..., :R:2], out[..., 1:R:2] = z.real, z.imag
        else:
            out[..., : R // 2], out[..., R // 2 : R] = z.real, z.imag
        return out

    return turn(q), turn(k), w


@pytest.mark.parametrize("interleaved", [False, True])
def test_projections_are_the_formula(interleaved, rng):
    indexer = make(interleaved=interleaved)
    indexer = dataclasses.replace(indexer, norm=indexer.norm * 1.5, norm_bias=indexer.norm_bias + 0.25)
    hidden, latent = inputs(rng, 9)
    positions = jnp.array([0, 1, 2, 50, 51, 1000, 7, 8, 9])
    got, want = project(indexer, hidden, latent, positions), defined(indexer, hidden, latent, positions)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    assert all(
        x.dtype == jnp.bfloat16
        for x in make(dtype=jnp.bfloat16).project(*inputs(rng, 3, jnp.bfloat16), jnp.arange(3))[:2]
    )


def test_rotation_is_relative_and_leaves_the_rest(rng):
    q, k = jnp.asarray(rng.normal(size=(2, 1, D)).astype(np.float32))
    frequencies = make().frequencies
    for interleaved in (False, True):
        at = lambda x, p, i=interleaved: turns.rotate(x, *turns.angles(jnp.array([p]), frequencies), i)  # noqa: E731
        near, far = (jnp.sum(at(q, 3 + p) * at(k, 1 + p)) for p in (0, 500))
        assert float(near) == pytest.approx(float(far), abs=1e-3)
        np.testing.assert_array_equal(at(q, 7)[:, R:], q[:, R:])
        assert float(jnp.abs(at(q, 7)[:, :R] - q[:, :R]).max()) > 0.1


def test_hadamard_is_orthogonal(rng):
    x, y = jnp.asarray(rng.normal(size=(2, 5, D)).astype(np.float32))
    matrix = np.ones((1, 1))
    for _ in range(7):
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    np.testing.assert_allclose(turns.hadamard(x), np.asarray(x) @ matrix * D**-0.5, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(turns.hadamard(x) * turns.hadamard(y), -1), jnp.sum(x * y, -1), atol=1e-4)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_a_step_is_the_definition(backend, rng):
    """Two sequences, the second one's earlier tokens cached by a step of its own; both forwards; poisoned pages."""
    indexer, lens = make(topk=5), np.array([13, 11])
    earlier = ragged(rng, [0, 7], [0, 7], 16, pages_per_seq=1)
    batch = dataclasses.replace(
        earlier, kv_lens=jnp.asarray(lens, jnp.int32), cu_q_lens=jnp.array([0, 13, 17]), num_seqs=jnp.int32(2)
    )
    cache = pa.IndexCache.allocate(4, 16)
    cache = cache.replace(jnp.full_like(cache.pages, 0xFF))
    past, now = inputs(rng, 7), inputs(rng, 19)  # two tokens of padding
    _, old, _ = project(indexer, *past, jnp.arange(7))
    cache = pa.write_index(cache, old, earlier.slot_mapping(7, 16))
    got, written = run(indexer, now, batch, cache, backend=backend)
    positions = np.concatenate([np.arange(13), np.arange(7, 11)])
    q, k, w = project(indexer, now[0][:17], now[1][:17], jnp.asarray(positions))
    k = jnp.concatenate([k[:13], old, k[13:]])
    k, q = (np.asarray(dequantize(quantize(*x))) for x in ((k, pa.INDEX_K), (q, pa.INDEX_Q)))
    keys, w = (k[:13], k[13:]), np.asarray(w)
    want = np.full((19, 5), -1)
    for t, (b, p) in enumerate(zip([0] * 13 + [1] * 4, positions, strict=True)):
        logits = w[t] @ np.maximum(q[t] @ keys[b][: p + 1].T, 0)
        best = np.sort(np.argsort(-logits, kind="stable")[:5])
        want[t, : len(best)] = best
    np.testing.assert_array_equal(got, want)
    if backend == "xla":
        decode, other = run(indexer, now, dataclasses.replace(batch, max_q_len=8), cache, backend=backend)
        np.testing.assert_array_equal(np.asarray(decode)[13:], want[13:])  # the first sequence brings 13
        np.testing.assert_array_equal(other.pages, written.pages)


def test_rows_in_pieces_are_the_whole(rng, monkeypatch):
    """And by descending logit as by position."""
    indexer, batch = make(), ragged(rng, [60], [60], 16)
    cache, given = pa.IndexCache.allocate(4, 16), inputs(rng, 60)
    whole, _ = run(indexer, given, batch, cache)
    monkeypatch.setattr(layer, "LOGITS", 64 * 10)
    pieces, _ = run(indexer, given, batch, cache, sorted=True)
    assert (np.asarray(pieces) != np.asarray(whole)).any()
    order = np.where(np.asarray(pieces) < 0, 99, pieces)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.where(np.asarray(whole) < 0, 99, whole))


def test_hadamard_leaves_the_choice_nearly_alone(rng):
    batch, cache, given = ragged(rng, [60], [60], 16), pa.IndexCache.allocate(4, 16), inputs(rng, 60)
    (plain, a), (turned, b) = (run(make(hadamard=h), given, batch, cache) for h in (False, True))
    assert recall(plain, turned) > 0.9
    assert (np.asarray(a.pages) != np.asarray(b.pages)).any()


def test_gradients_reach_every_weight(rng):
    indexer, given = make(), inputs(rng, 12)

    def loss(indexer):
        q, k, w = indexer.project(*given, jnp.arange(12))
        q, k = pa.fake_quantize(q, pa.INDEX_Q), pa.fake_quantize(k, pa.INDEX_K)
        starts = jnp.zeros(12, jnp.int32)
        logits = pa.indexer_logits(q, k, w, starts, starts + 12, scale=indexer.scale)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 3])

    grads = jax.jit(jax.grad(loss))(indexer)
    for leaf in (grads.wq, grads.wk, grads.norm, grads.norm_bias, grads.frequencies):
        assert bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 0  # noqa: PT018


# The failure of vLLM on gfx950 (GSM8K 0.95 to 0.01): rotated values were dropped, and a cache of pages of one token was
# written in tiles and read in rows.


def recall(got, want):
    """Share of the wanted positions that were chosen, over rows with more keys than k."""
    rows = [(set(g), set(w)) for g, w in zip(np.asarray(got), np.asarray(want), strict=True) if min(w) >= 0]
    return np.mean([len(g & w) / len(w) for g, w in rows])


def test_dropped_rotation_is_another_choice_and_cannot_be_written(rng):
    """Upstream's RoPE wrote into its argument, or did not; here what is rotated is what comes back, and is cached."""
    indexer, batch, given = make(), ragged(rng, [60], [60], 16), inputs(rng, 60)
    cache = pa.IndexCache.allocate(4, 16)
    right, written = run(indexer, given, batch, cache)
    dropped = dataclasses.replace(indexer, frequencies=jnp.zeros(R // 2))  # by an angle of 0: as if nobody turned
    wrong, _ = run(dropped, given, batch, cache)
    assert recall(wrong, right) < 0.7
    _, k, _ = project(indexer, *given, jnp.arange(60))
    turned = quantize(k, pa.INDEX_K)
    slots = batch.slot_mapping(60, 16)
    values, _ = jax.jit(pa.IndexCache.read_slots)(written, slots // 16, slots % 16)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(turned.values).view(np.uint8))
    unturned = quantize(project(dropped, *given, jnp.arange(60))[1], pa.INDEX_K)
    assert (np.asarray(values).view(np.uint8) != np.asarray(unturned.values).view(np.uint8)).mean() > 0.2


def test_tiles_at_page_size_one_are_another_choice_and_an_error(rng):
    indexer, batch, given = make(), ragged(rng, [60], [60], 1, pages_per_seq=60), inputs(rng, 60)
    cache = pa.IndexCache.allocate(60, 1)
    right, written = run(indexer, given, batch, cache)
    assert written.layout is pa.INDEX_NORMAL
    # What upstream's writer did: tile offsets in pages of 132 bytes, where they reach into other tokens' pages.
    k = quantize(project(indexer, *given, jnp.arange(60))[1], pa.INDEX_K)
    flat, d = np.zeros(60 * 132, np.uint8), np.arange(D)
    for slot, row, scale in zip(
        np.asarray(batch.slot_mapping(60, 1)), np.asarray(k.values).view(np.uint8), np.asarray(k.scale), strict=True
    ):
        at = slot * 132 + (d // 16) * 256 + d % 16
        flat[at[at < flat.size]] = row[at < flat.size]
        flat[slot * 132 + 128 : slot * 132 + 132] = scale.view(np.uint8)
    tiled = cache.replace(jnp.asarray(flat.reshape(60, 1, 132)))
    last = dataclasses.replace(batch, cu_q_lens=jnp.array([0, 8]), max_q_len=8)
    q, _, w = project(indexer, given[0][-8:], given[1][-8:], jnp.arange(52, 60))
    stored = quantize(q, pa.INDEX_Q)
    good, bad = (
        pa.indexer_topk(pa.paged_indexer_logits(stored, w, c, last), 8, ends=jnp.arange(53, 61))
        for c in (written, tiled)
    )
    np.testing.assert_array_equal(good, right[-8:])
    assert recall(bad, good) < 0.5
    # Ours: such a cache cannot be made, nor can one be given out as another's.
    for wrong in (
        lambda: pa.IndexCache.allocate(60, 1, layout=pa.INDEX_SHUFFLE),
        lambda: pa.write_index(dataclasses.replace(cache, layout=pa.INDEX_SHUFFLE), given[0], jnp.arange(60)),
        lambda: pa.paged_indexer_logits(stored, w, dataclasses.replace(written, layout=pa.INDEX_SHUFFLE), last),
    ):
        with pytest.raises(pa.InvalidInput, match="INDEX_SHUFFLE has tiles of 16 tokens"):
            wrong()


def test_a_layout_cannot_change_on_the_way():
    """The layout is part of the cache's type: a loop that would carry another is refused by JAX itself."""
    cache = pa.IndexCache.allocate(2, 16)
    other = lambda c, _: (dataclasses.replace(c, layout=pa.INDEX_NORMAL), None)  # noqa: E731
    with pytest.raises(TypeError, match="carry"):
        jax.lax.scan(other, cache, length=2)


INDEXER, BATCH = make(), pa.RaggedBatch(jnp.zeros((1, 4), jnp.int32), jnp.array([3]), jnp.array([0, 3]))
HIDDEN, LATENTS, AT = jnp.zeros((3, WIDTH)), jnp.zeros((3, LATENT)), jnp.arange(3)
with_weights = lambda **changes: dataclasses.replace(INDEXER, **changes)  # noqa: E731
BAD = [
    (lambda: INDEXER.project(HIDDEN[:, 1:], LATENTS, AT), r"hidden: got shape \(3, 31\); it needs \(3, 32\)"),
    (lambda: INDEXER.project(HIDDEN, LATENTS[:2], AT), "q_lora: got shape"),
    (lambda: INDEXER.project(HIDDEN, LATENTS, AT[:2]), "positions: got shape"),
    (lambda: with_weights(heads=3).project(HIDDEN, LATENTS, AT), "wq: got shape"),
    (lambda: with_weights(wk=jnp.zeros((WIDTH, D))).project(HIDDEN, LATENTS, AT), "wk: got shape"),
    (lambda: with_weights(norm_bias=jnp.zeros(3)).project(HIDDEN, LATENTS, AT), "norm_bias: got shape"),
    (lambda: with_weights(frequencies=jnp.zeros(65)).project(HIDDEN, LATENTS, AT), "frequencies: got shape"),
    (
        lambda: pa.Indexer.init(jax.random.key(0), WIDTH, LATENT, heads=2, head_dim=96, hadamard=True).project(
            HIDDEN, LATENTS, AT
        ), "hadamard: got head_dim 96",
    ),
    (
        lambda: INDEXER(HIDDEN, LATENTS, AT, pa.IndexCache.allocate(4, 16, 256), BATCH, AT),
        "cache: got head_dim 256; norm has 128",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_refused(wrong, message):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(pa.InvalidInput, match=message):
            wrong()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
