"""The selection as one Triton launch: a program a row, which it reads five times, whatever it holds."""

from pallas_attn.ops.sparse_indexer.topk.problem import Args, Problem, outputs, ranges
from pallas_attn.runtime.triton import power_of_two, triton_op

BLOCK = 4096  # columns that a program takes at once, at most


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {"no order by value: sorted=False": p.sorted, "an empty call": not p.rows}
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays, block: int | None = None):
    """The columns. block: columns at once."""
    args = Args(*arrays)
    starts, ends = (x[:, 0] for x in ranges(p, args))
    block = block or min(max(power_of_two(p.columns), 256), BLOCK)
    op = triton_op(
        "pallas_attn.ops.sparse_indexer.triton_topk:topk", out=outputs(p)[0], grid=p.rows,
        constants={"W": p.columns, "K": p.k, "BLOCK": block}, num_warps=max(block // 256, 1),
    )  # fmt: skip
    return (op(args.logits, starts, ends),)
