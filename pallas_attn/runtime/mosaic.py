"""What Mosaic GPU kernels share: register layouts, how tiles lie in shared memory, and what Pallas has no word for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

Layout = plgpu.Layout
ACC = plgpu.ACC  # type: ignore[attr-defined]  # public in fact, not in the type stubs
SMS = 132  # of an H100 SXM or an H200
SHARED = 228 * 1024  # bytes of shared memory of one SM, of which the driver takes 1024 for each CTA
LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup's product in the matrix unit
OVER_ROWS = Layout.WGMMA.reduce(1)  # [64 n]: a value for each row of an accumulator
OVER_COLUMNS = Layout.WGMMA.reduce(0)  # [8 n]: a value for each column of an accumulator


def swizzled(dtype, columns: int) -> tuple:
    """Transforms of a tile of rows for TMA and the matrix unit."""
    width = math.gcd(128, columns * jnp.dtype(dtype).itemsize)
    columns = width // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]


def row_layout(columns: int, itemsize: int = 4):
    """Registers of a tile [8 n, columns] that is not tall enough for the matrix unit's own layouts: 16 lanes hold a
    row, so that a reduction along it stays in the warp. No lane moves more than 16 bytes at once: wider loads from
    shared memory come back wrong."""
    width = math.gcd(columns, 256 // itemsize)
    return Layout.TILED(Tiling(((8, width), (2, width), (width // 16,))), (-5,), (-3, -2), -1)


def whole_rows(columns: int):
    """`row_layout` of a power of two from 16 to 256 columns, of which each lane has neighbours."""
    return row_layout(columns, 256 // columns)


def token_layout(tokens: int):
    """Registers of a vector [tokens] whose elements may lie anywhere: one each, held by all warps alike."""
    if tokens % 32:
        return Layout.TILED(Tiling(((tokens,), (1,))), (plgpu.Replicated(4),), (-2, plgpu.Replicated(32 // tokens)), -1)
    return Layout.TILED(Tiling(((32,), (1,))), (plgpu.Replicated(4),), (-2,), -1)


# The reciprocal, made better once, then the quotient, made better twice by what is left of x: rounded as IEEE has it.
# What is infinite or zero leaves a NaN on the way, and is the first quotient.
MIDRANGE = """{ .reg .f32 n, r, e, q, d, a; .reg .pred p;
neg.f32 n, $2; rcp.approx.ftz.f32 r, $2; mul.rn.f32 a, $1, r;
fma.rn.f32 e, n, r, 0f3F800000; fma.rn.f32 r, r, e, r; mul.rn.f32 q, $1, r;
fma.rn.f32 d, n, q, $1; fma.rn.f32 q, d, r, q; fma.rn.f32 d, n, q, $1; fma.rn.f32 q, d, r, q;
setp.nan.f32 p, q, q; selp.f32 $0, a, q, p; }"""


def divide(x: jax.Array, y: jax.Array, layout, interpret: bool, midrange: bool = False) -> jax.Array:
    """x / y in float32, rounded once. The division sign is not that in a kernel: XLA sets a flag for all of its process
    by which LLVM takes an approximate one.

    midrange: x is above 2^-100, y between that and 2^120, their quotient above 2^-120; or either is zero, infinite or
      NaN. The instruction has a call for what is not, and registers are kept free for it even where there is none.
    """
    if interpret:
        return x / lax.optimization_barrier(y)  # or XLA multiplies by the reciprocal of a constant

    @plgpu.inline_mgpu(
        arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)
    )
    def quotient(_, x, y):
        def some(*numbers):
            return llvm.inline_asm(ir.F32Type.get(), numbers, MIDRANGE, "=f,f,f")

        return x._pointwise(FragmentedArray._lift_fast_instr(some if midrange else "div.rn.f32"), y)

    return quotient(x, y)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own


def take_ticket(counter, to) -> None:
    """to[0] = counter[0]++ by one thread: global memory to shared memory, both int32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def take(_, counter, to):
        i32, first = ir.IntegerType.get_signless(32), arith.constant(ir.IndexType.get(), 0)
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            where, one = utils.memref_ptr(counter), arith.constant(i32, 1)
            memref.store(llvm.atomicrmw(llvm.AtomicBinOp.add, where, one, llvm.AtomicOrdering.monotonic), to, [first])

    take(counter, to)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own


def recast(x: jax.Array, dtype, interpret: bool) -> jax.Array:
    """The bits of rows [8 m, n] as numbers of another size, so many more or fewer to a row. Sixteen lanes hold a row,
    each what lies together: both layouts are `whole_rows`."""
    rows, columns = x.shape
    old, new = jnp.dtype(x.dtype).itemsize, jnp.dtype(dtype).itemsize
    other = columns * old // new
    if interpret:
        x = x if old > new else x.reshape(rows, other, new // old)
        return lax.bitcast_convert_type(x, dtype).reshape(rows, other)
    layout, to = (whole_rows(n) for n in (columns, other))

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((rows, other), jnp.dtype(dtype), layout=to)
    )
    def seen(_, x):
        kind, registers = utils.dtype_to_ir_type(jnp.dtype(dtype)), np.empty(x.registers.shape, dtype=object)
        for at, register in np.ndenumerate(x.registers):
            registers[at] = vector.bitcast(ir.VectorType.get((other // 16,), kind), register)
        return FragmentedArray(_registers=registers, _layout=to.to_mgpu(), _is_signed=utils.is_signed(dtype))

    return seen(x)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own


def get_rows(source, layout, interpret: bool) -> jax.Array:
    """An array in shared memory whose rows lie one after the other, at any pitch. Pallas has memory lie as suits the
    accesses it knows, and finds no answer where parts of a row are accessed apart."""
    if interpret:
        return source[...]
    dtype = jnp.dtype(source.dtype)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(source.shape, dtype, layout=layout)
    )
    def load(_, source):
        kind = {"is_signed": utils.is_signed(dtype), "layout": layout.to_mgpu()}
        return FragmentedArray.load_untiled(source, **kind, optimized=False)

    return load(source)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own


def put_rows(to, x: jax.Array, layout, interpret: bool) -> None:
    """`get_rows` the other way."""
    if interpret:
        to[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, to, x):
        x.store_untiled(to, optimized=False)

    store(to, x)  # type: ignore[reportCallIssue]
