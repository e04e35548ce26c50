"""One JAX primitive carries every op: visible in the jaxpr, lowered per platform by the backend that dispatch picks,
vmapped by the op's own rule, differentiated through the op's vjp."""

import dataclasses
import functools
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
    leaves = map(jnp.asarray, leaves)
    return tuple(primitive.bind(*leaves, call=call)) if op.vjp is None else _differentiable(call, *leaves)


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
