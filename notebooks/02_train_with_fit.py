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
# # 2. Train a GPT on your own text with `fit`
#
# **Result:** a GPT of 0.9 million parameters, trained on Shakespeare for two minutes,
# reaches a held-out loss below 1.75 nats per character, where nanoGPT reports 1.88 for
# a model of its size. On a tenth of the text, BPE dropout lowers the held-out loss by
# about 1 % with each of three seeds.
#
# ![The result](attachment:result.png)
#
# **At the end you have** a tokenizer learned from your text, a GPT trained on it with
# Keras's `fit`, samples of what it wrote at three points of its training, and the
# effect of an augmentation on a small text, measured.
#
# **The article**, on GPT real-time performance: chapter 4.1, its `GPTModel` under
# `MirroredStrategy`, and chapter 6.4, generalisation.
#
# **In gpt_tf:** [4.1](../docs/article.md#41-parallel-computation-in-tensorflow),
# [6.4](../docs/article.md#64-generalisation).
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
import tensorflow as tf
import tf_keras as keras
from IPython.display import Markdown, display

logging.getLogger("tensorflow").setLevel("ERROR")
started = time.perf_counter(), time.process_time()

# %% [markdown]
# Set `corpus` to your own text and `prompt` to a beginning that fits it:
#
# | corpus | is |
# |---|---|
# | `"my/texts"` | a folder, of which all UTF-8 text files are read, or one file |
# | `"rows.jsonl"` | a JSON object per line with its text under `"text"` |
# | `"shakespeare"` | one megabyte of his plays, downloaded once |
# | `"python-stdlib"` | the sources of the Python that runs this, already on your disk |
#
# Without a network the notebook trains on `"python-stdlib"` instead of Shakespeare.

# %% tags=["parameters"]
corpus = "shakespeare"  # yours: a folder, a file, or a .jsonl
prompt = "KING RICHARD:"  # a prompt must not end in a space
vocab_size = 1024
context_length = 64
batch_size = 16
embedding_dim = 128
num_layers = 4
num_heads = 4
epochs = 10
steps_per_epoch = 100
learning_rate = 3e-3
augmented_steps = 240  # of each training in the last step
seeds = (0, 1, 2)
max_new_tokens = 100
repeats = 5
jit_compile = True  # XLA; False starts sooner, and every step takes longer

# %%
folder = Path("runs/notebook-02")  # everything that this notebook writes goes here
folder.mkdir(parents=True, exist_ok=True)
keras.utils.set_random_seed(0)

# %% [markdown]
# ## 1. Text to tokens
#
# A tenth of the text is held out: whether a model *generalises* can only be seen on
# text that it was not trained on. `open_corpus` divides folders by whole files, and a
# single file near its end.


