"""Writes the measurements as markdown and draws them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from tabulate import tabulate

from bench.serve.engine import Limits
from bench.serve.quality import Result, Workload, bits_per_byte
from bench.serve.text import printable

GOOD, QUERY, BAD, GREY = "#2a7f62", "#3b6ea8", "#b8412f", "#777777"
SAMPLE = 72  # bytes of a continuation that are shown

DEFINITIONS = """\
* **bits per byte**: of held-out text, fed through the paged cache in chunks. **loss**: against the dense float32 model;
  noise in the cache can fall on the lucky side. **change of a byte**: mean magnitude of the change in a byte's bits.
* **greedy match**: share of the served tokens that are the dense model's greedy choice after the same preceding tokens.
  **same prefix**: mean share of a request's new tokens before it first leaves the dense model's own continuation.
* **bytes/token**: of the cache, all layers, scales included. **tokens/s**: tokens generated per second of serving,
  compilation apart."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured in a run. dense: the float32 model's nats, as `Result.nats`."""

    results: list[Result]
    dense: np.ndarray
    work: Workload
    limits: Limits
    seconds: float

    @property
    def formats(self) -> list[Result]:
        """The plain KV formats."""
        return [result for result in self.results if result.variant.against is None]

    @property
    def comparisons(self) -> list[tuple[Result, Result]]:
        """Each other variant, with the one that it differs from in one thing."""
        by_name = {result.variant.name: result for result in self.results}
        return [(r, by_name[r.variant.against]) for r in self.results if r.variant.against in by_name]

    @property
    def dense_bits(self) -> float:
        """Bits per byte of the dense model."""
        return bits_per_byte(self.dense)

    def loss(self, result: Result) -> float:
        """Bits per byte lost against the dense model."""
        return result.bits - self.dense_bits

    def change(self, result: Result) -> float:
        """Mean magnitude of the change in a byte's bits against the dense model."""
        return bits_per_byte(np.abs(result.nats - self.dense))


def format_table(report: Report) -> str:
    """The table of KV formats."""
    rows = [["dense float32", f"{report.dense_bits:.4f}", *[""] * 6]]
    rows += [
        [
            result.variant.name, f"{result.bits:.4f}", f"{report.loss(result):+.5f}", f"{report.change(result):.5f}",
            f"{result.matching():.1%}", f"{result.prefix:.1%}", f"{result.bytes_per_token:,.0f}",
            f"{result.stats.tokens_per_second:,.0f}",
        ]
        for result in report.formats
    ]  # fmt: skip
    headers = ["KV format", "bits per byte", "loss", "change of a byte", "greedy match", "same prefix"]
    headers += ["bytes/token", "tokens/s"]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left", *["right"] * 7))


def comparison_table(report: Report) -> str:
    """The table of FP8 queries and of bugs."""
    rows = [
        [
            ("bug: " if result.variant.bug else "") + result.variant.name, base.variant.name, f"{result.bits:.4f}",
            f"{result.bits - base.bits:+.5f}", f"{report.change(base):.5f}", f"{report.change(result):.5f}",
            f"{base.matching(len(result.served)):.1%}", f"{result.matching():.1%}",
        ]
        for result, base in report.comparisons
    ]  # fmt: skip
    headers = ["variant", "against", "bits per byte", "lost", "change of a byte: before", "after"]
    headers += ["greedy match: before", "after"]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left", "left", *["right"] * 6))


def samples(report: Report) -> str:
    """The continuation of one request by every variant."""
    shown = report.results[0].served[0]
    rows = [[r.variant.name, f"`{printable(r.served[0].output)[:SAMPLE]}`"] for r in report.results]
    prompt = printable(shown.prompt)[-SAMPLE:]
    return f"A prompt that ends `{prompt}` goes on:\n\n" + tabulate(rows, ["variant", "greedy"], "pipe")


def serving(report: Report) -> str:
    """What the engine did, in words: the first variant's run stands for all, for their schedules are the same."""
    first, limits = report.results[0], report.limits
    stats, handed_out = first.stats, sum(request.pages_used for request in first.served)
    alone = report.work.alone * len(report.formats)
    disturbed = sum(result.disturbed for result in report.results)
    return (
        f"{len(first.served)} requests of held-out text ({stats.fed:,} tokens fed, {stats.generated:,} generated) ran "
        f"in {stats.steps} steps of at most {limits.sequences} sequences and {limits.tokens} tokens; "
        f"{stats.mixed_steps} steps mixed prompt chunks with decoding. {handed_out} pages of {limits.page_size} tokens "
        f"were handed out, at most {stats.peak_pages} of {limits.pages} at a time: each was used "
        f"{handed_out / stats.peak_pages:.1f} times over. {alone - disturbed} of {alone} requests served again alone, "
        "with the same padded shapes and chunks, got the same tokens."
    )


