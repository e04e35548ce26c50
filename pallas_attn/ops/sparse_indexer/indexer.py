"""The indexer layer: from hidden states to the positions that sparse attention reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_attn.core.batch import RaggedBatch, check_batch
from pallas_attn.core.errors import require
from pallas_attn.core.formats import INDEX_Q
from pallas_attn.core.index_cache import IndexCache, check_index_cache
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.sparse_indexer.gather import gather_index
from pallas_attn.ops.sparse_indexer.logits import indexer_logits
from pallas_attn.ops.sparse_indexer.paged_logits import paged_indexer_logits
from pallas_attn.ops.sparse_indexer.rope import rope_quantize
from pallas_attn.ops.sparse_indexer.terms import in_blocks
from pallas_attn.ops.sparse_indexer.topk import indexer_topk
from pallas_attn.ops.sparse_indexer.turns import angles, hadamard, rotate
from pallas_attn.ops.sparse_indexer.write import write_index

DECODE = 8  # query tokens of a sequence up to which a step is a decode
LOGITS = 1 << 27  # float32 logits of a prefill that exist at a time, at most about


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("wq", "wk", "norm", "norm_bias", "frequencies"),
    meta_fields=("heads", "topk", "interleaved", "hadamard", "epsilon"),
)
@dataclasses.dataclass(frozen=True)
class Indexer:
    """The weights of one layer's indexer, and its forward. D index head dim, H heads, E hidden width, C query width.

    wq: `[C, H D]`, index queries from the query latent.
    wk: `[E, D + H]`, the index key and the heads' weights from the hidden state: one GEMM.
    norm, norm_bias: `[D]`, LayerNorm of the key, computed in float32.
    frequencies: float32 `[R / 2]` of RoPE on the first R dims of queries and keys, scaled as the model wants (YaRN).
    heads: H, static.
    topk: positions to choose, static.
    interleaved: RoPE pairs dims (2i, 2i + 1) instead of (i, i + R / 2); static.
    hadamard: turn queries and keys by the Hadamard matrix before they are quantised, which leaves logits what they are
      and spreads outliers; static, one flag for both, for a cache written with it must be read with it.
    epsilon: of the LayerNorm, static.
    """

    wq: Leaf
    wk: Leaf
    norm: Leaf
    norm_bias: Leaf
    frequencies: Leaf
    heads: int = 64
    topk: int = 2048
    interleaved: bool = False
    hadamard: bool = False
    epsilon: float = 1e-6

    @classmethod
    def init(
        cls, key: Array, hidden: int, q_lora: int, *, heads: int = 64, head_dim: int = 128, rope_dim: int = 64,
        base: float = 10_000.0, dtype=jnp.float32, **statics,
    ) -> "Indexer":  # fmt: skip
        """Random weights; the statics are those of the class."""
        keys = jax.random.split(key)
        wq = jax.random.normal(keys[0], (q_lora, heads * head_dim), dtype) * q_lora**-0.5
        wk = jax.random.normal(keys[1], (hidden, head_dim + heads), dtype) * hidden**-0.5
        frequencies = base ** (-jnp.arange(0, rope_dim, 2, dtype=jnp.float32) / rope_dim)
        norm, bias = jnp.ones(head_dim), jnp.zeros(head_dim)
        return cls(wq, wk, norm, bias, frequencies, heads=heads, **statics)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.norm.shape[0]

    @property
    def scale(self) -> float:
        """The constant factor of the logits, D**-0.5 * H**-0.5: what to pass to the logits ops as `scale`."""
        return self.head_dim**-0.5 * self.heads**-0.5

    def project(
        self, hidden: Float[Array, "T E"], q_lora: Float[Array, "T C"], positions: Int[Array, "T"]
    ) -> tuple[Float[Array, "T H D"], Float[Array, "T D"], Float[Array, "T H"]]:
        """(queries `[T, H, D]`, keys `[T, D]`, weights `[T, H]` float32) before quantisation, in the wider of
        the types of inputs and weights.

        Training goes from here to `indexer_logits`, through `fake_quantize` if it is to feel FP8.
        """
        check(self, hidden, q_lora, positions)
        turns = angles(positions, self.frequencies)
        q, k, weights = self._unturned(hidden, q_lora)
        return self._turned(q, turns), self._turned(k, turns), weights

    def _unturned(self, hidden: Array, q_lora: Array) -> tuple[Array, Array, Array]:
        q = (q_lora @ self.wq).reshape(-1, self.heads, self.head_dim)
        k, weights = jnp.split(hidden @ self.wk, [self.head_dim], axis=-1)
        return q, layer_norm(k, self.norm, self.norm_bias, self.epsilon), weights.astype(jnp.float32)

    def _turned(self, x: Array, turns: tuple[Array, Array]) -> Array:
        x = rotate(x, *turns, self.interleaved)
        return hadamard(x) if self.hadamard else x

    def __call__(
        self,
        hidden: Float[Array, "T E"],
        q_lora: Float[Array, "T C"],
        positions: Int[Array, "T"],
        cache: IndexCache,
        batch: RaggedBatch,
        slots: Int[Array, "T"],
        *,
        sorted: bool = False,
        backend: str | None = None,
    ) -> tuple[Int[Array, "T k"], IndexCache]:
        """Write this step's index keys, then choose for every query token among all cached ones up to its own.

        Args:
          hidden, q_lora: the step's hidden states and query latents.
          positions: int32, of the tokens in their sequences, for RoPE.
          cache: index keys of the earlier tokens; donate it.
          batch: pages, lengths (this step's tokens included) and query tokens of the sequences. Logits are taken over
            the pages up to a `max_q_len` of 8; else keys are gathered once, and logits exist for some rows at a time.
          slots: int32, where the step's keys go: `batch.slot_mapping(T, cache.page_size)`.
          sorted: by descending logit instead of ascending position.
        Returns: (positions int32 `[T, topk]` relative to each sequence, -1 padded; the written cache).
        Raises: InvalidInput for shapes that do not fit.
        Source: vLLM model_executor/models/deepseek_v2.py Indexer.
        """
        check(self, hidden, q_lora, positions)
        check_index_cache(cache)
        check_batch(batch)
        require(cache.head_dim == self.head_dim, "cache", f"head_dim {cache.head_dim}", f"norm has {self.head_dim}")
        turns = angles(positions, self.frequencies)
        q, k, weights = self._unturned(hidden, q_lora)
        cache = write_index(cache, self._turned(k, turns), slots, backend=backend)
        stored = rope_quantize(
            q, *turns, interleaved=self.interleaved, hadamard=self.hadamard,
            format=dataclasses.replace(INDEX_Q, group=self.head_dim), backend=backend,
        )  # fmt: skip
        seq, position, real = batch.tokens(q.shape[0])
        seen = jnp.where(real, jnp.clip(position + 1, 0, jnp.maximum(batch.kv_lens[seq], 0)), 0)
        choose = functools.partial(indexer_topk, k=self.topk, sorted=sorted, backend=backend)
        if batch.max_q_len is not None and batch.max_q_len <= DECODE:
            logits = paged_indexer_logits(stored, weights, cache, batch, scale=self.scale, backend=backend)
            return choose(logits, ends=seen), cache
        seqs, pages = batch.page_table.shape
        room = pages * cache.page_size
        keys, cu_lens = gather_index(cache, batch, max_tokens=seqs * room, backend=backend)

        def rows(values, scale, weights, starts, seen):
            q = Quantized(values, scale, stored.format)
            logits = indexer_logits(
                q, keys, weights, starts, starts + seen, width=room, scale=self.scale, backend=backend
            )
            return choose(logits, ends=seen)

        tile = min(max(LOGITS // room, 1), max(q.shape[0], 1))
        chosen = in_blocks(rows, tile, (stored.values, stored.scale, weights, cu_lens[seq], seen))
        return chosen.reshape(-1, self.topk)[: q.shape[0]], cache


def check(x: Indexer, hidden: Leaf, q_lora: Leaf, positions: Leaf) -> None:
    """Refuse weights and inputs that do not fit each other."""
    dim, tokens = x.norm.shape[0], hidden.shape[0]
    for name, array, shape in (
        ("hidden", hidden, (tokens, x.wk.shape[0])), ("q_lora", q_lora, (tokens, x.wq.shape[0])),
        ("positions", positions, (tokens,)), ("wq", x.wq, (x.wq.shape[0], x.heads * dim)),
        ("wk", x.wk, (x.wk.shape[0], dim + x.heads)), ("norm_bias", x.norm_bias, (dim,)),
    ):  # fmt: skip
        require(array.shape == shape, name, f"shape {array.shape}", f"it needs {shape}")
    fits = x.frequencies.ndim == 1 and 2 * x.frequencies.shape[0] <= dim
    require(fits, "frequencies", f"shape {x.frequencies.shape}", f"half of the rotated dims: at most ({dim // 2},)")
    require(not x.hadamard or dim & (dim - 1) == 0, "hadamard", f"head_dim {dim}", "it needs a power of two")


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis in float32, rounded once to the type of x."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(x.dtype)
