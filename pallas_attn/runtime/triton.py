"""The bridge to Triton: any `@triton.jit` kernel as a JAX op, through jax-triton.

Neither package is imported before a kernel is lowered or compiled: shapes are inferred and jaxprs are made on machines
that have none of them, where the kernel is named by its path.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from pallas_attn.core.arch import Arch
from pallas_attn.core.errors import Unsupported, require
from pallas_attn.core.formats import E4M3, E5M2, INT8, Format
from pallas_attn.runtime import dispatch

NEEDS = ("jax-triton==0.3.1", "triton==3.6.0")  # the pair that is tested
ARCHS = (Arch.AMPERE, Arch.ADA, Arch.HOPPER)
INTERPRET: Callable | None = None  # a test sets it to run kernels on a CPU: (launch, *numpy arrays) -> outputs
TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "bool": "i1",
    "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
    **{f"{sign}int{n}": f"{sign[:1] or 'i'}{n}" for sign in ("", "u") for n in (8, 16, 32, 64)},
}  # fmt: skip
KINDS = {E4M3: 1, E5M2: 2}  # FP8 that arrives as bytes, as `triton_numbers` counts it
Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Launch:
    """The static side of one launch, as the jaxpr shows it."""

    kernel: Any  # a triton.JITFunction, or its path "module:function"
    out: tuple[Shape, ...]
    grid: tuple[int, ...]
    constants: tuple[tuple[str, Any], ...]
    aliases: tuple[tuple[int, int], ...]
    num_warps: int
    num_stages: int

    def __repr__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.partition(":")[2] if isinstance(self.kernel, str) else self.kernel.__name__

    def load(self) -> Any:
        """The kernel itself."""
        return dispatch.resolve(self.kernel) if isinstance(self.kernel, str) else self.kernel

    def values(self) -> dict[str, Any]:
        """The constants as the kernel gets them: dtypes are Triton's."""
        from triton.language import dtype  # type: ignore[import-not-found]

        return {n: dtype(TYPES[str(x)]) if isinstance(x, np.dtype) else x for n, x in self.constants}


