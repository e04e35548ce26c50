"""What is fused, as values: an op, and the kinds of quantisation that its `out=` takes."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_attn.core.formats import Format
from pallas_attn.fusion.chain import Chain, Refused
from pallas_attn.runtime.dispatch import OPS, Op, canonical, here, strict, supports
from pallas_attn.runtime.op import Call, apply


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fuse `op`, by its name, with the quantisation of its result.

    The op's `prepare` takes its arrays by the names of its `Args` (`out_scale` aside), `out=`, `return_lse=` and, for
    an up-projection, `w_uv=`: `[H, C, DV]`, by which the result `[T, H, C]` is multiplied before it is quantised.
    """

    op: str
    kinds: tuple[str, ...] = ("static", "group", "NVFP4")
    up_projection: bool = False


DEFAULT = (Rule("paged_attention"), Rule("mla_attention"), Rule("mla_attention", up_projection=True))


def check(rules: tuple[Rule, ...], chain: Chain, projected: bool) -> None:
    """Raise `Refused` unless a rule has this op, kind and up-projection."""
    attention, quantize = chain.calls
    kind = _kind(quantize.problem.format, quantize.problem.given)
    mine = [r for r in rules if r.op == attention.op and r.up_projection == projected]
    if not mine:
        raise Refused(f"no rule fuses {attention.op} {'with' if projected else 'without'} an up-projection")
    if not any(kind in r.kinds for r in mine):
        raise Refused(f"no rule fuses {attention.op} with {kind} formats")


def _kind(format: Format, given: bool) -> str:
    """The kind of quantisation, as rules name it; raises `Refused` for one that no attention can do."""
    match format.granularity:
        case "tensor" if given:
            return "static"
        case "group" if format.two_level and given:
            return "NVFP4"
        case "group" if not format.two_level and not given:
            return "group"
        case "tensor" | "group" if format.two_level or not given:
            raise Refused(f"{format} finds a scale from the whole result: pass a known one")
        case "group":
            raise Refused(f"{format} is given its scales: let it find them")
    raise Refused(f"no attention writes {format}: use a format per tensor or in groups")


def replacement(chain: Chain, order: tuple[int, ...] | None) -> Callable:
    """A function of the attention's arrays, then w_uv (whose axes `order` makes [H, C, DV]) and the scale where there
    are such, that returns the arrays of the quantisation, then the attention's others."""
    attention, quantize = chain.calls
    op, count = OPS[attention.op], len(chain.attention.invars)

    def fused(*arrays):
        given = jax.tree.unflatten(attention.tree, arrays[:count])._asdict()
        given.pop("out_scale")
        more = list(arrays[count:])
        if order is not None:
            given["w_uv"] = jnp.transpose(more.pop(0), order)
        out = (quantize.problem.format, *more) if more else quantize.problem.format
        problem, args = op.prepare(**given, out=out, return_lse=attention.problem.return_lse)
        # A batch that vmap has folded promises less than the call knows.
        problem = dataclasses.replace(problem, max_q_len=attention.problem.max_q_len)
        _check_backend(op, attention, problem)
        with strict() if attention.strict else contextlib.nullcontext():
            results = apply(op, problem, args, attention.backend)
        wanted = OPS["quantize"].outputs(quantize.problem)
        _check_order(quantize.problem.format, results, wanted)
        return [*(x.reshape(s.shape) for x, s in zip(results, wanted, strict=False)), *results[len(wanted) :]]

    return fused


def _check_backend(op: Op, call: Call, problem) -> None:
    """No fusion at the price of a slower attention: the backend that runs it now has to take the fused call."""
    if call.backend is not None:
        return  # it is asked when the call is made
    platform = canonical(jax.default_backend())
    able = (b for b in op.backends if here(b, platform) is None and supports(b, call.problem) is None)
    backend = next(able, None)
    reason = None if backend is None else supports(backend, problem)
    if reason is not None:
        raise Refused(f"backend {backend.name!r}, which runs the attention, refuses: {reason}")  # type: ignore[union-attr]


def _check_order(format: Format, results, wanted) -> None:
    """Groups in rows are the same whatever the axes before them; in columns the rows have to be tokens."""
    if format.order != "row" and results[1].shape != wanted[1].shape:
        raise Refused(f"{format} orders scales by rows of {wanted[0].shape}: quantise [T, H * DV]")
