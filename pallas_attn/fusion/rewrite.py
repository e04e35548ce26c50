"""The pass: jaxprs in, jaxprs out. Only the equations of what is fused change, and no body's inputs or outputs do."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from pallas_attn.core.errors import InvalidInput, Unsupported
from pallas_attn.fusion.chain import (
    CALLS,
    Chain,
    Graph,
    Refused,
    bodies,
    call_of,
    makes_fp8,
    name_of,
    ops_in,
    projection,
    variables,
)
from pallas_attn.fusion.rules import Rule, check, replacement

BODIES = (*CALLS, "scan", "while", "cond", "shard_map")


class Finding(NamedTuple):
    """One quantisation of an attention's result: what, in which body, and why it is not fused (None: it is)."""

    op: str
    format: str
    where: str
    reason: str | None = None

    def __str__(self) -> str:
        what = f"{self.op} + {self.format} in {self.where or 'the function itself'}"
        return f"fused: {what}" if self.reason is None else f"not fused: {what}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was fused, and near misses with their reasons."""

    hits: tuple[Finding, ...] = ()
    misses: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.hits, *self.misses))) or "no quantisation of an attention's result"


def rewrite(jaxpr, rules: tuple[Rule, ...]) -> tuple[Any, Report]:
    """The jaxpr with what is fused, and what was found."""
    found: list[Finding] = []
    jaxpr = _body(jaxpr, rules, "", found)
    hits = tuple(f for f in found if f.reason is None)
    return jaxpr, Report(hits, tuple(f for f in found if f.reason is not None))


def _body(jaxpr, rules: tuple[Rule, ...], where: str, found: list[Finding]):
    ops = frozenset(r.op for r in rules)
    eqns = _open([_inner(eqn, rules, where, found) for eqn in jaxpr.eqns], ops)
    graph = Graph(jaxpr.replace(eqns=eqns), ops)
    gone, new = set(), {}
    for eqn in eqns:
        try:
            chain = _chain(graph, eqn)
            if chain is None:
                continue
            at, fresh = _fuse(chain, rules, eqns)
        except Refused as reason:
            found.append(_finding(graph, eqn, where, str(reason)))
            continue
        found.append(_finding(graph, eqn, where, None))
        new[id(at)] = fresh
        gone |= {id(e) for e in (chain.attention, *chain.links, chain.quantize)}
    if not new:
        return jaxpr.replace(eqns=eqns)
    return jaxpr.replace(
        eqns=[e for old in eqns for e in (*new.get(id(old), ()), *(() if id(old) in gone else (old,)))]
    )


def _inner(eqn, rules: tuple[Rule, ...], where: str, found: list[Finding]):
    """An equation whose bodies went through the pass."""
    if eqn.primitive.name not in BODIES or call_of(eqn) is not None:
        return eqn
    inside = f"{where} / {name_of(eqn)}" if where else name_of(eqn)
    params = dict(eqn.params)
    for key in dict.fromkeys(key for key, _ in bodies(eqn)):
        value = params[key]
        many = isinstance(value, tuple | list)
        done = [_closed(x, rules, inside, found) for x in (value if many else (value,))]
        params[key] = type(value)(done) if many else done[0]
    return eqn.replace(params=params)


def _open(eqns: list, ops: frozenset[str]) -> list:
    """Plain jits that hold one side of what could be fused are opened, so that both sides meet in one jaxpr."""
    while True:
        held = [ops_in(e) if call_of(e) is None else {call_of(e).op} for e in eqns]  # type: ignore[union-attr]
        if not any(h & ops for h in held) or not any("quantize" in h for h in held):
            return eqns
        one = [bool(h & ops) != ("quantize" in h) and _plain(e) for e, h in zip(eqns, held, strict=True)]
        if not any(one):
            return eqns
        opened = (
            (_inline(e.params["jaxpr"].jaxpr, e.invars, e.outvars) if o else [e])
            for e, o in zip(eqns, one, strict=True)
        )
        eqns = [e for several in opened for e in several]