def triton_op(
    kernel,
    *,
    out: Shape | Sequence[Shape] | Callable,
    grid: int | tuple[int, ...] | Callable,
    constants: Mapping[str, Any] | Callable | None = None,
    aliases: Mapping[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Callable:
    """A Triton kernel as a function of arrays, to be called under `jax.jit` or outside of it.

    The kernel takes one pointer for each input, then one for each output, then its constants by name: strides, sizes
    and flags. JAX arrays are row-major: `pa.strides(x)` gives what a kernel wants to know of them.

    Args:
      kernel: a `@triton.jit` function, or "module:function", which is imported when first lowered: so a program can be
        traced where triton is missing.
      out: shape and dtype of the output, or of each in a sequence; or a function of the inputs that returns them.
      grid: programs along up to three axes; or a function `grid(*inputs, **constants)`.
      constants: the kernel's `tl.constexpr` parameters by name, a `np.dtype` among them for a Triton one; or a function
        of the inputs that returns them.
      aliases: {input: output} by position, for outputs that are their input's own memory, updated in place where the
        input is donated or not used again. The kernel gets that pointer twice.
      num_warps, num_stages: of a program, as in Triton.
    Returns: `f(*inputs)`, whose result is one array or a tuple as `out` says. FP8 arrives in the kernel as `float8e4nv`
      and `float8e5`; Triton has the first only for Ada and later: pass bytes (`lax.bitcast_convert_type`) before.
      vmap is a loop over launches. There is no gradient: give it one by `jax.custom_vjp`.

        @triton.jit
        def scale_rows(x, s, out, D: tl.constexpr):
            row, i = tl.program_id(0), tl.arange(0, D)
            tl.store(out + row * D + i, tl.load(x + row * D + i) * tl.load(s + row))

        scale = pa.triton_op(
            scale_rows, out=lambda x, s: x, grid=lambda x, s, **_: x.shape[0], constants=lambda x, s: {"D": x.shape[1]}
        )
        y = jax.jit(scale)(x, s)

    Raises: InvalidInput when called, for a kernel whose parameters do not fit, an alias of another shape or dtype, a
      grid that is empty, or an array type that Triton lacks.
    """
    aliases = dict(aliases or {})

    def call(*inputs):
        arrays = [jnp.asarray(x) for x in inputs]
        shapes = [Shape(x.shape, x.dtype) for x in arrays]
        given = constants(*shapes) if callable(constants) else dict(constants or {})
        outs = out(*shapes) if callable(out) else out
        flat: tuple[Any, ...] = (outs,) if hasattr(outs, "shape") else tuple(outs)  # type: ignore[arg-type]
        size = grid(*shapes, **given) if callable(grid) else grid
        size = (size,) if isinstance(size, int) else tuple(size)
        launch = Launch(
            kernel, tuple(Shape(s.shape, s.dtype) for s in flat), size, tuple(sorted(given.items())),
            tuple(aliases.items()), num_warps, num_stages,
        )  # fmt: skip
        check(launch, shapes)
        results = primitive.bind(*arrays, launch=launch)
        return results[0] if hasattr(outs, "shape") else tuple(results)

    return call


def strides(x) -> tuple[int, ...]:
    """Elements between neighbours along each axis of an array (or shape) as JAX keeps it."""
    return tuple(int(np.prod(x.shape[i + 1 :])) for i in range(len(x.shape)))


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels of an attention are cut to a problem.

    rows: of a program, query tokens times the heads that share its keys. keys: of a tile. splits: shares of the keys.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The next power of two: the sizes that Triton's blocks have."""
    return 1 << max(n - 1, 0).bit_length()


def cache_constants(p: Any) -> dict[str, Any]:
    """What `triton_places` wants to know of the cache of a problem: sizes, and where (page, head, slot, dim) of keys
    and values lies, in elements of its buffer."""
    constants: dict[str, Any] = {"K": p.kv_heads, "N": p.pages, "S": p.page_size, "HEAD_MAJOR": p.layout.head_major}
    for side, dim, buffer in (("K", p.head_dim, p.layout.buffers[0]), ("V", p.v_head_dim, p.layout.buffers[-1])):
        sizes = p.layout.sizes(p.pages, p.page_size, p.kv_heads, dim, p.format.dtype.itemsize)
        step, slow = buffer.strides(sizes), "D1" if side == "K" else "S1"
        constants |= {
            f"{side}D": dim, f"{side}DP": power_of_two(dim), f"{side}_PAGE": step["N"], f"{side}_HEAD": step["K"],
            f"{side}_SLOT": step.get("S", 0), f"{side}_DIM": step.get("D", 0),
            f"{side}_BLOCK": sizes["D0"] if p.layout.blocked else 0, f"{side}_BLOCKS": step.get(slow, 0),
        }  # fmt: skip
    return constants | {"V_BASE": step.get("P", 0)}


def kind(dtype: np.dtype) -> int:
    """How kernels widen stored values of this type: 0 as Triton does, or as codes of `KINDS`, before Ada."""
    return 0 if arch().has_fp8 else KINDS.get(dtype, 0)


def stored(x: jax.Array) -> jax.Array:
    """The array as a kernel takes it: before Ada, bytes stand for FP8."""
    return lax.bitcast_convert_type(x, jnp.uint8) if kind(x.dtype) else x


def operand(a: np.dtype, b: np.dtype) -> tuple[np.dtype, str]:
    """(the narrowest type that holds both exactly, FP8 being f16 at least; how the matrix unit multiplies it)."""
    wide = [t for t in (a, b) if t not in KINDS]
    if not wide:
        return np.dtype(jnp.float16), "tf32"
    f32 = np.dtype(jnp.float32)
    return (wide[0] if len({*wide}) == 1 else f32), ("tf32x3" if f32 in wide else "tf32")


def rounding(format: Format | None) -> dict[str, Any]:
    """What `triton_softmax` wants to know of an output: floats, or FP8 through one scale."""
    if format is None:
        return {"OUT_KIND": 0, "OUT_RECIPROCAL": False, "OUT_HIGH": 0.0}
    reciprocal = format.apply_scale == "reciprocal"
    return {"OUT_KIND": KINDS[format.dtype], "OUT_RECIPROCAL": reciprocal, "OUT_HIGH": format.qmax}


def rule(format: Format) -> dict[str, Any]:
    """How a cache's format finds a scale, applies it, and rounds, for `found_scale` and `codes` of `triton_numbers`."""
    by = float(np.float32(1) / np.float32(format.qmax)) if format.quantized else 0.0
    return {
        "KIND": KINDS.get(format.dtype, 0), "INTEGER": format.dtype == INT8,
        "RECIPROCAL": format.apply_scale == "reciprocal", "LOW": format.qmin if format.quantized else 0.0,
        "HIGH": format.qmax if format.quantized else 0.0, "AMAX_FLOOR": format.amax_floor,
        "SCALE_FLOOR": format.scale_floor, "BY": by if format.find_scale == "reciprocal" else 0.0,
        "UE8M0": format.ue8m0,
    }  # fmt: skip


def merge(out: Shape, lse: Shape, format: Format | None, splits: int, num_warps: int) -> Callable:
    """The launch that adds up `splits` parts of an attention: (partial, stats, scale of the output) to (out, lse)."""
    tokens, heads, dim = out.shape
    return triton_op(
        "pallas_attn.runtime.triton_softmax:merge", out=(out, lse), grid=tokens * heads, num_warps=num_warps,
        constants=rounding(format) | {
            "T": tokens, "H": heads, "DV": dim, "DVP": power_of_two(dim),
            "SPLITS": splits, "SPLITS_P": power_of_two(splits),
        },
    )  # fmt: skip


def check(launch: Launch, inputs: Sequence[Shape]) -> None:
    """Refuse a launch that cannot be right."""
    name = f"triton_op({launch.name})"
    sizes = 1 <= len(launch.grid) <= 3 and all(isinstance(n, int | np.integer) and n > 0 for n in launch.grid)
    require(sizes, f"{name} grid", launch.grid, "it is one to three positive ints")
    for what, shapes in (("input", inputs), ("output", launch.out)):
        for i, x in enumerate(shapes):
            known = str(x.dtype) in TYPES
            require(known, f"{name} {what} {i}", x.dtype, f"Triton has {', '.join(TYPES)}: bitcast it to one of them")
    for i, o in launch.aliases:
        inside = 0 <= i < len(inputs) and 0 <= o < len(launch.out)
        require(inside, f"{name} aliases", {i: o}, f"there are {len(inputs)} inputs and {len(launch.out)} outputs")
        a, b = inputs[i], launch.out[o]
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        require(same, f"{name} aliases", f"{a} -> {b}", "an output in place has its input's shape and dtype")
    if not isinstance(launch.kernel, str):
        _check_parameters(launch, len(inputs))


def _check_parameters(launch: Launch, inputs: int) -> None:
    """The kernel's parameters are its inputs, its outputs, and constants of these very names."""
    known = hasattr(launch.kernel, "arg_names")
    require(known, "triton_op kernel", type(launch.kernel).__name__, "pass a @triton.jit function or 'module:function'")
    names, pointers, given = launch.kernel.arg_names, inputs + len(launch.out), [n for n, _ in launch.constants]
    fits = sorted(names[pointers:]) == given and len(names) >= pointers
    takes = f"it takes {', '.join(names)}: pointers of inputs, then of outputs, then constants by name"
    found = f"{inputs} inputs, {len(launch.out)} outputs and constants {', '.join(given) or 'none'}"
    require(fits, f"triton_op({launch.name})", found, takes)


primitive = jex.Primitive("triton_op")
primitive.multiple_results = True


@functools.lru_cache(maxsize=1024)
def _jitted(launch: Launch):
    return jax.jit(lambda *arrays: primitive.bind(*arrays, launch=launch))


@primitive.def_impl
def _impl(*arrays, launch: Launch):
    return _jitted(launch)(*arrays)


@primitive.def_abstract_eval
def _abstract(*_, launch: Launch):
    return [ShapedArray(s.shape, s.dtype) for s in launch.out]


def _on_cuda(*arrays, launch: Launch):
    reason = dispatch.missing(NEEDS)
    if reason is not None:
        raise Unsupported(f"triton_op({launch.name}): {reason}")
    import jax_triton  # type: ignore[import-not-found]

    kernel, seen = launch.load(), jax.default_backend() == "gpu"
    _check_parameters(dataclasses.replace(launch, kernel=kernel), len(arrays))
    return jax_triton.triton_call(
        *arrays, kernel=kernel, out_shape=launch.out, grid=launch.grid, input_output_aliases=dict(launch.aliases),
        num_warps=launch.num_warps, num_stages=launch.num_stages, compute_capability=None if seen else int(arch()),
        **launch.values(),
    )  # fmt: skip


def _elsewhere(*arrays, launch: Launch):
    if INTERPRET is not None:
        return jax.pure_callback(functools.partial(INTERPRET, launch), launch.out, *arrays)
    raise Unsupported(f"triton_op({launch.name}): Triton kernels run on NVIDIA GPUs only")


mlir.register_lowering(primitive, mlir.lower_fun(_on_cuda, multiple_results=True), platform="cuda")
for _platform in ("cpu", "rocm", "tpu"):
    mlir.register_lowering(primitive, mlir.lower_fun(_elsewhere, multiple_results=True), platform=_platform)


def _batch(arrays, dims, *, launch: Launch):
    size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims, strict=True)]

    def one(i):
        picked = (x if d is None else x[i] for x, d in zip(moved, dims, strict=True))
        return primitive.bind(*picked, launch=launch)

    outs = lax.map(one, jnp.arange(size))
    return outs, [0] * len(outs)


