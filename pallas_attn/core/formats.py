"""Formats: how numbers are stored, how many values share a scale, and by which rule that scale is found."""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from pallas_attn.core.errors import require

Division = Literal["divide", "reciprocal"]
Granularity = Literal["none", "tensor", "head", "seq_head", "token_head", "group"]
Order = Literal["row", "column", "tma"]


class Tolerance(NamedTuple):
    """What a test may allow between two implementations that read the same stored values."""

    atol: float
    rtol: float


LOOSE = Tolerance(1.5e-2, 1e-2)


@dataclasses.dataclass(frozen=True)
class Format:
    """A storage type with its scales, and every rule by which upstream systems differ.

    A stored value v stands for `v * scale`. `quantize` finds a dynamic scale as

        amax = max(|x|) over the values that share it
        scale = max(amax, amax_floor) / qmax, then max(scale, scale_floor), then 2**ceil(log2(scale)) if `ue8m0`

    and a value as round(x / scale), clamped to the finite range first. Either division may be a multiplication with
    the float32 reciprocal instead, which gives other bits: `find_scale` and `apply_scale` say which.

    Scales of groups, logically `[.., M, G]` for values `[.., M, D]`, lie in memory as `order` and `scale_type` tell:

        row     [.., M, G]
        column  [.., G, M]
        tma     [.., G, M'], M' the multiple of 4 from M: whole 16 bytes, as the copy engine wants them
        int32   four groups to a word, their exponents from the lowest byte up: G / 4, rounded up, for G
        e4m3    each of them times one float32 of the whole tensor: a `BlockScale`

    What fills up rows has the scale of zeros; what fills up words is zero.
    """

    name: str
    dtype: np.dtype
    granularity: Granularity = "none"
    group: int | None = None  # values per scale along the last axis, for "group"
    amax_floor: float = 0.0
    scale_floor: float = 0.0
    find_scale: Division = "divide"
    apply_scale: Division = "divide"
    rounding: Literal["nearest_even", "half_away"] = "nearest_even"
    ue8m0: bool = False  # scales are powers of two
    order: Order = "row"
    scale_type: Literal["float32", "int32", "e4m3"] = "float32"
    exponents: bool = False  # a cache of raw bytes keeps the exponent of a ue8m0 scale, four times, not the float32
    tolerance: Tolerance = LOOSE

    @property
    def quantized(self) -> bool:
        """Whether values come with a scale."""
        return self.granularity != "none"

    @property
    def qmax(self) -> float:
        """The largest magnitude a stored value takes: 448 (e4m3), 57344 (e5m2), 127 (int8), 6 (e2m1)."""
        return 127.0 if self.dtype == jnp.int8 else float(jnp.finfo(self.dtype).max)

    @property
    def qmin(self) -> float:
        """The lowest stored value: `-qmax`, but -128 for int8."""
        return -128.0 if self.dtype == jnp.int8 else -self.qmax

    @property
    def per_byte(self) -> int:
        """Values of one byte, where it holds several: 2 for e2m1."""
        return 2 if self.dtype == E2M1 else 1

    @property
    def stored(self) -> np.dtype:
        """The type of the array of values: `dtype`, but uint8 where a byte holds several."""
        return np.dtype(np.uint8) if self.per_byte > 1 else self.dtype

    @property
    def two_level(self) -> bool:
        """Whether each scale is itself a stored value, times one float32 of the tensor."""
        return self.scale_type == "e4m3"

    @property
    def rows(self) -> int:
        """Rows of group scales come in multiples of this."""
        return 4 if self.order == "tma" else 1

    def __repr__(self) -> str:
        return self.name


E4M3, E5M2, INT8, E2M1 = (np.dtype(t) for t in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8, jnp.float4_e2m1fn))

BF16 = Format("BF16", np.dtype(jnp.bfloat16))
F16 = Format("F16", np.dtype(jnp.float16))
F32 = Format("F32", np.dtype(jnp.float32), tolerance=Tolerance(1e-5, 1e-5))

# One scale for the tensor. The cache writer divides (vLLM csrc/cache_kernels.cu) ...
E4M3_TENSOR = Format("E4M3_TENSOR", E4M3, "tensor", scale_floor=1e-12)
E5M2_TENSOR = Format("E5M2_TENSOR", E5M2, "tensor", scale_floor=1e-12)
# ... the quantiser of activations and outputs multiplies by the reciprocal (vLLM csrc w8a8/fp8/common.cu).
E4M3_STATIC = Format("E4M3_STATIC", E4M3, "tensor", scale_floor=1e-12, apply_scale="reciprocal")
E5M2_STATIC = Format("E5M2_STATIC", E5M2, "tensor", scale_floor=1e-12, apply_scale="reciprocal")

