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
# # 5. Export and run anywhere
#
# **Result:** four programs write the same text from one exported file: Keras and plain
# LiteRT in 25 lines, `EdgeGPT`, and Google's LiteRT-LM, as a command and as a server.
#
# ![The result](attachment:result.png)
#
# **At the end you have** a trained GPT as one `.tflite` and one `.litertlm` file, and
# you know what is in them and what a device needs to run them.
#
# **The article**, on GPT real-time performance: chapter 4.2 implements quantisation in
# TensorFlow and ends with the file that ships.
#
# **In gpt_tf:** [4.2](../docs/article.md#42-quantisation-in-tensorflow).
#
# **Time:** 1 minute on two quiet CPU cores.

# %%
# Install gpt_tf where it is missing, from a wheel or a clone beside this notebook.
import glob
import importlib.util

from IPython import get_ipython

if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    source = [*glob.glob("./gpt_tf*.whl"), *glob.glob("./gpt_tf*/"), ".."][0]
    get_ipython().run_line_magic("pip", f"install -q {source}[train,explain]")

# %%
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from IPython.display import Markdown, display

import gpt_tf

# %% [markdown]
# Set `model` to your own GPT: a run, a Hugging Face folder, a `.gguf`, or what else
# [can be opened](../docs/how_to/bring_your_own_gpt.md). It needs a tokenizer.

# %% tags=["parameters"]
model = gpt_tf.shipped_model("python-small")  # yours: a run, a Hugging Face folder ...
prompt = "    def __init__(self"  # never ends in a space: the next token brings its own
mode = "dynamic_int8"  # of the file that ships: int8 weights
context_length = 256  # positions that a file can hold, at most the model's
max_new_tokens = 40

# %% [markdown]
# ## 1. Export
#
# A Keras model needs TensorFlow. The export writes the same computation as LiteRT
# operations with a *key-value cache*, so that each token is computed once. A `.tflite`
# is the model, a `.litertlm` the model with its tokenizer and chat template.
# `export_trained` takes a model from disk; for one in memory there are
# `export_tflite(gpt, path, mode)` and `export_litertlm(gpt, tokenizer, path, mode)`.

# %%
folder = Path("runs/notebook-05")  # everything that this notebook writes goes here
shutil.rmtree(folder, ignore_errors=True)  # another model's files
folder.mkdir(parents=True)
gpt, tokenizer, _ = gpt_tf.open_model(model)
context_length = min(context_length, gpt.context_length)
print(f"{gpt.count_params():,} parameters, a context of {context_length} tokens\n")

tflite, bundle, manifests = {}, {}, {}
for name in ("float32", mode):
    tflite[name], bundle[name] = folder / f"{name}.tflite", folder / f"{name}.litertlm"
    for path in (tflite[name], bundle[name]):
        manifests[name] = gpt_tf.export_trained(
            model, path, name, context_length=context_length
        )
        print(f"{path.name:24} {path.stat().st_size / 1e6:6.2f} MB")

# %% [markdown]
# ## 2. One text from four programs
#
# This is the whole decoder for a file, with LiteRT and NumPy alone: one token in, the
# logits of the next one out, and the returned caches are the next call's inputs.
# `decode` is one of the file's functions, which LiteRT calls *signatures*.


# %%
def write_by_hand(path, ids, count):
    """Continue a prompt with the most likely tokens; return them and ms a token."""
    decode = Interpreter(str(path), num_threads=1).get_signature_runner("decode")
    details = decode.get_input_details()
    caches = {
        name: np.zeros(detail["shape"], detail["dtype"])
        for name, detail in details.items()
        if name.startswith("kv_cache")
    }
    capacity = details["mask"]["shape"][-1]  # S, rows of the caches
    ids, began = list(ids), time.perf_counter()
    for position in range(len(ids) + count - 1):
        mask = np.where(np.arange(capacity) <= position, 0, -1e9)
        outputs = decode(
            tokens=np.int32([[ids[position]]]),
            input_pos=np.int32([position]),
            mask=np.float32(mask)[None, None, None],  # (1, 1, 1, S)
            **caches,
        )
        logits = outputs.pop("logits")  # (1, 1, V)
        caches = outputs
        if position + 1 == len(ids):  # the prompt has been read
            ids.append(int(logits.argmax()))
    seconds = time.perf_counter() - began
    return ids[-count:], 1e3 * seconds / (position + 1)


# %% [markdown]
# Now the same prompt goes to all of them. Each takes the most likely token each time
# (*greedy*, `temperature=0`), so the tokens can be compared one by one.

# %%
ids = tokenizer.encode(prompt)
greedy = {"max_new_tokens": max_new_tokens, "temperature": 0}
tokens, ms = {}, {}


