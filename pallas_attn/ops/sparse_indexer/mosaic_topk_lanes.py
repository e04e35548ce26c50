"""What the Hopper selection does with a row's numbers: in registers, and in words that Pallas has no name for.

A CTA of 16 warps holds a part of a row, a cluster of CTAs the whole. A warp owns consecutive columns, of which a lane
holds every 32nd, so that a ballot speaks of 32 neighbours. Rows that no cluster can hold are read again by every step.
Numbers outside of the row's range are NaN here, which no comparison counts.
"""
# pyright: reportCallIssue=false
# the first parameter of an inline function is the compiler's own

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray, TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_attn.runtime.mosaic import Layout

WARPGROUPS, WARPS, THREADS = 4, 16, 512
UNIT = WARPGROUPS * 4 * 256  # columns of eight registers of all threads
MOST_UNITS = 8  # that registers hold
SAMPLE = 8  # registers of a thread that the first guess is made from
SPLAT = Layout.WG_SPLAT(())
I32, F32 = jnp.int32, jnp.float32
NUMBER = plgpu.ShapeDtypeStruct((), I32, layout=SPLAT)
REF = plgpu.RefType()
NAN, ALL = "0x7fffffff", "0xffffffff"
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
# Words that signal themselves: a barrier of the CTA that they go to counts their bytes, and its warps, which wait for
# it. The cluster's own barrier would have each word behind a fence of all of memory.
SEND = (
    "@p mapa.shared::cluster.u32 a, $1, $0; @p mapa.shared::cluster.u32 b, $3, $0;"
    " @p st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], $2, [b];"
)
AWAIT = (
    "{ .reg .pred p; .reg .b64 t; setp.ne.u32 p, $0, 0; @p bra done;"
    " mbarrier.arrive.expect_tx.shared::cta.b64 t, [$1], %d;"
    " again: mbarrier.try_wait.shared::cta.b64 p, [$1], t; @!p bra again;"
    f" done: bar.warp.sync {ALL}; }}"
)


class Form(NamedTuple):
    """The static shape of the kernel for one problem."""

    rows: int
    columns: int
    k: int
    ctas: int  # of a cluster
    units: int  # of UNIT columns that a CTA has in registers at a time
    segments: int  # of so many columns that a CTA takes, one after the other
    staged: bool  # rows come by TMA, the next one's while one is searched
    clusters: int
    streamed: bool = False  # rows pass by, and their parts' lists are what the registers have

    @property
    def part(self) -> int:
        """Columns of a CTA."""
        return self.segments * self.units * UNIT

    @property
    def whole(self) -> bool:
        """Whether a row fills all registers."""
        return self.ctas * self.part == self.columns


def tile_layout(units: int):
    """Registers of a warpgroup's [4 units, 256]: warp w holds `units` rows, lane l every 32nd number of them."""
    tiling = Tiling(((4 * units, 256), (units, 256), (1, 32), (1, 1)))
    t = TiledLayout(tiling, warp_dims=(-8,), lane_dims=(-3,), vector_dim=-1, _check_canonical=False).canonicalize()
    return Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)


def _i32():
    return ir.IntegerType.get_signless(32)


def _f32():
    return ir.F32Type.get()


def _int(x: int):
    return arith.constant(_i32(), x)


def _float(x: float):
    return arith.constant(_f32(), x)


def _lane():
    return arith.andi(utils.thread_idx(), _int(31))


def _number(x) -> FragmentedArray:
    """One number a thread as Pallas sees it: it takes it for the same in all."""
    return FragmentedArray.splat(x, shape=(), is_signed=True)


def _of(x):
    """The register of such a number."""
    return x.registers.item()


def _registers(x) -> list:
    """A tile's registers of one thread, in the order of their columns."""
    vector = lambda r: isinstance(r.type, ir.VectorType)  # noqa: E731
    return [llvm.extractelement(r, _int(0)) if vector(r) else r for r in x.registers.flat]


