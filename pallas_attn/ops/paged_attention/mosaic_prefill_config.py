"""How the prefill kernel is cut to a problem: what a tuner may choose, the choice, and what memory it takes."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_attn.core.formats import INT8
from pallas_attn.ops.paged_attention import mosaic_prefill_compute, mosaic_tables
from pallas_attn.ops.paged_attention.mosaic_config import FP8
from pallas_attn.ops.paged_attention.mosaic_prefill_crew import NEWS
from pallas_attn.ops.paged_attention.mosaic_prefill_plan import NUMBERS, WARPGROUPS, Form
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import ROWS, SHARED, swizzled

TABLE = "hopper_prefill"
# Tiles in flight of keys, of values and of what is widened, and whether the next query comes ahead.
RINGS = ((3, 2, 2, True), (3, 2, 2, False), (2, 2, 2, False), (2, 1, 2, False), (2, 1, 1, False), (1, 1, 1, False))
# Of a thread that computes, prepares or loads, by whether a query is one term. Twice the first and the others may add
# up to four times 128, or they would wait for ever.
REGISTERS = {True: (200, 88, 24), False: (208, 72, 24)}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a tuner may choose.

    tile: tokens of a step. keys, values, wide: tiles in flight of keys, of values, and of what is widened.
    ahead: whether the next block's query may come before the last one's result has left.
    alone: whether a block has one head only: then one copy brings a warpgroup's 64 queries, and one takes its result.
    """

    tile: int = 128
    keys: int = 3
    values: int = 2
    wide: int = 2
    ahead: bool = True
    alone: bool = False


def choose(p: Problem) -> Config:
    """The tuned configuration of the nearest problem, or what the heuristic says."""
    found = mosaic_tables.nearest(TABLE, key_of(p), sizes_of(p))
    if found is None:
        return heuristic(p)
    config = Config(*found)
    return config if shared_bytes(p, config) <= SHARED else heuristic(p)


def key_of(p: Problem) -> list:
    """What a tuned entry must share with a problem."""
    return [str(p.kv_format.dtype), str(p.q_format.dtype), p.head_dim, p.kv_heads, p.group]


def sizes_of(p: Problem) -> dict[str, int]:
    """What may differ."""
    return {"seqs": p.seqs, "tokens": p.tokens, "context": p.pages_per_seq * p.page_size}


def heuristic(p: Problem) -> Config:
    """The configuration where no table knows better: the first of these that fits the shared memory."""
    tile = 64 if p.head_dim > 128 or p.kv_format.dtype == INT8 else 128
    # Blocks of all heads of a group have fewer rows of nobody where sequences are short, but copies of a few rows each.
    alone = p.tokens >= ROWS * p.seqs and fits(p, 1)
    choices = [Config(tile, *ring, alone) for ring in RINGS]
    return next((c for c in choices if shared_bytes(p, c) <= SHARED), choices[-1])


def candidates(p: Problem) -> Iterator[Config]:
    """Configurations that fit the shared memory: what the heuristic chooses from, and more tiles in flight."""
    wanted = heuristic(p)
    for alone in (True, False) if fits(p, 1) and part_of(p) > 1 else (wanted.alone,):
        for ring in ((4, 2, 2, True), *RINGS[:3]):
            config = Config(wanted.tile, *ring, alone)
            if shared_bytes(p, config) <= SHARED:
                yield config


def part_of(p: Problem) -> int:
    """Heads of one block: the most that divide the group evenly and fit. None would be 0."""
    return max((d for d in range(1, min(p.group, ROWS) + 1) if p.group % d == 0 and fits(p, d)), default=0)


def fits(p: Problem, part: int) -> bool:
    """Whether rows of a token of so many heads begin at multiples of 128 bytes, as copies want it; queries of one head
    come in one copy."""
    result, query = part * p.v_head_dim * p.out_dtype.itemsize, part * p.head_dim * p.q_format.dtype.itemsize
    return result % 128 == 0 and (part == 1 or query % 128 == 0)


def form_of(p: Problem, config: Config, few: int = 0) -> Form:
    """The static shape of the kernel for one problem."""
    part = 1 if config.alone else part_of(p)
    stored, span = p.kv_format.dtype, ROWS // part
    wide = jnp.float16 if stored.itemsize == 1 else stored
    operand = jnp.float16 if stored == INT8 else stored
    if stored in FP8:
        operand = p.q_format.dtype if p.q_format.quantized else jnp.float8_e4m3fn
    # bf16 has 8 bits, f16 11 and float32 24; two terms of FP8 8 and three 12, two of bf16 16, of f16 22.
    exact = p.q_format.quantized or jnp.finfo(operand).nmant >= jnp.finfo(p.q_format.dtype).nmant
    several = 3 if p.q_format.dtype == jnp.float32 and operand in FP8 else 2
    blocks = p.tokens // (WARPGROUPS * span) + p.seqs + 1
    return Form(
        config.tile, part, p.group // part, span, 1 if exact else several, jnp.dtype(operand), jnp.dtype(wide),
        config.keys, config.values, config.wide, config.ahead, few, blocks, REGISTERS[exact or operand not in FP8],
    )  # fmt: skip


