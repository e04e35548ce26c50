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
# # Quickstart: one step of serving from an FP8 paged cache
#
# A *page* holds the keys and values of a few tokens. A sequence owns a list of pages, its row of the *page table*; a
# *slot* is a page times the page size plus a place in the page. One step takes the new tokens of all sequences, writes
# their keys and values into their slots, and attends to everything cached.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import pallas_attn as pa

PAGES, PAGE, KV_HEADS, HEADS, DIM = 64, 16, 2, 8, 64

# %% [markdown]
# ## A cache
# FP8 with one scale per tensor, for keys and for values. The scales must be given: they come from a calibration. Here
# the keys have a standard deviation of 3 and the values of 0.005, and FP8 e4m3 reaches 448.

# %%
K_SCALE, V_SCALE = 15 / 448, 0.025 / 448
cache = pa.PagedKVCache.allocate(PAGES, PAGE, KV_HEADS, DIM, format=pa.E4M3_TENSOR, k_scale=K_SCALE, v_scale=V_SCALE)
print(cache.format, cache.layout, f"{cache.nbytes / 1024:.0f} KiB, {cache.nbytes / (PAGES * PAGE):.0f} bytes a token")

# %% [markdown]
# ## A batch
# Three sequences in one step: a prompt of 40 tokens, a sequence in decode (1 new token, 100 in all), and a chunk of 20
# tokens of a prompt of which 30 are already cached. The step is padded to 64 tokens: padding comes out as zeros.

# %%
new, total = np.array([40, 1, 20]), np.array([40, 100, 50])
free_pages = iter(np.random.default_rng(0).permutation(PAGES))
page_table = np.zeros((3, 8), np.int32)
for sequence, tokens in enumerate(total):
    owned = -(-tokens // PAGE)
    page_table[sequence, :owned] = [next(free_pages) for _ in range(owned)]

batch = pa.RaggedBatch(jnp.array(page_table), jnp.array(total), jnp.array([0, *np.cumsum(new)]))
print("slots of the first and of the last tokens:", batch.slot_mapping(64, PAGE)[np.array([0, 1, 40, 60, 61])])

# %% [markdown]
# ## One jitted step
# The cache is donated, so that the write happens in place. The query is FP8 too: values and scale in one object.


# %%
def step(q, k, v, cache, batch):
    cache = pa.write_kv(cache, k, v, batch.slot_mapping(k.shape[0], cache.page_size))
    return pa.paged_attention(q, cache, batch), cache


def normal(seed, heads, scale):
    return jax.random.normal(jax.random.key(seed), (64, heads, DIM), jnp.bfloat16) * scale


# What earlier steps left in the cache: the 99 and 30 tokens before this one's.
earlier = dataclasses.replace(batch, kv_lens=jnp.array([0, 99, 30]), cu_q_lens=jnp.array([0, 0, 99, 129]))
past = [jax.random.normal(jax.random.key(i), (129, KV_HEADS, DIM), jnp.bfloat16) * s for i, s in ((1, 3.0), (2, 0.005))]
cache = pa.write_kv(cache, *past, earlier.slot_mapping(129, PAGE))

q = pa.quantize(normal(0, HEADS, 0.5), pa.E4M3_STATIC, 2.5 / 448)
k, v = normal(3, KV_HEADS, 3.0), normal(4, KV_HEADS, 0.005)
out, cache = jax.jit(step, donate_argnums=3)(q, k, v, cache, batch)
print(out.shape, out.dtype, "| padding is zero:", not np.any(np.asarray(out[61:], np.float32)))
print(pa.explain(pa.paged_attention, q, cache, batch))

# %% [markdown]
# ## Where each scale and each rounding happens
# A number is rounded twice on its way, and nowhere else: once into the cache, once into the output.

# %%
boxes = [
    ("q, k, v\nbf16", None),
    ("stored\nFP8", "round 1: / scale,\nclamp to ±448"),
    ("logits\nfloat32", "x q scale x k scale\nexact products"),
    ("weighted\nsum\nfloat32", "softmax,\nx v scale"),
    ("out\nbf16 or FP8", "round 2: once,\n/ out scale if FP8"),
]
figure, axis = plt.subplots(figsize=(10, 1.9))
for i, (name, arrow) in enumerate(boxes):
    colour = "#f4d9b0" if "FP8" in name else "#cfe3f5"
    axis.text(2.2 * i, 0, name, ha="center", va="center", bbox={"boxstyle": "round,pad=0.5", "fc": colour, "ec": "0.3"})
    if arrow:
        axis.annotate("", (2.2 * i - 0.62, 0), (2.2 * i - 1.58, 0), arrowprops={"arrowstyle": "->"})
        axis.text(2.2 * i - 1.1, 0.34, arrow, ha="center", va="bottom", fontsize=8)
axis.set(xlim=(-0.8, 9.6), ylim=(-0.5, 1.0))
axis.axis("off")
plt.show()

# %% [markdown]
# ## What three bugs do to the output
# Each was found in a serving stack. The library cannot express them by accident: here they are made on purpose, with a
# wrong scale or a second rounding. The yardstick is the same step in float32 without quantisation.


# %%
def exact_cache():
    """The same tokens in a float32 cache."""
    wide = pa.PagedKVCache.allocate(PAGES, PAGE, KV_HEADS, DIM, format=pa.F32)
    wide = pa.write_kv(wide, *past, earlier.slot_mapping(129, PAGE))
    return pa.write_kv(wide, k, v, batch.slot_mapping(64, PAGE))


def with_scale(part, scale):
    return dataclasses.replace(part, scale=jnp.float32(scale))


def again(part):
    """Dequantised, then rounded to FP8 once more without a scale, as if that were harmless."""
    numbers = pa.dequantize(part)
    return pa.dequantize(pa.quantize(numbers, pa.E4M3_TENSOR, 1.0))


exact = pa.paged_attention(normal(0, HEADS, 0.5).astype(jnp.float32), exact_cache(), batch)[:61]
runs = {
    "as it should be": pa.paged_attention(q, cache, batch),
    "query scale ignored": pa.paged_attention(with_scale(q, 1.0), cache, batch),
    "FP8 round trip\nafter dequantisation": pa.paged_attention(
        pa.dequantize(q), pa.PagedKVCache(again(cache.k), again(cache.v)), batch
    ),
    "layer scales\nreplaced by 1": pa.paged_attention(
        q, pa.PagedKVCache(with_scale(cache.k, 1.0), with_scale(cache.v, 1.0)), batch
    ),
}
errors = {
    name: float(jnp.linalg.norm(run[:61].astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
    for name, run in runs.items()
}
for name, error in errors.items():
    print(f"{name.replace(chr(10), ' '):42s} relative error {error:.4f}")

# %%
figure, axis = plt.subplots(figsize=(8, 3))
bars = axis.bar(list(errors), list(errors.values()), color=["#5b9bd5", *["#d9793d"] * 3])
axis.bar_label(bars, [f"{e:.3g}" for e in errors.values()])
axis.set(yscale="log", ylabel="relative error of the output", ylim=(0.01, 1e6))
axis.spines[["top", "right"]].set_visible(False)
plt.show()

assert errors["as it should be"] < 0.1 < min(errors["query scale ignored"], errors["layer scales\nreplaced by 1"])
assert errors["FP8 round trip\nafter dequantisation"] > 1.2 * errors["as it should be"]
