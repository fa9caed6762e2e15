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
# # 8. Train in parallel
#
# **Result:** a GPT trained on one device and in four parallel ways has the same loss in
# every step to less than 0.001, and each device holds what its share of the model
# needs. More accelerators train faster as long as the network keeps up; that curve is
# predicted, not measured.
#
# ![The result](attachment:result.png)
#
# **At the end you have** one GPT trained in five ways, the memory that each needs on a
# device, and a predicted curve of throughput on 8 to 512 accelerators.
#
# **The article**, on GPT real-time performance: chapter 3.1, parallel computation, and
# chapter 4.1, its implementation with TensorFlow's `MirroredStrategy`.
#
# **In gpt_tf:** [3.1](../docs/article.md#31-parallel-computation),
# [4.1](../docs/article.md#41-parallel-computation-in-tensorflow).
#
# Everything runs on a laptop: TensorFlow splits the CPU into *logical devices*. They
# share the same cores, so you will see that the results are equal and where the memory
# is, not a speedup.
#
# **Time:** 2 minutes on two quiet CPU cores.

# %%
# Install gpt_tf where it is missing, from a wheel or a clone beside this notebook.
import glob
import importlib.util

from IPython import get_ipython

if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    source = [*glob.glob("./gpt_tf*.whl"), *glob.glob("./gpt_tf*/"), ".."][0]
    get_ipython().run_line_magic("pip", f"install -q {source}[train,explain]")

# %% [markdown]
# Split the CPU before anything else uses TensorFlow. With four GPUs leave this cell
# out: everything below takes the GPUs. (We have not tested GPUs.)

# %%
import gpt_tf

gpt_tf.split_cpu(4)

# %%
import email
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tf_keras as keras
from IPython.display import Markdown, display
from tensorflow.experimental import dtensor

tf.get_logger().setLevel("ERROR")
print(*[device.name for device in tf.config.list_logical_devices()], sep="\n")

# %% tags=["parameters"]
corpus = sorted(Path(email.__file__).parent.glob("*.py"))  # yours: a folder of text
model = {  # yours: the arguments of your own GPTModel
    "vocab_size": 512,
    "embedding_dim": 96,
    "num_layers": 4,
    "num_heads": 4,
    "context_length": 64,
}
batch_size = 16
steps = 60
steps_per_epoch = 5

# %% [markdown]
# ## 1. The result: five trainings, one model
#
# The batch of a step depends on the number of the step only, so all trainings see the
# same text in the same order, and all start from the same weights.
#
# | way | each device has | devices exchange | in gpt_tf |
# |---|---|---|---|
# | data | the whole model, some windows | gradients | `MirroredStrategy` |
# | layers | some layers, all windows | activations between layers | `Pipeline` |
# | weights | some heads and units of every layer | sums in every layer | `MeshGPT` |
# | sequence | the whole model, some positions | keys and values | `MeshGPT` |

# %%
text = gpt_tf.open_corpus(corpus)
tokenizer = gpt_tf.BPETokenizer.train(
    (document.text for document in text.documents("train")), model["vocab_size"]
)
tokens = gpt_tf.write_token_file(
    "runs/notebook-08/train.tokens", text.documents("train"), tokenizer
)
windows = gpt_tf.Windows(tokens, model["context_length"], batch_size)
models, losses = {}, {}


def train(name, gpt, windows=windows):
    """Train a model from the common weights and keep its losses."""
    gpt.set_weights(start)
    gpt.compile(gpt_tf.AdamW(2e-3), jit_compile=False)
    history = gpt.fit(
        windows.dataset(),
        steps_per_epoch=steps_per_epoch,
        epochs=steps // steps_per_epoch,
        verbose=0,
    )
    models[name], losses[name] = gpt, history.history["loss"]
    print(f"{name:12} loss {losses[name][0]:.4f} -> {losses[name][-1]:.6f}")


keras.utils.set_random_seed(1)
reference = gpt_tf.GPTModel(**model)
start = reference.get_weights()
train("one device", reference)

strategy = gpt_tf.make_strategy("mirrored")  # a tf.distribute.MirroredStrategy
with strategy.scope():
    mirrored = gpt_tf.GPTModel(**model)
train("data", mirrored)

with gpt_tf.Pipeline(num_stages=2, micro_batches=4).scope():
    staged = gpt_tf.GPTModel(**model)
train("layers", staged)

mesh = gpt_tf.make_mesh(batch=2, model=2)
train("weights", gpt_tf.MeshGPT(gpt_tf.GPTModel(**model), mesh))

mesh = gpt_tf.make_mesh(batch=2, sequence=2)
train("sequence", gpt_tf.MeshGPT(gpt_tf.GPTModel(**model), mesh))

# %% [markdown]
# Computers round, so another order of additions gives slightly other losses. For
# comparison, one more training on one device sees the windows in another order:

# %%
other = gpt_tf.Windows(tokens, model["context_length"], batch_size, seed=1)
train("other order", gpt_tf.GPTModel(**model), other)
del models["other order"]


