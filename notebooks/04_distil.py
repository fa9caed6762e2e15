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
# **Result:** a student that begins with half of the teacher's layers and learns from
# its probabilities has a perplexity at least 5 % lower than the same student that
# learns from labels for as long, on 150,000 tokens of text: 21.3 against 22.9 on
# average. Seeds differ by less than 0.3. With fresh weights distillation does not
# win: in this time labels teach more, and neither gets far. Most of what a student
# knows comes from the layers.
#
# ![The result](attachment:result.png)
#
# **At the end you have** a student with half of its teacher's layers, three others to
# compare it with, the teacher's knowledge as a file, and the speed of both as files.
#
# **The article**, on GPT real-time performance: chapter 3.3, knowledge distillation,
# and chapter 4.3, its implementation. Its `Distiller`, with `alpha` and `temperature`,
# is the one used here.
#
# **In gpt_tf:** [3.3](../docs/article.md#33-distillation),
# [4.3](../docs/article.md#43-distillation-in-tensorflow).
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
# The teacher should be trained to the end.
# `python-small`, which comes with gpt_tf, was trained on Python's sources for 6 million
# tokens. The students get a small part of that text: you often have a good model and
# little text of the kind that you need. To distil your own GPT, set `model` to its
# folder and `corpus` to your text.

# %% tags=["parameters"]
model = "python-small"  # yours: a folder that gpt_tf.train or tutorial 2 wrote
corpus = "python-stdlib"  # yours: a file or folder of text
every = 15  # train students on every 15th document of it
prompt = "def read_lines(self"  # a prompt must not end in a space
student_layers = 2
steps = 120  # of every student that learns from the teacher
label_steps = 180  # of every other one: its steps take two thirds of the time
batch_size = 8
rates = (3e-4, 1e-3, 3e-3)  # learning rates that every kind of student tries
seeds = (0, 1, 2)
num_windows = 120  # held-out windows: half to choose rates by, half to report
max_new_tokens = 48
repeats = 20

# %%
if model == "python-small":
    model = gpt_tf.shipped_model(model)
folder = Path("runs/notebook-04")  # everything that this notebook writes goes here
folder.mkdir(parents=True, exist_ok=True)

teacher, tokenizer, _ = gpt_tf.open_model(model)
length = teacher.context_length
text = gpt_tf.open_corpus(corpus)
tokens = gpt_tf.write_token_file(
    folder / "train.tokens", list(text.documents("train"))[::every], tokenizer
)
held_out = gpt_tf.write_token_file(
    folder / "validation.tokens", text.documents("validation"), tokenizer
).tokens
starts = np.linspace(0, len(held_out) - length - 1, num_windows).astype(int)
windows = np.stack([held_out[s : s + length + 1] for s in starts]).astype(np.int32)
choose, report = windows[::2], windows[1::2]

print(f"teacher: {teacher.count_params():,} parameters")
print(f"text of the students: {tokens.count:,} tokens")

# %% [markdown]
# ## 1. What the teacher knows
#
# After a few words there are several ways to go on. The text names one of them. The
# teacher gives each a probability.

# %%
beginning = "    return"


def log_probabilities(gpt, inputs):
    """Return a Keras model's log-probabilities of every next token, (N, T, V)."""
    logits = gpt.predict(inputs, batch_size=20, verbose=0).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


last = log_probabilities(teacher, np.array([tokenizer.encode(beginning)]))[0, -1]
for token in np.argsort(-last)[:8]:
    share = np.exp(last[token])
    print(f"{tokenizer.decode([token])!r:12} {share:6.1%} {'#' * int(100 * share)}")

# %% [markdown]
# ## 2. Store it once
#
# The teacher's predictions on a fixed text do not change. `extract` saves the 32 most
# probable next tokens of every position, in 97 bytes, and any number of students can
# then train without the teacher. `passes` is how often the text is cut into windows
# anew.

# %%
passes = max(1, round(steps * batch_size * length / tokens.count))
start = time.process_time()
store = gpt_tf.extract(
    teacher,
    tokens,
    folder / "knowledge",
    tokenizer=tokenizer,
    passes=passes,
    overwrite=True,
)
extraction_seconds = time.process_time() - start
print(
    f"{passes} passes, {store.size_bytes / 1e6:.1f} MB, "
    f"{extraction_seconds:.0f} seconds of CPU time"
)

