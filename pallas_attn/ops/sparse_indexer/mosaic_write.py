"""Index writes on Hopper: keys quantised and put into their slots by one launch, in place.

A CTA of one warpgroup takes 8 keys, rows of 128 numbers of which sixteen lanes hold one, so that a scale is found
inside the warp. The values of a key leave by one copy for wherever its slot lies in the page's bytes, its scale byte
by byte; a token without a slot leaves nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.group_scales import MANTISSA
from pallas_attn.core.index_cache import SCALE_BYTES
from pallas_attn.core.narrow import slots32
from pallas_attn.core.quantized import scale_of, to_codes
from pallas_attn.ops.sparse_indexer.mosaic_parts import DIM
from pallas_attn.ops.sparse_indexer.write.problem import Args, Problem
from pallas_attn.runtime.mosaic import divide, row_layout

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernel on a CPU
ROWS = 8  # keys of a CTA, the fewest that fill its registers
ALIGNED = 32  # tokens: their bytes are whole lines of 128, into which copies go


def supports(p: Problem) -> str | None:
    """None, or what of the problem this kernel cannot do."""
    refusals = {
        f"no {p.k_dtype}": p.k_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32),
        f"no head dim {p.head_dim}": p.head_dim != DIM,
        f"no group of {p.format.group}": p.format.group != DIM,
        f"no {p.format}": p.format.apply_scale == "reciprocal",
        f"no {p.layout} layout": p.layout.tiled,
        f"no pages of {p.page_size}, which is no multiple of {ALIGNED}": p.page_size % ALIGNED != 0,
        "an empty call": not p.tokens,
    }
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays):
    """The written pages."""
    cache, k, slots = Args(*arrays)
    # References make what comes in and what goes out one and the same memory.
    memory = jax.new_ref(cache.pages.reshape(p.pages, -1))
    plgpu.kernel(
        lambda *refs: _write(p, *refs),
        out_type=(),
        grid=(-(-p.tokens // ROWS),),
        grid_names=("keys",),
        scratch_types=[
            plgpu.SMEM((ROWS, DIM), p.k_dtype),
            plgpu.SMEM((ROWS, DIM), jnp.uint8),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.Barrier(),
        ],
        interpret=INTERPRET,
    )(k, slots32(slots, p.pages * p.page_size), memory)
    return (jax.freeze(memory).reshape(p.shape),)


def _write(p: Problem, k, slots, pages, raw, codes, found, ready) -> None:
    count = min(ROWS, p.tokens)
    # The last share begins early enough to be whole: keys of two shares are written alike by both.
    first = jnp.minimum(lax.axis_index("keys") * ROWS, p.tokens - count)
    plgpu.copy_gmem_to_smem(k.at[pl.ds(first, count)], raw.at[pl.ds(0, count)], ready)
    plgpu.barrier_wait(ready)
    _quantise(p, raw, codes, found)
    plgpu.commit_smem()
    for i in range(count):
        slot = slots[first + i]
        real = (slot >= 0) & (slot < p.pages * p.page_size)
        pl.when(real)(functools.partial(_put, p, i, slot, codes, found, pages))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _quantise(p: Problem, raw, codes, found) -> None:
    layout = row_layout(DIM, p.k_dtype.itemsize)
    each = layout.reduce(1)
    most = plgpu.layout_cast(jnp.full((ROWS,), p.format.qmax, jnp.float32), each)
    x = plgpu.load(raw, layout=layout, optimized=False).astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=1)
    scale = scale_of(amax, p.format, lambda x, _: divide(x, most, each, bool(INTERPRET)))
    y = divide(x, lax.broadcast_in_dim(scale, raw.shape, [0]), layout, bool(INTERPRET))
    codes[...] = lax.bitcast_convert_type(to_codes(y, p.format), jnp.uint8)
    found[...] = lax.bitcast_convert_type(scale, jnp.int32)


def _put(p: Problem, i: int, slot, codes, found, pages) -> None:
    """Key i of the CTA's to its slot."""
    page, at = lax.div(slot, jnp.int32(p.page_size)), lax.rem(slot, jnp.int32(p.page_size))
    plgpu.copy_smem_to_gmem(codes.at[pl.ds(i, 1)], pages.at[pl.ds(page, 1), pl.ds(at * DIM, DIM)])
    for byte in range(SCALE_BYTES):
        shift = MANTISSA if p.format.exponents else 8 * byte
        part = (lax.shift_right_logical(found[i], jnp.int32(shift)) & 0xFF).astype(jnp.uint8)
        pages[page, p.page_size * DIM + at * SCALE_BYTES + byte] = part
