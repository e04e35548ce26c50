"""The Hopper kernels of MLA: what they refuse, that they lower, what they compute (interpreted, or on a GPU)."""

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from oracle import BF16, F16
from problems import relative_error

import pallas_attn as pa
from pallas_attn.core.latent_cache import abstract_latent_cache
from pallas_attn.core.quantized import quantize
from pallas_attn.ops.mla import mosaic
from pallas_attn.ops.mla.mosaic_form import Inputs, Listed, form_of, owner, share
from pallas_attn.ops.mla.problem import prepare
from pallas_attn.runtime.mosaic import Layout, divide

SCALE = 0.11
S = jax.ShapeDtypeStruct


@pytest.fixture(autouse=True)
def whole_rows(monkeypatch):
    """The kernels know one width of rows."""
    monkeypatch.setattr(latents, "dims_of", lambda format: (512, 64))


def quantised(format, q_format):
    """The format of the query: FP8 where the cache has one scale, unless told."""
    return q_format or (format if format == "E4M3_TENSOR" else None)


# ---------------------------------------------------------------- lowering


def abstract(format="BF16", heads=128, tokens=1, page_size=64, q_format=None, seqs=5, **keywords):
    """Arguments of shapes only, and the options."""
    batch = pa.RaggedBatch(S((seqs, 8), jnp.int32), S((seqs,), jnp.int32), S((seqs + 1,), jnp.int32), None, tokens)
    cache, name = abstract_latent_cache(getattr(pa, format), pages=40, page_size=page_size), quantised(format, q_format)
    every = seqs * (tokens or 1) + 3
    shape = {"E4M3_HEAD": (heads,), "E4M3_TOKEN_HEAD": (every, heads)}.get(name or "", ())

    def query(dim):
        dtype = {"F16": jnp.float16}.get(format, jnp.bfloat16)
        if name is None:
            return S((every, heads, dim), dtype)
        codes, q_scale = S((every, heads, dim), getattr(pa, name).dtype), S(shape, jnp.float32)
        return pa.Quantized(codes, q_scale, getattr(pa, name))

    return (query(512), query(64), cache, batch), {"scale": SCALE, **keywords}


def lowered(*cell, **keywords):
    """The module for a GPU that is not there: layouts, transforms and shared memory are checked."""
    arguments, options = abstract(*cell, **keywords)

    def step(topk, *arguments):
        *others, batch = arguments
        p, args = prepare(*others, batch.with_schedule(), topk=topk, **options)
        assert mosaic.supports(p) is None
        return mosaic.run(p, *args)

    return jax.jit(step).trace(options.pop("topk", None), *arguments).lower(lowering_platforms=("cuda",)).as_text()


PACKED = [pa.e4m3_group(group, ue8m0=True, order="tma", packed=True) for group in (128, 64)]
LOWERED = {
    "bf16": (("BF16", 128, 1, 64), {}),
    "listed": (("FP8_DS_MLA", 128, 1, 64), {"topk": pa.TopK(S((8, 2048), jnp.int32), slots=True)}),
    "fp8": (("E4M3_TENSOR", 16, 4, 16), {"return_lse": True, "out": PACKED[1]}),  # the most memory
    "looking up": (("FP8_DS_MLA", 128, 1, 64), {"topk": pa.TopK(S((8, 2048), jnp.int32))}),
}
MORE_LOWERED = {
    "listed floats": (("BF16", 128, 1, 64), {"topk": pa.TopK(S((8, 256), jnp.int32), slots=True)}),
    "positions": (("FP8_DS_MLA", 16, None, 64), {"topk": pa.TopK(S((8, 100), jnp.int32), S((8,), jnp.int32))}),
    "f16": (("F16", 12, 2, 128), {"out": jnp.float32}),
    "static": (("BF16", 1, 1, 32), {"out": (pa.E4M3_STATIC, 0.5)}),
    "packed": (("BF16", 24, 2, 64), {"out": PACKED[0]}),
    "listed groups": (
        ("FP8_DS_MLA", 16, 1, 64),
        {"topk": pa.TopK(S((8, 100), jnp.int32), slots=True), "out": pa.e4m3_group(64)},
    ),
    "in columns": (("E4M3_TENSOR", 16, 4, 16), {"return_lse": True, "out": pa.e4m3_group(128, order="tma")}),
    "groups": (("BF16", 128, 1, 256), {"out": pa.e4m3_group(64, ue8m0=True), "return_lse": True}),
    "fp8, 128 heads": (("E4M3_TENSOR", 128, 1, 64), {}),
    "fp8 by row": (("E4M3_TENSOR", 40, 8, 64, "E4M3_TOKEN_HEAD"), {"out": pa.e4m3_group(128, order="column")}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOWERED)
def test_lowers(name):
    cell, keywords = LOWERED[name]
    assert lowered(*cell, **keywords).count("stablehlo.custom_call @mosaic_gpu_v2") == 2  # the workers and the merge


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LOWERED)
def test_more_lowers(name):
    cell, keywords = MORE_LOWERED[name]
    assert lowered(*cell, **keywords).count("stablehlo.custom_call @mosaic_gpu_v2") == 2