def _plain(eqn) -> bool:
    """Whether a jit says nothing of shardings, donation or the compiler, and only hands out what it makes."""
    if eqn.primitive.name not in ("jit", "pjit") or call_of(eqn) is not None:
        return False
    p, body = eqn.params, eqn.params["jaxpr"]
    shardings = (*p["in_shardings"], *p["out_shardings"], *p["in_layouts"], *p["out_layouts"])
    said = any(x is not None and type(x).__name__ != "UnspecifiedValue" for x in shardings)
    said = said or any(p["donated_invars"]) or p["compiler_options_kvs"] or body.consts
    outs = [v for v in body.jaxpr.outvars if isinstance(v, jex.Var)]
    own = len({*outs, *body.jaxpr.invars}) == len(body.jaxpr.outvars) + len(body.jaxpr.invars)
    return not said and own


def _closed(x, rules, where, found):
    """A body, which some versions of JAX wrap with its constants."""
    if not isinstance(x, jex.Jaxpr | jex.ClosedJaxpr):
        return x
    if isinstance(x, jex.Jaxpr):
        return _body(x, rules, where, found)
    return x.replace(jaxpr=_body(x.jaxpr, rules, where, found))


def _chain(graph: Graph, eqn) -> Chain | None:
    """The chain that ends in this equation, if it quantises an attention's result; raises `Refused`."""
    call = call_of(eqn)
    if call is not None:
        return graph.chain(eqn) if call.op == "quantize" else None
    if graph.nearest(eqn) is None:
        return None
    inner = ops_in(eqn)
    if "quantize" in inner and not inner & graph.ops:
        raise Refused(f"the quantisation is inside of {name_of(eqn)}, the attention is not")
    if makes_fp8(eqn) and not inner & graph.ops:
        raise Refused("it is written in jnp: pa.quantize(x, format, scale) is what can be fused")
    return None


def _finding(graph: Graph, eqn, where: str, reason: str | None) -> Finding:
    call = call_of(eqn)
    format = "a cast to FP8" if call is None or call.op != "quantize" else call.problem.format.name
    return Finding(graph.source[graph.nearest(eqn)], format, where, reason)


def _fuse(chain: Chain, rules: tuple[Rule, ...], eqns: list) -> tuple[Any, list]:
    """(the equation in front of which the new ones go, the new ones)."""
    up = projection(chain)
    check(rules, chain, up is not None)
    more = [*([] if up is None else [up[0]]), *chain.quantize.invars[1:]]
    inputs = [*chain.attention.invars, *more]
    outputs = [*chain.quantize.outvars, *chain.attention.outvars[1:]]
    at = _place(chain, more, eqns)
    fused = replacement(chain, None if up is None else up[1])
    try:
        with chain.quantize.ctx.manager:  # in the mesh of its body
            made = jax.make_jaxpr(fused)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs))
    except (InvalidInput, Unsupported) as reason:
        raise Refused(str(reason)) from reason
    assert not made.consts
    return at, _inline(made.jaxpr, inputs, outputs)


def _place(chain: Chain, more: list, eqns: list):
    """Where every input is there and no other result of the attention is needed yet."""
    first, last = (next(i for i, e in enumerate(eqns) if e is x) for x in (chain.attention, chain.quantize))
    between = eqns[first + 1 : last]
    others = set(chain.attention.outvars[1:])
    if not any(v in others for e in between for v in variables(e)):
        return chain.quantize
    late = {v for e in between for v in e.outvars}
    if any(v in late for v in more if isinstance(v, jex.Var)):
        raise Refused("its scale is made after the LSE is used")
    return chain.attention


def _inline(jaxpr, inputs: list, outputs: list) -> list:
    """The equations of a jaxpr between variables of another one."""
    made = zip(jaxpr.outvars, outputs, strict=True)
    names = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: x for v, x in made if not isinstance(x, jex.DropVar)}

    def name(v):
        if isinstance(v, jex.Literal):
            return v
        if v not in names:
            names[v] = jex.Var(v.aval)
        return names[v]

    return [e.replace(invars=[*map(name, e.invars)], outvars=[*map(name, e.outvars)]) for e in jaxpr.eqns]
