"""The thread that computes for one model, and how requests come to it and go back.

A scheduler is used by one thread. That thread takes commands from a queue, lets the
scheduler work, and hands what is new to the event loop of the server; nothing else
touches the model.
"""

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.scheduler import EdgeScheduler, TokenScore
from gpt_tf.edge.serving.metrics import Metrics
from gpt_tf.errors import InputError
from gpt_tf.settings.server import ServerConfig

logger = logging.getLogger(__name__)

# A small model writes faster than the event loop sends, and would keep it from seeing
# who has gone: it rests after each step while so many pieces of an answer wait.
_MANY_PIECES = 64
_REST_S = 1e-3


class FullError(RuntimeError):
    """The queue of a model has no room for a request."""


class Piece(NamedTuple):
    """What is new of one text of a job.

    Attributes:
        index: Which text.
        text: What was added to it.
        scores: How likely its tokens were, where that was asked for.
        finish_reason: `"stop"` or `"length"`; None while it goes on.
        tokens: Number of tokens of the text so far.
        error: What ended it, or None.
    """

    index: int
    text: str = ""
    scores: Sequence[TokenScore] = ()
    finish_reason: str | None = None
    tokens: int = 0
    error: Exception | None = None


class Job:
    """The texts that one request asks for; `ModelWorker.submit` makes it.

    Iterate over it, in the event loop, for lists of its pieces: as they come where
    `streams`, else one a text when that has ended. `cancel` it in any case.

    Args:
        worker: Computes them.
        count: Number of texts.
        streams: Whether pieces are wanted as they come.
    """

    def __init__(self, worker: "ModelWorker", count: int, streams: bool):
        self.streams = streams
        self.arrival_s = time.perf_counter()
        self._worker, self._left = worker, count
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._pieces, self._is_told = collections.deque(), False

    @property
    def is_behind(self) -> bool:
        """Whether many pieces wait to be sent."""
        return len(self._pieces) > _MANY_PIECES

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        while self._left:
            await self._ready.wait()
            self._ready.clear()
            self._is_told = False
            pieces = []
            while self._pieces:
                piece = self._pieces.popleft()
                if piece.error is not None:
                    raise piece.error
                self._left -= piece.finish_reason is not None
                pieces.append(piece)
            if pieces:
                yield pieces

    def put(self, piece: Piece) -> None:
        """Hand a piece to the event loop; the worker's thread does."""
        self._pieces.append(piece)
        if not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._ready.set)

    def cancel(self) -> None:
        """End the texts that have not ended, and free their places."""
        if self._left:
            self._worker.cancel(self)


class _Told:
    """What of a text was handed on, and when it got its last token."""

    def __init__(self, job, index):
        self.job, self.index = job, index
        self.tokens, self.scores, self.last_s = 0, 0, None


class ModelWorker:
    """Computes for one model in a thread of its own.

    Args:
        name: How clients call the model.
        gpt: The model, with a tokenizer. Nobody else may use it meanwhile.
        config: The server's settings.
        metrics: Where to count.
    """

    def __init__(self, name: str, gpt: EdgeGPT, config: ServerConfig, metrics: Metrics):
        self.name, self.gpt, self._config = name, gpt, config
        self.created = int(time.time())
        self._scheduler = EdgeScheduler(
            gpt,
            max_chunk=config.max_chunk,
            max_active=config.max_active,
            prefixes=config.prefixes,
        )
        self._commands = queue.SimpleQueue()
        self._told = {}  # of each request of the scheduler that is not done
        self._failed = False  # the scheduler's last step
        self._places = config.max_active + config.max_waiting
        self._taken, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._metrics = metrics
        self._first_token = metrics.first_token.labels(name)
        self._between_tokens = metrics.between_tokens.labels(name)
        self._generated = metrics.tokens.labels(name, "generated")
        metrics.active.labels(name).set_function(lambda: self._scheduler.active)
        metrics.waiting.labels(name).set_function(
            lambda: max(0, self._taken - self._scheduler.active)
        )

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End what is being generated, and the thread."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, rows: Sequence[list[int]], options: dict, streams: bool) -> Job:
        """Ask for texts, in the event loop.

        Args:
            rows: Ids of the prompt of each.
            options: For `EdgeScheduler.submit`.
            streams: Whether pieces are wanted as they come.

        Raises:
            FullError: There is no room for so many.
        """
        with self._lock:
            if self._taken + len(rows) > self._places:
                self._metrics.refused.labels(self.name).inc(len(rows))
                raise FullError(self.name)
            self._taken += len(rows)
        job = Job(self, len(rows), streams)
        self._commands.put(lambda: self._begin(job, rows, options))
        return job

    def cancel(self, job: Job) -> None:
        """End a job."""
        self._commands.put(lambda: self._cancel(job))

    # What the thread does

    def _run(self):
        try:
            while self._work():
                pass
        finally:
            for told in list(self._told.values()):
                self._cancel(told.job, InputError("The model has stopped."))
            self._scheduler.close()

    def _work(self):
        """Do a command, or else a step; return whether to go on."""
        try:
            command = self._commands.get(block=not self._told)
        except queue.Empty:
            self._step()
            return True
        if command is not None:
            command()
        return command is not None

    def _begin(self, job, rows, options):
        for index, row in enumerate(rows):
            try:
                request = self._scheduler.submit(row, row=index, **options)
            except InputError as error:
                self._end(job, Piece(index, error=error), "error")
                continue
            self._metrics.tokens.labels(self.name, "prompt").inc(len(row))
            self._told[request] = _Told(job, index)
            if request.done:  # nothing was asked for
                self._tell(request)

    def _cancel(self, job, error=None):
        for request in [r for r, told in self._told.items() if told.job is job]:
            request.cancel()
            told = self._told.pop(request)
            self._end(job, Piece(told.index, error=error), "cancelled")

    def _step(self):
        try:
            work = self._scheduler.step()
        except Exception:  # LiteRT's, for want of memory: one request fails, not all
            logger.exception("a text of %s failed", self.name)
            self._failed = True  # which one, its next step finds
            return
        decoded = work is not None and work.kind == "decode"
        for request in work.requests if decoded else ():
            self._tell(request)
        if self._failed or not decoded:
            self._failed = False
            for request in [one for one in self._told if one.done]:
                self._tell(request)
        if any(told.job.is_behind for told in self._told.values()):
            time.sleep(_REST_S)  # the event loop has Python to itself

    def _tell(self, request):
        """Count what is new of a request, and hand it on."""
        told = self._told[request]
        self._count(told, len(request.tokens) - told.tokens)
        if not (request.done or told.job.streams):
            return
        text = "".join(request.take())
        scores = request.scores[told.scores : request.num_shown]
        told.scores += len(scores)
        reason = ("length" if request.at_limit else "stop") if request.done else None
        piece = Piece(
            told.index, text, scores, reason, told.tokens, error=request.error
        )
        if request.done:
            del self._told[request]
            self._end(told.job, piece, "error" if request.error else reason)
        elif text or scores:
            told.job.put(piece)

    def _count(self, told, tokens):
        if not tokens:
            return
        now, before = time.perf_counter(), told.last_s
        if before is None:
            self._first_token.observe(now - told.job.arrival_s)
        else:
            self._between_tokens.observe(now - before)
        told.last_s = now
        told.tokens += tokens
        self._generated.inc(tokens)

    def _end(self, job, piece, outcome):
        self._metrics.texts.labels(self.name, outcome).inc()
        with self._lock:
            self._taken -= 1
        job.put(piece)
