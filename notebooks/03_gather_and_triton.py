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
# # Gather and Triton
#
# Three things that a serving stack asks of a paged cache besides attention itself: a long context attended to chunk by
# chunk, its numbers given back without a second rounding, and a kernel of one's own over its pages.

# %%
import dataclasses
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import pallas_attn as pa

PAGE, KV_HEADS, HEADS, DIM = 16, 2, 8, 64
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


# %% [markdown]
# ## A context in chunks
# Three prompts, of which the last 48, 16 and 8 tokens are new; before them 384, 250 and 0 tokens are cached, in FP8
# with a scale for each head. In one call that is `paged_attention`. Where the context is long and the fastest prefill
# kernel wants plain contiguous keys and values, it goes in pieces: gather a chunk, attend to it without a causal mask
# (all of it lies before the new tokens), and at last put the parts together by their log-sum-exp.

# %%
new, context = np.array([48, 16, 8]), np.array([384, 250, 0])
total = new + context
owned = -(-total // PAGE)
table = np.zeros((3, owned.max()), np.int32)
for b, pages in enumerate(np.split(rng.permutation(owned.sum()), np.cumsum(owned)[:-1])):
    table[b, : len(pages)] = pages

scales = {"k_scale": jnp.array([0.021, 0.013]), "v_scale": jnp.array([0.004, 0.009])}
cache = pa.PagedKVCache.allocate(int(owned.sum()), PAGE, KV_HEADS, DIM, format=pa.E4M3_HEAD, **scales)
filled = pa.RaggedBatch(jnp.array(table), jnp.array(total), jnp.array([0, *np.cumsum(total)]))
keys, values = (normal(int(total.sum()), KV_HEADS, DIM) for _ in range(2))
cache = pa.write_kv(cache, keys, values, filled.slot_mapping(len(keys), PAGE))
batch = dataclasses.replace(filled, cu_q_lens=jnp.array([0, *np.cumsum(new)]))
q, sinks = normal(int(new.sum()), HEADS, DIM), jnp.asarray(rng.standard_normal(HEADS) + 2, jnp.float32)


# %%
def attend(q, got, **options):
    """Attention to gathered tokens: as pages of one token, which every sequence has in a row."""
    rows, lens = got.k.shape[0], got.cu_lens[1:] - got.cu_lens[:-1]
    pages = jnp.minimum(got.cu_lens[:-1, None] + jnp.arange(rows), rows - 1)
    view = pa.RaggedBatch(pages, lens, batch.cu_q_lens)
    plain = pa.PagedKVCache(got.k[:, None], got.v[:, None])
    return pa.paged_attention(q, plain, view, out=jnp.float32, return_lse=True, **options)


def in_chunks(q, cache, batch, chunk, gather=pa.gather_kv, sinks_in_every_part=False):
    """(out, lse): parts of `chunk` tokens of each sequence's context, then the new tokens."""
    before, parts = batch.kv_lens - jnp.diff(batch.cu_q_lens), []
    none = sinks if sinks_in_every_part else jnp.full_like(sinks, -jnp.inf)  # weights exp(-inf)
    for first in range(0, int(context.max()), chunk):
        ends = dataclasses.replace(batch, kv_lens=jnp.minimum(before, first + chunk))
        got = gather(cache, ends, max_tokens=3 * chunk, starts=jnp.full_like(before, first))
        parts.append(attend(q, got, mask=pa.Mask(causal=False), sinks=none))
    own = gather(cache, batch, max_tokens=q.shape[0], starts=before)
    parts.append(attend(q, own, mask=pa.Mask(), sinks=sinks))
    return pa.merge_attention(*zip(*parts, strict=True))


def error(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


# %% [markdown]
# What a chunk costs is a buffer of `max_tokens` rows, whatever the context. The result is that of one call but for the
# rounding to bf16 of what is gathered. Sequences that have no token left in a chunk, the third one here in all of them,
# get a part of LSE $-\infty$, which the merge passes over.
#
# A sink is a term of the softmax's denominator and stands for no key, so exactly one part may have it. One serving
# stack hands it to all of them: the more chunks, the more its weight counts.

# %%
want, want_lse = pa.paged_attention(q, cache, batch, sinks=sinks, out=jnp.float32, return_lse=True)
print("chunk   parts   gathered at once   error   with sinks in every part")
for chunk in (192, 64):
    out, lse = in_chunks(q, cache, batch, chunk)
    many, _ = in_chunks(q, cache, batch, chunk, sinks_in_every_part=True)
    kib = 3 * chunk * KV_HEADS * DIM * 2 * 2 / 1024
    print(f"{chunk:5} {384 // chunk + 1:7} {kib:14.0f} KiB {error(out, want):9.4f} {error(many, want):17.4f}")
    assert error(out, want) < 3e-3 < 0.01 < error(many, want)
    np.testing.assert_allclose(lse, want_lse, atol=0.02)

# %% [markdown]
# ## The double rounding
# A gather multiplies the stored value by its scale in float32 and rounds once, to bf16. A known bug of the field goes
# back to FP8 on the way: the product is cast to the cache's own type, then widened. With a scale that is a power of two
# nothing happens, since the product is an FP8 number again while it stays in range. So tests with unit scales pass.

# %%
codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
codes = codes[np.isfinite(codes.astype(np.float32)) & (codes.astype(np.float32) > 0)]


def one_token(scale):
    """A cache that holds every positive code of e4m3 as one key, and the same as one value."""
    stored = pa.Quantized(jnp.asarray(codes)[None, None, None], jnp.float32(scale), pa.E4M3_TENSOR)
    return pa.PagedKVCache(stored, stored), pa.RaggedBatch(jnp.array([[0]]), jnp.array([1]), jnp.array([0, 1]))


def rounded_twice(x):
    """Through FP8 once more, without a scale."""
    return pa.dequantize(pa.quantize(x, pa.E4M3_TENSOR, 1.0), jnp.bfloat16)


def errors(scale):
    """(the exact numbers, relative errors with one rounding, and with two)."""
    exact = codes.astype(np.float64) * np.float64(np.float32(scale))
    once = pa.gather_kv(*one_token(scale), max_tokens=1, dtype=jnp.bfloat16).k[0, 0]
    twice = rounded_twice(jnp.asarray(exact, jnp.float32))
    return exact, *(np.abs(np.asarray(x, np.float64) - exact) / exact for x in (once, twice))


print("relative error: one rounding, worst   two roundings, median    worst   numbers changed by the second")
for scale in (1.0, 0.25, 0.3, 0.02, 0.0004):
    _, one, two = errors(scale)
    print(f"scale {scale:<8} {one.max():22.4f} {np.median(two):23.4f} {two.max():8.4f} {np.mean(one != two):31.0%}")
    assert one.max() <= 2**-8  # half a unit in the last of bf16's 8 places

# %%
exact, one, two = errors(0.02)
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for found, colour, label in ((two, "#d9793d", "through FP8 once more"), (one, "#5b9bd5", "one rounding, to bf16")):
    axis.scatter(exact, np.maximum(found, 1e-5), s=12, color=colour, label=label)
axis.set(xscale="log", yscale="log", xlabel="the number that a code stands for, scale 0.02", ylabel="relative error")
axis.legend(loc="upper right", fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# On the left the products fall below the range of FP8 and are lost. On the right each is off by up to a 16th, for e4m3
# has three bits behind the leading one. What that does to attention, chunk by chunk as above:


# %%
def gather_twice(*args, **keywords):
    got = pa.gather_kv(*args, **keywords)
    return got._replace(k=rounded_twice(got.k), v=rounded_twice(got.v))


once, _ = in_chunks(q, cache, batch, 64)
twice, _ = in_chunks(q, cache, batch, 64, gather_twice)
print(f"error of the output: {error(once, want):.4f} with one rounding, {error(twice, want):.4f} with two")
assert error(twice, want) > 10 * error(once, want)

# %% [markdown]
# ## A Triton kernel of one's own
# `pa.triton_op` makes a JAX function of any `@triton.jit` kernel. Here one that watches a calibration: in a page of
# FP8, how many codes are the largest there is? Many mean that the scale is too small and that numbers were clamped.
#
# The kernel lives in a module and is named by its path. So it is imported when it is lowered, and a program that uses
# it can be traced on a machine that has neither triton nor a GPU. It takes bytes, since Triton has e4m3 only for Ada
# and later; the largest code is 7E, below the sign bit.

# %%
KERNEL = '''
import triton
import triton.language as tl


@triton.jit
def saturated(pages, counts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """How many e4m3 codes of a page are 448 or -448: one program a page."""
    page, here = tl.program_id(0), tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, SIZE, BLOCK):
        at = first + here
        code = tl.load(pages + page.to(tl.int64) * SIZE + at, mask=at < SIZE, other=0)
        count += ((code & 0x7F) == 0x7E).to(tl.int32)
    tl.store(counts + page, tl.sum(count, axis=0))
'''

folder = Path(tempfile.mkdtemp())
(folder / "my_kernels.py").write_text(KERNEL)
sys.path.insert(0, str(folder))

count = pa.triton_op(
    "my_kernels:saturated",
    out=lambda pages: jax.ShapeDtypeStruct(pages.shape[:1], jnp.int32),
    grid=lambda pages, **_: pages.shape[0],
    constants=lambda pages: {"SIZE": pa.strides(pages)[0], "BLOCK": 512},
)


def saturated_keys(cache):
    """Codes at the end of the range in each page of the keys, int32 [N]."""
    return count(jax.lax.bitcast_convert_type(cache.k.values, jnp.uint8))


# %% [markdown]
# Shapes are inferred everywhere, and what cannot be right is refused before anything is compiled.

# %%
print(jax.eval_shape(saturated_keys, cache))
print(jax.make_jaxpr(saturated_keys)(cache).pretty_print(use_color=False))
try:
    pa.triton_op("my_kernels:saturated", out=jax.ShapeDtypeStruct((0,), jnp.int32), grid=0)(cache.k.values)
except pa.InvalidInput as refusal:
    print(refusal)

# %% [markdown]
# **This cell needs an NVIDIA GPU and the extra `triton`.** The kernel counts, so its result is a matter of arithmetic
# and not of the machine: numpy knows it too. Where there is no GPU the cell shows that record instead; where there is
# one, it runs the kernel and holds it to the record. The keys of the four pages are ever larger, the scale is fit for
# numbers up to 1.

# %%
tight = pa.PagedKVCache.allocate(4, PAGE, KV_HEADS, DIM, format=pa.E4M3_TENSOR, k_scale=1 / 448, v_scale=1 / 448)
larger = normal(4 * PAGE, KV_HEADS, DIM) * jnp.repeat(jnp.array([0.2, 0.5, 1, 2], jnp.bfloat16), PAGE)[:, None, None]
tight = pa.write_kv(tight, larger, larger, jnp.arange(4 * PAGE))
record = np.sum(np.abs(np.asarray(tight.k.values, np.float32)) == 448, axis=(1, 2, 3))

if jax.default_backend() == "gpu" and "triton" not in pa.support_table().off:
    got = np.asarray(jax.jit(saturated_keys)(tight))
    np.testing.assert_array_equal(got, record)
    print("the kernel:", got)
else:
    print("no GPU with triton here; on record:", record)
print(f"of {PAGE * KV_HEADS * DIM} codes a page")
