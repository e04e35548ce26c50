"""Attention whose result is quantised in groups: the bits of quantising the float32 result, padding, vmap, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import make

import pallas_attn as pa
from pallas_attn.ops.paged_attention import mosaic_decode, mosaic_prefill, triton
from pallas_attn.ops.paged_attention.problem import prepare

PACKED = pa.e4m3_group(64, ue8m0=True, order="tma", packed=True)
OUTPUTS = {
    "group 128": pa.e4m3_group(128),
    "group 64 in columns": pa.e4m3_group(64, order="column"),
    "group 64 packed": PACKED,
    "NVFP4": (pa.NVFP4, 0.001),
}
LENS = {"q_lens": (1, 5, 0, 3), "kv_lens": (9, 5, 0, 33), "dim": 32, "v_dim": 128, "spare_seqs": 1, "spare_tokens": 2}
FAST = {"xla_backend_optimization_level": 0}


def assert_same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_array_equal(np.asarray(g), np.asarray(w), strict=True), got, want)


def quantize(x, out):
    """The float32 result [T, H, DV] quantised as the projection after attention wants it."""
    format, scale = out if isinstance(out, tuple) else (out, None)
    return pa.quantize(x.reshape(x.shape[0], x.shape[1] * x.shape[2]), format, scale)


def attend(out, backend, *arguments):
    return pa.paged_attention(*arguments, out=out, return_lse=True, backend=backend)


@pytest.mark.parametrize("name", OUTPUTS)
def test_bits_of_the_float32_result_quantised(name, backend, rng):
    """Poison in unread slots and padding reaches neither values nor scales; the scale of padding is that of zeros."""
    arguments, out = make(rng, "E4M3_TENSOR", **LENS).arguments(), OUTPUTS[name]
    run = jax.jit(attend, static_argnums=(0, 1), compiler_options=FAST)
    (x, lse), got = run(jnp.float32, backend, *arguments), run(out, backend, *arguments)
    assert_same(got, (quantize(x, out), lse))
    assert got[0].shape == (11, 4 * 128)
    padding, zeros = got[0].values[9:], quantize(jnp.zeros((4, 4, 128)), out)
    assert not np.asarray(padding).view(np.uint8).any()
    blocks, of_zeros = (jax.tree.leaves(x.scale)[0] for x in (got[0], zeros))
    if zeros.format.order != "row":
        blocks, of_zeros = blocks.T, of_zeros.T
    assert_same(blocks[9:11], of_zeros[:2])


@pytest.mark.parametrize("name", OUTPUTS)
def test_nothing_to_attend_to(name):
    for tokens, seqs in ((0, 2), (3, 0)):
        cache = pa.PagedKVCache.allocate(4, 16, 2, 128, format=pa.F32)
        batch = pa.RaggedBatch(
            jnp.zeros((seqs, 2), jnp.int32), jnp.zeros(seqs, jnp.int32), jnp.zeros(seqs + 1, jnp.int32)
        )
        got, _ = attend(OUTPUTS[name], "xla", jnp.zeros((tokens, 4, 128)), cache, batch)
        assert_same(got, quantize(jnp.zeros((tokens, 4, 128)), OUTPUTS[name]))


@pytest.mark.parametrize("name", ["group 64 packed", "NVFP4"])
def test_vmap(name, rng):
    problems = [make(rng, "F32", **LENS).clean().arguments() for _ in range(2)]
    queries, (_, cache, batch) = jnp.stack([q for q, *_ in problems]), problems[0]
    one = jax.jit(lambda q: attend(OUTPUTS[name], "xla", q, cache, batch), compiler_options=FAST)
    got = jax.jit(jax.vmap(lambda q: attend(OUTPUTS[name], "xla", q, cache, batch)), compiler_options=FAST)(queries)
    assert_same(got, jax.tree.map(lambda *x: jnp.stack(x), *(one(q) for q in queries)))


def problem(out, **keywords):
    cache = pa.PagedKVCache.allocate(4, 16, 2, 128, format=pa.BF16)
    batch = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3]), jnp.array([0, 1, 2]), **keywords)
    return prepare(jnp.zeros((4, 4, 128), jnp.bfloat16), cache, batch, out=out)[0]


@pytest.mark.parametrize("name", OUTPUTS)
def test_kernels_refuse_by_name(name):
    """Until one of them can."""
    format = OUTPUTS[name][0] if name == "NVFP4" else OUTPUTS[name]
    for kernel, keywords in ((mosaic_decode, {"max_q_len": 1}), (mosaic_prefill, {}), (triton, {})):
        reason = kernel.supports(problem(OUTPUTS[name], **keywords))
        assert reason is not None
        assert f"no {format} output" in reason or kernel is mosaic_prefill


REFUSED = {
    "tensor without a scale": (pa.E4M3_STATIC, r"\(format, scale\)"),
    "NVFP4 without a scale": (pa.NVFP4, r"\(format, scale\)"),
    "group with a scale": ((pa.e4m3_group(128), 0.5), "the format alone"),
    "per head": ((pa.E4M3_HEAD, 0.5), "NVFP4 with the tensor's scale"),
    "negative": ((pa.NVFP4, -0.5), "positive"),
    "array of scales": ((pa.NVFP4, np.ones(2, np.float32)), "one number"),
    "three": ((pa.NVFP4, 1.0, 2.0), "it is a dtype"),
    "other groups": (pa.Format("G32", np.dtype(jnp.float8_e4m3fn), "group", 32), "64 or 128"),
    "half a group": (pa.e4m3_group(128), "multiple of 128"),
    "bare FP8": (jnp.float8_e4m3fn, r"\(format, scale\)"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    out, fix = REFUSED[name]
    cache = pa.PagedKVCache.allocate(4, 16, 2, 64, format=pa.F32)
    batch = pa.RaggedBatch(jnp.zeros((2, 3), jnp.int32), jnp.array([20, 3]), jnp.array([0, 1, 4]))
    with pytest.raises(pa.InvalidInput, match=f"out.*{fix}"):
        pa.paged_attention(jnp.zeros((4, 4, 64)), cache, batch, out=out)


def test_a_float_format_is_its_type():
    assert problem(pa.F32).out_dtype == np.float32
