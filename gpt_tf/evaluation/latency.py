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
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.evaluation import hardware, report
from gpt_tf.evaluation.harness import Worker, spread, take_turns
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


def compare_latencies(
    paths: Sequence[str | os.PathLike],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repetitions: int = REPETITIONS,
    threads: int | None = None,
    contexts: Sequence[int] = (),
    thread_counts: Sequence[int] = (),
    requests: Sequence[int] = REQUESTS,
    engines: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    on_progress: Callable[[int, int, str], None] | None = None,
    read_bytes_per_s=None,
    described: Sequence[dict] | None = None,
) -> list[dict]:
    """Measure several files in turn, each in a new process every round.

    Args:
        paths: `.tflite`, `.litertlm`, a run's or model's folder, or a `.keras` file.
        prompt_tokens: Length of the prompt, at least 1.
        new_tokens: Tokens that are generated, at least 2.
        repetitions: Requests that are counted, of each file: at least so many, as
            many in each round.
        threads: Threads that compute; default: of a file the physical cores, at most
            4, of a Keras model all cores.
        contexts: Lengths of other prompts to measure; 16 tokens are generated after
            each.
        thread_counts: Other numbers of threads to measure.
        requests: Numbers of requests at once, of `EdgeScheduler`: not of a Keras
            model nor of LiteRT-LM.
        engines: `"gpt_tf"` or `"litert-lm"` for each path; default: ours. LiteRT-LM
            times itself, and states of each request's further tokens their mean: its
            spread is that of the means.
        rounds: How often each file has its turn, at most `repetitions` times.
        on_progress: Called with turns done, turns in all and what comes.
        read_bytes_per_s: What memory gives: a number, or a dict by number of threads
            as `describe_machine` measures it; what is missing is measured.
        described: What `describe_files` says of the paths, if that is known.

    Returns:
        Latency of each path, in their order, as `gpt_tf.evaluation.report` describes
        it.

    Raises:
        InputError: A file or an option cannot be used.
        WorkerFailedError: A process that measured broke down.

    Example:
        >>> teacher, student = compare_latencies(["teacher.litertlm", "gpt.litertlm"])
    """
    paths = [str(path) for path in arguments.paths("paths", paths)]
    engines = ["gpt_tf"] * len(paths) if engines is None else list(engines)
    if len(engines) != len(paths):
        raise InputError(
            f"`engines` expects one for each of {len(paths)} paths. Received: "
            f"{len(engines)}."
        )
    asked = _checked_job(
        prompt_tokens, new_tokens, repetitions, threads, contexts, requests, rounds
    )
    thread_counts = arguments.integers("thread_counts", thread_counts, 1)
    for path, engine in zip(paths, engines, strict=True):
        _check_engine(path, engine)
    described = described or describe_files(paths)
    jobs = []
    for path, engine, facts in zip(paths, engines, described, strict=True):
        _check_room(asked, facts["context_length"], path)
        threads = asked["threads"] or facts["threads"]
        own = {"path": path, "engine": engine, "threads": threads}
        jobs.append(asked | own | {"vocab_size": facts["config"]["vocab_size"]})
    others = [
        job | {"threads": count, "contexts": [], "requests": []}
        for job in jobs
        for count in thread_counts
        if count != job["threads"]
    ]
    rates = {
        count: _read_rate(count, read_bytes_per_s)
        for count in {job["threads"] for job in jobs}
    }
    rounds, done = min(rounds, repetitions), 0
    turns = len(jobs + others) * rounds

    def tell(what):
        if on_progress is not None:
            on_progress(done, turns, what)

    def turn(job):
        nonlocal done
        what = f"round {done // len(jobs + others) + 1} of {rounds}: "
        what += f"{Path(job['path']).name}, {job['threads']} threads"
        tell(what + (f", {job['engine']}" if job["engine"] != "gpt_tf" else ""))
        with Worker(open_runner, (job,), name=job["path"]) as worker:
            measured = worker.ask() | {"cold_ms": worker.start_s * 1e3}
        done += 1
        return measured

    found = take_turns([functools.partial(turn, job) for job in jobs + others], rounds)
    tell("measured")
    results = []
    for job, facts, measured in zip(jobs, described, found, strict=False):
        by_threads = {
            other["threads"]: theirs
            for other, theirs in zip(others, found[len(jobs) :], strict=True)
            if (other["path"], other["engine"]) == (job["path"], job["engine"])
        }
        if thread_counts:
            by_threads[job["threads"]] = measured
        is_keras = facts["kind"] == "keras"
        read_bytes = 4 * facts["parameters"] if is_keras else facts["size_bytes"]
        read_s = read_bytes / rates[job["threads"]]
        results.append(_summary(job, measured, by_threads, read_s))
    return results


