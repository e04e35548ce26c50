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
# # The sparse indexer: which keys does it pick?
#
# Sparse attention of the DeepSeek-V3.2 kind reads only the k tokens that a cheap scorer, the indexer, ranks best. Here
# one is trained, through the library's own gradients, to find what the small language model of `bench/serve` attends to
# on real text; then it runs as it would be served, from an FP8 cache of 132 bytes a token.

# %%
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, "..")
import pallas_attn as pa
from bench.serve import model
from bench.serve.text import held_out_text, printable, training_text, windows

CONFIG, PARAMS, LAYER, LENGTH, TOPK = model.Config(), model.load(), 1, 256, 32

# %% [markdown]
# ## What there is to find
# The attention weights of one layer, averaged over its heads, and the hidden states that go into the layer.


# %%
@jax.jit
def watch(text):
    """(hidden states [T, width] that enter LAYER, its mean attention weights [T, T])."""
    rotation = model.rotations(jnp.arange(LENGTH), CONFIG)
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def attend(q, k, v):
        group = CONFIG.heads // CONFIG.kv_heads
        scores = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, group, 1)) * CONFIG.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
        return jnp.einsum("hqk,khd->qhd", weights, jnp.repeat(v, group, 1)), weights.mean(0)

    x = PARAMS["embed"][text.astype(jnp.int32)] * CONFIG.width**0.5
    for i in range(LAYER + 1):
        weights = jax.tree.map(lambda w, i=i: w[i], PARAMS["layers"])
        hidden = model.rms_norm(x, weights["norm_attention"])
        x, attention = model.block(x, weights, rotation, attend)
    return hidden, attention


hidden, attention = watch(jnp.asarray(held_out_text()[:LENGTH]))
print(hidden.shape, attention.shape)

# %% [markdown]
# ## Training it
# `project` gives queries, keys and weights; `indexer_logits` scores them; the loss is the KL divergence from attention.
# Floats pass through `fake_quantize`, so that the indexer learns on the very numbers that the FP8 cache will hold.


# %%
def index_logits(indexer, hidden):
    q, k, weights = indexer.project(hidden, hidden, jnp.arange(LENGTH))
    q, k = pa.fake_quantize(q, pa.INDEX_Q), pa.fake_quantize(k, pa.INDEX_K)
    row = jnp.arange(LENGTH)
    return pa.indexer_logits(q, k, weights, jnp.zeros_like(row), row + 1, scale=indexer.scale)


def divergence(indexer, hidden, attention):
    chosen = jax.nn.log_softmax(index_logits(indexer, hidden))
    seen = attention > 0
    return jnp.sum(jnp.where(seen, attention * (jnp.log(jnp.where(seen, attention, 1.0)) - chosen), 0)) / LENGTH


@jax.jit
def train_step(state, text, rate):
    """One step of Adam on one window of text."""
    indexer, mean, square, n = state
    loss, grads = jax.value_and_grad(divergence)(indexer, *watch(text))
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, grads)
    step = lambda p, m, s: p - rate * (m / (1 - 0.9**n)) / (jnp.sqrt(s / (1 - 0.99**n)) + 1e-9)  # noqa: E731
    moved = jax.tree.map(step, indexer, mean, square)
    return (dataclasses.replace(moved, frequencies=indexer.frequencies), mean, square, n + 1), loss


indexer = pa.Indexer.init(jax.random.key(0), CONFIG.width, CONFIG.width, heads=4, topk=TOPK)
zeros = jax.tree.map(jnp.zeros_like, indexer)
state, losses, steps = (indexer, zeros, zeros, jnp.float32(1)), [], 150
for i, text in enumerate(windows(training_text(), steps, LENGTH)):
    state, loss = train_step(state, jnp.asarray(text), jnp.float32(3e-3 * (1 - i / steps)))
    losses.append(float(loss))
indexer = state[0]
print(f"divergence from attention: {np.mean(losses[:5]):.2f} -> {np.mean(losses[-10:]):.2f} nats")

# %% [markdown]
# ## As it is served
# One call: project, rotate, quantise, write the keys, score, choose. Pages hold 16 tokens; the batch is one prompt.

# %%
pages = LENGTH // 16
batch = pa.RaggedBatch(
    jnp.arange(pages, dtype=jnp.int32)[::-1][None], jnp.array([LENGTH]), jnp.array([0, LENGTH])
)  # the pages in any order
slots, row = batch.slot_mapping(LENGTH, 16), jnp.arange(LENGTH)
serve = jax.jit(functools.partial(pa.Indexer.__call__, sorted=True), donate_argnums=4)
chosen, cache = serve(indexer, hidden, hidden, row, pa.IndexCache.allocate(pages, 16), batch, slots)
print(f"{cache.nbytes / LENGTH:.0f} bytes a token in {cache.layout}; positions {chosen.shape} {chosen.dtype}")

# %% [markdown]
# The text up to a byte of it: what the indexer picked for that byte stands in brackets.


# %%
def marked(query):
    """The text before a query with the picked bytes in brackets, adjacent ones in one pair."""
    picked, text = set(np.asarray(chosen[query]).tolist()), held_out_text()[: query + 1]
    out = "".join(f"[{chr(b)}]" if i in picked else chr(b) for i, b in enumerate(text))
    return printable(out.replace("][", "").encode())


