"""mla_attention against a float64 oracle, upstream's kernels, and itself in the non-absorbed form."""

import functools

import goldens
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latents import FORMATS, make
from oracle import BF16, F32
from problems import assert_close, relative_error

import pallas_attn as pa
from pallas_attn.ops.mla import problem as contract
from pallas_attn.ops.mla import reference as definition
from pallas_attn.ops.mla import xla

SCALE = 0.11

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time


def attend(*arguments, **keywords):
    return pa.mla_attention(*arguments, **{"scale": SCALE, "out": jnp.float32, "return_lse": True} | keywords)


def attended(*arguments, scale=SCALE, topk=None, w_uv=None, **static):
    """`attend`, compiled."""
    arrays = {"scale": scale, "topk": topk, "w_uv": w_uv}
    return jit(lambda arguments, arrays: attend(*arguments, **arrays, **static))(arguments, arrays)


# ---------------------------------------------------------------- dense


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, backend, rng):
    """Decode, prefill, chunks, empty sequences, padding; everything unread is NaN."""
    problem = make(rng, format)
    assert_close(attended(*problem.arguments(), backend=backend), problem.expected(SCALE))


@pytest.mark.parametrize("q_format", ["E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD"])
def test_fp8_queries(q_format, backend, rng):
    """The scales of both parts are folded in; they differ."""
    problem = make(rng, "E4M3_TENSOR", q_format=q_format)
    assert_close(attended(*problem.arguments(), backend=backend), problem.expected(SCALE))


@pytest.mark.parametrize(("heads", "page_size"), [(1, 16), (5, 64), (128, 1)])
def test_heads_and_page_sizes(heads, page_size, backend, rng):
    problem = make(rng, "BF16", heads=heads, page_size=page_size, q_dtype=BF16)
    assert_close(attended(*problem.arguments(), backend=backend), problem.expected(SCALE))


def test_one_rounding(backend, rng):
    """The default result is of the query's type, and is the exact one rounded."""
    problem = make(rng, "BF16", q_dtype=BF16)
    got = pa.mla_attention(*problem.arguments(), scale=SCALE, backend=backend)
    assert got.dtype == BF16
    assert relative_error(got, problem.expected(SCALE)[0]) < 2**-8


LONG = {
    "blocks": {"q_lens": (1, 2, 1, 3), "kv_lens": (1100, 512, 513, 1024)},  # ends in, before and at the end of a block
    "chunks": {
        "q_lens": (1, 150, 0, 110),
        "kv_lens": (300, 150, 0, 500),
    },  # sequences across chunks, the last one short
}


@pytest.mark.parametrize("name", LONG)
def test_long(name, rng):
    """More than one block of keys, more than one chunk of tokens."""
    problem = make(rng, "F32", page_size=64, **LONG[name])
    assert_close(attended(*problem.arguments(), backend="xla"), problem.expected(SCALE))


def test_explicit_max_q_len(backend, rng):
    problem = make(rng, "F32", q_lens=(1, 1, 1), kv_lens=(9, 0, 40))
    assert_close(attended(*problem.arguments(max_q_len=1), backend=backend), problem.expected(SCALE))


