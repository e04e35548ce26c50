"""The bridge: what it infers, what it refuses, and that it runs a kernel that somebody brings."""

import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.core.arch import Arch
from pallas_attn.runtime import dispatch
from pallas_attn.runtime import triton as bridge

S = jax.ShapeDtypeStruct
HERE = importlib.util.find_spec("triton") is not None
INTERPRETED = HERE and os.environ.get("TRITON_INTERPRET") == "1"


def scaled_sum(kernel="triton_examples:scaled_sum", **changes):
    """x + 2 y by rows, as a user would write it down."""
    options = {
        "out": lambda x, y: S(x.shape, jnp.float32),
        "grid": lambda x, y, **constants: x.shape[0],
        "constants": lambda x, y: {"ROW": pa.strides(x)[0], "WIDTH": 64, "FACTOR": 2.0},
    }
    return pa.triton_op(kernel, **{**options, **changes})


X, Y = S((3, 40), jnp.float8_e4m3fn), S((3, 40), jnp.bfloat16)


def test_shapes_are_inferred_where_triton_is_missing():
    """A kernel named by its path is imported when it is lowered."""
    op = scaled_sum("nowhere:kernel")
    assert jax.eval_shape(op, X, Y) == S((3, 40), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.vmap(op))(*(S((2, *x.shape), x.dtype) for x in (X, Y)))
    assert [a.shape for a in jaxpr.out_avals] == [(2, 3, 40)]
    two = pa.triton_op("nowhere:kernel", out=[Y, X], grid=(1, 2))
    assert jax.eval_shape(two, X) == (Y, X)


def test_strides():
    assert pa.strides(S((2, 3, 4), jnp.int8)) == (12, 4, 1)
    assert pa.strides(S((), jnp.int8)) == ()


def kernel(*names):
    return types.SimpleNamespace(__name__="mine", arg_names=names)


REFUSED = {
    "grid": ({"grid": (3, 0)}, r"triton_op\(scaled_sum\) grid: got \(3, 0\); it is one to three positive ints"),
    "axes": ({"grid": (1, 1, 1, 1)}, "one to three positive ints"),
    "dtype": ({"out": S((1,), jnp.complex64)}, r"output 0: got complex64; Triton has bfloat16, .*: bitcast it"),
    "alias": ({"aliases": {0: 0}}, "aliases: got .* an output in place has its input's shape and dtype"),
    "alias of nothing": ({"aliases": {7: 0}}, r"got \{7: 0\}; there are 2 inputs and 1 outputs"),
    "no kernel": ({"kernel": len}, r"triton_op kernel: got builtin_function_or_method; pass a @triton.jit function"),
    "parameters": ({"kernel": kernel("x", "y", "out", "ROW", "WIDE", "FACTOR")}, "it takes x, y, out, ROW, WIDE"),
    "too few": ({"kernel": kernel("x", "y")}, "2 inputs, 1 outputs and constants FACTOR, ROW, WIDTH; it takes x, y"),
}


@pytest.mark.parametrize(("change", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, message):
    with pytest.raises(pa.InvalidInput, match=message):
        jax.eval_shape(scaled_sum(**change), X, Y)


def test_other_platforms_and_gradients_are_refused():
    x = jnp.ones((3, 40))
    with pytest.raises(pa.Unsupported, match=r"triton_op\(kernel\): Triton kernels run on NVIDIA GPUs only"):
        jax.jit(scaled_sum("nowhere:kernel")).trace(x, x).lower(lowering_platforms=("cpu",))
    with pytest.raises(pa.Unsupported, match=r"has no gradient: .* by jax\.custom_vjp"):
        jax.grad(lambda x: scaled_sum("nowhere:kernel")(x, x).sum())(x)


@pytest.fixture
def versions(monkeypatch):
    """Sets what is installed; empty is nothing."""

    def set(**found):
        def version(name):
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name.replace("-", "_")))
        dispatch.missing.cache_clear()

    yield set
    dispatch.missing.cache_clear()


MISSING = {
    "nothing": ({}, "jax-triton is not installed: pip install jax-triton==0.3.1 triton==3.6.0"),
    "no triton": ({"jax_triton": "0.3.1"}, "triton is not installed: pip install"),
    "another": ({"jax_triton": "0.3.1", "triton": "3.7.0"}, "triton 3.7.0 is installed, 3.6.0 is the version tested"),
}


@pytest.mark.parametrize(("found", "reason"), list(MISSING.values()), ids=list(MISSING))
def test_a_missing_package_is_told(found, reason, versions, monkeypatch):
    versions(**found)
    monkeypatch.setattr(dispatch, "present_arch", lambda: Arch.AMPERE)
    (backend,) = (b for b in dispatch.OPS["paged_attention"].backends if b.name == "triton")
    assert dispatch.here(backend, "cuda").startswith(reason)
    table = pa.support_table()
    assert table.off == {"triton": dispatch.missing(backend.needs)}
    assert f"triton is off here: {reason}" in str(table)
    x = jnp.ones((3, 40))
    with pytest.raises(pa.Unsupported, match="triton"):
        jax.jit(scaled_sum()).trace(x, x).lower(lowering_platforms=("cuda",))


