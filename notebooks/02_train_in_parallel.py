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
# # 2. Train in parallel
#
# **At the end you will have** one small GPT trained in five ways: on one device, and on
# several devices between which the data, the layers, the weights or the positions of
# the text are divided. You will have seen which device holds what, and that the five
# models are the same, up to rounding. Each stays a Keras model with `compile`, `fit`
# and `save`; only how it is built changes.
#
# **The article**, on GPT real-time performance: chapter 3.1, parallel computation. It
# parts a GPT by layers and by subsequences, gives each part a node, and trains under
# TensorFlow's `MirroredStrategy`.
#
# Parallel computation always goes alike: cut the work into parts that do not wait for
# each other, give each part a device, and run them at once. A GPT can be cut in several
# places:
#
# | cut | each device has | devices exchange | in gpt_tf |
# |---|---|---|---|
# | data | the whole model, some windows | gradients | `make_strategy("mirrored")` |
# | layers | some layers, all windows | activations between layers | `Pipeline` |
# | weights | some heads and units of every layer | sums in every layer | `MeshGPT` |
# | sequence | the whole model, some positions | keys and values | `MeshGPT` |
#
# All of it runs on a laptop without a GPU, because TensorFlow can take one processor
# for several *logical devices*. Run the cells from top to bottom; on two cores that
# takes two minutes. Tutorial 1 explains the words for training, and the letters `B`,
# `T`, `C` and `V`.

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

import gpt_tf

gpt_tf.split_cpu(4)

# %% [markdown]
# That comes before anything else. TensorFlow counts its devices once, when it is first
# used, and cannot count again: after that `split_cpu` refuses, and you need a new
# kernel. Where a machine has enough GPUs, everything below takes those instead.

# %%
import email
import statistics
import time

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tf_keras as keras
from matplotlib.patches import Rectangle
from tensorflow.experimental import dtensor

from gpt_tf.parallel.mesh import layout, place
from gpt_tf.parallel.pipeline import balance, computed_costs, tasks_of

tf.get_logger().setLevel("ERROR")
print(*[device.name for device in tf.config.list_logical_devices()], sep="\n")

# %% tags=["parameters"]
corpus = sorted(Path(email.__file__).parent.glob("*.py"))  # or your own text
vocab_size = 512  # V
context_length = 64  # T
batch_size = 16  # B
embedding_dim = 96  # C
num_layers = 4
num_heads = 4
steps = 100
steps_per_epoch = 5
timed_rounds = 5  # of as many steps as an epoch has

# %%
folder = Path("runs/notebook-02")  # everything that this notebook writes goes here

# %% [markdown]
# ## The text
#
# Python's own package `email`, as in tutorial 1: documents, tokens, windows. A step's
# batch depends on the number of the step only, so every way of training below sees the
# same windows in the same order.

# %%
text = gpt_tf.open_corpus(corpus)
tokenizer = gpt_tf.BPETokenizer.train(
    (document.text for document in text.documents("train")), vocab_size
)
tokens = gpt_tf.write_token_file(
    folder / "train.tokens", text.documents("train"), tokenizer
)
windows = gpt_tf.Windows(tokens, context_length, batch_size)

print(f"{tokens.count:,} tokens, {windows.steps_per_epoch} batches of {batch_size}")

# %% [markdown]
# ## One device
#
# The reference. Its weights before training are kept, because all others begin with
# them.
#
# `jit_compile=False` leaves out XLA, which makes one large computation of a step.
# Where you train for longer, leave it on: compiling costs seconds once. Here the small
# models would spend most of their time on it, and `MeshGPT` does without it anyway.

# %%
sizes = {
    "vocab_size": vocab_size,
    "embedding_dim": embedding_dim,
    "num_layers": num_layers,
    "num_heads": num_heads,
    "context_length": context_length,
}
models, losses, weights = {}, {}, {}


