"""Paged attention as Triton kernels, for Ampere, Ada and Hopper: any batch, any page size, every option.

A program takes a block of query tokens of one sequence with all query heads of a kv head, and a share of the keys:
all of them where there are blocks enough to fill the GPU, else one of `splits`, which a second launch merges. Products
are the matrix unit's, in a type that holds both sides:

    cache        query                  K and Q         V and P
    FP8          FP8 of the same type   as they are     f16, which holds every FP8 code (Ada and Hopper)
    FP8, INT8    any other              f16; a wider query's rows are divided by their largest magnitude first
    f16          any                    f16, likewise   f16
    bf16         bf16, FP8              bf16            bf16
    bf16         f16, f32               TF32            TF32
    f32          any                    three TF32 terms

A scale per token multiplies logits and weights; P and V are bf16 then, for f16 might not hold the product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.core.arch import Arch
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.paged_attention.problem import Args, Problem
from pallas_attn.runtime.triton import (
    KINDS,
    Config,
    Shape,
    arch,
    kind,
    merge,
    power_of_two,
    rounding,
    stored,
    triton_op,
)

_KERNELS = "pallas_attn.ops.paged_attention.triton_kernels"
GRANULARITIES = {"none": 0, "tensor": 1, "head": 2, "seq_head": 3, "token_head": 4}
Q_GRANULARITIES = {"none": 0, "tensor": 1, "head": 2, "token_head": 3}
SMS = 132  # of the largest of these GPUs
ENOUGH = 256  # small programs: nearly two for each SM
MOST_SPLITS = 64


def supports(p: Problem) -> str | None:
    """None, or what of the problem these kernels cannot do."""
    dims = (p.head_dim, p.v_head_dim)
    refusals = {
        f"no head dims {dims}": max(dims) > 256,
        f"no {p.group} query heads per kv head": p.group > 128,
        f"no {p.kv_format} cache": p.kv_format.granularity not in GRANULARITIES,
        f"no {p.q_format} query": p.q_format.granularity not in Q_GRANULARITIES,
        f"no {p.out_format} output": p.out_format is not None
        and (p.out_format.dtype not in KINDS or p.out_format.granularity != "tensor"),
        "an empty call": not p.tokens or not p.seqs,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def choose(p: Problem, on: Arch) -> Config:
    """The configuration for a problem on a generation of GPUs."""
    tokens = min(p.max_q_len or -(-p.tokens // p.seqs), p.tokens)
    rows = max(min(power_of_two(tokens * p.group), 64), 16, power_of_two(p.group))
    few, dim = rows <= 32, power_of_two(max(p.head_dim, p.v_head_dim))
    size = p.kv_format.dtype.itemsize if few else operands(p, on)[0].itemsize
    keys = 64 if few or size > 1 or on is not Arch.HOPPER else 128
    while keys > 16 and keys * max(dim, 128) * size > 16384:
        keys //= 2
    stages = 3 if on is Arch.ADA else 5 if on is Arch.HOPPER and few and dim <= 128 else 4
    blocks = p.seqs * -(-tokens * p.group // rows) * p.kv_heads
    warps = 8 if rows > 64 else 2 if few and dim <= 128 else 4
    return Config(rows, keys, _splits(p, blocks, keys, few), warps, stages)


def _splits(p: Problem, blocks: int, keys: int, few: bool) -> int:
    """Shares of a context: until there are programs enough for the GPU, and more while the shares stay long."""
    context, splits = p.pages_per_seq * p.page_size, 1
    while splits < min(MOST_SPLITS, context // (4 * keys)):
        programs = blocks * splits
        if programs >= (ENOUGH if few else SMS) and (not few or programs >= 16 * SMS or context <= 1024 * splits):
            break
        splits *= 2
    return splits


def operands(p: Problem, on: Arch) -> tuple[jnp.dtype, jnp.dtype, bool, str]:
    """(dtype of Q and K, dtype of P and V, whether query rows are normalised, precision) of the matrix unit."""
    f16, bf16, f32 = (jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32))
    q, kv = p.q_format.dtype, p.kv_format.dtype
    if kv == f32:
        return f32, f32, False, "tf32x3"
    if kv == bf16:
        return (bf16, bf16, False, "tf32") if q == bf16 or q.itemsize == 1 else (f32, f32, False, "tf32")
    wide = bf16 if p.kv_format.granularity == "token_head" else f16
    if q == kv and kv in KINDS and on.has_fp8:
        return kv, wide, False, "tf32"
    return f16, wide, q in (bf16, f32), "tf32"


def run(p: Problem, *arrays, config: Config | None = None):
    """(out [T, H, DV], lse [T, H] if asked)."""
    args, on = Args(*arrays), arch()
    config = config or choose(p, on)
    result, split = Shape((p.tokens, p.q_heads, p.v_head_dim), p.out_dtype), config.splits > 1
    if not on.has_fp8 and p.out_dtype in KINDS:
        result = Shape(result.shape, jnp.uint8)
    lse = Shape((p.tokens, p.q_heads), jnp.float32)
    partial = Shape((config.splits, *result.shape), jnp.float32), Shape((2, config.splits, *lse.shape), jnp.float32)
    per_block = max(config.rows // p.group, 1)
    blocks = p.tokens // per_block + p.seqs + 2
    attend = triton_op(
        f"{_KERNELS}:attend", out=partial if split else (result, lse), grid=blocks * p.kv_heads * config.splits,
        constants=_sizes(p) | _strides(p) | _numbers(p, on) | _options(p, args) | rounding(p.out_format) | {
            "BM": config.rows, "BQ": per_block, "BN": config.keys, "SPLITS": config.splits,
            "CHUNK": min(power_of_two(p.seqs + 2), 1024),
        }, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    inputs = _inputs(p, args)
    out, stats = attend(*inputs)
    if split:
        add_up = merge(result, lse, p.out_format, config.splits, num_warps=2)
        out, stats = add_up(out, stats, inputs[-1])
    if out.dtype != p.out_dtype:
        out = lax.bitcast_convert_type(out, p.out_dtype)
    return (out, stats) if p.return_lse else (out,)


def _inputs(p: Problem, args: Args) -> list[jax.Array]:
    """The arrays that `attend` takes, in its order; a number stands for what is absent."""
    nothing, mask, bias, batch = jnp.zeros(1), args.mask, args.bias, args.batch
    one = lambda x, dtype: nothing if x is None else jnp.reshape(jnp.asarray(x, dtype), (1,))  # noqa: E731
    i32 = lambda x: nothing if x is None else jnp.asarray(x, jnp.int32)  # noqa: E731
    given = lambda x: nothing if x is None else jnp.atleast_1d(x)  # noqa: E731
    q, q_scale = (args.q.values, args.q.scale) if isinstance(args.q, Quantized) else (args.q, None)
    buffers = [stored(x) for x in args.cache.buffers]
    k_scale, v_scale = args.cache.scales or (None, None)
    prefix, prefix_window = mask.rswa or (None, None)
    live = p.seqs if batch.num_seqs is None else batch.num_seqs
    return [
        stored(q), given(q_scale), buffers[0], buffers[-1], given(k_scale), given(v_scale), i32(batch.page_table),
        i32(batch.kv_lens), i32(batch.cu_q_lens), one(live, jnp.int32), one(args.scale, jnp.float32),
        one(args.soft_cap, jnp.float32), one(mask.window, jnp.int32),
        nothing if isinstance(mask.causal, bool) else i32(mask.causal), i32(mask.prefix_ranges), i32(prefix),
        one(prefix_window, jnp.int32), given(bias.alibi_slopes), given(bias.query_query), given(args.sinks),
        one(args.out_scale, jnp.float32),
    ]  # fmt: skip


def _sizes(p: Problem) -> dict[str, int]:
    return {
        "T": p.tokens, "H": p.q_heads, "K": p.kv_heads, "D": p.head_dim, "DV": p.v_head_dim,
        "DP": max(power_of_two(p.head_dim), 16), "DVP": max(power_of_two(p.v_head_dim), 16), "B": p.seqs, "N": p.pages,
        "M": p.pages_per_seq, "S": p.page_size,
    }  # fmt: skip


def _strides(p: Problem) -> dict[str, Any]:
    """Where (page, head, slot, dim) of keys and values lies, in elements of its buffer."""
    dims = (p.head_dim, p.v_head_dim)
    sizes = [p.layout.sizes(p.pages, p.page_size, p.kv_heads, d, p.kv_format.dtype.itemsize) for d in dims]
    k, v = p.layout.buffers[0].strides(sizes[0]), p.layout.buffers[-1].strides(sizes[1])
    block = sizes[0]["D0"] if p.layout.blocked else 0
    return {
        "K_PAGE": k["N"], "K_HEAD": k["K"], "K_SLOT": k["S"], "K_BLOCK": block, "K_BLOCKS": k.get("D1", 0),
        "V_PAGE": v["N"], "V_HEAD": v["K"], "V_SLOT": v.get("S", 0), "V_BLOCK": block, "V_BLOCKS": v.get("S1", 0),
        "V_DIM": v["D"], "V_BASE": v.get("P", 0), "HEAD_MAJOR": p.layout.head_major,
    }  # fmt: skip


def _numbers(p: Problem, on: Arch) -> dict[str, Any]:
    """How stored values become operands of the matrix unit."""
    operand, wide, normalize, precision = operands(p, on)
    return {
        "Q_SCALE": Q_GRANULARITIES[p.q_format.granularity], "Q_KIND": kind(p.q_format.dtype),
        "KV_SCALE": GRANULARITIES[p.kv_format.granularity], "KV_KIND": kind(p.kv_format.dtype),
        "OPERAND": operand, "WIDE": wide, "NORMALIZE": normalize, "PRECISION": precision,
    }  # fmt: skip


def _options(p: Problem, args: Args) -> dict[str, Any]:
    """The flags of the masks and biases in use."""
    mask, bias = args.mask, args.bias
    window = 3 if mask.rswa is not None else 0 if mask.window is None else 1 if mask.chunk_lookback is None else 2
    pairs = (0, 0) if bias.query_query is None else bias.query_query.shape
    return {
        "CAUSAL": int(mask.causal) if isinstance(mask.causal, bool) else 2, "WINDOW": window,
        "LOOKBACK": mask.chunk_lookback or 0, "SYMMETRIC": mask.symmetric,
        "RANGES": 0 if mask.prefix_ranges is None else mask.prefix_ranges.shape[1], "CLAMP": mask.clamp_prefix,
        "CAP": args.soft_cap is not None, "ALIBI": 0 if bias.alibi_slopes is None else 1 + bias.alibi_sqrt,
        "QQ": bias.query_query is not None, "Q0": pairs[0], "Q1": pairs[1], "BEFORE_CAP": bias.before_soft_cap,
        "SINKS": args.sinks is not None,
    }  # fmt: skip
