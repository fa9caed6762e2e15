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
# # Quantise a GPT and run it as one file
#
# A trained GPT is made of 32-bit numbers. A device that answers in real time spends
# most of its time fetching them from memory, once for every token. With 8 bits each
# there is a quarter to fetch. What does that cost in accuracy? We go the whole way and
# measure it on the file that ships:
#
#     GPTModel -> strategies -> quantisation-aware training -> .litertlm -> EdgeGPT
#
# Run the cells from top to bottom; notebook 01 explains the words for training.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow: errors only, please

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

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
num_windows = 100  # held-out windows to measure on
max_new_tokens = 60

# %%
folder = Path("runs/notebook-02")  # everything that this notebook writes goes here

# %% [markdown]
# ## A trained model
#
# As in notebook 01, in one call.

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
    overwrite=True,
    verbose=False,
)
model, tokenizer = trained.model, trained.tokenizer

print(f"validation perplexity {trained.validation_perplexity:.2f}")

# %% [markdown]
# ## From numbers to integers
#
# To quantise a weight is to divide it by a *scale* and to round. The question is which
# weights share a scale. `quantize_weights` knows five strategies, two of them the
# article's:
#
# | strategy | what shares a scale |
# |---|---|
# | `global_mean` | all weights of the model, centred on their mean |
# | `layer_mean` | all weights of a layer, centred on their mean |
# | `per_tensor` | one matrix |
# | `per_channel` | the weights of one output of a matrix |
# | `blockwise` | 32 weights of one output |
#
# The *signal-to-noise ratio* says how large the weights are beside the error of
# rounding them; every 6 dB is one bit.

# %%
strategies = ("global_mean", "layer_mean", "per_tensor", "per_channel", "blockwise")
quantised = {name: gpt_tf.quantize_weights(model, name, bits=8) for name in strategies}

print(f"{'strategy':12} {'SNR':>8} {'size':>9}")
for name, weights in quantised.items():
    size = weights.size_bytes / 1e6
    print(f"{name:12} {weights.overall_snr_db:5.1f} dB {size:6.2f} MB")

# %% [markdown]
# One large weight makes the steps coarse for all that share its scale, so it is better
# if fewer do. `per_channel` is the usual choice: it costs next to nothing, and the
# products in the file can use it directly.
#
# Here are the weights of one output of the first block, and what became of them:

# %%
weights = quantised["per_channel"]
name = "block_0/qkv_kernel"
integers = weights.integers[name][:, 0]

print("integers      ", integers[:8])
print("scale         ", np.ravel(weights.scales[name])[0])
print("weights       ", model.get_layer("block_0").qkv_kernel.numpy()[:4, 0])
print("from integers ", weights.model.get_layer("block_0").qkv_kernel.numpy()[:4, 0])

# %% [markdown]
# ## Learning to live with integers
#
# Weights are only half of it. If the *activations*, what flows between the layers, are
# to be integers too, each needs a range that is fixed beforehand. It can be measured on
# typical text (*post-training*), and the model can also be trained a little further
# while everything is rounded as it will be in the file: *quantisation-aware training*,
# QAT. `quantize` does both, at a small learning rate.

# %%
aware = gpt_tf.quantize(
    folder / "float",
    folder / "qat",
    steps=qat_steps,
    validate_every=qat_steps,
    overwrite=True,
    verbose=False,
)

for activation, (low, high) in list(gpt_tf.activation_ranges(aware.model).items())[:6]:
    print(f"{activation:40} {low:8.3f} to {high:7.3f}")

# %% [markdown]
# ## One file
#
# `export_litertlm` writes weights, tokenizer and the graphs for reading a prompt
# (*prefill*) and for writing on (*decode*) as one `.litertlm`, which Google's LiteRT-LM
# runs as well as we do. It is opened and run before it gets its name. The *mode* says
# what becomes integer:
#
# - `dynamic_int8`: the weights; activations are rounded as they come.
# - `int8`: weights and activations, on ranges fixed beforehand.
# - `int4`: most weights to 4 bits.

# %%
sources = {
    "float32": (folder / "float", "float32"),
    "dynamic_int8": (folder / "float", "dynamic_int8"),
    "int8, post-training": (folder / "float", "int8"),
    "int8, QAT": (folder / "qat", "int8"),
    "int4": (folder / "float", "int4"),
}

paths = {}
for name, (source, mode) in sources.items():
    paths[name] = folder / f"{name.replace(', ', '-')}.litertlm"
    manifest = gpt_tf.export_trained(source, paths[name], mode)
    print(f"{name:20} {manifest['size_bytes'] / 1e6:5.2f} MB")

# %% [markdown]
# ## Measured on the file
#
# `EdgeGPT` runs a file with LiteRT, NumPy and tokenizers alone; on a device there is no
# TensorFlow. We let every file read the same held-out text and ask how surprised it is
# (*perplexity*), and how long it takes per token.

# %%
tokens = gpt_tf.TokenFile.open(folder / "float" / "data" / "validation.tokens").tokens
starts = np.linspace(0, len(tokens) - context_length - 1, num_windows).astype(int)
windows = [tokens[start : start + context_length + 1] for start in starts]

perplexities, milliseconds = {}, {}
for name, path in paths.items():
    with gpt_tf.EdgeGPT(path) as gpt:
        losses = [-gpt.score(window).mean() for window in windows]
        perplexities[name] = np.exp(np.mean(losses))

        gpt.reset()
        gpt.prefill(windows[0][:8])
        times = []
        for token in windows[0][8:-1]:
            began = time.perf_counter()
            gpt.decode(token)
            times.append(time.perf_counter() - began)
        milliseconds[name] = 1e3 * np.median(times)

print(f"{'file':20} {'MB':>6} {'perplexity':>11} {'ms a token':>11}")
for name, path in paths.items():
    size, perplexity = path.stat().st_size / 1e6, perplexities[name]
    print(f"{name:20} {size:6.2f} {perplexity:11.3f} {milliseconds[name]:11.3f}")

# %% [markdown]
# So small a model fits into the processor's cache, where fetching costs little; at the
# size of GPT-2 the integers are several times faster (see the README). The accuracy is
# what counts here:

# %%
names = list(paths)[:0:-1]
changes = [100 * (perplexities[n] / perplexities["float32"] - 1) for n in names]
labels = [f"{name} ({paths[name].stat().st_size / 1e6:.2f} MB)" for name in names]

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
bars = axes.barh(labels, changes, color="#8fa8c8")
axes.bar_label(bars, [f"{change:+.2f}" for change in changes], padding=4)
axes.axvline(0, color="grey", linewidth=0.8)
axes.margins(x=0.15)
axes.set_xlabel("change of perplexity against the float32 file (%)")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# What QAT wins here is mostly that it was trained longer than the others: a fair
# comparison is with a float model trained as long. `benchmarks/quantization.py` makes
# it, on more text and with error bars.
#
# ## Writing
#
# The samplers are those of the Keras side, and so are the seeds: where the logits
# agree, one seed writes one text.

# %%
prompt = "    def __init__(self"

for name in ("float32", "int8, QAT"):
    with gpt_tf.EdgeGPT(paths[name]) as gpt:
        answer = gpt.generate(
            prompt, max_new_tokens=max_new_tokens, temperature=0.8, seed=3
        )
    print(f"----- {name} " + "-" * (60 - len(name)))
    print(prompt + answer + "\n")

# %% [markdown]
# On a device, `pip install 'gpt-tf[edge]'` is all that it takes, and
#
# ```console
# $ gpt-tf generate --model int8-QAT.litertlm --prompt "    def __init__(self"
# ```
#
# runs the same file from the command line.
