"""`python -m bench list | run | plot | tune`: the benchmark of attention, cache writes, gathers and quantisation;
`python -m bench indexer-accuracy`: what sparse attention answers with the indexer, and with two bugs."""

import argparse
import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

import pallas_attn as pa
from bench import (
    cases,
    gathers,
    indexing,
    latent_gathers,
    latent_writes,
    layers,
    mla,
    mla_layer,
    quantizing,
    record,
    side,
    timing,
    writes,
)
from bench.cases import Case
from bench.shape import Shape

KINDS = {  # by `case.op`
    "decode": cases,
    "prefill": cases,
    "layers": layers,
    "write": writes,
    "gather": gathers,
    "write_latent": latent_writes,
    "gather_latent": latent_gathers,
    "indexer": indexing,
    "mla": mla,
    "mla_sparse": mla,
    "mla_prefill": mla,
    "mla_layer": mla_layer,
    "quantize": quantizing,
}
MODULES = (cases, writes, gathers, latent_writes, latent_gathers, indexing, mla, mla_layer, quantizing)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("list", "name the cases"), ("run", "measure cases, add to bench/results")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--op", choices=tuple(KINDS), help="only this kind")
        command.add_argument("--case", default="*", help="a name or a pattern such as 'dec_*_qfp8'")
        command.add_argument("--layout", choices=("NHD", "HND"), help="only this layout")
    command.add_argument("--backend", help="default: the best that supports the case")
    command.add_argument("--repeat", type=int, default=11)
    command.add_argument("--no-schedule", action="store_true", help="time the call that computes its own schedule")
    command.add_argument("--peers", action="store_true", help="run other libraries' kernels beside decode cases")
    command.add_argument("--results", type=Path, default=record.RESULTS)
    picture = commands.add_parser("plot", help="draw a results file")
    picture.add_argument("file", type=Path)
    picture.add_argument("--out", type=Path, default=record.OUT / "bench.png")
    search = commands.add_parser("tune", help="time a kernel's configurations, keep the best in its table")
    search.add_argument("--op", choices=["decode", "prefill"], default="decode")
    search.add_argument("--case", default="*", help="a name or a pattern")
    search.add_argument("--processes", type=int, default=12, help="that compile beside each other")
    answers = commands.add_parser("indexer-accuracy", help="right answers of a trained model with sparse attention")
    answers.add_argument("--logs", type=int, default=4, help="of every length")
    answers.add_argument("--length", type=int, action="append", help="default 2048, 4096, 8192")
    args = parser.parse_args(argv)
    {"list": show, "run": run, "plot": draw, "tune": search_configs, "indexer-accuracy": indexer_accuracy}[
        args.command
    ](args)


def chosen(args: argparse.Namespace) -> list[Shape]:
    """The cases that the options select."""
    found = [
        c for c in (x for kind in MODULES for x in kind.all_cases().values())
        if fnmatch.fnmatch(c.name, args.case) and args.op in (None, c.op) and args.layout in (None, c.layout.name)
    ]  # fmt: skip
    if not found:
        raise SystemExit(f"no case is called {args.case}: see `python -m bench list`")
    return found


def show(args: argparse.Namespace) -> None:
    """Print the cases with their floors and best peers."""
    rows = [(c.name, c.layout.name, c.floor_us, *(c.best_peer or ("", None))) for c in chosen(args)]
    print(tabulate(rows, headers=["case", "layout", "floor us", "best peer", "us"], floatfmt=".1f"))


def run(args: argparse.Namespace) -> None:
    """Measure, print and record."""
    small = jax.default_backend() != "gpu"
    if small:
        print("no GPU here: the portable backend on small cases, by the host's clock; nothing is recorded")
    for case in chosen(args):
        if small:
            case = case.small()
        measured = one(case, args.backend, args.repeat, scheduled=not args.no_schedule)
        print(measured if isinstance(measured, str) else measured.line(), flush=True)
        if not small and not args.no_schedule and not isinstance(measured, str):
            record.append(measured, args.results)
        for other in getattr(KINDS[case.op], "beside", lambda *_: ())(case, args.backend, args.repeat):
            print(other.line(), flush=True)
        if args.peers and isinstance(case, Case) and case.op == "decode":
            for peer in side.run_all(case, cases.arguments(case), args.repeat):
                print(peer.line(), flush=True)


def one(case: Shape, backend: str | None, repeat: int, scheduled: bool = True) -> record.Result | str:
    """Check and time one case; or say why a backend refuses it.

    The batch comes with its schedule, as in a serving step: computed once for all layers, outside of what is timed.
    `scheduled=False` times the call that computes its own.
    """
    kind: Any = KINDS[case.op]
    args = kind.arguments(case)
    if not scheduled:
        args = tuple(dataclasses.replace(x, schedule=None) if isinstance(x, pa.RaggedBatch) else x for x in args)
    alone = backend in getattr(kind, "UNREGISTERED", ())  # kernels that no dispatch knows
    if alone and jax.default_backend() != "gpu":
        return f"{case.name:40s} {backend} refuses: not on {jax.default_backend()}"
    names = [str(backend)] if alone else []
    for op, given in () if alone else kind.calls(case, args):
        answers = pa.explain(op, *given, backend=backend)
        name = next((name for name, answer in answers.items() if answer == "chosen"), None)
        if name is None:
            return f"{case.name:40s} {backend} refuses: {answers.get(backend or '', 'there is no such backend')}"
        names.append(name)
    error, args = kind.check(case, args, backend)
    timed = timing.measure(kind.operation(case, backend), *args, repeat=repeat, carry=getattr(kind, "CARRY", False))
    return record.result(case, "+".join(dict.fromkeys(names)), timed, error)


def draw(args: argparse.Namespace) -> None:
    """Picture of a results file."""
    record.plot(record.read(args.file), args.out)
    print(args.out)


def search_configs(args: argparse.Namespace) -> None:
    """Tune one of the attention kernels."""
    from bench.tune import tune

    tune(args.op, args.case, args.processes)


def indexer_accuracy(args: argparse.Namespace) -> None:
    """Print the table of right answers."""
    from bench.indexer import accuracy

    accuracy.show(args.logs, args.length or accuracy.LENGTHS)


if __name__ == "__main__":
    main()
