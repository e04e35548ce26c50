"""Rows gathered from a cache into shared memory, and read from there: what Pallas has no word for.

Every warp of a warpgroup copies the rows that it will read itself, a lane each, and asks for the next ones in their
place as soon as it is done: no warp waits for another. All rows of a place are counted by one barrier, whose phase each
thread has in a word of its own: Pallas does not tell where its barriers are.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector

from pallas_attn.ops.mla.mosaic_widen import beyond, number, pairs
from pallas_attn.ops.mla.mosaic_worker import FAR
from pallas_attn.runtime.mosaic import Layout, swizzled

WARPS, THREADS = 4, 128  # of a warpgroup
LANES = 16  # that share a row
WORDS = 2 * THREADS  # of barriers, two each, and, the second half, their phases
MOST_SCALE = 128.0  # times 448 is the largest in f16
SEEN, UNSEEN = (int(np.float32(x).view(np.int32)) for x in (0, 2 * FAR))  # what is added to a logit, as its bits
REF, NUMBER = plgpu.RefType(), Layout.WG_SPLAT(())
SLOTS = plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=Layout.WG_STRIDED((THREADS,), vec_size=1))


def layout_of(rows: int, columns: int):
    """Registers of rows that have landed: a warp has rows / 4 of them, 16 lanes one row."""
    tiles = (rows, columns), (rows // WARPS, columns), (32 // LANES, columns), (columns // LANES,)
    return Layout.TILED(Tiling(tiles), (-7,), (-3, -2), -1)


def begin(turns, places: int) -> None:
    """Make barriers of int32 [WORDS]."""

    @plgpu.inline_mgpu(arg_types=(REF,))
    def start(_, turns):
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            for place in range(places):
                nvvm.mbarrier_init(_barrier(turns, place).get_ptr(), number(1))
            nvvm.fence_mbarrier_init()
        memref.store(number(0), turns, [_phases()])
        utils.commit_shared()

    start(turns)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own


def wait(turns, place: int) -> None:
    """Until all rows have landed in a place."""

    @plgpu.inline_mgpu(arg_types=(REF,))
    def wait(_, turns):
        phases = memref.load(turns, [_phases()])
        memref.store(arith.xori(phases, number(1 << place)), turns, [_phases()])
        phase = arith.shrui(phases, number(place))
        _barrier(turns, place).wait_parity(arith.trunci(ir.IntegerType.get_signless(1), phase))

    wait(turns)  # type: ignore[reportCallIssue]


def read_slots(list_, first, listed, rows: int):
    """The slots that the list [first:] names for some rows, one for each lane that asks for a row; -1 from `listed`
    on."""

    @plgpu.inline_mgpu(arg_types=(REF, NUMBER, NUMBER), return_type=SLOTS)
    def take(_, list_, first, listed):
        at, slot = _entry(list_, first, rows)
        return _per_thread(
            arith.select(arith.cmpi(arith.CmpIPredicate.slt, at, listed.registers.item()), slot, number(-1))
        )

    return take(list_, first, listed)  # type: ignore[reportCallIssue]


def look_up(list_, first, listed, rows: int, page_table, seq, context, pages: int, page_size: int):
    """The same of a list of positions in sequence `seq`, of which `context` tokens are cached; -1 for what names none
    of them. Page numbers are kept inside of the cache."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, *(NUMBER,) * 4), return_type=SLOTS)
    def take(_, list_, page_table, first, listed, seq, context):
        at, position = _entry(list_, first, rows)
        below, within = arith.CmpIPredicate.slt, arith.CmpIPredicate.ult
        real = arith.andi(
            arith.cmpi(below, at, listed.registers.item()), arith.cmpi(within, position, context.registers.item())
        )
        position = arith.select(real, position, number(0))
        column = arith.divui(position, number(page_size))
        page = memref.load(page_table, [_index(seq.registers.item()), _index(column)])
        page = arith.minsi(arith.maxsi(page, number(0)), number(pages - 1))
        slot = arith.addi(arith.muli(page, number(page_size)), arith.remui(position, number(page_size)))
        return _per_thread(arith.select(real, slot, number(-1)))

    return take(list_, page_table, first, listed, seq, context)  # type: ignore[reportCallIssue]


