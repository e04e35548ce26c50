"""The bench of a whole layer's attention: it runs, its kernels belong to parts, its Hopper form lowers."""

import jax
import jax.numpy as jnp
import pytest

import pallas_attn as pa
from bench import mla_layer
from bench.timing import Kernel

S = jax.ShapeDtypeStruct
CASE = mla_layer.all_cases()["mla_layer_b32_c32768"]


def test_floors_are_those_of_the_shares():
    projections = 2 * 2 * 128 * 512 * 128
    result = 32 * 128 * (128 + 4)
    assert CASE.bytes == CASE.indexer.bytes + CASE.attention.bytes + projections + result
    assert CASE.floor_us == pytest.approx(
        CASE.indexer.floor_us + CASE.attention.floor_us + 1e6 * projections / 3.35e12, rel=1e-3
    )


def abstract(case):
    """The arguments, of shapes only."""
    tokens, heads, pages, bf16 = case.seqs, case.heads, case.context // 64, jnp.bfloat16
    caches = (
        pa.LatentCache(S((tokens * pages, 64, 656), jnp.uint8), pa.FP8_DS_MLA),
        pa.IndexCache(S((tokens * pages, 64, 132), jnp.uint8), pa.INDEX_NORMAL),
    )
    x = mla_layer.Inputs(
        S((tokens, heads, 192), bf16), S((tokens, 512), bf16), S((tokens, 64), bf16),
        S((tokens, case.index_heads, 128), bf16), S((tokens, 128), bf16), S((tokens, case.index_heads), jnp.float32),
        S((heads, 128, 512), bf16), S((heads, 512, 128), bf16),
    )  # fmt: skip
    table = S((tokens, pages), jnp.int32)
    batch = pa.RaggedBatch(table, S((tokens,), jnp.int32), S((tokens + 1,), jnp.int32), max_q_len=1)
    return caches, x, batch


def test_a_step_has_the_shapes_of_the_layer():
    caches, (codes, scales) = jax.eval_shape(mla_layer.operation(CASE, "xla"), *abstract(CASE))
    assert [c.pages.shape for c in caches] == [(32 * 512, 64, 656), (32 * 512, 64, 132)]
    assert (codes.shape, codes.dtype, scales.shape) == ((32, 128 * 128), jnp.float8_e4m3fn, (32, 128))


@pytest.mark.slow
def test_a_step_writes_what_it_reads():
    """The caches come back written, and the step's own tokens are among its keys."""
    case = CASE.small()
    caches, x, batch = mla_layer.arguments(case)
    step = jax.jit(mla_layer.operation(case, "xla"))
    (latents, keys), (codes, scales) = step(caches, x, batch)
    assert (codes.shape, scales.shape) == ((2, 8 * 128), (2, 8))
    slots = batch.slot_mapping(2, 64)
    rows = [c.pages.reshape(-1, c.pages.shape[-1]) for c in (caches[0], latents)]
    changed = jnp.flatnonzero((rows[0] != rows[1]).any(axis=1))
    assert set(changed.tolist()) == set(slots.tolist())
    assert (keys.pages != caches[1].pages).any()
    again = step((latents, keys), x, batch)[1]
    assert (again[0] == codes).all()
    assert (step(caches, x._replace(latent=9 * x.latent), batch)[1][0] != codes).any()


PROGRAM = """
  %fusion.3 = bf16[2]{0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="jit(step)/rope/mul" source_line=3}
  ROOT %custom-call.7 = (f8e4m3fn[2]) custom-call(%b), metadata={op_name="jit(step)/attention/up-projection/pallas"}
  %copy.1 = bf16[2]{0} copy(%c), metadata={op_name="jit(step)/stranger/copy"}
"""


def test_kernels_belong_to_the_innermost_part():
    assert mla_layer.scopes_of(PROGRAM) == {"fusion.3": "rope", "custom-call.7": "up-projection"}
    call = [
        Kernel(0, 1000, False, False, "loop", "fusion.3"), Kernel(1500, 3500, False, False, "loop", "fusion.3"),
        Kernel(4000, 14000, False, True, "mosaic_up", "custom-call.7"), Kernel(15000, 20000, False, False, "copy", ""),
    ]  # fmt: skip
    first, second, last = mla_layer.parts([call, call], mla_layer.scopes_of(PROGRAM))
    assert first == ("rope", 3.0, {"loop": 3.0})
    assert second == ("up-projection", 10.0, {"mosaic_up": 10.0})
    assert last == ("no part", 5.0, {"copy": 5.0})
    assert "mosaic_up 10.0" in second.line()
    assert mla_layer.helpers([call, call]) == (8.0, {"copy": 5.0})


def test_without_a_gpu_there_are_no_parts():
    assert list(mla_layer.beside(CASE.small(), None, 1)) == []


@pytest.mark.slow
def test_the_hopper_form_lowers():
    step = jax.jit(mla_layer.operation(CASE, "mosaic"), donate_argnums=0)
    text = step.trace(*abstract(CASE)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 5  # logits, top-k, attention, merge, up-projection
