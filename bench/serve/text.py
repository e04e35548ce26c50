"""The text: the first 90 % trains and calibrates, the last 10 % is held out for measuring and serving."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

CORPUS = Path(__file__).parent.parent / "corpus" / "new_testament_kjv.txt"
TRAINING_SHARE = 0.9


@cache
def _corpus() -> np.ndarray:
    return np.frombuffer(CORPUS.read_bytes(), np.uint8)


def training_text() -> np.ndarray:
    """The bytes the model learns from, uint8."""
    return _corpus()[: int(TRAINING_SHARE * len(_corpus()))]


def held_out_text() -> np.ndarray:
    """The bytes it never saw, uint8."""
    return _corpus()[int(TRAINING_SHARE * len(_corpus())) :]


def windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows of `length` bytes spread evenly over the text, uint8 [count, length]."""
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return text[starts[:, None] + np.arange(length)]


def printable(data: bytes) -> str:
    """Bytes as one line of text."""
    return data.decode("utf-8", "replace").replace("\n", " ")
