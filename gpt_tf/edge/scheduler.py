"""Several requests on one model, long prompts cut so that no request waits for one.

A prompt is prefilled in chunks, parts of its sequence. Between two chunks every
request that already decodes gets its next token, and the next chunk may belong to
another prompt. So a short request that arrives during a long prefill waits for one
chunk and not for all of them.

Reference: article 3.1, the division of sequences; Agrawal et al., "Sarathi-Serve",
arXiv:2403.02310 (chunked prefills).
"""

import collections
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_tf.edge.prefixes import PrefixCache
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.generation import sequence
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.settings import arguments


class Work(NamedTuple):
    """What one step of a scheduler did.

    Attributes:
        requests: For which requests; one, or those that decoded in one call.
        kind: `"prefill"`, or `"decode"`, which gives each a token, or a single one
            several, where they could be foreseen.
        tokens: Number of tokens that were read, or written.
    """

    requests: tuple["Request", ...]
    kind: str
    tokens: int


class EdgeScheduler:
    """Shares one model among requests that may come at any time.

    It has no thread of its own: `step` does one piece of work, and `run`, a loop over
    the scheduler, or asking a request for its text call it as often as need be. It is
    used by one thread at a time, as `EdgeGPT` is.

    The policy:

    - after every chunk of a prompt, each request that decodes gets one token, those
      that wait longest first; as many in one call of the model as the file was
      exported for (`batch_sizes`);
    - a chunk goes to the prompt of which least is left, and of equal ones to the one
      that came first; but when `patience` chunks have passed the oldest prompt by, it
      is its turn;
    - at most `max_active` requests have a cache, the others wait in order of arrival.

    The request whose work was interrupted, by Ctrl-C or for want of memory, fails; the
    others go on. Every request gets the text that `EdgeGPT` alone would give for the
    same seed. With a `max_chunk` smaller than the file's longest prefill the same sums
    are rounded in other kernels, as with any other length of prefill.

    Args:
        source: A `.tflite` or `.litertlm`, or an open `EdgeGPT`, which may be used
            meanwhile and stays open.
        tokenizer, num_threads, when_full: As for `EdgeGPT`, where `source` is a file.
        max_chunk: Largest number of tokens in a chunk.
        chunked: False: prompts are prefilled whole, in order of arrival, before
            anything else; for comparison.
        max_active: Largest number of requests with a cache.
        patience: How many chunks may pass the oldest prompt by.
        prefixes: How many prompts keep their cache when they are done. Above 0, what
            a prompt has in common with these, and with those that are being worked
            for, is copied instead of computed: whole chunks, so that nothing is
            rounded otherwise than it would be alone.

    Raises:
        InputError: An argument cannot be used.
        DamagedFileError: As for `EdgeGPT`.

    Example:
        >>> with EdgeScheduler("gpt.litertlm") as scheduler:
        ...     long = scheduler.submit(document, max_new_tokens=100)
        ...     short = scheduler.submit("def", seed=1)
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
        prefixes: int = 0,
        num_threads: int | None = None,
        when_full: str = "slide",
    ):
        max_chunk = arguments.integer("max_chunk", max_chunk, 1)
        self.chunked = arguments.switch("chunked", chunked)
        self.max_chunk = max_chunk if self.chunked else math.inf
        self.max_active = arguments.integer("max_active", max_active, 1)
        self.patience = arguments.integer("patience", patience, 1)
        prefixes = arguments.integer("prefixes", prefixes)
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
        # Those that are not done, in order of arrival: the first have a cache. What is
        # next follows from what they have, so no interruption loses one.
        self._requests = []
        self._prefixes = PrefixCache(prefixes)
        self._arrivals = itertools.count()
        self._steps = itertools.count(1)
        self._chunk_step = 0  # the step of the last chunk
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
        row: int = 0,
        as_text: bool | None = None,
        num_logprobs: int | None = None,
        ignore_eos: bool = False,
    ) -> "Request":
        """Ask for the continuation of one prompt; nothing is computed yet.

        Args and errors are those of `EdgeGPT.generate`, and

        Args:
            row: Its place in a list of prompts: the text is that which `generate`
                gives for the list and the seed.
            as_text: Whether text is returned, or ids. None: as the prompt is.
            num_logprobs: Keep the log-probability of each new token, and of so many
                of the most likely ones, in `Request.scores`.
            ignore_eos: Go on after a token that ends a text, to measure speed. Such a
                text, which may repeat itself for ever, is not foreseen.
        """
        arguments.integer("num_logprobs", num_logprobs, or_none=True)
        sampling = temperature, top_k, top_p, repetition_penalty, seed
        with self.gpt.one_thread:
            (state,), _ = sequence.begin(
                prompt,
                **self.gpt.options_for(sampling),
                max_new_tokens=max_new_tokens,
                stop=stop,
                stream=True,
                as_text=as_text,
                first_row=row,
                ignore_eos=ignore_eos,
            )
            foresees = num_logprobs is None and not ignore_eos
            arrival = next(self._arrivals)
            request = Request(self, arrival, state, num_logprobs, foresees)
            if not request.done:
                self._requests.append(request)
        return request

    def step(self) -> Work | None:
        """Do the next piece of work: one chunk of a prompt, or one token.

        Returns:
            What was done, or None where nothing is left to do.
        """
        with self.gpt.one_thread:
            requests = self._next(self._admitted())
            if not requests:
                return None
            if requests[0]._calls:
                return self._prefill(*requests)
            return self._decode(requests)

    def run(self) -> None:
        """Work until all requests are done."""
        while self.step():
            pass

    def __iter__(self) -> Iterator[tuple["Request", object]]:
        """Work; yield each request that has something new, and what: text, or an id.

        Where an interruption ends the loop a piece may be lost; not to `result`.
        """
        while work := self.step():
            for request in work.requests:
                for piece in request.take():
                    yield request, piece

    @functools.cached_property
    def _batch(self):
        return self.gpt.batch_decoder()

    @property
    def active(self) -> int:
        """Number of requests that have a cache."""
        return sum(request._session is not None for request in self._requests)

    def close(self) -> None:
        """End all requests and free the memory."""
        for request in list(self._requests):
            request.cancel()
        self._prefixes.close()
        self._batch.close()
        if self._owns:
            self.gpt.close()

    def __enter__(self) -> "EdgeScheduler":
        return self

    def __exit__(self, *exception):
        self.close()

    def _admitted(self):
        """Return the requests that have a cache, after those that wait got theirs."""
        admitted = []
        for request in list(self._requests):
            if len(admitted) == self.max_active:
                break
            if request._working:
                request.error = InputError(
                    "The request expects to be worked for without interruption. "
                    f"Received: an interruption after {len(request.tokens)} new "
                    "tokens. Submit it again."
                )
            if request.done:
                self._release(request)
                continue
            if request._session is None:
                request._working = True
                request._session = self.gpt.new_session()
                self._plan(request)
                request._working = False
            admitted.append(request)
        return admitted

    def _plan(self, request):
        """Choose the calls that prefill a request's window into its emptied cache."""
        request._session.reset()
        calls = request._session.plan(request.unread, self.max_chunk)
        request._calls, request._past = collections.deque(calls), []
        if request._foresees:
            request._foreseen = self.gpt.foresee(request._session, request._state)

    def _next(self, admitted):
        """Return the requests to work for: one prompt, or some that decode."""
        prompts = [request for request in admitted if request._calls]
        decoding = [request for request in admitted if not request._calls]
        if prompts:  # then one token each a chunk; without chunks, afterwards
            decoding = [
                request
                for request in decoding
                if self.chunked and request._token_step < self._chunk_step
            ]
        if decoding:
            decoding.sort(key=lambda request: request._token_step)
            return decoding[: self._batch.largest]
        return [self._next_prompt(prompts)] if prompts else []

    def _next_prompt(self, prompts):
        oldest = prompts[0]
        if not self.chunked:
            return oldest
        chosen = min(prompts, key=lambda request: request.unread)
        if self._passed >= self.patience:
            chosen = oldest
        self._passed = 0 if chosen is oldest else self._passed + 1
        return chosen

    def _prefill(self, request):
        """Prefill a chunk, or a whole prompt."""
        with self._working_for(request):
            calls, session, count = request._calls, request._session, 0
            self._prefixes.copy(request, self._requests)
            while calls and (not count or count + calls[0] <= self.max_chunk):
                length = calls.popleft()
                ids = request._state.pending[session.position : -1][:length]
                session.step(ids, length)
                request._past.append((length, len(ids)))
                count += len(ids)
            self._chunk_step = next(self._steps)
        return Work((request,), "prefill", count)

    def _decode(self, requests):
        """Generate the next token of each of some requests, or more of a single one."""
        before = _written(requests)
        if len(requests) == 1:
            (request,) = requests
            with self._working_for(request):
                if request._foreseen and not request._state.needs_prefill:
                    self._advance(request, request._foreseen.step)
                else:
                    logits = request._session.decode(request._state.pending[-1])
                    self._advance(request, request._state.push, logits)
        else:
            tokens = [request._state.pending[-1] for request in requests]
            sessions = [request._session for request in requests]
            with self._working_for(requests[0]):  # interrupted, one of them fails
                found = self._batch.decode(sessions, tokens)
            for request, token, logits in zip(requests, tokens, found, strict=True):
                with self._working_for(request):
                    request._session.ids.append(token)
                    self._advance(request, request._state.push, logits)
        return Work(tuple(requests), "decode", _written(requests) - before)

    @contextlib.contextmanager
    def _working_for(self, request):
        """Mark a request as being worked for; interrupted, it stays marked."""
        request._working = True
        yield
        request._working = False
        if request.done:
            self._release(request)

    def _advance(self, request, step, *logits):
        """Take a step of a request's text, by the logits of its next token if given."""
        try:
            request._pieces.extend(step(*logits))
            for row in logits:
                request._score(row)
        except InputError as error:
            request.error = error
        else:
            if request._state.needs_prefill and not request._state.finished:
                self._plan(request)
        request._token_step = next(self._steps)

    def _release(self, request):
        """Release the cache of a request that is done, or keep it for its prefix."""
        if request in self._requests:
            self._requests.remove(request)
            self._prefixes.keep(request)
        if request not in self._prefixes.kept:
            request.close()


