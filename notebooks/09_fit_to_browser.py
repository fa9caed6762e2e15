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
# # 9. From `fit` to a page in the browser
#
# **Result:** a small GPT, trained with Keras's `fit` on Python's library, becomes one
# int8 file that is less than a third of the model's size, with a perplexity within 1 %
# of the Keras model's. A page runs the file in the browser. It writes more than 100
# tokens per second, and the same greedy text as `EdgeGPT` in Python.
#
# ![The result](attachment:result.png)
#
# **At the end you have** a folder that any web server shows as a page with your GPT in
# it, and the same file behind a server that speaks OpenAI's protocol.
#
# **The article**, on GPT real-time performance: chapter 3.2, quantisation, and chapter
# 6.1, measuring real-time performance.
#
# **In gpt_tf:** [3.2](../docs/article.md#32-quantisation),
# [6.1](../docs/article.md#61-real-time-performance).
#
# **Time:** 3 minutes on two quiet CPU cores. The text to train on is on your disk. The
# page is opened only where Node.js, Chromium and a few npm packages are installed; the
# notebook runs without them, and says what to install.

# %%
# Install gpt_tf where it is missing, from a wheel or a clone beside this notebook.
import glob
import importlib.util

from IPython import get_ipython

if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    source = [*glob.glob("./gpt_tf*.whl"), *glob.glob("./gpt_tf*/"), ".."][0]
    get_ipython().run_line_magic("pip", f"install -q {source}[train,serve]")

# %%
import gpt_tf

print(f"gpt_tf {gpt_tf.__version__}")

# %%
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tf_keras as keras
from IPython.display import Image, Markdown, display

from gpt_tf.edge.static_server import make_server
from gpt_tf.edge.web_bundle import CDN, PACKAGES, install_command, write_web

logging.getLogger("tensorflow").setLevel("ERROR")

# %% [markdown]
# Set `corpus` to your own text, a folder or a file, and `prompt` to a beginning that
# fits it. `"python-stdlib"` is the sources of the Python that runs this notebook.
#
# `node_modules` is the folder in which npm installed the page's packages. `browser` is
# Chromium or Chrome; name its path if it is not found.

# %% tags=["parameters"]
corpus = "python-stdlib"  # yours: a folder or a file of text
prompt = "def read_lines(self"  # a prompt must not end in a space
vocab_size = 1024
context_length = 128
batch_size = 8
embedding_dim = 192
num_layers = 2
num_heads = 4
epochs = 8
steps_per_epoch = 200
learning_rate = 3e-3
evaluated_tokens = 8000
max_new_tokens = 60
repeats = 5
jit_compile = True  # XLA; False starts sooner, and every step takes longer
node_modules = os.environ.get("GPT_TF_NODE_MODULES", "node_modules")
browser = shutil.which("chromium") or shutil.which("google-chrome")  # or its path

# %%
folder = Path("runs/notebook-09")  # everything that this notebook writes goes here
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
keras.utils.set_random_seed(0)

# %% [markdown]
# ## 1. Train with `fit`
#
# A tokenizer turns text into numbers, and `Windows` turns these into batches for
# `fit`: the labels are the inputs moved on by one token. A tenth of the text is held
# out. [Tutorial 2](02_train_with_fit.ipynb) explains each step.

# %%
opened = gpt_tf.open_corpus(corpus)
texts = {
    split: [document.text for document in opened.documents(split)]
    for split in ("train", "validation")
}
tokenizer = gpt_tf.BPETokenizer.train(texts["train"], vocab_size)
end = [tokenizer.end_of_text_id]
ids = {
    split: np.concatenate([row + end for row in tokenizer.encode_batch(found)])
    for split, found in texts.items()
}
train = gpt_tf.Windows(ids["train"], context_length, batch_size)
some = ids["validation"][:50_000]  # enough to see the loss fall
held_out = gpt_tf.Windows(some, context_length, 64, shuffle=False)
print(f"{len(ids['train']):,} tokens to train on, {len(some):,} held out for the curve")

# %% [markdown]
# The rest is Keras: a model, a schedule for the learning rate, `compile`, `fit`.