# %% [markdown]
# ## 3. A student and its Distiller
#
# `make_student` copies some of the teacher's layers, here every second one, into a
# smaller GPT. `Distiller` is a Keras model that trains the student on
#
#     alpha * student_loss + (1 - alpha) * distillation_loss
#
# where the student's loss is that of the labels and the distillation loss is the
# divergence of the student's probabilities from the teacher's. With
# `Distiller(teacher=teacher, student=student)` the teacher runs along and nothing needs
# to be stored. Compare the time of a step:

# %%
ways = {
    "labels": lambda student: student,
    "teacher, stored": lambda s: gpt_tf.Distiller(teacher=None, student=s),
    "teacher, running": lambda s: gpt_tf.Distiller(teacher=teacher, student=s),
}
plain = gpt_tf.Windows(tokens, length, batch_size)
stored = store.windows(tokens, batch_size)
step_ms = {}
for name, way in ways.items():
    learner = way(gpt_tf.make_student(teacher, num_layers=student_layers))
    learner.compile(gpt_tf.AdamW(1e-3), jit_compile=False)
    data = (stored if name == "teacher, stored" else plain).dataset()
    learner.fit(data, steps_per_epoch=2, verbose=0)  # compiles
    start = time.process_time()
    learner.fit(data, steps_per_epoch=30, verbose=0)
    step_ms[name] = 1000 * (time.process_time() - start) / 30
    print(f"{name:18} {step_ms[name]:5.0f} ms of CPU time a step")

# %% [markdown]
# ## 4. Four students
#
# Two things can come from the teacher: the layers that the student begins with, and
# the probabilities that it learns from. Each is switched on by itself. Every kind of
# student has the same time: those that learn from labels take 1.5 times as many steps.
# Every kind tries the same learning rates with one seed, and keeps the one that is best
# on one half of the held-out windows. The other half is reported, for three seeds,
# which decide the order of the text and the fresh weights.

# %%


def train_student(from_layers, from_teacher, rate, seed):
    """Train one student; the learning rate rises, then falls to a twentieth."""
    keras.utils.set_random_seed(seed)
    student = gpt_tf.make_student(teacher, num_layers=student_layers)
    if not from_layers:
        student = gpt_tf.GPTModel.from_config(student.get_config())
    learner, data = student, gpt_tf.Windows(tokens, length, batch_size, seed=seed)
    if from_teacher:
        learner = gpt_tf.Distiller(teacher=None, student=student)
        data = store.windows(tokens, batch_size, seed=seed)
    count = steps if from_teacher else label_steps
    rise = max(1, count // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, count - rise, alpha=0.05, warmup_target=rate, warmup_steps=rise
    )
    loss = {"alpha": 0.1, "temperature": 2.0} if from_teacher else {}
    learner.compile(gpt_tf.AdamW(schedule), jit_compile=False, **loss)
    learner.fit(data.dataset(), steps_per_epoch=count, verbose=0)
    return student


def judge(student, windows):
    """Return perplexity, and how near a student is to the teacher."""
    found = log_probabilities(student, windows[:, :-1])
    wanted = log_probabilities(teacher, windows[:, :-1])
    of_text = np.take_along_axis(found, windows[:, 1:, None], axis=-1)
    return {
        "perplexity": float(np.exp(-of_text.mean())),
        "agreement": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
        "divergence": float((np.exp(wanted) * (wanted - found)).sum(-1).mean()),
    }


kinds = {
    "fresh weights, labels": (False, False),
    "fresh weights, teacher's probabilities": (False, True),
    "teacher's layers, labels": (True, False),
    "teacher's layers, teacher's probabilities": (True, True),
}
found, chosen, best = {}, {}, None
for name, kind in kinds.items():
    tried = {rate: train_student(*kind, rate, seeds[0]) for rate in rates}
    chosen[name] = min(rates, key=lambda r: judge(tried[r], choose)["perplexity"])
    students = [tried[chosen[name]]]
    students += [train_student(*kind, chosen[name], seed) for seed in seeds[1:]]
    found[name] = [judge(student, report) for student in students]
    best = students[0]
    seen = ", ".join(f"{row['perplexity']:.2f}" for row in found[name])
    print(f"{name:42} rate {chosen[name]:g}, perplexity {seen}")

# %% [markdown]
# The table shows means over the seeds; ± is half of the range. Agreement is the share
# of positions at which teacher and student have the same most likely token, divergence
# the distance of their probabilities in nats.

# %%


def spread(name, key, digits=2, factor=1):
    """Return mean and half of the range over the seeds as text."""
    values = [factor * row[key] for row in found[name]]
    return f"{np.mean(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"


