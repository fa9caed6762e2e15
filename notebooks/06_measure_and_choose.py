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
# **At the end you will have** a GPT and its student as several files; of each file its
# speed and its accuracy, measured, with their spread; a picture of what can be had; the
# file to ship under a budget, with reasons, and what is said where none fits; and a
# stored measurement that shows when something got worse.
#
# **The article**, on GPT real-time performance: chapter 6.1 asks how real-time
# performance is assessed, chapter 6.2 what it costs in accuracy, chapter 6.3 which
# strategy suits a case.
#
#     a model -> bounds -> optimize -> report -> recommend -> the file to ship
#
# Run the cells from top to bottom; on two processor cores that takes four minutes.
# Tutorial 1 explains the words for training, tutorials 3 to 5 how files are made.

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
import collections
import email
import http
import multiprocessing
import statistics
import unittest
import xml

from IPython.display import Image

import gpt_tf
from gpt_tf.advisor.estimate import estimate, refuse_impossible
from gpt_tf.advisor.ranking import Budgets, print_recommendation, recommend
from gpt_tf.evaluation.accuracy import held_out_text, measure_accuracies
from gpt_tf.evaluation.hardware import describe_machine
from gpt_tf.evaluation.latency import compare_latencies
from gpt_tf.evaluation.regression import compare_with_baseline, read_baseline
from gpt_tf.evaluation.report import entry_of, new_report
from gpt_tf.reporting.plots import draw
from gpt_tf.reporting.tables import print_latency
from gpt_tf.workflow.optimization import optimize

# %% tags=["parameters"]
packages = (asyncio, email, http, multiprocessing, unittest, xml)  # of Python's own
corpus = [package.__path__[0] for package in packages]  # or folders of your own text
vocab_size = 1024  # V
context_length = 64  # T
batch_size = 32  # B
embedding_dim = 128  # C
num_layers = 4
num_heads = 4
steps = 400
jit_compile = "auto"  # XLA; "off" starts sooner, and every step takes longer
students = (1,)  # blocks of each student
student_steps = 60
modes = ("dynamic_int8", "int4")
evaluated_tokens = 10_000
prompt_tokens = 32
new_tokens = 32
repetitions = 20  # requests of each file

# %%
folder = Path("runs/notebook-06")  # everything that this notebook writes goes here

# %% [markdown]
# ## A model that is to become fast
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
    learning_rate=5e-3,
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
# ## Before anything is measured
#
# A file's size follows from the model's, nearly exactly. Its speed has a bound: a token
# costs one reading of all weights, and how fast this machine reads memory is measured
# in two seconds. A model that fits the processor's caches, as this one does, is not
# bound by memory. What a mode costs in accuracy cannot be told before it is measured.

# %%
machine = describe_machine()
for threads, rate in machine["read_bytes_per_s"].items():
    print(f"{threads} thread(s) read {rate / 1e9:.1f} GB from memory in a second")

print(f"\n{'mode':14} {'MB':>6} {'MB read a token':>16} {'ms at least':>12}")
for mode in ("float32", *modes):
    found = estimate(trained.model.get_config(), mode, machine)
    size, read = (found[name] / 1e6 for name in ("size_bytes", "bytes_per_token"))
    print(f"{mode:14} {size:6.2f} {read:16.2f} {found['least_latency_ms']:12.3f}")

# %% [markdown]
# What no file of this model can keep is refused at once, and not after the training:

# %%
try:
    budgets = Budgets(
        max_size_mb=estimate(trained.model.get_config(), "int4", machine)["size_bytes"]
        / 1e6
        / 3
    )
    refuse_impossible(budgets, trained.model.get_config(), machine)
except gpt_tf.InputError as error:
    print(error)

# %% [markdown]
# ## One command
#
# `optimize` (on the command line, `gpt-tf optimize`) takes the model, or trains one
# without `model`, distils students, quantises each, exports, measures every *file*, and
# chooses one. It says what it is at. Killed and started again it goes on where it was.

# %%
options = {
    "model": str(folder / "gpt"),
    "students": students,
    "student_steps": student_steps,
    "modes": modes,
    "evaluated_tokens": evaluated_tokens,
    "prompt_tokens": prompt_tokens,
    "new_tokens": new_tokens,
    "repetitions": repetitions,
    "explained_prompts": 0,  # tutorial 7 explains
}
report = optimize(options, folder / "optimized", overwrite=True)

# %% [markdown]
# The folder has the files, the runs that they come from, and the report three times:
# `report.html` for people, which opens without a network, `report.json` for programs,
# and its pictures.

# %%
names = sorted(path.name for path in (folder / "optimized").glob("[!.]*.*"))
print(*names, sep="\n")

