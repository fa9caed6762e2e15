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
# # 5. Export and run on the edge
#
# **At the end you will have** one file, a `.litertlm`, that holds a GPT, its tokenizer
# and all that a device needs to run it; text from it, written by a process without
# TensorFlow; its speed as float32 and as integers, by threads; and several requests
# served at once.
#
# **The article**, on GPT real-time performance: chapter 3.2 ends with the quantised
# model that ships, chapter 3.1 divides subsequences, here while answering,
# and chapter 6.1 asks how fast the answer comes.
#
#     GPTModel -> .litertlm -> EdgeGPT | EdgeScheduler
#
# Run the cells from top to bottom; on two processor cores that takes three minutes.
# Tutorial 1 explains the words for training, tutorial 3 those for quantisation.

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

import time

import matplotlib.pyplot as plt
import numpy as np

import gpt_tf

# %% tags=["parameters"]
corpus = "python-stdlib"  # or the path of a folder of your own text
vocab_size = 1024  # V
context_length = 256  # T
batch_size = 8  # B
embedding_dim = 256  # C
num_layers = 4
num_heads = 4
steps = 500
jit_compile = "auto"  # XLA; "off" starts sooner, and every step takes longer
max_new_tokens = 60

# %%
folder = Path("runs/notebook-05")  # everything that this notebook writes goes here

# %% [markdown]
# ## A trained model
#
# As in tutorial 1, in one call.

# %%
trained = gpt_tf.train(
    out=folder / "gpt",
    corpus=corpus,
    vocab_size=vocab_size,
    embedding_dim=embedding_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    context_length=context_length,
    batch_size=batch_size,
    steps=steps,
    learning_rate=3e-3,
    warmup_steps=steps // 10,
    validate_every=steps // 2,
    validation_batches=20,
    jit_compile=jit_compile,
    overwrite=True,
    verbose=False,
)
print(f"{trained.model.count_params():,} parameters")
print(f"validation perplexity {trained.validation_perplexity:.2f}")

# %% [markdown]
# ## One file
#
# A Keras model cannot go to a device as it is: it needs TensorFlow, and called as it
# was trained, it reads the whole text anew for every token. `export_trained` writes the
# computation as operations that LiteRT (TensorFlow Lite's new name) has built in, with
# a *key-value cache*: what a token adds to the attention of those after it is kept, so
# that each token is computed once. Google's LiteRT-LM runs the same file.

# %%
modes = ("float32", "dynamic_int8", "int4")

paths, manifests = {}, {}
for mode in modes:
    paths[mode] = folder / f"{mode}.litertlm"
    manifests[mode] = gpt_tf.export_trained(folder / "gpt", paths[mode], mode)
    print(f"{paths[mode].name:22} {manifests[mode]['size_bytes'] / 1e6:6.2f} MB")

# %% [markdown]
# Each file was opened and run before it got its name, and compared with the Keras model
# on held-out text. The manifest beside it says what was found:

# %%
print(f"{'file':14} {'divergence':>15} {'same likeliest token':>22}")
for mode in modes:
    found = manifests[mode]["verification"]
    divergence = f"{found['divergence_nats']:.5f} nats"
    print(f"{mode:14} {divergence:>15} {found['top1_agreement']:>22.1%}")

# %% [markdown]
# A file has several *signatures*, functions that share one copy of the weights: a
# prompt is read many tokens at a time (*prefill*), then each new token comes by itself
# (*decode*), and *score* tells how likely a given text is.

# %%
gpt = gpt_tf.EdgeGPT(paths["dynamic_int8"])

print(*manifests["dynamic_int8"]["verification"]["signatures"], sep=", ")
print(f"{gpt.mode}, a context of {gpt.context_length} tokens, V = {vocab_size}")

# %% [markdown]
# ## On the device
#
# A device needs LiteRT, NumPy and tokenizers (`pip install '.[edge]'` in the clone),
# and no TensorFlow. To see that, we ask another process:

# %%
program = """
import sys
from gpt_tf.edge import EdgeGPT

with EdgeGPT(sys.argv[1]) as gpt:
    print("def" + gpt.generate("def", max_new_tokens=30, temperature=0.7, seed=4))
print("is TensorFlow loaded?", "tensorflow" in sys.modules)
"""
result = subprocess.run(
    [sys.executable, "-X", "utf8", "-c", program, str(paths["dynamic_int8"])],
    capture_output=True,
    encoding="utf-8",
    check=True,
)
print(result.stdout)

# %% [markdown]
# The samplers are those of the Keras side, and so are the seeds. Where the logits
# agree, one seed writes one text:

# %%
prompt = "    def __init__(self"
options = {"max_new_tokens": max_new_tokens, "temperature": 0.8, "seed": 3}

with gpt_tf.EdgeGPT(paths["float32"]) as gpt_float:
    answer = gpt_float.generate(prompt, **options)
in_keras = gpt_tf.generate(
    trained.model, prompt, tokenizer=trained.tokenizer, **options
)
print(f"the same text as in Keras: {answer == in_keras}\n")
print(prompt + answer)

# %% [markdown]
# A loop of your own, for a sampler of your own, takes two calls. `prefill` reads all of
# the prompt but its last token, `decode` takes a token and says what may follow:

# %%
ids = gpt.tokenizer.encode(prompt)
gpt.reset()
gpt.prefill(ids[:-1])
for _ in range(8):
    logits = gpt.decode(ids[-1])  # (V,)
    ids.append(int(logits.argmax()))
print(gpt.tokenizer.decode(ids))

# %% [markdown]
# A file carries a seal. A single bit that changed on the way, here one in the middle,
# is noticed before anything runs:

# %%
damaged = bytearray(paths["int4"].read_bytes())
damaged[len(damaged) // 2] ^= 1
(folder / "damaged.litertlm").write_bytes(damaged)
try:
    gpt_tf.EdgeGPT(folder / "damaged.litertlm")
except gpt_tf.InputError as error:
    print(error)

# %% [markdown]
# ## How fast?
#
# Two times matter to whoever waits: until the first token is there, which grows with
# the prompt, and from token to token. Each file reads half a context of held-out text
# and then goes on for a quarter. The files take turns, three times, and a first turn
# does not count.

# %%
tokens = gpt_tf.TokenFile.open(folder / "gpt" / "data" / "validation.tokens").tokens
text = [int(token) for token in tokens[:context_length]]
half, quarter = context_length // 2, context_length // 4
threads = (1, 2)


def measure_ms(gpt):
    """Return the milliseconds until the first token, and those of each further one."""
    gpt.reset()
    ends = [time.perf_counter()]
    gpt.prefill(text[: half - 1])
    for token in text[half - 1 : half + quarter]:
        gpt.decode(token)
        ends.append(time.perf_counter())
    first, *further = 1e3 * np.diff(ends)
    return first, further


opened = {
    (mode, count): gpt_tf.EdgeGPT(paths[mode], num_threads=count)
    for mode in modes
    for count in threads
}
first_ms = {key: [] for key in opened}
token_ms = {key: [] for key in opened}
for turn in range(4):
    for key, measured in opened.items():
        first, further = measure_ms(measured)
        if turn:
            first_ms[key].append(first)
            token_ms[key] += further

print(f"{'file':14} {'threads':>8} {'first token':>13} {'a token, median (p95)':>24}")
for (mode, count), times in token_ms.items():
    first = f"{np.median(first_ms[mode, count]):.2f} ms"
    further = f"{np.median(times):.2f} ({np.quantile(times, 0.95):.2f}) ms"
    print(f"{mode:14} {count:8} {first:>13} {further:>24}")
    opened[mode, count].close()

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
shades = dict(zip(threads, ("#8fa8c8", "#e0a184"), strict=True))
for (mode, count), times in token_ms.items():
    place = modes.index(mode) + 0.18 * (2 * threads.index(count) - 1)
    median = np.median(times)
    axes.barh(place, median, height=0.32, color=shades[count])
    axes.text(median, place, f" {median:.2f}", va="center")
labels = [f"{mode} ({manifests[mode]['size_bytes'] / 1e6:.1f} MB)" for mode in modes]
axes.set_yticks(range(len(modes)), labels)
axes.invert_yaxis()
axes.margins(x=0.12)
axes.set_xlabel("ms from token to token (median)")
handles = [plt.Rectangle((0, 0), 1, 1, color=shades[count]) for count in threads]
names = [f"{count} thread{'s' * (count > 1)}" for count in threads]
axes.legend(handles, names, frameon=False, loc="lower right")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# A token costs one reading of all weights, so fewer bytes are less time. So small a
# model lies in the processor's cache, where reading costs little; at GPT-2's size the
# integers gain more (see the README). A second thread has to be waited for: it helps
# where there is enough to compute, and where the core is free.
#
# ## Several requests
#
# One model, one long prompt, and short ones that arrive while it is read: must they
# wait for it? `EdgeScheduler` cuts prompts into chunks, which are subsequences as in
# the article's chapter 3.1. Between two chunks, everyone who already writes gets a
# token. `step` does one piece of work; here we watch each, with chunks and without.

# %%
long_prompt = text[: context_length - 8]
chunk = context_length // 8


def watch(chunked):
    """Return when each piece of work began and ended, by request."""
    rows = []
    with gpt_tf.EdgeScheduler(gpt, max_chunk=chunk, chunked=chunked) as scheduler:
        names = {scheduler.submit(long_prompt, max_new_tokens=6): "long prompt"}
        began = last = time.perf_counter()
        while work := scheduler.step():
            now = time.perf_counter()
            rows.append((names[work.request], work.kind, last - began, now - began))
            last = now
            if len(rows) == 1:  # two more, while the first chunk was being read
                for name in ("short one", "another"):
                    request = scheduler.submit(text[:4], max_new_tokens=6, seed=1)
                    names[request] = name
    return rows


for chunked in (True, False):
    watch(chunked)  # does not count
timelines = {"prompts whole": watch(False), f"chunks of {chunk}": watch(True)}

figure, rows = plt.subplots(2, figsize=(9, 4), sharex=True, layout="constrained")
colours = {"prefill": "#8fa8c8", "decode": "#c2410c"}
requests = ["long prompt", "short one", "another"]
for axes, (title, timeline) in zip(rows, timelines.items(), strict=True):
    for name, kind, begin, end in timeline:
        left, width = 1e3 * begin, 1e3 * (end - begin)
        place = requests.index(name)
        axes.barh(place, width, left=left, color=colours[kind], edgecolor="white")
    firsts = [
        next(end for name, kind, _, end in timeline if (name, kind) == (r, "decode"))
        for r in requests
    ]
    waits = ", ".join(f"{1e3 * wait:.1f}" for wait in firsts)
    axes.set_title(f"{title}: first tokens after {waits} ms", loc="left")
    axes.set_yticks(range(len(requests)), requests)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
rows[-1].set_xlabel("ms since the long prompt came")
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
figure.legend(handles, colours, loc="outside lower right", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# In chunks the long prompt itself takes longer; the short ones no longer wait for it.
# The texts are the same either way, and the same as `EdgeGPT` writes alone. Without
# watching, requests are simply streamed:

# %%
with gpt_tf.EdgeScheduler(gpt) as scheduler:
    long = scheduler.submit(long_prompt, max_new_tokens=8, seed=1)
    print("class Shape", end="")
    for piece in scheduler.submit("class Shape", max_new_tokens=20, seed=2).stream():
        print(piece, end="")
    print(f"\n\nand after the long prompt: {gpt.tokenizer.decode(long.result())!r}")

# %%
gpt.close()

# %% [markdown]
# ## Where next
#
# - From a terminal:
#
#       gpt-tf export --model runs/mine --mode dynamic_int8 --out mine.litertlm
#       gpt-tf generate --model mine.litertlm --prompt "    def __init__(self"
# - A quantisation-aware model of tutorial 3 is exported with `--mode int8`, a student
#   of tutorial 4 as any other.
# - Tutorial 6 measures files as a user feels them, and chooses one for a budget.
