"""vmap of paged attention: the mapped axis becomes more sequences, tokens and pages of one call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.caches import PagedKVCache
from pallas_attn.core.formats import E4M3, E5M2, Format
from pallas_attn.core.leaf import Leaf
from pallas_attn.core.masks import Mask
from pallas_attn.core.quantized import Quantized, arrange, divide, scale_of
from pallas_attn.ops.paged_attention.problem import Args, Problem, prepare
from pallas_attn.runtime.op import apply

_SEQ_HEAD = {E4M3: "E4M3_SEQ_HEAD", E5M2: "E5M2_SEQ_HEAD"}


def fold(p: Problem, args: Args, mapped: Args, n: int, backend: str | None) -> list[Array] | None:
    """The outputs with the mapped axis first, from one call over n times the batch; None where a mapped argument has
    no ragged axis to go to (a window, a soft cap, sinks, slopes, a static output scale), which leaves a loop."""
    args, mapped = Args(*args), Args(*mapped)
    shared = (mapped.scale, mapped.bias, mapped.soft_cap, mapped.sinks, mapped.out_scale,
              Mask(window=mapped.mask.window), mapped.mask.rswa and mapped.mask.rswa[1])  # fmt: skip
    if any(jax.tree.leaves(shared)) or not p.tokens or not p.seqs:
        return None
    wide = functools.partial(_wide, n)
    batch = jax.tree.map(wide, args.batch, mapped.batch)
    cache = _fold_cache(p, args.cache, mapped.cache, n)
    if cache is None:
        return None
    cache_mapped = any(jax.tree.leaves(mapped.cache))
    q = _fold_q(args.q, mapped.q, n)
    folded = _fold_batch(p, batch, n, p.pages if cache_mapped else 0)
    mask = _fold_mask(args.mask, mapped.mask, n)
    format = _in_rows(p.out_format)
    out = p.out_dtype if format is None else format if args.out_scale is None else (format, args.out_scale)
    problem, new = prepare(
        q, cache, folded,
        scale=args.scale, mask=mask, bias=args.bias, soft_cap=args.soft_cap, sinks=args.sinks, out=out,
        return_lse=p.return_lse,
    )  # fmt: skip
    from pallas_attn.ops.paged_attention import OP

    # Only the sequences of padding may have more tokens than the bound, and nothing of theirs is kept.
    problem = dataclasses.replace(problem, max_q_len=p.max_q_len)
    outs = apply(OP, problem, new, backend)
    live = jax.vmap(lambda b: b.tokens(p.tokens)[2])(batch)
    lse = outs[len(outs) - p.return_lse :]
    values, *scales = outs[: len(outs) - p.return_lse]
    arrays = [_split(values, live, 0.0), *(_split(x, live, _scale_of_zeros(format)) for x in scales)]
    if p.out_format is not None and p.out_format != format:
        arrays[1] = arrange(arrays[1], p.out_format)
    return [*arrays, *(_split(x, live, -jnp.inf) for x in lse)]


def _split(x: Array, live: Array, fill) -> Array:
    """x [n * T, ...] by copy, its padding (not live [n, T]) filled."""
    x = x.reshape(*live.shape, *x.shape[1:])
    return jnp.where(live.reshape(*live.shape, *(1 for _ in x.shape[2:])), x, jnp.asarray(fill, x.dtype))


def _scale_of_zeros(format: Format | None) -> Array | float:
    return 0.0 if format is None or format.two_level else scale_of(jnp.zeros(()), format, divide)


def _in_rows(format: Format | None) -> Format | None:
    """The format with its scales in rows, which can be cut between the copies."""
    if format is None or format.granularity != "group":
        return format
    return dataclasses.replace(format, order="row", scale_type="e4m3" if format.two_level else "float32")


def _wide(n: int, x: Leaf, mapped: Leaf) -> Array:
    return x if mapped else jnp.broadcast_to(x, (n, *x.shape))


def _fold_batch(p: Problem, batch: RaggedBatch, n: int, pages: int) -> RaggedBatch:
    """n batches one after the other. The padding tokens of each go to an empty sequence of their own, unless every
    sequence has one token and there is none."""
    starts, lengths = jax.vmap(lambda b: b.bounds(p.tokens))(batch)
    real = jnp.arange(p.seqs) < jax.vmap(lambda b: b.live)(batch)[:, None]
    kv_lens = jnp.where(real, batch.kv_lens, 0)
    table = batch.page_table + (jnp.arange(n) * pages)[:, None, None]
    offsets = (jnp.arange(n) * p.tokens)[:, None]
    ends = starts[:, -1:] + lengths[:, -1:]
    starts = jnp.concatenate([jnp.where(real, starts, ends), ends], 1) + offsets
    table = jnp.concatenate([table, jnp.zeros_like(table[:, :1])], 1)
    kv_lens = jnp.concatenate([kv_lens, jnp.zeros_like(kv_lens[:, :1])], 1)
    cu = jnp.append(starts.reshape(-1), n * p.tokens)
    return RaggedBatch(table.reshape(-1, p.pages_per_seq), kv_lens.reshape(-1), cu)


def _fold_q(q: Array | Quantized, mapped, n: int) -> Array | Quantized:
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    if not isinstance(q, Quantized):
        return flat(_wide(n, q, mapped))
    values = _wide(n, q.values, mapped.values)
    if not mapped.scale and q.format.granularity != "token_head":
        return Quantized(flat(values), q.scale, q.format)
    scale = _wide(n, q.scale, mapped.scale)
    if q.format.granularity != "token_head":  # one scale a copy: repeat it for each token and head
        scale = scale.reshape(n, 1, -1)
    format = dataclasses.replace(q.format, granularity="token_head")
    return Quantized(flat(values), flat(jnp.broadcast_to(scale, values.shape[:-1])), format)


def _fold_cache(p: Problem, cache: PagedKVCache, mapped: PagedKVCache, n: int) -> PagedKVCache | None:
    """The pages of n caches one after the other; scales that differ between them become scales per sequence."""
    if not any(jax.tree.leaves(mapped)):
        return _extend_seq_head(p, cache, n)
    buffers = tuple(
        _wide(n, x, m).reshape(-1, *x.shape[1 + m :]) for x, m in zip(cache.buffers, mapped.buffers, strict=True)
    )
    if cache.scales is None or mapped.scales is None:
        return cache.replace(buffers)
    wide = tuple(_wide(n, x, m) for x, m in zip(cache.scales, mapped.scales, strict=True))
    if p.kv_format.granularity == "token_head":
        return cache.replace(buffers, tuple(x.reshape(-1, *x.shape[2:]) for x in wide))  # type: ignore[arg-type]
    if p.kv_format.granularity != "seq_head" and not any(mapped.scales):
        return cache.replace(buffers)
    format = dataclasses.replace(p.kv_format, name=_SEQ_HEAD[p.kv_format.dtype], granularity="seq_head")
    scales = [_per_sequence(p, x, n) for x in wide]
    return _with_format(cache, buffers, scales, format)


def _per_sequence(p: Problem, scale: Array, n: int) -> Array:
    """A scale [n], [n, K] or [n, B, K] as [n * (B + 1), K]: one row more for each copy's padding."""
    rows = scale if scale.ndim == 3 else jnp.broadcast_to(scale.reshape(n, 1, -1), (n, p.seqs, p.kv_heads))
    return jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], 1).reshape(-1, p.kv_heads)