# %% [markdown]
# An entry of the report is a file. The *increase* is how far its perplexity on held-out
# text lies above that of the model as float32, with the interval that holds it in 95 of
# 100 cases. Of the times from token to token there are the median and percentiles: of
# 100 tokens 95 come within p95, 99 within p99. Text that comes evenly feels fast, so a
# budget is about p95.

# %%
title = f"{'file':24} {'MB':>5} {'increase (95 %)':>25} {'median':>8} {'p95':>7}"
print(f"{title} {'p99':>7}  ms")
for entry in report["entries"]:
    size = entry["size_bytes"] / 1e6
    more = entry["accuracy"]["perplexity_increase"]
    between = f"{more['value']:.1%} ({more['low']:.1%} to {more['high']:.1%})"
    gaps = entry["latency"]["inter_token_latency_ms"]
    times = f"{gaps['median']:8.3f} {gaps['p95']:7.3f} {gaps['p99']:7.3f}"
    print(f"{entry['name']:24} {size:5.2f} {between:>25} {times}")

# %% [markdown]
# Nobody named a budget yet, so the file with the smallest increase is chosen; of those
# that tie with it within measurement error, the fastest:

# %%
print_recommendation(report["recommendation"])

sample = report["recommendation"]["sample"]
print("What it writes:\n")
print(sample["prompt"] + sample["text"])

# %% [markdown]
# ## How fast? (6.1)
#
# "Fast" is several quantities. The *time to the first token* grows with the prompt, the
# *inter-token latency* with the weights and the text so far, the *response time* is
# both together. A *cold start* counts from a new process to its first token. A single
# number hides which one a user waits for.
#
# Here are two files side by side: they take turns, A B A B, each turn in a new process,
# so that a busy minute of the machine meets both. The first requests of each do not
# count.

# %%
paths = {
    entry["name"]: folder / "optimized" / entry["path"] for entry in report["entries"]
}
first = report["reference"]
second = report["recommendation"]["ranking"][0]
if second == first:
    second = report["recommendation"]["runner_up"]

