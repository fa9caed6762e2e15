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
# # 1. Text and tokens
#
# **At the end you will have** a corpus with a part held out, a tokenizer that was
# learned from it, a file of tokens, batches of windows, and a first small GPT that was
# trained on them and writes Python.
#
# **The article**, on GPT real-time performance: its `GPTModel` and the way it is
# trained; and chapter 6.4, generalisation, which begins with the text: what the model
# is shown, and what it is never shown.
#
# We follow the way of the data:
#
#     text -> tokens -> windows -> GPTModel -> train -> generate
#
# Nothing needs a GPU, an account or a download. Run the cells from top to bottom; on
# two processor cores that takes two minutes. Where TensorFlow greets you with a few
# lines about your processor, they are harmless.
#
# A few letters stand for the same sizes everywhere in gpt_tf:
#
# | letter | size |
# |---|---|
# | `B` | batch: windows that are computed together |
# | `T` | positions: tokens in a window |
# | `C` | `embedding_dim`: numbers that describe one token inside the model |
# | `V` | vocabulary: how many different tokens there are |

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

import gpt_tf
from gpt_tf.text.augment import BPEDropout

# %% [markdown]
# These are the knobs. Turn them once you have seen the whole way: more `steps` and a
# larger `embedding_dim` write better Python, and take longer.

# %% tags=["parameters"]
corpus = "python-stdlib"  # or the path of a folder of your own text
vocab_size = 1024  # V
other_vocab_sizes = (257, 512, 2048, 4096, 16384)  # to compare it with
context_length = 64  # T
batch_size = 32  # B
embedding_dim = 128  # C
num_layers = 3
num_heads = 4
steps = 400
validate_every = 50
jit_compile = "auto"  # XLA; "off" starts sooner, and every step takes longer
max_new_tokens = 80

# %%
folder = Path("runs/notebook-01")  # everything that this notebook writes goes here

# %% [markdown]
# ## Text
#
# A corpus is a pile of documents. `open_corpus` knows three kinds:
#
# | corpus | is |
# |---|---|
# | `"python-stdlib"` | the sources of the Python that runs this: already on your disk |
# | `"shakespeare"` | his plays, a megabyte, downloaded once and checked |
# | a path, or several | your own UTF-8 files and folders |
#
# A GPT that repeats what it was shown has learned nothing. Whether it *generalises*
# can be told on text it has never seen, so about a tenth of the documents is held out
# for *validation*. A file's name decides on which side it lies, so it stays there
# when others come and go.

# %%
text = gpt_tf.open_corpus(corpus)

texts = {
    split: [document.text for document in text.documents(split)]
    for split in ("train", "validation")
}
for split, parts in texts.items():
    characters = sum(map(len, parts))
    print(f"{split:10}  {len(parts):4} documents  {characters:10,} characters")

# %%
document = next(text.documents("train"))
print(document.name)
print("-" * len(document.name))
print(document.text[:400])

# %% [markdown]
# ## Tokens
#
# A model reads numbers, not letters. A *tokenizer* cuts text into pieces and gives
# each piece a number. Ours learns its pieces from the training text: it begins with the
# 256 bytes and keeps joining the pair that occurs most often, until there are `V`
# pieces. This is *byte-pair encoding* (BPE), on bytes as GPT-2 does it.

# %%
tokenizer = gpt_tf.BPETokenizer.train(texts["train"], vocab_size)
tokenizer.save(folder)

first = range(257, min(265, vocab_size))  # after the end of text and 256 bytes
last = range(vocab_size - 8, vocab_size)
for name, ids in (("first", first), ("last", last)):
    print(f"joined {name:5}", *(repr(tokenizer.decode([token])) for token in ids))

# %%
line = "    def read_lines(self, path, encoding='utf-8'):"
ids = tokenizer.encode(line)
print(f"{len(line)} characters, {len(ids)} tokens\n")
print(" token  piece")
for token in ids:
    print(f"{token:6}  {tokenizer.decode([token])!r}")

# %% [markdown]
# What is frequent in Python became one piece; what is rare is spelled out. A space
# belongs to the piece *after* it, as in `' def'`, so a prompt had better not end with
# a space.
#
# Nothing is lost on the way, not even what the tokenizer never saw: any text is a row
# of bytes, and every byte is a token.

# %%
for sample in (line, "naïve café", "日本語 🙂"):
    ids = tokenizer.encode(sample)
    same = tokenizer.decode(ids) == sample
    print(f"{len(sample.encode()):3} bytes, {len(ids):2} tokens, {same=}  {sample}")

# %% [markdown]
# How many pieces should there be? With more, each says more, so a GPT needs fewer steps
# for the same text and looks farther back in as many places. But the table of the
# embedding has a row for every piece, and a device has to hold it and to score with it
# for every token. Both sides, measured on the held-out text:

# %%
sizes = sorted({*other_vocab_sizes, vocab_size})
held_out_bytes = sum(len(part.encode()) for part in texts["validation"])