def describe_files(paths: Sequence[str | os.PathLike]) -> list[dict]:
    """Open files in a process of its own and say what they are.

    Args:
        paths: As for `compare_latencies`.

    Returns:
        Of each what `gpt_tf.evaluation.models.describe` says, and `threads`, the
        number that it computes with unless told otherwise.

    Raises:
        InputError, WorkerFailedError: As for `compare_latencies`.
    """
    paths = [str(path) for path in arguments.paths("paths", paths)]
    with Worker(describe_models, (paths,), name=", ".join(paths)) as worker:
        return worker.ask()


def measure_files(
    paths: Sequence[str | os.PathLike],
    *,
    engine: str = "gpt_tf",
    contexts: Sequence[int] | None = None,
    thread_counts: Sequence[int] | None = None,
    repetitions: int = REPETITIONS,
    rounds: int = ROUNDS,
    out: str | os.PathLike | None = None,
    command: str | None = None,
    **options,
) -> dict:
    """Measure files in turn and put the report together.

    Args:
        paths: As for `compare_latencies`.
        engine: `"gpt_tf"`, `"litert-lm"`, or `"both"`, which measures each
            `.litertlm` in both.
        contexts, thread_counts: As for `compare_latencies`; None: some that fit.
        repetitions, rounds: As for `compare_latencies`.
        out: Where the report will be written; paths are stated relative to it.
        command: The command line, for the report.
        **options: Others of `compare_latencies`.

    Returns:
        The report, with an entry for each file and engine.

    Raises:
        InputError, WorkerFailedError: As for `compare_latencies`.
    """
    from gpt_tf.evaluation import models

    paths = [str(path) for path in arguments.paths("paths", paths)]
    arguments.one_of("engine", engine, (*ENGINES, "both"))
    if not paths:
        raise InputError("Measuring expects at least one file. Received: none.")
    names = dict(zip(paths, models.unique_names(paths), strict=True))
    pairs = [
        (path, one) for path in paths for one in ENGINES if engine in (one, "both")
    ]
    if engine == "both":
        pairs = [(p, one) for p, one in pairs if one == "gpt_tf" or _is_litertlm(p)]
    # Before minutes are spent.
    sizes = options.get("prompt_tokens", 64), options.get("new_tokens", 64)
    requests = options.get("requests", REQUESTS)
    asked_contexts = () if contexts is None else contexts
    job = _checked_job(
        *(*sizes, repetitions, options.get("threads"), asked_contexts, requests),
        rounds,
    )
    if thread_counts is not None:
        arguments.integers("thread_counts", thread_counts, 1)
    for pair in pairs:
        _check_engine(*pair)
    facts_of = dict(zip(paths, describe_files(paths), strict=True))
    for path, facts in facts_of.items():
        _check_room(job, facts["context_length"], path)
    if contexts is None:
        shortest = min(facts["context_length"] for facts in facts_of.values())
        contexts = [length for length in (16, 64, 256, 1024) if length + 16 <= shortest]
    if thread_counts is None:
        counts = hardware.thread_counts()
        thread_counts = counts if len(counts) > 1 else ()
    facts = hardware.describe_machine()
    latencies = compare_latencies(
        [path for path, _ in pairs],
        engines=[one for _, one in pairs],
        contexts=contexts,
        thread_counts=thread_counts,
        repetitions=repetitions,
        rounds=rounds,
        described=[facts_of[path] for path, _ in pairs],
        read_bytes_per_s=facts["read_bytes_per_s"],
        **options,
    )
    folder = Path(out or "report.json").resolve().parent
    entries = []
    for (path, one), latency in zip(pairs, latencies, strict=True):
        described = {k: v for k, v in facts_of[path].items() if k != "threads"}
        described["name"] = names[path] + (f" ({one})" if one != "gpt_tf" else "")
        described["path"] = report.path_in_report(path, folder)
        entries.append(report.new_entry(described, latency=latency))
    rounds, counted = min(rounds, repetitions), latencies[0]["repetitions"]
    return report.new_report(
        entries,
        machine=facts,
        command=command,
        notes=[
            f"Latency: {counted} requests of each file counted, in {rounds} "
            f"rounds, in which the files took turns in new processes; {WARM_UP} "
            "requests of each process were not counted. Greedy, the same random ids "
            "every time.",
            "The share of the bandwidth takes a token to read the file's size, of a "
            "Keras model 4 bytes a parameter; what fits the processor's caches may "
            "exceed 1.",
        ],
    )