@pytest.mark.parametrize("topk", [False, True], ids=["", "topk"])
@pytest.mark.parametrize(("tokens", "seqs", "width"), [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_nothing_to_attend_to(tokens, seqs, width, topk, backend):
    cache = pa.LatentCache.allocate(2, 16, 48, 16, format=pa.F32)
    batch = pa.RaggedBatch(jnp.zeros((seqs, width), jnp.int32), jnp.zeros(seqs, jnp.int32), jnp.zeros(seqs + 1, int))
    q = jnp.ones((tokens, 4, 48)), jnp.ones((tokens, 4, 16))
    listed = jnp.zeros((tokens, 5), jnp.int32) if topk else None
    out, lse = attended(*q, cache, batch, topk=listed, backend=backend)
    assert out.shape == (tokens, 4, 48)
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()
    grad = jax.grad(lambda x: jnp.sum(attend(x, q[1], cache, batch, topk=listed)[0]))(q[0])
    assert not np.asarray(grad).any()


def test_wild_numbers(backend, rng):
    """Page numbers and lengths from anywhere: other sequences are right, nothing is NaN where the cache is not."""
    problem = make(rng, "F32", q_lens=(1, 4, 2), kv_lens=(20, 9, 33), spare_seqs=0, spare_tokens=0)
    problem.pages = np.nan_to_num(problem.pages)
    want, _ = problem.expected(SCALE)
    problem.page_table[1] = [2**31 - 1, -(2**31), 77, -1][: problem.page_table.shape[1]]
    run = jit(functools.partial(attend, backend=backend))
    out, _ = run(*problem.arguments())
    np.testing.assert_allclose(np.asarray(out)[[0, 5, 6]], want[[0, 5, 6]], rtol=1e-4, atol=1e-5)
    problem.kv_lens[1] = 2**31 - 1
    problem.cu_q_lens[2:] = 2**31 - 1
    out, lse = run(*problem.arguments())
    assert np.isfinite(np.asarray(out)).all()
    assert not np.isnan(np.asarray(lse)).any()


def test_nan_of_another_sequence_does_not_leak(backend, rng):
    problem = make(rng, "F32", q_lens=(2, 3), kv_lens=(20, 20))
    problem.pages[problem.page_table[0, 0], 3] = np.nan
    out, _ = attended(*problem.arguments(), backend=backend)
    want, _ = problem.expected(SCALE)
    np.testing.assert_allclose(np.asarray(out)[2:5], want[2:5], rtol=1e-4, atol=1e-5)
    assert np.isnan(np.asarray(out)[:2]).all()


# ---------------------------------------------------------------- listed keys


def listed(rng, problem, k=24, lengths=False, slots=False):
    """(TopK, slots that each token sees): -1 and wild numbers anywhere, repetitions, rows of -1 only."""
    tokens = len(problem.q)
    found, visible = np.full((tokens, k), -1, np.int32), [np.zeros(0, int)] * tokens
    most = rng.integers(0, k + 8, tokens).astype(np.int32) if lengths else np.full(tokens, k)
    every = problem.pages.shape[0] * problem.pages.shape[1]
    for b in range(problem.num_seqs):
        for t in range(*problem.cu_q_lens[b : b + 2]):
            if problem.kv_lens[b] == 0 or t % 7 == 3:
                found[t] = [-1, -9, every if slots else max(problem.kv_lens[b], 0)] * (k // 3)
                continue
            own = rng.integers(0, problem.kv_lens[b], k)
            own[k // 2] = own[0]
            keep = rng.random(k) < 0.8
            place = problem.slots(b, own)
            wild = rng.choice(np.array([-1, -(2**31), 2**31 - 1, every if slots else problem.kv_lens[b]]), k)
            found[t] = np.where(keep, place if slots else own, wild)
            visible[t] = place[keep & (np.arange(k) < most[t])]
    found[problem.cu_q_lens[problem.num_seqs] :] = 0
    arrays = jnp.asarray(found), jnp.asarray(most) if lengths else None
    return pa.TopK(*arrays, slots), visible


KINDS = [("BF16", False, False), ("BF16", True, True), ("FP8_DS_MLA", False, True), ("FP8_DS_MLA", True, False)]


@pytest.mark.parametrize(("format", "slots", "lengths"), KINDS)
def test_topk(format, slots, lengths, backend, rng):
    problem = make(rng, format, q_lens=(1, 5, 0, 11, 3), kv_lens=(9, 5, 0, 40, 0))
    topk, visible = listed(rng, problem, lengths=lengths, slots=slots)
    assert any(len(set(v)) < len(v) for v in visible)
    got = attended(*problem.arguments(), topk=topk, backend=backend)
    assert_close(got, problem.expected(SCALE, visible))


def test_bare_indices_are_positions(backend, rng):
    problem = make(rng, "F32")
    topk, visible = listed(rng, problem)
    assert_close(attended(*problem.arguments(), topk=topk.indices, backend=backend), problem.expected(SCALE, visible))


def test_all_positions_listed_is_dense(backend, rng):
    problem = make(rng, "E4M3_TENSOR")
    topk = np.full((len(problem.q), problem.page_table.shape[1] * 16), -1, np.int32)
    for row, slots in zip(topk, problem.causal(), strict=True):
        row[1 : len(slots) + 1] = np.arange(len(slots))[::-1]  # in any order
    assert_close(attended(*problem.arguments(), topk=jnp.asarray(topk), backend=backend), problem.expected(SCALE))


def test_a_key_listed_twice_counts_twice(backend):
    """Two keys of equal logits, one of them twice: two thirds of the weight."""
    rows = np.zeros((1, 16, 64), F32)
    rows[0, 0, 0], rows[0, 1, 1] = 1, 1
    cache = pa.LatentCache(jnp.asarray(rows), pa.F32, rope_dim=16)
    batch = pa.RaggedBatch(jnp.zeros((1, 1), jnp.int32), jnp.array([2]), jnp.array([0, 1]))
    q = jnp.zeros((1, 1, 48)), jnp.zeros((1, 1, 16))
    out, lse = attended(*q, cache, batch, topk=jnp.array([[1, -1, 0, 1]]), backend=backend)
    np.testing.assert_allclose(np.asarray(out)[0, 0, :2], [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(float(lse[0, 0]), np.log(3), rtol=1e-6)


# ---------------------------------------------------------------- up-projection, output


def projected(latents, w_uv):
    return np.einsum("thc,hcv->thv", latents, np.asarray(w_uv, np.float64)).reshape(len(latents), -1)


@pytest.mark.parametrize(("dtype", "backend"), [(BF16, "xla"), (F32, "reference")], indirect=["backend"])
def test_up_projection(dtype, backend, rng):
    problem = make(rng, "BF16")
    w_uv = (rng.standard_normal((3, 48, 8)) / 7).astype(dtype)
    out, lse = attended(*problem.arguments(), w_uv=jnp.asarray(w_uv), backend=backend)
    latents, want_lse = problem.expected(SCALE)
    assert_close((out, lse), (projected(latents, w_uv), want_lse))


@pytest.mark.parametrize(("up", "backend"), [(False, "xla"), (True, "reference")], indirect=["backend"])
def test_static_fp8_output(up, backend, rng):
    """The exact result through a static scale: the same codes, but where float32 ends on the other side of a tie."""
    problem = make(rng, "BF16")
    w_uv = (rng.standard_normal((3, 48, 8)) / 7).astype(F32)
    out = (pa.E4M3_STATIC, jnp.float32(0.02))
    given = {"w_uv": jnp.asarray(w_uv)} if up else {}
    got, _ = attended(*problem.arguments(), **given, out=out, backend=backend)
    want, _ = problem.expected(SCALE)
    want = oracle.static(np.float32(projected(want, w_uv) if up else want), np.float32(0.02))
    assert got.format == pa.E4M3_STATIC
    assert np.mean(np.asarray(got.values) != want) < 1e-3
    assert not np.asarray(got.values, F32)[sum((1, 5, 0, 17, 3, 2, 4)) :].any()


OUTPUTS = {
    "group 128": pa.e4m3_group(128),
    "group 64, columns": pa.e4m3_group(64, order="column"),
    "group 64, powers of two, aligned": pa.e4m3_group(64, ue8m0=True, order="tma"),
    "group 128, packed": pa.e4m3_group(128, ue8m0=True, order="tma", packed=True),
    "NVFP4": (pa.NVFP4, 0.001),
}


CELLS = [(name, i % 2 == 0, "reference" if name == "NVFP4" else "xla") for i, name in enumerate(OUTPUTS)]


@pytest.mark.parametrize(("name", "up", "backend"), CELLS, indirect=["backend"])
def test_bits_of_the_float32_result_quantised(name, up, backend, rng):
    """One rounding: what `pa.quantize` makes of the float32 result, all heads of a token in a row; the scale of padding
    is that of zeros."""
    problem = make(rng, "FP8_DS_MLA", q_lens=(1, 3, 0, 2), kv_lens=(9, 3, 0, 33))
    given = {"w_uv": jnp.asarray(rng.standard_normal((3, 512, 128)) / 20, F32)} if up else {}
    out = OUTPUTS[name]
    format, scale = out if isinstance(out, tuple) else (out, None)
    arguments = problem.arguments()
    (x, lse), (got, got_lse) = (attended(*arguments, **given, out=o, backend=backend) for o in (jnp.float32, out))
    want = pa.quantize(x.reshape(len(problem.q), -1), format, scale)
    assert got.shape == (10, 3 * (128 if up else 512))
    for a, b in zip(jax.tree.leaves((got, got_lse)), jax.tree.leaves((want, lse)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)
    zeros = pa.quantize(jnp.zeros((10, got.shape[1])), format, scale)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(zeros), strict=True):
        rows = (a.T, b.T) if format.order != "row" and a.shape[0] != 10 else (a, b)
        np.testing.assert_array_equal(*(np.asarray(x)[6:10] if x.ndim else np.asarray(x) for x in rows), strict=True)


@pytest.mark.parametrize(
    ("up", "topk"), [(False, False), (True, True), pytest.param(True, False, marks=pytest.mark.slow)],
    ids=["latent", "up-projected-topk", "up-projected"],
)  # fmt: skip
def test_fusion(up, topk, rng):
    """`fuse` finds the quantisation of what a model computes from the latents, in float32 the same but for ties."""
    problem = make(rng, "FP8_DS_MLA", q_lens=(1, 3), kv_lens=(9, 33))
    w_uv, format = jnp.asarray(rng.standard_normal((3, 512, 128)) / 20, F32), pa.e4m3_group(128, order="column")

    def layer(arguments, w_uv, topk):
        out, lse = attend(*arguments, topk=topk)
        out = jnp.einsum("thc,hcv->thv", out, w_uv) if up else out
        return pa.quantize(out.reshape(out.shape[0], -1), format), lse

    given = problem.arguments(), w_uv, listed(rng, problem)[0] if topk else None
    assert [f.op for f in pa.fusion.report(layer, *given).hits] == ["mla_attention"]
    (got, lse), (want, want_lse) = jit(pa.fuse(layer))(*given), jit(layer)(*given)
    np.testing.assert_array_equal(np.asarray(lse), np.asarray(want_lse))
    np.testing.assert_allclose(np.asarray(got.scale), np.asarray(want.scale), rtol=1e-5)
    assert np.mean(np.asarray(got.values) != np.asarray(want.values)) < 1e-3


# ---------------------------------------------------------------- upstream

DECODES = [n for n in goldens.names("mla") if n.endswith(("kvfp8", "dense_bf16", "dense_fp8", "flashinfer_mla"))]
# Relative L2 distance of ours from upstream's, and of the LSE: FlashMLA's FP8 kernel adds products with few bits and
# rounds P to e4m3, FlashInfer sums the bf16-rounded P; the others differ by the rounding of both results.
DISTANCE = {"flashmla_dense_fp8": (6e-3, 1e-3), "flashinfer_mla": (3e-3, 1.2e-3)}


def decode_problem(name):
    """(q_latent, q_rope, cache, batch) of a golden."""
    options, x, _ = goldens.load(name)
    q = x["q"].reshape(-1, x["q"].shape[-2], 576)
    parts = jnp.asarray(q[..., :512]), jnp.asarray(q[..., 512:])
    pages = jnp.asarray(x["k_cache"].reshape(*x["k_cache"].shape[:2], 576))
    fp8 = pages.dtype == jnp.float8_e4m3fn
    if parts[0].dtype == jnp.float8_e4m3fn:
        parts = [pa.Quantized(p, jnp.float32(options["q_scale"]), pa.E4M3_TENSOR) for p in parts]
    scale = jnp.float32(options["k_scale"]) if fp8 else None
    cache = pa.LatentCache(pages, pa.E4M3_TENSOR if fp8 else pa.BF16, scale)
    cu = np.arange(len(q) + 1, dtype=np.int32)
    table = x["block_table"] if "block_table" in x else goldens.page_table(x["kv_indptr"], x["kv_indices"])
    return *parts, cache, pa.RaggedBatch(jnp.asarray(table), jnp.asarray(x["seq_lens"]), jnp.asarray(cu))


@pytest.mark.parametrize("name", DECODES)
def test_golden(name, backend):
    """Upstream's decode kernels on an H100."""
    options, _, want = goldens.load(name)
    out, lse = attended(*decode_problem(name), scale=options["softmax_scale"], out=None, backend=backend)
    assert_upstream(name, out, lse, options, want)


def assert_upstream(name, out, lse, options, want):
    far, lse_far = DISTANCE.get(name, (2.5e-3, 1e-4))
    theirs = want["out"].reshape(out.shape).astype(F32)
    assert np.linalg.norm(np.asarray(out, F32) - theirs) <= far * np.linalg.norm(theirs)
    natural = want["lse"].reshape(lse.shape) * (np.log(2) if options["lse_base"] == "2" else 1)
    np.testing.assert_allclose(np.asarray(lse), natural, atol=lse_far)
    if name not in DISTANCE:
        np.testing.assert_allclose(np.asarray(out, F32), theirs, atol=1.5e-2, rtol=1e-2)


def test_sparse_golden(backend):
    """FlashMLA's sparse decode on an H100: slots of an FP8_DS_MLA cache, -1 anywhere, one row with a single key."""
    options, x, want = goldens.load("flashmla_sparse_fp8")
    q = jnp.asarray(x["q"][:, 0])
    cache = pa.LatentCache(jnp.asarray(x["kv_bytes"]), pa.FP8_DS_MLA)
    batch = pa.RaggedBatch(jnp.zeros((3, 1), jnp.int32), jnp.zeros(3, jnp.int32), jnp.arange(4))  # slots need no pages
    topk = pa.TopK(jnp.asarray(x["indices"][:, 0]), slots=True)
    scale = options["softmax_scale"]
    out, lse = attended(q[..., :512], q[..., 512:], cache, batch, topk=topk, scale=scale, out=None, backend=backend)
    assert_upstream("flashmla_sparse_fp8", out, lse, options, want)


# ---------------------------------------------------------------- transforms


def test_new_values_do_not_retrace(backend, rng):
    run = jit(functools.partial(attend, backend=backend))
    for scale in (0.1, 0.2):
        problem = make(rng, "E4M3_TENSOR")
        problem.scale = F32(scale / 10)
        assert_close(run(*problem.arguments(), scale=jnp.float32(scale)), problem.expected(F32(scale)))
    assert run._cache_size() == 1


GRADIENTS = [("F32", False), ("F32", True), ("E4M3_TENSOR", False)]


@pytest.mark.parametrize(("format", "sparse"), GRADIENTS)
def test_gradients(format, sparse, rng, monkeypatch):
    """Of all that is differentiable, against jax.grad straight through the naive implementation; poison stays out. The
    backward is one for all backends, here over several chunks and blocks."""
    monkeypatch.setattr(xla, "MAX_CHUNK", 5)
    monkeypatch.setattr(xla, "MAX_BLOCK", 7)
    problem = make(rng, format, q_lens=(1, 5, 0, 3), kv_lens=(9, 5, 0, 33))
    topk = listed(rng, problem)[0] if sparse else None
    q_latent, q_rope, cache, batch = problem.arguments()
    w_uv, scale = jnp.asarray(rng.standard_normal((3, 48, 8)), F32), jnp.float32(0.3)
    weights = rng.standard_normal((len(problem.q), 24)), rng.standard_normal((len(problem.q), 3))

    def loss(function, x):
        out, lse = function(*x[:3], batch, scale=x[3], w_uv=x[4], topk=topk, out=jnp.float32, return_lse=True)
        return jnp.vdot(out, weights[0]) + jnp.vdot(jnp.where(jnp.isfinite(lse), lse, 0), weights[1])

    def naive(*arguments, **keywords):
        statics, arrays = contract.prepare(*arguments, **keywords)
        return definition.run(statics, *arrays)

    x = q_latent, q_rope, cache, scale, w_uv
    got = jit(jax.grad(lambda x: loss(pa.mla_attention, x), allow_int=True))(x)
    want = jit(jax.grad(lambda x: loss(naive, x), allow_int=True))(x)
    names = jax.tree_util.tree_leaves_with_path(got)
    for (name, a), b in zip(names, jax.tree.leaves(want), strict=True):
        if a.dtype != jnp.float32:  # the codes of a quantised cache get none
            assert not np.asarray(a, F32).any()
            continue
        assert np.isfinite(np.asarray(a)).all(), name
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4, err_msg=str(name))
        assert np.asarray(a).any() or sparse, name


def test_gradients_by_differences(rng):
    """Of queries and latents along a random direction, against central differences of the float64 oracle."""
    problem = make(rng, "F32", q_lens=(1, 5, 0, 3), kv_lens=(9, 5, 0, 33), spare_tokens=0)
    weights = rng.standard_normal((9, 3, 48))
    *q, cache, batch = problem.arguments()
    by_q, by_cache = jit(jax.grad(lambda q, cache: jnp.vdot(attend(*q, cache, batch)[0], weights), (0, 1)))(q, cache)
    grads = {"q": np.concatenate([np.asarray(x) for x in by_q], -1), "pages": np.asarray(by_cache.pages)}
    for name, grad in grads.items():
        value, step = getattr(problem, name).astype(np.float64), 1e-4
        direction = rng.standard_normal(value.shape)

        def exact(x, name=name, value=value):
            setattr(problem, name, x)
            found = float(np.vdot(problem.expected(SCALE)[0], weights))
            setattr(problem, name, value.astype(F32))
            return found

        slope = (exact(value + step * direction) - exact(value - step * direction)) / (2 * step)
        size = np.linalg.norm(grad) * np.linalg.norm(direction)
        # The oracle takes latents as float32: a step of 1e-4 is known to 1e-3 there.
        assert abs(np.vdot(grad, direction) - slope) <= 2e-3 * size


def test_a_quantised_output_has_no_gradient(rng):
    *q, cache, batch = make(rng, "F32", spare_tokens=0).arguments()
    out = (pa.E4M3_STATIC, 0.5)
    values, pull = jax.vjp(lambda x: attend(x, q[1], cache, batch, out=out)[0].values, q[0])
    assert not np.asarray(pull(jnp.ones_like(values))[0]).any()


def test_vmap_equals_a_loop(backend, rng):
    each = [make(rng, "F32", q_lens=(1, 5), kv_lens=(9, 33)).arguments() for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    run = functools.partial(attend, backend=backend)
    out, lse = jit(jax.vmap(run))(*stacked)
    for i, arguments in enumerate(each):
        want, want_lse = jit(run)(*arguments)
        np.testing.assert_allclose(np.asarray(out[i]), np.asarray(want), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(lse[i]), np.asarray(want_lse), rtol=1e-5, atol=1e-6)


def test_layers_in_a_scan(rng):
    """Each layer writes its token and attends, all of them in one cache: layer i owns the pages from 4 i on."""
    problem = make(rng, "F32", q_lens=(1, 1), kv_lens=(9, 33), spare_seqs=0, spare_tokens=0, num_pages=8)
    q_latent, q_rope, _, batch = problem.arguments()
    start = pa.LatentCache.allocate(16, 16, 48, 16, format=pa.F32)

    def layer(cache, i):
        table = jnp.clip(batch.page_table, 0, 7) + 8 * i
        mine = pa.RaggedBatch(table, batch.kv_lens, batch.cu_q_lens)
        cache = pa.write_latent(cache, q_latent[:, 0] + i, q_rope[:, 0], mine.slot_mapping(2, 16))
        return cache, pa.mla_attention(q_latent, q_rope, cache, mine, scale=SCALE)

    _, scanned = jit(lambda c: jax.lax.scan(layer, c, jnp.arange(2)))(start)
    cache, each = start, jit(layer)
    for i in range(2):
        cache, want = each(cache, jnp.int32(i))
        np.testing.assert_allclose(np.asarray(scanned[i]), np.asarray(want), rtol=1e-5, atol=1e-6)


def test_export_round_trip(backend, rng):
    """A written and attended step, serialised; its argument and result trees travel as leaves."""
    problem = make(rng, "FP8_DS_MLA", q_lens=(1, 3), kv_lens=(9, 33))
    leaves, tree = jax.tree.flatten(problem.arguments())

    def step(*leaves):
        q_latent, q_rope, cache, batch = jax.tree.unflatten(tree, leaves)
        nowhere = jnp.full(q_latent.shape[0], -1, jnp.int32)
        cache = pa.write_latent(cache, q_latent[:, 0], q_rope[:, 0], nowhere, backend=backend)
        return attend(q_latent, q_rope, cache, batch, backend=backend)

    again = jax.export.deserialize(jax.export.export(jax.jit(step))(*leaves).serialize())
    assert_close(again.call(*leaves), problem.expected(SCALE))


# ---------------------------------------------------------------- hypothesis

SEQS, TOKENS, WIDTH, PAGE, PAGES = 4, 24, 4, 16, 20


@functools.cache
def compiled(backend):
    return jit(functools.partial(attend, backend=backend))


@st.composite
def lens(draw):
    """(q_lens, kv_lens) of up to SEQS sequences that fit the fixed shapes; a query may be longer than its keys."""
    kv_lens = draw(st.lists(st.integers(0, WIDTH * PAGE), min_size=1, max_size=SEQS))
    return [draw(st.integers(0, 6)) for _ in kv_lens], kv_lens


@pytest.mark.parametrize("name", ["reference", "xla"])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 2**32), lens(), st.sampled_from([("F32", "E4M3_HEAD"), ("E4M3_TENSOR", None)]),
    st.sampled_from([None, (False, True), (True, False)]),
)  # fmt: skip
def test_ragged(name, seed, lens, formats, sparse):
    rng, (q_lens, kv_lens) = np.random.default_rng(seed), lens
    problem = make(
        rng, formats[0], q_lens, kv_lens, q_format=formats[1], table_width=WIDTH, num_pages=PAGES,
        spare_seqs=SEQS - len(q_lens), spare_tokens=TOKENS - sum(q_lens),
    )  # fmt: skip
    topk, visible = (None, None) if sparse is None else listed(rng, problem, lengths=sparse[0], slots=sparse[1])
    got = compiled(name)(*problem.arguments(), topk=topk)
    assert_close(got, problem.expected(SCALE, visible), 3e-5)


# ---------------------------------------------------------------- the non-absorbed form

HEADS, NOPE, ROPE, LATENT, VALUE = 4, 128, 64, 96, 128


def contiguous(k, v, cu_lens, batch):
    """(cache, batch) of tokens in a row: pages of one token."""
    rows = k.shape[0]
    table = jnp.minimum(cu_lens[:-1, None] + jnp.arange(rows), rows - 1)
    view = pa.RaggedBatch(table, cu_lens[1:] - cu_lens[:-1], batch.cu_q_lens, batch.num_seqs)
    return pa.PagedKVCache(k[:, None], v[:, None]), view


def non_absorbed(q_nope, q_rope, cache, batch, w_uk, w_uv, scale, chunk, backend):
    """Prefill with keys of 192 and values of 128 made from the latents: the context chunk by chunk, merged by LSE."""
    q, tokens = jnp.concatenate([q_nope, q_rope], -1), q_nope.shape[0]
    context, seqs = batch.kv_lens - (batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]), batch.kv_lens.shape[0]

    def part(ends, starts, rows, causal):
        now = pa.RaggedBatch(batch.page_table, ends, batch.cu_q_lens)
        got = pa.gather_latent(cache, now, max_tokens=rows, starts=starts, backend=backend)
        latent, rope = got.rows[:, :LATENT], got.rows[:, LATENT:]
        k = jnp.concatenate([
            jnp.einsum("tc,hdc->thd", latent, w_uk), jnp.broadcast_to(rope[:, None], (rows, HEADS, ROPE))
        ], -1)  # fmt: skip
        v = jnp.einsum("tc,hcv->thv", latent, w_uv)
        kv, view = contiguous(k, v, got.cu_lens, batch)
        return pa.paged_attention(
            q, kv, view, scale=scale, mask=pa.Mask(causal=causal), return_lse=True, backend=backend
        )

    chunks = range(0, 48, chunk)
    parts = [part(jnp.minimum(context, c + chunk), jnp.full_like(context, c), seqs * chunk, False) for c in chunks]
    return pa.merge_attention(*zip(*parts, part(batch.kv_lens, context, tokens, True), strict=True))


@pytest.mark.parametrize(
    ("chunk", "backend"), [(16, "xla"), pytest.param(20, "reference", marks=pytest.mark.slow)], indirect=["backend"]
)
def test_non_absorbed_prefill_in_chunks(chunk, backend, rng):
    """The same result as the absorbed form, whose queries have the key up-projection in them: (q W) . c = q . (W c)."""
    q_lens, kv_lens = np.array([5, 3, 1, 4]), np.array([50, 20, 1, 9])
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), F32)  # noqa: E731
    q_nope, q_rope = normal(13, HEADS, NOPE), normal(13, HEADS, ROPE)
    w_uk, w_uv = normal(HEADS, NOPE, LATENT) / 10, normal(HEADS, LATENT, VALUE) / 10
    cache = pa.LatentCache(normal(9, 16, LATENT + ROPE), pa.F32, rope_dim=ROPE)
    table = jnp.array([[3, 0, 7, 5], [1, 2, 0, 0], [4, 0, 0, 0], [6, 0, 0, 0]])
    cu = jnp.asarray(np.concatenate([[0], np.cumsum(q_lens)]), jnp.int32)
    batch, scale = pa.RaggedBatch(table, jnp.asarray(kv_lens, jnp.int32), cu), (NOPE + ROPE) ** -0.5
    run = jit(functools.partial(non_absorbed, scale=scale, chunk=chunk, backend=backend))
    out, lse = run(q_nope, q_rope, cache, batch, w_uk, w_uv)
    assert out.shape == (13, HEADS, VALUE)
    q_latent = jnp.einsum("thd,hdc->thc", q_nope, w_uk)
    want, want_lse = attended(q_latent, q_rope, cache, batch, scale=scale, w_uv=w_uv, backend=backend)
    assert_close((np.asarray(out).reshape(13, -1), lse), (np.asarray(want), np.asarray(want_lse)), 2e-5)


# ---------------------------------------------------------------- bad input


CACHE = pa.LatentCache.allocate(4, 16, 32, 8, format=pa.F32)
BATCH = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3], jnp.int32), jnp.array([0, 1, 4], jnp.int32))
Q, R = jnp.zeros((4, 3, 32)), jnp.zeros((4, 3, 8))
LIST = jnp.zeros((4, 5), jnp.int32)
fp8 = jnp.float8_e4m3fn


