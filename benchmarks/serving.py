"""Several requests on one device: response beside a long prompt, and throughput.

    python benchmarks/serving.py [--rounds N] [--series N] [--folder DIR]

A model of GPT-2 small's shape with random weights, `dynamic_int8`, greedy.

Response: a prompt of 960 tokens comes first, and while it is prefilled short requests
arrive, 50 ms apart. Measured is how long each waits for its first token, from its
arrival on, with the prompt prefilled whole and in chunks of several lengths.

Throughput: 1, 2, 4 and 8 requests at once, and the new tokens of all in a second: one
`EdgeGPT` with 1 and with 2 threads, which takes them one after the other; an
`EdgeScheduler`, which decodes them in one call; two copies of the whole model in
processes of their own; and llama.cpp, which decodes all in one call too.

A call reads every weight once, so the rate at which the cores read memory sets the
floor of what one text at a time can reach.
"""

import argparse
import collections
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
from generation import Task
from harness import (
    Contender,
    Measured,
    console,
    finish,
    gpt_tf_model,
    print_machine,
    read_rate,
    take_turns,
)

MODE = "dynamic_int8"
CHUNKS = (None, 256, 64, 8)  # None: whole
LONG_TOKENS = 960
SHORT_TOKENS = 16
SHORT_NEW_TOKENS = 8
ARRIVALS_S = tuple(0.025 + 0.05 * index for index in range(8))
REQUESTS = (1, 2, 4, 8)
NEW_TOKENS = 32


class Seconds(float):
    """A time with all that was measured beside it, in `details`."""

    details: dict


def with_details(seconds, details):
    measured = Seconds(seconds)
    measured.details = details
    return measured


# The model


def file_of(folder):
    return str(Path(folder) / f"serving-{MODE}.tflite")


def export(task, folder):
    """Export the model.

    A contender, so that TensorFlow's memory goes with its process.
    """
    from gpt_tf.export.tflite import export_tflite

    began = time.perf_counter()
    if not Path(file_of(folder)).is_file():
        model = gpt_tf_model(task)
        options = {"allow_untrained": True, "batch_sizes": (4, 8)}
        export_tflite(model, file_of(folder), MODE, **options)
    seconds = time.perf_counter() - began
    return lambda count: [seconds] * count


def prompts_of(task, count, length):
    generator = np.random.default_rng(2)
    return generator.integers(0, task.vocab_size, (count, length)).tolist()


# Response


def respond(task, folder, chunk, threads):
    """Short requests while a long prompt is read, by a scheduler of `chunk` tokens."""
    from gpt_tf.edge import EdgeGPT, EdgeScheduler

    gpt = EdgeGPT(file_of(folder), num_threads=threads)
    options = {"chunked": False} if chunk is None else {"max_chunk": chunk}
    (long,) = prompts_of(task, 1, LONG_TOKENS)
    shorts = prompts_of(task, len(ARRIVALS_S), SHORT_TOKENS)

    def once():
        with EdgeScheduler(gpt, max_active=len(ARRIVALS_S) + 1, **options) as scheduler:
            return measure(scheduler)

    def measure(scheduler):
        began = time.perf_counter()
        first = scheduler.submit(long, max_new_tokens=8, temperature=0)
        arrived = {first: 0.0}
        coming = collections.deque(zip(ARRIVALS_S, shorts, strict=True))
        waited = {}
        while True:
            now = time.perf_counter() - began
            while coming and coming[0][0] <= now:
                arrival, prompt = coming.popleft()
                request = scheduler.submit(
                    prompt, max_new_tokens=SHORT_NEW_TOKENS, temperature=0
                )
                arrived[request] = arrival
            work = scheduler.step()
            if work is None:
                if not coming:
                    break
                time.sleep(1e-3)
            elif work.kind == "decode" and work.requests[0] not in waited:
                elapsed = time.perf_counter() - began
                waited[work.requests[0]] = elapsed - arrived[work.requests[0]]
        total = time.perf_counter() - began
        long_waited = waited.pop(first)
        shorts_waited = list(waited.values())
        return with_details(
            np.median(shorts_waited),
            {"shorts": shorts_waited, "long": long_waited, "total": total},
        )

    return lambda count: [once() for _ in range(count)]


def response_of(measured):
    """Return what the rounds of one setting say together."""
    details = [seconds.details for seconds in measured.seconds]
    shorts = np.concatenate([one["shorts"] for one in details]) * 1e3
    return {
        "name": measured.name,
        "short_median_ms": float(np.median(shorts)),
        "short_p95_ms": float(np.percentile(shorts, 95)),
        "short_worst_ms": float(shorts.max()),
        "long_ms": float(np.median([one["long"] for one in details])) * 1e3,
        "total_ms": float(np.median([one["total"] for one in details])) * 1e3,
        "short_ms": [round(float(value), 2) for value in shorts],
    }


# Throughput


def one_model(task, folder, threads):
    from gpt_tf.edge import EdgeGPT

    return rates_of(task, EdgeGPT(file_of(folder), num_threads=threads).generate)


def scheduler(task, folder, threads):
    """All requests at once, decoded in one call as far as the file allows."""
    from gpt_tf.edge import EdgeGPT, EdgeScheduler

    gpt = EdgeGPT(file_of(folder), num_threads=threads)

    def generate(prompts, **options):
        with EdgeScheduler(gpt) as scheduler:
            for prompt in prompts:
                scheduler.submit(prompt, **options)
            scheduler.run()

    return rates_of(task, generate)


