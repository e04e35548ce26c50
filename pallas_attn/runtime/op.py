"""One JAX primitive carries every op: visible in the jaxpr, lowered per platform by the backend that dispatch picks,
vmapped by the op's own rule, differentiated through the op's vjp."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from pallas_attn.runtime import dispatch
from pallas_attn.runtime.dispatch import OPS, Op


@dataclasses.dataclass(frozen=True)
class Call:
    """The static side of one call, as the jaxpr shows it."""

    op: str
    problem: Any
    tree: Any  # treedef of the arguments
    backend: str | None  # None: chosen while lowering, when the platform is known
    strict: bool

    def __repr__(self) -> str:
        return f"{self.op}[{self.backend or 'auto'}]"


def apply(op: Op, problem: Any, args: Any, backend: str | None = None) -> tuple[jax.Array, ...]:
    """Run `op` on an argument pytree; returns the flat outputs."""
    policy = dispatch.policy()
    wanted = backend or (policy.backend if policy.backend in {b.name for b in op.backends} else None)
    if wanted is not None:
        wanted = dispatch.named(op, problem, wanted)
    leaves, tree = jax.tree.flatten(args)
    call = Call(op.name, problem, tree, wanted, policy.strict)
    leaves = [jnp.asarray(x) for x in leaves]
    return _differentiable(call, *leaves) if op.vjp else _varying(primitive.bind(*leaves, call=call), leaves)


def _varying(results, leaves) -> tuple[jax.Array, ...]:
    """Inside of shard_map results vary over every mesh axis that an argument varies over."""
    axes = tuple(sorted(frozenset().union(*(jax.typeof(x).mat.varying for x in leaves))))
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x in results)


def _run(*leaves, call: Call, platform: str):
    op = OPS[call.op]
    if call.backend is not None:
        backend = op.backend(call.backend)
        reason = dispatch.here(backend, platform)
        dispatch.require(reason is None, "backend", call.backend, f"it does not run on this machine: {reason}")
    else:
        backend = dispatch.choose(op, call.problem, platform, call.strict)
    with jax.named_scope(f"pallas_attn.{call.op}.{backend.name}"):
        return tuple(backend.load().run(call.problem, *jax.tree.unflatten(call.tree, leaves)))


primitive = jex.Primitive("pallas_attn")
primitive.multiple_results = True


@functools.lru_cache(maxsize=1024)
def _jitted(call: Call):
    return jax.jit(lambda *leaves: primitive.bind(*leaves, call=call))


@primitive.def_impl
def _impl(*leaves, call: Call):
    return _jitted(call)(*leaves)


@primitive.def_abstract_eval
def _abstract(*avals, call: Call):
    return [ShapedArray(s.shape, s.dtype) for s in OPS[call.op].outputs(call.problem)]


for _platform in ("cpu", "cuda", "rocm", "tpu"):
    _rule = mlir.lower_fun(functools.partial(_run, platform=_platform), multiple_results=True)
    mlir.register_lowering(primitive, _rule, platform=_platform)


def _batch(leaves, dims, *, call: Call):
    """The op's own folding of the mapped axis into the ragged one where it has one for these arguments, else a loop."""
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims, strict=True)]
    mapped = [np.bool_(d is not None) for d in dims]  # not Python's bool, which a Mask takes for a static
    op = OPS[call.op]
    if op.batch is not None:
        tree = functools.partial(jax.tree.unflatten, call.tree)
        folded = dispatch.resolve(op.batch)(call.problem, tree(moved), tree(mapped), size, call.backend)
        if folded is not None:
            return folded, [0] * len(folded)

    def one(i):
        return primitive.bind(*(x[i] if m else x for x, m in zip(moved, mapped, strict=True)), call=call)

    outs = jax.lax.map(one, jnp.arange(size))
    return outs, [0] * len(outs)


batching.primitive_batchers[primitive] = _batch


def _jvp(leaves, tangents, *, call: Call):
    """An op without a vjp of its own is differentiated through its portable backend."""
    run = OPS[call.op].backend("xla").load().run
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    _, along = jax.jvp(
        lambda *xs: tuple(run(call.problem, *jax.tree.unflatten(call.tree, xs))), tuple(leaves), tangents
    )
    return primitive.bind(*leaves, call=call), along


ad.primitive_jvps[primitive] = _jvp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call: Call, *leaves):
    return tuple(primitive.bind(*leaves, call=call))


def _forward(call: Call, *leaves):
    return _differentiable(call, *leaves), leaves


def _backward(call: Call, leaves, cotangents):
    op = OPS[call.op]
    assert op.vjp is not None
    grads = dispatch.resolve(op.vjp)(call.problem, jax.tree.unflatten(call.tree, leaves), cotangents)
    return tuple(_cotangent(x, g) for x, g in zip(leaves, grads, strict=True))


def _cotangent(x, grad):
    """A cotangent of the type JAX wants: float0 for integers, zeros for FP8 and for what has no gradient."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return np.zeros(x.shape, jax.dtypes.float0)
    return jnp.zeros_like(x) if grad is None or x.dtype.itemsize == 1 else grad.astype(x.dtype)


_differentiable.defvjp(_forward, _backward)


def differentiable(x) -> bool:
    """Whether a leaf can carry a gradient: a float wider than 8 bits."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1


def widened(args) -> tuple[list[int], tuple[jax.Array, ...], Callable]:
    """(which leaves of the arguments can carry a gradient, those in float32, the arguments again of such values): for
    sums over blocks, which are kept in float32 whatever the type of the argument."""
    leaves, tree = jax.tree.flatten(args)
    wide = [i for i, x in enumerate(leaves) if differentiable(x)]

    def rebuild(values):
        full = list(leaves)
        for i, x in zip(wide, values, strict=True):
            full[i] = x.astype(leaves[i].dtype)
        return jax.tree.unflatten(tree, full)

    return wide, tuple(jnp.asarray(leaves[i], jnp.float32) for i in wide), rebuild


def pull_back(run: Callable, args, cotangents: tuple) -> list[jax.Array | None]:
    """Cotangents of the flattened arguments: back through `run(*args)`, a portable backend's, to every leaf that can
    carry a gradient. Results that are integers have no cotangent."""
    leaves, tree = jax.tree.flatten(args)
    mine = [i for i, x in enumerate(leaves) if differentiable(x)]

    def of_floats(*floats):
        given = dict(zip(mine, floats, strict=True))
        results = run(*jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(leaves)]))
        return [x for x in results if jnp.issubdtype(x.dtype, jnp.floating)]

    _, pull = jax.vjp(of_floats, *(leaves[i] for i in mine))
    found = dict(zip(mine, pull([c for c in cotangents if c.dtype != jax.dtypes.float0]), strict=True))
    return [found.get(i) for i in range(len(leaves))]
