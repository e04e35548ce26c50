"""quantize, dequantize and fake_quantize: scale rules, saturation, rounding and the straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import pallas_attn as pa


def in_columns(x, *rule):
    codes, scale = oracle.per_group(x, *rule)
    return codes, scale.swapaxes(-1, -2)


DYNAMIC = {
    "E4M3_TOKEN_HEAD": (pa.E4M3_TOKEN_HEAD, lambda x: oracle.per_token_head(x, oracle.E4M3)),
    "E5M2_TOKEN_HEAD": (pa.E5M2_TOKEN_HEAD, lambda x: oracle.per_token_head(x, oracle.E5M2)),
    "INT8_TOKEN_HEAD": (pa.INT8_TOKEN_HEAD, lambda x: oracle.per_token_head(x, oracle.INT8)),
    "group 128": (pa.e4m3_group(128), lambda x: oracle.per_group(x, 128)),
    "group 64": (pa.e4m3_group(64), lambda x: oracle.per_group(x, 64)),
    "group 128 ue8m0": (pa.e4m3_group(128, ue8m0=True), lambda x: oracle.per_group(x, 128, True)),
    "group 64 ue8m0 column": (pa.e4m3_group(64, ue8m0=True, order="column"), lambda x: in_columns(x, 64, True)),
    "INDEX_K": (pa.INDEX_K, oracle.index_key),
    "FP8_DS_MLA": (pa.FP8_DS_MLA, oracle.ds_mla),
}
GIVEN = {
    "E4M3_TENSOR": (np.float32(0.37), lambda x, s: oracle.per_tensor(x, s, oracle.E4M3)),
    "E5M2_TENSOR": (np.float32(0.37), lambda x, s: oracle.per_tensor(x, s, oracle.E5M2)),
    "E4M3_STATIC": (np.float32(0.37), oracle.static),
    "E4M3_HEAD": (np.array([0.3, 0.7, 1.9], np.float32), lambda x, s: oracle.per_tensor(x, s, oracle.E4M3)),
    "E5M2_HEAD": (np.array([0.3, 0.7, 1.9], np.float32), lambda x, s: oracle.per_tensor(x, s, oracle.E5M2)),
}


def quantize(jit):
    return jax.jit(pa.quantize, static_argnums=1) if jit else pa.quantize


def rows(rng, size=256):
    """float32 [40, 3, size] over many magnitudes, with zeros, exact powers of two and values beyond every FP8 range."""
    x = rng.standard_normal((40, 3, size)).astype(np.float32)
    x *= np.float32(10) ** rng.integers(-8, 6, (40, 3, 1))
    x[0], x[1, :, 0], x[2, 0], x[3] = 0, 448 * 2.0**-5, 2.0**-9, np.float32(1e30) * np.sign(x[3])
    return x


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_scales_found_by_rule(name, jit, rng):
    format, rule = DYNAMIC[name]
    x = rows(rng, 128) if name == "INDEX_K" else rows(rng)
    codes, scale = rule(x)
    got = quantize(jit)(jnp.asarray(x), format)
    np.testing.assert_array_equal(np.asarray(got.scale), scale)
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), codes.view(np.uint8))


def near_ties(scale, dtype):
    """float32 [*, 3]: what a quantiser takes to the midpoints between neighbouring codes, and the floats beside them.

    A product with the reciprocal rounds many of them to other codes than a true division does, and XLA replaces a
    division by a constant or by a broadcast scalar with such a product.
    """
    codes = np.arange(0x7E if dtype == oracle.E4M3 else 0x7B, dtype=np.uint8)
    low, high = (c.view(dtype).astype(np.float32) for c in (codes, codes + np.uint8(1)))
    x = ((low + high) / 2)[:, None] * np.broadcast_to(scale, 3)
    return np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", GIVEN)
def test_given_scale(name, jit, rng):
    x, (scale, rule) = rows(rng), GIVEN[name]
    ties = near_ties(scale, oracle.E4M3 if name.startswith("E4") else oracle.E5M2)
    x = np.concatenate([x, np.broadcast_to(ties[..., None], (*ties.shape, x.shape[-1]))])
    got = quantize(jit)(jnp.asarray(x), getattr(pa, name), jnp.asarray(scale))
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), rule(x, scale).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(got.scale), scale)


@pytest.mark.parametrize("name", [*GIVEN, "INT8_TOKEN_HEAD", "E4M3_TOKEN_HEAD"])
def test_found_scale_reaches_the_largest_code(name, rng):
    x = rng.standard_normal((5, 3, 64)).astype(np.float32)
    format = getattr(pa, name)
    got = pa.quantize(jnp.asarray(x), format)
    assert np.abs(np.asarray(got.values, np.float32)).max() == format.qmax
    step = {"e4": 2**-4, "e5": 2**-3, "in": 0.5 / 127}[name[:2].lower()]
    assert np.abs(np.asarray(pa.dequantize(got)) - x).max() <= 1.01 * step * np.abs(x).max()


@pytest.mark.parametrize("name", ["E4M3_TENSOR", "E5M2_TENSOR", "E4M3_STATIC", "E4M3_HEAD", "E4M3_TOKEN_HEAD"])
def test_fp8_saturates(name):
    """XLA's own conversion to e4m3 makes NaN of anything beyond 464."""
    format = getattr(pa, name)
    x = jnp.array([[[449.0, 465.0, 1e6, 3e38, -465.0, -3e38, 0.0, -0.0]]])
    scale = {"tensor": jnp.float32(1), "head": jnp.ones(1), "token_head": jnp.ones((1, 1))}[format.granularity]
    x = x * 128 if name.startswith("E5") else x
    values = np.asarray(pa.quantize(x, format, scale).values, np.float32).ravel()
    np.testing.assert_array_equal(values, np.array([1, 1, 1, 1, -1, -1, 0, 0], np.float32) * format.qmax)


