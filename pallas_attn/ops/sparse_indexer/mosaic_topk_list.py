"""What the streaming form of the Hopper selection does with pieces of a row and with its list: in registers, and in
words that Pallas has no name for (see `mosaic_topk_stream`).

A piece is a tile whose registers stand for vectors: of 128 neighbours, a lane holds four, and a warp's vectors follow
each other. So does what is read back of the list. How many of a warp's chosen stand before a lane's own is found for
four vectors at a time: their counts, of at most 128, are the bytes of one word, which five shuffles add up.
"""
# pyright: reportCallIssue=false
# the first parameter of an inline function is the compiler's own

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_attn.ops.sparse_indexer.mosaic_topk_lanes import (
    ALL,
    F32,
    MEET,
    NUMBER,
    REF,
    SPLAT,
    THREADS,
    UNIT,
    WARPS,
    Form,
    Lanes,
    _f32,
    _float,
    _i32,
    _inside,
    _int,
    _lane,
    _mosaic,
    _number,
    _of,
    _registers,
    _tile,
    tile_layout,
)
from pallas_attn.ops.sparse_indexer.mosaic_topk_search import Found

LIST_UNITS = 4  # of UNIT numbers that the list holds
CAPACITY = LIST_UNITS * UNIT
PIECE_UNITS = 2
PIECE = PIECE_UNITS * UNIT  # columns that a CTA takes at a time; the list holds them beside the largest k
RING = 2  # pieces on their way
SIGNALS = True  # whether words between the CTAs of a cluster signal themselves
VECTOR = 128  # columns of four registers of a warp
# p: whether $2 is among the chosen, q: whether it is one of $3's equals, of which $5 came before, and the first $6 are.
EVERY = "setp.ge.f32 p, $2, $3; setp.eq.f32 q, $2, $3;"
SOME = "setp.eq.f32 q, $2, $3; setp.lt.and.s32 p, $5, $6, q; setp.gt.or.f32 p, $2, $3, p;"
# Outputs come last in all inline PTX here, for they may share registers with inputs.
NEXT = "mov.b32 a, $4; @p add.u32 a, a, 1; mov.b32 b, $5; @q add.u32 b, b, 1; mov.b32 $0, a; mov.b32 $1, b;"


class Survey(NamedTuple):
    """Where the numbers of a piece go that reach a bound: int32s."""

    lanes: Any  # bytes: how many of the warp's of each vector stand before the lane's own
    sums: Any  # bytes: of the whole warp
    before: Any  # of all warps before this one
    total: Any  # of the CTA


def _packed(vectors: Sequence[Sequence], holds: str, least):
    """How many of a lane's numbers of up to four vectors compare so with `least`: a byte for each vector."""
    word = _int(0)
    for i, vector in enumerate(vectors):
        for r in vector:
            word = utils.inline_ptx(
                f"{{ .reg .pred p; setp.{holds}.f32 p, $1, $2; mov.b32 $0, $3; @p add.u32 $0, $0, {1 << 8 * i}; }}",
                r, least, word, result_types=_i32(),
            )  # fmt: skip
    return word


def _prefix(word):
    """(the sum of the lanes' words before this one, that of the whole warp)."""
    total = word
    for distance in (1, 2, 4, 8, 16):
        total = utils.inline_ptx(
            f"{{ .reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, {distance}, 0, {ALL};"
            " selp.b32 t, t, 0, p; add.u32 $0, $1, t; }",
            total, result_types=_i32(), has_side_effects=True, convergent=True,
        )  # fmt: skip
    last = utils.inline_ptx(
        f"shfl.sync.idx.b32 $0, $1, 31, 31, {ALL};", total,
        result_types=_i32(), has_side_effects=True, convergent=True,
    )  # fmt: skip
    return arith.subi(total, word), last


def _byte(word, i: int):
    return arith.andi(arith.shrui(word, _int(8 * i)), _int(0xFF))


def _bytes(word):
    """The sum of a word's bytes."""
    pairs = arith.addi(arith.andi(word, _int(0xFF00FF)), arith.andi(arith.shrui(word, _int(8)), _int(0xFF00FF)))
    return arith.addi(arith.andi(pairs, _int(0xFFFF)), arith.shrui(pairs, _int(16)))


def _vectors(x: Sequence) -> list:
    return [x[i : i + 4] for i in range(0, len(x), 4)]


