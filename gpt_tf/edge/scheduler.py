"""Several requests on one model, long prompts cut so that no request waits for one.

A prompt is prefilled in chunks, parts of its sequence. Between two chunks every
request that already writes gets its next token, and the next chunk may belong to
another prompt. So a short request that arrives while a long prompt is read waits for
one chunk and not for all of them.

Reference: article 3.1, the division of sequences; Agrawal et al., "Sarathi-Serve",
arXiv:2403.02310 (chunked prefills).
"""

import collections
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpt_tf import arguments, generation
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import InputError


class Work(NamedTuple):
    """What one step of a scheduler did.

    Attributes:
        request: For which request.
        kind: `"prefill"`, or `"decode"`, which gives a token.
        tokens: Number of tokens that the model read.
    """

    request: "Request"
    kind: str
    tokens: int


class EdgeScheduler:
    """Shares one model among requests that may come at any time.

    It has no thread of its own: `step` does one piece of work, and `run`, a loop over
    the scheduler, or asking a request for its text call it as often as need be.

    The policy:

    - after every chunk of a prompt, each request that writes gets one token, the one
      that waits longest first;
    - a chunk goes to the prompt of which least is left, and of equal ones to the one
      that came first; but when `patience` chunks have passed the oldest prompt by, it
      is its turn;
    - at most `max_active` requests have a cache, the others wait in order of arrival.

    Every request gets the text that `EdgeGPT` alone would give for the same seed. With
    a `max_chunk` smaller than the file's longest prefill the same sums are rounded in
    other kernels, as with any other length of prefill.

    Args:
        source: A `.tflite` or `.litertlm`, or an open `EdgeGPT`, which may be used
            meanwhile and stays open.
        tokenizer, num_threads, when_full: As for `EdgeGPT`, where `source` is a file.
        max_chunk: Largest number of tokens in a chunk.
        chunked: False: prompts are prefilled whole, in order of arrival, before
            anything else; for comparison.
        max_active: Largest number of requests with a cache.
        patience: How many chunks may pass the oldest prompt by.

    Raises:
        InputError: An argument cannot be used.
        DamagedFileError: As for `EdgeGPT`.

    Example:
        >>> with EdgeScheduler("gpt.litertlm") as scheduler:
        ...     long = scheduler.submit(document, max_new_tokens=100)
        ...     short = scheduler.submit("def ", seed=1)
        ...     for piece in short.stream():
        ...         print(piece, end="")
        ...     print(long.result())
    """

    def __init__(
        self,
        source: str | os.PathLike | EdgeGPT,
        tokenizer=None,
        *,
        max_chunk: int = 64,
        chunked: bool = True,
        max_active: int = 8,
        patience: int = 4,
        num_threads: int | None = None,
        when_full: str = "slide",
    ):
        self.max_chunk = arguments.integer("max_chunk", max_chunk, 1)
        self.chunked = arguments.switch("chunked", chunked)
        self.max_active = arguments.integer("max_active", max_active, 1)
        self.patience = arguments.integer("patience", patience, 1)
        arguments.integer("num_threads", num_threads, 1, or_none=True)
        arguments.one_of("when_full", when_full, ("slide", "stop"))
        self._owns = not isinstance(source, EdgeGPT)
        if self._owns:
            source = EdgeGPT(
                source, tokenizer, num_threads=num_threads, when_full=when_full
            )
        elif (tokenizer, num_threads, when_full) != (None, None, "slide"):
            raise InputError(
                "`tokenizer`, `num_threads` and `when_full` belong to a file that is "
                "opened. Received: an open EdgeGPT. Give them to that."
            )
        self.gpt = source
        self._waiting = collections.deque()  # without a cache
        self._prompts = []  # being prefilled, in order of arrival
        self._writers = collections.deque()  # one token each before the next chunk
        self._served = collections.deque()  # had theirs since the last chunk
        self._arrivals = itertools.count()
        self._passed = 0  # chunks since the oldest prompt's

    def submit(
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
    ) -> "Request":
        """Ask for the continuation of one prompt; nothing is computed yet.

        Args:
            prompt: A text, or token ids.
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop:
                As for `EdgeGPT.generate`.

        Returns:
            The request.

        Raises:
            InputError: The prompt or an option cannot be used.
        """
        gpt = self.gpt
        gpt.check_open()
        sampler = gpt.sampler(temperature, top_k, top_p, repetition_penalty, seed)
        checked = generation.check_request(
            prompt,
            vocab_size=gpt.config["vocab_size"],
            context_length=gpt.context_length,
            tokenizer=gpt.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stream=True,
        )
        (text,) = gpt.texts(checked.rows, max_new_tokens, sampler)
        output = generation.Output(gpt.tokenizer, checked.stop, checked.is_text)
        request = Request(self, next(self._arrivals), text, output)
        if request.done:
            request._finish()
        else:
            self._waiting.append(request)
        return request

    def step(self) -> Work | None:
        """Do the next piece of work: one chunk of a prompt, or one token.

        Returns:
            What was done, or None where nothing is left to do.
        """
        self.gpt.check_open()
        self._admit()
        # Without chunks, a prompt goes before all else.
        if self._writers and (self.chunked or not self._prompts):
            return self._write(self._writers.popleft())
        if self._prompts:
            return self._read(self._next_prompt())
        if self._served:
            self._begin_round()
            return self.step()
        return None

    def run(self) -> None:
        """Work until all requests are done."""
        while self.step():
            pass

    def __iter__(self) -> Iterator[tuple["Request", object]]:
        """Work; yield each request that has something new, and what: text, or an id."""
        while work := self.step():
            for piece in work.request._take():
                yield work.request, piece

    @property
    def active(self) -> int:
        """Number of requests that have a cache."""
        return len(self._prompts) + len(self._writers) + len(self._served)

    def close(self) -> None:
        """End all requests and give the memory back."""
        for queue in (self._waiting, self._prompts, self._writers, self._served):
            for request in list(queue):
                request.cancel()
        if self._owns:
            self.gpt.close()

    def __enter__(self) -> "EdgeScheduler":
        return self

    def __exit__(self, *exception):
        self.close()

    def _admit(self):
        while self._waiting and self.active < self.max_active:
            request = self._waiting.popleft()
            request._session = self.gpt.new_session()
            self._place(request)

    def _place(self, request):
        """Put a request that has a cache where it is next worked for."""
        text = request._text
        if not text.begins:
            self._served.append(request)
            return
        session = request._session
        session.reset()
        most = self.max_chunk if self.chunked else None
        request._calls = collections.deque(session.plan(len(text.pending) - 1, most))
        request._read = 0
        if request._calls:
            self._prompts.append(request)
            self._prompts.sort(key=lambda other: other.arrival)
        else:
            self._writers.append(request)

    def _next_prompt(self):
        if not self.chunked:
            return self._prompts[0]
        oldest = self._prompts[0]
        chosen = min(self._prompts, key=lambda request: request.unread)
        if self._passed >= self.patience:
            chosen = oldest
        self._passed = 0 if chosen is oldest else self._passed + 1
        return chosen

    def _read(self, request):
        """Prefill a chunk, or a whole prompt."""
        most = self.max_chunk if self.chunked else math.inf
        count = 0
        while request._calls and (not count or count + request._calls[0] <= most):
            length = request._calls.popleft()
            ids = request._text.pending[request._read : -1][:length]
            request._session.step(ids, length)
            request._read += len(ids)
            count += len(ids)
        if not request._calls:
            self._prompts.remove(request)
            # It has waited longest.
            self._served.appendleft(request)
        self._begin_round()
        return Work(request, "prefill", count)

    def _begin_round(self):
        self._writers.extend(self._served)
        self._served.clear()

    def _write(self, request):
        """Give a request its next token."""
        try:
            request._push(request._session.decode(request._text.pending[-1]))
        except InputError as error:
            request.error = error
        if request.done:
            request._finish()
        else:
            self._place(request)
        return Work(request, "decode", 1)

    def _forget(self, request):
        for queue in (self._waiting, self._prompts, self._writers, self._served):
            if request in queue:
                queue.remove(request)


