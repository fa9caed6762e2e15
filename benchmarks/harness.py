"""What the benchmarks share: contenders, peers' models, and where results go.

Processes, turns and percentiles are those of `gpt_tf.evaluation.harness`, as of
`gpt-tf benchmark`. Ratios hold; absolute times are this machine's.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from importlib import metadata
from pathlib import Path

import numbers_page
import numpy as np
from rich.console import Console

from gpt_tf.errors import InputError, WorkerFailedError
from gpt_tf.evaluation import harness as timing
from gpt_tf.evaluation.harness import Worker, spread

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

console = Console(highlight=False, soft_wrap=True)


class NotHere(InputError):
    """A contender's package is not installed, or it cannot do what is asked."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of doing the same work.

    Args:
        name: As it stands in the table.
        make: A function of a module, so that another process finds it. Called with
            `arguments`, it prepares the work and returns a function of a number of
            repetitions, which does the work and returns its measurements: a list
            of seconds, one per repetition.
        arguments: For `make`.
    """

    name: str
    make: Callable
    arguments: tuple = ()


@dataclasses.dataclass
class Measured:
    """What a contender needed.

    Attributes:
        name: The contender's.
        seconds: One number per repetition, warm-up left out.
        first_seconds: From the start of its process's work to the end of its first
            repetition, compilation included.
        failure: Why there are no numbers, or None.
    """

    name: str
    seconds: list = dataclasses.field(default_factory=list)
    first_seconds: float = float("nan")
    failure: str | None = None

    def percentile_ms(self, percent):
        return float(np.percentile(self.seconds, percent)) * 1e3

    @property
    def median_ms(self):
        return self.percentile_ms(50) if self.seconds else float("nan")

    def as_dict(self):
        if self.failure:
            return {"name": self.name, "failure": self.failure}
        found = spread([self.seconds])
        return {
            "name": self.name,
            **{f"{name}_ms": found[name] * 1e3 for name in ("median", "p95", "p99")},
            "first_seconds": self.first_seconds,
            "repetitions": len(self.seconds),
        }


def take_turns(contenders, rounds, repetitions, warm_up=2):
    """Let every contender work in turn, each in one process for all rounds.

    Args:
        contenders: The contenders.
        rounds: How often each has its turn.
        repetitions: How much each does in a turn, after one that is not counted:
            what stood still while others worked finds cold caches.
        warm_up: Repetitions after the first that are not counted.

    Returns:
        A `Measured` per contender.
    """
    results, turns = [], []
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            measured = Measured(contender.name)
            results.append(measured)
            try:
                work = Worker(
                    _first_done, (contender,), name=measured.name, quiet=False
                )
            except (InputError, ModuleNotFoundError, WorkerFailedError) as error:
                measured.failure = str(error)
                console.print(f"  {contender.name}: {error}")
                continue
            stack.enter_context(work)
            seconds = measured.first_seconds = work.ask()
            work.ask(warm_up)
            turns.append(functools.partial(_turn, measured, work, repetitions))
            console.print(f"  {contender.name}: ready after {seconds:.1f} s")
        timing.take_turns(turns, rounds)
    return results


def _first_done(contender):
    began = time.perf_counter()
    repeat = contender.make(*contender.arguments)
    repeat(1)
    first_seconds = time.perf_counter() - began
    return lambda count=None: first_seconds if count is None else repeat(count)


def _turn(measured, work, repetitions):
    measured.seconds += work.ask(repetitions + 1)[1:]
    console.print(f"  {measured.name} {measured.median_ms:.1f} ms")


def repeat(work):
    """Return what works so many times, and returns the seconds of each."""

    def measured(count):
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return seconds

    return measured


# Floors


def product_rate():
    """Return a float32 matrix product's operations per second, the best of NumPy,
    TensorFlow and, where it is installed, PyTorch."""
    size = 1536
    contenders = [
        Contender("TensorFlow", _tensorflow_product, (size,)),
        Contender("PyTorch", _torch_product, (size,)),
    ]
    results = take_turns(contenders, 3, 10)
    best = min(min(m.seconds) for m in results if m.seconds)
    return 2 * size**3 / best


def _tensorflow_product(size):
    import tensorflow as tf

    a = tf.random.normal([size, size])
    return repeat(lambda: tf.matmul(a, a).numpy())


def _torch_product(size):
    torch = import_torch()
    a = torch.randn(size, size)
    return repeat(lambda: torch.mm(a, a))


_READER = """
float total(const float *x, long n) {
    float sums[64] = {0}, sum = 0;
    for (long i = 0; i + 64 <= n; i += 64)
        for (int j = 0; j < 64; j++) sums[j] += x[i + j];
    for (int j = 0; j < 64; j++) sum += sums[j];
    return sum;
}
"""


@functools.cache
def _reader():
    """Compile the loop by `cc` for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "reader.so"
        command = ["cc", "-O3", "-ffast-math", "-march=native", "-shared", "-fPIC"]
        command += ["-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=_READER, text=True, check=True)
        total = ctypes.CDLL(str(library)).total  # a call leaves Python's lock
    total.argtypes, total.restype = (ctypes.c_void_p, ctypes.c_long), ctypes.c_float
    return total


def read_rate(size: int, threads: int) -> float:
    """Return bytes per second at which threads read so many bytes again and again.

    Each has its part, which stays in whatever cache holds it, as a step's weights do;
    the best of the passes counts.
    """
    total = _reader()
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    best, end = float("inf"), time.perf_counter() + 1.5
    with futures.ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(lambda part: total(part.ctypes.data, part.size), parts))
            best = min(best, time.perf_counter() - began)
    return size / best


