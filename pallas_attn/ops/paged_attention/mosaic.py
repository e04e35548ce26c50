"""Paged attention on Hopper: which kernels a step takes.

A step whose sequences have few query tokens each is decode: two launches. Any other is prefill, and its rows of few
tokens, which are known only on the device, go to the decode kernels: three launches, each of which passes over what is
not its own. A single sequence is left to the prefill kernel alone.
"""

import dataclasses

from pallas_attn.ops.paged_attention import mosaic_decode, mosaic_prefill
from pallas_attn.ops.paged_attention.problem import Problem


def supports(p: Problem) -> str | None:
    """None, or what of the problem the kernels cannot do."""
    return mosaic_decode.supports(p) and mosaic_prefill.supports(p)


def run(p: Problem, *arrays):
    """(out [T, H, DV], lse [T, H] if asked)."""
    if is_decode(p) and mosaic_decode.supports(p) is None:
        return mosaic_decode.run(p, *arrays)
    short = short_rows(p)
    if short is None:
        return mosaic_prefill.run(p, *arrays)
    results = mosaic_prefill.run(p, *arrays, few=short.max_q_len or 0)
    return mosaic_decode.run(short, *arrays, into=results)


def is_decode(p: Problem) -> bool:
    """Whether no sequence has more query tokens than the decode kernel takes."""
    return p.max_q_len is not None and p.max_q_len <= mosaic_decode.MOST_TOKENS


def short_rows(p: Problem) -> Problem | None:
    """The decode problem of a mixed step: sequences of as many tokens as fill 8 rows, or of one. None where it is not
    worth a launch, or not possible: then all are prefill."""
    if p.seqs == 1:
        return None
    problems = (dataclasses.replace(p, max_q_len=n) for n in (max(1, 8 // p.group), 1))
    return next((short for short in problems if mosaic_decode.supports(short) is None), None)
