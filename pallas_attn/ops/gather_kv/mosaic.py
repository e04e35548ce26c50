"""The gather on Hopper: pages to contiguous keys and values by one launch.

`runtime/mosaic_packed.py` tells who gathers what. A tile comes by TMA, goes through registers, where its numbers take
their scale, and leaves by TMA for its rows of the result, whole, or row by row at the ends of a sequence: no copy
writes what another sequence owns.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.ops.gather_kv.mosaic_plan import height_of, plan, runs
from pallas_attn.ops.gather_kv.mosaic_worker import Worker
from pallas_attn.ops.gather_kv.problem import Args, Problem
from pallas_attn.runtime.mosaic import SMS
from pallas_attn.runtime.mosaic_packed import MOST_SEQS, padded, where

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
ALIGNED = 128  # bytes: where a copy may begin in shared memory


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    dims = (p.head_dim, p.v_head_dim)
    refusals = {
        f"no {p.layout} layout": p.layout.blocked,
        f"no head dims {dims}": any(d % 16 for d in dims) or max(dims) > 256,
        f"no {p.format} cache": p.format.granularity == "group",
        f"no {p.layout} pages of {p.page_size} with head dims {dims}": not _aligned(p),
        f"more than {MOST_SEQS} sequences": p.seqs > MOST_SEQS,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def _aligned(p: Problem) -> bool:
    """Whether all copies, whole tiles' and single rows', begin where they may in shared memory."""
    cut, dim = plan(p), math.gcd(p.head_dim, p.v_head_dim)
    stored, result = dim * p.format.dtype.itemsize, dim * p.dtype.itemsize
    to = [r.to * stored for part in range(cut.parts(p)) for r in runs(p, cut, 0, 0, part)]
    single = result if p.layout.head_major else cut.heads * result
    return all(at % ALIGNED == 0 for at in (*to, single))


def run(p: Problem, *arrays):
    """(k, v, cu_lens)."""
    cut, dims = plan(p), (p.head_dim, p.v_head_dim)
    leaves, tree = jax.tree.flatten(_inputs(p, Args(*arrays)))
    # As rows too; head-major rows of one head stay apart.
    lead = (p.max_tokens, p.kv_heads) if p.layout.head_major else (p.max_tokens * p.kv_heads,)
    out_type = [jax.ShapeDtypeStruct((*lead, d), p.dtype) for d in dims]
    out_type.append(jax.ShapeDtypeStruct((p.seqs + 1,), jnp.int32))
    height = height_of(cut.tokens * cut.heads)
    copies = len(runs(p, cut, 0, 0, 0)) * cut.parts(p)
    scratch = [
        [plgpu.SMEM((cut.stages, height, d), p.format.dtype) for d in dims],
        [plgpu.SMEM((height, d), p.dtype) for d in dims],
        plgpu.SMEM((2, padded(p.seqs)), jnp.int32),
        plgpu.SMEM((2, height), jnp.float32),
        plgpu.Barrier(num_arrivals=copies, num_barriers=2 * cut.stages),
    ]
    groups = -(-p.kv_heads // cut.heads)
    workers = max(min(SMS * cut.ctas // groups, -(-p.max_tokens // cut.tokens) + p.seqs), 1)

    def gather_kv(*refs):
        ins, rest = refs[: len(leaves)], refs[len(leaves) :]
        ring, tile, lens, row_scale, ready = rest[3:]
        Worker(
            p, cut, workers, jax.tree.unflatten(tree, ins), rest[2], lens, rest[:2], ring, tile, row_scale, ready
        ).run()

    k, v, cu_lens = plgpu.kernel(
        gather_kv, out_type=out_type, grid=(workers, groups), grid_names=("worker", "group"),
        scratch_types=scratch, interpret=INTERPRET,
    )(*leaves)  # fmt: skip
    shaped = [x.reshape(p.max_tokens, p.kv_heads, d) for x, d in zip((k, v), dims, strict=True)]
    return (*shaped, cu_lens)


def _inputs(p: Problem, args: Args) -> dict[str, Any]:
    """What the kernel reads, by name. A page is rows, one for each (slot, head) or (head, slot); its scales per token
    and head lie alike."""
    scales = list(args.cache.scales or ())
    if p.format.granularity == "token_head":
        scales = [s.reshape(p.pages, -1) for s in scales]
    return where(p, args.page_table, args.kv_lens, args.starts, args.num_seqs) | {
        "pages": [x.reshape(p.pages, p.page_size * p.kv_heads, -1) for x in args.cache.buffers],
        "scales": [s if s.ndim else s.reshape(1) for s in scales],
    }
