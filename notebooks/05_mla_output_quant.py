# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quantised outputs: the fusion pass, and what each format costs
#
# The projection after attention is an FP8 GEMM in many models, so somebody has to quantise attention's result. Written
# as two steps, the result goes through memory in bf16 for no other purpose, and is rounded twice. Here are the two
# steps as one op, how `pa.fuse` finds them in a function that was written without thinking of it, and what the formats
# do to the numbers.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

import pallas_attn as pa
from pallas_attn import fusion

SEQS, LENGTH, PAGE, KV_HEADS, HEADS, DIM = 8, 128, 16, 4, 8, 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


pages = SEQS * LENGTH // PAGE
cache = pa.PagedKVCache.allocate(pages, PAGE, KV_HEADS, DIM, format=pa.BF16)
slots = jnp.arange(SEQS * LENGTH)
# Heads of very different size: some write much, some next to nothing.
sizes = jnp.array([1, 1e-2, 1e-4, 3e-5], jnp.bfloat16)[:, None]
keys, values = normal(0, SEQS * LENGTH, KV_HEADS, DIM), normal(1, SEQS * LENGTH, KV_HEADS, DIM) * sizes
cache = pa.write_kv(cache, keys, values, slots)
table = jnp.arange(pages, dtype=jnp.int32).reshape(SEQS, -1)
batch = pa.RaggedBatch(table, jnp.arange(1, SEQS + 1) * LENGTH // SEQS, jnp.arange(SEQS + 1))
q = normal(3, SEQS, HEADS, DIM)

# %% [markdown]
# ## A layer, as one writes it
# Attention, its heads in a row, quantised in groups of 128 with power-of-two scales as DeepGEMM reads them: four
# exponents to an int32, in columns, rows filled up to a multiple of four.

# %%
GEMM = pa.e4m3_group(128, ue8m0=True, order="tma", packed=True)


@jax.jit
def layer(q, cache, batch):
    out = pa.paged_attention(q, cache, batch)
    return pa.quantize(out.reshape(out.shape[0], -1), GEMM)


x = layer(q, cache, batch)
print("values", x.values.shape, x.values.dtype, "scale", x.scale.shape, x.scale.dtype, "format", x.format)

# %% [markdown]
# ## Its jaxpr, before and after
# Every op of the library is one primitive, whatever happens inside, so the pattern is a walk along variables:
# `paged_attention`, `reshape`, `quantize`, and nothing else reads what is between them.


# %%
def outline(fn, *args):
    """The equations that matter, one a line: what an op is called with and what it makes."""

    def walk(jaxpr, indent):
        for eqn in jaxpr.eqns:
            call = fusion.chain.call_of(eqn)
            made = ", ".join(f"{v.aval.dtype}{list(v.aval.shape)}" for v in eqn.outvars)
            print(" " * indent + f"{call.op if call else eqn.primitive.name} -> {made}")
            for _, body in () if call else fusion.chain.bodies(eqn):
                walk(body.jaxpr, indent + 4)

    walk(jax.make_jaxpr(fn)(*args).jaxpr, 0)


print("before")
outline(layer, q, cache, batch)
print("\nafter")
outline(pa.fuse(layer), q, cache, batch)

# %% [markdown]
# The same bits? Not here: attention alone rounds to bf16, and quantisation then rounds that. The op rounds once, from
# float32. Where the layer's attention returns float32, nothing is rounded twice, and the bits are equal.


# %%
def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def in_float32(q, cache, batch):
    out = pa.paged_attention(q, cache, batch, out=jnp.float32)
    return pa.quantize(out.reshape(out.shape[0], -1), GEMM)


exact = pa.paged_attention(q, cache, batch, out=jnp.float32).reshape(SEQS, -1)
for name, fn in (("bf16 in between", layer), ("float32 in between", in_float32)):
    written, fused = fn(q, cache, batch), jax.jit(pa.fuse(fn))(q, cache, batch)
    same = float(jnp.mean(written.values.astype(jnp.float32) == fused.values.astype(jnp.float32)))
    errors = [distance(pa.dequantize(y), exact) for y in (written, fused)]
    print(f"{name:20}: {same:8.4%} of the codes equal; error {errors[0]:.6f} as written, {errors[1]:.6f} fused")

# %% [markdown]
# ## What is found, and what is not
# `pa.fusion.report` says it without running anything. A near miss is a quantisation of attention's result that stays,
# with the reason.


# %%
def model(q, cache, batch):
    def step(q, _):
        return q, layer(q, cache, batch)

    _, layers = jax.lax.scan(step, q, None, length=2)  # found in the scan, in the jit
    out, lse = pa.paged_attention(q, cache, batch, return_lse=True)
    by_hand = jnp.clip(out / 0.01, -448, 448).astype(jnp.float8_e4m3fn)
    twice = pa.quantize(out * 2, pa.E4M3_STATIC, 0.02)
    return layers, by_hand, twice, lse


print(fusion.report(model, q, cache, batch))

# %% [markdown]
# ## MLA
# Multi-head latent attention attends to latents and projects each head up afterwards; what is quantised is the
# projection. The pass takes the product along, in whatever order einsum wrote it: the up-projected result never exists
# in bf16.

# %%
LATENT, ROPE = 128, 64
latents = pa.LatentCache.allocate(pages, PAGE, LATENT, ROPE, format=pa.BF16)
latents = pa.write_latent(latents, normal(4, SEQS * LENGTH, LATENT), normal(5, SEQS * LENGTH, ROPE), slots)
q_latent, q_rope = normal(6, SEQS, HEADS, LATENT), normal(7, SEQS, HEADS, ROPE)
w_uv = normal(8, HEADS, LATENT, DIM) / LATENT**0.5


@jax.jit
def mla_layer(q_latent, q_rope, latents, batch, w_uv):
    out = pa.mla_attention(q_latent, q_rope, latents, batch, scale=(LATENT + ROPE) ** -0.5)
    out = jnp.einsum("thc,hcv->thv", out, w_uv)
    return pa.quantize(out.reshape(out.shape[0], -1), GEMM)


mla = q_latent, q_rope, latents, batch, w_uv
print(fusion.report(mla_layer, *mla), "\n\nbefore")
outline(mla_layer, *mla)
print("\nafter")
outline(pa.fuse(mla_layer), *mla)
number = pa.mla_attention(*mla[:4], scale=(LATENT + ROPE) ** -0.5, w_uv=w_uv, out=jnp.float32)
for name, fn in (("as written", mla_layer), ("fused", jax.jit(pa.fuse(mla_layer)))):
    print(f"error {name}: {distance(pa.dequantize(fn(*mla)), number):.6f}")

# %% [markdown]
# A fused call is one op with `out=` (and `w_uv=`), which can be written by hand as well.
#
# ## The formats
# What leaves the op: FP8 is half of bf16, NVFP4 a quarter, scales included a little more. `pa.quantize` of the float32
# result has the bits of `out=`, as the first line checks.

# %%
OUTPUTS = {
    "FP8, one known scale": (pa.E4M3_STATIC, jnp.max(jnp.abs(exact)) / 448),
    "FP8, a scale half as large": (pa.E4M3_STATIC, jnp.max(jnp.abs(exact)) / 896),
    "FP8 in groups of 128": (pa.e4m3_group(128), None),
    "FP8 in groups of 64": (pa.e4m3_group(64), None),
    "FP8 in groups of 128, ue8m0": (pa.e4m3_group(128, ue8m0=True), None),
    "FP8 in groups of 128, packed": (GEMM, None),
    "NVFP4": (pa.NVFP4, jnp.max(jnp.abs(exact)) / (6 * 448)),
}
by_op = pa.paged_attention(q, cache, batch, out=OUTPUTS["NVFP4"])
print("bits of the op:", bool(jnp.array_equal(by_op.values, pa.quantize(exact, *OUTPUTS["NVFP4"]).values)))
bf16 = exact.astype(jnp.bfloat16)
results = {"bf16": (bf16, bf16.astype(jnp.float32))}
for name, (format, scale) in OUTPUTS.items():
    y = pa.quantize(exact, format, scale)
    results[name] = y, pa.dequantize(y)
top, rows, errors = jnp.max(jnp.abs(exact)), [], {}
for name, (y, numbers) in results.items():
    away = jnp.abs(numbers - exact)
    errors[name] = np.asarray(away / jnp.maximum(jnp.abs(exact), 1e-9))
    size = sum(a.nbytes for a in jax.tree.leaves(y)) / exact.size
    rows.append((name, size, distance(numbers, exact), float(jnp.max(away) / top)))
print(tabulate(rows, headers=["output", "bytes a number", "relative error", "largest / top"], floatfmt=".4f"))

# %% [markdown]
# The norm of the error is made by large numbers, and there FP8 formats are alike: three bits of mantissa, and a power
# of two as scale wastes up to one bit of range. A scale that is too small cuts off what is large, which is worse than
# anything else here. Small numbers tell the formats apart: one scale for the tensor leaves hardly a code for the heads
# that are 30000 times smaller than the first, a group has its own. FP4 has one bit of mantissa everywhere. The curves
# are the shares of numbers whose own relative error is above x.

# %%
figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
grid = np.geomspace(1e-3, 2, 120)
for name, error in errors.items():
    axis.plot(grid, [np.mean(error > x) for x in grid], label=name, linestyle="--" if "packed" in name else "-")
axis.set(xscale="log", xlabel="relative error of a number", ylabel="share above", ylim=(0, 1))
axis.legend(fontsize=7)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Derivatives
# A quantised result carries no gradient worth having. So a fused function, when it is differentiated, is the function
# as it was written: its gradients are the same, and training goes through `pa.fake_quantize`.


# %%
def loss(q):
    out = pa.quantize(pa.paged_attention(q, cache, batch), pa.E4M3_STATIC, 0.01)
    return jnp.sum(pa.dequantize(out) ** 2)


assert fusion.report(loss, q).hits
same = jnp.array_equal(jax.grad(loss)(q), jax.grad(pa.fuse(loss))(q))
print("gradients equal:", bool(same))
