"""Loads tests/golden: inputs and outputs of real upstream kernels on an H100."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np

FOLDER = Path(__file__).parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())["cases"]
BITS = {"bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def names(file):
    return [name for name, case in INDEX.items() if case["file"] == file]


@cache
def _arrays(file):
    return dict(np.load(FOLDER / f"{file}.npz"))


def load(name):
    """(options, inputs, outputs) of a case; arrays have their true dtypes."""
    sides = {"in": {}, "out": {}}
    for key, array in _arrays(INDEX[name]["file"]).items():
        case, side, array_name = key.split("/")
        if case == name:
            array_name, _, bits = array_name.partition(":")
            sides[side][array_name] = array.view(BITS[bits]) if bits else array
    return INDEX[name]["options"], sides["in"], sides["out"]


def page_table(indptr, indices):
    """A rectangular page table of CSR pages; unused entries name page 0."""
    table = np.zeros((len(indptr) - 1, max(1, int(np.diff(indptr).max()))), np.int32)
    for b, (first, end) in enumerate(pairwise(indptr)):
        table[b, : end - first] = indices[first:end]
    return table


def attention_problem(name):
    """(arrays, kwargs) in the oracle's terms: q, k, v, page_table, kv_lens, cu_q_lens and its keyword arguments."""
    options, x, _ = load(name)
    if "kv_indptr" in x:
        pages = np.diff(x["kv_indptr"])
        kv_lens = (np.maximum(pages - 1, 0) * options["page_size"] + x["kv_last_page_len"]).astype(np.int32)
        where = page_table(x["kv_indptr"], x["kv_indices"]), kv_lens, x["qo_indptr"]
    else:
        where = x["block_table"], x["seq_lens"], x["cu_seqlens_q"]
    kwargs = {"scale": options["softmax_scale"], "causal": options["causal"]}
    kwargs |= {n: np.float32(options[n]) for n in ("q_scale", "k_scale", "v_scale") if n in options}
    if "q_descale" in x:  # [B, K]; every sequence's value here, spread over its tokens and query heads
        spread = x["q_descale"].repeat(np.diff(where[2]), 0).repeat(x["q"].shape[1] // x["q_descale"].shape[1], 1)
        kwargs |= {"q_scale": spread, "k_scale": x["k_descale"], "v_scale": x["v_descale"]}
    if "k_scale_cache" in x:
        kwargs |= {"k_scale": x["k_scale_cache"], "v_scale": x["v_scale_cache"]}
    if "per_seq_causal" in x:
        kwargs["causal"] = x["per_seq_causal"].astype(bool)
    kwargs |= {n: x[n] for n in ("sinks", "alibi_slopes") if n in x}
    renamed = {"qq_bias": "query_query", "mm_prefix_range": "prefix_ranges"}
    kwargs |= {ours: x[theirs] for theirs, ours in renamed.items() if theirs in x}
    renamed = {"window": "window", "softcap": "soft_cap", "chunk_lookback": "chunk_lookback"}
    kwargs |= {ours: options[theirs] for theirs, ours in renamed.items() if theirs in options}
    kwargs["alibi_sqrt"] = options.get("alibi") == "sqrt"
    return (x["q"], x["k_cache"], x["v_cache"], *where), kwargs
