"""What is measured of each variant: held-out bits per byte, agreement with the dense model, size and speed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bench.serve import model
from bench.serve.display import Display
from bench.serve.engine import Limits, Request, Server, Stats, Variant, interference
from bench.serve.text import held_out_text, windows


@dataclass(frozen=True)
class Workload:
    """The traffic to serve and the text to score, all of it held out."""

    requests: int = 24
    compared: int = 8  # of them, for a variant that is compared with another
    windows: int = 8
    alone: int = 1  # the last so many are served a second time, alone, in every plain KV format
    seed: int = 0

    def traffic(self) -> list[Request]:
        """Requests with prompts of 20 to 400 bytes for 32 to 96 new ones, about one arrival every 4 steps."""
        rng, text = np.random.default_rng(self.seed), held_out_text()
        arrivals = np.cumsum(rng.poisson(4, self.requests))
        lengths, new = rng.integers(20, 401, self.requests), rng.integers(32, 97, self.requests)
        starts = rng.integers(0, len(text) - 400, self.requests)
        rows = zip(starts.tolist(), lengths.tolist(), new.tolist(), arrivals.tolist(), strict=True)
        return [Request(text[start : start + size].tobytes(), count, at) for start, size, count, at in rows]

    def passages(self, config: model.Config) -> np.ndarray:
        """Windows to score, uint8 [windows, context]."""
        return windows(held_out_text(), self.windows, config.context)


@dataclass(frozen=True)
class Result:
    """The measurements of a variant.

    nats: of every byte after the first of each scored window, [windows, context - 1].
    equal: for each request, which of its new tokens are the dense model's greedy choice after the same tokens.
    disturbed: requests that got other tokens when served alone.
    """

    variant: Variant
    nats: np.ndarray
    bytes_per_token: float
    compile_seconds: float
    stats: Stats
    served: list[Request]
    equal: list[np.ndarray]
    disturbed: int

    @property
    def bits(self) -> float:
        """Bits per byte of the scored windows."""
        return bits_per_byte(self.nats)

    def matching(self, requests: int | None = None) -> float:
        """Share of the tokens of the first so many requests that are the dense model's greedy choice."""
        return float(np.concatenate(self.equal[:requests]).mean())

    @property
    def prefix(self) -> float:
        """Mean over the requests of the share of new tokens before leaving the dense model's own continuation.

        Up to the first token that differs, the two have the same past: `equal` tells both measures.
        """
        return float(np.mean([np.cumprod(equal).mean() for equal in self.equal]))


def bits_per_byte(nats: np.ndarray) -> float:
    """The mean, in bits."""
    return float(nats.mean(dtype=np.float64) / math.log(2))


class Yardstick:
    """The dense float32 model on the same text."""

    def __init__(self, params: model.Params, config: model.Config):
        self.config = config
        self.forward = jax.jit(lambda rows: jax.lax.map(lambda row: model.dense(params, row, config)[0], rows))

    def nats(self, passages: np.ndarray) -> np.ndarray:
        """Nats of every byte after the first of each window, [windows, context - 1]."""
        log_p = jax.nn.log_softmax(self.forward(jnp.asarray(passages, jnp.int32)))
        return -np.take_along_axis(np.asarray(log_p)[:, :-1], passages[:, 1:, None].astype(int), -1)[..., 0]

    def agreement(self, served: list[Request]) -> list[np.ndarray]:
        """`equal` of `Result`, from one forward over each prompt and its continuation."""
        rows = np.zeros((len(served), self.config.context), np.int32)
        for row, request in zip(rows, served, strict=True):
            row[: len(request.tokens)] = request.tokens
        choices = np.asarray(jnp.argmax(self.forward(rows), -1))
        return [
            row[len(request.prompt) - 1 : request.target - 1] == np.frombuffer(request.output, np.uint8)
            for row, request in zip(choices, served, strict=True)
        ]


@dataclass(frozen=True)
class Bench:
    """Measures variants of one model under one workload."""

    params: model.Params
    config: model.Config
    limits: Limits
    work: Workload
    yardstick: Yardstick
    display: Display

    def measure(self, variant: Variant) -> Result:
        """Serves the traffic, scores the windows and, for a plain format, serves some requests again alone."""

        def server() -> Server:
            return Server(self.params, variant, self.config, self.limits)

        engine, work = server(), self.work
        compile_seconds = engine.warm_up()
        requests = work.traffic()[: work.compared if variant.against else None]
        stats = engine.serve(requests, self.display)
        scored = [Request(row.tobytes(), 0) for row in work.passages(self.config)]
        engine.serve(scored, self.display)
        nats = np.array([request.nats for request in scored])
        size, equal = variant.bytes_per_token(self.config, self.limits), self.yardstick.agreement(requests)
        disturbed = 0 if variant.against else len(interference(server, requests[-work.alone :]))
        return Result(variant, nats, size, compile_seconds, stats, requests, equal, disturbed)
