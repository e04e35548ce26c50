"""`compute-sanitizer --tool memcheck python -m bench.sanitize`, or racecheck: a few cache writes, decodes and mixed
steps ("cells"), and small cases of the benchmark of the other kernels, each once and checked, while the tool watches
every access to memory. A pattern names some of them: `python -m bench.sanitize "mla*"`."""

import fnmatch
import os
import sys
from typing import Any

if __name__ == "__main__":
    # Every buffer by itself: inside one large pool an access past the end of a buffer would be none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import gathers, indexing, mla, quantizing

KV_LENS = (200, 0, 64, 5, 131, 1)
# Format, layout, page size, kv heads, query heads, head dim, query tokens, with a schedule, options.
CELLS = [
    (pa.E4M3_TENSOR, pa.HND, 64, 8, 32, 128, 1, False, {}),
    (pa.E4M3_TENSOR, pa.NHD, 16, 8, 32, 128, 1, True, {"soft_cap": 2.0, "mask": pa.Mask(window=70)}),
    (pa.E5M2_TOKEN_HEAD, pa.HND, 128, 2, 8, 64, 2, False, {"mask": pa.Mask(window=70)}),
    (pa.INT8_TOKEN_HEAD, pa.INTERLEAVED, 32, 3, 6, 128, 1, True, {}),
    (pa.BF16, pa.PACKED, 256, 2, 32, 64, 4, False, {}),
    (pa.E4M3_HEAD, pa.NHD, 64, 1, 16, 256, 1, False, {}),
    (pa.E4M3_TENSOR, pa.HND, 64, 8, 32, 128, 150, False, {}),  # mixed: prompts and single tokens
    (pa.INT8_TOKEN_HEAD, pa.NHD, 32, 2, 4, 64, 200, False, {"mask": pa.Mask(window=70)}),
    (pa.BF16, pa.PACKED, 128, 2, 32, 64, 90, False, {}),
]

SMALL = [
    (mla, "mla_h128_b32_c4096_kvbf16_gq"), (mla, "mla_h128_b32_c4096_kvfp8"), (mla, "mlasp_h128_b32_k2048_gq"),
    (mla, "mla_h128_1x2k_kvbf16"), (mla, "mla_h128_1x2k_kvfp8"), (indexing, "pmqa_b32_c4096"),
    (indexing, "mqa_m4096_n32768"), (indexing, "topk_b32_c4096"), (indexing, "rope_b64"),
    (quantizing, "gq_t128_n16384"), (quantizing, "gq_up_t128_h128"), (gathers, "gather_b8_c8192_p16"),
]  # fmt: skip


def run(cell: tuple, backend: str | None) -> float:
    """Relative error of one cell: a prompt written into the cache, then its last tokens decoded from there."""
    format, layout, page_size, kv_heads, q_heads, dim, q_tokens, scheduled, options = cell
    rng = np.random.default_rng(0)
    owned = [-(-n // page_size) for n in KV_LENS]
    order = rng.permutation(sum(owned)).astype(np.int32)
    table = np.zeros((len(owned), max(owned)), np.int32)
    for row, end, count in zip(table, np.cumsum(owned), owned, strict=True):
        row[:count] = order[end - count : end]
    scales = {"tensor": 0.02, "head": jnp.linspace(0.02, 0.04, kv_heads)}.get(format.granularity)
    given = {} if scales is None else {"k_scale": scales, "v_scale": scales}
    cache = pa.PagedKVCache.allocate(sum(owned), page_size, kv_heads, dim, format=format, layout=layout, **given)
    # Three tokens more than there are: they have no slot.
    k, v = (jnp.asarray(rng.standard_normal((sum(KV_LENS) + 3, kv_heads, dim)), jnp.bfloat16) for _ in "kv")
    prompt = pa.RaggedBatch(jnp.asarray(table), jnp.array(KV_LENS), jnp.cumsum(jnp.array([0, *KV_LENS])))
    cache = pa.write_kv(cache, k, v, prompt.slot_mapping(len(k), page_size), backend=backend)
    q_lens = [min(n, q_tokens) for n in KV_LENS]
    batch = pa.RaggedBatch(prompt.page_table, prompt.kv_lens, jnp.cumsum(jnp.array([0, *q_lens])), max_q_len=q_tokens)
    batch = batch.with_schedule(70 if options.get("mask") else None) if scheduled else batch
    q = jnp.asarray(rng.standard_normal((sum(q_lens) + 3, q_heads, dim)), jnp.bfloat16)
    out = pa.paged_attention(q, cache, batch, backend=backend, out=jnp.float32, **options)
    # The tool slows what runs on the GPU, and only the kernels are its business.
    args = jax.device_put((q, cache, batch), jax.devices("cpu")[0])
    want = pa.reference.paged_attention(*args, out=jnp.float32, **options)
    return distance(*numbers((out, want)))


def compare(kind: Any, case: Any, backend: str | None) -> float:
    """Relative error of a small case to the portable backend on a CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        args = kind.arguments(case)
        want = kind.operation(case, "xla")(*args)
    got = kind.operation(case, backend)(*jax.device_put(args, jax.devices()[0]))
    return max(distance(x, y) for x, y in zip(numbers(got), numbers(want), strict=True))


def numbers(results: Any) -> list[np.ndarray]:
    """What results stand for, in float64."""
    quantized = lambda x: isinstance(x, pa.Quantized)  # noqa: E731
    leaves = jax.tree.leaves(results, is_leaf=quantized)
    return [np.asarray(pa.dequantize(x) if quantized(x) else x).astype(np.float64) for x in leaves]


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 distance; infinite where not the same numbers are finite."""
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return float("inf")
    seen = np.isfinite(want)
    return float(np.linalg.norm(got[seen] - want[seen]) / max(np.linalg.norm(want[seen]), 1e-30))


def main(pattern: str = "*") -> None:
    """Every cell once, and the small cases that a pattern names; an error past that of the kernels' arithmetic is
    one."""
    backend = "mosaic" if jax.default_backend() == "gpu" else None
    if backend is None:
        print("no GPU here: the portable backend")
    for cell in CELLS if fnmatch.fnmatch("cells", pattern) else []:
        error = run(cell, backend)
        format, layout, page_size, kv_heads, q_heads, dim, q_tokens, *_ = cell
        print(f"{format} {layout} {page_size} {q_heads}/{kv_heads} {dim} {q_tokens}: error {error:.1e}", flush=True)
        assert error < 4e-3
    for kind, name in ((kind, name) for kind, name in SMALL if fnmatch.fnmatch(name, pattern)):
        case: Any = kind.all_cases()[name].small()
        error = compare(kind, case, backend)
        print(f"{case.name}: error {error:.1e}", flush=True)
        assert error < 6e-2  # of FP8 results; others are smaller


if __name__ == "__main__":
    main(*sys.argv[1:])
