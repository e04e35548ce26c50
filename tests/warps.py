"""Warps on a CPU, for kernels whose inner parts are inline PTX: a register is an array of one number a thread, a CTA
runs in lockstep, and the CTAs of a cluster are Python threads that meet at its barriers.

`simulated` puts arrays where a kernel's modules have the compiler's words. The functions that would emit instructions
compute with them instead, and what is inline PTX is read one instruction after the other. An access outside of memory,
a branch that threads of one CTA do not take together, and a value that nobody wrote are errors.
"""

import contextlib
import operator
import re
import threading
import types

import numpy as np

THREADS = 512
THREAD = np.arange(THREADS, dtype=np.int32)
LANE, WARP = THREAD % 32, THREAD // 32
HERE = threading.local()  # .rank of the CTA, .barrier of its cluster


class Memory:
    """An array, or the arrays of that name of all CTAs of a cluster."""

    def __init__(self, *arrays):
        self.arrays, self.barriers = arrays, {}

    @property
    def mine(self):
        return self.arrays[HERE.rank if len(self.arrays) > 1 else 0]

    @property
    def at(self):
        return self

    def __getitem__(self, row):
        return Memory(self.mine[uniform(row)])


class Result(Memory):
    """Memory of which nothing is written a second time, but by the same."""

    def __init__(self, array, unwritten):
        super().__init__(array)
        self.unwritten = unwritten

    def __getitem__(self, row):
        return Result(self.mine[uniform(row)], self.unwritten)

    def check(self, at, x):
        old = self.mine[at]
        assert ((old == self.unwritten) | (old == x)).all(), "written twice"


class Barrier:
    """One in shared memory that counts arrivals and the bytes that are on their way."""

    def __init__(self, arrivals):
        self.changed, self.most = threading.Condition(), arrivals
        self.arrivals, self.bytes, self.phase = 0, 0, 0

    def change(self, arrivals, count):
        with self.changed:
            phase = self.phase
            self.arrivals, self.bytes = self.arrivals + arrivals, self.bytes + count
            assert self.arrivals <= self.most
            if self.arrivals == self.most and self.bytes == 0:
                self.arrivals, self.phase = 0, self.phase + 1
                self.changed.notify_all()
            return phase

    def wait(self, phase):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase > phase, timeout=60), "waits for ever"
            assert self.phase == phase + 1, "a phase was missed"


class Pointer:
    """A byte of a memory for each thread, of the CTA itself or of another."""

    def __init__(self, memory, offset=0, rank=None):
        self.memory, self.rank = memory, rank
        self.offset = np.broadcast_to(np.asarray(offset, np.int64), THREADS)

    def plus(self, offset):
        return Pointer(self.memory, self.offset + offset, self.rank)

    def _places(self, width, alive):
        """For each array that threads go to: (it, which threads, their first elements)."""
        rank = HERE.rank if self.rank is None else self.rank
        rank = np.broadcast_to(rank if len(self.memory.arrays) > 1 else 0, THREADS)
        for i in np.unique(rank[alive]):
            array, some = self.memory.arrays[i], np.flatnonzero(alive & (rank == i))
            at = self.offset[some]
            assert (at % (4 * width) == 0).all(), "misaligned"
            assert ((at >= 0) & (at <= array.nbytes - 4 * width)).all(), "outside of memory"
            yield array, some, at // 4

    def read(self, width, alive):
        got = np.zeros((width, THREADS), self.memory.arrays[0].dtype)
        for array, some, at in self._places(width, alive):
            got[:, some] = array[at + np.arange(width)[:, None]]
        return got

    def write(self, x, alive):
        for array, some, at in self._places(1, alive):
            new = x[some].view(array.dtype)
            if isinstance(self.memory, Result):
                self.memory.check(at, new)
            array[at] = new


def uniform(x):
    """The one value that all threads have."""
    x = np.asarray(x)
    assert (x == x.flat[0]).all(), "threads of a CTA go different ways"
    return x.flat[0]


