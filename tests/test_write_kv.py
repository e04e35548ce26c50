"""write_kv: every format and layout byte for byte, dropped slots, saturation, and buffers really reused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import FORMATS, LAYOUTS, library_cache, scales_for

import pallas_attn as pa

WRITABLE = [f for f in FORMATS if "SEQ" not in f]
N, S, K, D = 5, 16, 2, 32
# Two real slots at the very ends, three negative ones and two beyond the cache; -1 must not write the last row.
SLOTS = np.array([0, 17, -1, 33, N * S - 1, -N * S, 40, N * S, 2**31 - 1, -(2**31), 16], np.int32)


def bytes_of(x):
    return np.atleast_1d(x).view(np.uint8)


def before(rng, format):
    """Logical (k, v, k_scale, v_scale) of random bytes, so that a changed neighbour is seen."""
    dtype, granularity = FORMATS[format]
    k, v = (rng.integers(0, 124, (N, S, K, D * np.dtype(dtype).itemsize), np.uint8).view(dtype) for _ in range(2))
    if granularity == "token_head":
        return k, v, *(rng.uniform(1, 2, (N, S, K)).astype(np.float32) for _ in range(2))
    return k, v, *(scales_for(granularity, base, (1, K), rng) for base in (0.5, 0.25))


def rows(rng, dtype=np.float32):
    """Keys and values [T', K, D], T' > T; some saturate FP8 and one row is zero."""
    k, v = (rng.standard_normal((len(SLOTS) + 2, K, D)).astype(np.float32) for _ in range(2))
    k[0, 0, 0], v[1, 1, 3], k[3, 1] = 1e6, -1e6, 0
    return k.astype(dtype), v.astype(dtype)


def written(pages, scale, x, format):
    """(pages, scale) after the oracle's write."""
    codes, found = oracle.quantise(x[: len(SLOTS)], *FORMATS[format], scale)
    per_token = FORMATS[format][1] == "token_head"
    return oracle.write(pages, codes, SLOTS), oracle.write(scale, found, SLOTS) if per_token else scale


def check(got, k, v, k_scale, v_scale, format, layout):
    want = library_cache(k, v, k_scale, v_scale, format, layout)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(bytes_of(x), bytes_of(y))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", WRITABLE)
def test_bytes(format, layout, backend, rng):
    k, v, k_scale, v_scale = before(rng, format)
    new_k, new_v = rows(rng, oracle.BF16)
    cache = library_cache(k, v, k_scale, v_scale, format, layout)
    write = jax.jit(functools.partial(pa.write_kv, backend=backend))
    got = write(cache, jnp.asarray(new_k), jnp.asarray(new_v), jnp.asarray(SLOTS))
    (k, k_scale), (v, v_scale) = written(k, k_scale, new_k, format), written(v, v_scale, new_v, format)
    check(got, k, v, k_scale, v_scale, format, layout)
    if "INT8" not in format and format not in ("BF16", "F16", "F32"):
        assert np.isfinite(np.asarray(jax.tree.leaves(got.k)[0], np.float32)).all()


@pytest.mark.parametrize("format", WRITABLE)
def test_float32_rows_without_jit(format, backend, rng):
    k, v, k_scale, v_scale = before(rng, format)
    new_k, new_v = (np.clip(x, -6e4, 6e4) for x in rows(rng))  # float16 keeps them finite
    cache = library_cache(k, v, k_scale, v_scale, format, "NHD")
    got = pa.write_kv(cache, jnp.asarray(new_k), jnp.asarray(new_v), jnp.asarray(SLOTS), backend=backend)
    (k, k_scale), (v, v_scale) = written(k, k_scale, new_k, format), written(v, v_scale, new_v, format)
    check(got, k, v, k_scale, v_scale, format, "NHD")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slot_minus_one_does_not_write_the_last_row(layout, backend):
    """`x.at[-1].set(.., mode="drop")` would."""
    cache = pa.PagedKVCache.allocate(3, 16, 1, 16, format=pa.F32, layout=getattr(pa, layout))
    ones = jnp.ones((2, 1, 16))
    got = pa.write_kv(cache, ones, ones, jnp.array([-1, -48], jnp.int32), backend=backend)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


def test_value_head_dim_of_its_own(backend, rng):
    cache = pa.PagedKVCache.allocate(N, S, K, 48, v_head_dim=32, format=pa.BF16)
    k, v = (rng.standard_normal((len(SLOTS), K, d)).astype(oracle.BF16) for d in (48, 32))
    got = pa.write_kv(cache, jnp.asarray(k), jnp.asarray(v), jnp.asarray(SLOTS), backend=backend)
    for x, rows, d in ((got.k, k, 48), (got.v, v, 32)):
        want = oracle.write(np.zeros((N, S, K, d), oracle.BF16), rows, SLOTS)
        np.testing.assert_array_equal(bytes_of(x), bytes_of(want))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_then_read_back(layout, backend, rng):
    """slot_mapping sends this step's tokens where paged_attention looks for them."""
    lens, per_sequence = np.array([20, 3], np.int32), np.array([0, 20, 23, 23], np.int32)
    batch = pa.RaggedBatch(
        jnp.array([[4, 1], [2, 0], [3, 3]], jnp.int32), jnp.array([*lens, 9]), jnp.asarray(per_sequence), jnp.int32(2)
    )
    slots = batch.slot_mapping(26, 16)
    want = [4 * 16 + i for i in range(16)] + [16 + i for i in range(4)] + [32, 33, 34] + [-1] * 3
    assert np.asarray(slots).tolist() == want
    rows = [jnp.asarray(rng.standard_normal((26, 1, 16)), jnp.float32) for _ in range(2)]
    cache = pa.PagedKVCache.allocate(5, 16, 1, 16, format=pa.F32, layout=getattr(pa, layout))
    cache = pa.write_kv(cache, *rows, slots, backend=backend)
    for got, x in zip(cache.read(jnp.array([4, 2])), rows, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[0], np.asarray(x)[:16])
        np.testing.assert_array_equal(np.asarray(got)[1, :3], np.asarray(x)[20:23])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR", "INT8_TOKEN_HEAD"])
def test_donated_buffers_are_reused(format, layout):
    """In place: same addresses, an alias, and no temporary of cache size in the compiled program.

    XLA's CPU backend has no scatter of FP8 and takes the whole array through f16: there only the addresses are held.
    """
    scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(0.25)} if "TENSOR" in format else {}
    cache = pa.PagedKVCache.allocate(64, 16, 2, 64, format=getattr(pa, format), layout=getattr(pa, layout), **scales)
    rows, slots = jnp.ones((8, 2, 64), jnp.bfloat16), jnp.arange(8, dtype=jnp.int32)
    write = jax.jit(functools.partial(pa.write_kv, backend="xla"), donate_argnums=0)
    program = write.lower(cache, rows, rows, slots).compile()
    assert "input_output_alias" in program.as_text()
    if not format.startswith("E"):
        assert program.memory_analysis().temp_size_in_bytes < cache.buffers[0].nbytes / 2
    before = {x.unsafe_buffer_pointer() for x in cache.buffers}
    scales_before = {x.unsafe_buffer_pointer() for x in cache.scales or () if x.ndim == 3}
    got = write(cache, rows, rows, slots)
    assert {x.unsafe_buffer_pointer() for x in got.buffers} == before
    assert {x.unsafe_buffer_pointer() for x in got.scales or () if x.ndim == 3} == scales_before
    assert all(x.is_deleted() for x in jax.tree.leaves(cache.k)[:1])


@pytest.mark.parametrize("format", ["E4M3_SEQ_HEAD", "E5M2_SEQ_HEAD"])
def test_sequence_scales_are_for_reading_only(format, rng):
    codes = np.zeros((N, S, K, D), FORMATS[format][0])
    scale = np.ones((3, K), np.float32)
    cache = library_cache(codes, codes, scale, scale, format, "NHD")
    with pytest.raises(pa.InvalidInput, match=format):
        pa.write_kv(cache, jnp.ones((2, K, D)), jnp.ones((2, K, D)), jnp.arange(2, dtype=jnp.int32))