# %% tags=["result"]
def on_each_device(gpt):
    """Return the number of parameters that each device holds."""
    if isinstance(gpt, gpt_tf.MeshGPT):
        held = [
            [part.shape.num_elements() for part in dtensor.unpack(v.read_value())]
            for v in gpt.weights
        ]
        return np.sum(held, axis=0).tolist()
    counts = {}
    for variable in gpt.weights:
        copies = strategy.experimental_local_results(variable)  # one, if not mirrored
        for copy in copies:
            device = copy.device[-5:]
            counts[device] = counts.get(device, 0) + copy.shape.num_elements()
    return list(counts.values())


# A parameter needs 16 bytes: its value, its gradient and AdamW's two moments.
held_mb = {
    name: [16 * count / 1e6 for count in on_each_device(gpt)]
    for name, gpt in models.items()
}
apart = {
    name: max(abs(np.subtract(found, losses["one device"])))
    for name, found in losses.items()
}

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
epochs = np.arange(1, len(losses["one device"]) + 1) * steps_per_epoch
for width, (name, found) in zip((9, 6.5, 4, 2, 1, 1), losses.items(), strict=True):
    style = {"color": "#9ca3af", "ls": "--"} if name == "other order" else {}
    left.plot(epochs, found, linewidth=width, label=name, **style)
left.set_xlabel("training step")
left.set_ylabel("training loss (nats per token)")
left.legend(frameon=False, fontsize=9)
for place, held in enumerate(held_mb.values()):
    for device, size in enumerate(held):
        shift = 0.19 * (device - (len(held) - 1) / 2)
        right.barh(place + shift, size, height=0.15, color="#0e7490")
    right.text(max(held), place, f"  {max(held):.1f} MB", va="center")
right.set_yticks(range(len(held_mb)), list(held_mb))
right.invert_yaxis()
right.margins(x=0.25)
right.set_xlabel("MB on each device: weights, gradients, moments")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Left: five curves lie on each other and are drawn with different widths; only the
# dashed one, with other data, differs. Right: one bar per device. Dividing the layers
# or the weights divides the memory; data and sequence parallelism copy it.
#
# ## 2. Data: `MirroredStrategy`
#
# This is the article's way, and the first to try. Build the model in the scope of the
# strategy; `compile`, `fit`, callbacks and `save` stay as they are. Each of the four
# replicas gets a quarter of the batch, gradients are summed, and all replicas take the
# same step. They never exchange weights and still stay equal:

# %%
copies = strategy.experimental_local_results(mirrored.weights[0])
for copy in copies:
    equal = np.array_equal(copy.numpy(), copies[0].numpy())
    print(f"{copy.device[-5:]} has {mirrored.weights[0].name} {copy.shape}, {equal=}")

# %% [markdown]
# ## 3. Layers: `Pipeline`
#
# A model that does not fit on one device can be cut between its layers. A batch is
# split into *micro-batches* that follow each other through the stages. `tasks_of`
# returns the order in which a stage works; this cell runs that order with a backward
# pass that takes twice as long as a forward pass.

# %%
DURATION = {"forward": 1, "backward": 2}
num_stages, micro_batches = 4, 8


def run_schedule(name):
    """Return the end of every task by stage, kind and micro-batch."""
    stages = range(num_stages)
    queues = [gpt_tf.tasks_of(name, s, num_stages, micro_batches) for s in stages]
    free, ends = [0] * num_stages, {}
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                kind, index = queue[0]
                neighbour = stage + (1 if kind == "backward" else -1)
                is_first = neighbour not in stages  # nothing to wait for
                if not is_first and (neighbour, kind, index) not in ends:
                    break
                delivered = 0 if is_first else ends[neighbour, kind, index]
                free[stage] = max(free[stage], delivered) + DURATION[kind]
                ends[stage, kind, index] = free[stage]
                queue.pop(0)
    return ends


def kept_at_once(name, stage):
    """Return for how many micro-batches a stage keeps activations at its fullest."""
    tasks = gpt_tf.tasks_of(name, stage, num_stages, micro_batches)
    return max(np.cumsum([1 if kind == "forward" else -1 for kind, _ in tasks]))


figure, rows = plt.subplots(2, figsize=(9, 4.6), sharex=True, layout="constrained")
colours = {"forward": "#8fa8c8", "backward": "#e0a184"}
for axes, name in zip(rows, ("gpipe", "1f1b"), strict=True):
    ends = run_schedule(name)
    for (stage, kind, index), end in ends.items():
        width = DURATION[kind]
        bar = {"left": end - width, "color": colours[kind], "edgecolor": "white"}
        axes.barh(stage, width, **bar)
        axes.text(end - width / 2, stage, index + 1, ha="center", va="center")
    idle = 1 - micro_batches * sum(DURATION.values()) / max(ends.values())
    kept = [str(kept_at_once(name, stage)) for stage in range(num_stages)]
    axes.set_title(
        f"{name}: idle {idle:.0%}; micro-batches kept by stage: {', '.join(kept)}",
        loc="left",
    )
    axes.set_yticks(range(num_stages), [f"stage {n + 1}" for n in range(num_stages)])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
