"""The streaming form of the Hopper selection: its walk and its warps on a CPU, that it lowers, and rows on a GPU."""

import functools
import types

import numpy as np
import pytest
import warps
from cover import pairwise
from test_mosaic_indexer import ROWS, abstract_topk, concrete_topk, is_one_launch, lower, name, sorted_rows, twice

from pallas_attn.ops.sparse_indexer import (
    mosaic_topk,
    mosaic_topk_lanes,
    mosaic_topk_list,
    mosaic_topk_search,
    mosaic_topk_stream,
)

MODULES = mosaic_topk, mosaic_topk_lanes, mosaic_topk_list, mosaic_topk_search, mosaic_topk_stream
STREAM = (
    (1, 5, 150),  # rows
    (1, 7, 512, 2048, 4096),  # k
    (100, 16384, 16385, 40001, 131072, 300002, 1 << 20),  # columns
    ("whole", "ends", "starts and ends"),
    (1, 2, 4, 8),  # CTAs of a cluster
)
CELLS = pairwise(STREAM, lambda cell: cell[0] * cell[2] <= 1 << 24)


def streamed(ctas):
    """The kernel in this form."""
    return types.SimpleNamespace(run=functools.partial(mosaic_topk.run, ctas=ctas, stream=True))


def test_the_ends_move_past_threads_without_a_number(rng, monkeypatch):
    """A thread that holds nothing but NaN, as behind a short list, has no say in what the greatest number is."""
    form = mosaic_topk.form_of(abstract_topk(1, 512, 131072, "whole")[0], 1, stream=True)
    x, found = rng.standard_normal(700).astype(np.float32), []
    shared = {n: warps.Memory(np.zeros(s.shape, s.dtype)) for n, s in mosaic_topk.scratch_of(form).items()}
    shared["list"].arrays[0][: x.size] = x.view(np.int32)

    def cta():
        lanes = mosaic_topk_list.Listed(form, None, None, **shared)
        lanes.hold(np.int32(x.size))
        found.extend(lanes.alone.nearest(np.float32(-0.5), np.float32(1.5), np.int32(0)))

    with warps.simulated(monkeypatch, *MODULES):
        warps.cluster(0, 1, cta)
    least, most = (np.asarray(mosaic_topk_search.value(k[0])) for k in found)
    assert (least, most) == (x[x >= -0.5].min(), x[x < 1.5].max())


def simulate(monkeypatch, p, args, ctas, clusters=1):
    """The kernel's result, by warps on a CPU; what it has not written is no column."""
    form = mosaic_topk.form_of(p, ctas, stream=True)._replace(clusters=clusters)
    logits, starts, ends = (None if x is None else np.asarray(x) for x in args)
    x, out = warps.Memory(logits), warps.Result(np.full((p.rows, p.k), 1 << 30, np.int32), 1 << 30)
    shared = {
        name: warps.Memory(*(np.full(s.shape, 9, s.dtype) for _ in range(ctas)))
        for name, s in mosaic_topk.scratch_of(form).items()
    }

    def cta():
        lanes = mosaic_topk_list.Listed(form, x, out, **shared)
        mosaic_topk.select(form, {"logits": x, "starts": starts, "ends": ends}, lanes)

    with warps.simulated(monkeypatch, *MODULES):
        for i in range(clusters):
            warps.cluster(i, ctas, cta)
    return out.arrays[0]


@pytest.mark.parametrize("kind", ROWS)
def test_adversarial_rows_simulated(kind, rng, monkeypatch):
    with np.errstate(over="ignore", invalid="ignore"):
        p, args = concrete_topk(rng, 1, 512, 50001, "whole", ROWS[kind])
    np.testing.assert_array_equal(simulate(monkeypatch, p, args, 1), sorted_rows(p, args))


SIMULATED = [
    (5, 300, 20000, "starts and ends", 1, 2),
    (3, 4096, 50000, "starts and ends", 2, 2),
    (1, 1, 40002, "ends", 4, 1),
    (1, 2048, 66000, "whole", 2, 1),
    (2, 4096, 4000, "whole", 2, 1),
    (1, 4096, 4100, "whole", 8, 1),
]


