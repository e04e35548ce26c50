"""Rotation, Hadamard matrix and quantisation one after the other: the portable backend."""

from pallas_attn.core.quantized import quantize, take_apart
from pallas_attn.ops.sparse_indexer.rope.problem import Args, Problem
from pallas_attn.ops.sparse_indexer.turns import hadamard, rotate


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales)."""
    x, cos, sin = Args(*arrays)
    y = rotate(x, cos, sin, p.interleaved)
    return take_apart(quantize(hadamard(y) if p.hadamard else y, p.format), False)
