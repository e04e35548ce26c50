"""Logits over cached keys on Hopper: up to 8 query tokens a sequence, at the speed of the memory, by one launch.

The columns of all sequences are one flat list of units of work: first a sequence's tiles of cached keys, then, row by
row, stretches of -inf behind them, each about as long to write as a tile is to read. The list is cut evenly between
CTAs of one warpgroup, several on an SM, whatever the lengths. Per tile, tokens being the long side of the product:

    S^T = K Q^T                             FP8 x FP8, for one query token after the other
    z = s sum_h (w_h s_h scale) relu(S^T)   along the rows of the accumulator: inside a warp

A page's values and scales come by one copy each, out of the page's bytes as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.narrow import clamped
from pallas_attn.ops.sparse_indexer.mosaic_paged_worker import FILL_TILES, Worker, most_rows
from pallas_attn.ops.sparse_indexer.mosaic_parts import DIM, key_ring, no_queries, query_scale
from pallas_attn.ops.sparse_indexer.paged_logits.problem import Args, Problem
from pallas_attn.runtime.mosaic import SHARED, SMS, swizzled

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
MOST_SEQS = 4096  # their units stay in registers
FEW_TILES = 5  # of 64 tokens, of a worker


class Config(NamedTuple):
    """tile: tokens of a step. stages: tiles in flight. ctas: CTAs that share an SM, of which all are to fit: what waits
    for another to end is late where sequences are of many lengths."""

    tile: int = 128
    stages: int = 2
    ctas: int = 4


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = no_queries(p.q_format, p.heads, p.head_dim, 8) | {
        "it needs batch.max_q_len <= 8": not 0 < (p.max_q_len or 9) <= 8,
        f"no {p.layout} layout, whose rows the matrix unit cannot read": p.layout.tiled,
        f"no pages of {p.page_size}": p.page_size != 32 and p.page_size % 64 != 0,
        f"more than {MOST_SEQS} sequences": p.seqs > MOST_SEQS,
        "an empty call": not p.tokens or not p.seqs,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def choose(p: Problem) -> Config:
    """Big tiles where there is much to read, small ones where every worker has a few."""
    room = min(p.pages_per_seq * p.page_size, p.max_len)
    few = p.seqs * -(-room // 64) < FEW_TILES * 4 * SMS
    tile, stages, ctas = (64, 4, 4) if few else (128, 2, 3 if most_rows(p) == 1 else 4)
    return Config(tile, stages, max(min(ctas, SHARED // shared_bytes(p, Config(tile, stages))), 1))


def run(p: Problem, *arrays, config: Config | None = None, early: bool = False):
    """The logits. early: start beside the kernel before this one and wait for it; let the next one do the same."""
    config = config or choose(p)
    leaves, tree = jax.tree.flatten(inputs_of(p, Args(*arrays)))
    room = min(p.pages_per_seq * p.page_size, p.max_len)
    tiles = -(-p.max_len // config.tile)
    units = p.seqs * -(-room // config.tile) + p.tokens * -(-tiles // FILL_TILES)
    workers = min(SMS * config.ctas, units)

    def paged_logits(*refs, **scratch):
        if early:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        x = jax.tree.unflatten(tree, refs[: len(leaves)])
        scratch["rowwise"], scratch["keys"] = scratch["keys"] if INTERPRET is None else [scratch["keys"]] * 2
        Worker(p, config, workers, x, refs[-1], **scratch).run()

    kernel = plgpu.kernel(
        paged_logits, out_type=jax.ShapeDtypeStruct((p.tokens, p.max_len), jnp.float32),
        grid=(workers,), grid_names=("worker",), scratch_types=scratch_of(p, config),
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=INTERPRET,
    )  # fmt: skip
    return (kernel(*leaves),)


def inputs_of(p: Problem, args: Args) -> dict[str, Any]:
    """What the kernel reads, by name. A page's bytes are seen as rows of values and, once more, as scales."""
    batch, bytes_ = args.batch, args.cache.pages
    lines = p.page_size * (DIM + 4)
    return {
        "q": args.q.values,  # type: ignore[union-attr]
        "q_scale": query_scale(args.q),  # type: ignore[arg-type]
        "weights": args.weights,
        "scale": args.scale.reshape(1),
        "values": lax.bitcast_convert_type(bytes_.reshape(p.pages, lines // DIM, DIM), p.format.dtype),
        "scales": lax.bitcast_convert_type(bytes_.reshape(p.pages, lines // 4, 4), jnp.int32),
        "table": clamped(batch.page_table, p.pages - 1),
        "kv_lens": clamped(batch.kv_lens, p.pages_per_seq * p.page_size),
        "starts": clamped(batch.cu_q_lens, p.tokens),
        "row_lens": None if args.row_lens is None else clamped(args.row_lens, p.max_len),
        "live": None if batch.num_seqs is None else clamped(jnp.asarray(batch.num_seqs), p.seqs).reshape(1),
    }


def scratch_of(p: Problem, config: Config) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    rows, (tile, stages, _), stored = most_rows(p), config, p.format.dtype
    parts = max(tile // p.page_size, tile // 64)
    return {
        "queries": plgpu.SMEM((rows, p.heads, DIM), stored, transforms=swizzled(stored, DIM)),
        "keys": key_ring(stages, tile, INTERPRET is not None),
        "key_scales": plgpu.SMEM((stages, tile), jnp.int32),
        "factors": plgpu.SMEM((rows, p.heads), jnp.float32),
        "line": plgpu.SMEM((tile,), jnp.float32),
        "units": plgpu.SMEM((-(-(p.seqs + 1) // 128) * 128,), jnp.int32),
        "q_here": plgpu.Barrier(num_arrivals=rows),
        "here": plgpu.Barrier(num_arrivals=2 * parts, num_barriers=stages),
    }


def shared_bytes(p: Problem, config: Config) -> int:
    """Shared memory that one CTA takes from its SM: every array begins at a multiple of 1024."""
    rows, (tile, stages, _) = most_rows(p), config
    arrays = (
        rows * p.heads * DIM,
        stages * tile * DIM,
        stages * tile * 4,
        rows * p.heads * 4,
        tile * 4,
        4 * p.seqs + 512,
    )
    reduction, barriers, driver = 2048, 1024, 1024
    return sum(-(-a // 1024) * 1024 for a in arrays) + reduction + barriers + driver