@pytest.mark.parametrize("cell", SIMULATED, ids=name)
def test_clusters_simulated(cell, rng, monkeypatch):
    *cell, ctas, clusters = cell
    p, args = concrete_topk(rng, *cell)
    np.testing.assert_array_equal(simulate(monkeypatch, p, args, ctas, clusters), sorted_rows(p, args))


def test_clusters_that_meet_simulated(rng, monkeypatch):
    """The words of a cluster by its own barrier, as the form that holds rows exchanges them."""
    monkeypatch.setattr(mosaic_topk_list, "SIGNALS", False)
    p, args = concrete_topk(rng, 2, 300, 20000, "starts and ends")
    np.testing.assert_array_equal(simulate(monkeypatch, p, args, 2), sorted_rows(p, args))


@pytest.mark.parametrize("kind", ["relu", "all equal", "nearly all NaN", "all -inf", "ascending", "two values"])
def test_equals_of_clusters_simulated(kind, rng, monkeypatch):
    """Equal numbers in several CTAs' lists: the first of them are chosen."""
    p, args = concrete_topk(rng, 1, 1000, 40000, "starts and ends", ROWS[kind])
    np.testing.assert_array_equal(simulate(monkeypatch, p, args, 4), sorted_rows(p, args))


EDGES = [
    (1.0, np.nextafter(np.float32(1), 2)),
    (-0.0, 1e-45),
    (0.0, 1e-45),
    (-np.inf, -3.4028235e38),
    (3.4028235e38, np.inf),
]


@pytest.mark.parametrize(("low", "high"), EDGES, ids=str)
def test_the_least_bit_more_is_enough(low, high, rng, monkeypatch):
    """Of what comes after a list was cut, anything that is greater than its least number at all."""
    later = lambda rng, n: np.where((np.arange(n) > 20000) & (rng.random(n) < 0.005), high, low)  # noqa: E731
    p, args = concrete_topk(rng, 1, 300, 40000, "whole", later)
    np.testing.assert_array_equal(simulate(monkeypatch, p, args, 1), sorted_rows(p, args))


def test_what_is_streamed():
    form = lambda rows, columns: mosaic_topk.form_of(abstract_topk(rows, 2048, columns, "ends")[0])  # noqa: E731
    held = ((64, 32768), (4096, 32768), (64, 65536), (1, 131072), (31, 131072))
    assert [form(*x).streamed for x in held] == [False] * 5
    for rows, ctas in ((32, 2), (64, 2), (65, 1), (4096, 1)):
        f = form(rows, 131072)
        assert (f.streamed, f.ctas) == (True, ctas)
        assert f.clusters * f.ctas <= mosaic_topk.SMS
    assert form(8, 1 << 20)[3:5] == (8, mosaic_topk_list.LIST_UNITS)


@pytest.mark.parametrize("cell", CELLS[::6], ids=name)
def test_streaming_lowers_to_one_launch(cell):
    *cell, ctas = cell
    is_one_launch(lower(streamed(ctas), *abstract_topk(*cell)))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_streamed_cell_lowers(cell):
    *cell, ctas = cell
    lower(streamed(ctas), *abstract_topk(*cell))


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_streaming_on_gpu(cell, rng):
    *cell, ctas = cell
    p, args = concrete_topk(rng, *cell)
    np.testing.assert_array_equal(twice(streamed(ctas), p, args), sorted_rows(p, args))


@pytest.mark.gpu
@pytest.mark.parametrize("ctas", [1, 2, 8])
@pytest.mark.parametrize("columns", [20000, 131072, 300001])
def test_adversarial_rows_streamed_on_gpu(columns, ctas, rng):
    with np.errstate(over="ignore", invalid="ignore"):
        rows = iter([kind(rng, columns) for kind in ROWS.values()])
        p, args = concrete_topk(rng, len(ROWS), 2048, columns, "", lambda rng, columns: next(rows))
    np.testing.assert_array_equal(twice(streamed(ctas), p, args), sorted_rows(p, args))