def _tile(like, registers: Sequence) -> FragmentedArray:
    """Registers as a tile of the form of another."""
    new = np.empty(like.registers.shape, dtype=object)
    for i, (old, r) in enumerate(zip(like.registers.flat, registers, strict=True)):
        new.flat[i] = llvm.insertelement(old, r, _int(0)) if isinstance(old.type, ir.VectorType) else r
    return FragmentedArray(_registers=new, _layout=like.layout, _is_signed=None)


def _tree(xs: Sequence, combine: Callable):
    """All of `xs` combined, in a tree."""
    xs = list(xs)
    while len(xs) > 1:
        xs = [combine(*xs[i : i + 2]) if i + 1 < len(xs) else xs[i] for i in range(0, len(xs), 2)]
    return xs[0]


def _redux(x, kind):
    return utils.redux(x, _int(-1), kind)


def _shuffled(x):
    """The sum over lanes of floats, in a fixed order."""
    for distance in (1, 2, 4, 8, 16):
        x = arith.addf(x, utils.shfl_bfly(x, distance))
    return x


def _greater(x, y):
    return arith.cmpf(arith.CmpFPredicate.OGT, x, y)


@dataclasses.dataclass
class Lanes:
    """One CTA's part of a row, and the operations on it. `turn` alternates between 0 and 1 from one operation that
    returns something to the next: what one has written, the next one leaves alone."""

    form: Form
    x: Any  # [rows, columns], or [rows, columns / 256, 256] where staged
    out: Any
    tile: Any  # where a staged row arrives
    words: Any  # int32 [2, 3, warps of the cluster], and four that are two barriers if they signal themselves
    here: Any
    signals: bool = False  # whether they do

    def __post_init__(self) -> None:
        self.layout = tile_layout(self.form.units)
        self.shape = plgpu.ShapeDtypeStruct((4 * self.form.units, 256), F32, layout=self.layout)
        self.rank = lax.axis_index("rank") if self.form.ctas > 1 else jnp.int32(0)
        self.warpgroup = lax.axis_index("warpgroup")

    # Rows

    def fetch(self, row) -> None:
        """Start the copy of the CTA's part of a row."""
        if self.form.staged:
            height = 16 * self.form.units
            source = self.x.at[row, pl.ds(self.rank * height, height)]
            pl.when(self.warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(source, self.tile, self.here))

    def take(self, row, first, end) -> None:
        """Go on to a row, of which the columns first to end count."""
        self.row, self.first, self.end = row, first, end
        if self.form.segments > 1:
            return
        if not self.form.staged:
            self.resident = self.load(0)
            return
        plgpu.barrier_wait(self.here)
        height = 4 * self.form.units
        mine = self.tile.at[pl.ds(self.warpgroup * height, height)]
        x = plgpu.load(mine, layout=self.layout, optimized=False)
        full = (first == 0) & (end == self.form.columns) & self.form.whole
        self.resident = lax.cond(full, lambda: x, lambda: self.masked(x))

    def column(self, segment):
        """The column of the thread's first register in a segment."""
        share = self.form.part // WARPS
        base = self.rank * self.form.part + segment * (share // self.form.segments)

        @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=NUMBER)
        def column(_, base):
            own = arith.addi(arith.muli(utils.warp_idx(), _int(share)), _lane())
            return _number(arith.addi(_of(base), own))

        return column(base)

    def masked(self, x):
        """A tile with NaN outside of the range."""

        @plgpu.inline_mgpu(arg_types=(self.layout, SPLAT, SPLAT, SPLAT), return_type=self.shape)
        def masked(_, x, at, first, end):
            nan, kept = _float(float("nan")), []
            for i, r in enumerate(_registers(x)):
                inside = _inside(arith.addi(_of(at), _int(32 * i)), _of(first), _of(end))
                kept.append(arith.select(inside, r, nan))
            return _tile(x, kept)

        return masked(x, self.column(0), self.first, self.end)

    def load(self, segment):
        """A segment's tile from global memory; nothing outside of the range is read."""
        count = 8 * self.form.units

        @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, SPLAT, REF), return_type=self.shape)
        def load(_, at, first, end, row):
            ptx = (
                "{ .reg .pred p; .reg .b64 a; setp.ge.s32 p, $1, $2; setp.lt.and.s32 p, $1, $3, p;"
                f" mad.wide.s32 a, $1, 4, $4; mov.b32 $0, {NAN}; @p ld.global.f32 $0, [a]; }}"
            )
            pointer = utils.memref_ptr(row)
            got = [
                utils.inline_ptx(
                    ptx, arith.addi(_of(at), _int(32 * i)), _of(first), _of(end), pointer,
                    result_types=_f32(), has_side_effects=True,
                )
                for i in range(count)
            ]  # fmt: skip
            like = FragmentedArray.splat(_float(0.0), self.shape.shape, layout=_mosaic(self.layout), is_signed=None)
            return _tile(like, got)

        return load(self.column(segment), self.first, self.end, self.x.at[self.row])

    def over(self, body: Callable, start):
        """body(segment, its tile, carry) for all segments."""
        if self.form.segments == 1:
            return body(jnp.int32(0), self.resident, start)
        return lax.fori_loop(0, self.form.segments, lambda s, carry: body(s, self.load(s), carry), start)

    # What all CTAs of the cluster find together

    def exchange(self, values: Sequence, turn, words) -> list[list]:
        """Each warp's values to all threads of the cluster: lists of the registers that lanes then hold, word l and
        every 32nd from there, some of which repeat others if there are fewer than 32 words."""
        ctas, most = self.form.ctas, self.form.ctas * WARPS
        lane, warp = _lane(), utils.warp_idx()
        pointer = utils.memref_ptr(words)
        at = lambda word, index: utils.getelementptr(  # noqa: E731
            pointer, [arith.addi(arith.addi(arith.muli(turn, _int(3 * most)), _int(word * most)), index)], _i32()
        )
        mine = warp
        if ctas > 1:
            rank = utils.inline_ptx("mov.u32 $0, %cluster_ctarank;", result_types=_i32())
            mine = arith.addi(arith.muli(rank, _int(WARPS)), warp)
        put, wait, barrier = "@p st.shared.b32 [$1], $2;", f"bar.sync 15, {THREADS};", []
        if ctas > 1:  # lane l writes to the CTA of rank l
            put, wait = "@p mapa.shared::cluster.u32 a, $1, $0; @p st.shared::cluster.b32 [a], $2;", MEET
        if self.signals:
            put, wait = SEND, AWAIT % (4 * ctas * len(values))
            barrier = [at(0, arith.subi(_int(6 * most), arith.muli(turn, _int(3 * most - 2))))]
        put = f"{{ .reg .pred p; .reg .b32 a, b; setp.lt.u32 p, $0, {ctas}; {put} }}"
        for word, value in enumerate(values):
            utils.inline_ptx(put, lane, at(word, mine), value, *barrier, has_side_effects=True)
        utils.inline_ptx(wait, lane, *barrier, has_side_effects=True, convergent=True)
        got = []
        for word in range(len(values)):
            index = [arith.andi(arith.addi(lane, _int(32 * i)), _int(most - 1)) for i in range(max(most // 32, 1))]
            got.append(
                [
                    utils.inline_ptx("ld.shared.b32 $0, [$1];", at(word, i), result_types=_i32(), has_side_effects=True)
                    for i in index
                ]
            )
        return got

    def owners(self):
        """The words that this lane has of `exchange`: (their warps in the cluster, whether they count once)."""
        most = self.form.ctas * WARPS
        index = [arith.addi(_lane(), _int(32 * i)) for i in range(max(most // 32, 1))]
        return index, [arith.cmpi(arith.CmpIPredicate.ult, i, _int(most)) for i in index]

    def total(self, words: list):
        """The sum of all warps' numbers."""
        _, real = self.owners()
        return _redux(_tree([arith.select(p, w, _int(0)) for p, w in zip(real, words, strict=True)], arith.addi),
                      utils.ReductionKind.ADD)  # fmt: skip

    def before(self, words: list):
        """The sum of the numbers of all warps before this one."""
        index, _ = self.owners()
        mine = utils.warp_idx()
        if self.form.ctas > 1:
            rank = utils.inline_ptx("mov.u32 $0, %cluster_ctarank;", result_types=_i32())
            mine = arith.addi(arith.muli(rank, _int(WARPS)), mine)
        earlier = [arith.cmpi(arith.CmpIPredicate.ult, i, mine) for i in index]
        kept = [arith.select(p, w, _int(0)) for p, w in zip(earlier, words, strict=True)]
        return _redux(_tree(kept, arith.addi), utils.ReductionKind.ADD)

    def count(self, least, turn):
        """float32: how many numbers are at least `least`."""

        @plgpu.inline_mgpu(arg_types=(self.layout, SPLAT, SPLAT), return_type=NUMBER)
        def part(_, x, least, carry):
            chains: list[Any] = [None] * 8
            for i, r in enumerate(_registers(x)):  # one unit compares, another one adds
                one = utils.inline_ptx("set.ge.f32.f32 $0, $1, $2;", r, _of(least), result_types=_f32())
                chains[i % 8] = one if chains[i % 8] is None else arith.addf(chains[i % 8], one)
            found = _tree([c for c in chains if c is not None], arith.addf)
            return _number(arith.addi(_of(carry), arith.fptosi(_i32(), found)))

        @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, REF), return_type=NUMBER)
        def whole(_, mine, turn, words):
            sums = self.exchange([_redux(_of(mine), utils.ReductionKind.ADD)], _of(turn), words)
            return _number(self.total(sums[0]))

        mine = self.over(lambda _, x, carry: part(x, least, carry), jnp.int32(0))
        return whole(mine, turn, self.words).astype(F32)

    def sample(self, turn) -> tuple:
        """(sum, sum of squares, count) of some finite numbers of the row, float32, the same in every run."""

        @plgpu.inline_mgpu(arg_types=(self.layout, SPLAT, REF), return_type=(NUMBER,) * 3)
        def sample(_, x, turn, words):
            some = _registers(x)
            some, sums = some[:: max(len(some) // SAMPLE, 1)], []
            finite = [arith.andi(_greater(r, _float(-1e37)), _greater(_float(1e37), r)) for r in some]
            kept = [arith.select(p, r, _float(0.0)) for p, r in zip(finite, some, strict=True)]
            ones = [arith.select(p, _float(1.0), _float(0.0)) for p in finite]
            for numbers in (kept, [arith.mulf(r, r) for r in kept], ones):
                sums.append(arith.bitcast(_i32(), _shuffled(_tree(numbers, arith.addf))))
            _, real = self.owners()
            out = []
            for got in self.exchange(sums, _of(turn), words):
                floats = [
                    arith.select(p, arith.bitcast(_f32(), w), _float(0.0)) for p, w in zip(real, got, strict=True)
                ]
                out.append(_number(arith.bitcast(_i32(), _shuffled(_tree(floats, arith.addf)))))
            return tuple(out)

        x = self.resident if self.form.segments == 1 else self.load(0)
        return tuple(lax.bitcast_convert_type(s, F32) for s in sample(x, turn, self.words))

    def nearest(self, low, high, turn) -> tuple:
        """Order keys of (the least number of at least `low`, the greatest below `high`); of all for a `high` of NaN."""

        @plgpu.inline_mgpu(arg_types=(self.layout, *(SPLAT,) * 4), return_type=(NUMBER,) * 2)
        def part(_, x, low, high, least, most):
            up, down = [], []
            for r in _registers(x):
                reaches = arith.cmpf(arith.CmpFPredicate.OGE, r, _of(low))
                up.append(arith.select(reaches, r, _float(float("inf"))))
                below = arith.cmpf(arith.CmpFPredicate.ULT, r, _of(high))
                down.append(arith.select(below, r, _float(float("-inf"))))
            down.append(_float(float("-inf")))  # a thread may have nothing but NaN
            keys = [_key(_tree(up, arith.minnumf)), _key(_tree(down, arith.maxnumf))]
            return _number(arith.minsi(_of(least), keys[0])), _number(arith.maxsi(_of(most), keys[1]))

        @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, SPLAT, REF), return_type=(NUMBER,) * 2)
        def whole(_, least, most, turn, words):
            kinds = (utils.ReductionKind.MIN, utils.ReductionKind.MAX)
            mine = [_redux(_of(x), kind) for x, kind in zip((least, most), kinds, strict=True)]
            low, high = self.exchange(mine, _of(turn), words)
            low, high = _tree(low, arith.minsi), _tree(high, arith.maxsi)
            return tuple(_number(_redux(x, kind)) for x, kind in zip((low, high), kinds, strict=True))

        start = jnp.int32(2**31 - 1), jnp.int32(-(2**31))
        return whole(*self.over(lambda _, x, carry: part(x, low, high, *carry), start), turn, self.words)

    # What leaves

    def place(self, least, turn) -> None:
        """The columns of all numbers of at least `least`, which are k."""

        @plgpu.inline_mgpu(arg_types=(self.layout, SPLAT, SPLAT), return_type=NUMBER)
        def part(_, x, least, carry):
            ones = [arith.extui(_i32(), arith.cmpf(arith.CmpFPredicate.OGE, r, _of(least))) for r in _registers(x)]
            return _number(arith.addi(_of(carry), _tree(ones, arith.addi)))

        @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, REF), return_type=NUMBER)
        def begin(_, mine, turn, words):
            sums = self.exchange([_redux(_of(mine), utils.ReductionKind.ADD)], _of(turn), words)
            return _number(self.before(sums[0]))

        @plgpu.inline_mgpu(arg_types=(self.layout, *(SPLAT,) * 3, REF), return_type=NUMBER)
        def leave(_, x, least, at, base, out):
            pointer, base = utils.memref_ptr(out), _of(base)
            before = utils.inline_ptx("mov.u32 $0, %lanemask_lt;", result_types=_i32())
            for i, r in enumerate(_registers(x)):
                base = utils.inline_ptx(
                    "{ .reg .pred s; .reg .b32 m, q, u; .reg .b64 a; setp.ge.f32 s, $1, $2;"
                    f" vote.sync.ballot.b32 m, s, {ALL}; and.b32 q, m, $5; popc.b32 q, q; add.u32 q, q, $6;"
                    f" setp.lt.and.u32 s, q, {self.form.k}, s; mad.wide.u32 a, q, 4, $4; add.u32 u, $3, {32 * i};"
                    " @s st.global.b32 [a], u; popc.b32 m, m; add.u32 $0, $6, m; }",
                    r, _of(least), _of(at), pointer, before, base,
                    result_types=_i32(), has_side_effects=True, convergent=True,
                )  # fmt: skip
            return _number(base)

        mine = self.over(lambda _, x, carry: part(x, least, carry), jnp.int32(0))
        base = begin(mine, turn, self.words)
        out = self.out.at[self.row]
        self.over(lambda s, x, base: leave(x, least, self.column(s) - self.first, base, out), base)

    def place_with_ties(self, least, need, turn) -> None:
        """The columns of all numbers above `least`, and of the first `need` of its equals; NaN is -inf here."""
        low = (least == -jnp.inf).astype(I32)

        def equal(r, at, least, low, first, end):
            same = arith.ori(
                arith.cmpf(arith.CmpFPredicate.OEQ, r, least), arith.cmpi(arith.CmpIPredicate.ne, low, _int(0))
            )
            above = arith.xori(_greater(r, least), arith.constant(ir.IntegerType.get_signless(1), 1))
            return arith.andi(arith.andi(same, above), _inside(at, first, end))

        @plgpu.inline_mgpu(arg_types=(self.layout, *(SPLAT,) * 7), return_type=(NUMBER,) * 2)
        def part(_, x, least, low, at, first, end, above, same):
            least, low, at, first, end = map(_of, (least, low, at, first, end))
            some, other = [], []
            for i, r in enumerate(_registers(x)):
                some.append(arith.extui(_i32(), _greater(r, least)))
                other.append(arith.extui(_i32(), equal(r, arith.addi(at, _int(32 * i)), least, low, first, end)))
            sums = [arith.addi(_of(c), _tree(n, arith.addi)) for c, n in ((above, some), (same, other))]
            return tuple(map(_number, sums))

        @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, SPLAT, REF), return_type=(NUMBER,) * 2)
        def begin(_, above, same, turn, words):
            mine = [_redux(_of(x), utils.ReductionKind.ADD) for x in (above, same)]
            return tuple(_number(self.before(sums)) for sums in self.exchange(mine, _of(turn), words))

        @plgpu.inline_mgpu(arg_types=(self.layout, *(SPLAT,) * 8, REF), return_type=(NUMBER,) * 2)
        def leave(_, x, least, low, at, first, end, need, above, same, out):
            least, low, at, first, end, need, above, same = map(_of, (least, low, at, first, end, need, above, same))
            pointer = utils.memref_ptr(out)
            before = utils.inline_ptx("mov.u32 $0, %lanemask_lt;", result_types=_i32())
            for i, r in enumerate(_registers(x)):
                column = arith.addi(at, _int(32 * i))
                one = arith.extui(_i32(), equal(r, column, least, low, first, end))
                above, same = utils.inline_ptx(
                    "{ .reg .pred s, t; .reg .b32 m, k, q, z, u; .reg .b64 a; setp.gt.f32 s, $2, $3;"
                    " setp.ne.u32 t, $4, 0;"
                    f" vote.sync.ballot.b32 m, s, {ALL}; vote.sync.ballot.b32 k, t, {ALL};"
                    " and.b32 q, m, $8; popc.b32 q, q; add.u32 q, q, $9;"
                    " and.b32 z, k, $8; popc.b32 z, z; add.u32 z, z, $10;"
                    " setp.lt.and.u32 t, z, $11, t; or.pred s, s, t; min.u32 z, z, $11; add.u32 q, q, z;"
                    f" setp.lt.and.u32 s, q, {self.form.k}, s; mad.wide.u32 a, q, 4, $7; sub.s32 u, $5, $6;"
                    " @s st.global.b32 [a], u; popc.b32 m, m; add.u32 $0, $9, m; popc.b32 k, k; add.u32 $1, $10, k; }",
                    r, least, one, column, first, pointer, before, above, same, need,
                    result_types=(_i32(), _i32()), has_side_effects=True, convergent=True,
                )  # fmt: skip
            return _number(above), _number(same)

        bounds = (self.first, self.end)
        nothing = jnp.int32(0), jnp.int32(0)
        mine = self.over(lambda s, x, c: part(x, least, low, self.column(s), *bounds, *c), nothing)
        base = begin(*mine, turn, self.words)
        out = self.out.at[self.row]
        self.over(lambda s, x, c: leave(x, least, low, self.column(s), *bounds, need, *c, out), tuple(base))

    def place_all(self, count) -> None:
        """0, 1, .. count - 1, then -1: the positions of a row of no more than k columns."""

        @plgpu.inline_mgpu(arg_types=(SPLAT, REF), return_type=NUMBER)
        def place(_, count, out):
            pointer, thread = utils.memref_ptr(out), utils.thread_idx()
            for at in range(0, self.form.k, THREADS):
                utils.inline_ptx(
                    "{ .reg .pred p; .reg .b32 u; .reg .b64 a; setp.lt.s32 p, $0, $1; selp.b32 u, $0, -1, p;"
                    f" setp.lt.s32 p, $0, {self.form.k}; mad.wide.s32 a, $0, 4, $2; @p st.global.b32 [a], u; }}",
                    arith.addi(thread, _int(at)), _of(count), pointer, has_side_effects=True,
                )  # fmt: skip
            return _number(_of(count))

        place(count, self.out.at[self.row])


def _inside(at, first, end):
    """Whether first <= at < end."""
    return arith.andi(arith.cmpi(arith.CmpIPredicate.sge, at, first), arith.cmpi(arith.CmpIPredicate.slt, at, end))


def _key(x):
    """The order key of a float: an int32 that rises with it."""
    bits = arith.bitcast(_i32(), x)
    return arith.xori(bits, arith.andi(arith.shrsi(bits, _int(31)), _int(0x7FFFFFFF)))


@functools.cache
def _mosaic(layout):
    """A Pallas layout as Mosaic's own."""
    return layout.to_mgpu()