def quantized(x, scale=1.0, format=pa.E4M3_TENSOR):
    return pa.Quantized(x.astype(fp8), jnp.asarray(scale, jnp.float32), format)


# name: (changed arguments, the argument that the message names, a piece of the value that it shows)
BAD = {
    "rank": ({"q_latent": Q[0]}, "q_latent", r"\(3, 32\)"),
    "latent dim": ({"q_latent": Q[..., :16]}, "q_latent", "16"),
    "rotary dim": ({"q_rope": Q}, "q_rope", "32"),
    "other heads": ({"q_rope": R[:, :2]}, "q_rope", r"\(4, 2, 8\)"),
    "no heads": ({"q_latent": Q[:, :0], "q_rope": R[:, :0]}, "q_latent", "no head"),
    "integers": ({"q_latent": Q.astype(jnp.int32)}, "q_latent", "int32"),
    "FP8 without a scale": ({"q_rope": R.astype(fp8)}, "q_rope", "float8_e4m3fn"),
    "one part quantised": ({"q_rope": quantized(R)}, "q_rope", "E4M3_TENSOR"),
    "other formats": ({"q_latent": Q.astype(BF16)}, "q_rope", "F32"),
    "query scale shape": ({"q_latent": quantized(Q, jnp.ones(3))}, r"q_latent\.scale", r"\(3,\)"),
    "query scale negative": ({"q_latent": quantized(Q, -1)}, r"q_latent\.scale", "-1"),
    "query per group": ({"q_latent": quantized(Q, 1, pa.INDEX_K)}, r"q_latent\.format", "INDEX_K"),
    "no cache": ({"cache": CACHE.pages}, "cache", "Array"),
    "no batch": ({"batch": LIST}, "batch", "Array"),
    "batch of more tokens": ({"q_latent": Q[:3], "q_rope": R[:3]}, "cu_q_lens", "4"),
    "no scale": ({"scale": None}, "scale", "None"),
    "scale of many": ({"scale": jnp.ones(3)}, "scale", r"\(3,\)"),
    "scale NaN": ({"scale": float("nan")}, "scale", "nan"),
    "topk of other tokens": ({"topk": LIST[:3]}, r"topk\.indices", r"\(3, 5\)"),
    "topk rank": ({"topk": LIST[0]}, r"topk\.indices", r"\(5,\)"),
    "topk of none": ({"topk": LIST[:, :0]}, r"topk\.indices", r"\(4, 0\)"),
    "topk type": ({"topk": LIST.astype(F32)}, r"topk\.indices", "float32"),
    "topk number": ({"topk": 2048}, "topk", "int"),
    "topk lengths": ({"topk": pa.TopK(LIST, jnp.zeros(3, jnp.int32))}, r"topk\.lengths", r"\(3,\)"),
    "topk lengths type": ({"topk": pa.TopK(LIST, jnp.zeros(4))}, r"topk\.lengths", "float32"),
    "w_uv shape": ({"w_uv": jnp.zeros((3, 8, 16))}, "w_uv", r"\(3, 8, 16\)"),
    "w_uv type": ({"w_uv": jnp.zeros((3, 32, 16), fp8)}, "w_uv", "float8_e4m3fn"),
    "out FP8": ({"out": fp8}, "out", "float8_e4m3fn"),
    "out scale negative": ({"out": (pa.E4M3_STATIC, -1.0)}, "out", "-1"),
    "out scales": ({"out": (pa.E4M3_STATIC, jnp.ones(2))}, "out", r"\(2,\)"),
    "out in groups of 32": (
        {"out": pa.Format("G32", np.dtype(fp8), "group", 32)}, "out", "G32 of groups of 32; groups are of 64 or 128",
    ),
    "out in groups of more than a head": ({"out": pa.e4m3_group(64)}, "out", "for values of 32"),
    "out groups with a scale": ({"out": (pa.e4m3_group(64), 1.0)}, "out", "finds its own"),
    "out NVFP4 without a scale": ({"out": pa.NVFP4}, "out", "NVFP4"),
    "out per head": ({"out": (pa.E4M3_HEAD, 1.0)}, "out", "E4M3_HEAD"),
    "backend": ({"backend": "nonsense"}, "backend", "nonsense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("without_type_checks")
def test_invalid_input(name):
    changes, argument, value = BAD[name]
    arguments = {"q_latent": Q, "q_rope": R, "cache": CACHE, "batch": BATCH, "scale": SCALE} | changes
    with pytest.raises(pa.InvalidInput, match=argument) as error:
        pa.mla_attention(**arguments)
    assert error.match(value)
    assert len(str(error.value)) < 300


@pytest.mark.usefixtures("without_type_checks")
def test_kind_of_indices_is_static():
    with pytest.raises(pa.InvalidInput, match=r"topk\.slots: got 1; it is static"):
        pa.mla_attention(Q, R, CACHE, BATCH, scale=SCALE, topk=pa.TopK(LIST, slots=1))


def test_scale_has_no_default():
    with pytest.raises(TypeError, match="scale"):
        pa.mla_attention(Q, R, CACHE, BATCH)


def test_explain():
    answer = pa.explain(pa.mla_attention, Q, R, CACHE, BATCH, scale=SCALE, topk=LIST)
    assert answer == {"mosaic": "not on cpu", "triton": "not on cpu", "xla": "chosen", "reference": "supported"}
