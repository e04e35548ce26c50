"""The up-projection of MLA on Hopper: it lowers, and its bytes are those of the definition."""

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
from cover import pairwise
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_attn as pa
from pallas_attn.core import output
from pallas_attn.core.latent_cache import abstract_latent_cache
from pallas_attn.ops.mla import mosaic, mosaic_up, terms, xla
from pallas_attn.ops.mla.problem import prepare

S = jax.ShapeDtypeStruct
SCALE = 0.11
OUTPUTS = {
    "bf16": jnp.bfloat16,
    "f32": jnp.float32,
    "static": (pa.E4M3_STATIC, 0.25),
    **{
        f"{order}{'_ue8m0' * ue8m0}{'_packed' * packed}": (order, ue8m0, packed)
        for order, ue8m0, packed in (
            ("row", False, False), ("column", True, False), ("tma", False, False), ("tma", True, True),
        )
    },
}  # fmt: skip


def output_of(name, group):
    """The argument `out`."""
    out = OUTPUTS[name]
    return pa.e4m3_group(group, order=out[0], ue8m0=out[1], packed=out[2]) if name in list(OUTPUTS)[3:] else out


def problem(tokens, heads, v_dim, out, dtype=jnp.bfloat16, q_lens=1, kv="BF16", seqs=2):
    """A problem of shapes only."""
    batch = pa.RaggedBatch(S((seqs, 8), jnp.int32), S((seqs,), jnp.int32), S((seqs + 1,), jnp.int32), None, q_lens)
    kind = {"F16": jnp.float16}.get(kv, jnp.bfloat16)
    query = S((tokens, heads, 512), kind), S((tokens, heads, 64), kind)
    weights = S((heads, 512, v_dim), dtype)
    return prepare(*query, abstract_latent_cache(getattr(pa, kv)), batch, scale=SCALE, w_uv=weights, out=out)[0]


def numbers(rng, p, heads):
    """(latents [T, heads, C], w_uv) whose products are sums of whole numbers of eighths: exact in any order. The last
    token is padding: zeros."""
    x = rng.integers(-8, 9, (p.tokens, heads, 512))
    x[-1] = 0
    return jnp.asarray(x, p.w_dtype), jnp.asarray(rng.integers(-8, 9, (p.heads, 512, p.v_dim)) / 8, p.w_dtype)


def wanted(p, x, w, scale):
    return output.finish(terms.project(x[:, : p.heads].astype(jnp.float32), w), p.out_dtype, p.out_format, scale)


def same_bytes(got, want):
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_array_equal(np.asarray(g).astype(np.float64), np.asarray(w).astype(np.float64))


def arguments(out):
    """The scale as the kernel takes it, and as the definition does."""
    return (jnp.full(1, out[1]), jnp.float32(out[1])) if isinstance(out, tuple) else (jnp.ones(1), None)


INTERPRETED = [
    (16, 2, 128, "row", 128, jnp.bfloat16),
    (70, 1, 128, "tma_ue8m0_packed", 64, jnp.float16),
    (3, 3, 64, "column_ue8m0", 64, jnp.bfloat16),
]
MORE_INTERPRETED = [
    (3, 3, 128, "tma_ue8m0_packed", 128, jnp.bfloat16),
    (8, 1, 128, "static", 128, jnp.bfloat16),
    (24, 1, 64, "f32", 64, jnp.bfloat16),
]


@pytest.mark.parametrize(
    "cell", [*INTERPRETED, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE_INTERPRETED)],
    ids=lambda c: "-".join(map(str, c[:5])),
)  # fmt: skip
def test_interpreted(cell, rng, monkeypatch):
    """Of several blocks, one CTA has all."""
    monkeypatch.setattr(mosaic_up, "SMS", 1)
    tokens, heads, v_dim, name, group, dtype = cell
    out = output_of(name, group)
    p = problem(tokens, heads, v_dim, out, dtype, kv="F16" if dtype == jnp.float16 else "BF16")
    assert mosaic.supports(p) is None
    (x, w), (scale, known) = numbers(rng, p, heads + 1), arguments(out)
    same_bytes(mosaic_up.project(p, x, w, scale, plgpu.InterpretGPUParams()), wanted(p, x, w, known))


def test_latents_go_from_attention_to_the_projection(rng, monkeypatch):
    """In the type of the weights; nothing else is rounded before the end. Padding has the scale of zeros."""
    monkeypatch.setattr(
        mosaic, "_run", lambda p, args, workers: jax.jit(lambda: xla.run(p, *args._replace(w_uv=None)))()
    )
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(latents, "dims_of", lambda format: (512, 64))
    check_whole(rng, "BF16", 8, (2, 1), (66, 3))


@pytest.mark.slow
def test_the_whole_call_interpreted(rng, monkeypatch):
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(latents, "dims_of", lambda format: (512, 64))
    check_whole(rng, "BF16", 8, (2, 1), (66, 3))


