"""The serving loop on its real weights: isolation of requests, pages, and closeness to the dense model."""

import dataclasses

import jax
import numpy as np
import pytest

import pallas_attn as pa
from bench.serve import model
from bench.serve.engine import Limits, PageAllocator, Request, Server, Variant, interference, run_step
from bench.serve.quality import Yardstick, bits_per_byte
from bench.serve.text import held_out_text, training_text
from bench.serve.variants import all_variants

CONFIG = model.Config()
LIMITS = Limits(sequences=3, tokens=16, chunk=8, page_size=8, pages=14, pages_per_sequence=8)


@pytest.fixture(scope="module")
def params() -> model.Params:
    return model.load()


@pytest.fixture(scope="module")
def variants(params: model.Params) -> dict[str, Variant]:
    return {v.name: v for v in all_variants(params, CONFIG, None)}


def prompts() -> list[Request]:
    text, sizes = held_out_text(), (30, 9, 17, 21)
    return [Request(text[1000 * i : 1000 * i + n].tobytes(), 10, arrival=2 * i) for i, n in enumerate(sizes)]


def test_corpus_split_covers_everything_once():
    assert training_text().size + held_out_text().size == 974_307
    assert held_out_text().size == 97_431


def test_weights_are_small_and_of_the_model(params: model.Params):
    assert model.WEIGHTS.stat().st_size <= 4 << 20
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), CONFIG))
    jax.tree.map(lambda leaf, like: np.testing.assert_equal(leaf.shape, like.shape), params, expected)


@pytest.mark.parametrize("name", ["BF16", "FP8 query"])
def test_served_in_company_as_alone(params: model.Params, variants: dict[str, Variant], name: str):
    def make() -> Server:
        return Server(params, variants[name], CONFIG, LIMITS)

    requests, server = prompts(), make()
    stats = server.serve(requests)
    assert all(len(r.output) == 10 for r in requests)
    assert stats.mixed_steps > 0
    assert stats.peak_pages <= LIMITS.pages < sum(r.pages_used for r in requests)
    assert len(server.scheduler.allocator.free) == LIMITS.pages
    assert server.scheduler.allocator.promised == 0
    assert interference(make, requests) == []
    agreement = np.concatenate(Yardstick(params, dataclasses.replace(CONFIG, context=64)).agreement(requests))
    assert agreement.mean() > 0.8


def test_cache_is_donated(params: model.Params, variants: dict[str, Variant]):
    server = Server(params, variants["E4M3_TENSOR"], CONFIG, LIMITS)
    before = server.cache
    server.warm_up()
    assert all(buffer.is_deleted() for buffer in before.buffers)
    assert run_step._cache_size() > 0  # pyright: ignore


def test_scores_follow_the_dense_model_and_a_bug_does_not(params: model.Params, variants: dict[str, Variant]):
    text = held_out_text()[:64]
    dense = bits_per_byte(Yardstick(params, dataclasses.replace(CONFIG, context=64)).nats(text[None]))

    def bits(name: str) -> float:
        request = Request(text.tobytes(), 0)
        Server(params, variants[name], CONFIG, LIMITS).serve([request])
        assert len(request.nats) == 63
        return bits_per_byte(np.array(request.nats))

    assert bits("E4M3_TENSOR") == pytest.approx(dense, abs=0.05)
    assert bits("layer scales replaced by 1") > dense + 0.2


def test_pages_are_promised_before_they_are_given():
    allocator = PageAllocator(Limits(page_size=4, pages=5))
    first, second = Request(b"a" * 8, 4), Request(b"b" * 8, 4)
    assert allocator.admit(first)
    assert not allocator.admit(second)
    allocator.extend(first, 5)
    assert (len(first.pages), len(allocator.free), allocator.promised) == (2, 3, 1)
    allocator.release(first)
    assert allocator.admit(second)


def test_a_request_that_never_fits_is_refused(params: model.Params):
    server = Server(params, Variant("BF16", pa.BF16), CONFIG, LIMITS)
    with pytest.raises(ValueError, match="longer than 8 pages"):
        server.serve([Request(b"a" * 60, 10)])
