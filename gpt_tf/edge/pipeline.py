"""Stages of a model at work one behind the other, each on a core of its own.

While the last stage computes a token of one text, the first already computes that of
another. So a pipeline raises what is written in a second where several texts are
asked for; one text alone is not written faster.

LiteRT's Python package holds Python's lock while it computes, so threads would wait
for each other: each stage is a process.

Reference: article 3.1; Huang et al., "GPipe", arXiv:1811.06965.
"""

import collections
import contextlib
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from gpt_tf import generation
from gpt_tf.edge import stage as stages
from gpt_tf.edge.container import open_stages
from gpt_tf.edge.continuation import continuations
from gpt_tf.edge.executor import plan, rows_for
from gpt_tf.edge.stage import Frame
from gpt_tf.errors import InputError
from gpt_tf.sampling import Sampler

# Seconds that a stage has to end by itself.
_PATIENCE_S = 5
# Room for the logits of several tokens, so that no stage waits until they are read.
# What Linux gives a pipe by itself is 65,536.
_PIPE_BYTES = 1 << 20


class StageError(InputError):
    """A stage ended, or could not do its work."""


class EdgePipeline:
    """A GPT that `export_stages` wrote, a process per stage.

    Its texts are those of `EdgeGPT` for the undivided file. The processes end with
    `close`, with an error, and when this process ends, however it does. An object may
    be used by one thread at a time.

    Args:
        folder: Where the stages lie.
        tokenizer: As for `EdgeGPT`.
        num_threads: Threads that compute in each stage.
        processes: False: the stages take turns in this process, where only one
            core's work is wanted or no process can be started.
        max_active: Largest number of texts of one call with a cache; each takes its
            share of memory in every stage.
        when_full: As for `EdgeGPT`.

    Attributes:
        config: The model's sizes: `vocab_size`, `num_layers` and so on.
        mode: How it is quantised.
        context_length: Positions that it sees at once.
        num_stages: Number of stages.
        tokenizer: Its tokenizer, or None.

    Raises:
        InputError: There is no such folder, or an argument cannot be used.
        DamagedFileError: A stage is missing, altered, or that of another model.
        StageError: A stage cannot be started.

    Example:
        >>> with EdgePipeline("gpt-stages") as pipeline:
        ...     print(pipeline.generate(["def ", "class "], seed=1))
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        tokenizer=None,
        *,
        num_threads: int = 1,
        processes: bool = True,
        max_active: int = 8,
        when_full: str = "slide",
    ):
        for name, value in (("num_threads", num_threads), ("max_active", max_active)):
            if value < 1:
                raise InputError(f"`{name}` expects at least 1. Received: {value}.")
        if when_full not in ("slide", "stop"):
            raise InputError(
                f'`when_full` expects "slide" or "stop". Received: {when_full!r}.'
            )
        found = open_stages(folder, tokenizer)
        facts = found[0].facts
        self.config, self.mode = facts["config"], facts["mode"]
        self.context_length = min(facts["capacity"], self.config["context_length"])
        self.tokenizer = found[0].tokenizer
        self.num_stages = len(found)
        self.max_active = max_active
        self.when_full = when_full
        self._lengths = facts["prefill_lengths"]
        self._numbers = itertools.count()
        self._ready = collections.deque()  # texts with something to compute
        self._under_way = collections.deque()  # what comes out, in this order
        paths = [artefact.model for artefact in found]
        self._line = (_Processes if processes else _Turns)(paths, num_threads)
        self._finalizer = weakref.finalize(self, self._line.close)
        self._send(Frame(stages.READY))
        self._receive()

    def generate(
        self,
        prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
    ):
        """Continue prompts, several at once, as `EdgeGPT.generate` does one by one.

        Args:
            prompt: A text, a list of texts, token ids, or a list of token ids.
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop,
                stream: As for `EdgeGPT.generate`: the same options, the same texts.

        Returns:
            As `EdgeGPT.generate`.

        Raises:
            InputError: A prompt or an option cannot be used.
            StageError: A stage ended. The pipeline is closed then.

        Example:
            >>> pipeline.generate(["def ", "class "], max_new_tokens=20, seed=1)
        """
        self._check_open()
        sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
        limits = self.context_length, self.when_full
        return generation.answer(
            prompt,
            lambda rows, end, done: self._steps(
                continuations(rows, max_new_tokens, sampler, end, *limits), done
            ),
            vocab_size=self.config["vocab_size"],
            context_length=self.context_length,
            tokenizer=self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stream=stream,
        )

    def stream(self, prompt, **options) -> Iterator[str]:
        """Continue one prompt piece by piece: `generate` with `stream=True`."""
        return self.generate(prompt, stream=True, **options)

    def close(self) -> None:
        """End the stages; the object is of no use afterwards."""
        self._finalizer()
        self._ready.clear()
        self._under_way.clear()

    def __enter__(self) -> "EdgePipeline":
        return self

    def __exit__(self, *exception):
        self.close()

    def _steps(self, texts, done):
        """Yield a dict of row to new token, from whichever text has one."""
        waiting = collections.deque(
            _Flow(row, text, next(self._numbers))
            for row, text in enumerate(texts)
            if not text.finished
        )
        active = []
        try:
            while active or waiting:
                self._check_open()
                while waiting and len(active) < self.max_active:
                    active.append(waiting.popleft())
                    self._prepare(active[-1])
                for flow in [flow for flow in active if flow.logits is not None]:
                    logits, flow.logits = flow.logits, None
                    token = flow.text.push(logits)
                    if token is not None:
                        yield {flow.row: token}
                    if flow.text.finished or flow.row in done:
                        active.remove(flow)
                        self._end(flow)
                    else:
                        self._prepare(flow)
                if any(flow.logits is not None for flow in active):
                    continue  # somebody else's loop brought it meanwhile
                if active:
                    self._advance()
        finally:
            for flow in active:
                self._end(flow)

    def _prepare(self, flow):
        """Find out which calls bring a text's next logits."""
        text = flow.text
        if text.begins:
            flow.position = 0
            count = len(text.pending) - 1
            lengths = plan(count, self.context_length, self._lengths)
            rows = rows_for(count, lengths, self.context_length)
        else:
            lengths, rows = [], 1
        ids = np.array(text.pending, np.int32)
        begin = 0
        for length in [*lengths, 0]:
            # What is to be decoded is the last one.
            chunk = ids[begin : len(ids) - 1][:length] if length else ids[-1:]
            flow.calls.append((rows, length, chunk))
            begin += len(chunk)
            rows = 1
        self._ready.append(flow)

    def _advance(self):
        """Give the first stage work, in turn, and take what the last one has done."""
        while self._ready and len(self._under_way) < 2 * self.num_stages:
            flow = self._ready.popleft()
            rows, length, chunk = flow.calls.popleft()
            frame = Frame(
                stages.RUN,
                flow.number,
                flow.position,
                rows,
                length,
                len(chunk),
                chunk.tobytes(),
            )
            flow.position += len(chunk)
            self._send(frame)
            self._under_way.append(None if length else flow)
            # The next chunk of a prompt need not wait for this one's end.
            if flow.calls:
                self._ready.append(flow)
        if self._under_way:
            content = self._receive().content
            flow = self._under_way.popleft()
            if flow is not None:
                flow.logits = np.frombuffer(content, np.float32)

    def _end(self, flow):
        if flow in self._ready:
            self._ready.remove(flow)
        if self._finalizer.alive:
            self._send(Frame(stages.END, flow.number))

    def _send(self, frame):
        with self._closed_by_failure():
            self._line.send(frame)

    def _receive(self):
        with self._closed_by_failure():
            frame = self._line.receive()
            while frame.kind == stages.END:  # all stages have forgotten it
                frame = self._line.receive()
            if frame.kind == stages.FAILED:
                raise StageError(
                    f"A stage failed: {frame.content.decode('utf-8')} Open the "
                    "pipeline again."
                )
        return frame

    @contextlib.contextmanager
    def _closed_by_failure(self):
        # After an interruption, too, frames may be incomplete.
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _check_open(self):
        if not self._finalizer.alive:
            raise InputError(
                "The pipeline was closed. Open it again: `EdgePipeline(folder)`."
            )


