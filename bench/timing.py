"""How long an op takes: on a GPU from its first kernel's start to its last one's end, by CUPTI, with a cold L2."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Twenty times the L2 of an H100; reading it takes longer than the host needs to launch the call behind it, so that gaps
# between the call's kernels are the device's own, as in the middle of a step.
FLUSH_BYTES = 1 << 30


class Timing(NamedTuple):
    """Medians over the calls: span from first start to last end, sum of the kernels alone, kernels of one call, and the
    sum of those that are not Mosaic kernels (None where none is)."""

    us: float
    kernel_sum_us: float | None
    launches: int | None
    outside_us: float | None = None


class Kernel(NamedTuple):
    """One kernel or copy on the device's timeline, in nanoseconds; `op` is the instruction of XLA's that it is of."""

    start: float
    end: float
    flush: bool
    mosaic: bool = False
    name: str = ""
    op: str = ""


def measure(fn: Callable, *args, repeat: int = 11, carry: bool = False) -> Timing:
    """The time of one call of `fn`, jitted here unless compiled already.

    carry: the first argument is donated, and what `fn` returns first takes its place in the next call: a cache that is
      updated in place.
    """
    op = fn if isinstance(fn, jax.stages.Compiled) else jax.jit(fn, donate_argnums=0 if carry else ())
    now = list(args)

    def call() -> None:
        out = jax.block_until_ready(op(*now))
        if carry:
            now[0] = out[0]

    return measure_call(call, repeat)


def measure_call(call: Callable[[], object], repeat: int = 11) -> Timing:
    """The time of `call`, which returns when its work is done, after warming up; on a CPU by the host's clock."""
    for _ in range(3):
        call()
    return _on_gpu(call, repeat) if jax.default_backend() == "gpu" else _on_cpu(call, repeat)


def _on_cpu(call: Callable[[], object], repeat: int) -> Timing:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return Timing(statistics.median(times), None, None)


def _on_gpu(call: Callable[[], object], repeat: int) -> Timing:
    return summarize(trace(call, repeat))


def trace(call: Callable[[], object], repeat: int) -> list[list[Kernel]]:
    """The kernels of each of so many calls, the L2 cold before each."""
    flush, junk = jax.jit(flush_l2), jnp.ones(FLUSH_BYTES // 4, jnp.float32)
    jax.block_until_ready(flush(junk))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeat):
                flush(junk)
                call()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        calls = split(kernels(data))
    if len(calls) != repeat:
        raise RuntimeError(f"the trace shows {len(calls)} calls instead of {repeat}")
    return calls


def flush_l2(x: jax.Array) -> jax.Array:
    """Reads more than the cache holds. A flush that writes would leave the cache full of what memory has yet to get:
    its write-back, about 10 us on an H100, would count as the op's."""
    return jnp.max(x)


def kernels(data: Any) -> list[Kernel]:
    """Everything that ran on the first GPU's streams, in order of start."""
    found = []
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats, end = dict(event.stats), event.start_ns + event.duration_ns
                module, op = (str(stats.get(key, "")) for key in ("hlo_module", "hlo_op"))
                flush, mosaic = "flush_l2" in module, "mosaic" in event.name
                found.append(Kernel(event.start_ns, end, flush, mosaic, event.name, op))
    return sorted(found)


def split(timeline: Iterable[Kernel]) -> list[list[Kernel]]:
    """The kernels of each call: what stands between one flush and the next."""
    calls: list[list[Kernel]] = []
    fresh = True
    for kernel in timeline:
        if kernel.flush:
            fresh = True
            continue
        if fresh:
            calls.append([])
            fresh = False
        calls[-1].append(kernel)
    return calls


def summarize(calls: list[list[Kernel]]) -> Timing:
    """Medians over the calls, in microseconds."""
    spans = [(max(k.end for k in call) - call[0].start) / 1e3 for call in calls]
    sums = [sum(k.end - k.start for k in call) / 1e3 for call in calls]
    outside = [sum(k.end - k.start for k in call if not k.mosaic) / 1e3 for call in calls]
    any_mosaic = any(k.mosaic for call in calls for k in call)
    return Timing(
        statistics.median(spans), statistics.median(sums), int(statistics.median(map(len, calls))),
        statistics.median(outside) if any_mosaic else None,
    )  # fmt: skip
