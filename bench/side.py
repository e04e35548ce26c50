"""Other implementations of paged decode side by side: the same case, process and timing. What is missing says so.

Each peer is prepared outside of what is timed: layouts converted, plans made, as its own users would once a step.
FlashInfer and vLLM are optional and foreign; bench/peers holds times of them that were measured before.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import timing
from bench.cases import K_SCALE, Q_SCALE, V_SCALE, Case, relative_error


class Side(NamedTuple):
    """A peer's time and relative error on a case, or why it has none."""

    name: str
    us: float | None = None
    rel_err: float | None = None
    reason: str = ""

    def line(self) -> str:
        """For people, under the case's own."""
        if self.us is None:
            return f"    {self.name:36s} {self.reason}"
        return f"    {self.name:36s} {'':9s} {self.us:10.1f} us  error {self.rel_err:.1e}"


def run_all(case: Case, args: tuple, repeat: int) -> Iterator[Side]:
    """Every peer in turn; a foreign failure is a reason and does not end the run."""
    for name, peer in PEERS.items():
        try:
            call, to_numpy = peer(case, args)
            error = relative_error(case, args, to_numpy(call()))
            yield Side(name, timing.measure_call(call, repeat).us, error)
        except ImportError as missing:
            yield Side(name, reason=f"not here: {missing}")
        except Exception as failure:
            yield Side(name, reason=f"{type(failure).__name__}: {str(failure).strip().splitlines()[:1]}")


def _ready(fn: Callable, *args) -> tuple[Callable[[], jax.Array], Callable]:
    """A call of a jitted function that waits, and how its output becomes numpy."""
    compiled = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args)), functools.partial(np.asarray, dtype=np.float32)


def _wide_query(q: Any) -> jax.Array:
    return pa.dequantize(q, jnp.bfloat16) if isinstance(q, pa.Quantized) else q


def gathered(case: Case, args: tuple) -> tuple[Callable, Callable]:
    """All pages gathered into bf16 by XLA, then `jax.nn.dot_product_attention`: what one writes without a kernel."""
    q, cache, batch = args
    cudnn = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def attend(q, cache, batch):
        wide = [x.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16) for x, scale in
                zip(cache.read(batch.page_table), cache.scales, strict=True)]  # fmt: skip
        k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in wide)
        lens = {"query_seq_lengths": jnp.ones_like(batch.kv_lens), "key_value_seq_lengths": batch.kv_lens}
        return jax.nn.dot_product_attention(q[:, None], k, v, implementation=cudnn, **lens)[:, 0]

    return _ready(attend, _wide_query(q), cache, batch)


def jax_pallas(case: Case, args: tuple) -> tuple[Callable, Callable]:
    """The paged attention that comes with JAX (Pallas through Triton, deprecated there)."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    q, cache, batch = args
    axes = (2, 0, 1, 3) if case.layout == pa.NHD else (1, 0, 2, 3)
    k, v = (jnp.transpose(x, axes) for x in cache.buffers)  # [K, N, S, D]
    scales = [jnp.full(k.shape[:3], s, jnp.float32) for s in (K_SCALE, V_SCALE)]
    width = batch.page_table.shape[1]
    splits = next(n for n in (16, 8, 4, 2, 1) if width % n == 0)
    block = next(n for n in (8, 4, 2, 1) if width // splits % n == 0)
    on_gpu = jax.default_backend() == "gpu"

    def attend(q, k, v, table, lens, *scales):
        q = (q * case.head_dim**-0.5).astype(jnp.bfloat16)  # it has no scale of its own
        sizes = {"k_splits": splits, "pages_per_compute_block": block, "interpret": not on_gpu}
        return paged_attention(q, k, v, table, lens, *scales, **sizes)

    return _ready(attend, _wide_query(q), k, v, batch.page_table, batch.kv_lens, *scales)


def _torch_arrays(args: tuple) -> tuple[Any, ...]:
    """(torch, query, keys, values, table, lengths) on the GPU without a copy; FP8 travels as bytes."""
    import torch  # pyright: ignore[reportMissingImports]

    q, cache, batch = args

    def give(x):
        if x.dtype == jnp.float8_e4m3fn:
            return torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(torch.float8_e4m3fn)
        return torch.from_dlpack(x)

    query = q.values if isinstance(q, pa.Quantized) else q
    return (torch, *map(give, (query, *cache.buffers, batch.page_table, batch.kv_lens)))


def _waiting(torch, run: Callable[[], Any]) -> tuple[Callable, Callable]:
    def call():
        out = run()
        torch.cuda.synchronize()
        return out

    return call, lambda out: out.float().cpu().numpy()


def flashinfer_decode(case: Case, args: tuple) -> tuple[Callable, Callable]:
    """FlashInfer's batch decode on tensor cores."""
    import flashinfer  # pyright: ignore[reportMissingImports]

    if case.fp8_query:
        raise NotImplementedError("this wrapper is run with a bf16 query only")
    torch, q, k, v, table, lens = _torch_arrays(args)
    pages = -(-lens // case.page_size)
    indices = torch.cat([row[:n] for row, n in zip(table, pages.tolist(), strict=True)])
    indptr = torch.cat([pages.new_zeros(1), torch.cumsum(pages, 0, dtype=torch.int32)])
    last = lens - (pages - 1) * case.page_size
    space = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, case.layout.name, use_tensor_cores=True)
    heads = case.q_heads, case.kv_heads, case.head_dim, case.page_size
    wrapper.plan(indptr, indices, last, *heads, q_data_type=q.dtype, kv_data_type=k.dtype)
    return _waiting(torch, lambda: wrapper.run(q, (k, v), k_scale=K_SCALE, v_scale=V_SCALE))


def vllm_fa3(case: Case, args: tuple) -> tuple[Callable, Callable]:
    """vLLM's FlashAttention 3, which reads FP8 pages with an FP8 query."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    if not case.fp8_query or case.layout != pa.NHD:
        raise NotImplementedError("it takes FP8 pages in NHD with an FP8 query only")
    torch, q, k, v, table, lens = _torch_arrays(args)
    starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=q.device)
    factor = lambda x: torch.full((len(lens), case.kv_heads), x, device=q.device)  # noqa: E731
    scales = {"q_descale": factor(Q_SCALE), "k_descale": factor(K_SCALE), "v_descale": factor(V_SCALE)}
    where = {"cu_seqlens_q": starts, "seqused_k": lens, "block_table": table, "max_seqlen_q": 1}
    where |= {"max_seqlen_k": int(lens.max()), "softmax_scale": case.head_dim**-0.5, "causal": True}
    return _waiting(torch, lambda: flash_attn_varlen_func(q, k, v, **where, **scales, fa_version=3))


PEERS = {
    "flashinfer decode": flashinfer_decode,
    "vllm FlashAttention 3": vllm_fa3,
    "jax pallas paged_attention": jax_pallas,
    "XLA gather + dot_product_attention": gathered,
}
