"""A decode step of the attention of DeepSeek-V3.2 between its projections, jitted once, its time part by part.

A token of every sequence is absorbed (q_nope @ w_uk), turned (RoPE), written into both caches, and indexed: queries
turned and quantised in one step, logits over all cached keys, the top-k. It attends to what was found, and the result
is up-projected and quantised in groups. What is left out are the projections of hidden states before it and of the
result behind it.

A named backend runs the ops that have it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import indexing, mla, timing
from bench.indexing import IndexingCase
from bench.mla import LATENT, PAGE, ROPE, MlaCase
from bench.shape import Shape
from pallas_attn.core.arch import H100
from pallas_attn.ops.sparse_indexer.turns import angles, rotate

CARRY = True
DIM = 128  # of keys without their rotary part, of values, and of the indexer
OUT = pa.e4m3_group(128)
PARTS = (
    "rope", "absorb", "write latent", "write index", "index query", "index logits", "top-k", "attention",
    "up-projection",
)  # fmt: skip
HELPER = 3.0  # microseconds that no kernel of XLA's should take


@dataclasses.dataclass(frozen=True)
class MlaLayerCase(Shape):
    """One query token for each of so many sequences of one length."""

    name: str
    seqs: int
    context: int
    heads: int = 128
    topk: int = 2048
    index_heads: int = 64
    op: str = "mla_layer"
    layout: pa.Layout = pa.NHD

    @property
    def indexer(self) -> IndexingCase:
        """The indexer's share."""
        return IndexingCase(
            self.name, "indexer", self.seqs, (self.context,) * self.seqs, k=self.topk, heads=self.index_heads
        )

    @property
    def attention(self) -> MlaCase:
        """The attention's share."""
        return MlaCase(self.name, "mla_sparse", self.seqs, self.context, self.heads, "rows", self.topk)

    @property
    def _weights(self) -> int:
        return self.heads * LATENT * DIM  # of either projection

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: those of the shares, the weights of both projections, the quantised result."""
        result = self.seqs * self.heads * (DIM + 4)
        return self.indexer.bytes + self.attention.bytes + 2 * 2 * self._weights + result

    @property
    def flops(self) -> int:
        """Multiply-adds of all products, times two."""
        return self.indexer.flops + self.attention.flops + 2 * 2 * self.seqs * self._weights

    @property
    def floor_us(self) -> float:
        """The sum of what no kernels on an H100 can beat: each needs what the one before makes."""
        project = max(2 * self._weights / H100.memory, 2 * self.seqs * self._weights / H100.bf16)
        return self.indexer.floor_us + self.attention.floor_us + 2e6 * project

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU."""
        small = {"seqs": min(self.seqs, 2), "context": min(self.context, 200), "heads": 8, "topk": 96, "index_heads": 8}
        return dataclasses.replace(self, name=f"{self.name}_small", **small)


@functools.cache
def all_cases() -> dict[str, MlaLayerCase]:
    """Every case by name."""
    sizes = ((32, 32768), (128, 4096), (1, 32768))
    return {c.name: c for c in (MlaLayerCase(f"mla_layer_b{b}_c{n}", b, n) for b, n in sizes)}


class Inputs(NamedTuple):
    """What the layer gets of the step's T tokens, and its weights."""

    q: jax.Array  # [T, H, 128 + 64], the rotary part last
    latent: jax.Array  # [T, 512]
    k_rope: jax.Array  # [T, 64]
    index_q: jax.Array  # [T, heads, 128], the rotary part first
    index_k: jax.Array  # [T, 128]
    index_weights: jax.Array  # [T, heads]
    w_uk: jax.Array  # [H, 128, 512]
    w_uv: jax.Array  # [H, 512, 128]


def arguments(case: MlaLayerCase, seed: int = 0) -> tuple[Any, ...]:
    """Random ((latents, index keys), inputs, batch)."""
    _, _, latents, batch, _ = mla.arguments(case.attention, seed)
    index_q, _, _, index_weights, keys, _ = indexing.arguments(case.indexer, seed)
    random = iter(jax.random.split(jax.random.key(seed + 1), 6))
    normal = lambda *shape, scale=1.0: jax.random.normal(next(random), shape, jnp.bfloat16) * scale  # noqa: E731
    x = Inputs(
        normal(case.seqs, case.heads, DIM + ROPE), normal(case.seqs, LATENT), normal(case.seqs, ROPE),
        index_q, normal(case.seqs, DIM), index_weights,
        normal(case.heads, DIM, LATENT, scale=DIM**-0.5), normal(case.heads, LATENT, DIM, scale=LATENT**-0.5),
    )  # fmt: skip
    return (latents, keys), x, batch