def check_whole(rng, format, heads, q_lens, kv_lens, topk=None):
    random = latents.make(
        rng, format, q_lens, kv_lens, heads=heads, page_size=64, q_dtype=jnp.bfloat16, spare_tokens=1, spare_seqs=1
    )
    w = jnp.asarray(rng.standard_normal((heads, 512, 128)) / 16, jnp.bfloat16)
    listed = None if topk is None else jnp.asarray(rng.integers(-1, topk[1], (len(random.q), topk[0])), jnp.int32)
    given = random.arguments(max_q_len=max(q_lens))
    keywords = {"scale": SCALE, "w_uv": w, "topk": listed, "out": pa.e4m3_group(128), "return_lse": True}
    p, args = prepare(*given, **keywords)
    assert mosaic.supports(p) is None
    codes, scale, lse = mosaic.run(p, *args)
    want, want_lse = pa.mla_attention(*given, **keywords, backend="xla")
    got = pa.dequantize(pa.Quantized(codes, scale, p.out_format))
    np.testing.assert_allclose(scale, want.scale, rtol=2e-2)
    assert np.linalg.norm(got - pa.dequantize(want)) <= 0.04 * np.linalg.norm(pa.dequantize(want))
    np.testing.assert_allclose(lse, want_lse, atol=1e-2)
    assert not np.asarray(codes[-1], np.float32).any()


# ---------------------------------------------------------------- lowering, and a GPU

CELLS = [
    (tokens, heads, v_dim, name, group, dtype)
    for tokens, (heads, v_dim), name, group, dtype in pairwise((
        [1, 8, 32, 35, 64, 100, 128, 1000], ((128, 128), (16, 128), (5, 128), (3, 64), (128, 64)), list(OUTPUTS),
        (128, 64), (jnp.bfloat16, jnp.float16),
    ))
    if group <= v_dim
]  # fmt: skip
NAMES = {"ids": lambda c: "-".join(map(str, c[:5])) + f"-{np.dtype(c[5])}"}


def lowered(tokens, heads, v_dim, name, group, dtype):
    p = problem(tokens, heads, v_dim, output_of(name, group), dtype, kv="F16" if dtype == jnp.float16 else "BF16")
    assert mosaic.supports(p) is None
    step = jax.jit(lambda *a: mosaic_up.project(p, *a, None))
    shapes = S((tokens, heads, 512), dtype), S((heads, 512, v_dim), dtype), S((1,), jnp.float32)
    return step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cell", CELLS[::12], **NAMES)
def test_lowers_to_one_launch(cell):
    assert lowered(*cell).count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, **NAMES)
def test_every_cell_lowers(cell):
    lowered(*cell)


@pytest.mark.slow
def test_the_whole_call_is_three_launches():
    batch = pa.RaggedBatch(S((32, 8), jnp.int32), S((32,), jnp.int32), S((33,), jnp.int32), None, 1)

    def step(q, r, w, cache, batch):
        p, args = prepare(q, r, cache, batch.with_schedule(), scale=SCALE, w_uv=w, out=pa.e4m3_group(128))
        return mosaic.run(p, *args)

    shapes = S((32, 16, 512), jnp.bfloat16), S((32, 16, 64), jnp.bfloat16), S((16, 512, 128), jnp.bfloat16)
    text = (
        jax.jit(step)
        .trace(*shapes, abstract_latent_cache(pa.BF16), batch)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 3
    assert "tensor<32x2048xbf16>" not in text, "the result passes through memory before it is rounded"


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, **NAMES)
def test_on_a_gpu(cell, rng):
    tokens, heads, v_dim, name, group, dtype = cell
    out = output_of(name, group)
    p = problem(tokens, heads, v_dim, out, dtype, kv="F16" if dtype == jnp.float16 else "BF16")
    with jax.default_device(jax.devices("cpu")[0]):
        (x, w), (scale, known) = numbers(rng, p, heads), arguments(out)
        want = [np.asarray(a) for a in jax.jit(lambda x, w: wanted(p, x, w, known))(x, w)]
    x, w, scale = jax.device_put((x, w, scale), jax.devices()[0])
    same_bytes(jax.jit(lambda *a: mosaic_up.project(p, *a, None))(x, w, scale), want)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [128, 16])
@pytest.mark.parametrize("format", ["BF16", "FP8_DS_MLA"])
def test_the_whole_call_on_a_gpu(format, heads, rng, monkeypatch):
    monkeypatch.setattr(latents, "dims_of", lambda format: (512, 64))
    listed = {"topk": (320, 900)} if format == "FP8_DS_MLA" else {}
    check_whole(rng, format, heads, (1,) * 9, (1000, 1, 64, 65, 3000, 700, 2, 128, 999), **listed)
    check_whole(rng, format, heads, (2, 1, 2), (130, 1, 5), **listed)