def test_int8_rounds_half_away_from_zero():
    x = jnp.array([[0.5, -0.5, 1.5, -2.5, 126.5, 300.0, -300.0, 0.49]])
    got = pa.quantize(x, pa.INT8_TOKEN_HEAD, jnp.ones(1))
    assert np.asarray(got.values).tolist() == [[1, -1, 2, -3, 127, 127, -128, 0]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_rounds_once(dtype, rng):
    """A product in float32 and one rounding: never back through FP8 (the bug of vLLM #39122)."""
    x = pa.quantize(jnp.asarray(rng.standard_normal((6, 4, 32)), jnp.float32), pa.E4M3_TENSOR, jnp.float32(0.37))
    want = (np.asarray(x.values, np.float32) * np.float32(0.37)).astype(dtype)
    got = pa.dequantize(x, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("name", ["E4M3_TENSOR", "E4M3_HEAD", "E4M3_TOKEN_HEAD", "INT8_TOKEN_HEAD"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fake_quantize(name, dtype, rng):
    format = getattr(pa, name)
    x = jnp.asarray(rng.standard_normal((5, 3, 32)), dtype)
    got, pull = jax.vjp(lambda x: pa.fake_quantize(x, format), x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(pa.dequantize(pa.quantize(x, format), dtype)))
    g = jnp.asarray(rng.standard_normal(x.shape), dtype)
    np.testing.assert_array_equal(np.asarray(pull(g)[0]), np.asarray(g))  # straight through


def test_fake_quantize_under_jit_is_not_simplified_away(rng):
    x = jnp.asarray(rng.standard_normal((8, 64)), jnp.float32)
    fake = jax.jit(lambda x: pa.fake_quantize(x, pa.E4M3_TENSOR, jnp.float32(0.5)))(x)
    np.testing.assert_array_equal(np.asarray(fake), np.asarray(pa.fake_quantize(x, pa.E4M3_TENSOR, jnp.float32(0.5))))
    assert np.asarray(fake != x).mean() > 0.9


def test_quantized_is_a_pytree(rng):
    x = pa.quantize(jnp.asarray(rng.standard_normal((4, 64)), jnp.float32), pa.E4M3_TENSOR)
    assert len(jax.tree.leaves(x)) == 2
    assert jax.tree.map(lambda a: a, x).format is pa.E4M3_TENSOR