# %%
model = gpt_tf.GPTModel(
    vocab_size=tokenizer.vocab_size,
    embedding_dim=embedding_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    context_length=context_length,
)
steps = epochs * steps_per_epoch
rise = max(1, steps // 20)  # the learning rate rises over 5 % of the steps, then falls
schedule = keras.optimizers.schedules.CosineDecay(
    0.0, steps - rise, alpha=0.05, warmup_target=learning_rate, warmup_steps=rise
)
model.compile(gpt_tf.AdamW(schedule), jit_compile=jit_compile)
print(f"{model.count_params():,} parameters")
began = time.process_time()
history = model.fit(
    train.dataset(),
    validation_data=held_out.dataset(repeat=False),
    epochs=epochs,
    steps_per_epoch=steps_per_epoch,
    verbose=2,
).history
print(f"{(time.process_time() - began) / 60:.1f} minutes of CPU time")

# %% [markdown]
# The loss is in *nats* per token. An untrained model gives each token about the same
# probability, so it begins near ln(V) for `V` tokens.

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
place = steps_per_epoch * np.arange(1, epochs + 1)
axes.plot(place, history["loss"], color="#8fa8c8", label="training")
axes.plot(place, history["val_loss"], "o-", color="#c2410c", label="held out")
axes.axhline(np.log(tokenizer.vocab_size), color="grey", linestyle=":")
axes.annotate(
    "untrained: ln(V)",
    (place[-1], np.log(tokenizer.vocab_size)),
    xytext=(0, -4),
    textcoords="offset points",
    ha="right",
    va="top",
    color="grey",
)
axes.set_xlabel("training step")
axes.set_ylabel("loss, nats per token")
axes.set_title(
    f"A GPT of {model.count_params() / 1e6:.1f} million parameters", loc="left"
)
axes.legend(frameon=False, loc="center right")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 2. Export one file, and check it
#
# `export_litertlm` writes weights and tokenizer into one file. In the mode
# `dynamic_int8` a weight has 8 bits instead of 32, with one scale per output channel,
# and activations are quantised while the file runs ([tutorial 3](03_quantise.ipynb)).

# %%
gpt = gpt_tf.GPTModel.from_config(model.get_config())
gpt.set_weights(model.get_weights())  # without the optimiser's state
(folder / "model").mkdir()
gpt.save(folder / "model" / "model.keras")
tokenizer.save(folder / "model")

file = folder / "mine.litertlm"
gpt_tf.export_litertlm(gpt, tokenizer, file, "dynamic_int8")
size_mb = {"Keras": 4 * gpt.count_params() / 1e6, "file": file.stat().st_size / 1e6}
print(f"weights in Keras  {size_mb['Keras']:.2f} MB")
print(f"{file.name}     {size_mb['file']:.2f} MB")

# %% [markdown]
# What did that cost? `evaluate_files` runs the finished file and the Keras model on the
# same held-out text. *Perplexity* is the number of equally likely tokens among which a
# model hesitates; lower is better. Each token here has at least half a context of text
# before it. The interval comes from drawing the blocks of the text anew.

# %%
report = gpt_tf.evaluate_files(
    [file],
    reference=folder / "model",
    corpus=corpus,
    max_tokens=evaluated_tokens,
    parse=False,
    folder=folder,
)
accuracy = dict(
    zip(("Keras", "file"), (e["accuracy"] for e in report["entries"]), strict=True)
)
perplexity = {name: found["perplexity"]["value"] for name, found in accuracy.items()}
increase = accuracy["file"]["perplexity_increase"]
print(f"{accuracy['file']['tokens']:,} tokens of held-out text")
for name, value in perplexity.items():
    print(f"{name:6} perplexity {value:.2f}")
print(
    f"change {increase['value']:+.2%}, "
    f"95 % interval {increase['low']:+.2%} to {increase['high']:+.2%}"
)

# %% [markdown]
# Now both write. `temperature=0` takes the most likely token each time (*greedy*), so
# texts can be compared. `EdgeGPT` runs the file with LiteRT and NumPy, without
# TensorFlow. The first call warms up; the speed is the median of the others.

# %%
greedy = {"max_new_tokens": max_new_tokens, "temperature": 0}
prompt_ids = tokenizer.encode(prompt)
edge = gpt_tf.EdgeGPT(file)
contenders = {"Keras": gpt, "EdgeGPT": edge}
written, seconds = {}, {name: [] for name in contenders}
for turn in range(repeats + 1):
    for name, contender in contenders.items():
        began = time.perf_counter()
        written[name] = contender.generate(prompt_ids, **greedy)
        if turn:
            spent = time.perf_counter() - began
            seconds[name].append(spent / max(1, len(written[name])))

rate = {name: 1 / float(np.median(found)) for name, found in seconds.items()}
text = {name: tokenizer.decode(found) for name, found in written.items()}
for name in contenders:
    print(f"{name:8} {rate[name]:7,.0f} tokens per second")
print(f"\n{prompt}{text['EdgeGPT']}")

# %% [markdown]
# ## 3. Write the page
#
# `write_web` writes a folder with a page, a script, the model, its tokenizer, and
# [LiteRT.js](https://ai.google.dev/edge/litert/web), which runs the model as
# WebAssembly. Nothing that a visitor types leaves the browser.
#
# LiteRT.js comes from npm. If its packages are in `node_modules`, they are copied and
# the page works offline; a browser fetches only the build of LiteRT.js that it can run.
# If not, the page is written all the same, and fetches the same versions from jsDelivr
# when somebody opens it.

# %%
modules = Path(node_modules)
has_packages = all((modules / name).is_dir() for name in PACKAGES)
site = folder / "site"
runtime = modules if has_packages else CDN
write_web(file, site, runtime=runtime, offline=has_packages, prompt=prompt)

kilobytes = dict.fromkeys(("model.tflite", "tokenizer.json", "runtime", "the rest"), 0)
for path in site.rglob("*"):
    part = path.relative_to(site).parts[0]
    part = part if part in kilobytes else "the rest"
    kilobytes[part] += path.stat().st_size / 1e3 if path.is_file() else 0
for part, size in kilobytes.items():
    print(f"{part:15} {size:9,.0f} kB")
print("LiteRT.js:", "copied" if has_packages else f"fetched from {CDN} by the page")

# %% [markdown]
# The next cell looks for what opens the page without a screen: Node.js, Chromium or
# Chrome, and Playwright, which steers them. If something is missing, it says what and
# how to install it. The notebook goes on without.

# %%
missing = [
    name
    for name, found in {
        "Node.js": shutil.which("node"),
        "Chromium or Chrome": browser and shutil.which(browser),
        "npm's packages of the page": has_packages,
        "npm's package playwright-core": (modules / "playwright-core").is_dir(),
    }.items()
    if not found
]
advice = (
    f"The page was not opened here. Missing: {', '.join(missing)}.\n"
    "Install Node.js and Chromium or Chrome if they are missing. Then run this where\n"
    "the notebook is, and run the notebook again:\n\n"
    f"    {install_command()} playwright-core\n"
)
print(advice if missing else "Everything is here to open the page.")

# %% [markdown]
# ## 4. Open it
#
# `make_server` is what `gpt-tf web --serve` uses: a server of one folder, on this
# machine only. Two of its headers isolate the page from others; a browser gives
# WebAssembly several threads only then. While the server runs, the address works in
# your own browser, too.

# %%
server = make_server(site, port=0)  # 0 takes a free port
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/"
with urllib.request.urlopen(url) as answer:
    print(url, answer.status, answer.headers["Content-Type"])
    for name in ("Cross-Origin-Opener-Policy", "Cross-Origin-Embedder-Policy"):
        print(f"{name}: {answer.headers[name]}")

# %% [markdown]
# This script, for Node.js, does what a person does: it opens the page, sets the
# temperature to 0, types the prompt, presses *Write*, and points at a token. It writes
# twice, since the browser is still compiling during the first text.

# %%
steps_of_a_person = """
const { chromium } = require("playwright-core");
const task = JSON.parse(process.argv[2]);

async function visit(page) {
  page.setDefaultTimeout(120_000);
  await page.goto(task.url);
  await page.waitForSelector("body[data-ready], .failed");
  const status = await page.textContent("#status");
  if (await page.$(".failed")) throw new Error(status);
  await page.click("summary");  // opens the settings
  await page.fill("#temperature", "0");
  await page.fill("#maxNewTokens", `${task.maxNewTokens}`);
  await page.click("summary");
  await page.fill("#prompt", task.prompt);
  for (let turn = 0; turn < 2; turn++) {
    await page.click("#go");
    await page.waitForSelector("#go:not([disabled])");
  }
  const tokens = await page.$$("#output .token");
  if (tokens.length) await tokens[Math.min(4, tokens.length - 1)].hover();
  const text = await page.textContent("#output");
  return { status, text, rate: Number(await page.textContent("#rate")) };
}

(async () => {
  const browser = await chromium.launch({ executablePath: task.browser });
  const found = {};
  for (const [name, width, height] of task.screens) {
    const page = await browser.newPage({ viewport: { width, height } });
    found[name] = await visit(page);
    await page.screenshot({ path: `${task.folder}/${name}.png`, fullPage: true });
    await page.close();
  }
  await browser.close();
  console.log(JSON.stringify(found));
})();
"""

# %% [markdown]
# Two windows: one as wide as on a desktop, one as wide as a phone. Node.js finds
# Playwright in the folder that `NODE_PATH` names. The script prints what it found: the
# page's status line, the text, and the speed that the page shows.

# %%
task = {
    "url": url,
    "browser": browser,
    "prompt": prompt,
    "maxNewTokens": max_new_tokens,
    "folder": str(folder),
    "screens": [["desktop", 960, 844], ["phone", 390, 844]],
}
pages = {}
if not missing:
    script = folder / "visit.cjs"
    script.write_text(steps_of_a_person, encoding="utf-8")
    done = subprocess.run(
        ["node", str(script), json.dumps(task)],
        env={**os.environ, "NODE_PATH": str(modules.resolve())},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    pages = json.loads(done.stdout)
for name, page in pages.items():
    print(f"{name:8} {page['status']} {page['rate']:,.0f} tokens per second")
if missing:
    print("Left out: see above.")

# %% [markdown]
# Is it the same text? Kernels in the browser and on this CPU add in another order. That
# changes the last digits of the logits, and could swap two tokens that are nearly
# equally likely.

# %%
for name, page in pages.items():
    pairs = zip(page["text"].removeprefix(prompt), text["EdgeGPT"], strict=False)
    same = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
    print(f"{name:8} {same} of {len(text['EdgeGPT'])} characters are those of EdgeGPT")
if missing:
    print("Left out: see above.")

# %% [markdown]
# And this is what a visitor sees, on a desktop and on a phone:

# %% tags=["result"]
if pages:
    screens = [plt.imread(folder / f"{name}.png") for name in pages]
    height, depth = max(map(len, screens)), screens[0].shape[2]
    columns = []
    for screen in screens:  # as high as the other, and a grey line between them
        filled = np.broadcast_to(screen[-1, :1], (height, *screen.shape[1:])).copy()
        filled[: len(screen)] = screen
        columns += [filled, np.full((height, 16, depth), 0.75, np.float32)]
    plt.imsave(folder / "pages.png", np.concatenate(columns[:-1], axis=1))
    display(Image(folder / "pages.png", alt="The page on a desktop and on a phone"))
else:
    print("Left out: see above.")

# %% [markdown]
# Each token of the text can be pointed at: the page shows its probability and the
# tokens that nearly came instead.

# %%
server.shutdown()
server.server_close()
print("the page's server has ended")

# %% [markdown]
# ## 5. The same file behind a server
#
# `gpt-tf serve` lets other programs ask for text by OpenAI's protocol
# ([how](../docs/how_to/serve.md)). Asking with a stream takes a few lines of Python's
# own library: each piece of text is a line that begins with `data: `.


# %%
def ask(address, **request):
    """Yield the pieces of a text as they come."""
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(address, json.dumps(request).encode(), headers)
    with urllib.request.urlopen(post, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]


# %% [markdown]
# The server is a process of its own. It prints its address once it is ready (a port of
# 0 takes a free one), and ends as it does at Ctrl-C in a terminal.


# %%
@contextlib.contextmanager
def serving(file):
    """Run `gpt-tf serve` on a file; give its address."""
    command = [sys.executable, "-m", "gpt_tf.cli", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    try:
        line = process.stdout.readline()
        print(line)
        yield line.split()[0]
    finally:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        print(f"\n{rest.strip()}, status {process.returncode}")


# %%
request = {"model": file.stem, "prompt": prompt, "stream": True}
request |= {"max_tokens": max_new_tokens, "temperature": 0}
if all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
    with serving(file) as address:
        pieces = []
        print(prompt, end="")
        for piece in ask(f"{address}/completions", **request):
            print(piece, end="", flush=True)
            pieces.append(piece)
        spent = []
        for _ in range(repeats):
            began = time.perf_counter()
            list(ask(f"{address}/completions", **request))
            spent.append(time.perf_counter() - began)
        print()
    text["server"] = "".join(pieces)
    rate["server"] = max(1, len(written["EdgeGPT"])) / float(np.median(spent))
    print("the same text as EdgeGPT:", text["server"] == text["EdgeGPT"])
else:
    print("The server was left out. It needs: pip install 'gpt-tf[serve]'")

# %% [markdown]
# OpenAI's own client (`pip install openai`) takes the same address:
#
#     client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
#     for piece in client.completions.create(
#         model="mine", prompt="def read_lines(self", max_tokens=60, stream=True
#     ):
#         print(piece.choices[0].text, end="")
#
# ## All in one table
#
# The speed of the page is its own reading, from the first token on; the others are
# whole calls. The page and the server run the file that `EdgeGPT` runs, so they have
# its size and its perplexity.

# %%
for name, page in pages.items():
    text[name], rate[name] = page["text"].removeprefix(prompt), page["rate"]
where = {
    "Keras": "Keras, float32",
    "EdgeGPT": "EdgeGPT, int8 file",
    "desktop": "page in the browser, int8 file",
    "server": "gpt-tf serve, int8 file",
}
lines = ["| | MB | perplexity | ms a token | tokens/s | the text of EdgeGPT |"]
lines.append("|---|---:|---:|---:|---:|---|")
for name in (name for name in where if name in rate):
    kind = "Keras" if name == "Keras" else "file"
    equal = "yes" if text[name] == text["EdgeGPT"] else "no"
    lines.append(
        f"| {where[name]} | {size_mb[kind]:.2f} | {perplexity[kind]:.2f} "
        f"| {1e3 / rate[name]:.2f} | {rate[name]:,.0f} | {equal} |"
    )
display(Markdown("\n".join(lines)))
edge.close()
if missing:
    print(advice)

# %% [markdown]
# The model is small: `EdgeGPT` computes a token faster than the page or the server can
# pass it on. In the page each token is a message between page, worker and LiteRT.js,
# and is drawn at once; the server sends it by HTTP. So the page need not be faster than
# Keras, but it needs neither TensorFlow nor a server that computes. With a larger model
# computing takes a larger part of the time. The run that is kept here shared its cores
# with other work: its speeds are rough.
#
# ## Where next
#
# - From a terminal:
#
#       gpt-tf web --model runs/notebook-09/mine.litertlm --out site --serve
#       gpt-tf serve --model runs/notebook-09/mine.litertlm
#
# - Upload the folder `site` to any web server with https, and you have published your
#   GPT. [Put it into a web page](../docs/how_to/browser.md) says which headers give it
#   threads, and how your own page calls the script `gpt_tf.js`.
# - A page of a GPT that you have already: [tutorial 1](01_make_it_fast.ipynb) exports
#   it. With a chat template the page is a chat.
# - The text is better after longer training: set `epochs = 80`.
# - The functions: [GPTModel](../gpt_tf/models/), [export_litertlm](../gpt_tf/export/),
#   [EdgeGPT](../gpt_tf/edge/), [evaluate_files](../gpt_tf/evaluation/).
# - This was the last tutorial; [all nine](README.md).

# %%
results = {
    "size_mb": size_mb,
    "perplexity": perplexity,
    "increase": increase,
    "loss": {name: history[name] for name in ("loss", "val_loss")},
    "uniform_loss": float(np.log(tokenizer.vocab_size)),
    "tokens_per_second": rate,
    "texts": text,
    "threads": edge.num_threads,
    "missing": missing,
    "cpu_minutes": round(sum(os.times()[:4]) / 60, 2),  # with those of its processes
}
print("results:", json.dumps(results))
