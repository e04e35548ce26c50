"""FP8 tiles made f16 for the matrix unit, 16 codes of a lane at once.

Both forms lie in stripes of eight rows whose pieces of 16 bytes change places from row to row, as the matrix unit has
it. Four lanes share the 64 codes of a row's stripe, so that what eight of them read or write at once is all banks of
shared memory. What Pallas makes of the same words is three times as many instructions.
"""

import collections
import itertools

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_attn.runtime.mosaic import swizzled

THREADS, LANES = 128, 4  # of a warpgroup; that share a row of a stripe
ROWS = THREADS // LANES  # that are read at once
CODES = 16  # of a lane
STRIPE = LANES * CODES  # columns
AHEAD = 6  # loads before the first store


def widen(source, target, narrow, wide) -> None:
    """The codes of `source` [64, n] in f16 to `target`: FP8 lies in stripes of 64 bytes, f16 in stripes of 128. Every
    warp is done before with what reads the target; what is written has to be committed."""
    stripes = source.shape[1] // STRIPE

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(narrow, STRIPE)), plgpu.RefType(swizzled(wide, 2 * STRIPE))))
    def convert(_, source, target):
        thread = arith.remui(utils.thread_idx(), number(THREADS))
        row, piece = arith.divui(thread, number(LANES)), arith.remui(thread, number(LANES))
        turn = arith.remui(row, number(8))
        eighth = arith.divui(row, number(8))  # of 64 rows: a stripe of one is 512 bytes of codes
        at = _sum(
            arith.muli(eighth, number(8 * STRIPE * stripes)), arith.muli(turn, number(STRIPE)),
            arith.muli(arith.xori(piece, arith.divui(turn, number(2))), number(CODES)),
        )  # fmt: skip
        first = arith.xori(arith.muli(piece, number(2)), turn)
        to = _sum(
            arith.muli(eighth, number(16 * STRIPE * stripes)), arith.muli(turn, number(2 * STRIPE)),
            arith.muli(first, number(CODES)),
        )  # fmt: skip
        codes, target = beyond(utils.memref_ptr(source), at), utils.memref_ptr(target)
        places = beyond(target, to), beyond(target, arith.xori(to, number(CODES)))
        utils.warpgroup_barrier()
        words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        # Some loads are ahead of the stores: the compiler, which cannot tell their memory apart, leaves the order.
        begins = [8 * STRIPE * (i + j * (ROWS // 8) * stripes) for i in range(stripes) for j in range(64 // ROWS)]
        loads = (llvm.load(words, beyond(codes, begin), alignment=CODES) for begin in begins)
        ahead = collections.deque(itertools.islice(loads, AHEAD))
        for begin in begins:
            x = ahead.popleft()
            for half, place in enumerate(places):
                f16 = [word for i in range(2) for word in pairs(vector.extract(x, [], [2 * half + i]))]
                llvm.store(vector.from_elements(words, f16), beyond(place, 2 * begin), alignment=CODES)
            ahead.extend(itertools.islice(loads, 1))

    convert(source, target)  # type: ignore[reportCallIssue]  # the first parameter is the compiler's own


def pairs(word) -> list:
    """Four codes as two words of f16."""
    i32 = ir.IntegerType.get_signless(32)
    return list(utils.inline_ptx(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
        word, result_types=(i32, i32),
    ))  # fmt: skip


def _sum(*numbers):
    total, *others = numbers
    for number in others:
        total = arith.addi(total, number)
    return total


def beyond(pointer, offset):
    """A pointer so many bytes further on."""
    offset = number(offset) if isinstance(offset, int) else offset
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def number(x: int):
    """An int32 of MLIR's."""
    return arith.constant(ir.IntegerType.get_signless(32), x)
