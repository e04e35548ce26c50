"""Mask and Bias: which keys a query sees, and what is added to its logits.

Python numbers in them are static; arrays are traced, so that a new value never recompiles.
"""

import dataclasses

import jax

from pallas_attn.core.leaf import Leaf


def _static(x) -> bool:
    return x is None or isinstance(x, bool | int | float)


def _register(cls):
    """Register a frozen dataclass whose Python-number fields are static and whose other fields are leaves."""
    names = tuple(f.name for f in dataclasses.fields(cls))

    def flatten_with_keys(x):
        leaves = tuple(n for n in names if not _static(getattr(x, n)))
        statics = tuple((n, getattr(x, n)) for n in names if n not in leaves)
        return tuple((jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in leaves), (leaves, statics)

    def unflatten(aux, children):
        leaves, statics = aux
        return cls(**dict(zip(leaves, children, strict=True)), **dict(statics))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@_register
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees: (causal and window) or prefix range.

    causal: True, False, or bool [B] to choose per sequence. Query i of a sequence has position kv_len - q_len + i.
    window: W, int or int32 []; keys with q_pos - k_pos < W. Where a sequence is not causal, also k_pos - q_pos < W
      unless `symmetric` is False. None or a value <= 0: no window.
    chunk_lookback: L, static; instead of the sliding window, with chunks of W // (L + 1) tokens, keys whose chunk is
      at most L before the query's.
    prefix_ranges: int32 [B, R, 2], inclusive position ranges inside which all tokens see each other (start < end,
      others are ignored); with clamp_prefix only up to q_pos - k_pos < W.
    rswa: (prefix_lens int32 [B], window); instead of the sliding window, keys with k_pos < prefix_lens[b], or
      with q_pos - k_pos < window.
    Source: vLLM v1/attention/ops/triton_attention_helpers.py; unlike there, a non-causal window is right for every row.
    """

    causal: bool | Leaf = True
    window: int | Leaf | None = None
    symmetric: bool = True
    chunk_lookback: int | None = None
    prefix_ranges: Leaf | None = None
    clamp_prefix: bool = False
    rswa: tuple[Leaf, int | Leaf] | None = None

    def names(self) -> tuple[str, ...]:
        """The options in use, for support tables and messages."""
        used = {
            "non-causal": self.causal is False,
            "per-sequence causal": not isinstance(self.causal, bool),
            "window": self.window is not None and self.chunk_lookback is None,
            "chunked": self.chunk_lookback is not None,
            "prefix ranges": self.prefix_ranges is not None,
            "R-SWA": self.rswa is not None,
        }
        return tuple(name for name, on in used.items() if on)


@_register
@dataclasses.dataclass(frozen=True)
class Bias:
    """What is added to the scaled logits, after the soft cap as in vLLM or before it as in aiter.

    alibi_slopes: float32 [H]; adds slope * (k_pos - context_len), context_len = kv_len - q_len; with `alibi_sqrt`
      slope * -sqrt(q_pos - k_pos) for keys not after the query, else 0.
    query_query: float [Q, Q'], row = query index in its sequence, column = k_pos - context_len; zero outside.
    """

    alibi_slopes: Leaf | None = None
    alibi_sqrt: bool = False
    query_query: Leaf | None = None
    before_soft_cap: bool = False

    def names(self) -> tuple[str, ...]:
        """The options in use, for support tables and messages."""
        used = {
            "ALiBi": self.alibi_slopes is not None and not self.alibi_sqrt,
            "ALiBi sqrt": self.alibi_slopes is not None and self.alibi_sqrt,
            "query-query bias": self.query_query is not None,
            "bias before soft cap": self.before_soft_cap
            and not (self.alibi_slopes is None and self.query_query is None),
        }
        return tuple(name for name, on in used.items() if on)
