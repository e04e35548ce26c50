"""Cache writes on Hopper: K and V quantised and put into their slots by one launch, in place.

A CTA of one warpgroup takes the heads of a few tokens, [token x head, D] rows that TMA brings. Sixteen lanes hold a
row, so that finding a scale per (token, head) stays in the warp. The rows leave from shared memory, one copy a token,
for wherever its slot lies; a token without a slot leaves nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.narrow import slots32
from pallas_attn.core.quantized import scale_of, to_codes
from pallas_attn.ops.kv_cache.problem import Args, Problem
from pallas_attn.runtime.mosaic import SMS, divide, row_layout

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
MOST_ROWS = 32  # of one CTA: its registers hold a tile of keys or of values
ALIGNED = 128  # bytes: where a copy out of shared memory may begin


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    dims = (p.head_dim, p.v_head_dim)
    refusals = {
        f"no {p.layout} layout": p.layout.blocked,
        f"no head dims {dims}": any(d % 16 for d in dims) or max(dims) > 256,
        f"no {p.format} cache": p.format.granularity == "group",
        "an empty call": not p.tokens,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def _most_rows(p: Problem) -> int:
    return MOST_ROWS * 128 // max(p.head_dim, p.v_head_dim, 128)


def _heads(p: Problem) -> int:
    """Heads of one CTA: all of a token's, or even shares of them."""
    return -(-p.kv_heads // -(-p.kv_heads // _most_rows(p)))


def _tokens(p: Problem) -> int:
    """Tokens of one CTA: one while there are few, more when that fills rows and every copy begins aligned."""
    heads = _heads(p)
    bytes_of = [heads * d * p.format.dtype.itemsize for d in (p.head_dim, p.v_head_dim)]
    if heads < p.kv_heads or any(b % ALIGNED for b in bytes_of) or p.tokens <= 4 * SMS:
        return 1
    return max(_most_rows(p) // heads, 1)


def run(p: Problem, *arrays):
    """The leaves of the written cache."""
    cache, k, v, slots = Args(*arrays)
    heads, tokens = _heads(p), _tokens(p)
    per_token = p.format.granularity == "token_head"
    shapes = [x.shape for x in cache.buffers]
    # Rows of [key, value] as one head's: [N, S, K, 2 D].
    views = [x.reshape(*x.shape[:2], p.kv_heads, -1) if p.layout.name == "INTERLEAVED" else x for x in cache.buffers]
    scales = [jnp.atleast_1d(s) for s in cache.scales or ()]
    written = [*views, *(scales if per_token else [])]
    given = [] if per_token else scales
    rows = [x.reshape(-1, x.shape[-1]) for x in (k, v)]
    height = -(-heads * tokens // 8) * 8
    scratch = [plgpu.SMEM((height, x.shape[-1]), x.dtype) for x in rows]
    scratch += [plgpu.SMEM((height, x.shape[-1]), p.format.dtype) for x in rows]
    scratch += [plgpu.SMEM((2, height), jnp.float32), plgpu.Barrier(num_arrivals=2)]
    inputs = (*rows, slots32(slots, p.pages * p.page_size), *given)

    # References make what comes in and what goes out one and the same memory.
    memory = [jax.new_ref(x) for x in written]

    def write_kv(*refs):
        ins, outs, own = refs[: len(inputs)], refs[len(inputs) : -len(scratch)], refs[-len(scratch) :]
        _write(p, heads, tokens, ins[:2], ins[2], ins[3:], outs, own)

    plgpu.kernel(
        write_kv, out_type=(), grid=(-(-p.tokens // tokens), -(-p.kv_heads // heads)), grid_names=("tokens", "heads"),
        scratch_types=scratch, interpret=INTERPRET,
    )(*inputs, *memory)  # fmt: skip
    out = [jax.freeze(x) for x in memory]
    buffers = tuple(x.reshape(s) for x, s in zip(out, shapes, strict=False))
    return jax.tree.leaves(cache.replace(buffers, tuple(out[len(views) :]) if per_token else None))  # type: ignore[arg-type]


def _write(p: Problem, heads: int, tokens: int, rows, slots, given, written, scratch) -> None:
    raw, codes, (row_scale, ready) = scratch[:2], scratch[2:4], scratch[4:]
    first = lax.axis_index("tokens") * tokens
    # The last share begins early enough to be whole: heads of two shares are written alike by both.
    head = jnp.minimum(lax.axis_index("heads") * heads, p.kv_heads - heads)
    count = heads * tokens
    for x, tile in zip(rows, raw, strict=True):
        part = pl.ds(first * p.kv_heads + head, count)
        plgpu.copy_gmem_to_smem(x.at[part], tile.at[pl.ds(0, count)], ready)
    plgpu.barrier_wait(ready)
    for side in range(2):
        _quantise(p, heads, tokens, head, raw[side], codes[side], given[side : side + 1], row_scale.at[side])
    plgpu.commit_smem()
    for i in range(tokens):
        token = first + i
        slot = slots[jnp.minimum(token, p.tokens - 1)]
        real = (token < p.tokens) & (slot >= 0) & (slot < p.pages * p.page_size)
        pl.when(real)(functools.partial(_put, p, heads, i, head, slot, codes, row_scale, written))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _quantise(p: Problem, heads: int, tokens: int, head, raw, codes, given, row_scale) -> None:
    """One tile of rows as the format stores it; scales that are found stay in `row_scale`."""
    format, (height, dim) = p.format, raw.shape
    layout, by_reciprocal = row_layout(dim & -dim), format.apply_scale == "reciprocal"
    x = plgpu.load(raw, layout=layout, optimized=False).astype(jnp.float32)
    if not format.quantized:
        codes[...] = x.astype(format.dtype)
        return
    each = layout.reduce(1)
    every = lambda c: plgpu.layout_cast(jnp.full((height,), c, jnp.float32), each)  # noqa: E731
    over_rows = lambda s: lax.broadcast_in_dim(s, (height, dim), [0])  # noqa: E731
    if format.granularity == "token_head":
        amax = jnp.max(jnp.abs(x), axis=1)
        row_scale[...] = scale_of(amax, format, lambda x, c: divide(x, every(c), each, bool(INTERPRET)))
    else:
        for row in range(height):
            row_scale[row] = given[0][0 if format.granularity == "tensor" else head + row % heads]
    plgpu.commit_smem()
    scale = plgpu.load(row_scale, layout=each, optimized=False)
    if by_reciprocal:
        y = x * over_rows(divide(every(1), scale, each, bool(INTERPRET)))
    else:
        y = divide(x, over_rows(scale), layout, bool(INTERPRET))
    codes[...] = to_codes(y, format)


def _put(p: Problem, heads: int, i: int, head, slot, codes, row_scale, written) -> None:
    """Token i of the CTA's to its slot."""
    page, at = lax.div(slot, jnp.int32(p.page_size)), lax.rem(slot, jnp.int32(p.page_size))
    those = pl.ds(head, heads)
    for side, dim in enumerate((p.head_dim, p.v_head_dim)):
        buffer = written[0] if p.layout.single else written[side]
        columns = pl.ds(side * dim if p.layout.single else 0, dim)
        to = (page, those, at, columns) if p.layout.head_major else (page, at, those, columns)
        plgpu.copy_smem_to_gmem(codes[side].at[pl.ds(i * heads, heads)], buffer.at[to])
    if p.format.granularity != "token_head":
        return

    def row(h, carry):
        for side in range(2):
            scale = written[-2 + side]
            where = (page, head + h, at) if p.layout.head_major else (page, at, head + h)
            scale[where] = row_scale[side, i * heads + h]
        return carry

    lax.fori_loop(0, heads, row, jnp.int32(0))