# One scale per kv head; per (sequence, head) exists for reading only.
E4M3_HEAD = Format("E4M3_HEAD", E4M3, "head", scale_floor=1e-12)
E5M2_HEAD = Format("E5M2_HEAD", E5M2, "head", scale_floor=1e-12)
E4M3_SEQ_HEAD = Format("E4M3_SEQ_HEAD", E4M3, "seq_head", scale_floor=1e-12)
E5M2_SEQ_HEAD = Format("E5M2_SEQ_HEAD", E5M2, "seq_head", scale_floor=1e-12)

# One scale per token and head, found while writing (vLLM triton_reshape_and_cache_flash.py, per-token-head writer).
E4M3_TOKEN_HEAD = Format(
    "E4M3_TOKEN_HEAD", E4M3, "token_head", scale_floor=1e-6, find_scale="reciprocal", apply_scale="reciprocal"
)
E5M2_TOKEN_HEAD = dataclasses.replace(E4M3_TOKEN_HEAD, name="E5M2_TOKEN_HEAD", dtype=E5M2)
INT8_TOKEN_HEAD = dataclasses.replace(E4M3_TOKEN_HEAD, name="INT8_TOKEN_HEAD", dtype=INT8, rounding="half_away")

# The sparse indexer's keys (vLLM csrc/cache_kernels.cu, indexer_k_quant_and_cache) and the latent part of the
# 656-byte MLA row (concat_and_cache_ds_mla): one floors amax, the other the scale; both round it up to a power of two.
INDEX_K = Format("INDEX_K", E4M3, "group", group=128, amax_floor=1e-4, ue8m0=True)
INDEX_K_F32 = dataclasses.replace(INDEX_K, name="INDEX_K_F32", ue8m0=False)
INDEX_K_EXPONENT = dataclasses.replace(INDEX_K, name="INDEX_K_EXPONENT", exponents=True)
# Its queries, one scale per token and head (vLLM's unfused and fused q quantisers).
INDEX_Q = dataclasses.replace(INDEX_K, name="INDEX_Q", amax_floor=1e-10)
FP8_DS_MLA = Format("FP8_DS_MLA", E4M3, "group", group=128, scale_floor=1e-4, ue8m0=True)


# Two e2m1 codes a byte, the even one in the low half (vLLM csrc nvfp4_quant_kernels.cu, whose global scale is the
# reciprocal of the tensor's here; its scales in rows, not in tiles of 128 x 4).
NVFP4 = Format(
    "NVFP4", E2M1, "group", 16, scale_floor=1e-12, find_scale="reciprocal", apply_scale="reciprocal", scale_type="e4m3"
)

GROUPS = (64, 128)


def e4m3_group(group: int, *, ue8m0: bool = False, order: Order = "row", packed: bool = False) -> Format:
    """FP8 with one scale per `group` values of a row (vLLM csrc per_token_group_quant.cu).

    Args:
      group: 64 or 128.
      ue8m0: scales are powers of two.
      order: how scales lie in memory, as `Format` tells.
      packed: four exponents in an int32, as DeepGEMM reads them; needs `ue8m0=True, order="tma"`.
    Raises: InvalidInput for another group, order or packing.
    """
    require(group in GROUPS, "group", group, "choose 64 or 128")
    orders = get_args(Order)
    require(order in orders, "order", repr(order), f"choose one of {', '.join(orders)}")
    ready = ue8m0 and order == "tma"
    require(ready or not packed, "packed", packed, 'exponents are packed with ue8m0=True and order="tma" only')
    suffixes = ("_UE8M0" if ue8m0 else "", "" if order == "row" else f"_{order.upper()}", "_PACKED" if packed else "")
    return Format(
        f"E4M3_GROUP{group}{''.join(suffixes)}", E4M3, "group", group, amax_floor=1e-10,
        scale_floor=1e-10 if ue8m0 else 0.0,  # a power-of-two scale has the floor once more, on itself
        apply_scale="reciprocal", ue8m0=ue8m0, order=order, scale_type="int32" if packed else "float32",
    )  # fmt: skip


GROUP_FORMATS = (
    *(e4m3_group(g, ue8m0=u, order=o) for g in GROUPS for u in (False, True) for o in get_args(Order)),
    *(e4m3_group(g, ue8m0=True, order="tma", packed=True) for g in GROUPS),
)

FLOAT_FORMATS = (BF16, F16, F32)
KV_FORMATS = (
    *FLOAT_FORMATS, E4M3_TENSOR, E5M2_TENSOR, E4M3_HEAD, E5M2_HEAD, E4M3_SEQ_HEAD, E5M2_SEQ_HEAD,
    E4M3_TOKEN_HEAD, E5M2_TOKEN_HEAD, INT8_TOKEN_HEAD,
)  # fmt: skip

INDEX_FORMATS = (INDEX_K, INDEX_K_F32, INDEX_K_EXPONENT)


def float_format(dtype) -> Format | None:
    """The format of a plain float array, or None if its type needs a scale."""
    return next((f for f in FLOAT_FORMATS if f.dtype == dtype), None)
