"""Partial attention results of one query over disjoint keys, put together by their log-sum-exp."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.core.errors import require
from pallas_attn.core.formats import float_format


def merge_attention(
    outs: Sequence[Float[Array, "T H DV"]], lses: Sequence[Float[Array, "T H"]]
) -> tuple[Float[Array, "T H DV"], Float[Array, "T H"]]:
    """The attention over all keys from results over parts of them.

        lse = log(sum_i exp(lse_i)),   out = sum_i exp(lse_i - lse) out_i

    in float32, rounded once. Sinks have to be counted once: give them to one part and to no other, which then carries
    their weight in its LSE. The context of a long prompt, chunk by chunk, then the prompt's own tokens:

        parts = [attend(q, chunk, sinks=None, mask=pa.Mask(causal=False)) for chunk in context]  # (out, lse) each
        parts += [attend(q, own, sinks=sinks, mask=pa.Mask())]
        out, lse = pa.merge_attention(*zip(*parts))

    A part without keys is harmless: its LSE is -inf (+inf, by which some systems say the same, counts as that), and
    then its values are not looked at, NaN or not. Ask for parts in float32 (`out=jnp.float32`) where one rounding for
    each is too many.

    Args:
      outs: the parts' results, each `[T, H, DV]` bf16, f16 or f32.
      lses: their natural-log sums of exp, each `[T, H]` float32.
    Returns: (out `[T, H, DV]` of the parts' type, lse `[T, H]` float32); no key at all gives zeros and -inf.
    Raises: InvalidInput when there is no part, or parts do not fit each other.
    Differentiable in both. Source: vLLM v1/attention/ops/merge_attn_states.py.
    """
    outs, lses = tuple(outs), tuple(lses)
    require(len(outs) > 0, "outs", "no part", "give at least one")
    require(len(outs) == len(lses), "lses", f"{len(lses)} parts", f"outs has {len(outs)}")
    first = outs[0]
    for out, lse in zip(outs, lses, strict=True):
        require(out.ndim == 3, "outs", f"shape {out.shape}", "each is [tokens, heads, head_dim]")
        require(float_format(out.dtype) is not None, "outs", out.dtype, "use bfloat16, float16 or float32")
        same = (out.shape, out.dtype) == (first.shape, first.dtype)
        require(same, "outs", f"{out.dtype} {out.shape}", f"the first part is {first.dtype} {first.shape}")
        fix = f"[tokens, heads] of its result: {out.shape[:2]}"
        require(lse.shape == out.shape[:2], "lses", f"shape {lse.shape}", fix)
    lse = jnp.stack(lses).astype(jnp.float32)
    lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)
    some = lse > -jnp.inf
    top = jnp.max(lse, axis=0)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight = jnp.where(some, jnp.exp(jnp.where(some, lse - top, 0.0)), 0.0)
    total = jnp.sum(weight, axis=0)
    seen = jnp.any(some, axis=0)
    total = jnp.where(seen, total, 1.0)
    values = jnp.where(some[..., None], jnp.stack(outs).astype(jnp.float32), 0.0)
    out = jnp.sum(values * (weight / total)[..., None], axis=0)
    return out.astype(first.dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)