# Seeing that it can be done


def _checked_job(
    prompt_tokens, new_tokens, repetitions, threads, contexts, requests, rounds
):
    """Return what a process is asked to do, after its numbers were checked."""
    rounds = arguments.integer("rounds", rounds, 1)
    repetitions = arguments.integer("repetitions", repetitions, 1)
    most = arguments.MOST_THREADS
    return {
        "prompt_tokens": arguments.integer("prompt_tokens", prompt_tokens, 1),
        "new_tokens": arguments.integer("new_tokens", new_tokens, 2),
        # As many in each round.
        "count": -(-repetitions // min(rounds, repetitions)),
        "threads": arguments.integer("threads", threads, 1, most, or_none=True),
        "contexts": arguments.integers("contexts", contexts, 1),
        "requests": arguments.integers("requests", requests, 1),
    }


def _check_room(job, context_length, name):
    prompt_tokens, new_tokens = job["prompt_tokens"], job["new_tokens"]
    if prompt_tokens + new_tokens > context_length:
        raise InputError(
            f"Prompt and new tokens expect to fit the context of {context_length} "
            f"tokens of {name}. Received: {prompt_tokens} + {new_tokens}. Ask for "
            "fewer."
        )
    for length in job["contexts"]:
        if length + CONTEXT_TOKENS > context_length:
            raise InputError(
                f"`contexts` expects at most {context_length - CONTEXT_TOKENS} for "
                f"{name}: its context has {context_length} tokens, and "
                f"{CONTEXT_TOKENS} are generated. Received: {length}."
            )


def _check_engine(path, engine):
    if arguments.one_of("engine", engine, ENGINES) != "litert-lm":
        return
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


def _read_rate(threads, known):
    """Return what memory gives to so many threads, measured where it is not known."""
    if isinstance(known, int | float):
        return known
    rate = (known or {}).get(str(threads))
    return rate or hardware.measure_read_rate(threads, seconds=0.7)


def _summary(job, measured, by_threads, read_s):
    """Return a file's latency from what its processes measured.

    Args:
        job: What they were asked for.
        measured: What each of them returned.
        by_threads: The same, of every number of threads.
        read_s: Seconds that reading the weights takes at the rate of memory.
    """

    def of(name, processes=measured):
        return spread([one[name] for one in processes])

    gaps = of("gaps_ms")
    repetitions = sum(len(one["first_ms"]) for one in measured)
    joules = [one["joules"] for one in measured]
    peaks = [one["peak_memory_bytes"] for one in measured]
    contexts = [
        (length, [one["contexts"][index] for one in measured])
        for index, length in enumerate(job["contexts"])
    ]
    rates = list(zip(*(one["throughput"] for one in measured), strict=True))
    return {
        "engine": measured[0]["engine"],
        "threads": job["threads"],
        "prompt_tokens": job["prompt_tokens"],
        "new_tokens": job["new_tokens"],
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
        "by_context": [
            {
                "context": length,
                "time_to_first_token_ms": of("first_ms", processes),
                "inter_token_latency_ms": of("gaps_ms", processes),
            }
            for length, processes in contexts
        ],
        "by_threads": [
            {
                "threads": count,
                "inter_token_latency_ms": of("gaps_ms", by_threads[count]),
            }
            for count in sorted(by_threads)
        ],
        "throughput": [
            _throughput(count, rounds)
            for count, rounds in zip(job["requests"], rates, strict=False)
        ],
    }


def _throughput(requests, rounds):
    found = spread([[rate] for rate in rounds])
    parts = {name: found[name] for name in ("q1", "q3", "count", "rounds")}
    return {"requests": requests, "tokens_per_s": found["median"], **parts}
