"""Hypothesis: ragged batches x formats x layouts x masks against the oracle; few kinds of problem in fixed shapes, for
each kind is a compilation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import FORMATS, LAYOUTS, assert_close, library_options, make

import pallas_attn as pa

SEQS, TOKENS, WIDTH, PAGE, PAGES = 4, 32, 4, 16, 20
FEW = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def batches(draw):
    """(q_lens, kv_lens) of up to SEQS sequences that fit the fixed shapes; a query may be longer than its keys."""
    kv_lens = draw(st.lists(st.integers(0, WIDTH * PAGE), min_size=1, max_size=SEQS))
    q_lens = [draw(st.integers(0, 8)) for _ in kv_lens]
    return q_lens, kv_lens


numbers = st.floats(-3, 3, width=32)


@st.composite
def masks(draw, causal, kind):
    """Flat options; what is an array here is traced by the library."""
    options = {"causal": causal}
    if causal == "per sequence":
        options["causal"] = np.array(draw(st.lists(st.booleans(), min_size=SEQS, max_size=SEQS)))
    position = st.integers(0, WIDTH * PAGE)
    window = np.int32(draw(st.integers(2, 40)))
    if kind in ("window", "chunked", "clamped prefix"):
        options["window"] = window
    if kind == "chunked":
        options["chunk_lookback"] = 1
    if "prefix" in kind:
        ranges = draw(st.lists(st.tuples(position, position), min_size=2 * SEQS, max_size=2 * SEQS))
        options["prefix_ranges"] = np.array(ranges, np.int32).reshape(SEQS, 2, 2)
        options["clamp_prefix"] = kind == "clamped prefix"
    if kind == "rswa":
        options["rswa"] = np.array(draw(st.lists(position, min_size=SEQS, max_size=SEQS)), np.int32), window
    return options


@st.composite
def logits(draw, heads, capped, biased):
    """Flat options for what changes the logits; `biased` is None or (square root, before the cap)."""
    options = {"sinks": np.array(draw(st.lists(numbers, min_size=heads, max_size=heads)), np.float32)}
    if capped:
        options["soft_cap"] = np.float32(draw(st.floats(0.5, 20, width=32)))
    if biased:
        slopes = draw(st.lists(st.floats(0, 0.25, width=32), min_size=heads, max_size=heads))
        options["alibi_slopes"] = np.array(slopes, np.float32)
        options["alibi_sqrt"], options["before_soft_cap"] = biased
    return options


CAUSAL, BIASES = (
    (True, False, "per sequence"),
    (None, (False, False), None, (True, False), (False, True), None, (True, True)),
)
MASKS = ("none", "window", "chunked", "prefix", "clamped prefix", "rswa")
# (format, layout, (causal, mask), (capped, biased)): all formats, layouts, masks and biases, differently combined.
KINDS = [
    (format, LAYOUTS[i % 5], (CAUSAL[(i + i // 6) % 3], MASKS[i % 6]), (i % 4 > 1, BIASES[i % 7]))
    for i, format in enumerate(FORMATS)
]


@st.composite
def kinds(draw, heads=4):
    """(format, layout, mask options, logit options)."""
    format, layout, mask, logit = draw(st.sampled_from(KINDS))
    return format, layout, draw(masks(*mask)), draw(logits(heads, *logit))


@cache
def compiled(backend):
    def run(q, cache, batch, options):
        return pa.paged_attention(q, cache, batch, **options, out=jnp.float32, return_lse=True, backend=backend)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # half the time


def problem_of(seed, lens, format, **keywords):
    q_lens, kv_lens = lens
    spare = {"spare_seqs": SEQS - len(q_lens), "spare_tokens": TOKENS - sum(q_lens)}
    fixed = {"dim": 16, "page_size": PAGE, "table_width": WIDTH, "num_pages": PAGES}
    return make(np.random.default_rng(seed), format, q_lens, kv_lens, **fixed, **spare, **keywords)


@pytest.mark.parametrize("name", ["reference", "xla"])
@FEW
@given(st.integers(0, 2**32), batches(), kinds())
def test_ragged_attention(name, seed, lens, kind):
    format, layout, mask, logit = kind
    problem = problem_of(seed, lens, format)
    got = compiled(name)(*problem.arguments(layout), library_options(**mask, **logit))
    assert_close(got, problem.expected(**mask, **logit))


@FEW
@given(st.integers(0, 2**32), batches(), st.sampled_from(MASKS).flatmap(lambda kind: masks("per sequence", kind)))
def test_sequences_do_not_see_each_other(seed, lens, mask):
    """Serving the first sequence alone, in the same shapes, gives the same bits."""
    problem = problem_of(seed, lens, "E4M3_HEAD")
    q, cache, batch = problem.arguments("PACKED")
    alone = pa.RaggedBatch(batch.page_table, batch.kv_lens, batch.cu_q_lens, jnp.int32(1))
    options = library_options(**mask)
    together, _ = compiled("xla")(q, cache, batch, options)
    single, _ = compiled("xla")(q, cache, alone, options)
    n = lens[0][0]
    np.testing.assert_array_equal(np.asarray(single)[:n], np.asarray(together)[:n])
    assert not np.asarray(single)[n:].any()


@FEW
@given(st.integers(0, 2**32), batches(), st.sampled_from(["F32", "E4M3_TENSOR", "INT8_TOKEN_HEAD"]))
def test_page_numbers_do_not_matter(seed, lens, format):
    """Moving pages about changes nothing, to the bit."""
    problem = problem_of(seed, lens, format)
    run = compiled("xla")
    before = run(*problem.arguments("HND"), library_options())
    moved = np.random.default_rng(seed).permutation(PAGES)
    back = np.argsort(moved)  # page p is now at moved[p]
    problem.k, problem.v = problem.k[back], problem.v[back]
    if problem.k_scale is not None and problem.k_scale.ndim == 3:
        problem.k_scale, problem.v_scale = problem.k_scale[back], problem.v_scale[back]
    inside = (problem.page_table >= 0) & (problem.page_table < PAGES)
    problem.page_table = np.where(inside, moved[problem.page_table % PAGES], problem.page_table).astype(np.int32)
    after = run(*problem.arguments("HND"), library_options())
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