def two_processes(task, folder):
    copies = [Copy(file_of(folder)) for _ in range(2)]

    def generate(prompts, **options):
        shares = prompts[::2], prompts[1::2]
        for copy, share in zip(copies, shares, strict=True):
            copy.ask(len(share))
        for copy in copies:
            copy.wait()

    return rates_of(task, generate)


class Copy:
    """A whole model in a process of its own, which ends with its input."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--copy", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.wait()

    def ask(self, count):
        print(count, file=self.process.stdin, flush=True)

    def wait(self):
        if not self.process.stdout.readline():
            raise RuntimeError("a copy of the model ended")


def be_copy(path):
    """Continue as many prompts as each line of standard input says."""
    from gpt_tf.edge import EdgeGPT

    task = Task()
    with EdgeGPT(path, num_threads=1) as gpt:
        print("ready", flush=True)
        for line in sys.stdin:
            prompts = prompts_of(task, int(line), SHORT_TOKENS)
            if prompts:
                gpt.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0)
            print("done", flush=True)


def llama_cpp(task, folder):
    """Prompts one after the other, then a token of each text in every call."""
    start, decode = peers.llama_cpp_batch(task, 2, folder, "q8_0", REQUESTS[-1])

    def generate(prompts, max_new_tokens, temperature):
        tokens = [
            int(start(row, prompt).argmax()) for row, prompt in enumerate(prompts)
        ]
        for place in range(SHORT_TOKENS, SHORT_TOKENS + max_new_tokens - 1):
            tokens = decode(tokens, place).argmax(-1).tolist()

    return rates_of(task, generate)


def rates_of(task, generate):
    """Return a repetition: new tokens per second by number of requests."""

    def once():
        rates = {}
        for count in REQUESTS:
            prompts = prompts_of(task, count, SHORT_TOKENS)
            began = time.perf_counter()
            generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0)
            rates[count] = count * NEW_TOKENS / (time.perf_counter() - began)
        return with_details(1 / rates[REQUESTS[-1]], rates)

    return lambda count: [once() for _ in range(count)]


def take_turns_anew(contenders, series, rounds):
    """Take turns several times, in processes of their own and another order each.

    Two processes that do the same were seen to differ by a third for as long as they
    lived, which turns alone do not even out.
    """
    found = {contender.name: [] for contender in contenders}
    for index in range(series):
        place = index % len(contenders)
        order = contenders[place:] + contenders[:place]
        for measured in take_turns(order, rounds, 1, warm_up=1):
            found[measured.name] += measured.seconds
    return [Measured(name, seconds) for name, seconds in found.items()]


def throughput_of(measured):
    found = {count: [s.details[count] for s in measured.seconds] for count in REQUESTS}
    return {
        "name": measured.name,
        "tokens_per_second": {c: float(np.median(r)) for c, r in found.items()},
        "fastest_tokens_per_second": {c: max(r) for c, r in found.items()},
    }


def weight_bytes(task, folder):
    """Return the bytes that a token reads."""
    from gpt_tf.artifacts import check_file_manifest

    manifest = check_file_manifest(file_of(folder))
    # Of the position table a token reads one row.
    return (
        manifest["verification"]["parameter_bytes"]
        - task.context_length * task.embedding_dim
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--series", type=int, default=5, help="with new processes")
    parser.add_argument("--folder", type=Path, help="keeps the models")
    parser.add_argument("--copy", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.copy:
        be_copy(arguments.copy)
        return
    task = Task()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-serving"
    folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    console.print("exporting the file")
    take_turns([Contender("export", export, (task, folder))], 1, 1, 1)
    threads = 2
    contenders = [
        Contender(
            "whole" if chunk is None else f"chunks of {chunk}",
            respond,
            (task, folder, chunk, threads),
        )
        for chunk in CHUNKS
    ]
    response = take_turns(contenders, arguments.rounds, 1, warm_up=1)
    response = [response_of(measured) for measured in response]
    size = weight_bytes(task, folder)
    bandwidth = {count: read_rate(size, count) for count in (1, 2)}
    floor = bandwidth[2] / size
    console.print(
        f"a token reads {size / 1e6:.0f} MB; 1 core reads "
        f"{bandwidth[1] / 1e9:.1f} GB/s, 2 read {bandwidth[2] / 1e9:.1f}, which allows "
        f"{bandwidth[1] / size:.0f} and {floor:.0f} tokens/s"
    )
    contenders = [
        Contender("EdgeGPT, 1 thread", one_model, (task, folder, 1)),
        Contender("EdgeGPT, 2 threads", one_model, (task, folder, 2)),
        Contender("EdgeScheduler, 2 threads", scheduler, (task, folder, 2)),
        Contender("2 copies, 2 processes", two_processes, (task, folder)),
        Contender("llama.cpp q8_0, batched, 2 threads", llama_cpp, (task, folder)),
    ]
    throughput = take_turns_anew(contenders, arguments.series, 2)
    throughput = [throughput_of(measured) for measured in throughput]
    content = {
        "task": dataclasses.asdict(task),
        "mode": MODE,
        "threads": threads,
        "long_tokens": LONG_TOKENS,
        "short_tokens": SHORT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "response": response,
        "bytes_per_token": size,
        "read_gigabytes_per_second": {c: r / 1e9 for c, r in bandwidth.items()},
        "floor_tokens_per_second": floor,
        "throughput": throughput,
    }
    finish("serving", content)


if __name__ == "__main__":
    main()
