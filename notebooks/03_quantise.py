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
# # 3. Quantise
#
# **Result:** at 8 bits every strategy costs less than 1 % of perplexity. At 4 bits
# the cost goes from 7 % with a scale per 32 weights to 194 % with one scale for the
# model. Fine-tuning with quantised weights (QAT) removes at least 30 % of what rounding
# to 4 bits costs, with each of three seeds. At 8 bits it wins nothing, and in an `int4`
# file, for which the export searches the best scales, little.
#
# ![The result](attachment:result.png)
#
# **At the end you have** a trained GPT quantised by five strategies at several sizes,
# the same GPT fine-tuned with quantised weights (QAT) beside float32 trained as long,
# and files with their size, speed and perplexity.
#
# **The article**, on GPT real-time performance: chapter 3.2, quantisation, and chapter
# 4.2, its implementation.
#
# **In gpt_tf:** [3.2](../docs/article.md#32-quantisation),
# [4.2](../docs/article.md#42-quantisation-in-tensorflow).
#
# **Time:** 5 minutes on two quiet CPU cores.

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
import logging
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tf_keras as keras
from IPython.display import Markdown, display

logging.getLogger("tensorflow").setLevel("ERROR")
started = time.perf_counter(), time.process_time()

# %% [markdown]
# Judge quantisation on a model that is trained to the end: an undertrained model hides
# the loss. `python-small` comes with gpt_tf, has 0.9 million parameters
# and was trained on Python's own sources for 6 million tokens. To quantise your own
# GPT, set `model` to its folder and `corpus` to its text.

# %% tags=["parameters"]
model = "python-small"  # yours: a folder that gpt_tf.train or tutorial 2 wrote
corpus = "python-stdlib"  # yours: a file or folder of the model's text
prompt = "def read_lines(self"  # a prompt must not end in a space
bits_to_try = (8, 6, 4)
num_windows = 100  # held-out windows to measure perplexity on
steps = 100  # of every fine-tuning
batch_size = 8
learning_rate = 4e-4  # a tenth of what the model was trained with
seeds = (0, 1, 2)
max_new_tokens = 48
repeats = 20

# %%
if model == "python-small":
    model = gpt_tf.shipped_model(model)
folder = Path("runs/notebook-03")  # everything that this notebook writes goes here
folder.mkdir(parents=True, exist_ok=True)

gpt, tokenizer, _ = gpt_tf.open_model(model)
text = gpt_tf.open_corpus(corpus)
tokens = {
    split: gpt_tf.write_token_file(
        folder / f"{split}.tokens", text.documents(split), tokenizer
    )
    for split in ("train", "validation")
}
length = gpt.context_length
held_out = tokens["validation"].tokens
starts = np.linspace(0, len(held_out) - length - 1, num_windows).astype(int)
windows = np.stack([held_out[s : s + length + 1] for s in starts]).astype(np.int32)


probe = gpt_tf.GPTModel.from_config(gpt.get_config())
probe.compile(jit_compile=False)


def perplexity_of(other):
    """Return a Keras model's perplexity on the held-out windows."""
    if isinstance(other, gpt_tf.GPTModel):  # one compiled model measures all of them
        probe.set_weights(other.get_weights())
        other = probe
    else:
        other.compile(jit_compile=False)
    loss, *_ = other.evaluate(windows[:, :-1], windows[:, 1:], batch_size=20, verbose=0)
    return float(np.exp(loss))


float_perplexity = perplexity_of(gpt)
print(f"{gpt.count_params():,} parameters, perplexity {float_perplexity:.2f}")

# %% [markdown]
# ## 1. One matrix
#
# To quantise a weight, divide it by a *scale* and round it to an integer. One large
# weight makes the scale coarse for all weights that share it. Here is one matrix in
# 8 bits, once with a scale for the whole model and once with a scale per output:

# %%
name = "block_0/up_kernel"
shared = gpt_tf.quantize_weights(gpt, "global_mean")
own = gpt_tf.quantize_weights(gpt, "per_channel")

figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
titles = "one scale for the model", "one scale per output"
for axis, weights, title in zip(axes, (shared, own), titles, strict=True):
    integers = weights.integers[name]
    axis.hist(integers.ravel(), bins=np.arange(-128.5, 129), color="#8fa8c8")
    axis.set_title(f"{title}: {len(np.unique(integers))} of 255 levels", loc="left")
    axis.set_xlabel(f"integers of {name}")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("weights")
axes[0].set_yscale("log")
plt.show()

# %% [markdown]
# With one scale for the whole model, the matrix uses part of the levels, and its
# weights crowd at the centre. With one scale per output it uses all of them; the spikes
# at the ends are each output's largest weight. The weight that an integer stands for is
# `integer * scale`:

# %%
print("weights       ", gpt.get_layer("block_0").up_kernel.numpy()[:4, 0])
print("integers      ", own.integers[name][:4, 0])
print("scale         ", np.ravel(own.scales[name])[0])
print("from integers ", own.model.get_layer("block_0").up_kernel.numpy()[:4, 0])

# %% [markdown]
# ## 2. Five strategies
#
# `quantize_weights` knows five ways to share scales; the first two are the article's
# global and layer-wise mean normalisation. `.model` is a Keras model with the weights
# that the integers stand for, so you can measure its perplexity.

# %%
strategies = ("global_mean", "layer_mean", "per_tensor", "per_channel", "blockwise")
sharing = ("the model", "a layer", "a matrix", "an output", "32 weights")
cost = {strategy: {} for strategy in strategies}
for bits in bits_to_try:
    for strategy in strategies:
        quantised = gpt_tf.quantize_weights(gpt, strategy, bits)
        cost[strategy][bits] = 100 * (
            perplexity_of(quantised.model) / float_perplexity - 1
        )

