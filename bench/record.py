"""Results: one line a case for people, one JSON object a line for machines, and a picture."""

import dataclasses
import datetime
import json
import os
import subprocess
from pathlib import Path

import jax
from matplotlib.figure import Figure

from bench.shape import Shape
from bench.timing import Timing

HERE = Path(__file__).parent
RESULTS, OUT = HERE / "results", HERE / "out"


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured case. Times in microseconds; rel_err is relative L2 to float32 on the stored values (of a write: of
    the stored codes to the portable ones); outside_us is the time of kernels that are not the library's."""

    case: str
    backend: str
    layout: str
    device: str
    us: float
    kernel_sum_us: float | None
    floor_us: float
    frac_of_floor: float
    gbps: float
    tflops: float
    rel_err: float
    best_peer_us: float | None
    launches: int | None
    jax: str
    commit: str
    date: str
    outside_us: float | None = None

    def line(self) -> str:
        """For people."""
        peer = f"{self.best_peer_us / self.us:5.2f} x best peer" if self.best_peer_us else "no peer"
        inside = f"kernels {self.kernel_sum_us:9.1f} us in {self.launches}" if self.kernel_sum_us is not None else ""
        if self.outside_us is not None and self.kernel_sum_us:
            inside += f", {self.outside_us / self.kernel_sum_us:.1%} of it outside of the library's"
        return (
            f"{self.case:40s} {self.backend:9s} {self.us:10.1f} us  {self.gbps:7.0f} GB/s {self.tflops:7.1f} TFLOP/s  "
            f"{self.frac_of_floor:6.3f} of floor  {peer}  error {self.rel_err:.1e}  {inside}"
        )


def result(case: Shape, backend: str, timing: Timing, rel_err: float) -> Result:
    """What one measurement says of a case. The floor is that of an H100, wherever it ran."""
    peer = case.best_peer
    return Result(
        case.name, backend, case.layout.name, jax.devices()[0].device_kind, round(timing.us, 2),
        None if timing.kernel_sum_us is None else round(timing.kernel_sum_us, 2), round(case.floor_us, 2),
        round(case.floor_us / timing.us, 4), round(case.bytes / timing.us / 1e3, 1),
        round(case.flops / timing.us / 1e6, 2), float(f"{rel_err:.3g}"), peer[1] if peer else None,
        timing.launches, jax.__version__, commit(), datetime.date.today().isoformat(),
        None if timing.outside_us is None else round(timing.outside_us, 2),
    )  # fmt: skip


def commit() -> str:
    """The commit this ran at, with a `+` where files had changed; "unknown" outside a checkout."""
    if "BENCH_COMMIT" in os.environ:  # where the tree was copied without its history
        return os.environ["BENCH_COMMIT"]
    git = lambda *args: subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True)  # noqa: E731
    head = git("rev-parse", "--short", "HEAD")
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if git("status", "--porcelain").stdout.strip() else "")


def append(r: Result, folder: Path = RESULTS) -> Path:
    """Add to <folder>/<device>.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (r.device.lower().replace(" ", "_") + ".jsonl")
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(r)) + "\n")
    return path


def read(path: Path) -> list[Result]:
    """The newest result of each (case, backend) in a file."""
    rows = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return list({(r.case, r.backend): r for r in rows}.values())


def plot(results: list[Result], path: Path) -> None:
    """Share of the floor's speed by case, the best peer's beside it."""
    results = sorted(results, key=lambda r: r.case, reverse=True)
    height = 0.3 * len(results) + 1.2
    figure = Figure(figsize=(9, height), layout="constrained")  # no pyplot: notebooks import this module
    axis = figure.subplots()
    rows = range(len(results))
    axis.barh(rows, [r.frac_of_floor for r in results], color="#2b7f5f", height=0.6, label="pallas_attn")
    peers = [(i, r.floor_us / r.best_peer_us) for i, r in enumerate(results) if r.best_peer_us]
    axis.plot([x for _, x in peers], [i for i, _ in peers], "k|", markersize=12, label="best peer")
    axis.axvline(0.88, color="0.6", linestyle=":", label="streaming ceiling, 2.95 TB/s")
    axis.set_yticks(list(rows), [f"{r.case} ({r.backend})" for r in results], fontsize=8)
    axis.set(xlim=(0, 1), xlabel=f"floor time / time, on {results[0].device}")
    axis.legend(loc="lower right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
