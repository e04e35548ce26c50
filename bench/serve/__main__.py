"""`python -m bench.serve`: serve the model with every KV format, then report what each costs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from bench.serve import model
from bench.serve.display import Display
from bench.serve.engine import Limits
from bench.serve.quality import Bench, Workload, Yardstick
from bench.serve.report import Report, comparison_table, format_table, serving, write
from bench.serve.variants import all_variants

OUT = Path(__file__).parent.parent / "out"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--backend", help="backend of the attention and the cache write (default: the library chooses)")
    parser.add_argument("--format", nargs="+", metavar="NAME", help="only these variants, by name or its beginning")
    parser.add_argument("--requests", type=int, default=Workload.requests)
    parser.add_argument("--quick", action="store_true", help="a few requests and little text")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def run(args: argparse.Namespace, console: Console) -> Report:
    """Measures every chosen variant."""
    start = time.monotonic()
    work = Workload(requests=min(args.requests, 6), windows=4) if args.quick else Workload(args.requests)
    config, limits, params = model.Config(), Limits(), model.load()
    with Display(console) as display:
        display.phase("calibrating")
        variants = all_variants(params, config, args.backend)
        if args.format:
            variants = [v for v in variants if v.name.startswith(tuple(args.format))]
        if not variants:
            raise SystemExit(f"no variant is called {' or '.join(args.format)}")
        yardstick = Yardstick(params, config)
        bench, results = Bench(params, config, limits, work, yardstick, display), []
        dense = yardstick.nats(work.passages(config))
        for i, variant in enumerate(variants, 1):
            display.phase(variant.name, f"{i} of {len(variants)}")
            results.append(bench.measure(variant))
            done = results[-1]
            speed = f"{done.stats.tokens_per_second:,.0f} tokens/s"
            display.line(f"{i:2d}/{len(variants)} {variant.name}: {done.bits:.4f} bits per byte, {speed}")
    return Report(results, dense, work, limits, time.monotonic() - start)


def main() -> None:
    """Runs, writes the report and prints its tables."""
    args, console = arguments(), Console(highlight=False)
    report = run(args, console)
    text, plot = write(report, args.out)
    tables = [serving(report), format_table(report), comparison_table(report)]
    for table in tables if report.comparisons else tables[:2]:
        console.print(Markdown(table) if console.is_terminal else table, soft_wrap=not console.is_terminal)
        console.print()
    console.print(f"{text} and {plot.name}, after {report.seconds:.0f} s")


if __name__ == "__main__":
    main()
