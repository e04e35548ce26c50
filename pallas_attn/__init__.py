"""FP8 paged attention for JAX on NVIDIA GPUs."""

from pallas_attn import reference as reference
from pallas_attn.core.batch import RaggedBatch as RaggedBatch
from pallas_attn.core.caches import PagedKVCache as PagedKVCache
from pallas_attn.core.errors import InvalidInput as InvalidInput
from pallas_attn.core.errors import Unsupported as Unsupported
from pallas_attn.core.formats import BF16 as BF16
from pallas_attn.core.formats import E4M3_HEAD as E4M3_HEAD
from pallas_attn.core.formats import E4M3_SEQ_HEAD as E4M3_SEQ_HEAD
from pallas_attn.core.formats import E4M3_STATIC as E4M3_STATIC
from pallas_attn.core.formats import E4M3_TENSOR as E4M3_TENSOR
from pallas_attn.core.formats import E4M3_TOKEN_HEAD as E4M3_TOKEN_HEAD
from pallas_attn.core.formats import E5M2_HEAD as E5M2_HEAD
from pallas_attn.core.formats import E5M2_SEQ_HEAD as E5M2_SEQ_HEAD
from pallas_attn.core.formats import E5M2_STATIC as E5M2_STATIC
from pallas_attn.core.formats import E5M2_TENSOR as E5M2_TENSOR
from pallas_attn.core.formats import E5M2_TOKEN_HEAD as E5M2_TOKEN_HEAD
from pallas_attn.core.formats import F16 as F16
from pallas_attn.core.formats import F32 as F32
from pallas_attn.core.formats import FP8_DS_MLA as FP8_DS_MLA
from pallas_attn.core.formats import INDEX_K as INDEX_K
from pallas_attn.core.formats import INT8_TOKEN_HEAD as INT8_TOKEN_HEAD
from pallas_attn.core.formats import KV_FORMATS as KV_FORMATS
from pallas_attn.core.formats import Format as Format
from pallas_attn.core.formats import e4m3_group as e4m3_group
from pallas_attn.core.layouts import HND as HND
from pallas_attn.core.layouts import INTERLEAVED as INTERLEAVED
from pallas_attn.core.layouts import LAYOUTS as LAYOUTS
from pallas_attn.core.layouts import NHD as NHD
from pallas_attn.core.layouts import PACKED as PACKED
from pallas_attn.core.layouts import SHUFFLE as SHUFFLE
from pallas_attn.core.layouts import Layout as Layout
from pallas_attn.core.masks import Bias as Bias
from pallas_attn.core.masks import Mask as Mask
from pallas_attn.core.quantized import Quantized as Quantized
from pallas_attn.core.quantized import dequantize as dequantize
from pallas_attn.core.quantized import fake_quantize as fake_quantize
from pallas_attn.core.quantized import quantize as quantize
from pallas_attn.ops.kv_cache import write_kv as write_kv
from pallas_attn.ops.paged_attention import paged_attention as paged_attention
from pallas_attn.runtime.dispatch import FallbackWarning as FallbackWarning
from pallas_attn.runtime.dispatch import explain as explain
from pallas_attn.runtime.dispatch import strict as strict
from pallas_attn.runtime.dispatch import use_backend as use_backend
from pallas_attn.runtime.support import support_table as support_table

__version__ = "0.1.0"