class _Flow:
    """One text on its way through the stages."""

    def __init__(self, row, text, number):
        self.row, self.text, self.number = row, text, number
        self.position = 0
        self.calls = collections.deque()  # rows, length and tokens of each
        self.logits = None


class _Turns:
    """The stages in this process, one after the other."""

    def __init__(self, paths, num_threads):
        self._stages = [stages.Stage(path, num_threads) for path in paths]
        self._done = collections.deque()

    def send(self, frame):
        for stage in self._stages:
            frame = stage.answer(frame)
        self._done.append(frame)

    def receive(self):
        return self._done.popleft()

    def close(self):
        for stage in self._stages:
            stage.close()


class _Processes:
    """The stages as processes, the output of one the input of the next."""

    def __init__(self, paths, num_threads):
        self._processes = []
        source = subprocess.PIPE
        try:
            for path in paths:
                process = _start(path, num_threads, source)
                if self._processes:
                    source.close()  # the child has it
                self._processes.append(process)
                source = process.stdout
        except BaseException:
            self.close()
            raise
        self._first, self._last = self._processes[0].stdin, source

    def send(self, frame):
        try:
            stages.send(self._first, frame)
        except OSError:
            raise self._failure() from None

    def receive(self):
        frame = stages.receive(self._last)
        if frame is None:
            raise self._failure()
        return frame

    def close(self):
        """End them: the first by the end of its input, the others by its."""
        for process in self._processes:
            if process.stdin is not None:
                # What was not sent yet is of no use to a stage that has ended.
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if process.stdout is not None:
                process.stdout.close()
        for process in self._processes:
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _failure(self):
        self.close()
        count = len(self._processes)
        for index, process in enumerate(self._processes):
            status = process.returncode
            if status:
                how = f"signal {-status}" if status < 0 else f"status {status}"
                return StageError(
                    f"Stage {index} of {count} ended with {how}, perhaps for want of "
                    "memory. Open the pipeline again."
                )
        return StageError(f"One of {count} stages ended. Open the pipeline again.")


def _start(path, num_threads, source):
    # By its own command and not by `multiprocessing`, which would run the caller's
    # main module again and cannot where there is none.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from gpt_tf.edge.stage import work; work({path!r}, {num_threads})"
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=source, stdout=subprocess.PIPE
        )
        _widen(process.stdout)
        return process
    except OSError as error:
        raise StageError(
            f"No process can be started for {path}: {error.strerror}. Open the "
            "pipeline with `processes=False`."
        ) from None


def _widen(pipe):
    # Where the system cannot do it, or does not allow it, it is slower.
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
