"""How fast a file or a model answers, in processes of their own and in turn.

What is measured of a request of P prompt tokens and N new ones, greedy, with the same
random ids every time, so that no tokenizer is needed:

- time to first token: all but the last prompt token prefilled, the last one decoded,
  and the likeliest next token chosen;
- inter-token latency: each further token, decoded and chosen;
- response time: the whole request.

`compare_latencies` gives every file a new process in every round, one after the other,
A B A B: threads, settings and memory of one do not touch another, a noisy machine is
noisy for all, and what a process keeps for as long as it lives is not taken for the
file's. The first token of a process ends its cold start; that request and another one
are not counted.

Bandwidth: a token reads every weight once. What it reads is taken to be the file's
size, and four bytes a parameter of a Keras model; the cache of keys and values is not
counted. A file that fits the processor's own caches may exceed what memory gives.

Energy is that of whole requests, of the whole machine, over the tokens they wrote.

Reference: article 6.1, the assessment of real-time performance.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt_tf import artifacts, errors
from gpt_tf.errors import InputError, WorkerFailedError
from gpt_tf.evaluation import hardware, report
from gpt_tf.evaluation.worker import CONTEXT_TOKENS, WARM_UP, SubjectRunner, measure
from gpt_tf.models.sizes import count_parameters
from gpt_tf.settings import arguments

ENGINES = ("gpt_tf", "litert-lm")
REQUESTS = (1, 2, 4, 8)
ROUNDS = 5
REPETITIONS = 20

_FAILED = 70  # EX_SOFTWARE of sysexits.h


def spread(values: Sequence[float]) -> dict:
    """Return how measurements are spread, as a report states it.

    Args:
        values: At least one number.

    Returns:
        `median`, `p95`, `p99`, `worst` (the largest), `q1`, `q3` and `count`.
        Between two measurements percentiles are interpolated.
    """
    percents = {"median": 50, "p95": 95, "p99": 99, "q1": 25, "q3": 75}
    found = np.percentile(values, list(percents.values()))
    return {
        **dict(zip(percents, map(float, found), strict=True)),
        "worst": float(max(values)),
        "count": len(values),
    }


def measure_latency(
    path_or_subject,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repetitions: int = REPETITIONS,
    threads: int | None = None,
    contexts: Sequence[int] = (),
    thread_counts: Sequence[int] = (),
    requests: Sequence[int] = REQUESTS,
    engine: str = "gpt_tf",
    rounds: int = ROUNDS,
    on_progress: Callable[[int, int, str], None] | None = None,
    read_bytes_per_s=None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Measure one file, or a model that is open already.

    Args:
        path_or_subject: As for `compare_latencies`; or what `open_subject` returns,
            which is measured in this process: then there is no loading, no cold start
            and no other number of threads.
        prompt_tokens, new_tokens, repetitions, threads, contexts, thread_counts,
        requests, engine, rounds, on_progress, read_bytes_per_s: As for
            `compare_latencies`; of an open model there is one round.
        clock: Seconds, of an open model.

    Returns:
        Latency as `gpt_tf.evaluation.report` describes it.

    Raises:
        InputError, WorkerFailedError: As for `compare_latencies`.

    Example:
        >>> measure_latency("gpt.litertlm")["inter_token_latency_ms"]["p95"]
    """
    job = _checked_job(
        prompt_tokens, new_tokens, repetitions, threads, contexts, requests, engine, 1
    )
    if isinstance(path_or_subject, str | os.PathLike):
        (found,) = compare_latencies(
            [path_or_subject],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=repetitions,
            threads=threads,
            contexts=contexts,
            thread_counts=thread_counts,
            requests=requests,
            engines=[engine],
            rounds=rounds,
            on_progress=on_progress,
            read_bytes_per_s=read_bytes_per_s,
        )
        return found
    from gpt_tf.evaluation.models import check_open

    subject = path_or_subject
    check_open(subject)
    own = subject.num_threads or len(hardware.usable_cores())
    if engine != "gpt_tf" or thread_counts or threads not in (None, own):
        raise InputError(
            "Another engine or number of threads expects a file, which can be opened "
            f"anew. Received: an open {type(subject).__name__}. Give its path."
        )
    _check_room(job, subject.context_length, f"the open {type(subject).__name__}")
    job["threads"] = own

    runner = SubjectRunner(subject, clock)
    runner(prompt_tokens, 1)
    if on_progress:
        on_progress(0, 1, "measuring")
    raw = measure(runner, job)
    if on_progress:
        on_progress(1, 1, "measured")
    size = rate = None
    if not runner.is_edge:
        size = 4 * count_parameters(subject.config)
        rate = _rates([own], read_bytes_per_s)[own]
    return _merged(job, [raw], [], {}, size, rate)


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
        new_tokens: Tokens that are written, at least 2.
        repetitions: Requests that are counted, of each file: at least so many, as
            many in each round.
        threads: Threads that compute; default: of a file the physical cores, at most
            4, of a Keras model all cores.
        contexts: Lengths of other prompts to measure; 16 tokens are written after
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
    jobs = [
        _checked_job(
            *(prompt_tokens, new_tokens, repetitions, threads, contexts, requests),
            *(engine, rounds),
        )
        for engine in engines
    ]
    thread_counts = arguments.integers("thread_counts", thread_counts, 1)
    for path, engine in zip(paths, engines, strict=True):
        _check_engine(path, engine)
    described = described or describe_files(paths)
    for job, path, facts in zip(jobs, paths, described, strict=True):
        _check_room(job, facts["context_length"], path)
        job["path"] = path
        job["vocab_size"] = facts["config"]["vocab_size"]
        job["threads"] = job["threads"] or facts["threads"]
    rates = _rates({job["threads"] for job in jobs}, read_bytes_per_s)
    others = [
        job | {"threads": count, "contexts": [], "requests": []}
        for job in jobs
        for count in thread_counts
        if count != job["threads"]
    ]
    turns = [jobs + others] * min(rounds, repetitions)
    found = _take_turns(turns, on_progress or (lambda done, total, what: None))
    results = []
    for index, (job, facts) in enumerate(zip(jobs, described, strict=True)):
        raws, colds = found[index]
        by_threads = {
            other["threads"]: found[len(jobs) + place][0]
            for place, other in enumerate(others)
            if (other["path"], other["engine"]) == (job["path"], job["engine"])
        }
        if thread_counts:
            by_threads[job["threads"]] = raws
        is_keras = facts["kind"] == "keras"
        size = 4 * facts["parameters"] if is_keras else facts["size_bytes"]
        rate = rates[job["threads"]]
        results.append(_merged(job, raws, colds, by_threads, size, rate))
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
    found, _ = _in_process({"describe": paths}, ", ".join(paths))
    return found


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
    # Before minutes are spent.
    job = _checked_job(
        *(options.get("prompt_tokens", 64), options.get("new_tokens", 64)),
        *(repetitions, options.get("threads"), () if contexts is None else contexts),
        *(options.get("requests", REQUESTS), "gpt_tf", rounds),
    )
    if thread_counts is not None:
        arguments.integers("thread_counts", thread_counts, 1)
    engines_of = {path: [engine] for path in paths}
    if engine == "both":
        for path in paths:
            theirs = ["litert-lm"] if _is_litertlm(path) else []
            engines_of[path] = ["gpt_tf", *theirs]
    pairs = [(path, one) for path in paths for one in engines_of[path]]
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
    prompt_tokens, new_tokens, repetitions, threads, contexts, requests, engine, rounds
):
    """Return what a process is asked to do, after its numbers were checked."""
    rounds = arguments.integer("rounds", rounds, 1)
    prompt_tokens = arguments.integer("prompt_tokens", prompt_tokens, 1)
    new_tokens = arguments.integer("new_tokens", new_tokens, 2)
    repetitions = arguments.integer("repetitions", repetitions, 1)
    most = arguments.MOST_THREADS
    threads = arguments.integer("threads", threads, 1, most, or_none=True)
    contexts = arguments.integers("contexts", contexts, 1)
    requests = arguments.integers("requests", requests, 1)
    arguments.one_of("engine", engine, ENGINES)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        # As many in each round.
        "repetitions": -(-repetitions // min(rounds, repetitions)),
        "threads": threads,
        "contexts": contexts,
        "requests": requests,
        "engine": engine,
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
                f"{CONTEXT_TOKENS} are written. Received: {length}."
            )