found = compare_latencies(
    [paths[first], paths[second]],
    prompt_tokens=prompt_tokens,
    new_tokens=new_tokens,
    contexts=(context_length // 8, context_length // 2),
    thread_counts=(1, 2),
    requests=(1, 4),
    repetitions=repetitions,
    rounds=3,
    read_bytes_per_s=machine["read_bytes_per_s"],
)
side_by_side = new_report(
    [
        entry_of(report, name) | {"latency": latency}
        for name, latency in zip((first, second), found, strict=True)
    ]
)
print_latency(side_by_side)

# %% [markdown]
# The *share of the bandwidth* compares a token with reading: all weights, once, at the
# rate at which NumPy read memory above, and nothing else. That rate is a yardstick and
# no bound: a loop in C reads up to twice as fast, and a model that fits into the
# processor's cache, as these do, is not bound by memory at all.

# %%
draw("latency", side_by_side, folder / "latency.png")
Image(folder / "latency.png", width=480)

# %% [markdown]
# ## How accurate? (6.2)
#
# Perplexity depends on the text that happened to be held out. So the text is cut into
# blocks, and the blocks are drawn anew 2,000 times: 95 of 100 results lie within the
# interval. For a comparison the same blocks are drawn for both files, and what is hard
# for both cancels: two perplexities whose intervals overlap can still differ for sure.
# `measure_accuracies` runs the files themselves.

# %%
text = held_out_text(folder / "gpt")
with gpt_tf.EdgeGPT(paths[first]) as reference, gpt_tf.EdgeGPT(paths[second]) as other:
    for count in (evaluated_tokens // 10, evaluated_tokens):
        accuracies = measure_accuracies(
            {first: reference, second: other}, first, text, max_tokens=count
        )
        print(f"{accuracies[first]['tokens']:,} tokens")
        for name, accuracy in accuracies.items():
            for measure in ("perplexity", "perplexity_increase", "top1_agreement"):
                value, low, high = accuracy[measure].values()
                numbers = f"{value:8.4f}, {low:.4f} to {high:.4f}"
                print(f"  {name:22} {measure:20} {numbers}")

# %% [markdown]
# Ten times the text makes an interval about three times as narrow, and what can be
# concluded from it more. Of all files:

# %%
draw("accuracy", report, folder / "accuracy.png")
Image(folder / "accuracy.png", width=600)

# %% [markdown]
# ## Which one? (6.3)
#
# That depends on what can be afforded. `recommend` chooses among what was measured.
# Budgets decide what may be shipped at all; of the files within all of them the one
# with the smallest increase in perplexity is chosen. Suppose that a file may be as
# large as the middle one of ours, and take as long for a token as the middle one:

# %%
sizes_mb = [entry["size_bytes"] / 1e6 for entry in report["entries"]]
p95s_ms = [
    entry["latency"]["inter_token_latency_ms"]["p95"] for entry in report["entries"]
]
budgets = Budgets(
    max_size_mb=statistics.median(sizes_mb), max_latency_ms=statistics.median(p95s_ms)
)
report["recommendation"] = recommend(report, budgets)
print_recommendation(report["recommendation"])

# %% [markdown]
# The picture has accuracy against latency, and size as area. Only on the frontier is
# there something to choose: whatever lies above it is beaten in both by another file
# within the budgets.

# %%
draw("pareto", report, folder / "pareto.png")
Image(folder / "pareto.png", width=600)

# %% [markdown]
# A scenario brings its own budgets and its own idea of the best: a phone the quickest
# file, a board the smallest, a server the throughput of several requests at once.

# %%
for scenario in ("phone", "board", "server"):
    chosen = recommend(report, scenario=scenario)
    print(f"{scenario}: {chosen['choice']}")
    print("   ", chosen["why"][0])
    if chosen["nearest_miss"]:
        print("   ", chosen["nearest_miss"]["sentence"])
    for excluded in chosen["ruled_out"]:
        print(f"    not {excluded['name']}: {excluded['sentence']}")

# %% [markdown]
# A budget is a limit and no wish. What is to be best within the limits can be said
# outright:

# %%
for prefer in ("accuracy", "latency", "size"):
    chosen = recommend(report, budgets, prefer=prefer)
    print(f"{prefer}: {chosen['why'][0]}")

# %% [markdown]
# Where nothing fits there is no choice, and no excuse: the nearest miss is named, with
# the budgets that would admit it.

# %%
too_little = Budgets("0.1%", max_size_mb=0.9 * min(sizes_mb))
print_recommendation(recommend(report, too_little))

# %% [markdown]
# ## Another budget
#
# Budgets choose and make nothing. `optimize` with other ones does what is left to do,
# which is to choose: every stage was done before, and is known by the hashes of its
# inputs. The chosen file lies in its place, `gpt.litertlm`.

# %%
report = optimize(options, folder / "optimized", budgets=budgets)
choice = report["recommendation"]["choice"]
print(f"\n{choice}" if choice else "\nnothing fits")

# %% [markdown]
# ## Did it get worse?
#
# A stored report is a *baseline*. After a change of the code, of a library, of the
# machine, the same files are measured again. A difference counts as one if it is beyond
# noise: for a time, if the processes of both differ by a Mann-Whitney U test, and by at
# least 5 %. Extremes as the p99 are shown and not judged. Let us measure the same file
# once more. (What is still called worse or better then, is the machine: it was busy
# with something else.)

# %%
settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
baseline = read_baseline(folder / "optimized", **settings)
shipped = choice or second
(again,) = compare_latencies(
    [paths[shipped]],
    **settings,
    repetitions=repetitions,
    read_bytes_per_s=machine["read_bytes_per_s"],
)
entry = entry_of(report, shipped)
facts = {"machine": report["machine"], "corpus": report["corpus"]}
today = new_report([entry | {"latency": again}], **facts)
compared = compare_with_baseline(today, baseline)
changes = collections.Counter(row["change"] for row in compared["rows"])
print(f"{changes['none']} within noise, {changes[None]} not judged")
for row in compared["rows"]:
    if row["change"] in ("worse", "better"):
        print(f"{row['change']:8} {row['metric']:32} {row['ratio']:.2f} times")

# %% [markdown]
# And what if someone had shipped the float32 file under the name of this one?
# `gpt-tf benchmark` with `--baseline` would end with status 1, for a build to stop at.

# %%
mistaken = new_report([entry_of(report, first) | {"name": shipped}], **facts)
compared = compare_with_baseline(mistaken, baseline)
print(f"regressed: {compared['regressed']}")
for row in compared["rows"]:
    if row["change"] in ("worse", "better"):
        before, after = (f"{row[side]:,.4g}" for side in ("before", "after"))
        print(f"{row['change']:8} {row['metric']:32} {before:>12} -> {after:>12}")

# %% [markdown]
# ## Where next
#
# - From a terminal, each step by itself or all in one:
#
#       gpt-tf optimize --corpus python-stdlib --max-latency-ms 15 --max-size-mb 8 \
#           --max-perplexity-increase 3% --out runs/optimized
#       gpt-tf benchmark a.litertlm b.litertlm --out report.json
#       gpt-tf evaluate a.litertlm b.litertlm --reference a.litertlm
#       gpt-tf recommend runs/optimized --scenario phone
#       gpt-tf recommend --estimate runs/mine
#
# - The numbers are those of the machine that measured. A device that is to run the file
#   needs `pip install '.[edge]'` for `gpt-tf benchmark`, and no TensorFlow.
# - Tutorial 7 asks the chosen file why it says what it says.
