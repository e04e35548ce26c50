"""MLA on Hopper, in two launches: workers that read the cache (`mosaic_worker`), and `mosaic_merge`; `mosaic_up` is a
third where results are up-projected."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import BF16, E4M3, F16, FP8_DS_MLA
from pallas_attn.core.quantized import Quantized
from pallas_attn.ops.mla import (
    mosaic_float,
    mosaic_fp8,
    mosaic_pieces,
    mosaic_sparse,
    mosaic_sparse_float,
    mosaic_sparse_rows,
    mosaic_up,
)
from pallas_attn.ops.mla.mosaic_finish import as_results, grouped, result_arrays
from pallas_attn.ops.mla.mosaic_form import LATENT, MOST_SEQS, ROPE, Form, Inputs, form_of, in_pieces
from pallas_attn.ops.mla.mosaic_merge import merge
from pallas_attn.ops.mla.problem import Args, Problem
from pallas_attn.runtime.mosaic import ROWS

INTERPRET: Any = None  # a test sets plgpu.InterpretGPUParams() to run the kernels on a CPU
STORED = (jnp.bfloat16, jnp.float16, E4M3)


def supports(p: Problem) -> str | None:
    """None, or what of the problem these kernels cannot do."""
    out, rows = p.out_format, p.kv_format == FP8_DS_MLA
    refusals = {
        "an empty call": p.empty,
        f"no latent of {p.latent_dim} with a rotary part of {p.rope_dim}": (p.latent_dim, p.rope_dim) != (LATENT, ROPE),
        f"no {p.kv_format} cache with a list of keys": bool(p.topk) and p.kv_format.granularity == "tensor",
        f"no {p.kv_format} cache without a list of keys": not p.topk and rows,
        f"no {p.kv_format} cache": p.kv_format.dtype not in STORED,
        f"no {p.q_format} query on a {p.kv_format} cache": p.q_format not in (BF16, F16)
        if rows
        else p.q_format.dtype != p.kv_format.dtype,
        f"no page size {p.page_size}": not rows and p.page_size not in (16, 32, 64, 128, 256),
        f"no {p.heads} heads": p.heads > 128,
        f"no {p.out_dtype} output": p.out_dtype.itemsize > 4,
        f"no {out} output": out is not None and out.two_level,
        f"no more than {MOST_SEQS} sequences": not p.topk and p.seqs > MOST_SEQS,
        f"no more than {MOST_SEQS} tokens with a list of keys": bool(p.topk) and p.tokens > MOST_SEQS,
    } | mosaic_up.refuses(p)
    return next((reason for reason, refused in refusals.items() if refused), None)


def run(p: Problem, *arrays, workers: int | None = None):
    """(out, the scales that are found, lse [T, H] if asked)."""
    args = Args(*arrays)
    if p.v_dim is None:
        return _run(p, args, workers)
    latents, *lse = _run(mosaic_up.attended(p), args._replace(out_scale=None), workers)
    return (*mosaic_up.project(p, latents, args.w_uv, _one(args.out_scale), INTERPRET), *lse)


def _run(p: Problem, args: Args, workers: int | None) -> tuple[jax.Array, ...]:
    """The results before any up-projection."""
    form = form_of(p, workers)
    x = _inputs(p, form, args)
    *results, partial, stats = attend(p, form, x)
    results = merge(p, form, x, results, partial, stats, INTERPRET, args.w_uv)
    out = as_results(p, form, results[: 1 + grouped(p)])
    return (*out, results[-1].reshape(p.tokens, form.heads)[:, : p.heads]) if p.return_lse else out


def _one(x) -> jax.Array:
    return jnp.ones(1) if x is None else jnp.reshape(x, (1,)).astype(jnp.float32)


def _inputs(p: Problem, form: Form, args: Args) -> Inputs:
    parts = [_rows(p, form, q.values if isinstance(q, Quantized) else q) for q in (args.q_latent, args.q_rope)]
    scales = tuple(_row_scales(p, form, q) for q in (args.q_latent, args.q_rope))
    where = _listed(p, args) if p.topk else _pages(p, form, args)
    return Inputs(
        parts[0], parts[1], **where, scale=_one(args.scale), cache_scale=_one(args.cache.scale), q_scales=scales,
        out_scale=_one(args.out_scale),
    )  # fmt: skip


def _kind(p: Problem) -> Any:
    """The module of the kernel for this cache."""
    if p.topk:
        return mosaic_sparse_rows if p.kv_format == FP8_DS_MLA else mosaic_sparse_float
    return mosaic_float if p.kv_format.dtype.itemsize > 1 else mosaic_fp8


def _listed(p: Problem, args: Args) -> dict[str, Any]:
    """The cache's rows, and which of them each token has."""
    return mosaic_sparse.keys(p, args, _kind(p).rows(p, args.cache.pages, INTERPRET))