def train(name, model, windows=windows, **options):
    """Train a model from the same weights as all others, and keep what became of it."""
    model.set_weights(start)
    model.compile(gpt_tf.AdamW(2e-3), jit_compile=False, **options)
    history = model.fit(
        windows.dataset(),
        steps_per_epoch=steps_per_epoch,
        epochs=steps // steps_per_epoch,
        verbose=0,
    )
    models[name] = model
    losses[name] = history.history["loss"]
    weights[name] = model.get_weights()
    print(f"{name}: loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}")


keras.utils.set_random_seed(1)
reference = gpt_tf.GPTModel(**sizes)
start = reference.get_weights()

train("one device", reference)

# %% [markdown]
# Computers round, so the order in which numbers are added up shows in the last digits.
# How much does that matter? The same device once more, with each batch in four parts
# whose gradients are added up; and, for comparison, with the windows in another order.

# %%
train("in four parts", gpt_tf.GPTModel(**sizes), gradient_accumulation_steps=4)

other_windows = gpt_tf.Windows(tokens, context_length, batch_size, seed=1)
train("other order", gpt_tf.GPTModel(**sizes), other_windows)

# %% [markdown]
# ## Data
#
# The simplest cut, and the first to try. Every device has a *replica* of the whole
# model and computes its share of the batch. Then the gradients are added up over the
# devices, and every replica takes the same step.
#
# The strategy comes from `tf.distribute`. The model is built in its scope; that is all.

# %%
strategy = gpt_tf.make_strategy("mirrored")
print(f"{type(strategy).__name__} of {strategy.num_replicas_in_sync} replicas")

with strategy.scope():
    mirrored = gpt_tf.GPTModel(**sizes)

train("data", mirrored)

# %% [markdown]
# What each device got of a batch, and what it has of the token table. The replicas
# never exchange weights, yet they stay equal to the last bit:

# %%
batches = strategy.experimental_distribute_dataset(windows.dataset(num_steps=1))
x, y, sample_weight = next(iter(batches))
for part in strategy.experimental_local_results(x):
    print(f"{part.device[-5:]} has windows {tuple(part.shape)} (B / 4, T)")

copies = strategy.experimental_local_results(mirrored.weights[0])
for copy in copies:
    equal = np.array_equal(copy.numpy(), copies[0].numpy())
    print(f"{copy.device[-5:]} has {mirrored.weights[0].name} {copy.shape}, {equal=}")

# %% [markdown]
# ## Layers
#
# A model that does not fit on one device can be cut between its layers. The first
# device computes the first layers and hands its result to the second. Done with whole
# batches, one would wait while the other works. So a batch is cut into *micro-batches*
# that follow each other through the stages, as on an assembly line.

# %%
pipeline = gpt_tf.Pipeline(num_stages=2, micro_batches=4)

with pipeline.scope():
    staged = gpt_tf.GPTModel(**sizes)

train("layers", staged)

# %%
on_devices = {}
for variable in staged.weights:
    on_devices.setdefault(variable.device[-5:], []).append(variable)

for device, variables in on_devices.items():
    layers = dict.fromkeys(variable.name.split("/")[0] for variable in variables)
    count = sum(variable.shape.num_elements() for variable in variables)
    print(f"{device}  {count:,} parameters: {', '.join(layers)}")

# %% [markdown]
# Backward the gradients come through the stages the other way. In which order a stage
# does its tasks is the *schedule*, and `tasks_of` lists it. When they run follows: a
# stage takes its next task as soon as it is free and its neighbour has delivered.
# Here it is for four stages and eight micro-batches, with a backward pass taking twice
# as long as a forward pass.

# %%
DURATION = {"forward": 1, "backward": 2}


