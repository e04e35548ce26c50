"""Fusing attention with the quantisation of its result, in functions that were written without thinking of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr

from pallas_attn.fusion.rewrite import Finding as Finding
from pallas_attn.fusion.rewrite import Report as Report
from pallas_attn.fusion.rewrite import rewrite
from pallas_attn.fusion.rules import DEFAULT as DEFAULT
from pallas_attn.fusion.rules import Rule as Rule


def fuse(fn: Callable, rules: tuple[Rule, ...] = DEFAULT) -> Callable:
    """`fn` with attention whose result is quantised, and used for nothing else, replaced by the op with `out=`.

    The pass reads the jaxpr of `fn` and of the bodies in it (jit, scan, while, cond, remat, shard_map, custom_jvp and
    custom_vjp): attention, then any reshapes, changes of float type and, for MLA, the up-projection of the values, then
    `pa.quantize` with a known scale, in groups, or as NVFP4 with a known scale. Fused, the result is rounded once, from
    float32: the same bits where the attention's result was float32, elsewhere at most one step of the format away.
    `report` tells what was found, and what was not, and why.

    Args:
      fn: a function of pytrees of arrays. All arguments are traced, as under jax.jit: bind statics first.
      rules: what is fused; a rule for an op that is not there does nothing.
    Returns: a function of the same arguments and result; it traces `fn` at each call, so put it inside of jax.jit.
      Differentiated, it is `fn` as it was written, for a quantised result has no gradient of its own.
    """

    @functools.wraps(fn)
    def fused(*args, **kwargs):
        written, leaves, tree = _trace(fn, args, kwargs)
        better, found = rewrite(written.jaxpr, rules)
        run = _evaluate if not found.hits else _differentiated_as_written
        return jax.tree.unflatten(tree(), run(better, written.jaxpr, *written.consts, *leaves))

    return fused


def report(fn: Callable, *args, rules: tuple[Rule, ...] = DEFAULT, **kwargs) -> Report:
    """What `fuse(fn, rules)` does for these arguments (arrays or `jax.ShapeDtypeStruct`s), without running it.

    Returns: `Report(hits, misses)`; a near miss is a quantisation of an attention's result that stays as it is, by
    `pa.quantize` or written in jnp, with the reason. `str()` of it has a line each.
    """
    written, _, _ = _trace(fn, args, kwargs)
    return rewrite(written.jaxpr, rules)[1]


def _trace(fn: Callable, args: tuple, kwargs: dict) -> tuple[Any, list, Callable]:
    """(closed jaxpr, flat arguments, the tree of the result once asked for)."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    trees = []

    def flat(*leaves):
        args, kwargs = jax.tree.unflatten(tree, leaves)
        outs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        trees.append(out_tree)
        return outs

    return jax.make_jaxpr(flat)(*leaves), leaves, lambda: trees[-1]


def _evaluate(jaxpr, _, *inputs):
    consts = len(jaxpr.constvars)
    return eval_jaxpr(jaxpr, inputs[:consts], *inputs[consts:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiated_as_written(better, written, *inputs):
    return _evaluate(better, written, *inputs)


@_differentiated_as_written.defjvp
def _jvp(better, written, inputs, tangents):
    return jax.jvp(lambda *xs: _evaluate(written, None, *xs), inputs, tangents)
