"""The gather as one XLA gather of bytes: the portable backend."""

from pallas_attn.ops.sparse_indexer.gather.problem import Args, Problem, only_real, rows, spans


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales, cu_lens)."""
    args = Args(*arrays)
    first, cu_lens = spans(p, args)
    page, slot, real = rows(p, args, first, cu_lens)
    return (*only_real(*args.cache.read_slots(page, slot), real), cu_lens)
