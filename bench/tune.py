"""`python -m bench tune`: time every configuration of the decode kernel and keep the best in its table."""

import fnmatch
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from tabulate import tabulate

import pallas_attn
from bench import timing
from bench.cases import Case, all_cases, arguments
from pallas_attn.core.caches import abstract_cache
from pallas_attn.ops.paged_attention import mosaic_config, mosaic_decode
from pallas_attn.ops.paged_attention.problem import Problem, prepare

TABLE = Path(pallas_attn.__file__).parent / "ops" / "paged_attention" / "tables" / "hopper_decode.json"
_gpu = None


def _problem(case: Case) -> Problem:
    """The problem of a case, without its arrays."""
    shape, seqs = jax.ShapeDtypeStruct, len(case.seqs)
    cache = abstract_cache(
        pallas_attn.E4M3_TENSOR, case.layout, page_size=case.page_size, heads=case.kv_heads, dim=case.head_dim
    )
    width = max(-(-kv // case.page_size) for _, kv in case.seqs)
    batch = pallas_attn.RaggedBatch(
        shape((seqs, width), jnp.int32), shape((seqs,), jnp.int32), shape((seqs + 1,), jnp.int32), max_q_len=1
    )
    return prepare(shape((case.tokens, case.q_heads, case.head_dim), jnp.bfloat16), cache, batch)[0]


def _start(lock) -> None:
    global _gpu
    _gpu = lock


def _time(job: tuple[str, mosaic_config.Config]) -> tuple[dict, mosaic_config.Config, mosaic_config.Config, float]:
    """(table entry without its configuration, the heuristic's choice, the configuration, its time) of one job."""
    name, config = job
    q, cache, batch = arguments(all_cases()[name])
    p, _ = prepare(q, cache, batch)

    def run(q, cache, batch):
        return mosaic_decode.run(p, *prepare(q, cache, batch)[1], config=config)[0]

    args = (q, cache, batch)
    compiled = jax.jit(run).lower(*args).compile()
    assert _gpu is not None
    with _gpu:  # compilation runs beside others', measurement alone
        us = timing.measure(compiled, *args).us
    entry = {"key": mosaic_config.key_of(p), "seqs": p.seqs, "context": p.pages_per_seq * p.page_size}
    return entry, mosaic_config.heuristic(p), config, us


def tune(pattern: str, processes: int) -> None:
    """Tune on the decode cases that match; replaces the entries of the same problems."""
    jobs = []
    for name, case in all_cases().items():
        if case.op == "decode" and "qbf16" in name and "ragged" not in name and fnmatch.fnmatch(name, pattern):
            jobs += [(name, config) for config in mosaic_config.candidates(_problem(case))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (context.Lock(),)) as pool:
        results = list(pool.map(_time, jobs))
    known = {json.dumps(_identity(e)): e for e in json.loads(TABLE.read_text())}
    rows = []
    for name in dict.fromkeys(name for name, _ in jobs):
        timed = [r for (n, _), r in zip(jobs, results, strict=True) if n == name]
        entry, heuristic, best, us = min(timed, key=lambda r: r[3])
        plain = next((r[3] for r in timed if r[2] == heuristic), float("nan"))
        for _, _, config, time in sorted(timed, key=lambda r: r[3]):
            print(f"{name:40s} {config} {time:8.1f} us")
        rows.append((name, str(best), us, str(heuristic), plain, plain / us))
        known[json.dumps(_identity(entry))] = {
            **entry,
            "config": [best.heads, best.stages, best.ctas],
            "us": round(us, 1),
        }
    TABLE.write_text("[\n" + ",\n".join(f"  {json.dumps(e)}" for e in known.values()) + "\n]\n")
    print(tabulate(rows, headers=["case", "best", "us", "heuristic", "us", "ratio"], floatfmt=".2f"))


def _identity(entry: dict) -> list:
    return [entry["key"], entry["seqs"], entry["context"]]
