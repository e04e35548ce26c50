"""Formats: how numbers are stored, how many values share a scale, and by which rule that scale is found."""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

Division = Literal["divide", "reciprocal"]
Granularity = Literal["none", "tensor", "head", "seq_head", "token_head", "group"]


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
    order: Literal["row", "column"] = "row"  # of group scales in memory; the logical shape is the same
    exponents: bool = False  # a cache of raw bytes keeps the exponent of a ue8m0 scale, four times, not the float32
    tolerance: Tolerance = LOOSE

    @property
    def quantized(self) -> bool:
        """Whether values come with a scale."""
        return self.granularity != "none"

    @property
    def qmax(self) -> float:
        """The largest magnitude a stored value takes: 448 (e4m3), 57344 (e5m2), 127 (int8)."""
        return 127.0 if self.dtype == jnp.int8 else float(jnp.finfo(self.dtype).max)

    @property
    def qmin(self) -> float:
        """The lowest stored value: `-qmax`, but -128 for int8."""
        return -128.0 if self.dtype == jnp.int8 else -self.qmax

    def __repr__(self) -> str:
        return self.name


E4M3, E5M2, INT8 = (np.dtype(t) for t in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8))

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


def e4m3_group(group: int, *, ue8m0: bool = False, order: Literal["row", "column"] = "row") -> Format:
    """FP8 with one scale per `group` (64 or 128) values of a row (vLLM csrc per_token_group_quant.cu)."""
    name = f"E4M3_GROUP{group}{'_UE8M0' if ue8m0 else ''}{'_COLUMN' if order == 'column' else ''}"
    # A power-of-two scale has the floor once more, on itself.
    floor = 1e-10 if ue8m0 else 0.0
    return Format(
        name, E4M3, "group", group, 1e-10, floor, apply_scale="reciprocal", ue8m0=ue8m0, order=order
    )  # fmt: skip


FLOAT_FORMATS = (BF16, F16, F32)
KV_FORMATS = (
    *FLOAT_FORMATS, E4M3_TENSOR, E5M2_TENSOR, E4M3_HEAD, E5M2_HEAD, E4M3_SEQ_HEAD, E5M2_SEQ_HEAD,
    E4M3_TOKEN_HEAD, E5M2_TOKEN_HEAD, INT8_TOKEN_HEAD,
)  # fmt: skip

INDEX_FORMATS = (INDEX_K, INDEX_K_F32, INDEX_K_EXPONENT)


def float_format(dtype) -> Format | None:
    """The format of a plain float array, or None if its type needs a scale."""
    return next((f for f in FLOAT_FORMATS if f.dtype == dtype), None)
