"""The third launch of MLA, where there is a value up-projection: out[:, h] = latents[:, h] @ w_uv[h], rounded there.

A CTA keeps the weights of one head in shared memory and goes over blocks of up to 64 tokens. It asks for all of its
weights and for its first block at once, in pieces of the latent; each piece is multiplied as soon as it is there, and
its place asks for the next block's: one token's latents are read for every 128 of its results, so that the memory, not
the matrix unit, sets the pace. Groups of 64 or 128 lie inside of a head: their scales are found in registers.

The last block begins early enough to be whole: what two blocks share is written alike by both. Tokens that are no
multiple of 8 are filled up with zeros, which costs a copy of the latents.

It is launched before `mosaic_merge` has ended, and asks for the weights at once: they are there when the merge begins.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.output import out_arrays
from pallas_attn.ops.mla.mosaic_finish import (
    WORD,
    as_stored,
    as_words,
    filled,
    finish,
    grouped,
    packed,
    scale_array,
    scatter,
)
from pallas_attn.ops.mla.mosaic_form import LATENT
from pallas_attn.ops.mla.problem import Problem
from pallas_attn.runtime.mosaic import ACC, ROWS, SMS, Layout, swizzled, token_layout

PIECE = 128  # of the latent
PIECES = LATENT // PIECE
WHOLE = 8  # tokens: rows of a tile in shared memory


class Plan(NamedTuple):
    """How the tokens are cut."""

    tokens: int
    height: int  # of a block
    blocks: int
    parts: int  # CTAs that share the blocks of a head


def plan_of(p: Problem) -> Plan:
    """The plan of a problem."""
    tokens = -(-p.tokens // WHOLE) * WHOLE
    height = min(tokens, ROWS)
    blocks = -(-tokens // height)
    return Plan(tokens, height, blocks, min(blocks, max(SMS // p.heads, 1)))


def refuses(p: Problem) -> dict[str, bool]:
    """Reasons not to do the up-projection of a problem, and whether they hold."""
    if p.v_dim is None:
        return {}
    same = p.w_dtype == jnp.bfloat16 or (p.w_dtype == jnp.float16 and p.kv_format.dtype == jnp.float16)
    return {
        f"no up-projection to {p.v_dim}": p.v_dim not in (64, 128),
        f"no {p.w_dtype} up-projection of latents from a {p.kv_format} cache": not same,
    }


def attended(p: Problem) -> Problem:
    """The problem without its up-projection: latents in the type of the weights."""
    assert p.w_dtype is not None
    return dataclasses.replace(p, v_dim=None, w_dtype=None, out_dtype=p.w_dtype, out_format=None)


def project(p: Problem, latents, w_uv, out_scale, interpret) -> tuple[jax.Array, ...]:
    """The results (values, scales that are found) of latents [T, heads or more, C]; out_scale [1]."""
    plan = plan_of(p)
    if plan.tokens > p.tokens:
        latents = jnp.pad(latents, ((0, plan.tokens - p.tokens), (0, 0), (0, 0)))
    arrays = _arrays(p, plan)

    def up_project(x, w, static, *refs, **scratch):
        Up(p, plan, x, w, static, refs[0], refs[1] if grouped(p) else None, interpret, **scratch).run()

    kernel = plgpu.kernel(
        up_project, out_type=arrays, grid=(p.heads, plan.parts), grid_names=("head", "part"), scratch_types=_scratch(p),
        interpret=interpret,
    )  # fmt: skip
    with jax.named_scope("up-projection"):
        values, *scales = kernel(latents, w_uv, out_scale)
    return values[: p.tokens], *(_as_scales(p, s) for s in scales)


def _arrays(p: Problem, plan: Plan) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The results as the kernel writes them: scales [T, G] or [G, T'], packed ones as bytes [words, T', 4]."""
    assert p.v_dim is not None
    shape = (plan.tokens, p.heads * p.v_dim)
    if not grouped(p):
        return (jax.ShapeDtypeStruct(shape, p.out_dtype),)
    values, scales = out_arrays(shape, p.out_dtype, p.out_format)
    return values, scale_array(p, scales.shape)


def _as_scales(p: Problem, scales):
    """Scales in the shape of the op's."""
    assert p.out_format is not None
    if p.out_format.order == "row":
        return scales[: p.tokens]
    scales = as_words(p, scales)
    if packed(p):
        last = p.heads * (p.v_dim or 0) // (p.out_format.group or 1) % WORD
        if last:  # no group fills the last word
            words = lax.broadcasted_iota(jnp.int32, scales.shape, 0)
            scales = jnp.where(words == len(scales) - 1, scales & (1 << 8 * last) - 1, scales)
    return scales[:, : filled(p)]