bytes_per_token = []
for size in sizes:
    other = gpt_tf.BPETokenizer.train(texts["train"], size)
    count = sum(map(len, other.encode_batch(texts["validation"])))
    bytes_per_token.append(held_out_bytes / count)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(sizes, bytes_per_token, "o-", color="#8fa8c8")
left.set_ylabel("bytes of text in a token")
right.plot(sizes, [size * embedding_dim / 1e6 for size in sizes], "o-", color="#e0a184")
right.set_ylabel("million parameters in the table")
chosen = sizes.index(vocab_size)
left.plot(vocab_size, bytes_per_token[chosen], "o", color="#c2410c")
right.plot(vocab_size, vocab_size * embedding_dim / 1e6, "o", color="#c2410c")
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vocabulary, V (red: ours)")
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The first joins win most. Between 1,000 and 4,000 is right for a model as small as
# ours; GPT-2 has 50,257.
#
# ### The same text in other tokens
#
# A model that always sees a word cut in one way knows little of its parts. *BPE
# dropout* leaves out each join with some probability, anew whenever a text is read. It
# is one of the augmentations in `gpt_tf.text.augment`, which are meant to help a model
# generalise from little text. All are off unless asked for, and never on in validation.

# %%
dropout = BPEDropout(tokenizer, rate=0.1)

for seed in range(4):
    ids = dropout.encode(line, seed)
    print(len(ids), "tokens ", "|".join(tokenizer.decode([token]) for token in ids))

# %% [markdown]
# ## Windows
#
# The whole text becomes one long row of tokens in a *token file*, documents parted by
# an *end-of-text* token, so that no window mixes two without saying so. The file is
# read from disk piece by piece, so it may be larger than memory.

# %%
tokens = gpt_tf.write_token_file(
    folder / "train.tokens", text.documents("train"), tokenizer
)

print(f"{tokens.count:,} tokens, {tokens.text_bytes / tokens.count:.1f} bytes each")
print(f"{np.sum(tokens.tokens == tokenizer.end_of_text_id)} of them end a document")

# %% [markdown]
# Training takes `B` windows of `T` tokens at a time. The labels `y` are the inputs `x`
# moved on by one place: wherever the model stands, it has to say what comes next. The
# weights say which places count; a 0 would mark padding.

# %%
windows = gpt_tf.Windows(tokens, context_length, batch_size)
x, y, sample_weight = windows.batch(step=0)

print("x             ", x.shape, " (B, T)")
print("y             ", y.shape, " (B, T)")
print("sample_weight ", sample_weight.shape, " (B, T)\n")

for place in range(5):
    seen, following = x[0, : place + 1], y[0, place : place + 1]
    print(f"{tokenizer.decode(seen)!r:>30}  ->  {tokenizer.decode(following)!r}")

# %% [markdown]
# Which windows a step gets depends on its number and a seed only, so a run can stop and
# go on at any step. Every *epoch*, a pass over the text, moves all windows by another
# random offset and takes them in another order: the same text is cut anew each time,
# and the model cannot learn a window by heart.

# %%
for epoch in range(3):
    x_then, *_ = windows.batch(step=epoch * windows.steps_per_epoch)
    print(f"epoch {epoch + 1} begins with {tokenizer.decode(x_then[0])[:40]!r}")

# %% [markdown]
# ## The model
#
# `GPTModel` is a Keras model with GPT-2's architecture. As in the article, four numbers
# describe it; we also say how many places it can look back.

# %%
model = gpt_tf.GPTModel(
    vocab_size=vocab_size,
    embedding_dim=embedding_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    context_length=context_length,
)

model.summary()

# %% [markdown]
# Tokens `(B, T)` go in. The embedding turns each into `C` numbers: `(B, T, C)`. The
# blocks let every place gather what it needs from the places before it, and keep that
# shape. The head scores all `V` tokens as the next one: `(B, T, V)`. It has no
# parameters of its own, because it scores with the table of the embedding.

# %%
logits = model(x)
print("logits ", logits.shape, " (B, T, V)")

# %% [markdown]
# `fit(inputs, labels, epochs=...)` works at once, as in the article, with no `compile`
# before it: optimiser, loss and metrics have sensible defaults, and a `compile` of your
# own replaces them. The first epoch takes some seconds longer, because the model is
# compiled for your processor.

# %%
model.fit(x, y, epochs=5, verbose=2)  # verbose=2: one line per epoch

print(f"\nguessing blindly: ln(V) = {np.log(vocab_size):.4f}")

# %% [markdown]
# The loss is the price of surprise, in *nats* per token. A new model holds every token
# for equally likely and pays ln(V). Looking at the same few windows five times, it
# already learns a little. Now for the whole text.
#
# ## Training
#
# `gpt_tf.train` is `fit` with all that a good run needs: a learning rate that rises and
# then falls, validation, checkpoints from which an interrupted run goes on, and a
# folder that keeps everything. On two processor cores this takes a minute or so. Every
# quarter of the way, the model shows what it would write after `def`.

