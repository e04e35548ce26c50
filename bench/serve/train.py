"""Trains the model of this folder through the library's own differentiable attention.

`python -m bench.serve.train --steps 3000 --minutes 7 --out bench/serve/weights.npz`

Every layer writes its keys and values into a float paged cache (`write_kv`) and attends over it
(`paged_attention`); the gradient flows back through both. The optimiser is AdamW, written out below. The schedule
follows whichever is further along, the steps or the clock, so that a slow machine still ends at a low rate.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from bench.serve import model
from bench.serve.text import held_out_text, training_text

PAGE_SIZE = 64
WARM_UP = 100


class Optimiser(NamedTuple):
    """float32 master weights and Adam's two moments."""

    params: model.Params
    mean: model.Params
    square: model.Params
    step: Array


def paged_batch(tokens: Array, config: model.Config) -> tuple[model.Step, pa.PagedKVCache]:
    """Sequences [B, context] as one ragged prefill, sequence b on its own consecutive pages of an empty bf16 cache."""
    count, length = tokens.shape
    per_sequence = -(-length // PAGE_SIZE)
    batch = pa.RaggedBatch(
        page_table=jnp.arange(count * per_sequence, dtype=jnp.int32).reshape(count, per_sequence),
        kv_lens=jnp.full(count, length, jnp.int32),
        cu_q_lens=jnp.arange(count + 1, dtype=jnp.int32) * length,
        num_seqs=jnp.int32(count),
    )
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), count)
    pages = config.layers * count * per_sequence
    cache = pa.PagedKVCache.allocate(pages, PAGE_SIZE, config.kv_heads, config.head_dim, format=pa.BF16)
    return model.Step(tokens.reshape(-1), positions, batch), cache


def loss(params: model.Params, windows: Array, config: model.Config, key: Array | None, rate: float) -> Array:
    """Mean cross entropy, nats per byte, of windows [B, context + 1]; bf16 compute on a GPU, float32 on a CPU."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    windows = windows.astype(jnp.int32)
    step, cache = paged_batch(windows[:, :-1], config)
    logits, _ = model.paged(params, step, cache, config, key=key, rate=rate)
    targets = windows[:, 1:].reshape(-1, 1)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets, 1))


@partial(jax.jit, static_argnames=("config", "batch", "rate"), donate_argnums=0)
def train_step(
    state: Optimiser, text: Array, key: Array, lr: Array, *, config: model.Config, batch: int, rate: float
) -> tuple[Optimiser, Array]:
    """One step of AdamW on `batch` random windows of text (uint8, on the device)."""
    where, drop = jax.random.split(jax.random.fold_in(key, state.step))
    starts = jax.random.randint(where, (batch, 1), 0, len(text) - config.context)
    windows = text[starts + jnp.arange(config.context + 1)]
    value, grads = jax.value_and_grad(loss)(state.params, windows, config, drop, rate)
    return adamw(state, grads, lr), value


def adamw(state: Optimiser, grads: model.Params, lr: Array, decay: float = 0.1, clip: float = 1.0) -> Optimiser:
    """Adam (0.9, 0.99) with the gradient's norm clipped and decoupled weight decay on the matrices."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
    step = state.step + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, grads)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, state.square, grads)

    def update(path: tuple[Any, ...], p: Array, m: Array, s: Array) -> Array:
        move = m / (1 - 0.9**step) / (jnp.sqrt(s / (1 - 0.99**step)) + 1e-8)
        return p - lr * (move + (decay * p if path[-1].key in model.MATRICES else 0.0))

    params = jax.tree_util.tree_map_with_path(update, state.params, mean, square)
    return Optimiser(params, mean, square, step)


def held_out_bits(params: model.Params, config: model.Config, batch: int, windows: int) -> float:
    """Bits per byte on windows spread evenly over the held-out text."""
    text = held_out_text()
    starts = np.linspace(0, len(text) - config.context - 1, windows).astype(int)
    rows = text[starts[:, None] + np.arange(config.context + 1)]
    values = [EVALUATE(params, rows[i : i + batch], config, None, 0.0) for i in range(0, windows, batch)]
    return float(np.mean([float(value) for value in values])) / math.log(2)


EVALUATE = jax.jit(loss, static_argnames=("config", "key", "rate"))


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak at progress 1."""
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(args: argparse.Namespace, config: model.Config) -> float:
    """Runs the loop, keeps the best weights on disk, and returns their held-out bits per byte."""
    params = model.init(jax.random.key(args.seed), config)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters on {jax.devices()[0].device_kind}")
    mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    state = Optimiser(params, mean, square, jnp.int32(0))
    text, key = jnp.asarray(training_text()), jax.random.key(args.seed + 1)
    best, losses, start = math.inf, [], time.monotonic()
    for step in range(args.steps):
        progress = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        lr = jnp.float32(learning_rate(progress, step, args.lr))
        state, value = train_step(state, text, key, lr, config=config, batch=args.batch, rate=args.dropout)
        losses.append(value)
        if step % 10 == 9:  # dispatch runs ahead of the device: wait, so that the clock above is the device's
            value.block_until_ready()
        last = step + 1 == args.steps or progress >= 1
        if (step + 1) % args.every == 0 or last:
            bits = held_out_bits(state.params, config, args.batch, args.windows)
            seen = float(np.mean([float(x) for x in losses])) / math.log(2)
            print(f"step {step + 1:5d}  {time.monotonic() - start:5.0f} s  lr {float(lr):.1e}", end="  ")
            print(f"train {seen:.4f}  held-out {bits:.4f} bits per byte", flush=True)
            losses.clear()
            if bits < best:
                best = bits
                model.save(args.out, state.params)
        if last:
            break
    return best


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=7.0, help="stop after this long, compilation included")
    parser.add_argument("--out", type=Path, default=model.WEIGHTS)
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of the learning rate")
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows per measurement")
    parser.add_argument("--context", type=int, default=model.Config.context)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Trains and says how it went."""
    args = arguments()
    best = train(args, model.Config(context=args.context))
    print(f"best held-out {best:.4f} bits per byte, in {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
