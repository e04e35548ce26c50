"""The task: a log of writes (key, value); what is a key's value now?

A few common keys are overwritten again and again, so that only the latest of hundreds of writes is right: that takes
position. Rare keys are written once, anywhere: that takes content, over the whole length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

COMMON, RARE, USED, VALUES = 8, 120, 64, 64  # keys of each kind, rare ones in a log, values
KEYS = COMMON + RARE
QUERIES = 64  # of a log: half of common keys, half of rare ones


class Logs(NamedTuple):
    """B logs of n writes with their questions; int32."""

    keys: np.ndarray  # [B, n]
    values: np.ndarray  # [B, n]
    asked: np.ndarray  # [B, QUERIES] keys: first common, then rare
    answers: np.ndarray  # [B, QUERIES] values
    latest: np.ndarray  # [B, QUERIES] where the answer was written


def logs(rng: np.random.Generator, count: int, length: int) -> Logs:
    """Random logs."""
    return Logs(*(np.stack(x).astype(np.int32) for x in zip(*(_log(rng, length) for _ in range(count)), strict=True)))


def _log(rng: np.random.Generator, length: int) -> Logs:
    keys = rng.integers(0, COMMON, length)
    rare = COMMON + rng.permutation(RARE)[:USED]
    keys[rng.permutation(length)[:USED]] = rare
    values = rng.integers(0, VALUES, length)
    asked = np.concatenate([rng.integers(0, COMMON, QUERIES // 2), rng.permutation(rare)[: QUERIES // 2]])
    last = np.full(KEYS, -1)
    last[keys] = np.arange(length)  # of equal keys numpy keeps the last
    return Logs(keys, values, asked, values[last[asked]], last[asked])