def scratch_of(p: Problem, form: Form) -> dict[str, Any]:
    """Shared memory and barriers of a CTA."""
    stored, tile, barrier = p.kv_format.dtype, form.tile, plgpu.Barrier

    def tiles(slots: int, dim: int, dtype) -> Any:
        return plgpu.SMEM((slots, tile, dim), dtype, transforms=swizzled(dtype, dim))

    pages = max(tile // p.page_size, 1)
    scratch = _of_query(p, form) | {
        "row_values": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "k_ring": tiles(form.keys, p.head_dim, stored),
        "v_ring": tiles(form.values, p.v_head_dim, stored),
        "news": plgpu.SMEM((NEWS, NUMBERS), jnp.int32),
        "ticket": plgpu.SMEM((1,), jnp.int32),
        "news_here": barrier(num_barriers=NEWS),
        "news_used": barrier(num_arrivals=WARPGROUPS + 1, num_barriers=NEWS),
        "q_here": barrier(num_arrivals=1 if form.part == 1 else form.span, num_barriers=WARPGROUPS),
        "q_used": barrier(num_barriers=WARPGROUPS),
        "k_here": barrier(num_arrivals=pages, num_barriers=form.keys),
        "k_used": barrier(num_arrivals=WARPGROUPS, num_barriers=form.keys),
        "v_here": barrier(num_arrivals=pages, num_barriers=form.values),
        "v_ready": barrier(num_barriers=form.value_slots(p)),
        "v_used": barrier(num_arrivals=WARPGROUPS, num_barriers=form.value_slots(p)),
    }
    if stored.itemsize == 1:
        scratch |= {
            "v_wide": tiles(form.wide, p.v_head_dim, form.wide_type),
            "v_free": barrier(num_barriers=form.values),
        }
    if form.relays_keys(p):
        scratch["k_ready"] = barrier(num_barriers=form.keys)
    if stored == INT8:
        scratch["k_wide"] = tiles(form.keys, p.head_dim, form.operand)
    if p.kv_format.granularity == "token_head":
        scratch |= {name: plgpu.SMEM((form.keys, tile), jnp.float32) for name in ("k_scales", "v_scales")}
    if mosaic_prefill_compute.INTERPRET is not None:
        columns = ([tile], form.columns(p))
        scratch["stand_ins"] = [[plgpu.SMEM((WARPGROUPS, ROWS, n), jnp.float32) for n in each] for each in columns]
    return scratch


def _of_query(p: Problem, form: Form) -> dict[str, Any]:
    """The query as it comes, as the matrix unit takes it, and the result. The last two, or all if no query comes ahead,
    are never alive together in a warpgroup and share its memory. Each fills as many bytes of it, so that no warpgroup
    reaches into the other's. Results of 4 bytes leave in halves."""
    depth = p.head_dim
    out_depth = min(p.v_head_dim, 2 * p.v_head_dim // p.out_dtype.itemsize)
    terms, result = form.terms * depth * form.operand.itemsize, out_depth * p.out_dtype.itemsize
    raw = depth * p.q_format.dtype.itemsize
    most = max(terms, result, 0 if form.ahead else raw)
    rows = lambda width: ROWS * most // width  # noqa: E731  # of so many bytes, in a warpgroup's part
    memory: list[Any] = [] if form.ahead else [plgpu.SMEM((WARPGROUPS, rows(raw), depth), p.q_format.dtype)]
    tiles = (WARPGROUPS, rows(depth * form.operand.itemsize), depth)
    memory.append(plgpu.SMEM(tiles, form.operand, transforms=swizzled(form.operand, depth)))
    memory.append(plgpu.SMEM((WARPGROUPS, rows(result), out_depth), p.out_dtype))
    scratch: dict[str, Any] = {"of_query": plgpu.RefUnion(*memory)}
    if form.ahead:
        scratch["raw_q"] = plgpu.SMEM((WARPGROUPS, ROWS, depth), p.q_format.dtype)
    return scratch


def shared_bytes(p: Problem, config: Config) -> int:
    """Shared memory that one CTA takes: every array begins at a multiple of 1024."""

    def size(x) -> int:
        if isinstance(x, plgpu.RefUnion):
            return max(map(size, x.refs))
        if isinstance(x, plgpu.Barrier | list):
            return 0
        return -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024

    barriers, driver = 1024, 1024
    return sum(map(size, scratch_of(p, form_of(p, config)).values())) + barriers + driver