of_teacher = judge(teacher, report)
lines = ["| | perplexity | agreement | divergence |", "|---|---:|---:|---:|"]
lines += [f"| the teacher itself | {of_teacher['perplexity']:.2f} | 100 % | 0 |"]
lines += [
    f"| {name} | {spread(name, 'perplexity')} "
    f"| {spread(name, 'agreement', 1, 100)} % | {spread(name, 'divergence')} |"
    for name in kinds
]
display(Markdown("\n".join(lines)))

# %% [markdown]
# From the teacher's layers its probabilities win: the perplexity is 6.7 % lower, and
# the student agrees with its teacher at 64 % of the positions instead of 57 %. From
# fresh weights labels win: 120 steps are too few to imitate a teacher from nothing.
# So copy layers first, then distil. Storing the predictions took as long as 75 steps,
# once for all students.
#
# ## 5. As files
#
# The student is an ordinary `GPTModel`: export it like any other.

# %%
sources = {"teacher": (teacher, "float32"), "student": (best, "float32")}
sources |= {
    f"{name}, int8": (gpt, "dynamic_int8") for name, (gpt, _) in sources.items()
}
paths = {name: folder / f"{name.replace(', ', '-')}.litertlm" for name in sources}
for name, (gpt, mode) in sources.items():
    gpt_tf.export_litertlm(gpt, tokenizer, paths[name], mode)

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
    nats = np.mean([-file.score(row).mean() for row in report])
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
        f"| {name} | {row['MB']:.2f} | {row['ms']:.3f} | {1000 / row['ms']:,.0f} "
        f"| {row['perplexity']:.2f} | {cell(row['text'])} |"
    )
display(Markdown("\n".join(lines)))

# %% [markdown]
# The teacher's int8 file is smaller and more accurate than the student in float32, and
# about as fast: quantise first. Distil where int8 is still too slow, and quantise the
# student as well.
#
# ## The result in one picture

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
pairs = list(kinds)[:2], list(kinds)[2:]
titles = "student begins with fresh weights", "student begins with the teacher's layers"
for axis, names, title in zip(axes, pairs, titles, strict=True):
    for place, (name, colour) in enumerate(
        zip(names, ("#9a9a9a", "#c2410c"), strict=True)
    ):
        values = [row["perplexity"] for row in found[name]]
        bar = axis.bar(place, np.mean(values), 0.6, color=colour)
        axis.bar_label(bar, [f"{np.mean(values):.1f}"], padding=3)
        axis.plot([place] * len(values), values, "k.", markersize=4)
    axis.axhline(of_teacher["perplexity"], color="#555555", linestyle="--")
    axis.text(0.5, of_teacher["perplexity"], "teacher", ha="center", va="bottom")
    axis.set_xticks([0, 1], ["labels", "teacher's\nprobabilities"])
    axis.set_title(title, loc="left")
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("held-out perplexity (dots: seeds)")
plt.show()

# %% [markdown]
# ## Where next
#
# - Other losses go by name: `distiller.compile(distillation_loss="reverse_kl")`,
#   `"jensen_shannon"`, `"skewed_kl"`, `"hidden_states"`, `"attention_transfer"`, or
#   several with weights, `[("forward_kl", 1.0), ("hidden_states", 0.1)]`.
# - From a terminal, with checkpoints and resume:
#
#       gpt-tf distil --teacher runs/mine --student-layers 2 --out runs/student
#
# - With more text labels teach more. [Distillation](../docs/concepts/distillation.md)
#   has what was measured on larger texts, where the gap is smaller.
# - The functions: [make_student](../gpt_tf/distillation/),
#   [Distiller](../gpt_tf/distillation/),
#   [extract](../gpt_tf/distillation/).
# - [Tutorial 5](05_export_and_run.ipynb) runs a file on a device.

# %%
machine = gpt_tf.describe_machine(seconds=0)
minutes = (time.perf_counter() - started[0]) / 60
cpu_minutes = (time.process_time() - started[1]) / 60
print(f"{machine['cpu']}, {machine['cores']} cores, {minutes:.1f} minutes")
results = {
    "perplexity": {n: [row["perplexity"] for row in rows] for n, rows in found.items()},
    "agreement": {n: [row["agreement"] for row in rows] for n, rows in found.items()},
    "divergence": {n: [row["divergence"] for row in rows] for n, rows in found.items()},
    "teacher_perplexity": of_teacher["perplexity"],
    "rates": chosen,
    "step_ms": step_ms,
    "extraction_seconds": extraction_seconds,
    "files": {
        n: {k: v for k, v in row.items() if k != "text"} for n, row in table.items()
    },
    "minutes": round(minutes, 1),
    "cpu_minutes": round(cpu_minutes, 1),
}
print("results:", json.dumps(results))
