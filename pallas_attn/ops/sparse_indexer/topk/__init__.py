"""The positions of the largest logits of each row."""

from jaxtyping import Array, Float, Int

from pallas_attn.core.arch import Arch
from pallas_attn.ops.sparse_indexer.cases import topk_cases
from pallas_attn.ops.sparse_indexer.topk.problem import outputs, prepare
from pallas_attn.runtime.dispatch import Backend, Op, register
from pallas_attn.runtime.op import apply
from pallas_attn.runtime.triton import ARCHS as TRITON_ARCHS
from pallas_attn.runtime.triton import NEEDS

_HERE = "pallas_attn.ops.sparse_indexer.topk"
BACKENDS = (
    Backend("mosaic", "pallas_attn.ops.sparse_indexer.mosaic_topk", ("cuda",), (Arch.HOPPER,)),
    Backend("triton", f"{_HERE}.triton", ("cuda",), TRITON_ARCHS, NEEDS, cost="slower than Mosaic"),
    Backend("xla", f"{_HERE}.xla", cost="32 counting passes over the logits"),
    Backend("reference", f"{_HERE}.reference", cost="a stable sort of every row"),
)
OP = register(Op("indexer_topk", prepare, outputs, BACKENDS, f"{_HERE}.problem:vjp", None, topk_cases))


def indexer_topk(
    logits: Float[Array, "T W"],
    k: int,
    *,
    starts: Int[Array, "T"] | None = None,
    ends: Int[Array, "T"] | None = None,
    sorted: bool = False,
    backend: str | None = None,
) -> Int[Array, "T k"]:
    """The columns of the k largest logits in [starts[t], ends[t]) of every row t, relative to starts[t].

    The first k of the row's columns by descending logit, of equal logits the one with the lowest column first: one
    answer for every input, the same on every backend and in every run. A NaN counts as -inf, -0 equals +0; both zeros
    and infinities are logits like others, so that a row of no more than k columns gives all of them.

    Args:
      logits: float32.
      k: static int, at least 1; rows may be shorter, and W may be.
      starts, ends: int32; None is 0 and W; clamped to the columns that there are.
      sorted: False gives the chosen columns in ascending order, True by descending logit.
    Returns: int32 `[T, k]`, -1 behind the last one of a row of fewer than k columns.
    Raises: InvalidInput for shapes that do not fit.
    No gradient reaches the logits through positions.
    Source: vLLM csrc/sampler.cu top_k_per_row_prefill and _decode, whose order and choice among ties are arbitrary.
    """
    problem, args = prepare(logits, k, starts=starts, ends=ends, sorted=sorted)
    return apply(OP, problem, args, backend)[0]