for query in (120, 190, 250):
    print(marked(query), end="\n\n")

# %% [markdown]
# ## Recall against k
# How much of the attention the chosen k keys hold: the best possible choice, the indexer, its FP8 against exact float32
# scores, and the last k tokens, which is what a sliding window keeps.

# %%
ks = (1, 2, 4, 8, 16, 32, 64, 128)
rows = np.arange(LENGTH // 2, LENGTH)  # queries with at least 128 keys
mass = np.asarray(attention)[rows]


def covered(order):
    """Share of attention on the first k keys of an order [rows, keys], for every k."""
    held = np.cumsum(np.take_along_axis(mass, np.asarray(order), axis=1), axis=1)
    return [held[:, k - 1].mean() for k in ks]


def ranked(logits):
    return pa.indexer_topk(logits, max(ks), ends=row + 1, sorted=True)[rows]


q, k, weights = indexer.project(hidden, hidden, row)
exact = pa.indexer_logits(q, k, weights, jnp.zeros_like(row), row + 1, scale=indexer.scale)
recalls = {
    "best possible": covered(np.argsort(-mass, axis=1)[:, : max(ks)]),
    "indexer, FP8": covered(ranked(index_logits(indexer, hidden))),
    "indexer, float32": covered(ranked(exact)),
    "the last k": covered(rows[:, None] - np.arange(max(ks))),
}
figure, axis = plt.subplots(figsize=(7, 3.2))
for (name, values), style in zip(recalls.items(), ("k:", "o-", "x--", "s-"), strict=True):
    axis.plot(ks, values, style, label=name)
axis.set(xscale="log", xticks=ks, xticklabels=ks, xlabel="k", ylabel="attention held", ylim=(0, 1.02))
axis.legend()
axis.spines[["top", "right"]].set_visible(False)
plt.show()
at = ks.index(TOPK)
print({name: round(float(values[at]), 3) for name, values in recalls.items()}, f"at k = {TOPK}")
assert recalls["indexer, FP8"][at] > recalls["the last k"][at] + 0.02
assert abs(recalls["indexer, FP8"][at] - recalls["indexer, float32"][at]) < 0.02

# %% [markdown]
# ## The layout bug as a picture
# A page keeps its values in rows (INDEX_NORMAL) or in tiles of 16 x 16 (INDEX_SHUFFLE). A serving system once wrote one
# and read the other: nothing failed, and GSM8K fell from 0.95 to 0.01. Below, the same keys in both layouts, and what a
# reader of rows makes of tiles. A key whose 128 values are one colour is easy to follow.

# %%
colours = jnp.broadcast_to(jnp.linspace(-1, 1, 16)[:, None], (16, 128)) + 0.1 * jnp.sin(jnp.arange(128) / 5)
stored = {
    layout: pa.write_index(pa.IndexCache.allocate(1, 16, layout=layout), colours, jnp.arange(16))
    for layout in pa.INDEX_LAYOUTS
}


def picture(cache):
    return np.asarray(pa.dequantize(pa.Quantized(*(x[0] for x in cache.read(jnp.arange(1))), cache.format)))


lie = dataclasses.replace(stored[pa.INDEX_SHUFFLE], layout=pa.INDEX_NORMAL)  # nobody does this by accident
figure, axes = plt.subplots(3, 1, figsize=(9, 4.6), sharex=True)
for axis, (title, cache) in zip(
    axes,
    {
        "written in rows, read in rows": stored[pa.INDEX_NORMAL],
        "written in tiles, read in tiles: the same": stored[pa.INDEX_SHUFFLE],
        "written in tiles, read in rows: each row holds pieces of eight keys": lie,
    }.items(),
    strict=True,
):
    axis.imshow(picture(cache), aspect="auto", cmap="coolwarm", interpolation="nearest")
    axis.set(ylabel="token", title=title)
axes[-1].set(xlabel="value")
figure.tight_layout()
plt.show()

# %% [markdown]
# What that does to the choice on the real text; and why it cannot happen here: the layout is part of the cache's type,
# and tiles are refused where no tile fits.

# %%
_, cache = serve(indexer, hidden, hidden, row, pa.IndexCache.allocate(pages, 16), batch, slots)
last = dataclasses.replace(batch, cu_q_lens=jnp.array([0, 8]), max_q_len=8)
queries = pa.quantize(q[-8:], pa.INDEX_Q)


def choice(cache):
    logits = pa.paged_indexer_logits(queries, weights[-8:], cache, last, scale=indexer.scale)
    return np.asarray(pa.indexer_topk(logits, TOPK, ends=row[-8:] + 1))


right, wrong = choice(cache), choice(dataclasses.replace(cache, layout=pa.INDEX_NORMAL))
overlap = np.mean([len(set(a) & set(b)) / TOPK for a, b in zip(right, wrong, strict=True)])
print(f"of the right keys {overlap:.0%} are still chosen; by chance it would be {TOPK / LENGTH:.0%}")
assert overlap < 0.5
try:
    pa.IndexCache.allocate(pages, 1, layout=pa.INDEX_SHUFFLE)
except pa.InvalidInput as error:
    print("InvalidInput:", error)
