"""`gpt-tf serve` beside `EdgeGPT` itself, and sessions from a file beside prefills.

    python benchmarks/server.py [--rounds N] [--folder DIR] [--llama-server PATH]

Decoding: the same file continues the same prompt of 16 tokens greedily by 64, as
`EdgeGPT.stream` in a loop of one's own, as a stream of the server to one client, and to
8 clients at once. Clients and server share the machine. Of the bundled models a token
takes as long as what Python and HTTP do for it, of GPT-2 small's shape it does not.
With `--llama-server`, llama.cpp's own server is asked the same, of the same weights as
q8_0. `pip download --no-binary :all: llama-cpp-python` has its sources in
`vendor/llama.cpp`, and `cmake --build build --target llama-server` makes it.

Sessions: a prompt of 900 tokens at GPT-2 small's shape is prefilled, and loaded from
the file that `save_session` wrote; the logits behind it are compared.
"""

import argparse
import atexit
import contextlib
import dataclasses
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent import futures
from pathlib import Path

import numpy as np
import peers
from generation import Task
from harness import ROOT, Contender, console, finish, print_machine, take_turns
from serving import MODE, export, file_of

from gpt_tf.text.tokenizer import BPETokenizer

CLIENTS = 8
PROMPT_TOKENS, NEW_TOKENS = 16, 64
SESSION_TOKENS = 900
BUNDLED = ("python-student", "python-small")
SMALL = "GPT-2 small's shape"
THREADS = 2
# The command line, until standard input ends.
_SERVE = """
import os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
from gpt_tf import cli
cli.main()
"""


def prompts_of(path):
    """Return prompts, of ids that every model knows, behind which a model writes on."""
    from gpt_tf.edge import EdgeGPT

    generator, found = np.random.default_rng(3), []
    with EdgeGPT(path) as gpt:
        while len(found) < CLIENTS:
            prompt = generator.integers(0, 257, PROMPT_TOKENS).tolist()
            text = gpt.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
            if len(text) == NEW_TOKENS and gpt.tokenizer.decode(text):
                found.append(prompt)
    return found


def direct(path, prompts):
    """`EdgeGPT`, whose text is taken piece by piece."""
    from gpt_tf.edge import EdgeGPT

    gpt = EdgeGPT(path)
    options = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    return repeated(lambda: sum(1 for _ in gpt.stream(prompts[0], **options)))


def served(path, prompts):
    """The server, in a process that ends with this one, and its clients."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, "serve", "--port", "0", "--model", path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return asked(process.stdout.readline().split()[0], prompts)


def llama_server(task, prompts, folder, program):
    """llama.cpp's server, in a process that ends with this one, and its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = peers.quantized_gguf(task, folder, "q8_0")
    room = CLIENTS * 2 * (PROMPT_TOKENS + NEW_TOKENS)
    options = f"-t {THREADS} -tb {THREADS} -np {CLIENTS} -c {room} -fa on --port {port}"
    process = subprocess.Popen(
        [program, "-m", file, *options.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(process.kill)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health").close()
            return asked(url, prompts)
        time.sleep(0.1)
    raise RuntimeError(f"{program} did not answer within a minute")


def asked(url, prompts):
    """Clients of a server that all ask at once."""
    from gpt_tf.evaluation.server_load import Server

    server, pool = Server(url), futures.ThreadPoolExecutor(len(prompts))

    def ask(prompt):
        with contextlib.closing(server.connect()) as connection:
            return server.stream(connection, prompt, NEW_TOKENS).tokens

    return repeated(lambda: sum(pool.map(ask, prompts)))


def repeated(generate):
    """Return a repetition: seconds a token, of all that are generated."""

    def once():
        began = time.perf_counter()
        tokens = generate()
        return (time.perf_counter() - began) / tokens

    return lambda count: [once() for _ in range(count)]


def session(path, folder, load):
    """A prompt in the cache: prefilled, or loaded."""
    from gpt_tf.edge import EdgeGPT

    gpt, file = EdgeGPT(path), Path(folder) / "server.session"
    ids = np.random.default_rng(4).integers(0, 257, SESSION_TOKENS).tolist()
    gpt.prefill(ids)
    gpt.save_session(file)
    logits = gpt.decode(5)

    def once():
        gpt.reset()
        began = time.perf_counter()
        if load:
            gpt.load_session(file)
        else:
            gpt.prefill(ids)
        seconds = time.perf_counter() - began
        if not np.array_equal(gpt.decode(5), logits):
            raise RuntimeError("the logits differ")
        return seconds

    return lambda count: [once() for _ in range(count)]


def compare(name, path, prompts, rounds, others=()):
    """Return the tokens per second of one file, each way."""
    contenders = [
        Contender("EdgeGPT", direct, (path, prompts[:1])),
        Contender("server, 1 client", served, (path, prompts[:1])),
        Contender(f"server, {CLIENTS} clients", served, (path, prompts)),
        *others,
    ]
    console.print(name)
    measured = take_turns(contenders, rounds, 1)
    own = np.array(measured[0].seconds)
    return {
        "name": name,
        "tokens_per_second": {
            m.name: 1 / float(np.median(m.seconds)) for m in measured
        },
        # Of each round, so that a slow moment is slow for both.
        "share": float(np.median(own / measured[1].seconds)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="keeps the model")
    parser.add_argument("--llama-server", help="llama.cpp's program of that name")
    arguments = parser.parse_args()
    task = Task()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-server"
    folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    take_turns([Contender("export", export, (task, folder))], 1, 1, 1)
    # Any tokenizer will do: the prompts are ids.
    BPETokenizer.train(["nothing"], 257).save(folder / "tokenizer.json")
    small = file_of(folder)
    models = {name: str(ROOT / f"saved_models/{name}.litertlm") for name in BUNDLED}
    prompts = prompts_of(small)
    others = [
        Contender(
            f"llama.cpp's server, {clients} client{'s' * (clients > 1)}",
            *(llama_server, (task, prompts[:clients], folder, arguments.llama_server)),
        )
        for clients in (1, CLIENTS)
        if arguments.llama_server
    ]
    rows = [
        compare(name, path, prompts_of(path), arguments.rounds)
        for name, path in models.items()
    ]
    rows.append(compare(SMALL, small, prompts, arguments.rounds, others))
    prefilled, loaded = take_turns(
        [
            Contender("prefilled", session, (small, folder, False)),
            Contender("loaded", session, (small, folder, True)),
        ],
        arguments.rounds,
        1,
    )
    content = {
        "task": dataclasses.asdict(task),
        "mode": MODE,
        "clients": CLIENTS,
        "new_tokens": NEW_TOKENS,
        "models": rows,
        "session_tokens": SESSION_TOKENS,
        "prefill_ms": prefilled.median_ms,
        "load_ms": loaded.median_ms,
        "session_bytes": (folder / "server.session").stat().st_size,
    }
    finish("server", content)


if __name__ == "__main__":
    main()