def timed(write):
    """Return what the second call writes, and its ms per new token."""
    write()
    began = time.perf_counter()
    written = write()
    return written, 1e3 * (time.perf_counter() - began) / max(1, len(written))


key = "Keras", "float32"
tokens[key], ms[key] = timed(lambda: gpt_tf.generate(gpt, [ids], **greedy)[0])
for name in bundle:
    key = "LiteRT, by hand", name
    tokens[key], ms[key] = write_by_hand(tflite[name], ids, max_new_tokens)
    with gpt_tf.EdgeGPT(bundle[name], num_threads=1) as edge:
        key = "EdgeGPT", name
        tokens[key], ms[key] = timed(lambda edge=edge: edge.generate(ids, **greedy))

# EdgeGPT ends where the model ends its text, the others do not: compare up to there.
shared = {name: len(tokens["EdgeGPT", name]) for name in bundle}
tokens = {key: list(found)[: shared[key[1]]] for key, found in tokens.items()}

# %% [markdown]
# LiteRT-LM is Google's runtime for phones, desktops and the web. It takes the same
# `.litertlm`. It prints text instead of tokens, so here texts are compared. Where its
# command is missing, install it with `pip install litert-lm`; the notebook runs
# without.

# %%
litert_lm = shutil.which("litert-lm") or Path(sys.executable).with_name("litert-lm")
has_litert_lm = Path(litert_lm).is_file()
texts = {key: tokenizer.decode(found) for key, found in tokens.items()}
if has_litert_lm:
    # Without --top-k it is greedy, and writes until the cache is full.
    options = ["--no-template", "--cache", "no", "--prompt", prompt]
    for name in bundle:
        answer = subprocess.run(
            [litert_lm, "run", f"./{bundle[name]}", *options],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        same = len(texts["EdgeGPT", name])
        texts["LiteRT-LM", name] = answer.stdout[:same]
print("LiteRT-LM:", "installed" if has_litert_lm else "not installed, left out")

# %%
texts = dict(sorted(texts.items(), key=lambda item: item[0][1] == mode))
equal = {
    name: len({text for (_, own), text in texts.items() if own == name}) == 1
    for name in bundle
}
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
labels = []
for place, (key, text) in enumerate(texts.items()):
    colour = (
        "#9ca3af" if key[0] == "Keras" else {mode: "#c2410c"}.get(key[1], "#0e7490")
    )
    axes.barh(place, ms.get(key, 0), height=0.6, color=colour)
    said = " ".join(text.split())[:38]
    time_of = f"{ms[key]:.2f} ms" if key in ms else "not timed"
    axes.text(ms.get(key, 0), place, f"  {time_of}   {said} …", va="center", fontsize=9)
    labels.append(f"{key[0]}, {key[1]}")
axes.set_yticks(range(len(labels)), labels)
axes.invert_yaxis()
axes.set_xlim(0, 2.4 * max(ms.values()))
axes.set_xlabel("ms per token, and what it wrote")
axes.set_title("Two files, several programs, one text a file", loc="left")
axes.spines[["top", "right"]].set_visible(False)
plt.show()
print(f"float32: all programs write the same text: {equal['float32']}")
print(f"{mode}: all programs write the same text: {equal[mode]}")

# %% [markdown]
# The int8 file may write another text than the float32 file: rounding can change which
# of two nearly equal tokens is first. What that costs in accuracy is the subject of
# [tutorial 3](03_quantise.ipynb) and [tutorial 6](06_measure_and_choose.ipynb).
#
# ## 3. What is in the file
#
# A prompt is read several tokens at a time by `prefill_N`; `decode` adds one token;
# `score_N` returns the logits of all positions. All share one copy of the weights. The
# names and shapes are LiteRT-LM's contract, so they are the same for every exported GPT
# ([the page about it](../docs/reference/contract.md)).

# %%
interpreter = Interpreter(str(tflite[mode]))
for name in interpreter.get_signature_list():
    runner = interpreter.get_signature_runner(name)
    inputs, outputs = runner.get_input_details(), runner.get_output_details()
    parts = ("tokens", "input_pos", "mask", "kv_cache_k_0")
    shown = {p: tuple(map(int, inputs[p]["shape"])) for p in parts if p in inputs}
    logits = outputs["logits"]["shape"].tolist() if "logits" in outputs else None
    print(f"{name:10} {shown} -> logits {logits}")

# %% [markdown]
# Each file was run and compared with the Keras model before it got its name. The
# manifest beside it says what was found:

# %%
for name, manifest in manifests.items():
    found = manifest["verification"]
    print(
        f"{name:13} divergence {found['divergence_nats']:.5f} nats, "
        f"same most likely token {found['top1_agreement']:.1%}"
    )

# %% [markdown]
# ## 4. On a device, without TensorFlow
#
# A device needs NumPy, LiteRT and tokenizers: `pip install 'gpt-tf[edge]'`. This cell
# starts a new process that opens the file and shows that TensorFlow is not loaded.

# %%
program = """
import sys

import gpt_tf

with gpt_tf.EdgeGPT(sys.argv[1]) as gpt:
    for piece in gpt.stream(sys.argv[2], max_new_tokens=30, temperature=0.7, seed=4):
        print(piece, end="", flush=True)
print()
print("TensorFlow loaded:", "tensorflow" in sys.modules)
"""
result = subprocess.run(
    [sys.executable, "-X", "utf8", "-c", program, str(bundle[mode]), prompt],
    capture_output=True,
    encoding="utf-8",
    check=True,
)
print(prompt + result.stdout)

# %% [markdown]
# A file carries a SHA-256 of all its bytes. A single changed bit is an error before
# anything runs:

# %%
damaged = bytearray(bundle[mode].read_bytes())
damaged[len(damaged) // 2] ^= 1
(folder / "damaged.litertlm").write_bytes(damaged)
try:
    gpt_tf.EdgeGPT(folder / "damaged.litertlm")
except gpt_tf.InputError as error:
    print(error)

# %% [markdown]
# ## 5. Behind a server
#
# `litert-lm serve` answers requests in OpenAI's form, so any client of that API can use
# the file. In a terminal:
#
#     litert-lm import ./dynamic_int8.litertlm mine
#     litert-lm serve --port 9379
#
# This cell does the same, asks once, and stops the server.

# %%
served = None
if has_litert_lm:
    home = {**os.environ, "HOME": str(folder.resolve())}  # your own is left alone
    quiet = {"env": home, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [litert_lm, "import", f"./{bundle[mode]}", "mine"], **quiet, check=True
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([litert_lm, "serve", "--port", str(port)], **quiet)
    request = {
        "model": "mine",
        "max_completion_tokens": max_new_tokens,
        "messages": [{"role": "user", "content": prompt}],
    }
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(address, json.dumps(request).encode(), headers)
    for _ in range(60):
        try:
            with urllib.request.urlopen(post, timeout=60) as reply:
                served = json.load(reply)["choices"][0]["message"]["content"]
            break
        except OSError:  # it is still starting
            time.sleep(1)
    server.terminate()
    server.wait()
    texts["LiteRT-LM's server", mode] = served
    print(repr(served))
    print("the same text as EdgeGPT:", served == texts["EdgeGPT", mode])
else:
    print("LiteRT-LM is not installed here")

# %% [markdown]
# In another language, open the same file with LiteRT-LM's API for it. For Android
# (Kotlin), with Google's package `com.google.ai.edge.litertlm`, it looks like this. It
# was not run here:
#
#     val engine = Engine(EngineConfig(modelPath = "dynamic_int8.litertlm"))
#     engine.initialize()
#     engine.createConversation().use { print(it.sendMessage("    def __init__(self")) }
#
# ## All in one table

# %%
lines = ["| program | file | MB | ms a token | tokens/s | text |"]
lines.append("|---|---|---:|---:|---:|---|")
for (program, name), text in texts.items():
    place = {"Keras": None, "LiteRT, by hand": tflite}.get(program, bundle)
    size = 4 * gpt.count_params() if place is None else place[name].stat().st_size
    speed = ms.get((program, name))
    speeds = (
        "| not timed | |" if speed is None else f"| {speed:.2f} | {1e3 / speed:,.0f} |"
    )
    said = " ".join(text.split())[:50].replace("|", "\\|")
    lines.append(f"| {program} | {name} | {size / 1e6:.2f} {speeds} `` {said} `` |")
display(Markdown("\n".join(lines)))

# %%
results = {
    name: {
        "tokens": {k[0]: list(map(int, t)) for k, t in tokens.items() if k[1] == name},
        "texts": {k[0]: t for k, t in texts.items() if k[1] == name},
    }
    for name in bundle
}
cpu_minutes = round(sum(os.times()[:4]) / 60, 2)  # of the processes it started, too
print("results:", json.dumps({"files": results, "cpu_minutes": cpu_minutes}))

# %% [markdown]
# ## Where next
#
# - From a terminal:
#
#       gpt-tf export --model runs/mine --mode dynamic_int8 --out mine.litertlm
#       gpt-tf generate --model mine.litertlm --prompt "def"
#
# - The functions: [export_trained, export_tflite and
#   export_litertlm](../gpt_tf/export/), [EdgeGPT and
#   EdgeScheduler](../gpt_tf/edge/). How to [run on a
#   device](../docs/how_to/device.md) and [serve several
#   requests](../docs/how_to/serve.md).
# - Next: [6. Measure and choose](06_measure_and_choose.ipynb).
