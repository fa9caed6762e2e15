"""Requests to a model and how long they take: what a measuring process does."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.evaluation import hardware
from gpt_tf.pretrained.source import is_keras

# Requests of a process that are not counted, its first one included.
WARM_UP = 2
# New tokens after a prompt that is there for its length.
CONTEXT_TOKENS = 16
_SEED = 20_240_601


class Timed(NamedTuple):
    """What one request took, in seconds."""

    first_s: float  # to its first token
    gaps_s: list[float]  # of each further token, or their mean alone
    response_s: float


def describe_models(paths: Sequence[str]):
    """Prepare to describe files, as `models.describe` does, each with its threads."""
    from gpt_tf.evaluation import models

    def describe():
        found = []
        for path in paths:
            with models.open_model(path) as model:
                threads = model.num_threads or hardware.usable_cores()
                found.append((models.describe(path, model), threads))
        return found

    return describe


def open_runner(job: dict):
    """Open what a job is about and answer a first request; return its measuring."""
    if job["engine"] == "litert-lm":
        runner = LiteRTLMRunner(job)
    else:
        from gpt_tf.evaluation import models

        if is_keras(job["path"]):
            import tensorflow as tf

            import gpt_tf.training.loop  # noqa: F401  imported before the clock starts

            tf.config.threading.set_intra_op_parallelism_threads(job["threads"])
            tf.config.threading.set_inter_op_parallelism_threads(1)
        began = time.perf_counter()
        model = models.open_model(job["path"], num_threads=job["threads"])
        load_ms = (time.perf_counter() - began) * 1e3
        runner = ModelRunner(model, load_ms=load_ms)
    runner.request(job["prompt_tokens"], 1)
    return lambda: measure(runner, job)


def measure(runner, job: dict) -> dict:
    """Measure all that a job asks for; the first request of the process has been."""
    request = job["prompt_tokens"], job["new_tokens"]
    for _ in range(WARM_UP - 1):
        runner.request(*request)
    meter = hardware.EnergyMeter()
    timed = [runner.request(*request) for _ in range(job["count"])]
    joules = meter.joules()
    found = {
        "engine": runner.engine,
        "load_ms": runner.load_ms,
        **_milliseconds(timed),
        "response_ms": [one.response_s * 1e3 for one in timed],
        "rates": [len(one.gaps_s) / sum(one.gaps_s) for one in timed],
        "joules": joules,
        # Before anything else needs memory.
        "peak_memory_bytes": hardware.peak_memory_bytes(),
        "contexts": [],
    }
    for length in job["contexts"]:
        runner.request(length, CONTEXT_TOKENS)
        timed = [runner.request(length, CONTEXT_TOKENS) for _ in range(job["count"])]
        found["contexts"].append(_milliseconds(timed))
    found["throughput"] = runner.throughput(job["requests"], *request)
    return found


def _milliseconds(timed):
    return {
        "first_ms": [one.first_s * 1e3 for one in timed],
        "gaps_ms": [gap * 1e3 for one in timed for gap in one.gaps_s],
    }


class ModelRunner:
    """Requests to an `EdgeGPT` or a `KerasGPT`."""

    def __init__(
        self,
        model,
        clock: Callable[[], float] = time.perf_counter,
        load_ms: float | None = None,
    ):
        self.model, self.clock, self.load_ms = model, clock, load_ms
        self.is_edge = hasattr(model, "new_session")
        self.engine = "gpt_tf" if self.is_edge else "keras"

    def request(self, prompt_tokens: int, new_tokens: int) -> Timed:
        """Continue a prompt of random ids greedily and time every token."""
        (prompt,) = self._prompts(1, prompt_tokens)
        self.model.reset()
        times = [self.clock()]
        self.model.prefill(prompt[:-1])
        token = prompt[-1]
        for _ in range(new_tokens):
            token = int(np.argmax(self.model.decode(token)))
            times.append(self.clock())
        first, *gaps = np.diff(times).tolist()
        return Timed(first, gaps, times[-1] - times[0])

    def throughput(self, requests, prompt_tokens, new_tokens):
        """Return tokens per second of so many concurrent requests, if it takes them."""
        if not (self.is_edge and requests):
            return []
        from gpt_tf.edge import EdgeScheduler

        rates = []
        with EdgeScheduler(self.model, max_active=max(requests)) as scheduler:

            def generate(count, new_tokens):
                # Random ids may end a text at once; a speed needs tokens.
                options = {"max_new_tokens": new_tokens, "ignore_eos": True}
                asked = [
                    scheduler.submit(prompt, temperature=0, **options)
                    for prompt in self._prompts(count, prompt_tokens)
                ]
                scheduler.run()
                return sum(len(request.tokens) for request in asked)

            for count in requests:
                generate(count, 2)  # their caches are laid out
                began = self.clock()
                tokens = generate(count, new_tokens)
                rates.append(tokens / (self.clock() - began))
        return rates

    def _prompts(self, count, length):
        generator = np.random.default_rng(_SEED)
        vocab_size = self.model.config["vocab_size"]
        return generator.integers(0, vocab_size, (count, length)).tolist()


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

    def request(self, prompt_tokens: int, new_tokens: int) -> Timed:
        """Continue a prompt greedily, as the engine itself times it."""
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
            f"which the model generates {new_tokens}. Received: none of 20 was. Ask "
            "for fewer."
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
        """Return the times, or None where the model generated fewer tokens."""
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
        """Return nothing: it takes no concurrent requests."""
        return []
