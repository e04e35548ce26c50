# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Roofline: how fast could paged decode be, and how fast is it?
#
# "189 microseconds" says nothing by itself. This notebook gives the number three neighbours: the time that the machine
# cannot beat, the time that a plain read of the same bytes takes, and the times of other libraries. All of it is
# computed from files, and follows new results: `bench/results/*.jsonl`, written by `python -m bench run`, and
# `bench/peers/h100.json`, the same cases measured with other libraries.

# %%
import json
import re

import jax
import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

from bench import __main__ as bench
from bench import cases, record
from pallas_attn.core.arch import H100

measured = [r for path in sorted(record.RESULTS.glob("*.jsonl")) for r in record.read(path) if "H100" in r.device]
ours = {}  # the fastest backend of each case
for r in sorted(measured, key=lambda r: -r.us):
    ours[r.case] = r
peers = json.loads(cases.PEERS.read_text())
all_cases = cases.all_cases()
decode = {name: r for name, r in ours.items() if name in all_cases and all_cases[name].op == "decode"}
dates, versions = ({getattr(r, field) for r in decode.values()} for field in ("date", "jax"))
print(f"{len(decode)} decode cases on {', '.join({r.device for r in decode.values()})}: {dates}, jax {versions}")

# %% [markdown]
# ## One case, byte by byte
# 32 sequences of 8192 cached tokens, one new query token each; 32 query heads share 8 heads of keys and values of
# dimension 128, stored in FP8: one byte a number. A decode step must read every cached key and value once, for each
# belongs to exactly one sequence. So count the bytes that have to cross the memory bus at least once.

