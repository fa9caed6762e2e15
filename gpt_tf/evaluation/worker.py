"""Requests to a model and how long they take: what a measuring process does.

`gpt_tf.evaluation.latency` starts such processes and puts together what they say.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.evaluation import hardware

# Requests of a process that are not counted, its first one included.
WARM_UP = 2
# New tokens behind a prompt that is there for its length.
CONTEXT_TOKENS = 16
_SEED = 20_240_601


class Timed(NamedTuple):
    """What one request took.

    Attributes:
        first_s: Seconds to its first token.
        gaps_s: Seconds of each further token, or their mean alone.
        response_s: Seconds of all of it.
    """

    first_s: float
    gaps_s: list[float]
    response_s: float


def time_request(
    subject,
    prompt: Sequence[int],
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Continue a prompt greedily and time every token.

    Args:
        subject: Whatever has `reset`, `prefill` and `decode`: an `EdgeGPT`, a
            `KerasGPT`.
        prompt: Token ids, at least one.
        new_tokens: How many to add, at least 1.
        clock: Seconds.

    Returns:
        The times.
    """
    subject.reset()
    times = [clock()]
    subject.prefill(prompt[:-1])
    token = prompt[-1]
    for _ in range(new_tokens):
        token = int(np.argmax(subject.decode(token)))
        times.append(clock())
    first, *gaps = np.diff(times).tolist()
    return Timed(first, gaps, times[-1] - times[0])


def work(text):
    """Do a job; say on standard output, in JSON lines, what came of it."""
    # Native code may write to standard output too.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def tell(kind, value=None):
            print(artifacts.to_json([kind, value]), file=lines, flush=True)

        job = artifacts.parse_json(text)
        try:
            if "describe" in job:
                tell("done", [_described(path) for path in job["describe"]])
            else:
                tell("done", _measured(job, tell))
        except ModuleNotFoundError as error:
            tell("missing", [str(error), error.name])
        except InputError as error:
            tell("refused", [type(error).__name__, str(error)])
        except Exception as error:
            tell("failed", f"{type(error).__name__}: {error}")


def _described(path):
    from gpt_tf.evaluation import models

    with models.open_subject(path) as subject:
        threads = subject.num_threads or _keras_threads()
        return {**models.describe(path, subject), "threads": threads}


def _measured(job, tell):
    if job["engine"] == "litert-lm":
        opened = LiteRTLMRunner(job)
    else:
        opened = _opened(job["path"], job["threads"])
    with opened as runner:
        runner(job["prompt_tokens"], 1)
        tell("first")
        return measure(runner, job) | {"load_ms": runner.load_ms}


def _opened(path, threads):
    from gpt_tf.evaluation import models

    if models.is_keras(path):
        import tensorflow as tf

        import gpt_tf.training.loop  # noqa: F401  imported before the clock starts

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    began = time.perf_counter()
    subject = models.open_subject(path, num_threads=threads)
    load_ms = (time.perf_counter() - began) * 1e3
    return SubjectRunner(subject, load_ms=load_ms)


def _keras_threads():
    return len(hardware.usable_cores())


def measure(runner, job):
    """Measure all that a process is asked for; its first request has been."""
    prompt_tokens, new_tokens = job["prompt_tokens"], job["new_tokens"]
    for _ in range(WARM_UP - 1):
        runner(prompt_tokens, new_tokens)
    meter = hardware.EnergyMeter()
    before = meter.read()
    timed = [runner(prompt_tokens, new_tokens) for _ in range(job["repetitions"])]
    joules = meter.joules_since(before)
    found = {
        "engine": runner.engine,
        **_milliseconds(timed),
        "response_ms": [one.response_s * 1e3 for one in timed],
        "rates": [len(one.gaps_s) / sum(one.gaps_s) for one in timed],
        "joules": joules,
        # Before anything else needs memory.
        "peak_memory_bytes": hardware.peak_memory_bytes(),
        "contexts": [],
    }
    for length in job["contexts"]:
        runner(length, CONTEXT_TOKENS)
        timed = [runner(length, CONTEXT_TOKENS) for _ in range(job["repetitions"])]
        found["contexts"].append(_milliseconds(timed))
    found["throughput"] = runner.throughput(job["requests"], prompt_tokens, new_tokens)
    return found


def _milliseconds(timed):
    return {
        "first_ms": [one.first_s * 1e3 for one in timed],
        "gaps_ms": [gap * 1e3 for one in timed for gap in one.gaps_s],
    }