def gather(turns, place: int, landing, list_, cache, zeros, first, slots) -> None:
    """Ask for the rows of `cache` that lanes have the slots of, as many as `landing` [rows, bytes] takes; for `zeros`
    in place of what is none. The list's entries, [first:], become what their logits are to be masked with."""
    rows, pitch = landing.shape
    size = cache.shape[1] * jnp.dtype(cache.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(*(REF,) * 5, NUMBER, SLOTS.layout))
    def ask(_, turns, landing, list_, cache, zeros, first, slots):
        lane, barrier = _lane(), _barrier(turns, place)
        row = arith.addi(arith.muli(_warp(), number(rows // WARPS)), lane)
        utils.warp_barrier()  # every lane has read what was there
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            barrier.arrive_expect_tx(rows * size)
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, number(rows // WARPS))):
            real, source = _source(slots, cache, size)
            source = arith.select(real, source, utils.memref_ptr(zeros))
            at = _index(arith.addi(first.registers.item(), row))
            memref.store(arith.select(real, number(SEEN), number(UNSEEN)), list_, [at])
            to = beyond(utils.memref_ptr(landing), arith.muli(row, number(pitch)))
            utils.inline_ptx(
                f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], {size}, [$2];",
                to, source, barrier.get_ptr(), has_side_effects=True,
            )  # fmt: skip

    ask(turns, landing, list_, cache, zeros, first, slots)  # type: ignore[reportCallIssue]


def read(landing, at: int, columns: int, dtype):
    """Columns of 16 bits of all rows that have landed, from byte `at` of each."""
    like = _like(landing, columns, dtype)

    @plgpu.inline_mgpu(arg_types=(REF,), return_type=like)
    def take(_, landing):
        width = columns // LANES
        some = ir.VectorType.get((width,), utils.dtype_to_ir_type(like.dtype))
        return _array(like, _loads(some, landing, at, 2 * width))

    return take(landing)  # type: ignore[reportCallIssue]


def read_codes(landing, at: int, scales: int):
    """128 columns of E4M3 of all rows that have landed, from byte `at` of each, in f16: times the power of two at byte
    `scales`, a float32 of which the largest counts as MOST_SCALE."""
    like = _like(landing, 128, jnp.float16)

    @plgpu.inline_mgpu(arg_types=(REF,), return_type=like)
    def take(_, landing):
        i32, f16, f32 = ir.IntegerType.get_signless(32), ir.F16Type.get(), ir.F32Type.get()
        most, wide = arith.constant(f32, MOST_SCALE), ir.VectorType.get((8,), f16)
        codes, widened = _loads(ir.VectorType.get((2,), i32), landing, at, 8), []
        for words, scale in zip(codes, _loads(f32, landing, scales, 0), strict=True):
            both = [word for i in range(2) for word in pairs(vector.extract(words, [], [i]))]
            x = vector.bitcast(wide, vector.from_elements(ir.VectorType.get((4,), i32), both))
            scale = arith.truncf(f16, arith.minimumf(scale, most))
            widened.append(arith.mulf(x, vector.broadcast(wide, scale)))
        return _array(like, widened)

    return take(landing)  # type: ignore[reportCallIssue]


def put(to, x, layout=None) -> None:
    """Store what was read, or an array of another layout, in a part of a tile, 128 bytes wide or a multiple of it.
    Pallas has all warps wait before and after a store; here none does."""
    tiled = plgpu.RefType(swizzled(x.dtype, 64))

    @plgpu.inline_mgpu(arg_types=(tiled, layout or layout_of(*x.shape)))
    def store(_, to, x):
        x.store_tiled(to, swizzle=128)

    store(to, x)  # type: ignore[reportCallIssue]


# What is said above in MLIR


def _like(landing, columns: int, dtype):
    rows, _ = landing.shape
    return plgpu.ShapeDtypeStruct((rows, columns), dtype, layout=layout_of(rows, columns))


def _array(like, vectors: list) -> FragmentedArray:
    """The registers of one thread, rows first, as an array."""
    layout = like.layout.to_mgpu()
    registers = np.array(vectors, dtype=object).reshape(layout.registers_shape(like.shape))
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _loads(kind, landing, at: int, width: int) -> list:
    """What each lane has of its rows: `kind` from byte `at` of a row, `width` bytes further on from lane to lane."""
    rows, pitch = ir.MemRefType(landing.type).shape
    row = arith.addi(arith.muli(_warp(), number(rows // WARPS)), arith.divui(_lane(), number(LANES)))
    column = arith.muli(arith.remui(_lane(), number(LANES)), number(width))
    first = beyond(utils.memref_ptr(landing), arith.addi(arith.muli(row, number(pitch)), column))
    return [llvm.load(kind, beyond(first, at + i * pitch), alignment=max(width, 4)) for i in range(0, rows // WARPS, 2)]


def _entry(list_, first, rows: int) -> tuple:
    """(place, number) of the list's entry for the lane's row; lanes that ask for none repeat others."""
    some = rows // WARPS
    row = arith.addi(arith.muli(_warp(), number(some)), arith.remui(_lane(), number(some)))
    at = arith.addi(first.registers.item(), row)
    return at, memref.load(list_, [_index(at)])


def _per_thread(x) -> FragmentedArray:
    """A number of each thread's own as `SLOTS`."""
    one = vector.from_elements(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), [x])
    return FragmentedArray(_registers=np.array([one], dtype=object), _layout=SLOTS.layout.to_mgpu(), _is_signed=True)


def _source(slots, cache, size: int) -> tuple:
    """(whether the thread's slot is one, where its row is)."""
    i64 = ir.IntegerType.get_signless(64)
    slot = vector.extract(slots.registers.item(), [], [0])
    real = arith.cmpi(arith.CmpIPredicate.ult, slot, number(ir.MemRefType(cache.type).shape[0]))
    return real, beyond(utils.memref_ptr(cache), arith.muli(arith.extui(i64, slot), arith.constant(i64, size)))


def _barrier(turns, place: int):
    return utils.BarrierRef(utils.memref_ptr(turns), number(place), None, 1)  # type: ignore[reportArgumentType]


def _phases():
    """Where the thread's phases are, a bit for each place."""
    thread = arith.remui(utils.thread_idx(), number(THREADS))
    return _index(arith.addi(thread, number(THREADS)))


def _index(x):
    return arith.index_cast(ir.IndexType.get(), x)


def _lane():
    return arith.remui(utils.thread_idx(), number(32))


def _warp():
    """The warp's number in its warpgroup."""
    return arith.remui(arith.divui(utils.thread_idx(), number(32)), number(WARPS))
