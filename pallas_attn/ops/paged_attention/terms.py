"""The terms of the logits, written once for every jnp backend.

Shapes here: L any leading axes, K kv heads, G query heads of one, Q queries, X keys. Positions count from the first
token of a sequence; `context` is kv_len - q_len.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from pallas_attn.core.masks import Bias, Mask


class Where(NamedTuple):
    """Which sequence, query and key each logit belongs to."""

    seq: Array  # [*L] sequence number
    context: Array  # [*L]
    kv_len: Array  # [*L]
    q_pos: Array  # [*L, Q]
    q_real: Array  # [*L, Q] False for padding
    k_pos: Array  # [X]


def visible(mask: Mask, w: Where) -> Array:
    """Which keys each query sees: bool [*L, Q, X]."""
    q, k = w.q_pos[..., None], w.k_pos
    pick = lambda x: x[w.seq][..., None, None]  # noqa: E731  per sequence -> [*L, 1, 1]
    causal = mask.causal if isinstance(mask.causal, bool) else pick(mask.causal.astype(bool))
    seen = (k <= q) | jnp.logical_not(causal)
    seen &= _windowed(mask, q, k, causal, pick)
    if mask.prefix_ranges is not None:
        seen |= _in_prefix(mask, q, k, mask.prefix_ranges[w.seq])
    return seen & (k >= 0) & (k < w.kv_len[..., None, None]) & w.q_real[..., None]


def _windowed(mask: Mask, q: Array, k: Array, causal, pick) -> Array:
    if mask.rswa is not None:
        prefix, window = mask.rswa
        return (k < pick(prefix)) | (q - k < window)
    if mask.window is None:
        return jnp.ones((), bool)
    window = jnp.asarray(mask.window, jnp.int32)
    if mask.chunk_lookback is not None:
        chunk = jnp.maximum(window // (mask.chunk_lookback + 1), 1)
        return (q // chunk - k // chunk <= mask.chunk_lookback) | (window <= 0)
    inside = q - k < window
    if mask.symmetric and causal is not True:
        inside &= causal | (k - q < window)
    return inside | (window <= 0)


def _in_prefix(mask: Mask, q: Array, k: Array, ranges: Array) -> Array:
    """Whether query and key lie in one of the ranges [*L, R, 2] of their sequence."""
    together = jnp.zeros((), bool)
    for r in range(ranges.shape[-2]):
        first, last = (ranges[..., r, i][..., None, None] for i in (0, 1))
        together |= (first < last) & (q >= first) & (q <= last) & (k >= first) & (k <= last)
    if mask.clamp_prefix:
        window = jnp.asarray(mask.window)
        together &= (q - k < window) | (window <= 0)
    return together


def scores(s: Array, scale: ArrayLike, bias: Bias, soft_cap: ArrayLike | None, w: Where) -> Array:
    """Logits [*L, K, G, Q, X] from the dot products of the numbers (scales folded in): scale, bias, soft cap."""
    s = s * scale
    added = _biases(bias, s.shape, w)
    if added is not None and bias.before_soft_cap:
        s = s + added
    if soft_cap is not None:
        soft_cap = jnp.asarray(soft_cap)
        cap = jnp.where(soft_cap > 0, soft_cap, 1.0)
        s = jnp.where(soft_cap > 0, cap * jnp.tanh(s / cap), s)
    return s + added if added is not None and not bias.before_soft_cap else s


def _biases(bias: Bias, shape: tuple[int, ...], w: Where) -> Array | None:
    heads, column = shape[-4:-2], w.k_pos - w.context[..., None]  # column [*L, X]
    added = None
    if bias.alibi_slopes is not None:
        slopes = bias.alibi_slopes.astype(jnp.float32).reshape(*heads, 1, 1)
        if bias.alibi_sqrt:
            behind = jnp.maximum(w.q_pos[..., None] - w.k_pos, 0).astype(jnp.float32)
            distance = -jnp.sqrt(behind)[..., None, None, :, :]
        else:
            distance = column.astype(jnp.float32)[..., None, None, None, :]
        added = slopes * distance
    if bias.query_query is not None:
        row = w.q_pos - w.context[..., None]
        pair = bias.query_query.astype(jnp.float32).at[row[..., :, None], column[..., None, :]].get(
            mode="fill", fill_value=0.0, wrap_negative_indices=False
        )  # fmt: skip
        pair = pair[..., None, None, :, :]
        added = pair if added is None else added + pair
    return added


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum in full float32, on GPUs too."""
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
