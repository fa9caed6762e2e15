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
# **At the end you will have** a small GPT whose weights were made integers in five ways
# and at several sizes, the same GPT trained to live with integers, five files of it,
# and what each cost in accuracy, measured on the file.
#
# **The article**, on GPT real-time performance: chapter 3.2, quantisation. Its steps
# are ours: choose a strategy, quantise the weights, quantise the model with
# `quantize_gpt_model` on TF-MOT, train on.
#
# A trained GPT is made of 32-bit numbers. A device that answers in real time spends
# most of its time fetching them from memory, once for every token. With 8 bits each
# there is a quarter to fetch. What does that cost?
#
#     GPTModel -> strategies -> quantisation-aware training -> files -> perplexity
#
# Run the cells from top to bottom; on two processor cores that takes two minutes.
# Tutorial 1 explains the words for training.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

# Where gpt_tf is missing, as in Colab, it is installed: from a clone, if one is near.
if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    near = (Path(".."), *Path().iterdir())
    clones = [path for path in near if (path / "gpt_tf/__init__.py").is_file()]
    if clones:
        source = clones[0].resolve().as_uri()
    else:
        source = "git+" + input("Address of the git repository of gpt_tf: ")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"gpt-tf[train,explain] @ {source}"], check=True)

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow: errors only, please

import matplotlib.pyplot as plt
import numpy as np
import tf_keras as keras

import gpt_tf

# %% tags=["parameters"]
corpus = "python-stdlib"  # or the path of a folder of your own text
vocab_size = 1024  # V
context_length = 64  # T
batch_size = 32  # B
embedding_dim = 128  # C
num_layers = 3
num_heads = 4
steps = 400
qat_steps = 100
bits_to_try = (8, 6, 5, 4)
num_windows = 100  # held-out windows to measure on
jit_compile = "auto"  # XLA; "off" starts sooner, and every step takes longer

# %%
folder = Path("runs/notebook-03")  # everything that this notebook writes goes here

# %% [markdown]
# ## A trained model
#
# As in tutorial 1, in one call.

# %%
trained = gpt_tf.train(
    out=folder / "float",
    corpus=corpus,
    vocab_size=vocab_size,
    embedding_dim=embedding_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    context_length=context_length,
    batch_size=batch_size,
    steps=steps,
    learning_rate=5e-3,
    warmup_steps=steps // 10,
    validate_every=steps // 2,
    validation_batches=20,
    jit_compile=jit_compile,
    overwrite=True,
    verbose=False,
)
model, tokenizer = trained.model, trained.tokenizer

print(f"validation perplexity {trained.validation_perplexity:.2f}")

# %% [markdown]
# ## Step 1: a strategy
#
# To quantise a weight is to divide it by a *scale* and to round. The question is which
# weights share a scale. `quantize_weights` knows five strategies; the first two are the
# article's global and layer-wise mean normalisation:
#
# | strategy | what shares a scale |
# |---|---|
# | `global_mean` | all weights of the model, centred on their mean |
# | `layer_mean` | all weights of a layer, centred on their mean |
# | `per_tensor` | one matrix |
# | `per_channel` | the weights of one output of a matrix |
# | `blockwise` | 32 weights of one output |
#
# One large weight makes the steps coarse for all that share its scale. Here is a matrix
# of the first block, its weights as 8-bit integers, when the whole model shares a scale
# and when each output has its own:

# %%
name = "block_0/up_kernel"
shared = gpt_tf.quantize_weights(model, "global_mean")
own = gpt_tf.quantize_weights(model, "per_channel")

figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, weights in zip(axes, (shared, own), strict=True):
    integers = weights.integers[name]
    axis.hist(integers.ravel(), bins=np.arange(-128.5, 129), color="#8fa8c8")
    used = len(np.unique(integers))
    axis.set_title(f"{weights.strategy}: {used} different values", loc="left")
    axis.set_xlabel(f"integers of {name}")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("weights")
axes[0].set_yscale("log")
plt.show()

