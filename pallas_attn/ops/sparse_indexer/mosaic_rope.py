"""RoPE, Hadamard matrix and quantisation of index queries on Hopper, by one launch: the portable backend's own bits.

A CTA of one warpgroup takes some heads of a token, rows of 128 numbers that TMA brings. Sixteen lanes hold a row, so
that a number's partner, whichever bit of the dim tells it from, is in the same thread or in one of those lanes, and a
scale is found inside the warp. Values and scales leave by TMA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from pallas_attn.core.quantized import scale_of, to_codes
from pallas_attn.ops.sparse_indexer.mosaic_parts import DIM
from pallas_attn.ops.sparse_indexer.rope.problem import Args, Problem, outputs
from pallas_attn.ops.sparse_indexer.turns import summed
from pallas_attn.runtime.mosaic import divide, row_layout

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
MOST_ROWS = 32  # heads of a CTA: its registers hold them in float32, with their partners
LANES = 16  # that hold a row


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {
        f"no {p.dtype}": p.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32),
        f"no head dim {p.head_dim}": p.head_dim != DIM,
        f"no group of {p.format.group}": p.format.group != DIM,
        f"no {p.heads} heads, which are no multiple of 8": p.heads % 8 != 0 or not p.heads,
        f"no {p.half} pairs of neighbours apart": not p.interleaved and p.half not in (1, 2, 4, 8, 16, 32, 64),
        "an empty call": not p.tokens,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays, early: bool = False):
    """(values, scales). early: the next kernel may start beside this one, and waits for it."""
    args, height = Args(*arrays), min(MOST_ROWS, p.heads)
    values, scale = outputs(p)
    kernel = plgpu.kernel(
        lambda *refs: _rope_quantize(p, height, early, *refs),
        out_type=[values, jax.ShapeDtypeStruct((p.tokens, p.heads), scale.dtype)],
        grid=(p.tokens, -(-p.heads // height)),
        grid_names=("token", "heads"),
        scratch_types=[
            plgpu.SMEM((height, DIM), p.dtype),
            plgpu.SMEM((height, DIM), values.dtype),
            plgpu.SMEM((height,), scale.dtype),
            plgpu.Barrier(),
        ],
        interpret=INTERPRET,
    )
    made, found = kernel(args.x, _factors(p, args))
    return made, found[..., None]


def _factors(p: Problem, args: Args) -> jax.Array:
    """Float32 [T, 2, D]: what each number of a row, and what its partner, is multiplied by."""
    cos = jnp.stack([args.cos, args.cos], axis=-1 if p.interleaved else 1)
    sin = jnp.stack([-args.sin, args.sin], axis=-1 if p.interleaved else 1)
    both = jnp.stack([t.reshape(p.tokens, 2 * p.half) for t in (cos, sin)], axis=1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, DIM - 2 * p.half)))


def _rope_quantize(p: Problem, height: int, early: bool, x, factors, values, scale, raw, codes, found, ready) -> None:
    if early:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    token = lax.axis_index("token")
    # The last share begins early enough to be whole: heads of two shares are written alike by both.
    heads = pl.ds(jnp.minimum(lax.axis_index("heads") * height, p.heads - height), height)
    plgpu.copy_gmem_to_smem(x.at[token, heads], raw, ready)
    plgpu.barrier_wait(ready)
    layout = row_layout(DIM, p.dtype.itemsize)
    each, along, shape = layout.reduce(1), layout.reduce(0), (height, DIM)
    every = lambda c: plgpu.layout_cast(jnp.full((height,), c, jnp.float32), each)  # noqa: E731
    over_rows = lambda s: lax.broadcast_in_dim(s, shape, [0])  # noqa: E731
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)

    def factor(i):
        line = plgpu.load(factors.at[token, i], layout=along, optimized=False)
        return lax.broadcast_in_dim(line, shape, [1])

    y = plgpu.load(raw, layout=layout, optimized=False).astype(jnp.float32)
    turned = summed(y, factor(0), exchange(y, 1 if p.interleaved else p.half, layout), factor(1))
    y = jnp.where(column < 2 * p.half, _rounded(turned, p.dtype), y)
    if p.hadamard:
        for bit in range(DIM.bit_length() - 1):
            other = exchange(y, 1 << bit, layout)
            y = jnp.where((column & (1 << bit)) != 0, other - y, y + other)
        y = _rounded(y * np.float32(DIM**-0.5), p.dtype)
    quotient = lambda x, y, layout: divide(x, y, layout, bool(INTERPRET))  # noqa: E731
    number = scale_of(jnp.max(jnp.abs(y), axis=1), p.format, lambda x, c: quotient(x, every(c), each))
    if p.format.apply_scale == "reciprocal":
        y = y * over_rows(quotient(every(1), number, each))
    else:
        y = quotient(y, over_rows(number), layout)
    codes[...], found[...] = to_codes(y, p.format), number
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes, values.at[token, heads])
    plgpu.copy_smem_to_gmem(found, scale.at[token, heads])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rounded(x: jax.Array, dtype) -> jax.Array:
    return x.astype(dtype).astype(jnp.float32)


def exchange(x: jax.Array, bit: int, layout) -> jax.Array:
    """y[r, c] = x[r, c ^ bit], `bit` a power of two: registers of a thread change places, or words of two lanes."""
    if INTERPRET:
        rows, columns = x.shape
        return x.reshape(rows, -1, 2, bit)[:, :, ::-1].reshape(rows, columns)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def exchanged(_, x):
        # Registers [rows, blocks, ..]: vectors of neighbours, of which the lanes hold a block of columns.
        old, new = x.registers, np.empty(x.registers.shape, dtype=object)
        wide = DIM // (LANES * old.shape[1])
        for at in np.ndindex(*old.shape):
            if bit < wide:
                new[at] = vector.shuffle(old[at], old[at], [i ^ bit for i in range(wide)])
            elif bit < wide * LANES:
                new[at] = utils.shfl_bfly(old[at], bit // wide)
            else:
                new[at] = old[at[0], at[1] ^ (bit // (wide * LANES)), *at[2:]]
        return FragmentedArray(_registers=new, _layout=x.layout, _is_signed=None)

    return exchanged(x)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own