def _check_engine(path, engine):
    if engine != "litert-lm":
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


def _rates(counts, known):
    """Return what memory gives to numbers of threads, measured where not known."""
    if isinstance(known, int | float):
        return dict.fromkeys(counts, known)
    known = known or {}
    return {
        count: known.get(str(count)) or hardware.measure_read_rate(count, seconds=0.7)
        for count in counts
    }


# Taking turns


def _take_turns(turns, on_progress):
    """Run every job of every round; return of each its results and cold starts."""
    total, done = sum(map(len, turns)), 0
    found = [([], []) for _ in turns[0]]
    for number, jobs in enumerate(turns, 1):
        for job, (raws, colds) in zip(jobs, found, strict=True):
            name = Path(job["path"]).name
            what = f"round {number} of {len(turns)}: {name}, {job['threads']} threads"
            on_progress(done, total, what + _by(job["engine"]))
            raw, cold_s = _in_process(job, job["path"])
            raws.append(raw)
            colds.append(cold_s * 1e3)
            done += 1
    on_progress(done, total, "measured")
    return found


def _by(engine):
    return "" if engine == "gpt_tf" else f", {engine}"


def _in_process(job, name):
    """Do a job in a new process; return its result and seconds to its first token."""
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path[:] = [{root!r}, *filter(None, sys.path)]; "
        "from gpt_tf.evaluation.worker import work; work(sys.argv[1])"
    )
    kind, value, cold_s = None, None, None
    with tempfile.TemporaryFile() as remarks:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, artifacts.to_json(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=remarks,
            text=True,
            env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
        )
        try:
            for line in process.stdout:
                kind, value = artifacts.parse_json(line)
                if kind == "first":
                    cold_s = time.perf_counter() - began
        finally:
            if kind in (None, "first"):
                # Either it has ended, or we are interrupted.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            process.kill()
            process.wait()
            process.stdout.close()
        if kind == "done":
            return value, cold_s
        if kind == "refused":
            raise getattr(errors, value[0], InputError)(value[1])
        if kind == "missing":
            raise ModuleNotFoundError(value[0], name=value[1])
        remarks.seek(0)
        lines = remarks.read().decode("utf-8", "replace").split("\n")
    what = f"The process that measured {name} "
    if kind == "failed":
        raise WorkerFailedError(f"{what}failed: {value}", _FAILED)
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    last = f"its last line was: {last}" if last else "it wrote nothing"
    status = process.returncode
    if status < 0:
        with contextlib.suppress(ValueError):
            what += f"was killed by {signal.Signals(-status).name}; "
        raise WorkerFailedError(what + last, 128 - status)
    raise WorkerFailedError(f"{what}ended with status {status}; {last}", _FAILED)


