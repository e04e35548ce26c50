"""The benchmark: cases agree with the peers' table, timelines are split at the flushes, results can be read again."""

import json

import numpy as np
import pytest

from bench import __main__ as bench
from bench import cases, record, timing
from bench.timing import Kernel, Timing

ROWS = [r for r in json.loads(cases.PEERS.read_text())["cases"] if r["op"] in ("decode", "prefill")]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["name"])
def test_cases_have_the_floors_of_the_table(row):
    case = cases.all_cases()[row["name"]]
    assert case.floor_us == pytest.approx(row["floor_us"], rel=0.01)
    assert case.best_peer[0] == row["best_peer"]
    assert cases.all_cases()[row["name"] + "_hnd"].layout.name == "HND"


def test_a_call_lasts_from_its_first_start_to_its_last_end():
    timeline = [
        Kernel(0, 90, True), Kernel(100, 150, False), Kernel(160, 190, False), Kernel(170, 300, False),
        Kernel(400, 500, True), Kernel(500, 510, True), Kernel(1000, 1100, False),
    ]  # fmt: skip
    calls = timing.split(timeline)
    assert [len(call) for call in calls] == [3, 1]
    assert timing.summarize(calls[:1]) == Timing(us=0.2, kernel_sum_us=0.21, launches=3)
    assert timing.summarize(calls[1:]) == Timing(us=0.1, kernel_sum_us=0.1, launches=1)


def test_small_cases_run_and_are_right(capsys, tmp_path):
    bench.main(["run", "--case", "pre_l8_mixed_p64_qfp8", "--repeat", "1", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no GPU here" in said
    assert "pre_l8_mixed_p64_qfp8_small" in said
    assert not list(tmp_path.iterdir())


def test_the_error_is_that_of_the_output():
    case = cases.all_cases()["dec_l8_b32_c1024_p64_qbf16"].small()
    args = cases.arguments(case)
    out = cases.operation("xla")(*args)
    assert 0 < cases.relative_error(case, args, out) < 4e-3
    assert cases.relative_error(case, args, 1.5 * out) == pytest.approx(0.5, abs=0.01)


def test_results_round_trip_and_draw(tmp_path):
    case = cases.all_cases()["dec_l8_b32_c8192_p64_qbf16"]
    slow, fast = (record.result(case, "xla", Timing(us, us / 2, 2), 1e-3) for us in (400.0, 200.0))
    for r in (slow, fast):
        path = record.append(r, tmp_path)
    assert record.read(path) == [fast]
    assert np.isclose(fast.frac_of_floor, case.floor_us / 200, atol=1e-3)
    assert "x best peer" in fast.line()
    bench.main(["plot", str(path), "--out", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_list_names_every_case(capsys):
    bench.main(["list"])
    said = capsys.readouterr().out
    assert all(name in said for name in cases.all_cases())
    with pytest.raises(SystemExit, match="no case is called nothing"):
        bench.main(["list", "--case", "nothing"])


def test_a_refusal_is_said(capsys):
    bench.main(["run", "--case", "dec_d256_b32_c8192_p64_qfp8", "--backend", "mosaic"])
    assert "mosaic refuses: not on cpu" in capsys.readouterr().out
