"""`python -m bench tune`: time every configuration of a Hopper attention kernel and keep the best in its table."""

import fnmatch
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tabulate import tabulate

import pallas_attn
from bench import timing
from bench.cases import Case, all_cases, arguments
from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.caches import abstract_cache
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention import mosaic_config, mosaic_decode, mosaic_prefill, mosaic_prefill_config
from pallas_attn.ops.paged_attention.problem import Problem, prepare

TABLES = Path(pallas_attn.__file__).parent / "ops" / "paged_attention" / "tables"
_gpu = None


class Kernel(NamedTuple):
    """What is tuned: the module of its configurations, its call, and which cases it is for."""

    choice: Any
    run: Callable
    takes: Callable[[Case], bool]


KERNELS = {
    "decode": Kernel(
        mosaic_config, mosaic_decode.run, lambda c: c.op == "decode" and not c.fp8_query and "ragged" not in c.name
    ),
    "prefill": Kernel(
        # What is fastest by itself is not where decode follows: mixed steps are left to the heuristic.
        mosaic_prefill_config, mosaic_prefill.run, lambda c: c.op == "prefill" and "mixed" not in c.name
    ),
}  # fmt: skip


def problem(case: Case) -> Problem:
    """The problem of a case, without its arrays."""
    shape, seqs = jax.ShapeDtypeStruct, len(case.seqs)
    cache = abstract_cache(
        pallas_attn.E4M3_TENSOR, case.layout, page_size=case.page_size, heads=case.kv_heads, dim=case.head_dim
    )
    width = max(-(-kv // case.page_size) for _, kv in case.seqs)
    longest = 1 if case.op == "decode" else None
    batch = RaggedBatch(
        shape((seqs, width), jnp.int32), shape((seqs,), jnp.int32), shape((seqs + 1,), jnp.int32), max_q_len=longest
    )
    rows = case.tokens, case.q_heads, case.head_dim
    q: Any = shape(rows, jnp.bfloat16)
    if case.fp8_query:
        q = Quantized(shape(rows, jnp.float8_e4m3fn), shape((), jnp.float32), pallas_attn.E4M3_TENSOR)
    return prepare(q, cache, batch)[0]


def _start(lock) -> None:
    global _gpu
    _gpu = lock


def _time(job: tuple[str, str, Any]) -> tuple[dict, Any, Any, float]:
    """(table entry without its configuration, the heuristic's choice, the configuration, its time) of one job."""
    op, name, config = job
    kernel, args = KERNELS[op], arguments(all_cases()[name])
    p, _ = prepare(*args)

    def run(q, cache, batch):
        return kernel.run(p, *prepare(q, cache, batch)[1], config=config)[0]

    compiled = jax.jit(run).lower(*args).compile()
    assert _gpu is not None
    with _gpu:  # compilation runs beside others', measurement alone
        us = timing.measure(compiled, *args).us
    entry = {"key": kernel.choice.key_of(p), **kernel.choice.sizes_of(p)}
    return entry, kernel.choice.heuristic(p), config, us


def jobs_of(op: str, pattern: str) -> list[tuple[str, str, Any]]:
    """Every configuration of every case that matches."""
    kernel, found = KERNELS[op], []
    for name, case in all_cases().items():
        if kernel.takes(case) and fnmatch.fnmatch(name, pattern):
            found += [(op, name, config) for config in kernel.choice.candidates(problem(case))]
    return found


def tune(op: str, pattern: str, processes: int) -> None:
    """Tune on the cases of an op that match; replaces the entries of the same problems."""
    jobs, table = jobs_of(op, pattern), TABLES / f"{KERNELS[op].choice.TABLE}.json"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (context.Lock(),)) as pool:
        results = list(pool.map(_time, jobs))
    known = {json.dumps(_identity(e)): e for e in json.loads(table.read_text())}
    rows = []
    for name in dict.fromkeys(name for _, name, _ in jobs):
        timed = [r for (_, n, _), r in zip(jobs, results, strict=True) if n == name]
        entry, heuristic, best, us = min(timed, key=lambda r: r[3])
        plain = next((r[3] for r in timed if r[2] == heuristic), float("nan"))
        for _, _, config, time in sorted(timed, key=lambda r: r[3]):
            print(f"{name:40s} {config} {time:8.1f} us")
        rows.append((name, str(best), us, str(heuristic), plain, plain / us))
        known[json.dumps(_identity(entry))] = {**entry, "config": list(vars(best).values()), "us": round(us, 1)}
    table.write_text("[\n" + ",\n".join(f"  {json.dumps(e)}" for e in known.values()) + "\n]\n")
    print(tabulate(rows, headers=["case", "best", "us", "heuristic", "us", "ratio"], floatfmt=".2f"))


def _identity(entry: dict) -> list:
    return [value for name, value in entry.items() if name not in ("config", "us")]
