"""What warps do with rows of logits that Pallas has no word for: a lane keeps its part of a row's sum to the end, and a
warp leaves out what changes nothing.

Logits [64, n] lie as the matrix unit leaves them: four lanes hold a row, a lane parts of two rows.
"""
# pyright: reportCallIssue=false
# the first parameter of an inline function is the compiler's own

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

from pallas_attn.runtime.mosaic import OVER_ROWS, Layout

# What weights may exceed 1 by, to base 2, before their rows get a new maximum: f16 holds 2^15, the sums are float32.
GROWTH = 8.0
TILE, ROW = Layout.WGMMA, OVER_ROWS


def lifted(s: jax.Array, factor: jax.Array | None, top: jax.Array, plain: bool) -> jax.Array:
    """What the exponents of rows are counted from, to base 2: `top`, or where a logit (s * factor, of factors that are
    not negative) is more than GROWTH above it the rows' largest.

    plain: in words of Pallas, which every kernel and the interpreter has registers for, and for all rows.
    """
    if plain:
        peak = jnp.max(s, axis=1)
        peak = peak if factor is None else peak * factor
        return jnp.where(peak > top + GROWTH, peak, top)

    def lift(_, s, top, *factor):
        own = [functools.reduce(_larger, _fewer(_larger, row)) for row in _rows(s)]
        if factor:
            own = [arith.mulf(x, f) for x, f in zip(own, _numbers(factor[0]), strict=True)]
        tops = _numbers(top)
        bounds = [arith.addf(x, _float(GROWTH)) for x in tops]
        above = arith.CmpFPredicate.UGT  # NaN is above as well
        grown = functools.reduce(arith.ori, [arith.cmpf(above, x, y) for x, y in zip(own, bounds, strict=True)])

        def peaks():
            found = own
            for distance in (1, 2):
                found = [_larger(x, utils.shfl_bfly(x, distance)) for x in found]
            return [_larger(x, y) for x, y in zip(found, tops, strict=True)]

        return _of_rows(top, _if_any(grown, peaks, tops))

    return _inline(lift, (TILE, ROW, *[ROW] * (factor is not None)), top, ROW)(s, top, *[factor] * (factor is not None))


def added(total: jax.Array, x: jax.Array, plain: bool) -> jax.Array:
    """total + the sum of each row of x: of what a lane holds, until `summed`."""
    if plain:
        return total + jnp.sum(x, axis=1)

    def add(_, total, x):
        sums = [functools.reduce(arith.addf, _fewer(arith.addf, row)) for row in _rows(x)]
        return _of_rows(total, [arith.addf(a, b) for a, b in zip(_numbers(total), sums, strict=True)])

    return _inline(add, (ROW, TILE), total, ROW)(total, x)


def summed(total: jax.Array, plain: bool) -> jax.Array:
    """The sums over all lanes of a row."""
    if plain:
        return total

    def add(_, total):
        sums = _numbers(total)
        for distance in (1, 2):
            sums = [arith.addf(x, utils.shfl_bfly(x, distance)) for x in sums]
        return _of_rows(total, sums)

    return _inline(add, (ROW,), total, ROW)(total)


def rescaled(x: jax.Array, keep: jax.Array, plain: bool) -> jax.Array:
    """x times what is kept of each row; nothing is done in a warp that keeps all."""
    if plain:
        return x * lax.broadcast_in_dim(keep, x.shape, [0])

    def rescale(_, x, keep):
        unequal = [arith.cmpf(arith.CmpFPredicate.UNE, k, _float(1.0)) for k in _numbers(keep)]
        product = lambda: list((x * keep.broadcast_in_dim(x.shape, (0,), x.layout)).registers.flat)  # noqa: E731
        registers = _if_any(functools.reduce(arith.ori, unequal), product, list(x.registers.flat))
        return _array(x, registers)

    return _inline(rescale, (TILE, ROW), x, TILE)(x, keep)


def _inline(body, layouts: tuple, like: jax.Array, layout) -> Any:
    result = plgpu.ShapeDtypeStruct(like.shape, jnp.float32, layout=layout)
    return plgpu.inline_mgpu(arg_types=layouts, return_type=result)(body)


def _if_any(condition, then, otherwise: list) -> list:
    """then() in a warp where the condition holds for any lane, or else `otherwise`."""
    i32 = ir.IntegerType.get_signless(32)
    some = nvvm.vote_sync(arith.constant(i32, -1), condition, "any")
    branch = scf.IfOp(some, [x.type for x in otherwise], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(then())
    with ir.InsertionPoint(branch.else_block):  # type: ignore[reportArgumentType]  # there is one
        scf.yield_(otherwise)
    return list(branch.results)


def _float(x: float):
    return arith.constant(ir.F32Type.get(), x)


_larger = FragmentedArray._lift_fast_instr("max.NaN.f32")


def _parts(register) -> list:
    """The numbers of one register."""
    if not isinstance(register.type, ir.VectorType):
        return [register]
    index = lambda i: arith.constant(ir.IntegerType.get_signless(32), i)  # noqa: E731
    return [llvm.extractelement(register, index(i)) for i in range(ir.VectorType(register.type).shape[0])]


def _rows(x) -> list[list]:
    """What a lane has of each of its two rows of a tile."""
    return [[n for r in x.registers[0, :, 0, 0, row].flat for n in _parts(r)] for row in range(2)]


def _fewer(op, xs: list) -> list:
    """Four results of op over what is in `xs`, which do not wait for each other."""
    return [functools.reduce(op, xs[i::4]) for i in range(4)]


def _numbers(rows) -> list:
    """A lane's number of each of its two rows."""
    return [n for r in rows.registers.flat for n in _parts(r)]


def _array(like, registers: list) -> FragmentedArray:
    new = np.empty(like.registers.shape, dtype=object)
    for i, r in enumerate(registers):
        new.flat[i] = r
    return FragmentedArray(_registers=new, _layout=like.layout, _is_signed=None)


def _of_rows(like, numbers: list) -> FragmentedArray:
    """Such numbers as an array again."""
    zero = arith.constant(ir.IntegerType.get_signless(32), 0)
    vector = lambda old: isinstance(old.type, ir.VectorType)  # noqa: E731
    pairs = zip(like.registers.flat, numbers, strict=True)
    return _array(like, [llvm.insertelement(old, n, zero) if vector(old) else n for old, n in pairs])
