"""Tuned configurations of the Hopper kernels: what `python -m bench tune` found fastest, by kind and size of task."""

import functools
import json
import math
from importlib import resources

FAR_APART = 4.0  # factors of two, all sizes together, beyond which a tuned entry says nothing


def nearest(table: str, key: list, sizes: dict[str, int]) -> list | None:
    """The configuration of the entry for this kind of problem whose sizes are nearest, if any is near."""

    def distance(entry: dict) -> float:
        return sum(abs(math.log2(max(size, 1) / entry[name])) for name, size in sizes.items())

    near = [e for e in entries(table) if e["key"] == key and distance(e) <= FAR_APART]
    return min(near, key=distance)["config"] if near else None


@functools.cache
def entries(table: str) -> list[dict]:
    """All entries of a table: key, sizes, configuration, and microseconds when it was found."""
    return json.loads(resources.files(__package__).joinpath(f"tables/{table}.json").read_text())