# Putting together


def _merged(job, raws, colds, by_threads, size_bytes, rate):
    """Return a file's latency from what its processes measured."""
    gaps = spread(_all(raws, "gaps_ms"))
    joules = [raw["joules"] for raw in raws]
    repetitions = sum(len(raw["first_ms"]) for raw in raws)
    loads = [raw["load_ms"] for raw in raws if raw.get("load_ms") is not None]
    peaks = [raw["peak_memory_bytes"] for raw in raws]
    share = None
    if size_bytes and rate:
        share = size_bytes / (rate * gaps["median"] / 1e3)
    energy = None
    if None not in joules:
        energy = sum(joules) / (repetitions * job["new_tokens"])
    return {
        "engine": raws[0]["engine"],
        "threads": job["threads"],
        "prompt_tokens": job["prompt_tokens"],
        "new_tokens": job["new_tokens"],
        "repetitions": repetitions,
        "time_to_first_token_ms": spread(_all(raws, "first_ms")),
        "inter_token_latency_ms": gaps,
        "response_time_ms": spread(_all(raws, "response_ms")),
        "tokens_per_s": float(np.median(_all(raws, "rates"))),
        "load_ms": spread(loads) if loads else None,
        "cold_start_ms": spread(colds) if colds else None,
        "peak_memory_bytes": None if None in peaks else int(np.median(peaks)),
        "bandwidth_share": share,
        "energy_j_per_token": energy,
        "by_context": [
            {
                "context": length,
                "time_to_first_token_ms": spread(_all(parts, "first_ms")),
                "inter_token_latency_ms": spread(_all(parts, "gaps_ms")),
            }
            for index, length in enumerate(job["contexts"])
            for parts in [[raw["contexts"][index] for raw in raws]]
        ],
        "by_threads": [
            {
                "threads": count,
                "inter_token_latency_ms": spread(_all(by_threads[count], "gaps_ms")),
            }
            for count in sorted(by_threads)
        ],
        "throughput": [
            _rates_of(count, [raw["throughput"][index] for raw in raws])
            for index, count in enumerate(job["requests"])
            if raws[0]["throughput"]
        ],
    }


def _rates_of(requests, rates):
    q1, median, q3 = map(float, np.percentile(rates, (25, 50, 75)))
    facts = {"requests": requests, "tokens_per_s": median}
    return facts | {"q1": q1, "q3": q3, "count": len(rates)}


def _all(raws, name):
    return [value for raw in raws for value in raw[name]]