def _written(requests):
    return sum(len(request._state.new_ids) for request in requests)


class TokenScore(NamedTuple):
    """How likely a token was.

    Attributes:
        token: Its id.
        logprob: Its log-probability in nats, before temperature and other options.
        top: Ids and log-probabilities of the most likely tokens, in order.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Request:
    """One prompt and its continuation; `EdgeScheduler.submit` makes it.

    Attributes:
        arrival: Its number in order of arrival, from 0.
        tokens: The new tokens so far.
        error: What ended it, an InputError, or None.
        scores: A `TokenScore` for each new token, where they were asked for.
    """

    def __init__(self, scheduler, arrival, state, num_logprobs, foresees):
        self.arrival = arrival
        self.error = None
        self.scores = []
        self._scheduler = scheduler
        self._state, self._num_logprobs = state, num_logprobs
        self._foresees = foresees  # a step may give several tokens
        self._session = self._calls = self._foreseen = None
        self._past = []  # calls that filled its cache: lengths, and numbers of tokens
        self._token_step = -1  # the step of its last token
        self._pieces = collections.deque()
        self._working = False  # still True after it: an interruption

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far; those of a stop text among them."""
        return list(self._state.new_ids)

    @property
    def unread(self) -> int:
        """Tokens of its prompt that are still to be prefilled."""
        if not self._state.needs_prefill:
            return 0
        read = 0 if self._session is None else self._session.position
        return len(self._state.pending) - 1 - read

    @property
    def num_shown(self) -> int:
        """Number of the new tokens that `take` has given wholly, or will."""
        return self._state.num_shown

    @property
    def at_limit(self) -> bool:
        """Whether it ended because no more tokens may be added, and not by itself."""
        return self._state.at_limit

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        finished = self._state.finished and not self._working
        return self.error is not None or finished

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
                yield from self.take()
                if self.done:
                    break
                self._scheduler.step()
            if self.error is not None:
                raise self.error
        except GeneratorExit:
            self.cancel()
            raise
        except BaseException:
            self._working = not self.done
            raise

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
        return self._state.value

    def cancel(self) -> None:
        """End it: its cache is released, and what was generated stays."""
        with self._scheduler.gpt.one_thread:
            if not self.done:
                self._working = True
                self._pieces.extend(self._state.finish())
                self._working = False
            self._scheduler._release(self)

    def take(self) -> Iterator:
        """Yield what is new, and no more; the scheduler does not work for it."""
        while self._pieces:
            yield self._pieces.popleft()

    def _score(self, logits):
        """Keep how likely the newest token was, if one was added."""
        if self._num_logprobs is None or len(self._state.new_ids) == len(self.scores):
            return
        scores = log_softmax(logits)
        most = min(self._num_logprobs, len(scores))
        best = np.argpartition(-scores, most - 1)[:most] if most else []
        top = sorted(
            ((int(i), float(scores[i])) for i in best), key=lambda one: -one[1]
        )
        token = self._state.new_ids[-1]
        self.scores.append(TokenScore(token, float(scores[token]), top))

    def close(self) -> None:
        """Release its cache."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
