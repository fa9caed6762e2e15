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
# # 4. Distil
#
# **At the end you will have** a teacher and a student of half its layers, the same
# student trained without a teacher to compare with, the teacher's knowledge as a file,
# and a student with fewer tokens than its teacher has.
#
# **The article**, on GPT real-time performance: chapter 3.3, knowledge distillation.
# Its `Distiller`, with its `alpha` and `temperature`, is ours, and so is its student
# with a smaller vocabulary.
#
# The surest way to a faster model is a smaller one. Trained alone it knows less. But a
# large GPT that was trained before, the *teacher*, can tell it more about a text than
# the text itself: not only which token came next, but how likely every other one would
# have been. That is knowledge distillation:
#
#     teacher ── make_student ──> student
#        └──────── Distiller ──────> student that knows more
#
# Run the cells from top to bottom; on two processor cores that takes four minutes.
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

import asyncio
import email
import http
import multiprocessing
import time
import unittest
import xml

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

import gpt_tf

# %% tags=["parameters"]
packages = (asyncio, email, http, multiprocessing, unittest, xml)  # of Python's own
corpus = [package.__path__[0] for package in packages]  # or folders of your own text
vocab_size = 1024  # V
context_length = 64  # T
batch_size = 32  # B
embedding_dim = 128  # C
num_layers = 4
student_layers = 2
num_heads = 4
steps = 500
student_steps = 150
jit_compile = "auto"  # XLA; "off" starts sooner, and every step takes longer
max_new_tokens = 60

# %%
folder = Path("runs/notebook-04")  # everything that this notebook writes goes here
quiet = {
    "overwrite": True,
    "verbose": False,
    "jit_compile": jit_compile,
}

# %% [markdown]
# ## The teacher
#
# As in tutorial 1, in one call.

# %%
teacher = gpt_tf.train(
    out=folder / "teacher",
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
    **quiet,
)
print(f"{teacher.model.count_params():,} parameters")
print(f"validation perplexity {teacher.validation_perplexity:.2f}")

# %% [markdown]
# ## What the teacher knows
#
# After a few words there are several ways to go on, and the teacher weighs them. A
# label names one of them only.

# %%
beginning = "    def"
ids = np.array([teacher.tokenizer.encode(beginning)])
logits = teacher.model.predict(ids, verbose=0)[0, -1]
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
for token in np.argsort(-probabilities)[:8]:
    bar = "#" * int(60 * probabilities[token])
    print(f"{teacher.tokenizer.decode([token])!r:12} {probabilities[token]:6.1%} {bar}")

# %% [markdown]
# ## In Keras
#
# `make_student` cuts a smaller GPT out of the teacher: here every second layer, with
# the weights that they have. `Distiller` is a Keras model around both. It trains the
# student only, on
#
#     alpha * student_loss + (1 - alpha) * distillation_loss
#
# where the distillation loss is, unless something else is asked for, the divergence of
# the student's probabilities from the teacher's.

