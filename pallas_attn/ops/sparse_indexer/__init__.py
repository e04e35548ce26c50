"""The sparse indexer: everything between a hidden state and the positions that sparse attention reads."""

from pallas_attn.ops.sparse_indexer.gather import GatheredIndex as GatheredIndex
from pallas_attn.ops.sparse_indexer.gather import gather_index as gather_index
from pallas_attn.ops.sparse_indexer.indexer import Indexer as Indexer
from pallas_attn.ops.sparse_indexer.logits import indexer_logits as indexer_logits
from pallas_attn.ops.sparse_indexer.paged_logits import paged_indexer_logits as paged_indexer_logits
from pallas_attn.ops.sparse_indexer.rope import rope_quantize as rope_quantize
from pallas_attn.ops.sparse_indexer.slots import to_slots as to_slots
from pallas_attn.ops.sparse_indexer.split import ContextSplit as ContextSplit
from pallas_attn.ops.sparse_indexer.split import merge_topk as merge_topk
from pallas_attn.ops.sparse_indexer.split import split_topk as split_topk
from pallas_attn.ops.sparse_indexer.topk import indexer_topk as indexer_topk
from pallas_attn.ops.sparse_indexer.write import write_index as write_index
