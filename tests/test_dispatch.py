"""Choosing a backend: declared, explained, never silent."""

import dataclasses
import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import pallas_attn as pa
from pallas_attn.core.arch import Arch, arch_of
from pallas_attn.runtime import dispatch
from pallas_attn.runtime.dispatch import Backend, Elsewhere, Op


def problem():
    cache = pa.PagedKVCache.allocate(8, 16, 2, 64, format=pa.E4M3_TENSOR, k_scale=0.5, v_scale=0.25)
    batch = pa.RaggedBatch(jnp.arange(8, dtype=jnp.int32).reshape(2, 4), jnp.array([20, 40]), jnp.array([0, 3, 4]))
    return jax.random.normal(jax.random.key(0), (4, 4, 64)), cache, batch


@pytest.fixture
def fake():
    """An op with a fast backend that refuses odd problems and a slow one that takes all but 7."""
    fast = types.SimpleNamespace(supports=lambda p: Elsewhere("it is 9") if p == 9 else "it is odd" if p % 2 else None)
    slow = types.SimpleNamespace(supports=lambda p: "it is seven" if p == 7 else None)
    sys.modules |= {"fake_fast": fast, "fake_slow": slow}
    backends = (Backend("fast", "fake_fast"), Backend("slow", "fake_slow", cost="ten times slower"))
    yield Op("fake", lambda x: (x, ()), lambda p: (), backends, vjp="")
    dispatch._warn_once.cache_clear()
    del sys.modules["fake_fast"], sys.modules["fake_slow"]


def test_the_first_that_supports_runs(fake):
    assert dispatch.choose(fake, 2, "cpu").name == "fast"


def test_falling_back_says_so_once(fake):
    with pytest.warns(pa.FallbackWarning, match=r"fake runs on 'slow' \(ten times slower\), since fast: it is odd"):
        assert dispatch.choose(fake, 3, "cpu").name == "slow"
    assert dispatch.choose(fake, 3, "cpu").name == "slow"  # a second warning would be an error


def test_strict_refuses_to_fall_back(fake):
    with pytest.raises(pa.Unsupported, match=r"it is odd; pa\.strict\(\) forbids that"):
        dispatch.choose(fake, 3, "cpu", strict=True)


def test_what_a_backend_was_not_made_for_is_no_fallback(fake):
    assert dispatch.choose(fake, 9, "cpu", strict=True).name == "slow"  # a warning would be an error


def test_nobody_left_names_every_reason(fake):
    with pytest.raises(pa.Unsupported, match="fast: it is odd; slow: it is seven"):
        dispatch.choose(fake, 7, "cpu")


def test_a_named_backend_must_exist_and_agree(fake):
    with pytest.raises(pa.InvalidInput, match=r"backend: got 'quick'; fake has fast, slow"):
        dispatch.named(fake, 2, "quick")
    with pytest.raises(pa.Unsupported, match="backend 'fast' refuses: it is odd"):
        dispatch.named(fake, 3, "fast")


def test_a_backend_of_another_machine_is_refused():
    cache = pa.PagedKVCache.allocate(8, 16, 2, 128, format=pa.E4M3_TENSOR, k_scale=0.5, v_scale=0.25)
    batch = dataclasses.replace(problem()[2], max_q_len=1, cu_q_lens=jnp.array([0, 1, 2]))
    with pytest.raises(pa.InvalidInput, match="does not run on this machine: not on cpu"):
        pa.paged_attention(jnp.zeros((2, 4, 128)), cache, batch, backend="mosaic")


def test_an_older_gpu_is_told(monkeypatch):
    backend = Backend("fast", "fake_fast", ("cuda",), (Arch.HOPPER,))
    monkeypatch.setattr(dispatch, "present_arch", lambda: Arch.AMPERE)
    assert dispatch.here(backend, "cuda") == "only on HOPPER"
    monkeypatch.setattr(dispatch, "present_arch", lambda: None)  # lowering ahead of time, no GPU in sight
    assert dispatch.here(backend, "cuda") is None


