"""How fast a file or a model answers, in processes of their own and in turn.

What is measured of a request of P prompt tokens and N new ones, greedy, with the same
random ids every time, so that no tokenizer is needed:

- time to first token: all but the last prompt token prefilled, the last one decoded,
  and the top-1 next token chosen;
- inter-token latency: each further token, decoded and chosen;
- response time: the whole request.

Every file gets a new process in every round, so that what a process keeps for as long
as it lives is not taken for the file's. The first token of a process ends its cold
start; that request and another one are not counted.

Bandwidth: a token reads every weight once. What it reads is taken to be the file's
size, and four bytes a parameter of a Keras model; the cache of keys and values is not
counted. A file that fits the processor's own caches may exceed what memory gives.

Energy is that of whole requests, of the whole machine, over the tokens they generated.

Reference: article 6.1, the assessment of real-time performance.
"""

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.evaluation import hardware, report
from gpt_tf.evaluation.harness import Worker, spread, take_turns, throughput
from gpt_tf.evaluation.models import unique_names
from gpt_tf.evaluation.worker import (
    CONTEXT_TOKENS,
    WARM_UP,
    describe_models,
    open_runner,
)
from gpt_tf.settings import arguments

ENGINES = ("gpt_tf", "litert-lm")
REQUESTS = (1, 2, 4, 8)
ROUNDS = 5
REPETITIONS = 20
_REQUEST_TOKENS = 64  # of the prompt, and as many new ones


def compare_latencies(
    paths: Sequence[str | os.PathLike],
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
    read_bytes_per_s: dict | None = None,
    **settings,
) -> list[dict]:
    """Measure several files in turn, each in a new process every round.

    Args:
        paths: `.tflite`, `.litertlm`, a run's or model's folder, or a `.keras` file.
        on_progress: Called with turns done, turns in all and what comes.
        read_bytes_per_s: What memory gives by number of threads, as `describe_machine`
            measures it; what is missing is measured.
        **settings: What is asked of each file:

            - `prompt_tokens`: length of the prompt, at least 1; 64, or half of the
              shortest context if that is less.
            - `new_tokens`: tokens that are generated, at least 2; as many.
            - `repetitions`: requests that are counted, of each file: at least so many,
              as many in each round; 20.
            - `rounds`: how often each file has its turn, at most `repetitions` times;
              5.
            - `threads`: threads that compute; default: of a file the physical cores, at
              most 4, of a Keras model all cores.
            - `contexts`: lengths of other prompts to measure; 16 tokens are generated
              after each. None: some that fit; default: none.
            - `thread_counts`: other numbers of threads to measure. None: powers of two
              and all cores; default: none.
            - `requests`: numbers of requests at once, of `EdgeScheduler`: not of a
              Keras model nor of LiteRT-LM; (1, 2, 4, 8).

    Returns:
        A `Latency` of `gpt_tf.evaluation.report` for each path, in their order.

    Raises:
        InputError: A file or an option cannot be used.
        WorkerFailedError: A process that measured broke down.

    Example:
        >>> teacher, student = compare_latencies(["teacher.litertlm", "gpt.litertlm"])
    """
    paths = [str(path) for path in arguments.paths("paths", paths)]
    plan = _plan([(path, "gpt_tf") for path in paths], **settings)
    return _measure(plan, read_bytes_per_s, on_progress)