class SubjectRunner:
    """Requests to an `EdgeGPT`, a `KerasGPT` or what has their methods."""

    def __init__(self, subject, clock=time.perf_counter, load_ms=None):
        self.subject, self.clock, self.load_ms = subject, clock, load_ms
        self.is_edge = hasattr(subject, "new_session")
        self.engine = "gpt_tf" if self.is_edge else "keras"

    def __call__(self, prompt_tokens, new_tokens):
        (prompt,) = self.prompts(1, prompt_tokens)
        return time_request(self.subject, prompt, new_tokens, self.clock)

    def prompts(self, count, length):
        generator = np.random.default_rng(_SEED)
        vocab_size = self.subject.config["vocab_size"]
        return generator.integers(0, vocab_size, (count, length)).tolist()

    def throughput(self, requests, prompt_tokens, new_tokens):
        """Return tokens per second of so many requests at once, or nothing."""
        if not (self.is_edge and requests):
            return []
        from gpt_tf.edge import EdgeScheduler

        rates = []
        with EdgeScheduler(self.subject, max_active=max(requests)) as scheduler:

            def write(count, new_tokens):
                asked = [
                    scheduler.submit(prompt, max_new_tokens=new_tokens, temperature=0)
                    for prompt in self.prompts(count, prompt_tokens)
                ]
                scheduler.run()
                return sum(len(request.tokens) for request in asked)

            for count in requests:
                write(count, 2)  # their caches are laid out
                began = self.clock()
                tokens = write(count, new_tokens)
                rates.append(tokens / (self.clock() - began))
        return rates

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.subject.close()


class LiteRTLMRunner:
    """Requests to LiteRT-LM's own engine, which takes text and gives text."""

    engine = "litert-lm"

    def __init__(self, job):
        import litert_lm

        self._library = litert_lm
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
        began = time.perf_counter()
        try:
            self._engine = litert_lm.Engine(
                job["path"],
                backend=litert_lm.Backend.CPU(thread_count=job["threads"]),
                # Else it writes one beside the file, as large as that.
                cache_dir=":nocache",
                enable_benchmark=True,
            )
        except RuntimeError as error:
            raise InputError(
                f"LiteRT-LM cannot open {job['path']}: {error}. Measure it with the "
                "engine gpt_tf."
            ) from None
        self.load_ms = (time.perf_counter() - began) * 1e3
        self._vocab_size = job["vocab_size"]
        self._prompts = {}

    def __call__(self, prompt_tokens, new_tokens):
        # A prompt may make the model end its text early; another one then serves.
        for seed in range(_SEED, _SEED + 20):
            key = prompt_tokens, seed
            if key not in self._prompts:
                self._prompts[key] = self._prompt(*key)
            prompt = self._prompts[key]
            timed = None if prompt is None else self._time(prompt, new_tokens)
            if timed is not None:
                return timed
            self._prompts[key] = None
        raise InputError(
            f"LiteRT-LM's engine expects a prompt of {prompt_tokens} tokens after "
            f"which the model writes {new_tokens}. Received: none of 20 was. Ask for "
            "fewer."
        )

    def _prompt(self, count, seed):
        """Return a text that the file's tokenizer cuts into so many tokens."""
        generator = np.random.default_rng(seed)
        ids = []
        for _ in range(50):
            missing = count - len(ids)
            ids += generator.integers(0, self._vocab_size, missing).tolist()
            text = self._engine.detokenize(ids)
            ids = self._engine.tokenize(text)
            if len(ids) == count:
                return text
            # Where a text is cut, its tokens may change again.
            ids = ids[: count - 1]
        return None

    def _time(self, prompt, new_tokens):
        """Return the times, or None where the model wrote fewer tokens."""
        session = self._engine.create_session(
            apply_prompt_template=False,
            sampler_config=self._library.SamplerConfig(
                top_k=1, top_p=1.0, temperature=0.0
            ),
            max_output_tokens=new_tokens,
        )
        try:
            began = time.perf_counter()
            session.run_prefill([prompt])
            session.run_decode()
            response_s = time.perf_counter() - began
            told = session.get_benchmark_info()
        finally:
            session.close()
        if told.last_decode_token_count < new_tokens:
            return None
        gap_s = 1 / told.last_decode_tokens_per_second
        return Timed(told.time_to_first_token_in_second, [gap_s], response_s)

    def throughput(self, requests, prompt_tokens, new_tokens):
        """Return nothing: it takes one request after the other."""
        return []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._engine.close()
