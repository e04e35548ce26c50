"""convert_layout: every pair of layouts bit for bit, in place where donated, and what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import FORMATS, LAYOUTS, library_cache, scales_for

import pallas_attn as pa
from pallas_attn.core import convert

N, S, K, D = 7, 32, 2, 32


def logical(rng, format, v_dim=D, pages=N):
    """(k, v, k_scale, v_scale), every byte random: NaN codes are to be kept too."""
    dtype, granularity = FORMATS[format]
    size = np.dtype(dtype).itemsize
    k, v = (rng.integers(0, 256, (pages, S, K, d * size), np.uint8).view(dtype) for d in (D, v_dim))
    if granularity == "token_head":
        return k, v, *(rng.uniform(1, 2, (pages, S, K)).astype(np.float32) for _ in range(2))
    return k, v, *(scales_for(granularity, base, (3, K), rng) for base in (0.5, 0.25))


def bits(x):
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.shape == y.shape
        np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["E4M3_TENSOR", "INT8_TOKEN_HEAD"])
def test_every_pair(format, layout, to, rng, monkeypatch):
    """Against the address formulas, in blocks of two pages of which the last has one."""
    x = logical(rng, format)
    cache, want = library_cache(*x, format, layout), library_cache(*x, format, to)
    monkeypatch.setattr(convert, "BLOCK", 2 * cache.nbytes // N)
    assert_same(jax.jit(lambda c: pa.convert_layout(c, getattr(pa, to)))(cache), want)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format, rng):
    x = logical(rng, format, v_dim=16)
    assert_same(pa.convert_layout(library_cache(*x, format, "HND"), pa.SHUFFLE), library_cache(*x, format, "SHUFFLE"))


@pytest.mark.parametrize(("layout", "to"), [("NHD", "HND"), ("HND", "SHUFFLE"), ("PACKED", "INTERLEAVED")])
@pytest.mark.parametrize("format", ["BF16", "E4M3_HEAD", "INT8_TOKEN_HEAD"])
def test_donated_buffers_are_converted_in_place(format, layout, to, rng, monkeypatch):
    """Same addresses, and no second cache besides."""
    x = logical(rng, format, pages=65)
    cache, want = library_cache(*x, format, layout), library_cache(*x, format, to)
    monkeypatch.setattr(convert, "BLOCK", 2 * cache.nbytes // 65)
    step = jax.jit(functools.partial(pa.convert_layout, layout=getattr(pa, to)), donate_argnums=0)
    program = step.lower(cache).compile()
    if format != "E4M3_HEAD":  # XLA's CPU backend takes FP8 through another array
        assert program.memory_analysis().temp_size_in_bytes < 0.3 * cache.buffers[0].nbytes
    before = {b.unsafe_buffer_pointer() for b in cache.buffers}
    got = step(cache)
    assert {b.unsafe_buffer_pointer() for b in got.buffers} == before
    assert_same(got, want)


def test_attention_sees_no_difference(rng):
    """Nor does a page table change."""
    k, v = (rng.standard_normal((N, S, K, D)).astype(np.float32) for _ in range(2))
    batch = pa.RaggedBatch(jnp.array([[3, 1], [6, 0]]), jnp.array([20, 9]), jnp.array([0, 2, 3]))
    q = jnp.asarray(rng.standard_normal((3, 4, D)), jnp.float32)
    cache = library_cache(k, v, None, None, "F32", "NHD")
    want = pa.paged_attention(q, cache, batch)
    got = pa.paged_attention(q, pa.convert_layout(cache, pa.SHUFFLE), batch)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_gradient_goes_back_where_it_came_from(rng, monkeypatch):
    k, v = (rng.standard_normal((N, S, K, D)).astype(np.float32) for _ in range(2))
    cache = library_cache(k, v, None, None, "F32", "NHD")
    monkeypatch.setattr(convert, "BLOCK", cache.nbytes // 3)
    grad = jax.jit(jax.grad(lambda c: jnp.sum(pa.convert_layout(c, pa.PACKED).pages ** 2) / 2))(cache)
    assert_same(grad, cache)


BAD = {
    "page size": ((10, D, D, "E4M3_TENSOR", "NHD", "SHUFFLE"), "page_size: got 10; SHUFFLE .* multiple of 16"),
    "head dim": ((16, 24, 24, "E4M3_TENSOR", "NHD", "SHUFFLE"), "head_dim: got 24; SHUFFLE .* multiple of 16"),
    "value head dim": ((16, 32, 24, "BF16", "HND", "SHUFFLE"), None),
    "one buffer": ((16, 32, 24, "BF16", "HND", "PACKED"), "layout: got PACKED; keys have 32 dims and values 24"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    (page, dim, v_dim, format, layout, to), message = BAD[name]
    x = [np.zeros((2, page, K, d), FORMATS[format][0]) for d in (dim, v_dim)]
    cache = library_cache(*x, np.float32(1), np.float32(1), format, layout)
    if message is None:
        assert oracle.can_hold(to, page, dim, v_dim, 2)
        assert pa.convert_layout(cache, getattr(pa, to)).v_head_dim == v_dim
        return
    with pytest.raises(pa.InvalidInput, match=message):
        pa.convert_layout(cache, getattr(pa, to))