def test_an_ampere_gpu_gets_triton(versions, monkeypatch):
    """With the packages there; without them the portable backend runs and says why."""
    cache = jax.eval_shape(lambda: pa.PagedKVCache.allocate(8, 16, 2, 64))
    batch = pa.RaggedBatch(S((2, 4), jnp.int32), S((2,), jnp.int32), S((3,), jnp.int32))
    op = dispatch.OPS["paged_attention"]
    problem, _ = op.prepare(S((4, 4, 64), jnp.bfloat16), cache, batch)
    monkeypatch.setattr(dispatch, "present_arch", lambda: Arch.AMPERE)
    versions(jax_triton="0.3.1", triton="3.6.0")
    with pytest.warns(pa.FallbackWarning, match="runs on 'triton' .* since mosaic: only on HOPPER"):
        assert dispatch.choose(op, problem, "cuda").name == "triton"
    versions()
    with pytest.warns(pa.FallbackWarning, match="runs on 'xla' .* triton: jax-triton is not installed"):
        assert dispatch.choose(op, problem, "cuda").name == "xla"


@pytest.mark.skipif(not INTERPRETED, reason="`make triton` runs it, with triton and TRITON_INTERPRET=1")
def test_interpreted(monkeypatch, rng):
    from triton_interpreter import interpret

    monkeypatch.setattr(bridge, "INTERPRET", interpret)
    run_both(rng, "triton_examples")


@pytest.mark.gpu
def test_on_gpu(rng):
    run_both(rng, "triton_examples")


def run_both(rng, module):
    x, y = (jnp.asarray(rng.standard_normal((2, 3, 40)), t) for t in (jnp.float8_e4m3fn, jnp.bfloat16))
    want = np.asarray(x, np.float32) + 2 * np.asarray(y, np.float32)
    sum = scaled_sum(f"{module}:scaled_sum")
    np.testing.assert_array_equal(sum(x[0], y[0]), want[0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(sum))(x, y), want)
    n = jnp.arange(8)
    add = pa.triton_op(f"{module}:add_one", out=lambda x: x, grid=1, constants={"N": 8}, aliases={0: 0})
    np.testing.assert_array_equal(jax.jit(add)(n), np.arange(1, 9))
    np.testing.assert_array_equal(n, np.arange(8))  # still used: a copy was written


@pytest.fixture
def saturated(tmp_path, monkeypatch):
    """The kernel that a notebook brings, by its path."""
    notebook = Path(__file__).parent.parent / "notebooks/03_gather_and_triton.py"
    (source,) = re.findall(r"KERNEL = \'\'\'(.*?)\'\'\'", notebook.read_text(), re.DOTALL)
    (tmp_path / "my_kernels.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
    return pa.triton_op(
        "my_kernels:saturated", out=S((5,), jnp.int32), grid=5, constants={"SIZE": 16 * 2 * 40, "BLOCK": 512}
    )


@pytest.mark.skipif(not INTERPRETED, reason="`make triton` runs it, with triton and TRITON_INTERPRET=1")
def test_interpreted_kernel_of_the_notebook(saturated, monkeypatch, rng):
    """Gives what the notebook has on record: a matter of arithmetic."""
    from triton_interpreter import interpret

    monkeypatch.setattr(bridge, "INTERPRET", interpret)
    codes = rng.choice(np.array([0x7E, 0xFE, 0x7F, 0x7D, 0x00, 0xFD], np.uint8), (5, 16, 2, 40))
    want = np.sum(np.abs(codes.view(jnp.float8_e4m3fn).astype(np.float32)) == 448, axis=(1, 2, 3))
    np.testing.assert_array_equal(saturated(jnp.asarray(codes)), want)


@pytest.mark.skipif(not HERE or INTERPRETED, reason="`make triton` runs it, with triton")
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
def test_kernel_of_the_notebook_compiles_ahead_of_time(saturated, arch):
    ((launch, inputs),) = bridge.launches(jax.make_jaxpr(saturated)(S((5, 16, 2, 40), jnp.uint8)).jaxpr)
    assert bridge.compile_for(arch, launch, inputs).asm["cubin"]


@pytest.mark.gpu
def test_donated_input_is_written_in_place_on_gpu():
    add = pa.triton_op("triton_examples:add_one", out=lambda x: x, grid=1, constants={"N": 8}, aliases={0: 0})
    n = jnp.arange(8)
    where = n.unsafe_buffer_pointer()
    assert jax.jit(add, donate_argnums=0)(n).unsafe_buffer_pointer() == where


@pytest.mark.skipif(not HERE or INTERPRETED, reason="`make triton` runs it, with triton")
@pytest.mark.parametrize("arch", bridge.ARCHS, ids=lambda a: a.sm)
def test_compiles_ahead_of_time(arch):
    y = S((3, 40), jnp.bfloat16)
    ((launch, inputs),) = bridge.launches(jax.make_jaxpr(scaled_sum())(y, y).jaxpr)
    assert f".target {arch.sm}" in bridge.compile_for(arch, launch, inputs).asm["ptx"]