# %%
result = gpt_tf.train(
    corpus=corpus,
    tokenizer=str(folder / "tokenizer.json"),
    embedding_dim=embedding_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    context_length=context_length,
    batch_size=batch_size,
    steps=steps,
    learning_rate=5e-3,
    warmup_steps=steps // 10,
    validate_every=validate_every,
    validation_batches=20,
    sample_every=steps // 4,
    sample_prompt="    def",
    jit_compile=jit_compile,
    out=folder / "gpt",
    overwrite=True,  # so that this cell can be run again
)

print(f"\nvalidation loss {result.validation_loss:.2f} nats per token")
print(f"validation perplexity {result.validation_perplexity:.1f}")

# %% [markdown]
# *Perplexity* says the same in another way: the model hesitates as if it had to choose
# among that many equally likely tokens. At the beginning it was `V`.
#
# The run kept its history. A training loss is the mean of ten batches, and some batches
# are harder than others, hence the jitter. The validation loss lies close to it: the
# model has read a quarter of the text, so it had no time to learn any of it by heart.
# While the validation loss keeps falling, more training is worth its time; where it
# rises and the training loss does not, the model no longer generalises.

# %%
history = result.history
rows, validations = history["steps"], history["validations"]

figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
axes.plot(
    [row["step"] for row in rows],
    [row["loss"] for row in rows],
    color="#8fa8c8",
    label="training (mean of 10 steps)",
)
axes.plot(
    [row["step"] for row in validations],
    [row["loss"] for row in validations],
    "o-",
    color="#c2410c",
    label="validation",
)
axes.axhline(np.log(vocab_size), color="grey", linestyle=":")
axes.annotate(
    "guessing blindly: ln(V)",
    (1.0, np.log(vocab_size)),
    xycoords=("axes fraction", "data"),
    xytext=(0, -4),
    textcoords="offset points",
    ha="right",
    va="top",
    color="grey",
)
axes.set_xlabel("training step")
axes.set_ylabel("loss (nats per token)")
axes.legend(loc="center right", frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What comes next?
#
# The scores at the last place, made into probabilities, are all that a GPT ever says.
# A prompt is a batch of one window, so `B` is 1.
# Here is what ours expects after the beginning of a line:

# %%
prompt = "    if not"

logits = result.model(np.array([tokenizer.encode(prompt)]))  # (1, T, V)
scores = logits[0, -1].numpy()  # (V,)
probabilities = np.exp(scores - scores.max())
probabilities /= probabilities.sum()
likeliest = np.argsort(probabilities)[:-9:-1]

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
names = [repr(tokenizer.decode([token])) for token in likeliest]
axes.barh(names[::-1], 100 * probabilities[likeliest][::-1], color="#8fa8c8")
axes.set_xlabel("probability (%)")
axes.set_title(f"next token after {prompt!r}")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Writing
#
# To write, choose one token, append it, and ask again. How to choose is up to you:
#
# - *greedy* (`temperature=0`) always takes the likeliest token. It is safe, and soon
#   goes round in circles.
# - *temperature* draws at random. Below 1 the likely tokens gain, above 1 the unlikely.
# - *top_p* draws only among the likeliest tokens that together have this probability,
#   so the long tail of nonsense is never chosen.

# %%
choices = {
    "greedy": {"temperature": 0.0},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
prompt = "    def __init__(self"

for name, options in choices.items():
    answer = gpt_tf.generate(
        result.model,
        prompt,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        seed=1,
        **options,
    )
    print(f"----- {name} " + "-" * (60 - len(name)))
    print(prompt + answer + "\n")

# %% [markdown]
# It is not Python that runs. But a model that began with nothing and trained for about
# a minute has found out about indentation, `self`, brackets, `return` and docstrings.
#
# `stream` gives each piece as soon as it is there, for when somebody is waiting:

# %%
prompt = "class Shape"
print(prompt, end="")

for piece in gpt_tf.stream(
    result.model,
    prompt,
    tokenizer=tokenizer,
    max_new_tokens=max_new_tokens,
    temperature=0.8,
    top_p=0.9,
    seed=2,
):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Keeping it
#
# The model lies in the run's folder, with its tokenizer. Load both another day, and it
# goes on as it did here:

# %%
model, tokenizer = gpt_tf.load_model(folder / "gpt")

again = model(np.array([tokenizer.encode("    if not")]))[0, -1].numpy()  # (V,)
print("the same scores as above:", np.array_equal(again, scores))

# %% [markdown]
# ## Where next
#
# - Train longer: set `steps = 4000`, go for a walk, and compare the perplexity.
# - Train on text of your own: set `corpus` to a file or a folder.
# - Do the same from a terminal:
#
#       gpt-tf train --preset quickstart --corpus python-stdlib --out runs/quickstart
#       gpt-tf generate --model runs/quickstart --prompt "    def"
#
# - Read the model: `gpt_tf/models/gpt.py` and `layers.py` are short, and their comments
#   use the letters of this notebook.
# - Tutorial 2 divides the training among several devices. Tutorials 3 to 5 make the
#   model fast: as integers, smaller, and as one file on a device.