def _no_gradient(*_, launch: Launch, **__):
    raise Unsupported(f"triton_op({launch.name}) has no gradient: give the function around it one by jax.custom_vjp")


batching.primitive_batchers[primitive] = _batch
ad.primitive_jvps[primitive] = _no_gradient


def arch() -> Arch:
    """The generation that kernels are lowered for: that of the GPU in sight, else Hopper."""
    return dispatch.present_arch() or Arch.HOPPER


def launches(jaxpr) -> list[tuple[Launch, list[Shape]]]:
    """Every launch of a jaxpr with its inputs, inner jaxprs included: what `compile_for` takes."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitive:
            found.append((eqn.params["launch"], [Shape(v.aval.shape, v.aval.dtype) for v in eqn.invars]))
        for inner in jex.jaxprs_in_params(eqn.params):
            found += launches(inner)
    return found


def compile_for(target: Arch, launch: Launch, inputs: Sequence[Shape]) -> Any:
    """Compile a launch ahead of time, down to machine code, for a GPU that need not be there.

    Returns: triton's CompiledKernel: `asm["ptx"]`, `metadata.shared` bytes of shared memory, and so on.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]
    from triton.compiler import ASTSource, compile  # type: ignore[import-not-found]

    kernel = launch.load()
    pointers = [f"*{TYPES[str(x.dtype)]}" for x in itertools.chain(inputs, launch.out)]
    signature = dict(zip(kernel.arg_names, pointers, strict=False)) | {n: "constexpr" for n, _ in launch.constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}  # as XLA allocates
    source = ASTSource(kernel, signature, launch.values(), aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return compile(source, target=GPUTarget("cuda", int(target), 32), options=options)
