"""The fusion pass: what it finds, in which bodies, what it leaves alone and why, and that results stay the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_attention
from problems import make
from toy_attention import toy_attention as toy

import pallas_attn as pa
from pallas_attn import fusion
from pallas_attn.fusion.chain import call_of
from pallas_attn.runtime.dispatch import OPS

LENS = {"q_lens": (1, 3), "kv_lens": (9, 20), "heads": (2, 1), "dim": 128, "spare_seqs": 0, "spare_tokens": 1}
STATIC, GROUP = (pa.E4M3_STATIC, jnp.float32(0.01)), pa.e4m3_group(64)
PACKED = pa.e4m3_group(128, ue8m0=True, order="tma", packed=True)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def call(rng):
    """(q, cache, batch): five tokens, two heads of 128."""
    return make(rng, "F32", **LENS).clean().arguments()


def attend(q, cache, batch, **keywords):
    return pa.paged_attention(q, cache, batch, backend="reference", **keywords)  # which compiles in half the time


def rows(x):
    return x.reshape(x.shape[0], -1)


def step(q, cache, batch):
    """What is fused in most tests."""
    return pa.quantize(rows(attend(q, cache, batch)), GROUP)


def ops(jaxpr):
    """Names of the calls in a jaxpr, bodies included."""
    for eqn in jaxpr.eqns:
        op = call_of(eqn)
        if op is not None:
            yield f"{op.op} {getattr(op.problem, 'out_format', None) or ''}".strip()
        else:
            for _, body in fusion.chain.bodies(eqn):
                yield from ops(body.jaxpr)


def ops_of(fn, *args):
    return list(ops(jax.make_jaxpr(fn)(*args).jaxpr))


def assert_same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_array_equal(np.asarray(g), np.asarray(w), strict=True), got, want)


# ---------------------------------------------------------------- what is fused

KINDS = {
    "static": lambda q, *kv: pa.quantize(attend(q, *kv), *STATIC),
    "static, reshaped twice": lambda q, *kv: pa.quantize(rows(attend(q, *kv)).reshape(-1, 64), *STATIC),
    "E5M2": lambda q, *kv: pa.quantize(attend(q, *kv), pa.E5M2_TENSOR, 0.01),
    "group": step,
    "group of heads": lambda q, *kv: pa.quantize(attend(q, *kv), GROUP),
    "columns": lambda q, *kv: pa.quantize(rows(attend(q, *kv)), pa.e4m3_group(128, order="column")),
    "packed": lambda q, *kv: pa.quantize(rows(attend(q, *kv)), PACKED),
    "NVFP4": lambda q, *kv: pa.quantize(rows(attend(q, *kv)), pa.NVFP4, 0.001),
    "float32 in between": lambda q, *kv: pa.quantize(attend(q, *kv).astype(jnp.float32).reshape(-1), *STATIC),
    "LSE": lambda q, *kv: (lambda out, lse: (pa.quantize(out, *STATIC), lse * 2))(*attend(q, *kv, return_lse=True)),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, call):
    fn = KINDS[name]
    report = fusion.report(fn, *call)
    assert (len(report.hits), report.misses) == (1, ()), report
    assert ops_of(pa.fuse(fn), *call) == [f"paged_attention {report.hits[0].format}"]
    if name in ("group", "packed", "NVFP4", "float32 in between", "LSE"):
        assert_same(jit(pa.fuse(fn))(*call), jit(fn)(*call))
    else:  # compiling is what takes time
        assert jax.eval_shape(pa.fuse(fn), *call) == jax.eval_shape(fn, *call)


@pytest.mark.parametrize("format", [pa.E4M3_STATIC, GROUP])
def test_a_narrower_result_is_rounded_once(format, call):
    """Attention rounds to bf16 where it stands alone: fused, a value is at most one step of the format away."""
    given = STATIC[1:] if format is pa.E4M3_STATIC else ()
    fn = lambda q, *kv: pa.quantize(rows(attend(q, *kv, out=jnp.bfloat16)), format, *given)  # noqa: E731
    got, want = jit(pa.fuse(fn))(*call), jit(fn)(*call)
    x, y = (np.asarray(pa.dequantize(z), np.float64) for z in (got, want))
    step = 2.0**-3 * np.maximum(np.abs(x), np.abs(y)) + 2.0**-9 * (0.01 if given else np.abs(y).max() / 448)
    assert np.all(np.abs(x - y) <= step)
    exact = np.asarray(rows(jit(attend)(*call)), np.float64)
    assert np.linalg.norm(x - exact) <= np.linalg.norm(y - exact) * 1.01


def small(x):
    """The same with the toy, which compiles fast."""
    return pa.quantize(rows(toy(x)), GROUP)


def in_scan(x):
    return jax.lax.scan(lambda carry, _: (carry * 0.5, small(carry)), x, None, length=2)


def in_while(x):
    more = lambda state: (state[0] + 1, *jax.tree.leaves(small(x * state[0])))  # noqa: E731
    return jax.lax.while_loop(lambda state: state[0] < 2, more, (0, *jax.tree.leaves(small(x))))


def in_cond(x):
    return jax.lax.cond(x[0, 0, 0] < 9, small, lambda x: small(2 * x), x)


def in_shard_map(x):
    mesh, spec = jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec("x")
    return jax.shard_map(small, mesh=mesh, in_specs=spec, out_specs=spec)(
        jax.device_put(x, jax.NamedSharding(mesh, spec))
    )


def in_custom_jvp(x):
    fn = jax.custom_jvp(lambda x: small(x).scale)
    fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[0].sum(-1)))
    return fn(x)


def in_custom_vjp(x):
    fn = jax.custom_vjp(lambda x: small(x).scale)
    fn.defvjp(lambda x: (fn(x), None), lambda _, g: (None,))
    return fn(x)


BODIES = {
    "jit": (jax.jit(small), "jit small"),
    "jit in jit": (jax.jit(lambda x: jax.jit(small)(x)), "jit <lambda> / jit small"),
    "scan": (in_scan, "scan"),
    "while": (in_while, "while", ""),
    "cond": (in_cond, "cond", "cond"),
    "remat": (jax.checkpoint(small), "remat2"),
    "shard_map": (in_shard_map, "shard_map"),
    "custom_jvp": (in_custom_jvp, "custom_jvp_call"),
    "custom_vjp": (in_custom_vjp, "custom_vjp_call"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name, toy_rules, rng):
    fn, *where = BODIES[name]
    x = jnp.asarray(rng.standard_normal((4, 2, 64)), jnp.float32)
    report = fusion.report(fn, x, rules=toy_rules)
    assert report.misses == ()
    assert sorted(f.where for f in report.hits) == sorted(where)
    assert ops_of(pa.fuse(fn, toy_rules), x) == ["toy_attention E4M3_GROUP64"] * len(where)
    assert_same(jax.jit(pa.fuse(fn, toy_rules))(x), jax.jit(fn)(x))


def test_plain_jits_on_either_side_are_opened(toy_rules, rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 64)), jnp.float32)
    quantize = jax.jit(lambda x: pa.quantize(rows(x), GROUP))
    fn = lambda x: quantize(jax.jit(lambda x: jax.jit(toy)(x))(x))  # noqa: E731
    assert len(fusion.report(fn, x, rules=toy_rules).hits) == 1
    assert ops_of(pa.fuse(fn, toy_rules), x) == ["toy_attention E4M3_GROUP64"]
    assert_same(jax.jit(pa.fuse(fn, toy_rules))(x), jax.jit(fn)(x))


def test_layers_are_fused_each_for_itself(call):
    def fn(q, *kv):
        first = pa.quantize(attend(q, *kv), *STATIC)
        second = attend(pa.dequantize(first), *kv)
        return pa.quantize(second, GROUP), second

    report = fusion.report(fn, *call)
    assert [f.format for f in report.hits] == ["E4M3_STATIC"]
    assert [f.reason for f in report.misses] == ["what it quantises is also a result of the function"]
    assert_same(jit(pa.fuse(fn))(*call), jit(fn)(*call))


def test_where_the_fused_call_goes(call):
    """Its scale has to be there, and nothing may need the LSE before."""

    def lse_first(q, *kv):
        scale = jnp.sum(q * q) * 1e-4
        out, lse = attend(q, *kv, return_lse=True)
        top = jnp.max(lse)
        return pa.quantize(out, pa.E4M3_STATIC, scale), top

    def scale_last(q, *kv):
        out, lse = attend(q, *kv, return_lse=True)
        return pa.quantize(out, pa.E4M3_STATIC, jnp.sum(q * q) * 1e-4), lse

    def scale_of_lse(q, *kv):
        out, lse = attend(q, *kv, return_lse=True)
        return pa.quantize(out, pa.E4M3_STATIC, jnp.exp(jnp.max(lse[:4]) - 9)), lse

    for fn in (lse_first, scale_last):
        assert len(fusion.report(fn, *call).hits) == 1
        assert_same(jit(pa.fuse(fn))(*call), jit(fn)(*call))
    assert fusion.report(scale_of_lse, *call).misses[0].reason == "its scale is made after the LSE is used"


# ---------------------------------------------------------------- what is not, and why


def quantize_and(more):
    """A function that does something else with the result as well."""

    def fn(q, *kv):
        out = attend(q, *kv)
        return pa.quantize(out, *STATIC), more(out)

    return fn


def by_hand(q, *kv):
    return jnp.clip(attend(q, *kv) / 0.01, -448, 448).astype(jnp.float8_e4m3fn)


def by_hand_in_a_jit(q, *kv):
    return jax.jit(lambda x: jnp.clip(x / 0.01, -448, 448).astype(jnp.float8_e5m2))(attend(q, *kv))


def donated(q, *kv):
    return pa.quantize(jax.jit(attend, donate_argnums=0)(q, *kv), *STATIC)


def donated_quantisation(q, *kv):
    return jax.jit(lambda x: pa.quantize(x, *STATIC), donate_argnums=0)(attend(q, *kv))


def chain(between, *how):
    return lambda q, *kv: pa.quantize(between(attend(q, *kv)), *how)


MISSES = {
    "a result too": (quantize_and(lambda x: x), "also a result"),
    "used twice": (quantize_and(jnp.sum), "used 2 times"),
    "arithmetic": (chain(lambda x: x * 2, *STATIC), "mul stands between"),
    "transposed": (chain(lambda x: rows(x.transpose(1, 0, 2)), *STATIC), "no up-projection|transpose"),
    "left transposed": (chain(lambda x: x.transpose(1, 0, 2), *STATIC), "axes are transposed: head, token, value"),
    "projected": (chain(lambda x: jnp.einsum("thc,hcd->thd", x, jnp.ones((2, 128, 64))), GROUP), "with an up-proj"),
    "another product": (chain(lambda x: rows(x) @ jnp.ones((256, 128)), GROUP), "no up-projection"),
    "float16": (chain(lambda x: x.astype(jnp.float16), *STATIC), "float16 in between"),
    "found tensor scale": (chain(rows, pa.E4M3_STATIC), "pass a known one"),
    "found NVFP4 scale": (chain(rows, pa.NVFP4), "pass a known one"),
    "given group scales": (chain(rows, GROUP, jnp.ones((5, 4))), "let it find them"),
    "per token and head": (chain(lambda x: x, pa.E4M3_TOKEN_HEAD), "per tensor or in groups"),
    "columns of heads": (chain(lambda x: x, pa.e4m3_group(64, order="column")), r"\[T, H \* DV\]"),
    "by hand": (by_hand, "written in jnp"),
    "by hand in a jit": (by_hand_in_a_jit, "written in jnp"),
    "donated": (donated, "attention is inside of jit attend"),
    "donated quantisation": (donated_quantisation, "quantisation is inside of jit <lambda>"),
    "a backend that cannot": (
        lambda q, cache, batch: pa.quantize(
            rows(pa.paged_attention(q, cache, pa.RaggedBatch(batch.page_table, batch.kv_lens, batch.cu_q_lens,
                                                             max_q_len=1), out=jnp.bfloat16, backend="mosaic")), GROUP),
        "'mosaic' refuses: no E4M3_GROUP64 output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name, call):
    fn, reason = MISSES[name]
    if "backend" in name:
        call = make(np.random.default_rng(0), "BF16", **LENS | {"heads": (8, 1)}).clean().arguments()
    report = fusion.report(fn, *call)
    assert report.hits == ()
    assert len(report.misses) == 1, report
    assert re.search(reason, report.misses[0].reason), report
    assert str(report).startswith("not fused: paged_attention + ")
    assert ops_of(pa.fuse(fn), *call) == ops_of(fn, *call)


UNRELATED = {
    "another input": lambda q, *kv: (attend(q, *kv), pa.quantize(q, *STATIC)),
    "the LSE": lambda q, *kv: pa.quantize(attend(q, *kv, return_lse=True)[1], *STATIC),
    "only the scale": lambda q, *kv: pa.quantize(q, pa.E4M3_STATIC, jnp.max(jnp.abs(attend(q, *kv)))),
    "nothing quantised": attend,
}


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated(name, call):
    assert fusion.report(UNRELATED[name], *call) == fusion.Report()
    assert str(fusion.Report()) == "no quantisation of an attention's result"


def test_no_slower_backend_for_a_fusion(call, monkeypatch):
    """On a GPU whose kernel takes the attention but no groups, the attention stays with the kernel."""
    arguments = make(np.random.default_rng(0), "BF16", **LENS | {"q_lens": (1, 1), "heads": (8, 1), "spare_tokens": 0})
    q, cache, batch = arguments.clean().arguments(max_q_len=1)
    fn = lambda q, how: pa.quantize(rows(pa.paged_attention(q, cache, batch, out=jnp.bfloat16)), *how)  # noqa: E731
    grouped, static = (functools.partial(fn, how=how) for how in ((GROUP,), STATIC))
    assert len(fusion.report(grouped, q).hits) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (miss,) = fusion.report(grouped, q).misses
    assert "'mosaic', which runs the attention, refuses: no E4M3_GROUP64 output" in miss.reason
    assert len(fusion.report(static, q).hits) == 1


# ---------------------------------------------------------------- rules


def test_rules_are_values(call):
    only_static = (fusion.Rule("paged_attention", kinds=("static",)),)
    assert "no rule fuses paged_attention with group formats" in str(fusion.report(step, *call, rules=only_static))
    assert fusion.report(step, *call, rules=()) == fusion.Report()
    assert fusion.report(step, *call, rules=(fusion.Rule("an op that is not there"),)) == fusion.Report()
    assert ops_of(pa.fuse(step, ()), *call) == ops_of(step, *call)


@pytest.fixture
def toy_rules(monkeypatch):
    monkeypatch.setitem(OPS, "toy_attention", toy_attention.OP)
    return fusion.Rule("toy_attention"), fusion.Rule("toy_attention", up_projection=True)


PROJECTIONS = {
    "plain": lambda x, w: jnp.einsum("thc,hcd->thd", x, w),
    "w first": lambda x, w: jnp.einsum("hcd,thc->thd", w, x),
    "w transposed": lambda x, w: jnp.einsum("thc,dch->thd", x, w.transpose(2, 1, 0)),
    "heads first": lambda x, w: jnp.einsum("thc,hcd->htd", x, w).transpose(1, 0, 2),
    "dot_general": lambda x, w: jax.lax.dot_general(x, w, (((2,), (1,)), ((1,), (0,)))).transpose(1, 0, 2),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_up_projection(name, toy_rules, rng):
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 2, 32), (2, 32, 128)))
    project = PROJECTIONS[name]
    fn = lambda x, w: pa.quantize(rows(project(toy(x), w)), pa.e4m3_group(128))  # noqa: E731
    assert len(fusion.report(fn, x, w, rules=toy_rules).hits) == 1
    fused = pa.fuse(fn, toy_rules)
    assert ops_of(fused, x, w) == ["toy_attention E4M3_GROUP128"]
    got, want = (np.asarray(pa.dequantize(f(x, w))) for f in (fused, fn))
    np.testing.assert_allclose(got, want, rtol=0.13, atol=1e-3)
    (miss,) = fusion.report(fn, x, w, rules=toy_rules[:1]).misses
    assert "with an up-projection" in miss.reason


def test_projections_that_are_none(toy_rules, rng):
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 4, 32), (4, 32, 128)))
    for spec in ("thc,tcd->thd", "thc,hcd->dth"):
        fn = lambda x, w, spec=spec: pa.quantize(rows(jnp.einsum(spec, toy(x), w)), *STATIC)  # noqa: E731
        assert fusion.report(fn, x, w, rules=toy_rules).hits == ()
    twice = lambda x, w: pa.quantize(PROJECTIONS["plain"](PROJECTIONS["plain"](toy(x), w), w.mT), *STATIC)  # noqa: E731
    assert fusion.report(twice, x, w, rules=toy_rules).hits == ()


# ---------------------------------------------------------------- transformations


def test_grad_is_that_of_the_function_as_written(call):
    q, cache, batch = call

    def loss(scale, q, cache):
        out, lse = attend(q * scale, cache, batch, return_lse=True)
        return jnp.sum(jnp.sin(pa.dequantize(pa.quantize(out, *STATIC)))) + jnp.sum(jnp.where(lse > -99, lse, 0))

    assert len(fusion.report(loss, 0.3, q, cache).hits) == 1
    grads = [jit(jax.value_and_grad(f, (0, 1, 2)))(jnp.float32(0.3), q, cache) for f in (loss, pa.fuse(loss))]
    assert_same(*grads)
    assert np.any(np.asarray(grads[1][1][1]) != 0)


def test_grad_of_what_is_closed_over(toy_rules, rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 64)), jnp.float32)
    fuse = functools.partial(pa.fuse, rules=toy_rules)

    def loss(s, fuse):
        fn = lambda x: pa.quantize(toy(x * s), *STATIC)  # noqa: E731
        assert len(fusion.report(fn, x, rules=toy_rules).hits) == 1
        return jnp.sum(pa.dequantize(fuse(fn)(x)))

    got, want = (jax.jit(jax.grad(functools.partial(loss, fuse=f)))(0.3) for f in (fuse, lambda fn: fn))
    assert_same(got, want)
    assert got != 0


def test_fusing_a_gradient_changes_nothing(toy_rules, rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 64)), jnp.float32)
    grad = jax.grad(lambda x: jnp.sum(pa.dequantize(small(x))))
    assert_same(jax.jit(pa.fuse(grad, toy_rules))(x), jax.jit(grad)(x))


def test_vmap(call):
    q, cache, batch = call
    fn = lambda q: step(q, cache, batch)  # noqa: E731
    queries = jnp.stack([q, -q])
    assert_same(jit(jax.vmap(pa.fuse(fn)))(queries), jit(jax.vmap(fn))(queries))


def test_results_keep_their_tree(toy_rules, rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 64)), jnp.float32)
    fn = lambda *, x, more: {"out": small(x), "more": [more, None]}  # noqa: E731
    arguments = {"x": x, "more": (jnp.asarray(1), jnp.ones(2))}
    got = pa.fuse(fn, toy_rules)(**arguments)
    assert_same(got, fn(**arguments))
    assert got["out"].format == GROUP
