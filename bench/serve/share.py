"""`python -m bench.serve.share [--backend NAME]`: how much of a GPU's time in a serving step is attention."""

import argparse
import tempfile
from pathlib import Path

import jax

from bench import timing
from bench.serve import model
from bench.serve.engine import Limits, Server
from bench.serve.quality import Workload
from bench.serve.variants import all_variants


def main() -> None:
    """Serves a few requests twice, the second time under the profiler."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve.share", description=__doc__)
    parser.add_argument("--backend", default="mosaic")
    parser.add_argument("--format", default="E4M3_TENSOR")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("no GPU here: there is no timeline to read")
    config, params = model.Config(), model.load()
    variant = next(v for v in all_variants(params, config, args.backend) if v.name == args.format)
    server = Server(params, variant, config, Limits())
    server.warm_up()
    stats = server.serve(Workload(requests=8).traffic())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps = server.serve(Workload(requests=8).traffic()).steps
        (trace,) = Path(folder).rglob("*.xplane.pb")
        found = timing.kernels(jax.profiler.ProfileData.from_file(str(trace)))
    every, ours = (sum(k.end - k.start for k in found if k.mosaic or all_) / 1e3 / steps for all_ in (True, False))
    print(
        f"{args.format}, {args.backend}: {stats.tokens_per_second:,.0f} tokens/s in {stats.steps} steps; kernels "
        f"{every:.0f} us a step, attention and cache writes {ours:.0f} us of it ({ours / every:.0%})"
    )


if __name__ == "__main__":
    main()