def markdown(report: Report, plot: str) -> str:
    """The whole report."""
    work = report.work
    return f"""\
# Serving from a paged KV cache

{serving(report)}

## KV formats

{format_table(report)}

{DEFINITIONS}

## FP8 queries, and what three bugs would cost

Each variant against the one that it differs from in one thing, on {min(work.compared, work.requests)} of the requests.
Each bug was once in a serving system; here it is emulated outside the library, on the same model and text: an FP8 query
whose scale is dropped; keys and values rounded to FP8 once more after they were dequantised; a scale of 1 in place of
the layer's own.

{comparison_table(report)}

## A sample

{samples(report)}

![the measurements]({plot})

jax {jax.__version__} on {jax.devices()[0].device_kind} ({platform.machine()}), {report.seconds:.0f} s in all, of which
{sum(result.compile_seconds for result in report.results):.0f} s compiled the steps.
"""


def draw(report: Report, path: Path) -> None:
    """Four panels: change, agreement, memory and speed, and the engine over time."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    figure.suptitle("A byte-level language model served from a paged KV cache", fontsize=14)
    kinds = {"KV format": GOOD, "the same, FP8 query": QUERY, "emulated bug": BAD}
    handles = [Patch(color=kind_colour, label=kind) for kind, kind_colour in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    draw_change(axes[0, 0], report)
    draw_agreement(axes[0, 1], report)
    draw_memory(axes[1, 0], report)
    draw_timeline(axes[1, 1], report)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def colour(result: Result) -> str:
    """By kind: a KV format, one with FP8 queries, or a bug."""
    return BAD if result.variant.bug else QUERY if result.variant.how.query else GOOD


def bars(axes: Axes, results: list[Result], values: list[float], labels: list[str]) -> None:
    """Horizontal bars, the first on top."""
    names = [result.variant.name for result in results]
    drawn = axes.barh(names, values, color=[colour(result) for result in results])
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def draw_change(axes: Axes, report: Report) -> None:
    """How much a byte's bits change, on a logarithmic axis: bugs and formats are orders of magnitude apart."""
    changes = [report.change(result) for result in report.results]
    labels = [f"{report.loss(result):+.4f}" for result in report.results]
    bars(axes, report.results, changes, labels)
    axes.set_xscale("log")
    axes.set_xlim(0.3 * min(changes), 8 * max(changes))
    title = "Change of a byte's bits against dense float32, mean magnitude"
    axes.set_title(f"{title}\n(numbers: loss on its {report.dense_bits:.3f} bits per byte)")


def draw_agreement(axes: Axes, report: Report) -> None:
    """Greedy match, with the same-prefix share marked in each bar."""
    values = [100 * result.matching() for result in report.results]
    bars(axes, report.results, values, [f"{value:.1f} %" for value in values])
    prefixes = [100 * result.prefix for result in report.results]
    axes.plot(prefixes, range(len(values)), "D", color="black", ms=4, ls="none")
    axes.set_xlim(0, 115)
    axes.set_title("Tokens equal to the dense model's greedy choice\n(diamond: same prefix, mean share)")
    axes.set_yticks([])


def draw_memory(axes: Axes, report: Report) -> None:
    """Bytes per cached token, and the speed next to them."""
    values = [result.bytes_per_token for result in report.formats]
    speeds = [result.stats.tokens_per_second for result in report.formats]
    labels = [f"{value:,.0f} B, {speed:,.0f} tokens/s" for value, speed in zip(values, speeds, strict=True)]
    bars(axes, report.formats, values, labels)
    axes.set_xlim(0, 1.45 * max(values))
    axes.set_title("Cache bytes per token, and speed of serving")


def draw_timeline(axes: Axes, report: Report) -> None:
    """Running and waiting requests and pages in use, step by step."""
    first = report.results[0]
    running, waiting, pages = zip(*first.stats.timeline, strict=True)
    steps = range(len(running))
    axes.step(steps, running, color=GOOD, label="running")
    axes.step(steps, waiting, color=BAD, label="waiting")
    axes.set(xlabel="engine step", ylabel="requests", title="Continuous batching, step by step")
    axes.set_ylim(0, 1.25 * max(1, *running, *waiting))
    right = axes.twinx()
    right.fill_between(steps, pages, color=GREY, alpha=0.25, step="post", label="pages in use")
    right.set(ylabel="pages", ylim=(0, 1.25 * report.limits.pages))
    axes.legend(loc="upper left", fontsize=8)
    right.legend(loc="upper right", fontsize=8)


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes serve.md and serve.png into the folder and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, plot = folder / "serve.md", folder / "serve.png"
    text.write_text(markdown(report, plot.name))
    draw(report, plot)
    return text, plot