def _pages(p: Problem, form: Form, args: Args) -> dict[str, Any]:
    """The cache, and which tiles of it each sequence has, or each piece."""
    batch, i32 = args.batch, lambda x: jnp.asarray(x, jnp.int32)
    where = {"pages": args.cache.pages, "page_table": i32(batch.page_table)}
    if in_pieces(p):
        return where | mosaic_pieces.cut(p, form, batch)
    plan = batch.schedule
    return where | {
        "owners": None, "kv_lens": i32(batch.kv_lens), "cu_q_lens": i32(batch.cu_q_lens),
        "live": jnp.reshape(i32(p.seqs if batch.num_seqs is None else batch.num_seqs), (1,)),
        "before": plan.before if plan is not None and plan.window is None else batch.tiles_before(),
    }  # fmt: skip


def _rows(p: Problem, form: Form, x: jax.Array) -> jax.Array:
    """[T, H, n] as [T * heads, n]."""
    if form.heads != p.heads:
        x = jnp.pad(x, ((0, 0), (0, form.heads - p.heads), (0, 0)))
    return x.reshape(-1, x.shape[-1])


def _row_scales(p: Problem, form: Form, q) -> jax.Array:
    """[1], or one for each row [T * heads + 64]: a block may go on past the last."""
    if not isinstance(q, Quantized):
        return jnp.ones(1)
    if q.scale.ndim == 0:
        return jnp.reshape(q.scale, (1,))
    scale = jnp.pad(jnp.broadcast_to(q.scale, (p.tokens, p.heads)), ((0, 0), (0, form.heads - p.heads)))
    return jnp.pad(scale.reshape(-1), (0, ROWS))


def attend(p: Problem, form: Form, x: Inputs) -> list[jax.Array]:
    """The first launch: results of the sequences that one worker reads, partial ones [2 W, columns, 64, C] of the
    others, and the logarithms of all rows' sums [W + B, columns, 64]."""
    leaves, tree = jax.tree.flatten(x)
    partial = (2 * form.workers, form.columns, ROWS, LATENT)
    stats = (form.workers + form.seqs, form.columns, ROWS)
    out = [*result_arrays(p, form), *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (partial, stats))]
    kind = _kind(p)

    def body(*refs, **scratch):
        ins, results = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        values, *scales, partial, stats = results
        if INTERPRET is None:
            plgpu.griddepcontrol_wait()
        kind.Worker(p, form, ins, values, scales[0] if scales else None, partial, stats, INTERPRET, **scratch).run()
        if INTERPRET is None:  # the merge may start: it waits for what is still on its way
            plgpu.griddepcontrol_launch_dependents()
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body, out_type=tuple(out), grid=(form.workers, form.columns), grid_names=("worker", "column"),
        scratch_types=kind.scratch(p, form, INTERPRET), num_threads=3, thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=INTERPRET,
    )  # fmt: skip
    return list(kernel(*leaves))
