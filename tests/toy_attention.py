"""An op as small as the fusion pass allows: the result is tanh(x) [T, H, C], then w_uv [H, C, DV], then `out`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_attn.core.quantized import quantize, quantized_arrays, take_apart
from pallas_attn.runtime.dispatch import Backend, Op
from pallas_attn.runtime.op import apply


@dataclasses.dataclass(frozen=True)
class Problem:
    shape: tuple[int, ...]
    out_format: Any
    return_lse: bool
    max_q_len: int | None = None


class Args(NamedTuple):
    x: Any
    w_uv: Any
    out_scale: Any


def prepare(x, *, w_uv=None, out=None, return_lse=False):
    tokens, heads, latent = x.shape
    width = heads * (latent if w_uv is None else w_uv.shape[2])
    format, scale = out if isinstance(out, tuple) else (out, None)
    shape = x.shape if w_uv is None and out is None else (tokens, width)
    return Problem(shape, format, return_lse), Args(x, w_uv, scale)


def outputs(p):
    if p.out_format is None:
        return (jax.ShapeDtypeStruct(p.shape, jnp.float32),)
    return quantized_arrays(p.out_format, p.shape, p.out_format.granularity == "tensor" or p.out_format.two_level)


def supports(p):
    return None


def run(p, *arrays):
    args = Args(*arrays)
    x = jnp.tanh(args.x)
    x = x if args.w_uv is None else jnp.einsum("thc,hcd->thd", x, args.w_uv)
    x = x.reshape(p.shape)
    if p.out_format is None:
        return (x,)
    return take_apart(quantize(x, p.out_format, args.out_scale), args.out_scale is not None)


OP = Op("toy_attention", prepare, outputs, (Backend("xla", "toy_attention"),), vjp=None)


def toy_attention(x):
    return apply(OP, *prepare(x))[0]