def measure_files(
    paths: Sequence[str | os.PathLike],
    *,
    engine: str = "gpt_tf",
    out: str | os.PathLike | None = None,
    command: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    **settings,
) -> dict:
    """Measure files in turn and put the report together.

    Args:
        paths: As for `compare_latencies`.
        engine: `"gpt_tf"`; `"litert-lm"`, of a `.litertlm`; or `"both"`. LiteRT-LM
            times itself, and states of each request's further tokens their mean: its
            spread is that of the means.
        out: Where the report will be written; paths are stated relative to it.
        command: The command line, for the report.
        on_progress: As for `compare_latencies`.
        **settings: As for `compare_latencies`; `contexts` and `thread_counts` are
            those that fit where not given.

    Returns:
        The report, with an entry for each file and engine.
    """
    paths = [str(path) for path in arguments.paths("paths", paths)]
    arguments.one_of("engine", engine, (*ENGINES, "both"))
    if not paths:
        raise InputError("Measuring expects at least one file. Received: none.")
    names = dict(zip(paths, unique_names(paths), strict=True))
    pairs = [
        (path, one) for path in paths for one in ENGINES if engine in (one, "both")
    ]
    if engine == "both":
        pairs = [(p, one) for p, one in pairs if one == "gpt_tf" or _is_litertlm(p)]
    plan = _plan(pairs, **{"contexts": None, "thread_counts": None} | settings)
    machine = hardware.describe_machine()
    latencies = _measure(plan, machine["read_bytes_per_s"], on_progress)
    folder = Path(out or "report.json").resolve().parent
    entries = []
    for (path, one), facts, latency in zip(pairs, plan.facts, latencies, strict=True):
        name = names[path] + (f" ({one})" if one != "gpt_tf" else "")
        place = report.path_in_report(path, folder)
        entries.append(report.new_entry(facts, name=name, path=place, latency=latency))
    return report.new_report(
        entries,
        machine=machine,
        command=command,
        notes=[
            f"Latency: {latencies[0]['repetitions']} requests of each file counted, in "
            f"{plan.rounds} rounds, in which the files took turns in new processes; "
            f"{WARM_UP} requests of each process were not counted. Greedy, the same "
            "random ids every time.",
            "The share of the bandwidth takes a token to read the file's size, of a "
            "Keras model 4 bytes a parameter; what fits the processor's caches may "
            "exceed 1.",
        ],
    )


# What is to be measured


class _Plan(NamedTuple):
    """What is to be measured."""

    facts: list[dict]  # what `models.describe` says of each file
    jobs: list[dict]  # of each what its process is asked for, by `worker.measure`
    thread_counts: list[int]  # other numbers of threads
    rounds: int


