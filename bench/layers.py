"""A step of decode through all layers: in each, one token a sequence is written and attended.

The caches of the layers are one cache, layer i owning the pages from i * N on, carried through a `lax.scan`; schedule
and slots are computed once for all layers. What is measured is all that a model adds to its matrix products.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench import cases
from bench.cases import Case

CARRY = True


def arguments(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Random (cache, q, k, v, batch); k and v are the new tokens of every layer."""
    q, cache, batch = cases.arguments(case, seed)
    shape = (case.tokens, case.kv_heads, case.head_dim)
    k, v = (
        scale * jax.random.normal(key, shape, jnp.bfloat16)
        for key, scale in zip(jax.random.split(jax.random.key(seed + 1)), (cases.K_SCALE, cases.V_SCALE), strict=True)
    )
    return cache, q, k, v, batch


def operation(case: Case, backend: str | None, layers: int | None = None) -> Callable[..., tuple]:
    """The timed function: (cache, output) of the first `layers` layers, all by default. A layer's output is the next's
    query."""

    def step(cache: pa.PagedKVCache, q: jax.Array, k: jax.Array, v: jax.Array, batch: pa.RaggedBatch):
        slots, pages = batch.slot_mapping(case.tokens, case.page_size), cache.num_pages // case.layers

        def layer(carry, i):
            cache, x = carry
            cache = pa.write_kv(cache, k, v, slots + i * (pages * case.page_size), backend=backend)
            mine = dataclasses.replace(batch, page_table=batch.page_table + i * pages)
            return (cache, pa.paged_attention(x, cache, mine, backend=backend)), None

        return jax.lax.scan(layer, (cache, q), jnp.arange(layers or case.layers, dtype=jnp.int32))[0]

    return step


def calls(case: Case, args: tuple) -> list[tuple[Callable, tuple]]:
    """The ops of a layer, with their arguments."""
    cache, q, k, v, batch = args
    slots = batch.slot_mapping(case.tokens, case.page_size)
    return [(pa.paged_attention, (q, cache, batch)), (pa.write_kv, (cache, k, v, slots))]


def check(case: Case, args: tuple, backend: str | None) -> tuple[float, tuple]:
    """(relative error of the last layer, the arguments with the cache as written).

    The layers before the last give its query; writing the same tokens again changes nothing.
    """
    cache, q, *new, batch = args
    cache, before = jax.jit(operation(case, backend, case.layers - 1), donate_argnums=0)(cache, q, *new, batch)
    program = jax.jit(operation(case, backend), donate_argnums=0).lower(cache, q, *new, batch).compile()
    for line in copies(program.as_text() or "", cache.buffers[0].size) if jax.default_backend() == "gpu" else ():
        print(f"{case.name}: the program copies the cache: {line}")
    cache, out = program(cache, q, *new, batch)
    last = batch.page_table + (case.layers - 1) * (cache.num_pages // case.layers)
    error = cases.relative_error(case, (before, cache, dataclasses.replace(batch, page_table=last)), out)
    return error, (cache, q, *new, batch)


def copies(program: str, elements: int) -> list[str]:
    """The lines of a compiled program that copy or transpose an array of at least so many elements."""
    pattern = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|transpose)\(")
    lines = [(line.strip(), pattern.search(line)) for line in program.splitlines()]
    return [line for line, found in lines if found and np.prod([int(n) for n in found[1].split(",")]) >= elements]
