"""Finding, in one jaxpr, what leads from an attention's result to its quantisation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from pallas_attn.core.formats import E4M3, E5M2
from pallas_attn.runtime.op import Call, primitive

NEAR = 12  # steps after an attention within which a quantisation counts as one of its result
WIDE = (jnp.bfloat16, jnp.float32)  # types that no result of attention overflows
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
LINKS = ("reshape", "convert_element_type", "transpose", "dot_general", "pvary")
PARTS = ("token", "head", "value")  # axes of a result


class Refused(Exception):
    """A chain that is not fused; the message is the reason."""


class Chain(NamedTuple):
    """A quantisation, the attention that feeds it, and the equations between them, first to last."""

    attention: Any
    links: tuple[Any, ...]
    quantize: Any

    @property
    def calls(self) -> tuple[Call, Call]:
        """The static sides of attention and quantisation."""
        return call_of(self.attention), call_of(self.quantize)  # type: ignore[return-value]


def call_of(eqn) -> Call | None:
    """The op that an equation calls, itself or wrapped by its derivative."""
    if eqn.primitive is primitive:
        return eqn.params["call"]
    if not eqn.primitive.name.startswith("custom_vjp_call"):
        return None
    body = eqn.params["call_jaxpr"].jaxpr
    whole = [e for e in body.eqns if (e.invars, e.outvars) == (body.invars, body.outvars)]
    return whole[0].params["call"] if len(body.eqns) == len(whole) == 1 and whole[0].primitive is primitive else None


def bodies(eqn) -> Iterator[tuple[str, Any]]:
    """(parameter, jaxpr) of an equation's bodies; several may have one parameter."""
    for name, value in eqn.params.items():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, jex.Jaxpr | jex.ClosedJaxpr):
                yield name, x


def variables(eqn) -> list:
    """The operands that are no literals."""
    return [v for v in eqn.invars if isinstance(v, jex.Var)]


def name_of(eqn) -> str:
    """What a report calls an equation with a body."""
    kind, name = eqn.primitive.name, eqn.params.get("name")
    return f"{kind} {name}" if name else kind


class Graph:
    """Who makes and who uses each variable of a jaxpr, and how far behind an attention's result it is."""

    def __init__(self, jaxpr, ops: frozenset[str]):
        self.ops = ops
        self.maker, self.uses, self.distance, self.source = {}, {}, {}, {}
        self.results = {v for v in jaxpr.outvars if isinstance(v, jex.Var)}
        for eqn in jaxpr.eqns:
            self.maker |= dict.fromkeys(eqn.outvars, eqn)
            for v in variables(eqn):
                self.uses[v] = self.uses.get(v, 0) + 1
            call = call_of(eqn)
            if call is None:
                self._spread(eqn)
            elif call.op in ops:
                self._mark(eqn.outvars[0], 0, call.op)

    def _spread(self, eqn) -> None:
        """What is made of a near variable is near; so is the result of an attention that a body hands out."""
        v = self.nearest(eqn)
        if v is not None and self.distance[v] < NEAR:
            for made in eqn.outvars:
                self._mark(made, self.distance[v] + 1, self.source[v])
        if eqn.primitive.name in CALLS and ops_in(eqn) & self.ops:
            body = next(body for _, body in bodies(eqn)).jaxpr
            inside = Graph(body, self.ops)
            for made, v in zip(eqn.outvars, body.outvars, strict=True):
                if isinstance(v, jex.Var) and v in inside.distance:
                    self._mark(made, 0, inside.source[v])

    def _mark(self, v, distance: int, op: str) -> None:
        self.distance[v], self.source[v] = distance, op

    def nearest(self, eqn):
        """The operand that comes from an attention's result by the fewest steps, None without one."""
        return min((v for v in variables(eqn) if v in self.distance), key=self.distance.__getitem__, default=None)

    def chain(self, quantize) -> Chain | None:
        """The chain that ends in this equation, None where no attention is near; raises `Refused`."""
        links, v = [], quantize.invars[0]
        if not isinstance(v, jex.Var) or v not in self.distance:
            return None  # its scale alone comes from an attention
        while self.distance[v]:
            eqn = self.maker[v]
            if eqn.primitive.name not in LINKS:
                raise Refused(f"{eqn.primitive.name} stands between")
            self._only_use(v)
            links.insert(0, eqn)
            v = self.nearest(eqn)
        attention = self.maker[v]
        if call_of(attention) is None:
            raise Refused(f"the attention is inside of {name_of(attention)}, the quantisation is not")
        self._only_use(v)
        return Chain(attention, tuple(links), quantize)

    def _only_use(self, v) -> None:
        if v in self.results:
            raise Refused("what it quantises is also a result of the function")
        if self.uses[v] > 1:
            raise Refused(f"what it quantises is used {self.uses[v]} times")


def projection(chain: Chain) -> tuple[Any, tuple[int, ...]] | None:
    """The up-projection between attention and quantisation: the operand, and the order of its axes that makes it
    [H, C, DV]; None without one. Raises `Refused` where the links are more than an up-projection and reshapes."""
    v, axes, found = chain.attention.outvars[0], PARTS, None
    for eqn in chain.links:
        match eqn.primitive.name:
            case "convert_element_type" if eqn.params["new_dtype"] not in WIDE:
                raise Refused(f"it is {eqn.params['new_dtype']} in between: use bfloat16 or float32")
            case "transpose" if axes is not None:
                axes = tuple(axes[i] for i in eqn.params["permutation"])
            case "dot_general" if axes == PARTS and found is None:
                axes, found = _project(eqn, v)
            case "reshape" if axes in (PARTS, None) and eqn.params["dimensions"] is None:
                axes = None
            case "transpose" | "dot_general" | "reshape":
                raise Refused(f"{eqn.primitive.name} stands between, which is no up-projection [T, H, C] x [H, C, DV]")
        v = eqn.outvars[0]
    if axes not in (PARTS, None):
        raise Refused(f"its axes are transposed: {', '.join(axes)}")
    return found


def _project(eqn, v) -> tuple[tuple[str, ...], tuple[Any, tuple[int, ...]]]:
    """(axes of the product, (w_uv, its order of axes)) of a product of the result v."""
    side = 0 if eqn.invars[0] is v else 1
    contract, batch = ((d[side], d[1 - side]) for d in eqn.params["dimension_numbers"])
    if tuple(contract[0]) != (2,) or tuple(batch[0]) != (1,):
        raise Refused("dot_general stands between, which is no up-projection [T, H, C] x [H, C, DV]")
    (head,), (latent,) = batch[1], contract[1]
    value = 3 - head - latent
    axes = ("head", "token", "value") if side == 0 else ("head", "value", "token")
    return axes, (eqn.invars[1 - side], (head, latent, value))


def makes_fp8(eqn) -> bool:
    """Whether an equation converts to FP8, itself or in a body; an op of this library counts as none."""
    if call_of(eqn) is not None:
        return False
    if eqn.primitive.name == "convert_element_type":
        return eqn.params["new_dtype"] in (E4M3, E5M2)
    return any(makes_fp8(e) for _, body in bodies(eqn) for e in body.jaxpr.eqns)


def ops_in(eqn) -> set[str]:
    """The ops that an equation's bodies call, at any depth."""
    inner = [e for _, body in bodies(eqn) for e in body.jaxpr.eqns]
    own = {call.op for e in inner if (call := call_of(e)) is not None}
    return own.union(*(ops_in(e) for e in inner if call_of(e) is None))
