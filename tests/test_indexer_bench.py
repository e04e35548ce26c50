"""The model that judges the indexer: its task, its weights, what two real bugs cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from bench import __main__ as bench
from bench.indexer import accuracy, model, task, train


def test_logs_have_one_answer():
    logs = task.logs(np.random.default_rng(0), 2, 512)
    for keys, values, asked, answers, latest in zip(*logs, strict=True):
        for key, answer, at in zip(asked, answers, latest, strict=True):
            assert np.flatnonzero(keys == key)[-1] == at
            assert values[at] == answer
        assert (asked[: task.QUERIES // 2] < task.COMMON).all()
        assert all((keys == key).sum() == 1 for key in asked[task.QUERIES // 2 :])


def test_weights_are_small_and_come_back(tmp_path):
    assert model.WEIGHTS.stat().st_size < 500_000
    params = model.load()
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), params, jax.eval_shape(model.init))
    model.save(tmp_path / "again.npz", params)
    jax.tree.map(np.testing.assert_array_equal, model.load(tmp_path / "again.npz"), params)


def test_the_indexer_keeps_what_the_bugs_lose():
    params, logs = model.load(), task.logs(np.random.default_rng(1), 1, 1024)
    dense, indexer, *bugs = (accuracy.score(params, logs, name) for name in list(accuracy.VARIANTS)[:4])
    assert min(dense.common, dense.rare) > 0.7
    assert indexer.kept > 0.95
    assert min(indexer.common - dense.common, indexer.rare - dense.rare) > -0.05
    assert all(min(bug.common, bug.rare) < indexer.common - 0.3 for bug in bugs)


def test_tiles_are_where_upstream_wrote_them(rng):
    rows = rng.integers(0, 256, (20, 1, 132)).astype(np.uint8)
    want = np.zeros(rows.size, np.uint8)
    for page, row in enumerate(rows[:, 0]):
        for d in range(128):
            at = page * 132 + d // 16 * 256 + d % 16
            if at < want.size:
                want[at] = row[d]
    for page, row in enumerate(rows[:, 0]):
        want[page * 132 + 128 : page * 132 + 132] = row[128:]
    cache = pa.IndexCache(jnp.asarray(rows), pa.INDEX_NORMAL, pa.INDEX_K)
    got = np.asarray(accuracy.in_tiles(cache).pages).reshape(-1)
    assert (got == want).mean() > 0.9  # tokens that write the same byte may do so in any order
    np.testing.assert_array_equal(got.reshape(20, 132)[:, 128:], rows[:, 0, 128:])


def test_a_step_of_training_moves_every_weight_but_the_frequencies(monkeypatch):
    monkeypatch.setattr(model, "PAGE", 16)
    params = model.init()
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = train.State(params, zeros, jax.tree.map(jnp.zeros_like, params), jnp.int32(0))
    before = jax.tree.map(np.asarray, params)
    logs = task.logs(np.random.default_rng(3), 1, 128)
    state, parts = train.train_step(state, logs, jnp.float32(1e-3))
    assert all(np.isfinite(x) and x > 0 for x in map(float, parts))
    moved = jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), state.params, before)
    still = [jax.tree_util.keystr(p) for p, x in jax.tree.leaves_with_path(moved) if not x]
    assert still == [".indexer.frequencies"]


def test_the_table_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "VARIANTS", {"a window as large": accuracy.latest})
    bench.main(["indexer-accuracy", "--logs", "1", "--length", "512"])
    assert "a window as large" in capsys.readouterr().out


@pytest.mark.parametrize("progress", [0.01, 0.04, 0.5, 1.0])
def test_the_rate_warms_up_and_decays(progress):
    assert 0 < train.learning_rate(progress, 1.0) <= 1
    assert train.learning_rate(1.0, 1.0) == pytest.approx(0.01)
