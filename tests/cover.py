"""Small sets of cells: those in which every two values of any two lists meet, those that are run every time."""

import itertools

import numpy as np
import pytest


def pairwise(lists, possible=lambda cell: True, tries=40):
    """Tuples of one value from each list, fewest first come, that together hold every possible pair; deterministic."""
    rng = np.random.default_rng(0)
    sizes = [len(x) for x in lists]
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(lists)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    cells = []
    while missing:
        i, a, j, b = min(missing)
        tried = []
        for _ in range(tries):
            cell = [int(rng.integers(n)) for n in sizes]
            cell[i], cell[j] = a, b
            held = {(m, cell[m], n, cell[n]) for m, n in itertools.combinations(range(len(lists)), 2)}
            tried.append((held & missing, cell))
        tried.sort(key=lambda x: -len(x[0]))
        values = (tuple(x[k] for x, k in zip(lists, cell, strict=True)) for _, cell in tried)
        best = next(((new, v) for (new, _), v in zip(tried, values, strict=True) if possible(v)), None)
        if best is None:  # nothing possible holds this pair
            missing.discard((i, a, j, b))
            continue
        missing -= best[0]
        cells.append(best[1])
    return cells


def some_slow(cells, *slow):
    """The cells as pytest's parameters, those of these numbers marked `slow`."""
    return [pytest.param(c, marks=pytest.mark.slow) if i in slow else c for i, c in enumerate(cells)]