# %%
def read(corpus):
    """Return the texts to train on and those that are held out."""
    if str(corpus).endswith(".jsonl"):
        lines = Path(corpus).read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
        held = max(1, len(texts) // 10)
        return texts[:-held], texts[-held:]
    opened = gpt_tf.open_corpus(corpus)
    return tuple(
        [document.text for document in opened.documents(split)]
        for split in ("train", "validation")
    )


try:
    train_texts, held_out_texts = read(corpus)
except gpt_tf.InputError as error:
    if corpus != "shakespeare":
        raise
    print(f"{error}\nPython's sources are used instead.\n")
    corpus, prompt = "python-stdlib", "def read_lines(self"
    train_texts, held_out_texts = read(corpus)

held_out_characters = sum(map(len, held_out_texts))
print(f"{sum(map(len, train_texts)):,} characters to train on")
print(f"{held_out_characters:,} characters held out\n")
print(train_texts[0][:200])

# %% [markdown]
# A tokenizer cuts text into pieces and numbers them. *Byte-pair encoding* starts from
# the 256 bytes and joins the most frequent pair until there are `vocab_size` pieces, so
# any text can be encoded and nothing is lost. Documents are separated by an end-of-text
# token, so the model can tell where one ends.

# %%
tokenizer = gpt_tf.BPETokenizer.train(train_texts, vocab_size)
vocab_size = tokenizer.vocab_size


def encode(texts):
    """Return the ids of all texts in one row, each followed by end of text."""
    end = [tokenizer.end_of_text_id]
    return np.concatenate([ids + end for ids in tokenizer.encode_batch(texts)])


train_ids, held_out_ids = encode(train_texts), encode(held_out_texts)
sample = tokenizer.encode(train_texts[0][:60])
print(f"{len(train_ids):,} tokens to train on, {len(held_out_ids):,} held out")
print(" | ".join(tokenizer.decode([token]) for token in sample))

# %% [markdown]
# A space belongs to the piece after it, as in `' you'`. A prompt that ends in a space
# therefore begins a word in a way that the model has hardly ever seen.
#
# ## 2. Tokens to `tf.data`
#
# The model sees windows of `context_length` tokens. The labels are the inputs moved on
# by one token. In training, every epoch cuts the text into other windows and shuffles
# them; held-out text is read in order, every token once.

# %%
windows = gpt_tf.Windows(train_ids, context_length, batch_size)
held_out = gpt_tf.Windows(held_out_ids, context_length, 64, shuffle=False)
train, val = windows.dataset(), held_out.dataset(repeat=False)

x, y, sample_weight = windows.batch(step=0)
print("inputs, labels, weights:", x.shape, y.shape, sample_weight.shape)
for place in range(3):
    seen, following = x[0, : place + 1], y[0, place : place + 1]
    print(f"{tokenizer.decode(seen)!r:>24}  ->  {tokenizer.decode(following)!r}")

# %% [markdown]
# ## 3. `fit`
#
# `MirroredStrategy` copies the model to every GPU and divides each batch among them;
# without GPUs it has one replica on the CPU. `GPTModel` is a Keras model, so callbacks
# work as always: `EarlyStopping` ends a training that no longer improves, and a small
# one of our own writes a sample at three points.


# %%
class Samples(keras.callbacks.Callback):
    """Write a sample after the first epoch, in the middle and at the end."""

    def __init__(self):
        super().__init__()
        self.texts = {}

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in {1, epochs // 2, epochs}:
            self.texts[(epoch + 1) * steps_per_epoch] = self.model.generate(
                prompt,
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
                temperature=0.8,
                top_p=0.9,
                seed=1,
            )


def compile_for(gpt, steps, jit_compile):
    """Give a model a learning rate that rises over 5 % of the steps, then falls."""
    rise = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - rise, alpha=0.05, warmup_target=learning_rate, warmup_steps=rise
    )
    gpt.compile(gpt_tf.AdamW(schedule), jit_compile=jit_compile)


strategy = tf.distribute.MirroredStrategy()
with strategy.scope():
    model = gpt_tf.GPTModel(
        vocab_size=vocab_size,
        embedding_dim=embedding_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        context_length=context_length,
    )
    compile_for(model, epochs * steps_per_epoch, jit_compile)
print(f"{model.count_params():,} parameters on {strategy.num_replicas_in_sync} device")

samples = Samples()
stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
fit_started = time.process_time()
history = model.fit(
    train,
    validation_data=val,
    epochs=epochs,
    steps_per_epoch=steps_per_epoch,
    callbacks=[samples, stop],
    verbose=2,
).history
print(f"{(time.process_time() - fit_started) / 60:.1f} minutes of CPU time")

# %% [markdown]
# The loss is in *nats* per token. An untrained model gives each token about the same
# probability, so its loss is close to ln(V) for `V` tokens. Losses over different
# tokenizers cannot be compared; losses per character can. For Shakespeare there is a
# number to beat: nanoGPT's README reports 1.88 nats per character for a model of this
# size (4 layers, 128 wide, context 64) that is trained for three minutes on a CPU.

# %%
mark = 1.88 if corpus == "shakespeare" else None
tokens_per_character = len(held_out_ids) / held_out_characters
per_token = model.evaluate(val, verbose=0)[0]
per_character = per_token * tokens_per_character

print(f"untrained, ln(V)           {np.log(vocab_size):.3f} nats per token")
print(f"held-out loss              {per_token:.3f} nats per token")
print(f"                           {per_character:.3f} nats per character")
if mark:
    print(f"to beat                    {mark:.3f} nats per character")

# %% [markdown]
# ## 4. Read what it writes
#
# The same prompt with the same seed at three points of the training:

# %%
for step, sample in samples.texts.items():
    print(f"----- after {step:,} steps {'-' * 40}\n{prompt}{sample}\n")

# %% [markdown]
# How a token is chosen changes the text as well. Greedy decoding (`temperature=0`)
# takes the most likely token and soon repeats itself. `temperature` draws at random,
# below 1 with a preference for likely tokens. `top_p` leaves out the unlikely tokens.

# %%
choices = {
    "greedy": {"temperature": 0.0},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
for name, options in choices.items():
    written = model.generate(
        prompt, tokenizer=tokenizer, max_new_tokens=60, seed=2, **options
    )
    print(f"----- {name} {'-' * 40}\n{prompt}{written}\n")

# %% [markdown]
# ## 5. Little text: augment it
#
# A model learns a small text by heart and stops generalising. *BPE dropout* leaves out
# each join of the tokenizer with some probability, anew in every epoch, so the same
# text comes in other tokens. Here two smaller models train on a tenth of the text,
# which they see many times, with and without it; held-out text is never changed. What
# counts is the best held-out loss of each training.

# %%
tenth = train_ids[: len(train_ids) // 10]
line = train_texts[0][:40]
dropout = gpt_tf.BPEDropout(tokenizer, rate=0.1)
for seed in range(2):
    print(" | ".join(tokenizer.decode([token]) for token in dropout.encode(line, seed)))


def best_loss(rate, seed):
    """Train on the tenth; return held-out losses, in nats per character."""
    keras.utils.set_random_seed(seed)
    small = gpt_tf.GPTModel(
        vocab_size, embedding_dim, 2, num_heads, context_length=context_length
    )
    compile_for(small, augmented_steps, jit_compile=False)
    data = gpt_tf.Windows(
        tenth,
        context_length,
        batch_size,
        seed=seed,
        augmentation={"bpe_dropout": rate},
        tokenizer=tokenizer,
    )
    losses = small.fit(
        data.dataset(),
        validation_data=val,
        epochs=3,
        steps_per_epoch=max(1, augmented_steps // 3),
        verbose=0,
    ).history["val_loss"]
    return min(losses) * tokens_per_character


plain = [best_loss(0.0, seed) for seed in seeds]
augmented = [best_loss(0.1, seed) for seed in seeds]
gains = [100 * (1 - a / p) for a, p in zip(augmented, plain, strict=True)]
print("\nseed  without  with BPE dropout")
for seed, *row in zip(seeds, plain, augmented, gains, strict=True):
    print("{:4}  {:7.3f}  {:7.3f}   {:.1f} % lower".format(seed, *row))

# %% [markdown]
# ## Keep it, and all in one table
#
# `.keras` and `tokenizer.json` in one folder are what the other tutorials take as
# `model`. The exported file is for devices, as [tutorial 1](01_make_it_fast.ipynb)
# explains.

# %%
trained = gpt_tf.GPTModel.from_config(model.get_config())
trained.set_weights(model.get_weights())  # without the optimiser's state
trained.save(folder / "model.keras")
tokenizer.save(folder)
model, tokenizer, _ = gpt_tf.open_model(folder)
gpt_tf.export_litertlm(model, tokenizer, folder / "gpt.litertlm", "dynamic_int8")

# Perplexity in the table: both score the same pieces, a quarter of the held-out text.
length = min(context_length, len(held_out_ids))
count = len(held_out_ids) // length
pieces = np.reshape(held_out_ids[: count * length], (count, length))[::4]

prompt_ids = tokenizer.encode(prompt)
table = {}
with gpt_tf.EdgeGPT(folder / "gpt.litertlm") as file:
    for name, gpt, place in (
        ("Keras", model, folder / "model.keras"),
        ("int8 file", file, folder / "gpt.litertlm"),
    ):
        seconds = []
        for _ in range(repeats + 1):  # the first call warms up
            start = time.perf_counter()
            ids = gpt.generate(prompt_ids, max_new_tokens=40, temperature=0)
            seconds.append((time.perf_counter() - start) / len(ids))
        table[name] = {
            "MB": place.stat().st_size / 1e6,
            "ms": 1000 * float(np.median(seconds[1:])),
            "text": tokenizer.decode(ids),
        }
    scored = np.array([-file.score(ids) for ids in pieces])
logits = model.predict(pieces[:, :-1], verbose=0)
losses = keras.losses.sparse_categorical_crossentropy(pieces[:, 1:], logits, True)
table["Keras"]["perplexity"] = float(np.exp(np.mean(losses)))
table["int8 file"]["perplexity"] = float(np.exp(scored.mean()))


def cell(text):
    """Return the beginning of a text as a cell of a table."""
    return "`` " + " ".join(text.split())[:80].replace("|", "\\|") + " ``"


lines = ["| | MB | ms a token | tokens/s | perplexity | text |"]
lines.append("|---|---:|---:|---:|---:|---|")
for name, row in table.items():
    lines.append(
        f"| {name} | {row['MB']:.2f} | {row['ms']:.2f} | {1000 / row['ms']:,.0f} "
        f"| {row['perplexity']:.1f} | {cell(row['text'])} |"
    )
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## The result in one picture

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
steps = steps_per_epoch * np.arange(1, len(history["loss"]) + 1)
scale = tokens_per_character
axes.plot(steps, scale * np.array(history["loss"]), color="#8fa8c8", label="training")
axes.plot(
    steps,
    scale * np.array(history["val_loss"]),
    "o-",
    color="#c2410c",
    label="held out",
)
lines = [(scale * np.log(vocab_size), "untrained: ln(V)")]
lines += [(mark, "nanoGPT's model of this size")] if mark else []
for height, name in lines:
    axes.axhline(height, color="grey", linestyle=":")
    axes.annotate(
        name,
        (steps[-1], height),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="grey",
    )
axes.set_xlabel("training step")
axes.set_ylabel("loss, nats per character")
axes.set_title(
    f"A GPT of {model.count_params() / 1e6:.1f} million parameters", loc="left"
)
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where next
#
# - Longer training writes better text: set `epochs = 60` and take a break.
# - `gpt_tf.train(corpus=..., out=...)` and `gpt-tf train` do the same with checkpoints,
#   exact resume and a log: [Train on your text](../docs/how_to/train.md).
# - [Stay in Keras](../docs/how_to/keras.md) lists what else `fit` and `compile` take;
#   [Generalisation](../docs/concepts/generalisation.md) compares all augmentations.
# - The classes: [GPTModel](../gpt_tf/models/),
#   [Windows](../gpt_tf/text/),
#   [BPETokenizer](../gpt_tf/text/).
# - [Tutorial 3](03_quantise.ipynb) makes the weights integers; set its `model` to
#   `"runs/notebook-02"`.

# %%
machine = gpt_tf.describe_machine(seconds=0)
minutes = (time.perf_counter() - started[0]) / 60
cpu_minutes = (time.process_time() - started[1]) / 60
print(f"{machine['cpu']}, {machine['cores']} cores, {minutes:.1f} minutes")
results = {
    "corpus": corpus,
    "nats_per_character": per_character,
    "mark": mark,
    "plain": plain,
    "augmented": augmented,
    "table": {
        n: {k: v for k, v in row.items() if k != "text"} for n, row in table.items()
    },
    "minutes": round(minutes, 1),
    "cpu_minutes": round(cpu_minutes, 1),
}
print("results:", json.dumps(results))