# %% [markdown]
# ## Step 2: the weights
#
# On the left most of the steps lie idle. On the right every output uses all of its own;
# the two columns at the ends are the outputs' largest weights. An integer stands for
# `integer * scale`. Four weights of one output, and what became of them:

# %%
print("weights       ", model.get_layer("block_0").up_kernel.numpy()[:4, 0])
print("integers      ", own.integers[name][:4, 0])
print("scale         ", np.ravel(own.scales[name])[0])
print("from integers ", own.model.get_layer("block_0").up_kernel.numpy()[:4, 0])

# %% [markdown]
# How good is an approximation? The *signal-to-noise ratio* (SNR) says how large the
# weights are beside the error of rounding them; every 6 dB is one bit. What counts is
# the perplexity on held-out text. `own.model` and its like are models with the numbers
# that the integers stand for, so it can be measured:

# %%
tokens = gpt_tf.TokenFile.open(folder / "float" / "data" / "validation.tokens").tokens
starts = np.linspace(0, len(tokens) - context_length - 1, num_windows).astype(int)
windows = np.stack([tokens[start : start + context_length + 1] for start in starts])
windows = windows.astype(np.int32)  # (N, T + 1)

probe = gpt_tf.GPTModel.from_config(model.get_config())
probe.compile(jit_compile=False)


def perplexity_of(other):
    """Return the perplexity of a GPT of these sizes on the held-out windows."""
    probe.set_weights(other.get_weights())
    loss, *_ = probe.evaluate(
        windows[:, :-1], windows[:, 1:], batch_size=batch_size, verbose=0
    )
    return np.exp(loss)


strategies = ("global_mean", "layer_mean", "per_tensor", "per_channel", "blockwise")
float_perplexity = perplexity_of(model)
snr_db = {name: [] for name in strategies}
perplexity = {name: [] for name in strategies}

print(f"float32: perplexity {float_perplexity:.2f}\n")
print(f"{'strategy':12} {'bits':>4} {'SNR':>8} {'size':>9} {'perplexity':>12}")
for bits in bits_to_try:
    for strategy in strategies:
        weights = gpt_tf.quantize_weights(model, strategy, bits)
        snr_db[strategy].append(weights.overall_snr_db)
        perplexity[strategy].append(perplexity_of(weights.model))
        print(
            f"{strategy:12} {bits:4} {snr_db[strategy][-1]:5.1f} dB "
            f"{weights.size_bytes / 1e6:6.2f} MB {perplexity[strategy][-1]:12.2f}"
        )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
colours = ("#c2410c", "#e0a184", "#9a9a9a", "#4d7c3a", "#8fa8c8")
for strategy, colour in zip(strategies, colours, strict=True):
    left.plot(bits_to_try, snr_db[strategy], "o-", color=colour, label=strategy)
    increase = 100 * (np.array(perplexity[strategy]) / float_perplexity - 1)
    right.plot(bits_to_try, increase, "o-", color=colour)
left.set_ylabel("signal-to-noise ratio (dB)")
left.legend(frameon=False)
right.set_ylabel("perplexity above float32's (%)")
right.set_yscale("symlog", linthresh=1)  # linear below 1 %
right.axhline(0, color="grey", linewidth=0.8)
for axis in (left, right):
    axis.invert_xaxis()
    axis.set_xticks(bits_to_try)
    axis.set_xlabel("bits a weight")
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Weights that share their scale with fewer others lose less. At 8 bits the perplexity
# hardly shows it; the fewer the bits, the more it matters. `per_channel` is the usual
# choice for 8 bits: its scales take next to no room, and the products in a file can use
# it directly. For 4 bits the files take `blockwise`.
#
# ## Step 3: the model
#
# Weights are only half of it. If the *activations*, what flows between the layers, are
# to be integers too, each needs a range that is fixed beforehand. The article's
# `quantize_gpt_model` rounds the weights and measures these ranges on typical text.
# What it gives back is a Keras model, wrapped by TF-MOT, that computes as the integers
# will:

# %%
training_tokens = gpt_tf.TokenFile.open(folder / "float" / "data" / "train.tokens")
training = gpt_tf.Windows(training_tokens, context_length, batch_size)

