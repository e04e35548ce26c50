"""The benchmark: cases agree with the peers' table, timelines are split at the flushes, results can be read again."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bench import __main__ as bench
from bench import (
    cases,
    gathers,
    latent_gathers,
    latent_writes,
    layers,
    mla,
    quantizing,
    record,
    sanitize,
    side,
    timing,
    tune,
    writes,
)
from bench.timing import Kernel, Timing
from pallas_attn.ops.paged_attention import mosaic_tables

ROWS = [r for r in json.loads(cases.PEERS.read_text())["cases"] if r["op"] in ("decode", "prefill", "gather")]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["name"])
def test_cases_have_the_floors_of_the_table(row):
    every = gathers.all_cases() if row["op"] == "gather" else cases.all_cases()
    case = every[row["name"]]
    assert case.floor_us == pytest.approx(row["floor_us"], rel=0.01)
    assert case.best_peer[0] == row["best_peer"]
    assert every[row["name"] + "_hnd"].layout.name == "HND"


def test_a_call_lasts_from_its_first_start_to_its_last_end():
    timeline = [
        Kernel(0, 90, True), Kernel(100, 150, False), Kernel(160, 190, False), Kernel(170, 300, False),
        Kernel(400, 500, True), Kernel(500, 510, True), Kernel(1000, 1100, False),
    ]  # fmt: skip
    calls = timing.split(timeline)
    assert [len(call) for call in calls] == [3, 1]
    assert timing.summarize(calls[:1]) == Timing(us=0.2, kernel_sum_us=0.21, launches=3)
    assert timing.summarize(calls[1:]) == Timing(us=0.1, kernel_sum_us=0.1, launches=1)


def test_time_outside_of_the_kernels_is_told_apart():
    call = [Kernel(0, 900, False, mosaic=True), Kernel(900, 1000, False), Kernel(1100, 1200, False)]
    assert timing.summarize([call]) == Timing(us=1.2, kernel_sum_us=1.1, launches=3, outside_us=0.2)
    line = record.result(STEP, "mosaic", Timing(us=1.2, kernel_sum_us=1.0, launches=3, outside_us=0.05), 1e-3).line()
    assert "5.0% of it outside" in line


def test_a_carried_argument_is_donated_and_replaced():
    first = jnp.zeros(8)
    timing.measure(lambda x, by: (x + by, by), first, jnp.ones(8), repeat=2, carry=True)
    assert first.is_deleted()


STEP = cases.all_cases()["layers32_l8_b32_c8192"]


def test_a_step_has_the_bytes_of_its_layers():
    layer = cases.all_cases()["dec_l8_b32_c8192_p64_qbf16"]
    assert STEP.bytes == 32 * (layer.bytes + 32 * 8 * 128 * (4 + 2))
    assert STEP.flops == 32 * layer.flops


def test_a_whole_step_runs_and_is_right():
    case = STEP.small()
    args = layers.arguments(case)
    assert args[0].num_pages == 2 * 2 * 4
    error, (cache, *_) = layers.check(case, args, "xla")
    assert 0 < error < 4e-3
    assert not cache.buffers[0].is_deleted()


def test_copies_of_the_cache_are_found():
    program = """
      %copy.1 = f8e4m3fn[16,64,8,128]{3,2,1,0} copy(%x)
      %copy.2 = s32[32]{0} copy(%y)
      ROOT %t = u8[1048576]{0} transpose(%z), dimensions={0}
      %use = bf16[16,64,8,128]{3,2,1,0} fusion(%copy.1)"""
    assert [line.split()[0] for line in layers.copies(program, 2**20)] == ["%copy.1", "ROOT"]


def test_writes_run_and_are_exact():
    case = writes.all_cases()["write_t8192_token_hnd"]
    assert case.bytes == 2 * 8192 * 8 * (128 * (2 + 1) + 4) + 4 * 8192
    assert isinstance(line := bench.one(case.small(), "xla", 1), record.Result)
    assert (line.rel_err, line.best_peer_us, line.case) == (0, None, "write_t8192_token_hnd_small")


def test_gathers_run_and_are_exact():
    case = gathers.all_cases()["gather_b8_c8192_p16_hnd"].small()
    assert case.bytes == 2 * 256 * 8 * 128 * 3 + 4 * 16
    assert isinstance(line := bench.one(case, "xla", 1), record.Result)
    assert (line.rel_err, line.best_peer_us, line.case) == (0, None, "gather_b8_c8192_p16_hnd_small")


@pytest.mark.parametrize(("module", "name", "bytes_"), [
    (latent_writes, "write_latent_t8192_rows", 8192 * (2 * 576 + 656 + 4)),
    (latent_gathers, "gather_latent_b8_c8192_rows", 65536 * (656 + 2 * 576) + 4 * 1024),
    (latent_gathers, "gather_latent_b8_c8192_fp8_raw", 65536 * 2 * 576 + 4 * 1024),
])  # fmt: skip
def test_latents_move_and_are_exact(module, name, bytes_):
    case = module.all_cases()[name]
    assert case.bytes == bytes_
    assert isinstance(line := bench.one(case.small(), "xla", 1), record.Result)
    assert (line.rel_err, line.case) == (0, f"{name}_small")


MLA_ROWS = [r for r in json.loads(cases.PEERS.read_text())["cases"] if r["op"] in ("mla", "mla_sparse")]


@pytest.mark.parametrize("row", MLA_ROWS, ids=lambda r: r["name"])
def test_mla_has_the_floors_of_the_table(row):
    case = mla.all_cases()[row["name"]]
    assert (case.bytes, case.flops) == (row["bytes"], row["flops"])
    assert case.floor_us == pytest.approx(row["floor_us"], abs=0.01)
    assert case.best_peer[0] == row["best_peer"]


def test_mla_prefill_counts_what_is_seen():
    case = mla.all_cases()["mla_h128_1x2k_kvbf16"]
    assert case.flops == 2 * 128 * 1088 * sum(range(1, 2049))
    assert case.bytes == 2048 * (1152 + 128 * (1152 + 1024))
    chunk = mla.all_cases()["mla_h128_4xchunk512_16k_kvfp8"]
    assert chunk.flops == 4 * 2 * 128 * 1088 * sum(range(16384 - 511, 16385))
    assert chunk.floor_us == pytest.approx(chunk.flops / 1979e6)


@pytest.mark.parametrize("name", ["mla_h16_b32_c4096_kvfp8", "mlasp_h128_b32_k2048_gq", "mla_h16_4x2k_kvbf16"])
def test_mla_runs_and_is_right(name):
    line = bench.one(mla.all_cases()[name].small(), "xla", 1)
    assert isinstance(line, record.Result)
    assert 0 < line.rel_err < (0.04 if name.endswith("gq") else 4e-3)


QUANTIZE_ROWS = [r for r in json.loads(cases.PEERS.read_text())["cases"] if r["op"] == "group_quant"]


@pytest.mark.parametrize("row", QUANTIZE_ROWS, ids=lambda r: r["name"])
def test_quantisation_has_the_floors_of_the_table(row):
    case = quantizing.all_cases()[row["name"]]
    assert (case.bytes, case.best_peer[0]) == (row["bytes"], row["best_peer"])
    if row["T"] > 1:
        assert quantizing.all_cases()[row["name"] + "_packed"].bytes == row["bytes"] - 3 * row["T"] * 128


def test_an_up_projection_is_bound_by_its_weights_or_latents():
    few, many = (quantizing.all_cases()[f"gq_up_t{t}_h128"] for t in (32, 4096))
    assert few.bytes == 2 * 128 * 512 * (32 + 128) + 32 * 16384 + 4 * 32 * 128
    assert few.floor_us == pytest.approx(few.bytes / 3.35e6)
    assert many.flops / 989e6 < many.floor_us < 200


@pytest.mark.slow
def test_an_up_projection_runs():
    few = quantizing.all_cases()["gq_up_t32_h128"]
    assert isinstance(line := bench.one(few.small(), "xla", 1), record.Result)
    assert 0 < line.rel_err < 0.03


def test_quantisation_runs_beside_a_copy_and_is_exact(capsys):
    bench.main(["run", "--op", "quantize", "--case", "gq_t32_n16384_packed", "--repeat", "1"])
    said = capsys.readouterr().out
    assert "error 0.0e+00" in said
    assert "copy of as many bytes" in said


def test_peers_run_beside_or_say_why_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(side, "PEERS", {n: p for n, p in side.PEERS.items() if n.startswith(("flash", "XLA"))})
    case = cases.all_cases()["dec_l8_b32_c1024_p64_qbf16_hnd"].small()
    missing, gathered = side.run_all(case, cases.arguments(case), repeat=1)
    assert "flashinfer decode" in missing.line()
    assert "not here" in missing.line()
    assert gathered.us > 0
    assert 0 < gathered.rel_err < 1e-2


def test_small_cases_run_and_are_right(capsys, tmp_path):
    bench.main(["run", "--case", "pre_l8_mixed_p64_qfp8", "--repeat", "1", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no GPU here" in said
    assert "pre_l8_mixed_p64_qfp8_small" in said
    assert not list(tmp_path.iterdir())


def test_the_error_is_that_of_the_output():
    case = cases.all_cases()["dec_l8_b32_c1024_p64_qbf16"].small()
    args = cases.arguments(case)
    out = cases.operation(case, "xla")(*args)
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
    assert all(
        name in said for name in (*cases.all_cases(), *writes.all_cases(), *gathers.all_cases(), *mla.all_cases())
    )
    with pytest.raises(SystemExit, match="no case is called nothing"):
        bench.main(["list", "--case", "nothing"])


def test_a_refusal_is_said(capsys):
    bench.main(["run", "--case", "dec_d256_b32_c8192_p64_qfp8", "--backend", "mosaic"])
    assert "mosaic refuses: not on cpu" in capsys.readouterr().out


def test_what_runs_under_the_sanitizer_is_right():
    assert sanitize.run(sanitize.CELLS[3], "xla") < 1e-5


@pytest.mark.parametrize("op", tune.KERNELS)
def test_what_is_tuned(op):
    """Every job is a configuration of its case, and every entry of the table is one that was timed."""
    jobs = tune.jobs_of(op, "*")
    assert all(tune.KERNELS[op].takes(cases.all_cases()[name]) for _, name, _ in jobs)
    choice = tune.KERNELS[op].choice
    timed = {}
    for _, name, config in jobs:
        p = tune.problem(cases.all_cases()[name])
        timed.setdefault(json.dumps([choice.key_of(p), choice.sizes_of(p)]), set()).add(tuple(vars(config).values()))
    for entry in mosaic_tables.entries(choice.TABLE):
        sizes = {name: entry[name] for name in entry if name not in ("key", "config", "us")}
        assert tuple(entry["config"]) in timed[json.dumps([entry["key"], sizes])]
