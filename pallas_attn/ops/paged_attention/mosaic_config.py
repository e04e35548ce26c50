"""How the decode kernel is cut to a problem: its static form, what a tuner may choose, and the choice."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_attn.core.batch import TILE
from pallas_attn.core.formats import E4M3, E5M2, INT8
from pallas_attn.ops.paged_attention import mosaic_tables
from pallas_attn.ops.paged_attention.problem import Problem
from pallas_attn.runtime.mosaic import SHARED, SMS

FP8 = (E4M3, E5M2)
TABLE = "hopper_decode"
FEW_TILES = 16  # of a whole step for each SM


@dataclasses.dataclass(frozen=True)
class Config:
    """What a tuner may choose.

    heads: kv heads of one CTA; two make NHD's rows of 128 bytes rows of 256, which memory likes.
    stages: tiles in flight. ctas: CTAs that share an SM, which sets the number of workers.
    """

    heads: int = 1
    stages: int = 2
    ctas: int = 4


class Form(NamedTuple):
    """The static shape of the kernel for one problem.

    The query rows of a kv head are cut into blocks that fit the registers: `parts` of `part` heads, and blocks of
    `span` tokens. Row i * part + g of a block is head g of its token i.
    """

    part: int
    parts: int
    span: int
    blocks: int
    rows: int  # part * span rounded up to 8
    terms: int  # of the query, which add up
    operand: Any  # dtype of K and Q in the matrix unit
    wide: Any  # dtype of V and P in the matrix unit
    merged: bool  # one ring holds [key, value] rows
    columns: int  # CTAs that share a tile's tokens: blocks of kv heads and query rows

    def column(self, unit, h, block):
        """Index of a partial result's block of rows."""
        return (unit + h) * self.blocks + block


def _most_rows(p: Problem) -> int:
    """Query rows of a block that the registers hold."""
    return min(32, 4096 // p.head_dim)


def part_of(p: Problem) -> int:
    """Heads of one block: the most that divide the group evenly."""
    return max((d for d in range(1, min(p.group, _most_rows(p)) + 1) if p.group % d == 0), default=1)


def form_of(p: Problem, config: Config) -> Form:
    """The form of a problem that `supports` takes."""
    most, part, tokens = _most_rows(p), part_of(p), p.max_q_len or 1
    span = min(tokens, max(most // part, 1)) if part == p.group else 1
    blocks = -(-tokens // span)
    operand = {INT8: jnp.float16}.get(p.kv_format.dtype, p.kv_format.dtype)
    wide = jnp.float16 if p.kv_format.dtype.itemsize == 1 else operand
    if p.kv_format.dtype in FP8:
        operand = p.q_format.dtype if p.q_format.quantized else E4M3
    # bf16 has 8 bits, f16 11 and float32 24; two terms of FP8 8, of bf16 16, of f16 22.
    exact = p.q_format.quantized or jnp.finfo(operand).nmant >= jnp.finfo(p.q_format.dtype).nmant
    merged = p.layout.single and p.head_dim * p.kv_format.dtype.itemsize % 128 == 0
    parts = p.group // part
    return Form(
        part, parts, span, blocks, -(-part * span // 8) * 8, 1 if exact else 2, jnp.dtype(operand), jnp.dtype(wide),
        merged, p.kv_heads * parts * blocks // config.heads,
    )  # fmt: skip


def rings(p: Problem, config: Config) -> tuple[int, ...]:
    """The columns of each ring: of [key, value] rows, or of keys and of values."""
    return (2 * p.head_dim,) if form_of(p, config).merged else (config.heads * p.head_dim,) * 2


def choose(p: Problem) -> Config:
    """The tuned configuration of the nearest problem, or what the heuristic says."""
    found = mosaic_tables.nearest(TABLE, key_of(p), sizes_of(p))
    return heuristic(p) if found is None else Config(*found)


def key_of(p: Problem) -> list:
    """What a tuned entry must share with a problem."""
    return [p.layout.name, str(p.kv_format.dtype), p.head_dim, p.kv_heads, p.group, p.max_q_len]


def sizes_of(p: Problem) -> dict[str, int]:
    """What may differ."""
    return {"seqs": p.seqs, "context": p.pages_per_seq * p.page_size}


def pairs(p: Problem) -> bool:
    """Whether two kv heads may share a CTA: rows of 128 bytes are slower to read than rows of 256."""
    form = form_of(p, Config())
    together = p.layout.name == "NHD" and p.head_dim * p.kv_format.dtype.itemsize == 128 and p.kv_heads % 2 == 0
    return together and form.parts == 1 and form.rows <= 16


def candidates(p: Problem) -> Iterator[Config]:
    """Every configuration that fits the shared memory; one CTA on an SM hides no latency."""
    for heads in (1, 2) if pairs(p) else (1,):
        for stages in (2, 3, 4):
            for ctas in (2, 3, 4):
                config = Config(heads, stages, ctas)
                if ctas * shared_bytes(p, config) <= SHARED:
                    yield config


def heuristic(p: Problem) -> Config:
    """The configuration where no table knows better."""
    columns, tiles = form_of(p, Config()).columns, p.seqs * -(-p.pages_per_seq * p.page_size // TILE)
    enough = tiles * columns >= FEW_TILES * SMS
    # Two CTAs an SM have 255 registers a thread: more than 128 are needed, with which four would fit. Where there is
    # little to do latency counts, and fewer workers each begin and end once.
    wanted = Config(2, 2, 2) if enough and pairs(p) else Config(1, 3, 2)
    if wanted.ctas * shared_bytes(p, wanted) > SHARED:
        wanted = dataclasses.replace(wanted, stages=2)
    return dataclasses.replace(wanted, ctas=max(1, min(wanted.ctas, SHARED // shared_bytes(p, wanted))))


def shared_bytes(p: Problem, config: Config) -> int:
    """Shared memory that one CTA takes from its SM: every array begins at a multiple of 1024."""
    form, widths = form_of(p, config), rings(p, config)
    depth, heads, size = p.head_dim, config.heads, p.kv_format.dtype.itemsize
    arrays = [config.stages * TILE * width * size for width in widths]
    arrays.append(heads * form.terms * form.rows * depth * form.operand.itemsize)
    arrays.append(heads * depth * max(TILE * 2 * (size == 1), form.rows * 4))
    arrays.append(heads * form.rows * TILE * form.wide.itemsize)
    arrays.append(heads * 2 * form.rows * 4)
    if p.kv_format.granularity == "token_head":
        arrays.append(config.stages * 2 * heads * TILE * 4)
    reduction, barriers, driver = 2048, 1024, 1024
    return sum(-(-a // 1024) * 1024 for a in arrays) + reduction + barriers + driver