REFUSED = {
    "f32": ({"format": "F32"}, "no F32 cache"),
    "e5m2": ({"format": "E5M2_TENSOR", "q_format": "E5M2_TENSOR"}, "no E5M2_TENSOR cache"),
    "page": ({"page_size": 8}, "no page size 8"),
    "query": ({"q_format": "E4M3_TENSOR"}, "no E4M3_TENSOR query on a BF16 cache"),
    "heads": ({"heads": 136}, "no 136 heads"),
    "nvfp4": ({"out": (pa.NVFP4, 0.1)}, "no NVFP4 output"),
    "up-projection": ({"w_uv": S((128, 512, 96), jnp.bfloat16)}, "no up-projection to 96"),
    "wide weights": (
        {"w_uv": S((128, 512, 128), jnp.float32)},
        "no float32 up-projection of latents from a BF16 cache",
    ),
    "f16 weights": ({"w_uv": S((128, 512, 128), jnp.float16)}, "no float16 up-projection of latents from a BF16 cache"),
    "list": ({"format": "E4M3_TENSOR", "topk": S((8, 64), jnp.int32)}, "no E4M3_TENSOR cache with a list of keys"),
    "rows": ({"format": "FP8_DS_MLA"}, "no FP8_DS_MLA cache without a list of keys"),
    "many tokens": (
        {"format": "FP8_DS_MLA", "seqs": 9000, "topk": S((9003, 64), jnp.int32)},
        "no more than 8192 tokens",
    ),
    "no sequences": ({"seqs": 0}, "an empty call"),
}