def full(x, dtype=None):
    return np.array(np.broadcast_to(np.asarray(x, dtype), THREADS))


def by_warp(combine, x):
    return np.repeat(combine.reduce(x.reshape(-1, 32), axis=1), 32).astype(x.dtype)


# Inline PTX

COMPARE = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
KINDS = {"f32": np.float32, "s32": np.int32, "u32": np.uint32, "b32": np.int32}


class Snippet:
    """One inline PTX: its operands $0.. and its own registers."""

    def __init__(self, args, kinds):
        self.kinds, self.names, self.away = kinds, {}, {}
        self.names |= {f"${len(kinds) + i}": a for i, a in enumerate(args)}

    def get(self, name, kind=np.int32):
        if isinstance(x := self.names.get(name), Pointer):
            return x
        if x is not None:
            return x if x.dtype == bool else x.astype(np.int32) if x.dtype == np.int64 else x.view(kind)
        if name == "%lanemask_lt":
            return full((1 << LANE.astype(np.int64)) - 1).astype(np.int32)
        if name == "%cluster_ctarank":
            return full(HERE.rank, np.int32)
        bits = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return full(np.array(bits & 0xFFFFFFFF, np.uint32).view(kind))

    def pointer(self, name):
        name, _, offset = name.partition("+")
        return self.names[name].plus(int(offset or 0))

    def set(self, name, x, alive):
        if isinstance(x, Pointer) or alive.all():
            self.names[name] = x
            return
        old = self.names.get(name, full(0x7F123456, np.int32))  # no instruction has written what lies there
        self.names[name] = np.where(alive, x, old.view(x.dtype))

    def run(self, ptx):
        ptx = ptx.strip()
        for line in map(str.strip, (ptx[1:-1] if ptx[0] == "{" else ptx).split(";")):
            if line and not line.startswith(".reg"):
                self.step(line)
        out = [self.get(f"${i}", np.dtype(k)) for i, k in enumerate(self.kinds)]
        return [np.array(x.view(np.dtype(k))) for x, k in zip(out, self.kinds, strict=True)]

    def step(self, line):
        if found := re.match(r"(\w+):\s+", line):
            self.away.pop(found[1], None)
            line = line[found.end() :]
        alive = ~np.any([full(False), *self.away.values()], axis=0)
        if found := re.match(r"@(!?)(\S+)\s+", line):
            alive = alive & (self.names[found[2]] ^ bool(found[1]))
            line = line[found.end() :]
        op, _, rest = line.partition(" ")
        names = [x.strip(" {}[]") for x in re.split(r"[,|]", rest)]
        parts = op.split(".")
        getattr(self, f"_{parts[0]}")(parts[1:], names, alive)

    def _setp(self, parts, names, alive):
        kind = KINDS[parts[-1]]
        x = COMPARE[parts[0]](self.get(names[1], kind), self.get(names[2], kind))
        joined = {"and": operator.and_, "or": operator.or_}.get(parts[1])
        self.set(names[0], joined(x, self.get(names[3])) if joined else x, alive)

    def _set(self, parts, names, alive):
        x = COMPARE[parts[0]](*(self.get(n, np.float32) for n in names[1:]))
        self.set(names[0], x.astype(np.float32), alive)

    def _mov(self, parts, names, alive):
        self.set(names[0], self.get(names[1]), alive)

    def _selp(self, parts, names, alive):
        self.set(names[0], np.where(self.get(names[3]), self.get(names[1]), self.get(names[2])), alive)

    def _max(self, parts, names, alive):
        self.set(names[0], np.fmax(*(self.get(n, np.float32) for n in names[1:])), alive)

    def _add(self, parts, names, alive):
        self.set(names[0], self.get(names[1]) + self.get(names[2]), alive)

    def _mad(self, parts, names, alive):
        x, y = (self.get(n).astype(np.int64) for n in names[1:3])
        self.set(names[0], self.names[names[3]].plus(x * y), alive)

    def _mapa(self, parts, names, alive):
        pointer = self.get(names[1])
        self.set(names[0], Pointer(pointer.memory, pointer.offset, self.get(names[2])), alive)

    def _shfl(self, parts, names, alive):
        if "up" in parts:
            to, found, x, distance = names[:4]
            distance = int(distance)
            self.set(found, distance <= LANE, alive)
            source = np.where(distance <= LANE, THREAD - distance, THREAD)
        else:
            to, x = names[:2]
            source = WARP * 32 + int(names[2])
        self.set(to, self.get(x)[source], alive)

    def _ld(self, parts, names, alive):
        width = 4 if "v4" in parts else 1
        got = self.pointer(names[width]).read(width, alive)
        for name, x in zip(names[:width], got, strict=True):
            self.set(name, x, alive)

    def _st(self, parts, names, alive):
        if "async" in parts:
            self.pointer(names[0]).write(self.get(names[1]), alive)
            to = self.pointer(names[2])
            for i in np.flatnonzero(alive):
                to.memory.barriers[int(to.rank[i]), int(to.offset[i])].change(0, -4)
            return
        for i, name in enumerate(names[1:]):
            assert len(names) == 2 or (self.pointer(names[0]).offset[alive] % 16 == 0).all(), "misaligned"
            self.pointer(names[0]).plus(4 * i).write(self.get(name), alive)

    def _cp(self, parts, names, alive):
        if "commit_group" in parts:
            HERE.copies.append([])
            return
        if "wait_group" in parts:
            while len(HERE.copies) > int(names[0]) + 1:
                for to, source, width, some in HERE.copies.pop(0):
                    for i, x in enumerate(source.read(width, some)):
                        to.plus(4 * i).write(x, some)
            return
        to, source = (self.pointer(n) for n in names[:2])
        assert (to.offset[alive] % int(names[2]) == 0).all(), "misaligned"
        HERE.copies[-1].append((to, source, int(names[2]) // 4, alive))

    def _mbarrier(self, parts, names, alive):
        to = self.pointer(names[0] if "init" in parts else names[1])
        at = HERE.rank, int(uniform(to.offset))
        assert at[1] % 8 == 0, "misaligned"
        if "init" in parts:
            assert alive.sum() == 1
            to.memory.barriers[at] = Barrier(int(names[1]))
        elif "arrive" in parts:
            assert (alive == (LANE == 0)).all()
            for _ in range(THREADS // 32):
                phase = to.memory.barriers[at].change(1, int(names[2]))
            self.names[names[0]] = phase
        else:
            to.memory.barriers[at].wait(self.names[names[2]])
            self.names[names[0]] = full(True)

    def _fence(self, parts, names, alive):
        pass

    def _bra(self, parts, names, alive):
        if alive.any():
            self.away[names[0]] = alive

    def _bar(self, parts, names, alive):
        pass  # a CTA runs in lockstep

    def _barrier(self, parts, names, alive):
        if "wait" in parts:
            HERE.barrier.wait(timeout=60)


def inline_ptx(ptx, *args, result_types=None, predicate=None, has_side_effects=False, convergent=False):
    kinds = () if result_types is None else result_types if isinstance(result_types, tuple) else (result_types,)
    snippet = Snippet(args, kinds)
    if predicate is not None:
        snippet.names["predicate"] = predicate
        ptx = f"@predicate {ptx}"
    got = snippet.run(ptx)
    return tuple(got) if isinstance(result_types, tuple) else got[0] if got else None


# The compiler's words


COMPARE |= {
    "OGT": operator.gt, "OGE": operator.ge, "OEQ": operator.eq, "ULT": lambda x, y: ~(x >= y),
    "slt": operator.lt, "sge": operator.ge, "ult": lambda x, y: x.view(np.uint32) < y.view(np.uint32),
}  # fmt: skip


def _names(*names):
    return types.SimpleNamespace(**{n: n for n in names})


arith = types.SimpleNamespace(
    CmpFPredicate=_names("OGT", "OGE", "OEQ", "ULT"), CmpIPredicate=_names("slt", "sge", "ult", "ne"),
    addi=operator.add, subi=operator.sub, muli=operator.mul, andi=operator.and_, ori=operator.or_, xori=operator.xor,
    addf=operator.add, mulf=operator.mul, minsi=np.minimum, maxsi=np.maximum, minnumf=np.fmin, maxnumf=np.fmax,
    cmpf=lambda kind, x, y: COMPARE[kind](x, y), cmpi=lambda kind, x, y: COMPARE[kind](x, y), select=np.where,
    extui=lambda kind, x: x.astype(kind), fptosi=lambda kind, x: x.astype(kind), bitcast=lambda kind, x: x.view(kind),
    shrui=lambda x, n: (x.view(np.uint32) >> n.view(np.uint32)).view(np.int32), shrsi=operator.rshift,
)  # fmt: skip
REDUCE = types.SimpleNamespace(ADD=np.add, MIN=np.minimum, MAX=np.maximum)
utils = types.SimpleNamespace(
    ReductionKind=REDUCE, inline_ptx=inline_ptx, memref_ptr=Pointer,
    thread_idx=lambda: THREAD, warp_idx=lambda: WARP, redux=lambda x, _, kind: by_warp(kind, x),
    shfl_bfly=lambda x, distance: x[THREAD ^ distance],
    getelementptr=lambda pointer, index, _: pointer.plus(4 * index[0].astype(np.int64)),
)  # fmt: skip


def cond(p, yes, no):
    return yes() if uniform(p) else no()


def while_loop(open_, body, x):
    while uniform(open_(x)):
        x = body(x)
    return x


def fori_loop(first, end, body, x):
    for i in range(int(uniform(first)), int(uniform(end))):
        x = body(np.int32(i), x)
    return x


lax = types.SimpleNamespace(
    cond=cond, while_loop=while_loop, fori_loop=fori_loop, rem=np.remainder, div=np.floor_divide,
    rsqrt=lambda x: (1 / np.sqrt(x)).astype(np.float32), axis_index=lambda name: np.int32(getattr(HERE, name, 0)),
    bitcast_convert_type=lambda x, kind: np.asarray(x).view(np.dtype(kind)),
)  # fmt: skip


def inline_mgpu(arg_types=(), return_type=None):
    """A function that runs as it stands."""
    made = lambda x: x if isinstance(x, Memory | list | tuple) else full(x)  # noqa: E731
    return lambda f: lambda *args: f(None, *map(made, args))


plgpu = types.SimpleNamespace(inline_mgpu=inline_mgpu, ShapeDtypeStruct=lambda *_, **__: None)
pl = types.SimpleNamespace(when=lambda p: lambda f: f() if uniform(p) else None)
WORDS = {
    "arith": arith, "utils": utils, "lax": lax, "plgpu": plgpu, "pl": pl, "jnp": np,
    "_i32": lambda: np.int32, "_f32": lambda: np.float32, "_int": lambda x: full(x, np.int32),
    "_float": lambda x: full(x, np.float32), "_number": lambda x: x, "_of": lambda x: x, "_registers": lambda x: x,
    "_tile": lambda like, registers: list(registers), "_blank": lambda units: None, "_tile_of": lambda units: None,
}  # fmt: skip


@contextlib.contextmanager
def simulated(monkeypatch, *modules):
    """Within, the modules' functions compute with arrays."""
    with monkeypatch.context() as patch:
        for module in modules:
            for name, word in WORDS.items():
                if hasattr(module, name):
                    patch.setattr(module, name, word)
        yield


def cluster(cluster, ctas, body):
    """body() for all CTAs of one cluster of the grid."""
    barrier, errors = threading.Barrier(ctas), []

    def cta(rank):
        HERE.rank, HERE.cluster, HERE.barrier, HERE.copies = rank, cluster, barrier, [[]]
        try:
            with np.errstate(all="ignore"):
                body()
        except Exception as e:
            errors.append(e)
            barrier.abort()

    threads = [threading.Thread(target=cta, args=(rank,)) for rank in range(ctas)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for e in real or errors:
        raise e