def _extend_seq_head(p: Problem, cache: PagedKVCache, n: int) -> PagedKVCache:
    if p.kv_format.granularity != "seq_head" or cache.scales is None:
        return cache
    scales = [_per_sequence(p, _wide(n, x, False), n) for x in cache.scales]
    return _with_format(cache, cache.buffers, scales, p.kv_format)


def _with_format(cache: PagedKVCache, buffers, scales: list[Array], format: Format) -> PagedKVCache:
    values = (*buffers, None)[:2]
    k, v = (Quantized(x, s, format) for x, s in zip(values, scales, strict=True))
    return PagedKVCache(k, v, cache.layout)


def _fold_mask(mask: Mask, mapped: Mask, n: int) -> Mask:
    """Per-sequence fields get one row more for each copy's padding."""

    def rows(x, m):
        x = _wide(n, x, m)
        return jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1).reshape(-1, *x.shape[2:])

    new = {}
    if not isinstance(mask.causal, bool):
        new["causal"] = rows(mask.causal, mapped.causal)
    if mask.prefix_ranges is not None:
        new["prefix_ranges"] = rows(mask.prefix_ranges, mapped.prefix_ranges)
    if mask.rswa is not None:
        assert mapped.rswa is not None
        new["rswa"] = (rows(mask.rswa[0], mapped.rswa[0]), mask.rswa[1])
    return dataclasses.replace(mask, **new)