heads = " | ".join(f"{bits} bits" for bits in bits_to_try)
lines = [f"| strategy | one scale for | {heads} |"]
lines.append("|---|---|" + "---:|" * len(bits_to_try))
for strategy, whole in zip(strategies, sharing, strict=True):
    cells = " | ".join(f"{cost[strategy][bits]:+.1f} %" for bits in bits_to_try)
    lines.append(f"| `{strategy}` | {whole} | {cells} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# The table shows the change of perplexity against float32. At 8 bits every strategy is
# good enough. At 4 bits the strategy decides whether the model still works.
#
# ## 3. Calibrate activations
#
# For integer arithmetic the *activations*, the values between the layers, need a fixed
# range too. The article's `quantize_gpt_model` quantises the weights and measures the
# ranges on typical text. The method decides where a range is cut: `minmax` keeps every
# value, `percentile` drops the largest, `mse` takes the cut with the smallest error.

# %%
train = gpt_tf.Windows(tokens["train"], length, batch_size)
typical = np.concatenate([train.batch(step)[0] for step in range(20)])

for method in ("minmax", "percentile", "mse"):
    config = {"calibration_method": method}
    calibrated = gpt_tf.quantize_gpt_model(gpt, typical, config)
    increase = 100 * (perplexity_of(calibrated) / float_perplexity - 1)
    low, high = gpt_tf.activation_ranges(calibrated)["block_0/hidden_activation"]
    print(
        f"{method:10} {low:6.2f} to {high:5.2f} in block 0, "
        f"perplexity {increase:+.2f} %"
    )

# %% [markdown]
# ## 4. Fine-tune with quantised weights (QAT)
#
# *Quantisation-aware training* rounds the weights in every forward pass and lets the
# gradient pass the rounding, so the model learns weights that survive it. A model also
# improves by being trained further, without any rounding. The fair comparison is
# therefore float32 fine-tuned as long, on the same windows at the same learning rate,
# and rounded afterwards. Both run with three seeds, which decide the order of the text.

# %%
settings = {
    "8 bits, a scale per output": {"weight_bits": 8},
    "4 bits, a scale per matrix": {"weight_bits": 4, "per_channel": False},
    "4 bits, a scale per output": {"weight_bits": 4},
    "4 bits, a scale per 32 weights": {"weight_bits": 4, "block_size": 32},
}
weights_alone = {"inputs": "float32", "outputs": "float32"}  # no activations


def fine_tune(other, seed):
    """Train a model further on the corpus; the rate falls to 0."""
    falling = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    other.compile(gpt_tf.AdamW(falling, weight_decay=0.0), jit_compile=False)
    data = gpt_tf.Windows(tokens["train"], length, batch_size, seed=seed)
    other.fit(data.dataset(), steps_per_epoch=steps, verbose=0)
    return other


def increase_of(other):
    """Return by how many per cent a model's perplexity is above float32's."""
    return 100 * (perplexity_of(other) / float_perplexity - 1)


rounded = {name: [] for name in settings}
aware = {name: [] for name in settings}
kept = {}  # the models of the first seed
for seed in seeds:
    longer = gpt_tf.GPTModel.from_config(gpt.get_config())
    longer.set_weights(gpt.get_weights())
    kept.setdefault("float32, trained as long", fine_tune(longer, seed))
    for name, config in settings.items():
        config = {**config, **weights_alone}
        after = gpt_tf.quantize_aware(longer, config)
        rounded[name].append(increase_of(gpt_tf.to_rounded(after)))
        trained = fine_tune(gpt_tf.quantize_aware(gpt, config), seed)
        kept.setdefault(name, trained)
        aware[name].append(increase_of(gpt_tf.to_rounded(trained)))

for name in settings:
    print(name)
    for how, found in (("float32, then rounded", rounded), ("QAT", aware)):
        seen = "  ".join(f"{value:+6.2f} %" for value in found[name])
        print(f"    {how:22} {seen}")

# %% [markdown]
# At 8 bits with a scale per output there is nothing to win: round after training.
# (Both rows are above 0 because 100 steps at this rate move the model a little away
# from its best.) QAT pays where rounding hurts, at 4 bits, and the more so the more
# weights share a scale: +26 % instead of +79 % with a scale per matrix, +5 %
# instead of +12 % with one per output, +1.7 % instead of +2.8 % with one per 32
# weights.
#
# ## 5. Files
#
# A file is what a device runs, so measure the file. The modes:
#
# | mode | weights | activations |
# |---|---|---|
# | `float32` | float32 | float32 |
# | `dynamic_int8` | int8, a scale per output | rounded as they come |
# | `int8` | int8, a scale per output | int8 in calibrated ranges |
# | `int4` | int4, a scale per 32 weights; tables int8 | rounded as they come |
#
# `block_size=32` trains with the very scales of an `int4` file, so the file holds the
# weights as they were trained.

# %%
paths = {}
for mode in ("float32", "dynamic_int8", "int8", "int4"):
    paths[mode] = folder / f"{mode}.litertlm"
    gpt_tf.export_trained(model, paths[mode], mode, corpus=text)
for name, source in (
    ("int4, float32 trained as long", "float32, trained as long"),
    ("int4, QAT", "4 bits, a scale per 32 weights"),
):
    paths[name] = folder / f"{name.replace(', ', '-').replace(' ', '-')}.litertlm"
    gpt_tf.export_litertlm(kept[source], tokenizer, paths[name], "int4")

files = {name: gpt_tf.EdgeGPT(path, num_threads=1) for name, path in paths.items()}
prompt_ids, written = tokenizer.encode(prompt), {}
seconds = {name: [] for name in files}
for _ in range(repeats + 1):  # in turns; the first warms up
    for name, file in files.items():
        start = time.perf_counter()
        written[name] = file.generate(
            prompt_ids, max_new_tokens=max_new_tokens, temperature=0
        )
        seconds[name].append((time.perf_counter() - start) / len(written[name]))

table = {}
for name, file in files.items():
    nats = np.mean([-file.score(row).mean() for row in windows])
    table[name] = {
        "MB": paths[name].stat().st_size / 1e6,
        "ms": 1000 * float(np.median(seconds[name][1:])),
        "perplexity": float(np.exp(nats)),
        "text": tokenizer.decode(written[name]),
    }


def cell(text):
    """Return the beginning of a text as a cell of a table."""
    return "`` " + " ".join(text.split())[:80].replace("|", "\\|") + " ``"


lines = ["| file | MB | ms a token | tokens/s | perplexity | text |"]
lines.append("|---|---:|---:|---:|---:|---|")
for name, row in table.items():
    lines.append(
        f"| {name} | {row['MB']:.2f} | {row['ms']:.2f} | {1000 / row['ms']:,.0f} "
        f"| {row['perplexity']:.2f} | {cell(row['text'])} |"
    )
display(Markdown("\n".join(lines)))

# %% [markdown]
# The `int4` file of the QAT model has the lowest perplexity of the three: +1.65 %
# against float32, where the untouched model has +1.9 % and the one that was fine-
# tuned in float32 +2.6 %. Export helps the other two: it searches for each block the
# scale with the smallest error.
#
# Do not compare the times closely: in a model this small the call itself takes most of
# the time. [Tutorial 1](01_make_it_fast.ipynb) has a model of 135 million parameters,
# where fewer bits save time too.
#
# ## The result in one picture

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
colours = ("#c2410c", "#e0a184", "#9a9a9a", "#4d7c3a", "#8fa8c8")
for strategy, colour in zip(strategies, colours, strict=True):
    values = [max(cost[strategy][bits], 0.01) for bits in bits_to_try]
    left.plot(bits_to_try, values, "o-", color=colour, label=strategy)
left.set_yscale("log")
left.invert_xaxis()
left.set_xticks(bits_to_try)
left.set_yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
left.set_xlabel("bits per weight")
left.set_title("Perplexity increase by strategy", loc="left")
left.legend(frameon=False, fontsize=9)

shown = [name for name in settings if name.startswith("4")][::-1]
for row, name in enumerate(shown):
    ends = np.mean(rounded[name]), np.mean(aware[name])
    right.plot(ends, [row, row], color="#cccccc", linewidth=5, zorder=0)
    for values, label, colour in (
        (rounded[name], "float32 trained as long, then rounded", "#777777"),
        (aware[name], "QAT", "#c2410c"),
    ):
        side = "right" if label == "QAT" else "left"
        named = label if row == 0 else None
        right.plot(values, [row] * len(values), "o", color=colour, label=named)
        right.text(np.mean(values), row + 0.12, f"{np.mean(values):+.1f} %", ha=side)
right.set_xscale("log")
right.set_xlim(0.8, 200)
right.set_xticks([1, 10, 100], ["1 %", "10 %", "100 %"])
right.set_yticks(range(len(shown)), [n.removeprefix("4 bits, ") for n in shown])
right.set_ylim(-0.5, len(shown))
right.set_title(f"Perplexity increase at 4 bits, {len(seeds)} seeds each", loc="left")
right.legend(frameon=False, fontsize=9, loc="upper left")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where next
#
# - From a terminal:
#
#       gpt-tf quantize --model runs/mine --method qat --out runs/mine-int8
#       gpt-tf export --model runs/mine-int8 --mode int8 --out mine.litertlm
#
# - The functions: [quantize_weights](../gpt_tf/quantization/),
#   [quantize_gpt_model](../gpt_tf/quantization/),
#   [QuantizationConfig](../gpt_tf/quantization/);
#   the ideas: [Quantisation](../docs/concepts/quantisation.md).
# - [Tutorial 4](04_distil.ipynb) makes the same model smaller in another way.

# %%
machine = gpt_tf.describe_machine(seconds=0)
minutes = (time.perf_counter() - started[0]) / 60
cpu_minutes = (time.process_time() - started[1]) / 60
print(f"{machine['cpu']}, {machine['cores']} cores, {minutes:.1f} minutes")
results = {
    "strategy_cost_percent": {
        s: {b: round(v, 2) for b, v in cost[s].items()} for s in cost
    },
    "rounded_percent": {n: np.round(v, 2).tolist() for n, v in rounded.items()},
    "qat_percent": {n: np.round(v, 2).tolist() for n, v in aware.items()},
    "files": {
        m: {k: v for k, v in row.items() if k != "text"} for m, row in table.items()
    },
    "float_perplexity": float_perplexity,
    "minutes": round(minutes, 1),
    "cpu_minutes": round(cpu_minutes, 1),
}
print("results:", json.dumps(results))