def _plan(
    pairs,
    *,
    prompt_tokens=None,
    new_tokens=None,
    repetitions=REPETITIONS,
    threads=None,
    contexts=(),
    thread_counts=(),
    requests=REQUESTS,
    rounds=ROUNDS,
):
    """Check what is asked of paths with their engines, before minutes are spent."""
    repetitions = arguments.integer("repetitions", repetitions, 1)
    rounds = min(arguments.integer("rounds", rounds, 1), repetitions)
    most = arguments.MOST_THREADS
    asked = {
        "prompt_tokens": arguments.integer(
            "prompt_tokens", prompt_tokens, 1, or_none=True
        ),
        "new_tokens": arguments.integer("new_tokens", new_tokens, 2, or_none=True),
        "count": -(-repetitions // rounds),  # as many in each round
        "threads": arguments.integer("threads", threads, 1, most, or_none=True),
        "requests": arguments.integers("requests", requests, 1),
    }
    if contexts is not None:
        contexts = arguments.integers("contexts", contexts, 1)
    if thread_counts is not None:
        thread_counts = arguments.integers("thread_counts", thread_counts, 1)
    for path, engine in pairs:
        if engine == "litert-lm":
            _check_litert_lm(path)
    described = _describe_files(list(dict.fromkeys(path for path, _ in pairs)))
    shortest = min(facts["context_length"] for facts, _ in described.values())
    for name in ("prompt_tokens", "new_tokens"):
        if asked[name] is None:
            asked[name] = min(_REQUEST_TOKENS, shortest // 2)
    if contexts is None:
        most = shortest - CONTEXT_TOKENS
        contexts = [length for length in (16, 64, 256, 1024) if length <= most]
    if thread_counts is None:
        counts = hardware.thread_counts()
        thread_counts = counts if len(counts) > 1 else []
    jobs = []
    for path, engine in pairs:
        facts, own_threads = described[path]
        job = asked | {
            "path": path,
            "engine": engine,
            "threads": asked["threads"] or own_threads,
            "contexts": contexts,
            "vocab_size": facts["config"]["vocab_size"],
        }
        _check_fits(job, facts["context_length"])
        jobs.append(job)
    return _Plan([described[path][0] for path, _ in pairs], jobs, thread_counts, rounds)


def _describe_files(paths):
    """Open files in a process of its own; return of each its facts and threads."""
    with Worker(describe_models, (paths,), name=", ".join(paths)) as worker:
        return dict(zip(paths, worker.ask(), strict=True))


def _check_fits(job, context_length):
    requests = [(length, CONTEXT_TOKENS) for length in job["contexts"]]
    for prompt, new in [(job["prompt_tokens"], job["new_tokens"]), *requests]:
        if prompt + new > context_length:
            raise InputError(
                f"Prompt and new tokens expect to fit the context of {context_length} "
                f"tokens of {job['path']}. Received: {prompt} + {new}. Ask for fewer."
            )


def _check_litert_lm(path):
    if not _is_litertlm(path):
        raise InputError(
            f"LiteRT-LM's engine expects a .litertlm. Received: {path}. Export the "
            "model to one, or measure it with the engine gpt_tf."
        )
    if importlib.util.find_spec("litert_lm") is None:
        raise InputError(
            "LiteRT-LM's engine expects its package, which is not installed. Install "
            "it with: pip install litert-lm"
        )


def _is_litertlm(path):
    return Path(path).suffix == ".litertlm"


# Measuring


def _measure(plan, read_bytes_per_s, on_progress):
    """Let the jobs take turns; return the latency of each."""
    keys = [(index, job["threads"]) for index, job in enumerate(plan.jobs)]
    keys += [
        (index, count)
        for index, job in enumerate(plan.jobs)
        for count in plan.thread_counts
        if count != job["threads"]
    ]
    done = itertools.count()

    def tell(done, what):
        if on_progress is not None:
            on_progress(done, len(keys) * plan.rounds, what)

    def turn(index, threads):
        job, number = plan.jobs[index], next(done)
        if threads != job["threads"]:
            job = job | {"threads": threads, "contexts": [], "requests": []}
        what = f"round {number // len(keys) + 1} of {plan.rounds}: "
        what += f"{Path(job['path']).name}, {threads} threads"
        tell(number, what + (f", {job['engine']}" * (job["engine"] != "gpt_tf")))
        with Worker(open_runner, (job,), name=job["path"]) as worker:
            return worker.ask() | {"cold_ms": worker.start_s * 1e3}

    rates = dict(read_bytes_per_s or {})
    for threads in {job["threads"] for job in plan.jobs}:
        if not rates.get(str(threads)):
            rates[str(threads)] = hardware.measure_read_rate(threads, seconds=0.7)
    turns = [functools.partial(turn, *key) for key in keys]
    found = dict(zip(keys, take_turns(turns, plan.rounds), strict=True))
    tell(next(done), "measured")
    results = []
    for index, (job, facts) in enumerate(zip(plan.jobs, plan.facts, strict=True)):
        own = job["threads"]
        counts = {own, *plan.thread_counts} if plan.thread_counts else ()
        by_threads = {count: found[index, count] for count in sorted(counts)}
        is_keras = facts["kind"] == "keras"
        read_bytes = 4 * facts["parameters"] if is_keras else facts["size_bytes"]
        read_s = read_bytes / rates[str(own)]
        results.append(_summary(job, found[index, own], by_threads, read_s))
    return results


def _summary(job, measured, by_threads, read_s):
    """Return a file's latency from what its processes measured.

    `by_threads` is the same by number of threads; `read_s` are the seconds that
    reading the weights takes at the rate of memory.
    """

    def of(name, processes=measured):
        return spread([one[name] for one in processes])

    gaps = of("gaps_ms")
    repetitions = sum(len(one["first_ms"]) for one in measured)
    joules = [one["joules"] for one in measured]
    peaks = [one["peak_memory_bytes"] for one in measured]
    by_context = []
    for index, length in enumerate(job["contexts"]):
        own = [one["contexts"][index] for one in measured]
        by_context.append(
            {
                "context": length,
                "time_to_first_token_ms": of("first_ms", own),
                "inter_token_latency_ms": of("gaps_ms", own),
            }
        )
    rates = zip(*(one["throughput"] for one in measured), strict=True)
    return {
        "engine": measured[0]["engine"],
        **{part: job[part] for part in ("threads", "prompt_tokens", "new_tokens")},
        "repetitions": repetitions,
        "time_to_first_token_ms": of("first_ms"),
        "inter_token_latency_ms": gaps,
        "response_time_ms": of("response_ms"),
        "tokens_per_s": float(np.median([r for one in measured for r in one["rates"]])),
        "load_ms": spread([[one["load_ms"]] for one in measured]),
        "cold_start_ms": spread([[one["cold_ms"]] for one in measured]),
        "peak_memory_bytes": None if None in peaks else int(np.median(peaks)),
        "bandwidth_share": read_s / (gaps["median"] / 1e3),
        "energy_j_per_token": None
        if None in joules
        else sum(joules) / (repetitions * job["new_tokens"]),
        "by_context": by_context,
        "by_threads": [
            {"threads": count, "inter_token_latency_ms": of("gaps_ms", processes)}
            for count, processes in by_threads.items()
        ],
        "throughput": list(map(throughput, job["requests"], rates)),
    }