# %%
windows = gpt_tf.Windows(
    gpt_tf.TokenFile.open(folder / "teacher" / "data" / "train.tokens"),
    context_length,
    batch_size,
)
student = gpt_tf.make_student(teacher.model, num_layers=student_layers)
distiller = gpt_tf.Distiller(teacher=teacher.model, student=student)
distiller.compile(
    optimizer=gpt_tf.AdamW(1e-3),
    distillation_loss="forward_kl",
    alpha=0.1,
    temperature=2.0,
    jit_compile=jit_compile != "off",
)
history = distiller.fit(
    windows.dataset(), steps_per_epoch=max(1, student_steps // 5), epochs=2, verbose=0
)
for name in ("loss", "student_loss", "teacher_agreement", "kl_divergence"):
    print(f"{name:18}", " -> ".join(f"{v:.3f}" for v in history.history[name]))

# %% [markdown]
# Other losses go by name: `"reverse_kl"`, `"jensen_shannon"`, `"skewed_kl"`,
# `"hidden_states"`, `"attention_transfer"`; or several, each with a weight:
# `[("forward_kl", 1.0), ("hidden_states", 0.1)]`.

# %% [markdown]
# ## In one call, beside a student that learns alone
#
# `gpt_tf.distil` (on the command line, `gpt-tf distil`) does the same with a schedule,
# validation, checkpoints and exact resume. Is the teacher worth it? The same student
# trained without one, on the same text for as many steps, says. A third one begins with
# the teacher's layers and learns alone: it shows what comes of the layers, and what of
# the probabilities. After a teacher that was trained as briefly as ours the layers are
# nearly everything, and the text itself teaches as much as it does, or more. In
# `benchmarks/distillation.py`, a teacher trained until it stopped improving adds more.

# %%
course = {
    "steps": student_steps,
    "learning_rate": 3e-3,
    "warmup_steps": student_steps // 10,
    "validate_every": max(1, student_steps // 5),
    "validation_batches": 20,
}
distilled = gpt_tf.distil(
    folder / "teacher",
    folder / "distilled",
    {"num_layers": student_layers},
    **course,
    **quiet,
)
alone = gpt_tf.train(
    out=folder / "alone",
    corpus=corpus,
    tokenizer=str(folder / "teacher"),
    embedding_dim=embedding_dim,
    num_layers=student_layers,
    num_heads=num_heads,
    context_length=context_length,
    batch_size=batch_size,
    **course,
    **quiet,
)
same_start = gpt_tf.train(
    out=folder / "same-start",
    corpus=corpus,
    init_from=str(folder / "distilled" / "initial"),
    context_length=context_length,
    batch_size=batch_size,
    **course,
    **quiet,
)
results = {
    "teacher": teacher,
    "alone": alone,
    "alone, from the teacher's layers": same_start,
    "distilled": distilled,
}
for name, result in results.items():
    print(
        f"{name:34} {result.model.count_params():>9,} parameters, "
        f"perplexity {result.validation_perplexity:6.2f}"
    )

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
colours = ("#9a9a9a", "#e0a184", "#c2410c")
for (name, result), colour in zip(list(results.items())[1:], colours, strict=True):
    rows = result.history["validations"]
    axes.plot(
        [row["step"] for row in rows],
        [row["perplexity"] for row in rows],
        "o-",
        color=colour,
        label=name,
    )
axes.axhline(
    teacher.validation_perplexity, color="#555555", linestyle="--", label="teacher"
)
axes.set_yscale("log")
axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
axes.yaxis.set_major_formatter("{x:g}")
axes.yaxis.set_minor_formatter("")
axes.set_xlabel("training step")
axes.set_ylabel("validation perplexity")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Knowledge, extracted once
#
# The teacher says the same of a text every time. Stored once, its 32 likeliest next
# tokens teach any number of students, without the teacher in memory and in less time.

# %%
store = gpt_tf.extract_knowledge(
    folder / "teacher", folder / "knowledge", overwrite=True
)
stored = gpt_tf.distil(
    folder / "teacher",
    folder / "stored",
    {"num_layers": student_layers, "knowledge": str(folder / "knowledge")},
    **course,
    **quiet,
)
print(f"live   {distilled.validation_perplexity:.2f}")
print(f"stored {stored.validation_perplexity:.2f}")

# %% [markdown]
# ## Another vocabulary
#
# A smaller vocabulary makes the model smaller still. With a tokenizer that is derived
# from the teacher's, every token of the teacher is a sequence of the student's, and the
# teacher's probabilities are mapped to them. Perplexities over different tokens do not
# compare; bits per byte of text do.

# %%
small = gpt_tf.distil(
    folder / "teacher",
    folder / "small",
    {"num_layers": student_layers, "vocab_size": vocab_size * 9 // 10},
    **course,
    **quiet,
)


def bits_per_byte(result):
    tokens = gpt_tf.TokenFile.open(result.out / "data" / "validation.tokens")
    nats = result.validation_loss * (tokens.count - 1)
    return nats / np.log(2) / tokens.text_bytes


for name, result in {**results, "distilled, fewer tokens": small}.items():
    print(f"{name:34} {bits_per_byte(result):.3f} bits per byte")

# %% [markdown]
# ## Faster?
#
# Half the layers are half the work in the blocks. In models as small as these what a
# call costs by itself counts as much; in larger ones the ratio comes near 2.

# %%
prompt = teacher.tokenizer.encode("import")
models = {"teacher": teacher.model, "student": distilled.model}
seconds = {name: [] for name in models}
for turn in range(6):
    for name, model in models.items():
        began = time.perf_counter()
        written = gpt_tf.generate(
            model, prompt, max_new_tokens=max_new_tokens, temperature=0
        )
        if turn:  # the first call compiles
            seconds[name].append((time.perf_counter() - began) / len(written))
for name, times in seconds.items():
    print(f"{name}: {1 / np.median(times):,.0f} tokens per second (median of 5)")

# %%
print(
    gpt_tf.generate(
        distilled.model,
        "def",
        tokenizer=teacher.tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=0.7,
        seed=3,
    )
)

# %% [markdown]
# ## Where next
#
# - From a terminal:
#
#       gpt-tf distil --teacher runs/mine --student-layers 2 --out runs/student
#
#   `gpt-tf distil --help` lists what else there is: text that the teacher writes, steps
#   in which the student writes and the teacher judges, and `--quantize`, which distils
#   and quantises at once.
# - The student is a GPTModel like any other: tutorial 3 quantises one, and tutorial 5
#   makes it a file.