@pytest.mark.parametrize(("change", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refuses(change, reason):
    arguments, options = abstract(**change)
    assert reason in mosaic.supports(prepare(*arguments, **options)[0])


@pytest.mark.parametrize(("lengths", "heads", "live", "each"), [
    ([4096] * 128, 128, 128, 128),  # two whole sequences instead of 125 tiles
    ([32768] * 128, 128, 128, 993),  # three percent more would be a lot
    ([4096] * 32, 128, 32, 32),
    ([64 * 64] * 100 + [0] * 28, 128, 100, 97),
    ([1000, 64] * 64, 128, 128, 17),
    ([0, 0], 128, 2, 1),
])  # fmt: skip
def test_shares(lengths, heads, live, each):
    """Tiles of a worker, of so many sequences."""
    seqs, nothing = len(lengths), [None] * len(Inputs._fields)
    batch = pa.RaggedBatch(S((seqs, 512), jnp.int32), S((seqs,), jnp.int32), S((seqs + 1,), jnp.int32), max_q_len=1)
    query = S((seqs, heads, 512), jnp.bfloat16), S((seqs, heads, 64), jnp.bfloat16)
    p = prepare(*query, abstract_latent_cache(pa.BF16), batch, scale=SCALE)[0]
    before = jnp.cumsum(jnp.array([0, *(-(-n // 64) for n in lengths)], jnp.int32))
    x = Inputs(*nothing)._replace(before=before, live=jnp.array([live], jnp.int32))
    total, got = share(x, form_of(p))
    assert (int(total), int(got)) == (int(before[-1]), each)


@pytest.mark.parametrize(("q_lens", "live", "tokens"), [
    ((1, 1, 1, 1), None, 6),
    ((1, 1, 1, 1), 2, 4),
    ((2, 0, 0, 3, 1, 0), 5, 9),
    ((0, 0, 4), None, 4),
    ((5,), 0, 5),
])  # fmt: skip
def test_owners(q_lens, live, tokens):
    """Whose token each one is, and whether it is anybody's."""
    cu_q_lens = jnp.asarray(np.concatenate([[0], np.cumsum(q_lens)]), jnp.int32)
    nothing = jnp.zeros((len(q_lens), 1), jnp.int32)
    batch = pa.RaggedBatch(nothing, nothing[:, 0], cu_q_lens, None if live is None else jnp.int32(live))
    x = Listed(cu_q_lens, batch.live.reshape(1), None, None)
    found = jnp.array([owner(x, jnp.int32(t)) for t in range(tokens)])
    seq, _, real = batch.tokens(tokens)
    np.testing.assert_array_equal(found[:, 1], real)
    np.testing.assert_array_equal(found[real, 0], seq[real])


# ---------------------------------------------------------------- results


def problem(rng, format, heads, tokens, page_size, q_format, q_lens=None, kv_lens=None):
    """Sequences of several tiles, in several parts, short and empty ones, tokens before the first key, padding."""
    n = tokens
    q_lens, kv_lens = q_lens or (n, 1, 0, n, 1), kv_lens or (200, 64, 0, max(n - 1, 1), 130)
    return latents.make(
        rng, format, q_lens, kv_lens, heads=heads, page_size=page_size, q_dtype=F16 if format == "F16" else BF16,
        q_format=quantised(format, q_format), spare_seqs=1, spare_tokens=2,
    )  # fmt: skip


def check(rng, run, format, heads, tokens, page_size, q_format=None, **shape):
    """Values and LSE against the oracle, in float32."""
    random = problem(rng, format, heads, tokens, page_size, q_format, **shape)
    arguments = random.arguments(max_q_len=tokens)
    out, lse = run(*arguments, scale=SCALE, out=jnp.float32, return_lse=True)
    want, want_lse = random.expected(SCALE)
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    assert relative_error(out, want) <= (8e-3 if len(out) < 40 else 1.2e-2)  # of any row: prefill has up to 80,000
    np.testing.assert_allclose(lse, want_lse, atol=1e-2, rtol=1e-3)


def check_groups(rng, run, out, format, heads, tokens, page_size, q_format=None, **shape):
    """Scales and codes are those of the float32 result, up to its own error; what fills up rows is there."""
    random = problem(rng, format, heads, tokens, page_size, q_format, **shape)
    codes, scale = run(*random.arguments(max_q_len=tokens), scale=SCALE, out=out)
    want = random.expected(SCALE)[0]
    whole = quantize(jnp.asarray(want, jnp.float32).reshape(len(want), -1), out)
    # A scale that is a power of two may be the next one.
    other = np.abs(numbers(scale) / numbers(whole.scale) - 1) > 8e-3
    assert np.mean(other) <= (0.01 if out.ue8m0 else 0)
    got = pa.dequantize(pa.Quantized(codes, scale, out))
    assert relative_error(np.asarray(got), want.reshape(len(want), -1)) <= 2**-4
    assert np.mean(np.asarray(codes, np.float32) != np.asarray(whole.values, np.float32)) < 0.05


def numbers(scale):
    """Scales in memory, packed ones as the powers of two that they are."""
    scale = np.asarray(scale)
    return np.exp2(scale.view(np.uint8) - 127.0) if scale.dtype == np.int32 else scale


def runner(workers):
    def run(*arguments, **options):
        p, args = prepare(*arguments, **options)
        assert mosaic.supports(p) is None
        return mosaic.run(p, *args, workers=workers)

    return run


def listed(rng, random, keys, cut):
    """(positions [T, keys], slots [T, keys], lengths [T], the slots that each token sees): -1 and numbers of nothing
    anywhere, keys that stand twice, one token with none."""
    tokens, end = len(random.q), random.pages.shape[0] * random.pages.shape[1]
    positions, slots = (np.full((tokens, keys), 10**6, np.int32) for _ in range(2))
    lengths = rng.integers(1, keys + 5, tokens).astype(np.int32) if cut else np.full(tokens, keys, np.int32)
    seen = [np.zeros(0, int)] * tokens
    for b in range(random.num_seqs):
        for token in range(*random.cu_q_lens[b : b + 2]):
            found = rng.integers(0, max(random.kv_lens[b], 1), keys)
            real = (rng.random(keys) < (0.7 if token else 0)) & (random.kv_lens[b] > 0)
            where = random.slots(b, found) if random.kv_lens[b] else found
            positions[token] = np.where(real, found, rng.choice([-1, -(2**31), 10**6], keys))
            slots[token] = np.where(real, where, rng.choice([-1, end, 2**31 - 1], keys))
            seen[token] = where[: lengths[token]][real[: lengths[token]]]
    return positions, slots, lengths, seen


def check_listed(
    rng, run, format, heads, keys, by_slot, q_dtype=BF16, q_lens=(2, 1, 0, 1), kv_lens=(150, 100, 0, 3), cut=True
):
    random = latents.make(
        rng, format, q_lens, kv_lens, heads=heads, page_size=32, q_dtype=q_dtype, spare_seqs=1, spare_tokens=2
    )
    positions, slots, lengths, seen = listed(rng, random, keys, cut)
    topk = pa.TopK(jnp.asarray(slots if by_slot else positions), jnp.asarray(lengths) if cut else None, by_slot)
    out, lse = run(*random.arguments(), scale=0.05, out=jnp.float32, return_lse=True, topk=topk)
    want, want_lse = random.expected(0.05, seen)
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    np.testing.assert_allclose(lse, want_lse, atol=1e-2)


SHORT = {"q_lens": (2, 1, 0, 2), "kv_lens": (130, 64, 0, 1)}


def test_interpreted(rng, monkeypatch):
    """Sequences in two parts, several blocks of rows, heads that are filled up, pages smaller than tiles."""
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    check(rng, runner(2), "BF16", 36, 2, 16, **SHORT)


def test_interpreted_fp8(rng, monkeypatch):
    """One worker: no result is partial. Scales differ from row to row."""
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    out = pa.e4m3_group(64, ue8m0=True, order="tma")
    check_groups(rng, runner(1), out, "E4M3_TENSOR", 8, 2, 64, "E4M3_TOKEN_HEAD", **SHORT)


def test_interpreted_packed(rng, monkeypatch):
    """Scales of whole sequences, of parts and of padding, as exponents."""
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    check_groups(rng, runner(2), PACKED[0], "BF16", 8, 1, 64, None, q_lens=(1, 1), kv_lens=(70, 64))


SLOW = [pytest.param("BF16", 70, marks=pytest.mark.slow), pytest.param("FP8_DS_MLA", 330, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("format", "keys"), [("FP8_DS_MLA", 70), *SLOW])
def test_interpreted_listed(format, keys, rng, monkeypatch):
    """Keys that are listed by position, tokens in two parts."""
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    check_listed(rng, runner(3), format, 8, keys, by_slot=False)


LOOKS = [
    ("FP8_DS_MLA", False, False), pytest.param("FP8_DS_MLA", False, True, marks=pytest.mark.slow),
    pytest.param("FP8_DS_MLA", True, False, marks=pytest.mark.slow),
    pytest.param("BF16", False, False, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("format", "by_slot", "cut"), LOOKS)
def test_interpreted_looking_up(format, by_slot, cut, rng, monkeypatch):
    """Kernels that find a token's sequence, and its keys' slots, themselves."""
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams())
    check_listed(rng, runner(3), format, 8, 70, by_slot, cut=cut)


CELLS = [
    (format, heads, tokens, page_size, q_format)
    for format, q_format in (("BF16", None), ("F16", None), ("E4M3_TENSOR", None), ("E4M3_TENSOR", "E4M3_TOKEN_HEAD"))
    for heads, tokens, page_size in (
        (128, 1, 64),
        (16, 1, 64),
        (128, 2, 16),
        (1, 3, 128),
        (40, 8, 32),
        (96, 1, 256),
        (56, 1, 64),
    )
]
LONG = {"q_lens": (1,) * 6, "kv_lens": (1, 64, 1000, 5000, 700, 65)}


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [None, 1, 7])
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c)))
def test_on_a_gpu(cell, workers, rng):
    check(rng, runner(workers), *cell)
    if cell[2] == 1:
        check(rng, runner(workers), *cell, **LONG)


OUTPUTS = [pa.e4m3_group(g, ue8m0=u, order=o) for g, u, o in (
    (128, False, "row"), (128, True, "column"), (64, False, "tma"), (64, True, "row")
)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [None, 1])
@pytest.mark.parametrize("out", OUTPUTS, ids=str)
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR"])
def test_groups_on_a_gpu(format, out, workers, rng):
    check_groups(rng, runner(workers), out, format, 128, 1, 64)
    check_groups(rng, runner(workers), out, format, 24, 3, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("out", PACKED, ids=str)
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR"])
def test_packed_on_a_gpu(format, out, rng, monkeypatch):
    check_groups(rng, runner(None), out, format, 128, 1, 64)
    check_groups(rng, runner(1), out, format, 24, 3, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["BF16", "E4M3_TENSOR"])
def test_same_bits_every_time(format, rng):
    random = problem(rng, format, 128, 1, 64, None, **LONG)
    step = jax.jit(lambda *a: runner(None)(*a, scale=SCALE, return_lse=True))
    first, *others = (jax.tree.map(np.asarray, step(*random.arguments(max_q_len=1))) for _ in range(20))
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
def test_a_static_scale_on_a_gpu(rng):
    random = problem(rng, "BF16", 128, 1, 64, None)
    (codes,) = runner(None)(*random.arguments(max_q_len=1), scale=SCALE, out=(pa.E4M3_STATIC, 0.01))
    want = quantize(jnp.asarray(random.expected(SCALE)[0], jnp.float32), pa.E4M3_STATIC, 0.01).values
    assert np.mean(np.asarray(codes, np.float32) != np.asarray(want, np.float32)) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["a scale", "its reciprocal", "ends"])
def test_midrange_quotients_are_those_of_ieee(what, rng):
    n = 4096
    x = np.exp2(rng.uniform(-33, 127, n)).astype(np.float32)
    y = np.full(n, 448, np.float32)
    if what == "its reciprocal":
        x, y = np.ones(n, np.float32), x / y
    if what == "ends":
        x[:4], y[:4] = (np.inf, 1, 0, np.nan), (448, np.inf, 448, 1)
    layout = Layout.WG_STRIDED((n,), vec_size=1)

    def body(x, y, out):
        load = lambda ref: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        out[...] = divide(load(x), load(y), layout, interpret=False, midrange=True)

    got = plgpu.kernel(body, out_type=S((n,), jnp.float32))(x, y)
    np.testing.assert_array_equal(np.asarray(got), x / y)


MANY = {"q_lens": (1,) * 9, "kv_lens": (5000, 1, 64, 65, 3000, 700, 2, 128, 999)}


KEYS = [
    ("FP8_DS_MLA", 128, 2048, True, BF16), ("FP8_DS_MLA", 16, 100, False, F16), ("FP8_DS_MLA", 1, 64, True, BF16),
    ("BF16", 128, 2048, False, BF16), ("F16", 40, 320, True, F16),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [None, 1, 7])
@pytest.mark.parametrize("cell", KEYS, ids=lambda c: "-".join(map(str, c[:4])))
def test_listed_on_a_gpu(cell, workers, rng):
    check_listed(rng, runner(workers), *cell)
    check_listed(rng, runner(workers), *cell, **MANY)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("cell", KEYS, ids=lambda c: "-".join(map(str, c[:4])))
def test_looking_up_on_a_gpu(cell, cut, rng):
    check_listed(rng, runner(None), *cell, cut=cut)
    check_listed(rng, runner(7), *cell, **MANY, cut=cut)
    check_listed(rng, runner(1), *cell, q_lens=(3, 0, 2), kv_lens=(700, 5, 90), cut=cut)


@pytest.mark.gpu
@pytest.mark.parametrize("by_slot", [True, False])
def test_nothing_but_kernels_on_a_gpu(by_slot):
    """A listed decode step is its two launches."""
    arguments, options = abstract("FP8_DS_MLA", 128, 1, 64)
    topk = pa.TopK(S((8, 2048), jnp.int32), slots=by_slot)
    step = jax.jit(lambda topk, *arguments: runner(None)(*arguments, topk=topk, **options))
    text = step.lower(topk, *arguments).compile().as_text() or ""
    assert text.count("custom-call(") == 2
    assert "fusion(" not in text
    assert "copy(" not in text
