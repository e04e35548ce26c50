"""Trains the model of this folder through the library's own gradients.

`python -m bench.indexer.train --steps 2000 --out bench/indexer/weights.npz`

Attention learns the answers through `write_kv` and `paged_attention`, helped by being told where they stand (from the
answers alone it takes many times as long to find them among thousands of writes); the indexer learns, through
`indexer_logits` on fake-quantised floats, where attention looks (the KL divergence from its weights), as DeepSeek's.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.indexer import model, task

TOKENS = 4096  # writes of a step: fewer logs where they are longer
LENGTHS = (1024, 512, 2048, 8192, 1024, 4096, 2048, 8192)  # in turn


class State(NamedTuple):
    """Weights and Adam's two moments."""

    params: model.Params
    mean: model.Params
    square: model.Params
    step: Array


def loss(params: model.Params, logs: task.Logs) -> tuple[Array, tuple[Array, Array]]:
    """Cross entropy of the answers and of where attention looks, plus the indexer's divergence from it, in nats; also
    the first and the last apart."""

    def one(keys, values, asked, answers, latest):
        tokens = model.embed(params, keys, values, asked)
        answer = jax.nn.log_softmax(model.dense(params, tokens))
        entropy = -jnp.mean(jnp.take_along_axis(answer, answers[:, None], 1))
        weights = model.attention_weights(params, tokens)
        found = -jnp.mean(jnp.log(jnp.take_along_axis(weights, latest[:, None], 1) + 1e-9))
        fixed = jax.tree.map(jax.lax.stop_gradient, tokens)
        target = jax.lax.stop_gradient(weights)
        chosen = jax.nn.log_softmax(model.index_logits(params.indexer, fixed))
        divergence = jnp.mean(jnp.sum(jax.scipy.special.xlogy(target, target) - target * chosen, axis=1))
        return entropy, found, divergence

    entropy, found, divergence = (jnp.mean(jnp.stack(x)) for x in zip(*map(one, *logs), strict=True))
    return entropy + found + divergence, (entropy, divergence)


@partial(jax.jit, donate_argnums=0)
def train_step(state: State, logs: task.Logs, lr: Array) -> tuple[State, tuple[Array, Array]]:
    """One step of Adam (0.9, 0.99), the gradient's norm clipped to 1; RoPE's frequencies stay."""
    grads, parts = jax.grad(loss, has_aux=True)(state.params, logs)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / (norm + 1e-6)), grads)
    step = state.step + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, grads)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, state.square, grads)

    def update(path, p: Array, m: Array, s: Array) -> Array:
        move = m / (1 - 0.9**step) / (jnp.sqrt(s / (1 - 0.99**step)) + 1e-8)
        return p if path[-1].name == "frequencies" else p - lr * move

    return State(jax.tree_util.tree_map_with_path(update, state.params, mean, square), mean, square, step), parts


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 4 %, then a cosine down to a hundredth of the peak."""
    return peak * min(1.0, progress / 0.04) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def main() -> None:
    """Trains and says how it goes."""
    parser = argparse.ArgumentParser(prog="python -m bench.indexer.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=model.WEIGHTS)
    args = parser.parse_args()
    params = model.init(args.seed)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = State(params, zeros, jax.tree.map(jnp.zeros_like, params), jnp.int32(0))
    rng, seen, start = np.random.default_rng(args.seed + 1), [], time.monotonic()
    for step in range(args.steps):
        length = LENGTHS[step % len(LENGTHS)]
        lr = jnp.float32(learning_rate((step + 1) / args.steps, args.lr))
        state, parts = train_step(state, task.logs(rng, max(TOKENS // length, 1), length), lr)
        seen.append(np.array(parts))
        if step % 50 == 49:
            entropy, divergence = np.mean(seen, axis=0)
            print(f"step {step + 1:5d} {time.monotonic() - start:5.0f} s", end="  ")
            print(f"answers {entropy:.4f} nats, indexer {divergence:.4f} nats", flush=True)
            seen.clear()
            model.save(args.out, state.params)
    model.save(args.out, state.params)
    print(f"{args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