def operation(case: MlaLayerCase, backend: str | None) -> Callable[..., tuple]:
    """The timed function: ((latents, index keys), result)."""
    frequencies = 10_000.0 ** (-np.arange(0, ROPE, 2, dtype=np.float32) / ROPE)
    width = -(-case.context // PAGE) * PAGE

    def step(caches: tuple[pa.LatentCache, pa.IndexCache], x: Inputs, batch: pa.RaggedBatch):
        latents, keys = caches
        at = batch.kv_lens - 1
        with jax.named_scope("rope"):
            cos_sin = angles(at, jnp.asarray(frequencies))
            q_rope, k_rope = (rotate(part, *cos_sin, True) for part in (x.q[..., DIM:], x.k_rope))
            index_k = rotate(x.index_k, *cos_sin, False)
            slots = batch.slot_mapping(case.seqs, PAGE)
        with jax.named_scope("absorb"):
            q_latent = jnp.einsum("thn,hnc->thc", x.q[..., :DIM], x.w_uk)
        with jax.named_scope("write latent"):
            latents = pa.write_latent(latents, x.latent, k_rope, slots)
        with jax.named_scope("write index"):
            keys = pa.write_index(keys, index_k, slots)
        with jax.named_scope("index query"):
            index_q = pa.rope_quantize(x.index_q, *cos_sin)
        with jax.named_scope("index logits"):
            logits = pa.paged_indexer_logits(index_q, x.index_weights, keys, batch, max_len=width)
        with jax.named_scope("top-k"):
            found = pa.indexer_topk(logits, case.topk, ends=batch.kv_lens)
        with jax.named_scope("attention"):
            out: Any = pa.mla_attention(
                q_latent, q_rope, latents, batch, scale=mla.SCALE, topk=found, w_uv=x.w_uv, out=OUT
            )
        return (latents, keys), (out.values, out.scale)

    return step if backend is None else pa.use_backend(backend)(step)


def calls(case: MlaLayerCase, args: tuple) -> list[tuple[Callable, tuple]]:
    """The op that most of the step is, with arguments of its shapes."""
    (latents, _), x, batch = args
    q = x.q[..., :1].repeat(LATENT, -1), x.q[..., DIM:]
    found = jnp.zeros((case.seqs, case.topk), jnp.int32)
    call = functools.partial(pa.mla_attention, scale=mla.SCALE, topk=found, w_uv=x.w_uv, out=OUT)
    return [(call, (*q, latents, batch))]


def check(case: MlaLayerCase, args: tuple, backend: str | None, most: int = 2) -> tuple[float, tuple]:
    """(relative L2 distance of a few tokens' results to the portable backend's, both in FP8, the arguments to go on
    with)."""
    got = jax.jit(operation(case, backend))(*args)[1]
    picks = np.unique(np.linspace(0, case.seqs - 1, most).astype(int))
    caches, x, batch = args
    few = dataclasses.replace(case, seqs=len(picks))
    some = Inputs(*(a[picks] for a in x[:6]), *x[6:])
    starts = jnp.arange(len(picks) + 1, dtype=jnp.int32)
    those = pa.RaggedBatch(batch.page_table[picks], batch.kv_lens[picks], starts, max_q_len=1)
    want = jax.jit(operation(few, "xla"))(caches, some, those)[1]
    made, true = (np.asarray(pa.dequantize(pa.Quantized(y[0], y[1], OUT)), np.float64) for y in (got, want))
    return float(np.linalg.norm(made[picks] - true) / np.linalg.norm(true)), args


class Part(NamedTuple):
    """A part of the step: its microseconds, and those of its kernels by name."""

    name: str
    us: float
    kernels: dict[str, float]

    def line(self) -> str:
        """For people, under the case's own."""
        each = ", ".join(f"{name[:40]} {us:.1f}" for name, us in self.kernels.items())
        return f"    {self.name:36s} {'':9s} {self.us:10.1f} us  {each}"


def beside(case: MlaLayerCase, backend: str | None, repeat: int) -> Iterator[Part]:
    """The parts, then the helpers: kernels of XLA's that take longer than they should. None without a GPU."""
    if jax.default_backend() != "gpu":
        return
    args = arguments(case)
    # Without CUDA graphs, whose kernels do not say which instruction they are of.
    step = jax.jit(operation(case, backend), donate_argnums=0).lower(*args)
    program = step.compile(compiler_options={"xla_gpu_graph_min_graph_size": 1_000_000})
    caches = [args[0]]

    def call() -> None:
        caches[0] = jax.block_until_ready(program(caches[0], *args[1:]))[0]

    call()
    timeline = timing.trace(call, repeat)
    scopes = scopes_of(program.as_text() or "")
    yield from parts(timeline, scopes)
    yield Part("helpers", *helpers(timeline))


def scopes_of(program: str) -> dict[str, str]:
    """The part of each instruction of a compiled program: the innermost scope that is one's name."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    found = {}
    for name, path in pattern.findall(program):
        inside = [scope for scope in path.split("/") if scope in PARTS]
        if inside:
            found[name] = inside[-1]
    return found


def parts(timeline: list[list[timing.Kernel]], scopes: dict[str, str]) -> list[Part]:
    """Medians over the calls of each part's kernels, in the order in which they first run; what is of no part last."""
    where: dict[str, dict[str, list[float]]] = {}
    for number, call in enumerate(timeline):
        for kernel in call:
            part = scopes.get(kernel.op, "no part")
            times = where.setdefault(part, {}).setdefault(kernel.name, [0.0] * len(timeline))
            times[number] += (kernel.end - kernel.start) / 1e3
    return [
        Part(part, float(np.median(np.sum(list(each.values()), axis=0))), _medians(each))
        for part, each in sorted(where.items(), key=lambda item: item[0] == "no part")
    ]


def helpers(timeline: list[list[timing.Kernel]]) -> tuple[float, dict[str, float]]:
    """(microseconds of all kernels that are none of ours, those by name that take more than HELPER each time)."""
    times: dict[str, list[float]] = {}
    for kernel in (k for call in timeline for k in call if not k.mosaic):
        times.setdefault(kernel.name, []).append((kernel.end - kernel.start) / 1e3)
    long = {name: us for name, us in _medians(times).items() if us > HELPER}
    return sum(sum(each) for each in times.values()) / len(timeline), long


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.median(each)) for name, each in times.items()}