def _scratch(p: Problem) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    assert p.v_dim is not None
    assert p.w_dtype is not None
    return {
        "weights": plgpu.SMEM((PIECES, PIECE, p.v_dim), p.w_dtype, transforms=swizzled(p.w_dtype, p.v_dim)),
        "latents": plgpu.SMEM((PIECES, ROWS, PIECE), p.w_dtype, transforms=swizzled(p.w_dtype, PIECE)),
        "tile": plgpu.SMEM((ROWS, p.v_dim), p.out_dtype, transforms=swizzled(p.out_dtype, p.v_dim)),
        "row_tile": plgpu.SMEM((ROWS,), jnp.float32),
        "w_here": plgpu.Barrier(num_barriers=PIECES),
        "x_here": plgpu.Barrier(num_barriers=PIECES),
    }


@dataclasses.dataclass
class Up:
    """The body of the kernel."""

    p: Problem
    plan: Plan
    x: Any  # latents [T, heads or more, C]
    w: Any  # [heads, C, DV]
    out_scale: Any  # [1]
    out: Any
    scales: Any
    interpret: Any
    weights: Any
    latents: Any
    tile: Any
    row_tile: Any
    w_here: Any
    x_here: Any

    def run(self) -> None:
        """All blocks of the CTA."""
        self.head, self.part = lax.axis_index("head"), lax.axis_index("part")
        self.count = lax.div(self.plan.blocks - self.part + (self.plan.parts - 1), jnp.int32(self.plan.parts))
        for k in range(PIECES):
            piece = self.w.at[self.head, pl.ds(k * PIECE, PIECE)]
            plgpu.copy_gmem_to_smem(piece, self.weights.at[k], self.w_here.at[k])
        if self.interpret is None:
            plgpu.griddepcontrol_wait()
        for k in range(PIECES):
            self.fetch(jnp.int32(0), k)
        lax.fori_loop(0, self.count, self.block, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def first(self, i):
        """The first token of the CTA's i-th block."""
        return jnp.minimum((self.part + i * self.plan.parts) * self.plan.height, self.plan.tokens - self.plan.height)

    def fetch(self, i, k: int) -> None:
        """Ask for piece k of the i-th block."""
        height = self.plan.height
        source = self.x.at[pl.ds(self.first(i), height), self.head, pl.ds(k * PIECE, PIECE)]
        plgpu.copy_gmem_to_smem(source, self.latents.at[k, pl.ds(0, height)], self.x_here.at[k])

    def block(self, i, carry):
        """One block of tokens; rows past its height are anything, and go nowhere."""
        assert self.p.v_dim is not None

        def refill(k: int) -> None:
            pl.when(i + 1 < self.count)(lambda: self.fetch(i + 1, k))

        def multiply(acc):
            for k in range(PIECES):
                pl.when(i == 0)(lambda k=k: plgpu.barrier_wait(self.w_here.at[k]))
                plgpu.barrier_wait(self.x_here.at[k])
                plgpu.wgmma(acc, self.latents.at[k], self.weights.at[k])
                if k:
                    plgpu.wgmma_wait(1)
                    refill(k - 1)
            return acc[...]

        x = pl.run_scoped(multiply, ACC((ROWS, self.p.v_dim), jnp.float32))
        refill(PIECES - 1)
        self.leave(self.first(i), x)
        return carry

    def leave(self, first, x) -> None:
        """Results [64, DV] in float32 of the tokens from `first` on."""
        p, height = self.p, self.plan.height
        assert p.v_dim is not None
        values, scales = finish(p, x, self.out_scale[0], Layout.WGMMA, self.interpret)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # the last results have left, for every warp
        self.tile[...] = values
        plgpu.commit_smem()
        to = self.out.at[pl.ds(first, height), pl.ds(self.head * p.v_dim, p.v_dim)]
        plgpu.copy_smem_to_gmem(self.tile.at[pl.ds(0, height)], to)
        for j, scale in enumerate(scales):
            self.leave_scales(first, scale, self.head * len(scales) + j)

    def leave_scales(self, first, scale, group) -> None:
        """The scales [64] of one group."""
        self.row_tile[...] = scale
        plgpu.commit_smem()
        chunk = math.gcd(self.plan.height, 32)  # a power of two, for the registers of a vector
        for at in range(0, self.plan.height, chunk):
            some = plgpu.load(self.row_tile.at[pl.ds(at, chunk)], layout=token_layout(chunk), optimized=False)
            scatter(self.place(pl.ds(first + at, chunk), group), as_stored(self.p, some))
        plgpu.commit_smem()

    def place(self, rows, group):
        """Where the scales of a group for these rows lie."""
        assert self.p.out_format is not None
        if self.p.out_format.order == "row":
            return self.scales.at[rows, group]
        if packed(self.p):
            return self.scales.at[lax.div(group, jnp.int32(WORD)), rows, lax.rem(group, jnp.int32(WORD))]
        return self.scales.at[group, rows]
