"""The exported file in a browser: LiteRT.js beside transformers.js and `EdgeGPT`.

    python benchmarks/browser.py [--rounds N] [--folder DIR] [--modules DIR]

Headless Chromium, from this machine's own server with the headers that give a page
threads. At GPT-2 small's shape with the same random weights in int8, each continues the
same 64 random tokens greedily by 64; ours takes a cache of these 128 positions,
transformers.js one that grows. The bundled model is measured against `EdgeGPT`, and how
long its page takes to be ready in a browser that has never seen it. `--modules` names
the folder in which npm installed the packages that `gpt-tf web` asks for,
playwright-core and @huggingface/transformers.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import peers
from decode import export, exported_path
from generation import Task
from harness import ROOT, Contender, console, finish, print_machine, take_turns

from gpt_tf.edge import EdgeGPT
from gpt_tf.edge.runtime import default_threads
from gpt_tf.edge.static_server import make_server
from gpt_tf.edge.web_bundle import PACKAGES, write_web

MODE = "dynamic_int8"
BUNDLED = ROOT / "saved_models/python-small.litertlm"
REPETITIONS = 3


def write_transformers_js(task, folder, modules):
    """Write a page's folder with the ONNX model that transformers.js expects."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = peers._onnx_gpt2(task, "MultiHeadAttention")
    names = {"ids": "input_ids", "places": "position_ids"}
    for layer in range(task.num_layers):
        for ours, theirs in (("keys", "key"), ("values", "value")):
            names[f"past_{ours}_{layer}"] = f"past_key_values.{layer}.{theirs}"
            names[f"present_{ours}_{layer}"] = f"present.{layer}.{theirs}"
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    (folder / "gpt2/onnx").mkdir(parents=True, exist_ok=True)
    quantize_dynamic(
        model,
        folder / "gpt2/onnx/model_quantized.onnx",
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": task.num_layers,
        "n_head": task.num_heads,
        "n_embd": task.embedding_dim,
        "n_positions": task.context_length,
        "vocab_size": task.vocab_size,
    }
    (folder / "gpt2/config.json").write_text(json.dumps(config))
    (folder / "gpt2/generation_config.json").write_text("{}")
    shutil.copytree(
        modules / "onnxruntime-web/dist", folder / "ort", dirs_exist_ok=True
    )
    script = modules / "@huggingface/transformers/dist/transformers.min.js"
    shutil.copy(script, folder)
    (folder / "style.css").touch()


class Browser:
    """Runs browser.mjs on folders."""

    def __init__(self, modules):
        self.modules = modules
        self.chromium = shutil.which("chromium") or shutil.which("google-chrome")

    def measure(self, what, folder, **task):
        with make_server(folder, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/"
            script = Path(__file__).with_suffix(".mjs")
            done = subprocess.run(
                ["node", script, self.modules, self.chromium, what, url],
                input=json.dumps(task),
                capture_output=True,
                text=True,
            )
            server.shutdown()
        if done.returncode:
            raise SystemExit(f"{what}: {done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def edge_times(path, task):
    """Do with `EdgeGPT` what browser.mjs does; return milliseconds as it does."""
    found = []
    with EdgeGPT(path) as gpt:
        for _ in range(REPETITIONS + 1):
            gpt.reset()
            times = [time.perf_counter()]
            gpt.prefill(task["prompt"][:-1])
            token = int(np.argmax(gpt.decode(task["prompt"][-1])))
            times.append(time.perf_counter())
            for _ in range(task["newTokens"] - 1):
                token = int(np.argmax(gpt.decode(token)))
                times.append(time.perf_counter())
            found.append([1e3 * (moment - times[0]) for moment in times])
    return found[1:]


def row_of(name, requests):
    decode = [ms for times in requests for ms in np.diff(times[1:])]
    return {
        "name": name,
        "first_token_ms": statistics.median(t[1] - t[0] for t in requests),
        "tokens_per_second": float(1e3 / np.median(decode)),
        "requests": len(requests),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps the models")
    parser.add_argument("--modules", type=Path, default=ROOT / "node_modules")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-browser"
    folder.mkdir(parents=True, exist_ok=True)
    browser = Browser(arguments.modules.resolve())
    print_machine()
    fitted = Task(prompt_tokens=64, new_tokens=64, context_length=128)
    if not exported_path(folder, fitted, MODE).is_file():
        take_turns([Contender("export", export, (fitted, folder, (MODE,)))], 1, 1, 1)
    sites = {"small": folder / "bundled", "gpt2": folder / "gpt2-small"}
    files = {"small": BUNDLED, "gpt2": exported_path(folder, fitted, MODE)}
    for name, site in sites.items():
        write_web(files[name], site, runtime=browser.modules)
    theirs = folder / "transformers.js"
    if not (theirs / "style.css").is_file():
        task = dataclasses.replace(fitted, context_length=1024)
        write_transformers_js(task, theirs, browser.modules)

    shared = {"newTokens": 64, "repetitions": REPETITIONS, "threads": default_threads()}
    prompt = np.random.default_rng(1).integers(0, 1024, 64).tolist()
    large = {"prompt": fitted.prompt().tolist(), **shared}
    small = {"prompt": prompt, **shared}
    contenders = {
        "GPT-2 small's shape, gpt_tf in the browser": (
            lambda: browser.measure("ours", sites["gpt2"], **large)
        ),
        "GPT-2 small's shape, transformers.js": (
            lambda: browser.measure("transformers", theirs, **large)
        ),
        "GPT-2 small's shape, EdgeGPT": lambda: edge_times(files["gpt2"], large),
        "the bundled model, gpt_tf in the browser": (
            lambda: browser.measure("ours", sites["small"], **small)
        ),
        "the bundled model, EdgeGPT": lambda: edge_times(BUNDLED, small),
    }
    requests = {name: [] for name in contenders}
    ready = []
    for _ in range(arguments.rounds):
        for name, measure in contenders.items():
            requests[name] += measure()
            console.print(f"  {row_of(name, requests[name])}")
        ready.append(browser.measure("ready", sites["small"]))
        console.print(f"  ready after {ready[-1]:.0f} ms")
    version = subprocess.run(
        [browser.chromium, "--version"], capture_output=True, text=True
    ).stdout
    packages = {
        name: json.loads((browser.modules / name / "package.json").read_text())
        for name in (*PACKAGES, "@huggingface/transformers")
    }
    finish(
        "browser",
        {
            "browser": version.strip(),
            "packages": {name: about["version"] for name, about in packages.items()},
            "task": dataclasses.asdict(fitted),
            "threads": default_threads(),
            "ready_ms": {"median": statistics.median(ready), "all": ready},
            "results": [row_of(name, times) for name, times in requests.items()],
        },
    )


if __name__ == "__main__":
    main()
