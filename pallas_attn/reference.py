"""The definition of every op: the public functions bound to their naive, differentiable backend."""

import functools

from pallas_attn.ops import gather_kv as _gather_kv
from pallas_attn.ops import kv_cache as _kv_cache
from pallas_attn.ops import latent_cache as _latent_cache
from pallas_attn.ops import mla as _mla
from pallas_attn.ops import paged_attention as _paged_attention
from pallas_attn.ops import quantize_output as _quantize_output
from pallas_attn.ops import sparse_indexer as _sparse_indexer

gather_index = functools.partial(_sparse_indexer.gather_index, backend="reference")
gather_kv = functools.partial(_gather_kv.gather_kv, backend="reference")
gather_latent = functools.partial(_latent_cache.gather_latent, backend="reference")
indexer_logits = functools.partial(_sparse_indexer.indexer_logits, backend="reference")
indexer_topk = functools.partial(_sparse_indexer.indexer_topk, backend="reference")
mla_attention = functools.partial(_mla.mla_attention, backend="reference")
paged_attention = functools.partial(_paged_attention.paged_attention, backend="reference")
paged_indexer_logits = functools.partial(_sparse_indexer.paged_indexer_logits, backend="reference")
quantize = functools.partial(_quantize_output.quantize, backend="reference")
write_index = functools.partial(_sparse_indexer.write_index, backend="reference")
write_kv = functools.partial(_kv_cache.write_kv, backend="reference")
write_latent = functools.partial(_latent_cache.write_latent, backend="reference")

__all__ = [
    "gather_index", "gather_kv", "gather_latent", "indexer_logits", "indexer_topk", "mla_attention", "paged_attention",
    "paged_indexer_logits", "quantize", "write_index", "write_kv", "write_latent",
]  # fmt: skip