# %%
NAME = "dec_l8_b32_c8192_p64_qbf16"
case = all_cases[NAME]
tokens = sum(kv for _, kv in case.seqs)
rows = case.tokens * case.q_heads * case.head_dim
parts = {
    "keys, 1 byte each": tokens * case.kv_heads * case.head_dim,
    "values, 1 byte each": tokens * case.kv_heads * case.head_dim,
    "queries, 2 bytes each": 2 * rows,
    "output, 2 bytes each": 2 * rows,
    "page numbers, 4 bytes each": 4 * sum(-(-kv // case.page_size) for _, kv in case.seqs),
}
assert sum(parts.values()) == case.bytes
print(tabulate([(n, b, b / case.bytes) for n, b in (*parts.items(), ("sum", case.bytes))],
               headers=["what", "bytes", "share"], floatfmt=(".0f", ".0f", ".4f")))  # fmt: skip

# %% [markdown]
# Keys and values are nearly all of it; everything else hardly counts. That is why FP8 pages matter in decode: they
# halve the one thing that costs time.
#
# ## The floor
# Divide the bytes by the bandwidth on the data sheet, and the arithmetic by the speed of the matrix units. Both must be
# done, and they can overlap: the larger one is the floor.

# %%
by_memory, by_arithmetic = 1e6 * case.bytes / H100.memory, 1e6 * case.flops / H100.bf16
print(f"memory:     {case.bytes / 1e6:7.1f} MB     / {H100.memory / 1e12:.2f} TB/s    = {by_memory:7.2f} us")
print(f"arithmetic: {case.flops / 1e9:7.1f} GFLOP  / {H100.bf16 / 1e12:.0f} TFLOP/s   = {by_arithmetic:7.2f} us")
print(f"floor: {case.floor_us:.1f} us, {case.flops / case.bytes:.1f} operations for each byte")

# %% [markdown]
# ## The streaming ceiling
# No program reads at the data sheet's bandwidth: refresh, row changes and the way there take their share. What XLA
# reaches with a plain read of a large array was measured on the machine of the peers; a kernel whose only job is to
# read could hope for about that. It is a yardstick, not a law: long reads in another order can come out slightly above.

# %%
(read,) = re.findall(r"read (\d+) GB/s", peers["what"])
ceiling = 1e9 * float(read) / H100.memory
above = [name for name, r in decode.items() if r.frac_of_floor > ceiling]
print(
    f"plain read: {read} GB/s, {ceiling:.3f} of the data sheet; {len(above)} of {len(decode)} decode cases are above it"
)
print("\n".join(above))

# %% [markdown]
# ## The ladder of one case
# From the floor upwards: every step is time that somebody spends on something else than moving bytes. The peers were
# timed by replays of a CUDA graph with a cold L2 (JAX's by the sum of their kernels), ours from the first kernel's
# start to the last one's end with the L2 emptied by reading; the host counts for nobody. How the L2 was emptied for the
# peers is not recorded, and a flush that writes costs the next op about 10 us (bench/NOTES.md): do not read much into a
# few per cent. Accuracy differs too, as the note below the picture says.

# %%
(row,) = [c for c in peers["cases"] if c["name"] == NAME]
ladder = {"floor": case.floor_us, "floor at the streaming ceiling": case.floor_us / ceiling}
ladder |= {f"pallas_attn ({ours[name].layout})": ours[name].us for name in (NAME, f"{NAME}_hnd") if name in ours}
ladder |= {name: us for name, us in row["peers_us"].items() if us}
order = sorted(ladder, key=ladder.__getitem__, reverse=True)
colours = ["#d9793d" if "pallas_attn" in n else "0.45" if "floor" in n else "#9db8d2" for n in order]
figure, axis = plt.subplots(figsize=(9, 0.38 * len(order) + 0.8), layout="constrained")
bars = axis.barh(order, [ladder[n] for n in order], color=colours)
axis.bar_label(bars, [f"{ladder[n]:.0f} us  ({case.floor_us / ladder[n]:.2f})" for n in order], padding=3, fontsize=8)
axis.set(xlim=(0, 1.2 * max(ladder.values())), xlabel=f"{NAME}: microseconds (share of the floor's speed)")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
print(peers["notes"])

# %% [markdown]
# Where do the microseconds between the ceiling and us go? Two parts can be told apart: the pauses between kernels (the
# span minus the sum of the kernels) and what the kernels take longer than a plain read would.

# %%
for name in (NAME, f"{NAME}_hnd"):
    if name in ours and ours[name].kernel_sum_us:
        r = ours[name]
        print(f"{name}: {r.us:.1f} us = {r.floor_us:.1f} floor + {r.floor_us / ceiling - r.floor_us:.1f} to the ceiling"
              f" + {r.kernel_sum_us - r.floor_us / ceiling:.1f} in the kernels"
              f" + {r.us - r.kernel_sum_us:.1f} between {r.launches} launches")  # fmt: skip

# %% [markdown]
# ## All decode cases under the roof
# Across: operations for each byte, which the problem fixes. Upwards: operations a second. Left of the ridge memory is
# the roof, right of it the matrix units. Sharing keys and values among more query heads moves a case to the right
# for hardly any time, as the lines below the picture show: the same bytes, more arithmetic.

# %%
intensity = {name: all_cases[name].flops / all_cases[name].bytes for name in decode}
figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
x = np.geomspace(4, 2000, 200)
for peak, label in ((H100.bf16, "bf16 matrix units"), (H100.fp8, "FP8 matrix units")):
    axis.plot(x, np.minimum(x * H100.memory, peak) / 1e12, color="0.3", linewidth=1)
    axis.text(1900, peak / 1e12, label, ha="right", va="bottom", fontsize=8)
axis.plot(x, np.minimum(x * H100.memory * ceiling, H100.fp8) / 1e12, color="0.3", linestyle=":", linewidth=1)
axis.text(4.2, 4.2 * H100.memory * 1.15 / 1e12, f"{H100.memory / 1e12:.2f} TB/s", rotation=33, fontsize=8)
flops = {name: all_cases[name].flops for name in decode}
against = {name: all_cases[name].best_peer for name in decode if not name.endswith("_hnd")}
best = [(intensity[n], flops[n] / p[1] / 1e6) for n, p in against.items() if p]
axis.scatter(*zip(*best, strict=True), marker="_", s=120, color="#3b6ea5", label="fastest peer of the case")
points = [(intensity[name], r.tflops) for name, r in decode.items()]
axis.scatter(*zip(*points, strict=True), s=18, color="#d9793d", label="pallas_attn", zorder=3)
axis.set(xscale="log", yscale="log", xlabel="operations for each byte", ylabel="TFLOP/s", xlim=(4, 2000))
axis.legend(loc="lower right")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
ridge = H100.bf16 / H100.memory
low, high, left = min(intensity.values()), max(intensity.values()), sum(i < ridge for i in intensity.values())
print(
    f"the ridge is at {ridge:.0f} operations a byte; cases: {low:.0f} to {high:.0f}, {left} of {len(decode)} left of it"
)
for name in (NAME, NAME.replace("l8", "l70")):
    if name in decode:
        print(f"{name}: {all_cases[name].q_heads} query heads on {all_cases[name].kv_heads}, {decode[name].us:.1f} us")

# %% [markdown]
# ## Small steps cost time, not bandwidth
# Points far below the roof are small problems. A line explains them: a fixed time for starting kernels, waiting for the
# first bytes and combining partial results, plus the bytes at a constant rate. The two numbers are fitted here to all
# decode cases, in relative terms, so that small ones count as much as large ones.

# %%
sizes, times = np.array([(all_cases[name].bytes, r.us) for name, r in decode.items()]).T
(fixed, per_byte), *_ = np.linalg.lstsq(np.stack([1 / times, sizes / times], axis=1), np.ones(len(times)), rcond=None)
print(f"time = {fixed:.1f} us + bytes / {1e-6 / per_byte:.2f} TB/s; "
      f"median misfit {np.median(np.abs((fixed + per_byte * sizes) / times - 1)):.1%}")  # fmt: skip
figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
span = np.geomspace(sizes.min(), sizes.max(), 200)
axis.plot(
    span / 1e6, span / H100.memory * 1e6 / (fixed + per_byte * span), color="0.4", label="fixed time + constant rate"
)
axis.scatter(
    sizes / 1e6, [r.frac_of_floor for r in decode.values()], s=18, color="#d9793d", label="pallas_attn", zorder=3
)
shares = [(all_cases[n].bytes / 1e6, all_cases[n].floor_us / p[1]) for n, p in against.items() if p]
axis.scatter(*zip(*shares, strict=True), marker="_", s=120, color="#3b6ea5", label="fastest peer of the case")
axis.axhline(ceiling, color="0.6", linestyle=":")
axis.set(xscale="log", ylim=(0, 1), xlabel="MB that must be moved", ylabel="share of the floor's speed")
axis.legend(loc="lower right", fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Against the fastest peer, case by case
# Above 1 the peer takes longer. The peers keep their caches in NHD, and so do the cases here.

# %%
ratios = sorted(((n, p[0], p[1], ours[n].us, p[1] / ours[n].us) for n, p in against.items() if p), key=lambda x: -x[-1])
print(tabulate(ratios, headers=["case", "fastest peer", "us", "pallas_attn us", "ratio"], floatfmt=".2f"))
print(f"\nfaster than every peer in {sum(r[-1] > 1 for r in ratios)} of {len(ratios)} cases, "
      f"median ratio {np.median([r[-1] for r in ratios]):.2f}")  # fmt: skip

# %% [markdown]
# ## A whole step
# In a model each layer also writes its new keys and values. The cases `layers32_*` run 32 layers of write and attention
# in a `lax.scan`; what is not spent in the library's kernels is the price of the loop around them.

# %%
steps = [r for name, r in ours.items() if name.startswith("layers")]
for r in steps:
    outside = "" if r.outside_us is None else f", {r.outside_us / (r.kernel_sum_us or r.us):.1%} of it in other kernels"
    print(f"{r.case}: {r.us:.0f} us, {r.frac_of_floor:.2f} of the floor, {r.launches} launches{outside}")
print("" if steps else "not measured yet: python -m bench run --op layers")

# %% [markdown]
# ## Again, here
# On a machine with a GPU the case is measured now; the floor remains that of an H100. Elsewhere there is nothing to
# compare, and the cell says so.

# %%
if jax.default_backend() == "gpu":
    again = bench.one(case, None, repeat=11)
    print(again if isinstance(again, str) else again.line())
else:
    print("no GPU here: `python -m bench run --op decode --peers` on a machine that has one")