quantised = gpt_tf.quantize_gpt_model(model, training.dataset(num_steps=20))

for activation, (low, high) in list(gpt_tf.activation_ranges(quantised).items())[:6]:
    print(f"{activation:40} {low:8.3f} to {high:7.3f}")

# %% [markdown]
# ## Step 4: learning to live with integers
#
# That was *post-training* quantisation. The model can also be trained a little further
# while everything is rounded as it will be in the file: *quantisation-aware training*,
# QAT. The learning rate is a twentieth of what the model was trained with, and falls
# to 0. (`gpt_tf.quantize`, or `gpt-tf quantize`, does steps 3 and 4 on a run's folder,
# with checkpoints and resume.)

# %%
falling = keras.optimizers.schedules.CosineDecay(5e-3 / 20, qat_steps)
quantised.compile(gpt_tf.AdamW(falling), jit_compile=jit_compile != "off")
history = quantised.fit(
    training.dataset(), steps_per_epoch=qat_steps // 4, epochs=4, verbose=0
)
print("training loss", " -> ".join(f"{loss:.3f}" for loss in history.history["loss"]))

# %% [markdown]
# ## Measured on the file
#
# An artefact is measured, not its ancestor. Each export below is one `.litertlm` file,
# as tutorial 5 explains. The *mode* says what becomes integer:
#
# - `dynamic_int8`: the weights; activations are rounded as they come.
# - `int8`: weights and activations, on ranges fixed beforehand.
# - `int4`: most weights to 4 bits, in blocks of 32.
#
# `EdgeGPT` runs the file as a device does. We let each read the held-out windows and
# ask how surprised it is.

# %%
modes = {
    "float32": "float32",
    "dynamic_int8": "dynamic_int8",
    "int8, post-training": "int8",
    "int4": "int4",
}

paths = {name: folder / f"{name.replace(', ', '-')}.litertlm" for name in modes}
for name, mode in modes.items():
    gpt_tf.export_trained(folder / "float", paths[name], mode)

paths["int8, QAT"] = folder / "int8-QAT.litertlm"
gpt_tf.export_litertlm(quantised, tokenizer, paths["int8, QAT"], "int8")

measured, size_mb = {}, {}
print(f"{'file':20} {'MB':>6} {'perplexity':>11}")
for name, path in paths.items():
    with gpt_tf.EdgeGPT(path) as gpt:
        measured[name] = np.exp(np.mean([-gpt.score(row).mean() for row in windows]))
    size_mb[name] = path.stat().st_size / 1e6
    print(f"{name:20} {size_mb[name]:6.2f} {measured[name]:11.3f}")

# %%
names = sorted(set(paths) - {"float32"}, key=measured.get, reverse=True)
changes = [100 * (measured[name] / measured["float32"] - 1) for name in names]
labels = [f"{name} ({size_mb[name]:.2f} MB)" for name in names]

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
bars = axes.barh(labels, changes, color="#8fa8c8")
axes.bar_label(bars, [f"{change:+.2f}" for change in changes], padding=4)
axes.axvline(0, color="grey", linewidth=0.8)
axes.margins(x=0.15)
axes.set_xlabel(
    f"change of perplexity against the float32 file ({size_mb['float32']:.2f} MB), %"
)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# What QAT wins here is mostly that it was trained longer than the others: a fair
# comparison is with a float model trained as long. `benchmarks/quantization.py` makes
# it, on more text and with error bars: at 8 bits per channel there is little left to
# win; with one scale per matrix, QAT makes up for the difference.
#
# ## Where next
#
# - Turn the knobs: `gpt_tf.QuantizationConfig` says which activations are integers, and
#   with how many bits the weights are trained.
# - From a terminal:
#
#       gpt-tf quantize --model runs/mine --method qat --out runs/mine-int8
#       gpt-tf export --model runs/mine-int8 --mode int8 --out mine.litertlm
#
# - Tutorial 4 makes the model smaller in another way, and tutorial 5 looks into the
#   file and runs it.
