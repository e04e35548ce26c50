"""The gather as one XLA gather of bytes: the portable backend."""

from pallas_attn.ops.sparse_indexer.gather.problem import Args, Problem, only_real, sources


def supports(p: Problem) -> str | None:
    """The portable backend takes every problem."""
    return None


def run(p: Problem, *arrays):
    """(values, scales, cu_lens)."""
    args = Args(*arrays)
    where, cu_lens = sources(p, args)
    return (*only_real(*args.cache.read_slots(where.page, where.slot), where.real), cu_lens)