def traced_backend(**kwargs):
    return str(jax.make_jaxpr(lambda *xs: pa.paged_attention(*xs, **kwargs))(*problem()))


def test_use_backend_and_the_argument():
    assert "paged_attention[auto]" in traced_backend()
    assert "paged_attention[reference]" in traced_backend(backend="reference")
    with pa.use_backend("reference"):
        assert "paged_attention[reference]" in traced_backend()
        assert "paged_attention[xla]" in traced_backend(backend="xla")
    with pytest.raises(pa.InvalidInput, match="backend"), pa.use_backend("cudnn"):
        pass


def test_a_policy_is_part_of_the_jit_cache_key():
    traces = []

    @jax.jit
    def f(*xs):
        traces.append(dispatch.policy())
        return pa.paged_attention(*xs)

    args = problem()
    f(*args), f(*args)
    with pa.use_backend("reference"):
        f(*args), f(*args)
    with pa.strict():
        f(*args)
    assert traces == [(None, False), ("reference", False), (None, True)]


def test_explain_needs_no_run():
    args = problem()
    elsewhere = {"mosaic": "not on cpu", "triton": "not on cpu"}
    assert pa.explain(pa.paged_attention, *args) == elsewhere | {"xla": "chosen", "reference": "supported"}
    named = pa.explain("paged_attention", *args, backend="reference")
    assert named == elsewhere | {"xla": "supported", "reference": "chosen"}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    assert pa.explain(pa.paged_attention, *abstract)["xla"] == "chosen"
    partial = functools.partial(pa.gather_kv, args[1], max_tokens=60)
    assert pa.explain(partial, args[2], backend="xla") == elsewhere | {"xla": "chosen", "reference": "supported"}
    with pytest.raises(pa.InvalidInput, match="op"):
        pa.explain("flash", *args)


def test_support_table_covers_every_format_layout_and_option():
    rows = {(r.op, r.dimension, r.case) for r in pa.support_table()}
    for format in pa.KV_FORMATS:
        assert ("paged_attention", "mixed, format", format.name) in rows
        assert ("paged_attention", "decode, format", format.name) in rows
        assert (("write_kv", "format", format.name) in rows) == (format.granularity != "seq_head")
        assert ("gather_kv", "format", format.name) in rows
    for op in ("write_kv", "gather_kv"):
        assert {c for o, d, c in rows if (o, d) == (op, "layout")} == {layout.name for layout in pa.LAYOUTS}


def test_main_prints_the_table():
    run = subprocess.run([sys.executable, "-W", "error", "-m", "pallas_attn"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(pa.support_table()) in run.stdout


@pytest.mark.parametrize(("capability", "arch"), [("8.0", 80), ("8.6", 80), ("8.9", 89), ("9.0", 90), ("7.5", None)])
def test_arch_of(capability, arch):
    assert arch_of(capability) == arch
    assert arch is None or Arch(arch).has_fp8 == (arch >= 89)
    assert arch is None or Arch(arch).sm == f"sm_{arch}"


def test_memory_does_not_grow_with_tokens_times_context():
    """4096 query tokens over 32k context at 8 heads: the logits alone would be 4 GiB in float32."""
    cache = jax.eval_shape(
        lambda: pa.PagedKVCache.allocate(512, 64, 8, 128, format=pa.E4M3_TENSOR, k_scale=0.5, v_scale=0.25)
    )
    i32 = jnp.int32
    batch = pa.RaggedBatch(*(jax.ShapeDtypeStruct(s, i32) for s in ((1, 512), (1,), (2,))))
    q = jax.ShapeDtypeStruct((4096, 8, 128), jnp.bfloat16)
    memory = jax.jit(pa.paged_attention).lower(q, cache, batch).compile().memory_analysis()
    assert memory is not None
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert used < 0.5 * 2**30
