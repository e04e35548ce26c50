"""MLA as Triton kernels, for Ampere, Ada and Hopper: any batch, whole sequences or listed keys, any cache.

A program takes some query rows (a token and head each) of one sequence, or of one token that lists its keys, and a
share of the keys: all of them where there are rows enough to fill the GPU, else one of `splits`, which a second launch
merges. Cache and query meet in the 16 bits that hold both exactly: f16 for FP8 on FP8, else the type of the side that
is no FP8; FP8_DS_MLA rows are bf16. Rows of 32 bits would leave no registers for the results.

A result in floats, or in FP8 through a static scale, is rounded in the kernel; what is up-projected or quantised by
groups leaves it in f32, for XLA to finish.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_attn.core.formats import FP8_DS_MLA
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.ops.mla.terms import finish, tokens
from pallas_attn.runtime.triton import (
    KINDS,
    Config,
    Shape,
    kind,
    merge,
    operand,
    power_of_two,
    rounding,
    stored,
    triton_op,
)

_KERNELS = "pallas_attn.ops.mla.triton_kernels"
Q_GRANULARITIES = {"none": 0, "tensor": 1, "head": 2, "token_head": 3}
PARTS = 4  # of the latent in an FP8_DS_MLA row, each with a scale
MOST = 512, 128  # dims of the latent and of the rotary part
ROWS, KEYS = 32, 32  # of a program at most, of a tile
SMS = 132  # of the largest of these GPUs
MOST_SPLITS = 64


def supports(p: Problem) -> str | None:
    """None, or what of the problem these kernels cannot do."""
    refusals = {
        f"no latent of {p.latent_dim} with a rotary part of {p.rope_dim}": p.latent_dim > MOST[0]
        or p.rope_dim > MOST[1],
        f"no {p.q_format} query": p.q_format.granularity not in Q_GRANULARITIES or p.q_format.dtype == jnp.int8,
        f"no {p.q_format} query on a {p.kv_format} cache": operands(p).itemsize > 2,
        "an empty call": p.empty,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def choose(p: Problem) -> Config:
    """The configuration for a problem: the tile that fits into the registers of every generation, without spilling."""
    tokens = 1 if p.topk else min(p.max_q_len or -(-p.tokens // p.seqs), p.tokens)
    rows = min(max(power_of_two(tokens * p.heads), 16), ROWS)
    blocks = (p.tokens if p.topk else p.seqs) * -(-tokens * p.heads // rows)
    splits = 1
    while blocks * splits < SMS and splits < min(MOST_SPLITS, p.keys // (4 * KEYS)):
        splits *= 2
    return Config(rows, KEYS, splits, 8, 2)


def operands(p: Problem) -> np.dtype:
    """The type of the matrix unit's operands."""
    return operand(p.q_format.dtype, np.dtype(jnp.bfloat16) if p.kv_format == FP8_DS_MLA else p.kv_format.dtype)[0]


def run(p: Problem, *arrays, config: Config | None = None):
    """(out, the scales that are found, lse [T, H] if asked)."""
    args = Args(*arrays)
    config = config or choose(p)
    static = p.out_format is not None and p.out_format.dtype in KINDS and p.out_format.granularity == "tensor"
    whole = p.v_dim is None and (p.out_format is None or static)
    out, lse = attend(p, args, config, whole)
    if not whole:
        return finish(p, args, out, lse)
    if out.dtype != p.out_dtype:
        out = lax.bitcast_convert_type(out, p.out_dtype)
    return (out, lse) if p.return_lse else (out,)


def attend(p: Problem, args: Args, config: Config, whole: bool) -> tuple[Array, Array]:
    """(latents [T, H, C], lse [T, H]): as the call wants them if `whole`, else float32."""
    format, dtype = (p.out_format, p.out_dtype) if whole else (None, np.dtype(jnp.float32))
    result = Shape((p.tokens, p.heads, p.latent_dim), jnp.uint8 if kind(dtype) else dtype)
    lse, split = Shape(result.shape[:2], jnp.float32), config.splits > 1
    parts = Shape((config.splits, *result.shape), jnp.float32), Shape((2, config.splits, *lse.shape), jnp.float32)
    name, grid, own, extra = _listed(p, args, config) if p.topk else _sequences(p, args, config)
    inputs = _inputs(p, args)
    op = triton_op(
        f"{_KERNELS}:{name}", out=parts if split else (result, lse), grid=grid * config.splits,
        constants=_constants(p) | rounding(format) | own | {
            "BM": config.rows, "BN": config.keys, "SPLITS": config.splits
        }, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    out, stats = op(*inputs, *extra)
    if split:
        out, stats = merge(result, lse, format, config.splits, num_warps=8)(out, stats, inputs[-1])
    return out, stats


def _sequences(p: Problem, args: Args, config: Config):
    """(kernel, programs of a share, constants, inputs) where tokens see their sequences."""
    batch = args.batch
    bounds = (jnp.asarray(x, jnp.int32) for x in (batch.kv_lens, batch.cu_q_lens, jnp.atleast_1d(batch.live)))
    chunk = min(power_of_two(p.seqs + 2), 1024)
    return "attend", p.tokens * p.heads // config.rows + p.seqs + 2, {"B": p.seqs, "CHUNK": chunk}, [*bounds]


def _listed(p: Problem, args: Args, config: Config):
    """The same where tokens list their keys."""
    assert args.topk is not None
    who, lens = tokens(p, args), jnp.clip(args.batch.kv_lens, 0, p.pages_per_seq * p.page_size).astype(jnp.int32)
    own = {"KEYS": p.topk, "SLOTS": p.topk_slots}
    indices = args.topk.indices.astype(jnp.int32)
    return "attend_listed", p.tokens * -(-p.heads // config.rows), own, [indices, who.keys, who.seq, lens[who.seq]]


def _inputs(p: Problem, args: Args) -> list[jax.Array]:
    """The arrays that both kernels take first, in their order; a number stands for what is absent."""
    nothing, parts = jnp.zeros(1), (args.q_latent, args.q_rope)
    one = lambda x: nothing if x is None else jnp.reshape(x, (1,)).astype(jnp.float32)  # noqa: E731
    values = [stored(q.values if isinstance(q, Quantized) else q) for q in parts]
    scales = [jnp.atleast_1d(q.scale) if isinstance(q, Quantized) else nothing for q in parts]
    table = args.batch.page_table.astype(jnp.int32)
    # The rotary part may be empty, the page table too where slots are listed: pointers to nothing are not made.
    values, table = [x if x.size else jnp.zeros(1, x.dtype) for x in values], table if table.size else nothing
    cache = args.cache
    return [*values, *scales, stored(cache.pages), one(cache.scale), table, one(args.scale), one(args.out_scale)]


def _constants(p: Problem) -> dict[str, Any]:
    """Sizes, and how stored values become operands of the matrix unit."""
    rows = p.kv_format == FP8_DS_MLA
    return {
        "T": p.tokens, "H": p.heads, "C": p.latent_dim, "R": p.rope_dim, "CP": max(power_of_two(p.latent_dim), 16),
        "RP": max(power_of_two(p.rope_dim), 16), "N": p.pages, "M": p.pages_per_seq, "S": p.page_size,
        "PARTS": PARTS if rows else 0, "Q_SCALE": Q_GRANULARITIES[p.q_format.granularity],
        "Q_KIND": kind(p.q_format.dtype), "KV_SCALE": p.kv_format.granularity == "tensor",
        "KV_KIND": kind(p.kv_format.dtype), "OPERAND": operands(p),
    }  # fmt: skip
