"""merge_attention: parts of a softmax put together exactly, empty ones harmless, differentiable."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa

T, H, X, D = 5, 3, 24, 8


def softmax(s, v, sinks=None):
    """(out [T, H, D], lse [T, H]) of logits [T, H, X] and values [X, H, D]."""
    top = s if sinks is None else jnp.concatenate([s, jnp.broadcast_to(sinks[:, None], (*s.shape[:2], 1))], -1)
    lse = jax.nn.logsumexp(top, axis=-1)
    return jnp.einsum("thx,xhd->thd", jnp.exp(s - lse[..., None]), v), lse


@pytest.fixture
def whole(rng):
    """(logits, values, sinks)."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return 3 * draw(T, H, X), draw(X, H, D), draw(H)


def parts_of(s, v, sinks, cuts=(0, 7, 8, X)):
    """The sinks in the last part only."""
    spans = list(itertools.pairwise(cuts))
    return [softmax(s[..., a:b], v[a:b], sinks if (a, b) == spans[-1] else None) for a, b in spans]


def test_parts_are_the_whole(whole):
    out, lse = pa.merge_attention(*zip(*parts_of(*whole), strict=True))
    want, want_lse = softmax(*whole)
    np.testing.assert_allclose(np.asarray(out), np.asarray(want), atol=1e-5)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(want_lse), atol=1e-5)


def test_sinks_in_every_part_are_too_many(whole):
    s, v, sinks = whole
    parts = [softmax(s[..., a:b], v[a:b], sinks) for a, b in ((0, 12), (12, X))]
    _, lse = pa.merge_attention(*zip(*parts, strict=True))
    assert (np.asarray(lse) > np.asarray(softmax(s, v, sinks)[1]) + 1e-4).all()


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("empty", [-np.inf, np.inf])
def test_empty_parts_are_harmless(whole, empty, garbage):
    """Whatever their values are; to the bit."""
    outs, lses = zip(*parts_of(*whole), strict=True)
    nothing = jnp.full((T, H, D), garbage, jnp.float32), jnp.full((T, H), empty, jnp.float32)
    want = pa.merge_attention(outs, lses)
    got = pa.merge_attention((nothing[0], *outs), (nothing[1], *lses))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_no_key_at_all():
    out, lse = pa.merge_attention([jnp.full((T, H, D), jnp.nan)] * 2, [jnp.full((T, H), -jnp.inf)] * 2)
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()


def test_one_part_is_itself(whole):
    (part,) = parts_of(*whole, cuts=(0, X))
    for x, y in zip(pa.merge_attention([part[0]], [part[1]]), part, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounded_once(whole, dtype):
    """Narrow parts are added up in float32."""
    outs, lses = zip(*parts_of(*whole), strict=True)
    narrow = [x.astype(dtype) for x in outs]
    got, _ = pa.merge_attention(narrow, lses)
    wide, _ = pa.merge_attention([x.astype(jnp.float32) for x in narrow], lses)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wide.astype(dtype)))


def test_large_logits_do_not_overflow(whole):
    s, v, _ = whole
    for shift in (-500.0, 500.0):
        _, lse = pa.merge_attention(*zip(*parts_of(s + shift, v, None), strict=True))
        np.testing.assert_allclose(np.asarray(lse), np.asarray(softmax(s, v)[1]) + shift, rtol=1e-6)


def test_gradients(whole):
    """Those of the whole softmax; an empty part brings no NaN."""
    s, v, sinks = whole
    weights = jnp.cos(jnp.arange(T * H * D, dtype=jnp.float32)).reshape(T, H, D)
    loss = lambda results: jnp.vdot(results[0], weights) + jnp.sum(results[1])  # noqa: E731
    nothing = jnp.full((T, H, D), jnp.nan), jnp.full((T, H), -jnp.inf)

    def merged(s, v, sinks, empty):
        return loss(pa.merge_attention(*zip(*parts_of(s, v, sinks), empty, strict=True)))

    got = jax.jit(jax.grad(merged, argnums=(0, 1, 2, 3)))(s, v, sinks, nothing)
    want = jax.grad(lambda *x: loss(softmax(*x)), argnums=(0, 1, 2))(s, v, sinks)
    for x, y in zip(got, want, strict=False):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-5)
    assert not any(np.asarray(x).any() for x in got[3])


def test_vmap(whole):
    parts = parts_of(*whole)
    outs, lses = zip(*parts, strict=True)
    doubled = jax.tree.map(lambda x: jnp.stack([x, -x]), (outs, lses))
    got = jax.vmap(pa.merge_attention)(*doubled)
    for x, y in zip(got, pa.merge_attention(outs, lses), strict=True):
        np.testing.assert_allclose(np.asarray(x)[0], np.asarray(y), rtol=1e-6)


OUT, LSE = jnp.zeros((T, H, D)), jnp.zeros((T, H))
BAD = {
    "no part": ([], [], "outs: got no part"),
    "parts missing": ([OUT, OUT], [LSE], "lses: got 1 parts; outs has 2"),
    "rank": ([OUT[0]], [LSE], r"outs: got shape \(3, 8\)"),
    "other shape": ([OUT, OUT[:2]], [LSE, LSE[:2]], r"outs: got float32 \(2, 3, 8\); the first part is"),
    "other type": ([OUT, OUT.astype(jnp.bfloat16)], [LSE, LSE], "outs: got bfloat16"),
    "integers": ([OUT.astype(jnp.int32)], [LSE], "outs: got int32"),
    "transposed": ([OUT], [LSE.T], r"lses: got shape \(3, 5\); \[tokens, heads\]"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("without_type_checks")
def test_invalid_input(name):
    outs, lses, message = BAD[name]
    with pytest.raises(pa.InvalidInput, match=message):
        pa.merge_attention(outs, lses)