rows[-1].set_xlabel("time (forward passes of a stage)")
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
figure.legend(handles, colours, loc="outside lower right", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# The gaps are the *bubble*, `(p - 1) / (m + p - 1)` of the time with `p` stages and `m`
# micro-batches. Both schedules have it. `1f1b` (one forward, one backward) keeps fewer
# activations, and is the default.
#
# ## 4. Weights and positions: `MeshGPT`
#
# A *mesh* arranges the devices along named axes. With `model=2` two devices share the
# heads and units of every layer, as in Megatron-LM; with `sequence=2` they share the
# positions of a window, and gather keys and values. What the four devices hold:

# %%
for variable in models["weights"].weights:
    name = variable.name.split(":")[0]
    if name.startswith(("embedding", "block_0")) and not name.endswith("bias"):
        part = dtensor.unpack(variable.read_value())[0]
        print(f"{name:33} {tuple(variable.shape)!s:16} each {tuple(part.shape)}")

# %% [markdown]
# A saved model knows nothing of meshes or stages. Train in one way and go on in
# another:

# %%
models["weights"].save("runs/notebook-08/gpt.keras")
plain = keras.models.load_model("runs/notebook-08/gpt.keras")
x, y, sample_weight = windows.batch(step=steps)
for name, gpt in {"on the mesh": models["weights"], "loaded": plain}.items():
    loss, *_ = gpt.evaluate(
        x, y, sample_weight=sample_weight, batch_size=batch_size, verbose=0
    )
    print(f"{name:12} loss {loss:.6f}")

# %% [markdown]
# ## 5. Throughput on many accelerators, predicted
#
# **Nothing in this picture was measured by us.** It is the prediction of a model of a
# training step ([`studies/scaling`](../studies/scaling/README.md)): 2.7 billion
# parameters, 512 windows of 2,048 tokens a step, A100 accelerators with 80 GB, 8 in a
# node. Against 12 published measurements on fast networks that it was not fitted to,
# its mean error is 5.3 %. What it says of slow networks rests on formulas alone.

# %%
accelerators = np.array([8, 16, 32, 64, 128, 256, 512])
predicted = {  # thousand tokens per second
    "best mix, InfiniBand": [59, 118, 234, 464, 913, 1766, 3377],
    "best mix, 100 Gbit/s Ethernet": [59, 114, 211, 368, 700, 1032, 1618],
    "data only, 100 Gbit/s Ethernet": [59, 114, 211, 368, 700, 961, 1043],
}
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
colours = ("#0e7490", "#c2410c", "#9ca3af")
for colour, (name, curve) in zip(colours, predicted.items(), strict=True):
    axes.plot(accelerators, curve, "o-", color=colour, label=name)
axes.plot(accelerators, accelerators / 8 * 59, ":", color="#555555", label="linear")
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.set_xticks(accelerators, accelerators)
ticks = [59 * 2**n for n in range(7)]
axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
axes.set_xlabel("accelerators")
axes.set_ylabel("thousand tokens per second")
axes.set_title("Predicted, not measured", loc="left")
axes.legend(frameon=False, fontsize=9)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# With a slow network, mix data parallelism with pipeline and tensor parallelism, so
# that each device has fewer gradients to send.
#
# ## All in one table
#
# Which way to take: **data** first, as long as the model fits on each device;
# **layers** or **weights** when it does not; **sequence** for long contexts.

# %%
lines = [
    "| way | MB per device | last loss | largest distance |",
    "|---|---:|---:|---:|",
]
for name, found in losses.items():
    size = f"{max(held_mb[name]):.1f}" if name in held_mb else ""
    lines.append(f"| {name} | {size} | {found[-1]:.6f} | {apart[name]:.1e} |")
display(Markdown("\n".join(lines)))

# %%
results = {"losses": losses, "apart": apart, "held_mb": held_mb}
results |= {"cpu_minutes": round(sum(os.times()[:4]) / 60, 2)}
results |= {"accelerators": accelerators.tolist(), "predicted": predicted}
print("results:", json.dumps(results))

# %% [markdown]
# ## Where next
#
# - From a terminal; a run can go on with other devices than it began with:
#
#       gpt-tf train --strategy mirrored --virtual-devices 4 --out runs/data
#       gpt-tf train --pipeline-stages 2 --micro-batches 4 --out runs/layers
#       gpt-tf train --mesh batch=2,model=2 --out runs/weights
#       gpt-tf train --workers 2 --out runs/workers
#
# - The classes: [Pipeline and MeshGPT](../gpt_tf/parallel/). How to [train on many
#   machines](../docs/many_machines.md).
# - Next: [9. From `fit` to a page in the browser](09_fit_to_browser.ipynb).