# Models


def import_or_not_here(name):
    try:
        return __import__(name)
    except ImportError:
        raise NotHere(f"{name} is not installed") from None


def import_torch():
    """Import PyTorch, to be run as TensorFlow runs: without denormal numbers."""
    torch = import_or_not_here("torch")
    # TensorFlow flushes them by itself; a PyTorch that does not is three times slower.
    torch.set_flush_denormal(True)
    return torch


def gpt_tf_model(shape):
    """Build a `GPTModel` from a shape or task with its sizes."""
    import gpt_tf

    return gpt_tf.GPTModel(
        shape.vocab_size,
        shape.embedding_dim,
        shape.num_layers,
        shape.num_heads,
        context_length=shape.context_length,
    )


def keras_hub_gpt2(shape):
    """Build KerasHub's `GPT2CausalLM` from sizes named as `GPTModel` names them."""
    import_or_not_here("keras_nlp")
    import keras_nlp

    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=shape.embedding_dim,
        intermediate_dim=4 * shape.embedding_dim,
        max_sequence_length=shape.context_length,
        dropout=0.0,
    )
    return keras_nlp.models.GPT2CausalLM(backbone, preprocessor=None)


def cut_windows(tokens, length, count):
    """Cut `count` windows `(N, length + 1)`, evenly spaced, out of token ids."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(np.int64)
    return np.asarray(tokens)[starts[:, None] + np.arange(length + 1)].astype(int)


def file_log_probs(gpt, windows):
    """Run a file over windows `(N, T + 1)`; return log-probabilities `(N, T, V)`."""
    from gpt_tf.generation.sampler import log_softmax

    pieces = []
    for window in windows:
        gpt.reset()
        pieces.append(log_softmax(gpt.logits(window[:-1])))
    return np.stack(pieces)


# Results


_PACKAGES = (
    *("gpt-tf", "tensorflow", "tf_keras", "keras", "keras-nlp", "torch"),
    *("ai-edge-litert", "litert-lm", "onnxruntime", "llama-cpp-python"),
)
# How the peers that say it were built, as expressions.
_BUILDS = {
    "torch": "[line for line in torch.__config__.show().splitlines() "
    "if 'Kernel Library' in line or 'capability' in line]",
    "onnxruntime": "onnxruntime.get_build_info()",
    "llama_cpp": "llama_cpp.llama_print_system_info().decode()",
}


@functools.cache  # a long run is of the commit that it began with
def provenance():
    """Return the commit, this machine, the packages that were measured, peers' builds.

    A commit of which the package or the benchmarks were changed ends in `-dirty`.
    """
    from gpt_tf.evaluation.hardware import describe_machine

    found = {"cpu": describe_machine(seconds=0)["cpu"], "cores": os.cpu_count()}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if _output("git", "status", "--porcelain", "-uno", "gpt_tf", "benchmarks/*.py"):
        commit += "-dirty"
    builds = {
        name: " ".join(
            _output(sys.executable, "-c", f"import {name}; print({what})").split()
        )
        for name, what in _BUILDS.items()
    }
    builds = {name: build for name, build in builds.items() if build}
    return {"commit": commit or "unknown", "machine": found, "builds": builds}


def _output(*command):
    """Return what a command prints, nothing where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def print_machine():
    facts = provenance()
    parts = [f"commit {facts['commit']}"]
    parts += [f"{name} {value}" for name, value in facts["machine"].items()]
    console.print(", ".join(parts))


def finish(name, value, keep=True):
    """Show results as docs/numbers.md does, and keep them beside where they are from.

    Args:
        name: They are kept as `benchmarks/results/NAME.json`.
        value: The results.
        keep: Whether they are kept; not those of a part or a try.
    """
    content = {"date": time.strftime("%Y-%m-%d"), **provenance(), **value}
    text = json.dumps(content, indent=2) + "\n"
    console.print(numbers_page.tables_of(name, json.loads(text)), markup=False)
    if keep:
        path = RESULTS / f"{name}.json"
        path.write_text(text, "utf-8")
        console.print(f"wrote {path.relative_to(ROOT)}")
