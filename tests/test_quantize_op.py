"""pa.quantize as an op: scales of groups in every order, NVFP4, both backends, and how it transforms."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, PartitionSpec

import pallas_attn as pa
from pallas_attn.core import quantized
from pallas_attn.core.formats import GROUP_FORMATS
from pallas_attn.ops.quantize_output.cases import DYNAMIC, STATIC

BY_NAME = {f.name: f for f in DYNAMIC}
F4 = ml_dtypes.float4_e2m1fn
strict_equal = functools.partial(np.testing.assert_array_equal, strict=True)


def numbers(rng, *shape):
    """float32 of many magnitudes, a row of zeros among them."""
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 4, (*shape[:-1], 1))).astype(np.float32)
    x.reshape(-1, shape[-1])[0] = 0
    return x


def memory(format, scale):
    """float32 scales [.., M, G] as upstream's kernels would find them: by the address of each, in bytes."""
    *copies, rows, groups = scale.shape
    if format.order == "row":
        return scale
    high = -(-rows // 4) * 4 if format.order == "tma" else rows
    words = -(-groups // 4) if format.scale_type == "int32" else groups
    floor = oracle.per_group(np.zeros((1, format.group), np.float32), format.group, format.ue8m0)[1].item()
    buffer = np.zeros((*copies, words * high * 4), np.uint8)
    for m in range(high):
        for g in range(groups):
            s = scale[..., m, g] if m < rows else np.full(copies, floor, np.float32)
            if format.scale_type == "int32":
                buffer[..., 4 * ((g // 4) * high + m) + g % 4] = np.frexp(s)[1] - 1 + 127
            else:
                at = 4 * (m + g * high)
                buffer[..., at : at + 4] = np.ascontiguousarray(s)[..., None].view(np.uint8)
    return buffer.view(np.int32 if format.scale_type == "int32" else np.float32).reshape(*copies, words, high)


PACKED = pa.e4m3_group(64, ue8m0=True, order="tma", packed=True)


GROUPS = [(f, (2, 5, 384), "xla") for f in GROUP_FORMATS]
GROUPS += [(f, (2, 5, 384), "reference") for f in GROUP_FORMATS if f.group == 128]
GROUPS += [(PACKED, (4, 256), "xla"), (PACKED, (4, 256), "reference")]


@pytest.mark.parametrize(("format", "shape", "backend"), GROUPS, indirect=["backend"], ids=str)
def test_groups(format, shape, backend, rng):
    """Values, scales in memory, the way back, and the same values for the scales when they are given."""
    x = numbers(rng, *shape)
    codes, scale = oracle.per_group(x, format.group, format.ue8m0)
    got = jax.jit(lambda x: pa.quantize(x, format, backend=backend))(x)
    strict_equal(np.asarray(got.values), codes)
    strict_equal(np.asarray(got.scale), memory(format, scale))
    strict_equal(np.asarray(pa.dequantize(got)), codes.astype(np.float32) * scale.repeat(format.group, -1))
    again = pa.quantize(jnp.asarray(x), format, got.scale, backend=backend)
    strict_equal(np.asarray(again.values), codes)


def nvfp4(x, tensor=None):
    """(numbers of the codes, e4m3 blocks, float32 tensor) of float32 x."""
    one, sixth = np.float32(1), np.float32(1 / 6)
    amax = np.abs(x.reshape(*x.shape[:-1], -1, 16)).max(-1)
    ideal = amax * sixth
    tensor = max(ideal.max() * np.float32(1 / 448), np.float32(1e-12)) if tensor is None else np.float32(tensor)
    blocks = oracle.to_fp8(ideal * (one / tensor), oracle.E4M3)
    scale = blocks.astype(np.float32) * tensor
    inverse = np.divide(one, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(x * inverse.repeat(16, -1), -6, 6).astype(F4), blocks, tensor


def halves(codes):
    """Codes [.., D] two to a byte, the even one below."""
    codes = codes.view(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("tensor", [None, 0.003, 30.0])
def test_nvfp4(tensor, jit, backend, rng):
    x = numbers(rng, 9, 3, 64)
    codes, blocks, total = nvfp4(x, tensor)
    quantize = functools.partial(pa.quantize, format=pa.NVFP4, scale=tensor, backend=backend)
    got = (jax.jit(quantize) if jit else quantize)(jnp.asarray(x))
    assert got.shape == x.shape
    strict_equal(np.asarray(got.values), halves(codes))
    strict_equal(np.asarray(got.scale.blocks), blocks)
    strict_equal(np.asarray(got.scale.tensor), np.float32(total))
    scale = blocks.astype(np.float32) * total
    strict_equal(np.asarray(pa.dequantize(got)), codes.astype(np.float32) * scale.repeat(16, -1))


def test_nvfp4_ties_go_to_even_codes(backend):
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    near = [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(9)), middles * 0 + 6]
    x = np.concatenate([*near, -np.concatenate(near), np.zeros(8)]).astype(np.float32).reshape(-1, 16)
    x[:, 0] = 6  # so that a block's scale is one
    got = pa.quantize(jnp.asarray(x), pa.NVFP4, 1.0, backend=backend)
    strict_equal(np.asarray(got.scale.blocks, np.float32), np.ones((4, 1), np.float32))
    strict_equal(np.asarray(got.values), halves(x.astype(F4)))


@pytest.mark.parametrize("name", [n for n in BY_NAME if "GROUP" not in n])
def test_backends_agree(name, rng):
    """And so do eager and compiled calls, with bfloat16 as input."""
    x = jnp.asarray(numbers(rng, 5, 2, 128), jnp.bfloat16)
    want = pa.reference.quantize(x, BY_NAME[name])
    for got in (pa.quantize(x, BY_NAME[name]), jax.jit(lambda x: pa.quantize(x, BY_NAME[name]))(x)):
        jax.tree.map(lambda g, w: strict_equal(np.asarray(g), np.asarray(w)), got, want)


@pytest.mark.parametrize("name", [n for n in BY_NAME if "GROUP" not in n or "128_UE8M0" in n])
def test_vmap(name, rng):
    x = jnp.asarray(numbers(rng, 3, 2, 5, 128))
    got = jax.vmap(lambda x: pa.quantize(x, BY_NAME[name]), in_axes=1)(x)
    want = [pa.quantize(x[:, i], BY_NAME[name]) for i in range(2)]
    jax.tree.map(lambda g, *w: strict_equal(np.asarray(g), np.stack(w)), got, *want)


@pytest.mark.parametrize("format", STATIC, ids=str)
def test_vmap_of_known_scales(format, rng):
    x, scale = jnp.asarray(numbers(rng, 2, 5, 128)), jnp.array([0.3, 2.0])
    for over in ((0, 0), (None, 0), (0, None)):
        arguments = tuple(a if o == 0 else a[0] for a, o in zip((x, scale), over, strict=True))
        got = jax.vmap(lambda x, s: pa.quantize(x, format, s).values, over)(*arguments)
        pairs = zip(*(a if o == 0 else [a, a] for a, o in zip(arguments, over, strict=True)), strict=True)
        each = [pa.quantize(x, format, s) for x, s in pairs]
        strict_equal(np.asarray(got), np.stack([q.values for q in each]))


@pytest.mark.parametrize("name", ["E4M3_STATIC", "E4M3_GROUP128", "NVFP4"])
def test_derivatives_are_those_of_plain_jnp(name, rng):
    format, x = BY_NAME[name], jnp.asarray(rng.standard_normal((3, 128)), jnp.float32)
    given = jnp.float32(0.3) if name == "E4M3_STATIC" else None

    @functools.partial(jax.jit, static_argnums=1)
    def derivatives(x, quantize):
        back = lambda x: pa.dequantize(quantize(x, format, given))  # noqa: E731
        return jax.jvp(back, (x,), (jnp.cos(x),))[1], jax.grad(lambda x: jnp.sum(jnp.sin(back(x))))(x)

    got, want = derivatives(x, pa.quantize), derivatives(x, quantized.quantize)
    jax.tree.map(lambda g, w: strict_equal(np.asarray(g), np.asarray(w)), got, want)
    assert np.any(np.asarray(got[0]) != 0)


@pytest.mark.parametrize("name", ["E4M3_GROUP128_TMA", "NVFP4"])
def test_fake_quantize(name, rng):
    format, x = BY_NAME[name], jnp.asarray(rng.standard_normal((5, 128)), jnp.float32)
    got, pull = jax.vjp(lambda x: pa.fake_quantize(x, format), x)
    strict_equal(np.asarray(got), np.asarray(pa.dequantize(pa.quantize(x, format))))
    strict_equal(np.asarray(pull(x)[0]), np.asarray(x))


def test_shard_map(rng):
    """Results vary over the axes that x varies over: a loop may carry them, and nobody takes them for replicated."""
    x, format = jnp.asarray(numbers(rng, 4, 256)), pa.e4m3_group(128)
    mesh, spec = Mesh(np.array(jax.devices()[:1]), ("t",)), PartitionSpec("t")

    def body(x):
        return jax.lax.scan(lambda x, _: (pa.dequantize(pa.quantize(x, format)), None), x, None, length=2)[0]

    sharded = functools.partial(jax.shard_map, body, mesh=mesh, in_specs=spec)
    strict_equal(np.asarray(sharded(out_specs=spec)(x)), np.asarray(body(x)))
    with pytest.raises(ValueError, match="replication"):
        sharded(out_specs=PartitionSpec())(x)


def test_one_primitive():
    """What the fusion pass looks for."""
    jaxpr = jax.make_jaxpr(lambda x: pa.quantize(x, pa.e4m3_group(128)))(jnp.ones((4, 256)))
    assert [str(e.primitive) for e in jaxpr.eqns] == ["pallas_attn"]
    assert "quantize[auto]" in str(jaxpr)
    told = pa.explain(pa.quantize, jnp.ones((4, 256)), pa.NVFP4)
    assert told == {"mosaic": "not on cpu", "xla": "chosen", "reference": "supported"}


X = jnp.ones((4, 256))
REFUSED = {
    "group": (lambda: pa.e4m3_group(32), "group", "64 or 128"),
    "order": (lambda: pa.e4m3_group(64, order="diagonal"), "order", "row, column, tma"),
    "packed": (lambda: pa.e4m3_group(64, packed=True), "packed", "ue8m0=True"),
    "packed rows": (lambda: pa.e4m3_group(64, ue8m0=True, packed=True), "packed", 'order="tma"'),
    "one row": (lambda: pa.quantize(X[0], pa.e4m3_group(64, order="column")), "x", r"\[.., M, D\]"),
    "no row": (lambda: pa.quantize(X[0, 0], pa.e4m3_group(64)), "x", "multiple of 64"),
    "half a group": (lambda: pa.quantize(X[:, :200], pa.e4m3_group(64)), "x", "multiple of 64"),
    "half a block": (lambda: pa.quantize(X[:, :200], pa.NVFP4), "x", "multiple of 16"),
    "logical scale": (lambda: pa.quantize(X, pa.e4m3_group(64, order="tma"), X[:3, :4]), "scale", r"needs \(4, 4\)"),
    "block scales": (lambda: pa.quantize(X, pa.NVFP4, X[:, :16]), "scale", r"needs \(\)"),
    "negative scale": (lambda: pa.quantize(X, pa.NVFP4, -1.0), "scale", "positive"),
    "quantised": (lambda: pa.quantize(pa.quantize(X, pa.NVFP4), pa.NVFP4), "x", "pa.dequantize"),
    "FP8": (lambda: pa.quantize(X.astype(jnp.float8_e5m2), pa.NVFP4), "x", "pass floats"),
    "integers": (lambda: pa.quantize(jnp.arange(64), pa.NVFP4), "x", "pass floats"),
    "not a format": (lambda: pa.quantize(X, jnp.float8_e4m3fn), "format", "pa.Format"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    call, argument, fix = REFUSED[name]
    with pytest.raises(pa.InvalidInput, match=f"{argument}.*{fix}"):
        call()