def run_schedule(name, num_stages, micro_batches):
    """Return the end of every task, by stage, kind and micro-batch."""
    queues = [
        tasks_of(name, stage, num_stages, micro_batches) for stage in range(num_stages)
    ]
    free = [0] * num_stages  # when each stage has done its last task
    ends = {}
    while any(queues):
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            kind, index = queue[0]
            neighbour = stage - 1 if kind == "forward" else stage + 1
            if not 0 <= neighbour < num_stages:
                delivered = 0  # first forward, last backward: nobody to wait for
            elif (neighbour, kind, index) in ends:
                delivered = ends[neighbour, kind, index]
            else:
                continue
            free[stage] = max(free[stage], delivered) + DURATION[kind]
            ends[stage, kind, index] = free[stage]
            queue.pop(0)
    return ends


def kept_at_once(name, stage, num_stages, micro_batches):
    """Return for how many micro-batches a stage keeps activations at its fullest."""
    changes = [
        1 if kind == "forward" else -1
        for kind, _ in tasks_of(name, stage, num_stages, micro_batches)
    ]
    return max(np.cumsum(changes))


# %%
num_stages, micro_batches = 4, 8
colours = {"forward": "#8fa8c8", "backward": "#e0a184"}

figure, rows = plt.subplots(2, figsize=(9, 5), sharex=True, layout="constrained")
for axes, name in zip(rows, ("gpipe", "1f1b"), strict=True):
    ends = run_schedule(name, num_stages, micro_batches)
    for (stage, kind, index), end in ends.items():
        begin = end - DURATION[kind]
        axes.barh(
            stage, end - begin, left=begin, color=colours[kind], edgecolor="white"
        )
        axes.text((begin + end) / 2, stage, index + 1, ha="center", va="center")
    length = max(ends.values())
    work = sum(DURATION[kind] for _, kind, _ in ends)
    idle = 1 - work / (num_stages * length)
    kept = [
        kept_at_once(name, stage, num_stages, micro_batches)
        for stage in range(num_stages)
    ]
    axes.set_title(
        f"{name}: idle {idle:.0%}; micro-batches kept: {', '.join(map(str, kept))}",
        loc="left",
    )
    axes.set_yticks(range(num_stages), [f"stage {n + 1}" for n in range(num_stages)])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
