"""The cases of latent cache writes and gathers: one list for the support table, the tests and the bench."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_attn.core.batch import RaggedBatch
from pallas_attn.core.formats import FLOAT_FORMATS, FP8_DS_MLA
from pallas_attn.core.latent_cache import LATENT_FORMATS, abstract_latent_cache
from pallas_attn.ops.latent_cache import gather_problem, write_problem

S = jax.ShapeDtypeStruct


def write_cases() -> Iterator[tuple[str, str, write_problem.Problem]]:
    """(dimension, name, problem) of every format."""
    latent, rope, slots = S((32, 512), jnp.bfloat16), S((32, 64), jnp.bfloat16), S((32,), jnp.int32)
    for format in LATENT_FORMATS:
        yield "format", format.name, write_problem.prepare(abstract_latent_cache(format), latent, rope, slots)[0]


def gather_cases() -> Iterator[tuple[str, str, gather_problem.Problem]]:
    """(dimension, name, problem) of every format, as numbers and raw, and of every type of the result."""
    batch = RaggedBatch(S((3, 4), jnp.int32), S((3,), jnp.int32), S((4,), jnp.int32))

    def problem(format, **result) -> gather_problem.Problem:
        return gather_problem.prepare(abstract_latent_cache(format), batch, max_tokens=128, **result)[0]

    for format in LATENT_FORMATS:
        yield "format", format.name, problem(format)
    for format in LATENT_FORMATS:
        yield "raw", format.name, problem(format, raw=True)
    for result in FLOAT_FORMATS:
        yield "result", result.name, problem(FP8_DS_MLA, dtype=result.dtype)