class Request:
    """One prompt and its continuation; `EdgeScheduler.submit` makes it.

    Attributes:
        arrival: Its number in order of arrival, from 0.
        tokens: The new tokens so far.
        error: What ended it, an InputError, or None.
    """

    def __init__(self, scheduler, arrival, text, output):
        self.arrival = arrival
        self.error = None
        self._scheduler = scheduler
        self._text = text
        self._output = output
        self._session = self._calls = None
        self._read = 0
        self._pieces = collections.deque()
        self._cancelled = False

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far; those of a stop text among them."""
        return list(self._text.new)

    @property
    def unread(self) -> int:
        """Tokens of its prompt that are still to be prefilled."""
        if not self._text.begins:
            return 0
        return len(self._text.pending) - 1 - self._read

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        ended = self._text.finished or self._output.stopped or self._cancelled
        return ended or self.error is not None

    def stream(self) -> Iterator:
        """Yield what is new as it comes, and let the scheduler work for it.

        Who leaves the loop early cancels the request.

        Yields:
            Pieces of text where the prompt was text, else ids.

        Raises:
            InputError: The request failed.
        """
        try:
            while True:
                yield from self._take()
                if self.done:
                    break
                self._scheduler.step()
            if self.error is not None:
                raise self.error
        finally:
            if not self.done:
                self.cancel()

    def result(self):
        """Let the scheduler work until the request is done; return what was added.

        Returns:
            A text where the prompt was text, else ids, up to the last that lies
            wholly before a stop text.

        Raises:
            InputError: The request failed.
        """
        while not self.done:
            self._scheduler.step()
        if self.error is not None:
            raise self.error
        return self._output.value

    def cancel(self) -> None:
        """End it: its cache is given back, and what it has written stays."""
        if not self.done:
            self._cancelled = True
            self._scheduler._forget(self)
            self._finish()

    def _push(self, logits):
        token = self._text.push(logits)
        if token is not None:
            self._pieces.extend(self._output.push(token))

    def _take(self):
        while self._pieces:
            yield self._pieces.popleft()

    def _finish(self):
        self._pieces.extend(self._output.finish())
        if self._session is not None:
            self._session.close()
        self._session = None