def _starts(vectors: Sequence[Sequence], holds: str, least) -> tuple[list, Any]:
    """(how many of the warp's that compare so stand before each of the lane's vectors, how many there are)."""
    starts, sum_ = [], _int(0)
    for i in range(0, len(vectors), 4):
        some = vectors[i : i + 4]
        own, sums = _prefix(_packed(some, holds, least))
        for j in range(len(some)):
            starts.append(arith.addi(sum_, _byte(own, j)))
            sum_ = arith.addi(sum_, _byte(sums, j))
    return starts, sum_


def _at(pointer, index):
    return utils.getelementptr(pointer, [index], _i32())


def _own(base, registers: int):
    """The column, or place of the list, of a thread's first register of so many."""
    share = arith.muli(utils.warp_idx(), _int(registers * 32))
    return arith.addi(arith.addi(base, share), arith.muli(_lane(), _int(4)))


def _blank(units: int) -> FragmentedArray:
    layout = _mosaic(tile_layout(units))
    return FragmentedArray.splat(_float(0.0), (4 * units, 256), layout=layout, is_signed=None)


def _tile_of(units: int):
    return plgpu.ShapeDtypeStruct((4 * units, 256), F32, layout=tile_layout(units))


@dataclasses.dataclass
class Listed:
    """One CTA's part of a row and its list, and the operations on them; `turn` is as of `Lanes`."""

    form: Form
    x: Any  # [rows, columns]
    out: Any
    list: Any  # int32 [2 CAPACITY]: the numbers' bits, -inf for NaN, and then their columns, ascending
    ring: Any  # float32 [RING PIECE]: where pieces arrive
    words: Any  # of the cluster's exchanges
    own: Any  # of the CTA's

    def __post_init__(self) -> None:
        self.alone = Lanes(self.form._replace(ctas=1), self.x, self.out, None, self.own, None)
        self.together = Lanes(self.form, self.x, self.out, None, self.words, None, SIGNALS and self.form.ctas > 1)

    def prepare(self) -> None:
        """Make the barriers of words that signal themselves, before any CTA of the cluster sends one."""

        @plgpu.inline_mgpu(arg_types=(SPLAT, REF), return_type=NUMBER)
        def prepare(_, rank, words):
            barriers = _at(utils.memref_ptr(words), _int(6 * self.form.ctas * WARPS))
            utils.inline_ptx(
                f"{{ .reg .pred p; setp.eq.u32 p, $0, 0; @p mbarrier.init.shared::cta.b64 [$1], {WARPS};"
                f" @p mbarrier.init.shared::cta.b64 [$1+8], {WARPS}; fence.mbarrier_init.release.cluster; {MEET} }}",
                utils.thread_idx(), barriers, has_side_effects=True, convergent=True,
            )  # fmt: skip
            return _number(_of(rank))

        if self.together.signals:
            prepare(self.together.rank, self.words)

    def take(self, row, first, end) -> None:
        """Go on to a row, of whose columns first to end each CTA takes a share that begins at a multiple of four."""
        self.together.row, self.first = row, first
        origin = (first >> 2) << 2
        share = lax.div(end - origin + 4 * self.form.ctas - 1, jnp.int32(4 * self.form.ctas)) * 4
        self.begin = origin + self.together.rank * share
        self.end = jnp.minimum(self.begin + share, end)
        self.pieces = lax.div(jnp.maximum(self.end - self.begin, 0) + PIECE - 1, jnp.int32(PIECE))

    def fetch(self, piece) -> None:
        """Start the copy of a piece, as far as there is one, to its place in the ring; each thread copies what it will
        read itself, and waits for no other."""
        wide = self.form.columns % 4 == 0

        @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, SPLAT, REF, REF), return_type=NUMBER)
        def fetch(_, base, end, place, row, ring):
            column, place = _own(_of(base), 8 * PIECE_UNITS), _own(_of(place), 8 * PIECE_UNITS)
            row, ring = utils.memref_ptr(row), utils.memref_ptr(ring)
            for i in range(2 * PIECE_UNITS):
                for j in range(0, 4, 4 if wide else 1):
                    at = arith.addi(column, _int(VECTOR * i + j))
                    utils.inline_ptx(
                        f"cp.async.{'cg' if wide else 'ca'}.shared.global [$0], [$1], {16 if wide else 4};",
                        _at(ring, arith.addi(place, _int(VECTOR * i + j))), _at(row, at),
                        predicate=arith.cmpi(arith.CmpIPredicate.slt, at, _of(end)),
                    )  # fmt: skip
            utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)
            return _number(_of(base))

        place = lax.rem(piece, jnp.int32(RING)) * PIECE
        fetch(self.begin + piece * PIECE, self.end, place, self.x.at[self.together.row], self.ring)

    def read(self, piece):
        """A piece, of which there are no more than those after it on their way, with -inf for NaN, and NaN outside of
        the range."""
        base = self.begin + piece * PIECE

        @plgpu.inline_mgpu(arg_types=(SPLAT, REF), return_type=_tile_of(PIECE_UNITS))
        def read(_, place, ring):
            utils.inline_ptx(f"cp.async.wait_group {RING - 1};", has_side_effects=True)
            place, pointer, got = _own(_of(place), 8 * PIECE_UNITS), utils.memref_ptr(ring), []
            for i in range(2 * PIECE_UNITS):
                for r in _shared(_at(pointer, arith.addi(place, _int(VECTOR * i))), _f32()):
                    got.append(utils.inline_ptx("max.f32 $0, $1, 0fFF800000;", r, result_types=_f32()))
            return _tile(_blank(PIECE_UNITS), got)

        @plgpu.inline_mgpu(arg_types=(tile_layout(PIECE_UNITS), *(SPLAT,) * 3), return_type=_tile_of(PIECE_UNITS))
        def masked(_, x, base, first, end):
            at, kept = _own(_of(base), 8 * PIECE_UNITS), []
            for i, r in enumerate(_registers(x)):
                column = arith.addi(at, _int(VECTOR * (i // 4) + i % 4))
                kept.append(arith.select(_inside(column, _of(first), _of(end)), r, _float(float("nan"))))
            return _tile(x, kept)

        x = read(lax.rem(piece, jnp.int32(RING)) * PIECE, self.ring)
        full = (self.first <= base) & (base + PIECE <= self.end)
        return lax.cond(full, lambda: x, lambda: masked(x, base, self.first, self.end))

    def survey(self, x, least, turn) -> Survey:
        """Where the numbers of a piece go that are at least `least`."""

        @plgpu.inline_mgpu(arg_types=(tile_layout(PIECE_UNITS), SPLAT, SPLAT, REF), return_type=(NUMBER,) * 4)
        def survey(_, x, least, turn, words):
            own, sums = _prefix(_packed(_vectors(_registers(x)), "ge", _of(least)))
            (counts,) = self.alone.exchange([_bytes(sums)], _of(turn), words)
            return tuple(map(_number, (own, sums, self.alone.before(counts), self.alone.total(counts))))

        return Survey(*survey(x, least, turn, self.own))

    def append(self, x, least, found: Survey, listed, piece) -> None:
        """Those numbers to the end of the list, which has so many, and their columns."""

        @plgpu.inline_mgpu(arg_types=(tile_layout(PIECE_UNITS), *(SPLAT,) * 5, REF), return_type=NUMBER)
        def append(_, x, least, lanes, sums, to, base, list_):
            at, to, pointer = _own(_of(base), 8 * PIECE_UNITS), _of(to), utils.memref_ptr(list_)
            for i, vector in enumerate(_vectors(_registers(x))):
                place = arith.addi(to, _byte(_of(lanes), i))
                for j, r in enumerate(vector):
                    place = utils.inline_ptx(
                        "{ .reg .pred p; setp.ge.f32 p, $1, $2; @p st.shared.b32 [$4], $1;"
                        f" @p st.shared.b32 [$4+{4 * CAPACITY}], $5; mov.b32 $0, $3; @p add.u32 $0, $0, 1; }}",
                        r, _of(least), place, _at(pointer, place), arith.addi(at, _int(VECTOR * i + j)),
                        result_types=_i32(), has_side_effects=True,
                    )  # fmt: skip
                to = arith.addi(to, _byte(_of(sums), i))
            return _number(to)

        to = listed + found.before
        append(x, least, found.lanes, found.sums, to, self.begin + piece * PIECE, self.list)

    def extend(self, x, listed, piece) -> None:
        """All numbers of a piece to the end of the list, at a multiple of four: faster by banks that do not collide."""

        @plgpu.inline_mgpu(arg_types=(tile_layout(PIECE_UNITS), SPLAT, SPLAT, REF), return_type=NUMBER)
        def extend(_, x, listed, base, list_):
            at, to = (_own(_of(x), 8 * PIECE_UNITS) for x in (base, listed))
            pointer = utils.memref_ptr(list_)
            for i, vector in enumerate(_vectors(_registers(x))):
                columns = [arith.addi(at, _int(VECTOR * i + j)) for j in range(4)]
                utils.inline_ptx(
                    "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
                    f" st.shared.v4.b32 [$0+{4 * CAPACITY}], {{$5, $6, $7, $8}};",
                    _at(pointer, arith.addi(to, _int(VECTOR * i))), *vector, *columns, has_side_effects=True,
                )  # fmt: skip
            return _number(_of(listed))

        extend(x, listed, self.begin + piece * PIECE, self.list)

    def hold(self, listed) -> None:
        """The list, of so many numbers, in registers, NaN behind it."""

        @plgpu.inline_mgpu(arg_types=(SPLAT, REF), return_type=_tile_of(LIST_UNITS))
        def hold(_, listed, list_):
            at, pointer, got = _own(_int(0), 8 * LIST_UNITS), utils.memref_ptr(list_), []
            for i in range(2 * LIST_UNITS):
                place = arith.addi(at, _int(VECTOR * i))
                for j, r in enumerate(_shared(_at(pointer, place), _f32())):
                    real = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(place, _int(j)), _of(listed))
                    got.append(arith.select(real, r, _float(float("nan"))))
            return _tile(_blank(LIST_UNITS), got)

        self.alone.resident = self.together.resident = hold(listed, self.list)

    def wait(self) -> None:
        """Until all threads of the CTA are here, and what they have written is."""

        @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=NUMBER)
        def wait(_, turn):
            utils.inline_ptx(f"bar.sync 15, {THREADS};", has_side_effects=True, convergent=True)
            return turn

        wait(self.first)

    def keep(self, found: Found) -> None:
        """Of the list, which is held, what a search of it has found, in its order."""
        put = f"@p st.shared.b32 [$9], $2; @p st.shared.b32 [$9+{4 * CAPACITY}], $8;"
        self._leave(self.alone, found, put, jnp.int32(0), self.own, self.list)

    def leave(self, found: Found) -> None:
        """The columns of what a search of the cluster's lists has found."""
        put = "@p st.global.b32 [$9], $8;"
        self._leave(self.together, found, put, self.first, self.words, self.out.at[self.together.row])

    def _leave(self, lanes: Lanes, found: Found, put: str, first, words, to) -> None:
        """Put the numbers ($2) that are found, and their columns from `first` on ($8), to their places ($9)."""
        for ties in (False, True):
            pl.when(found.every != ties)(lambda ties=ties: self._chosen(lanes, found, ties, put, first, words, to))

    def _chosen(self, lanes: Lanes, found: Found, ties: bool, put: str, first, words, to) -> None:
        """The same with or without a choice among the threshold's equals."""
        rule = SOME if ties else EVERY
        element = f"{{ .reg .pred p, q; .reg .b32 a, b; {rule} setp.lt.and.s32 p, $4, $7, p; {put} {NEXT} }}"

        @plgpu.inline_mgpu(arg_types=(tile_layout(LIST_UNITS), *(SPLAT,) * 5, *(REF,) * 3), return_type=NUMBER)
        def chosen(_, x, least, need, most, turn, first, list_, words, to):
            least, need, most, turn, first = map(_of, (least, need, most, turn, first))
            at, vectors = _own(_int(CAPACITY), 8 * LIST_UNITS), _vectors(_registers(x))
            places = [_at(utils.memref_ptr(list_), arith.addi(at, _int(VECTOR * i))) for i in range(len(vectors))]
            # All columns are read before the barrier of the exchange, from which on the list is written.
            columns = [_shared(place, _i32()) for place in places]
            rules = ("gt", "eq") if ties else ("ge",)
            starts, sums = zip(*(_starts(vectors, rule, least) for rule in rules), strict=True)
            before = [lanes.before(w) for w in lanes.exchange(sums, turn, words)]
            to = utils.memref_ptr(to)
            for i, vector in enumerate(vectors):
                place, *equals = (arith.addi(s[i], b) for s, b in zip(starts, before, strict=True))
                same = equals[0] if ties else _int(0)
                place = arith.addi(place, arith.minsi(same, need))
                for r, column in zip(vector, columns[i], strict=True):
                    place, same = utils.inline_ptx(
                        element, r, least, place, same, need, most, arith.subi(column, first), _at(to, place),
                        result_types=(_i32(), _i32()), has_side_effects=True,
                    )  # fmt: skip
            return _number(turn)

        asked = found.threshold, found.equals, found.chosen, found.turn
        chosen(lanes.resident, *asked, first, self.list, words, to)


def _shared(pointer, kind) -> tuple:
    """Four neighbours of the list, from a multiple of four on."""
    return utils.inline_ptx(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", pointer, result_types=(kind,) * 4, has_side_effects=True
    )