rows[-1].set_xlabel("time (forward passes of a stage)")
handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
figure.legend(handles, colours, loc="outside lower right", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# The gaps are the *bubble*: `(p - 1) / (m + p - 1)` of the time with `p` stages and
# `m` micro-batches. Both schedules have it. What `1f1b` (one forward, one backward)
# saves is memory, since each activation is kept until its backward pass. It is the
# default.
#
# More micro-batches make the bubble smaller, and each computation too:

# %%
for count in (1, 4, 8, 32):
    length = max(run_schedule("1f1b", num_stages, count).values())
    idle = 1 - count * sum(DURATION.values()) / length
    print(f"{num_stages} stages, {count:2} micro-batches: idle {idle:.0%}")

# %% [markdown]
# An assembly line is as fast as its slowest station. The blocks of a GPT cost alike,
# but the head, which scores the whole vocabulary, stands in the last stage. `balance`
# divides the blocks so that the costliest stage costs least. A model with a large
# vocabulary gets fewer blocks beside its head:

# %%
for vocabulary in (512, 5_000, 50_000):
    wide = {**reference.get_config(), "num_layers": 12, "vocab_size": vocabulary}
    *blocks, head = computed_costs(wide)
    print(
        f"V = {vocabulary:6,}: the head costs {head / blocks[0]:4.1f} blocks, "
        f"12 blocks on 2 stages: {balance([*blocks, head], 2)}"
    )

# %% [markdown]
# ## Weights
#
# The layers themselves can be cut, too. Attention heads do not know of each other, and
# neither do the units of a feed-forward layer. So each device takes some of them, and
# what they found is added up. A *mesh* arranges the devices along named axes: here two
# devices share the windows of a batch, times two that share the weights.

# %%
mesh = gpt_tf.make_mesh(batch=2, model=2)
divided = gpt_tf.MeshGPT(gpt_tf.GPTModel(**sizes), mesh)

train("weights", divided)

# %% [markdown]
# A weight's *layout* says which of its axes is divided among which axis of the mesh;
# `unsharded` axes are whole. `unpack` shows what the devices really hold:

# %%
for variable in divided.weights:
    name = variable.name.split(":")[0]
    if name.startswith(("embedding", "block_0")) and not name.endswith("bias"):
        parts = dtensor.unpack(variable.read_value())
        whole = tuple(variable.shape)
        axes = variable.layout.sharding_specs
        print(f"{name:33} {whole!s:16} each {tuple(parts[0].shape)!s:16} {axes}")

# %% [markdown]
# ## Sequence
#
# Attention needs as much memory as the square of the window's length. In long windows
# the *positions* are what has to be divided. Each device computes some positions of
# every layer. They meet in one place: every position looks back at the keys and values
# of all before it, so these are gathered on every device.

# %%
mesh_of_positions = gpt_tf.make_mesh(batch=2, sequence=2)
by_positions = gpt_tf.MeshGPT(gpt_tf.GPTModel(**sizes), mesh_of_positions)

train("sequence", by_positions)

# %% [markdown]
# The tokens of a batch, as the devices of both meshes get them, and the logits, as
# DTensor found that they should lie:

# %%
x, _, _ = windows.batch(step=0)
for model in (divided, by_positions):
    placed = place(x, layout(model.mesh, "batch", "sequence"))
    logits = tf.function(model)(placed)  # DTensor wants a graph, as `fit` makes one
    for name, tensor in (("tokens", placed), ("logits", logits)):
        parts = [tuple(part.shape) for part in dtensor.unpack(tensor)]
        axes = dtensor.fetch_layout(tensor).sharding_specs
        print(f"{name} {tuple(tensor.shape)!s:14} each {parts[0]!s:14} {axes}")

# %% [markdown]
# A picture of both meshes. Each rectangle is a weight or an activation, seen along two
# of its axes; the numbers are the devices that have a part.

# %%
SHADES = ["#8fa8c8", "#e0a184", "#a9c99b", "#d8c27a"]


def draw_parts(axes, laid_out, shown, names):
    """Draw which devices have which part of two axes of a tensor."""
    parts = {}
    for device, at in enumerate(laid_out.mesh.local_device_locations()):
        index = []
        for axis in shown:
            divider = laid_out.sharding_specs[axis]
            whole = divider == dtensor.UNSHARDED
            index += [0, 1] if whole else [at[divider], laid_out.mesh.dim_size(divider)]
        parts.setdefault(tuple(index), []).append(device)
    for (row, num_rows, column, num_columns), devices in parts.items():
        corner = (column / num_columns, row / num_rows)
        size = (1 / num_columns, 1 / num_rows)
        shade = SHADES[devices[0]] if len(devices) < 4 else "#e4e4e4"
        axes.add_patch(Rectangle(corner, *size, facecolor=shade, edgecolor="white"))
        axes.text(
            corner[0] + size[0] / 2,
            corner[1] + size[1] / 2,
            " ".join(map(str, devices)),
            ha="center",
            va="center",
        )
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    axes.spines[:].set_visible(False)


figure = plt.figure(figsize=(10, 4.6), layout="constrained")
halves = figure.subfigures(2)
for half, cut, model in zip(
    halves,
    ("batch=2, model=2", "batch=2, sequence=2"),
    (divided, by_positions),
    strict=True,
):
    kernels = {variable.name: variable.layout for variable in model.weights}
    positions = layout(model.mesh, "batch", "sequence", None)
    queries = layout(model.mesh, "batch", "model", "sequence", None)
    keys = layout(model.mesh, "batch", "model", None, None)
    tensors = [
        ("qkv kernel", kernels["block_0/qkv_kernel:0"], (0, 2), ("C", "heads")),
        ("up kernel", kernels["block_0/up_kernel:0"], (0, 1), ("C", "units")),
        ("down kernel", kernels["block_0/down_kernel:0"], (0, 1), ("units", "C")),
        ("between layers", positions, (0, 1), ("B", "T")),
        ("queries", queries, (1, 2), ("heads", "T")),
        ("keys, values", keys, (1, 2), ("heads", "T")),
    ]
    half.suptitle(cut, x=0.01, ha="left", fontweight="bold")
    for axes, (name, laid_out, shown, names) in zip(
        half.subplots(1, 6), tensors, strict=True
    ):
        draw_parts(axes, laid_out, shown, names)
        axes.set_title(name, fontsize="medium")
plt.show()

# %% [markdown]
# Above, two devices with the same windows, 0 and 1 or 2 and 3, have different heads and
# units. The two products of a feed-forward layer are divided as in Megatron-LM, the
# first by its outputs and the second by its inputs, so that sums are exchanged once for
# both. Below, every device has all weights. It has its own windows and positions, and
# the keys and values of all positions of its windows.
#
# ### Back to an ordinary model
#
# `to_model` gives the plain `GPTModel`, and `save` writes one. The file knows nothing
# of meshes, so it loads on one device or on another mesh:

# %%
divided.save(folder / "gpt.keras")
plain = keras.models.load_model(folder / "gpt.keras")
elsewhere = gpt_tf.MeshGPT(plain, gpt_tf.make_mesh(model=4))

x, y, sample_weight = windows.batch(step=steps)
for name, model in {
    "trained on batch=2, model=2": divided,
    "to_model()": divided.to_model(),
    "loaded, one device": plain,
    "loaded, model=4": elsewhere,
}.items():
    loss, *_ = model.evaluate(
        x, y, sample_weight=sample_weight, batch_size=batch_size, verbose=0
    )
    print(f"{name:28} loss {loss:.6f}")

# %% [markdown]
# ## The same model, five times
#
# All began with the same weights. Those that saw the same windows should have become
# the same model, up to rounding. The second and third row say what to expect: rounding
# alone, and then training that really differs.

# %%
moved = max(
    np.abs(a - b).max() for a, b in zip(weights["one device"], start, strict=True)
)
print(f"training moved a weight by up to {moved:.4f}\n")
print(f"{'':14} first loss  last loss   largest difference of a weight")
for name, own in weights.items():
    difference = max(
        np.abs(a - b).max() for a, b in zip(own, weights["one device"], strict=True)
    )
    print(
        f"{name:14} {losses[name][0]:10.6f} {losses[name][-1]:10.6f}   {difference:.1e}"
    )

# %%
epochs = np.arange(1, len(losses["one device"]) + 1) * steps_per_epoch
styles = {
    "one device": {"color": "#d8d8d8", "linewidth": 10},
    "data": {"color": "#8fa8c8", "linewidth": 7},
    "layers": {"color": "#e0a184", "linewidth": 4.5},
    "weights": {"color": "#4d7c3a", "linewidth": 2},
    "sequence": {"color": "black", "linestyle": ":", "linewidth": 1.5},
}
smallest = np.spacing(np.float32(losses["one device"][-1]))

figure, (above, below) = plt.subplots(
    2, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
)
for name, style in styles.items():
    above.plot(epochs, losses[name], label=name, **style)
styles["other order"] = {"color": "grey", "linestyle": "--"}
for name, style in list(styles.items())[1:]:
    apart = np.abs(np.subtract(losses[name], losses["one device"]))
    below.semilogy(epochs, np.maximum(apart, smallest), label=name, **style)
below.set_ylim(smallest / 100, 1)
below.axhline(smallest, color="grey", linewidth=0.8)
labels = {"other order": 3e-3, "smallest step of float32": smallest / 10}
for label, height in labels.items():
    below.text(epochs[-1], height, label, ha="right", va="center", color="grey")
above.set_ylabel("training loss (nats per token)")
above.legend(frameon=False)
below.set_ylabel("distance from\none device's")
below.set_xlabel("training step")
for axes in (above, below):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The curves lie on each other; they are drawn so broad that they can be told apart at
# all. Rounding grows on the way, as each step goes on from the rounded weights of the
# one before. It does so on a single device, too: see "in four parts" above.
#
# ## How long a step takes
#
# Now they train on for a few steps each, in turn, so that whatever else the machine
# does disturbs all alike. The first step of each turn does not count.


# %%
class StepTimes(keras.callbacks.Callback):
    """Keeps when each training step ended."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


del models["other order"]  # computes what "one device" computes
times_ms = {name: [] for name in models}
for _ in range(timed_rounds):
    for name, model in models.items():
        clock = StepTimes()
        model.fit(
            windows.dataset(),
            steps_per_epoch=1 + steps_per_epoch,
            callbacks=[clock],
            verbose=0,
        )
        times_ms[name] += list(1000 * np.diff(clock.ends))

medians_ms = {name: statistics.median(times) for name, times in times_ms.items()}
for name, median_ms in medians_ms.items():
    ratio = median_ms / medians_ms["one device"]
    print(f"{name:14} {median_ms:6.1f} ms a step, {ratio:.2f} of one device's")
print(f"\nprocessor cores: {os.cpu_count()}")


# %%
def on_each_device(name):
    """Return how many parameters each device holds."""
    if name in ("weights", "sequence"):
        held = [
            [part.shape.num_elements() for part in dtensor.unpack(v.read_value())]
            for v in models[name].weights
        ]
        return np.sum(held, axis=0)
    if name == "layers":
        counts = {}
        for v in models[name].weights:
            counts[v.device] = counts.get(v.device, 0) + v.shape.num_elements()
        return list(counts.values())
    return [models[name].count_params()] * (4 if name == "data" else 1)


figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.8), sharey=True, layout="constrained"
)
for place_of, name in enumerate(models):
    held = np.array(on_each_device(name)) / 1000
    for device, count in enumerate(held):
        left.barh(
            place_of + 0.2 * (device - (len(held) - 1) / 2),
            count,
            height=0.13,
            color="#8fa8c8",
        )
right.barh(list(models), list(medians_ms.values()), height=0.5, color="#e0a184")
left.set_yticks(range(len(models)), list(models))
left.invert_yaxis()
left.set_xlabel("thousand parameters on each device")
right.set_xlabel("ms a step, all devices on the same cores")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Do not look for speed here: logical devices share the cores that one device has for
# itself. What a cut adds is its price, and part of it is paid on real devices as well:
# many small computations in the place of a large one ("in four parts" pays for that
# alone), sums and copies between devices, weights that every replica updates. With a
# model as small as this one, it counts for much. What a cut gains in time shows on
# devices of their own only. The left picture is true anywhere: it is what each device
# has to hold.
#
# ## From the command line
#
# Training a run with checkpoints takes the same cuts, by name. A checkpoint does not
# depend on them, so a run can go on with other devices than it began with.
#
#     gpt-tf train --strategy mirrored --virtual-devices 4 --out runs/data
#     gpt-tf train --pipeline-stages 2 --micro-batches 4 --out runs/layers
#     gpt-tf train --mesh 2x2 --out runs/weights
#     gpt-tf train --mesh batch=2,sequence=2 --out runs/sequence
#
# More machines, or more processes on this one, are a strategy too. Each process is told
# who the others are; `--workers` lets Ray do that, here on this machine:
#
#     gpt-tf train --workers 2 --out runs/workers
#
# ## Which way, when
#
# - **Data first.** It needs the least exchange and any model can use it, as long as the
#   whole model fits on each device.
# - **Layers or weights, when it does not fit.** A pipeline exchanges little, only what
#   passes between stages, and wants many micro-batches. Dividing weights exchanges
#   sums in every layer and wants devices with fast connections.
# - **Sequence, for long contexts,** when the activations of a single window are too
#   large.
# - **More machines, when one is full:** `docs/many_machines.md` says how to start them
#   and what happens when one fails.
# - How the mixes do on 8 to 512 accelerators is computed in `docs/scaling.md`.
