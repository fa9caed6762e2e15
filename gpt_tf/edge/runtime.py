"""A GPT on a device: open a file, continue text, score text."""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt_tf.edge.loader import open_artefact
from gpt_tf.edge.session import Executor, Session
from gpt_tf.errors import InputError
from gpt_tf.generation import sequence
from gpt_tf.generation.sampler import Sampler
from gpt_tf.settings import arguments

# More threads than this wait for the same memory.
_MOST_THREADS = 4


class EdgeGPT:
    """A GPT that `gpt_tf.export` wrote, run by LiteRT.

    The file is verified to the last byte before it is used. One text at a time is in
    the cache; `generate`, `stream` and `score` begin a new one, and a stream that was
    left open goes on with its own when it is asked for its next piece.

    One thread at a time may use it: a call that comes while another thread's is
    running raises an InputError. Threads that take turns, by a lock around each call
    and each piece of a stream, get the texts that one thread gets. A call that was
    interrupted, by Ctrl-C for example, may be made again.

    Args:
        path: A `.tflite` or a `.litertlm`.
        tokenizer: A `Tokenizer`, or the path of one. Default: the one inside a
            `.litertlm`, or `tokenizer.json` beside a `.tflite`. Without any the
            model still works on ids.
        num_threads: Threads that compute; default: the physical cores, at most 4.
        when_full: `"slide"` drops the oldest half of a text that fills the context
            and goes on, as the Keras side does; `"stop"` ends there.

    Attributes:
        config: The model's sizes: `vocab_size`, `num_layers` and so on.
        mode: How it is quantised, `"dynamic_int8"` for example.
        context_length: Positions that it sees at once.
        tokenizer: Its tokenizer, or None.
        metadata: All that the file's seal says of it.

    Raises:
        InputError: There is no such file, tokenizer and model do not belong
            together, or an argument cannot be used.
        DamagedFileError: A file is empty, truncated, altered or foreign.

    Example:
        >>> with EdgeGPT("gpt.litertlm") as gpt:
        ...     print(gpt.generate("def", max_new_tokens=20, seed=1))

    Reference: LiteRT, github.com/google-ai-edge/LiteRT.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer=None,
        *,
        num_threads: int | None = None,
        when_full: str = "slide",
    ):
        num_threads = arguments.integer(
            "num_threads", num_threads, 1, arguments.MOST_THREADS, or_none=True
        )
        arguments.one_of("when_full", when_full, ("slide", "stop"))
        artefact = open_artefact(path, tokenizer)
        self.metadata = artefact.facts
        self.config = artefact.facts["config"]
        self.mode = artefact.facts["mode"]
        self.tokenizer = artefact.tokenizer
        self._suppressed = sequence.ids_without_token(
            self.tokenizer, self.config["vocab_size"]
        )
        self.num_threads = num_threads or default_threads()
        self.when_full = when_full
        self._executor = Executor(
            artefact.model, artefact.facts, self.num_threads, str(path)
        )
        self._session = self._executor.session()
        self.context_length = self._executor.limit
        # What is in the cache. The session's position may be ahead of it, if a call was
        # interrupted.
        self._ids = []
        self._turn = 0
        self.one_thread = _OneThread()

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
        """Continue prompts, as `gpt_tf.generate` does: same options, same choices.

        Where the logits agree, a seed gives the same text in both.

        Args:
            prompt: A text, a list of texts, token ids, or a list of token ids. In a
                text special tokens are recognised, as `"<|endoftext|>"`. A text may be
                bytes, which are taken literally and need not be UTF-8 for a byte-level
                tokenizer. Ids may stand in an array. Of a prompt longer than the
                context the end is used, with a `GenerationNotice`.
            max_new_tokens: Largest number of tokens to add, at least 0.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Choose among this many tokens.
            top_p: Choose among the most likely tokens that have this probability
                together.
            repetition_penalty: Above 1 makes tokens that occurred less likely.
            seed: The same seed gives the same text.
            stop: Texts that end the generation; they are cut off. The end-of-text
                token always ends it.
            stream: Return an iterator over pieces instead; for one prompt only.

        Returns:
            What was added: a text for a text, a list of texts for a list of texts,
            a list of ids for ids, and so on. Of ids, those that were drawn, up to
            the last that lies wholly before a stop text. With `stream`, an iterator
            over texts, or over ids where the prompt was ids.

        Raises:
            InputError: A prompt or an option cannot be used.

        Example:
            >>> gpt.generate(["def", "class"], max_new_tokens=20, seed=1)
        """
        sampler = self.sampler(temperature, top_k, top_p, repetition_penalty, seed)
        with self.one_thread:
            self.check_open()
            sequences, is_list = sequence.begin(
                prompt,
                sampler,
                **self.limits,
                max_new_tokens=max_new_tokens,
                stop=stop,
                stream=stream,
            )
            pieces = itertools.chain.from_iterable(map(self._continue, sequences))
            return sequence.results(sequences, is_list, pieces, stream)

    def stream(self, prompt, **options) -> Iterator[str]:
        """Continue one prompt piece by piece: `generate` with `stream=True`."""
        return self.generate(prompt, stream=True, **options)

    def score(self, prompt, *, overlap: int | None = None) -> np.ndarray:
        """Return how likely each token of a text is after those before it.

        A text longer than the context is read in windows of `context_length` tokens.
        Each begins so that its first new token still has `overlap` tokens before
        those it is judged by.

        Args:
            prompt: A text of `N` tokens, read as by `generate`, or their ids.
            overlap: Tokens that a window has in common with the one before, from 0
                to `context_length - 1`; default: half the context.

        Returns:
            Log-probabilities in nats `(N - 1,)` float32, of every token but the
            first. Their mean, negated, is the text's loss.

        Raises:
            InputError: The text is empty, or an argument cannot be used.

        Example:
            >>> perplexity = np.exp(-gpt.score("the quick brown fox").mean())
        """
        ids = self._ids_of(prompt)
        context = self.context_length
        overlap = context // 2 if overlap is None else overlap
        overlap = arguments.integer("overlap", overlap, 0, context - 1)
        scores = np.zeros(len(ids) - 1, np.float32)
        known = 0
        with self.one_thread:
            self.check_open()
            while known < len(scores):
                begin = max(0, known - overlap)
                # Behind the last token nothing is asked for.
                end = min(begin + context, len(scores))
                self.reset()
                self._session_here().prefill(ids[begin:known])
                for logits in self._session.score(ids[known:end]):
                    after = known + len(logits)
                    targets = ids[known + 1 : after + 1]
                    scores[known:after] = _log_probabilities(logits, targets)
                    known = after
            self.reset()
        return scores

    @property
    def position(self) -> int:
        """Number of tokens in the cache; after an interruption, what is left of it."""
        return len(self._ids)

    def reset(self) -> None:
        """Empty the cache: the next token is the first of a text."""
        with self.one_thread:
            self.check_open()
            self._turn += 1
            self._ids = []

    def prefill(self, ids: Sequence[int]) -> int:
        """Append tokens to the text in the cache, for a loop of your own.

        Args:
            ids: Token ids; of a prompt all but the last, which `decode` takes.

        Returns:
            The position, the number of tokens in the cache.

        Raises:
            InputError: An id is unknown, or there is no room for so many.

        Example:
            >>> gpt.reset()
            >>> gpt.prefill(ids[:-1])
            >>> logits = gpt.decode(ids[-1])
        """
        with self.one_thread:
            self.check_open()
            self._fill(self._appendable(ids))
            return self.position

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens as `prefill` does and return what may follow each of them.

        Args:
            ids: `N` token ids.

        Returns:
            Logits `(N, V)` float32.

        Raises:
            InputError: As for `prefill`.
        """
        with self.one_thread:
            self.check_open()
            ids = self._appendable(ids)
            pieces = list(self._session_here().score(ids))
            self._ids += ids
        return np.concatenate(pieces or [np.zeros((0, self.config["vocab_size"]))])

    def decode(self, token: int) -> np.ndarray:
        """Append a token to the text in the cache and return what may follow it.

        If the cache is full, `when_full="slide"` keeps the newest half of the text.

        Args:
            token: Its id.

        Returns:
            Logits `(V,)` float32.

        Raises:
            InputError: The id is unknown, or the cache is full and
                `when_full="stop"`.
        """
        (token,) = arguments.ids([token])
        self._check_ids([token])
        with self.one_thread:
            self.check_open()
            self._turn += 1
            if self.position < self.context_length:
                return self._append(token)
            if self.when_full == "stop":
                raise InputError(
                    f"The cache is full: it has {self.context_length} tokens. Call "
                    '`reset()` first, or open the model with when_full="slide".'
                )
            half = sequence.half_of(self.context_length)
            return self._begin([*self._ids, token][-half:])

    def close(self) -> None:
        """Free the model's memory; the object is of no use afterwards."""
        with self.one_thread:
            executor, self._executor, self._session = self._executor, None, None
            if executor is not None:
                executor.close()

    def __enter__(self) -> "EdgeGPT":
        return self

    def __exit__(self, *exception):
        self.close()

    def _continue(self, state):
        """Yield what can be shown of one sequence until it has finished."""
        turn = None
        while not state.finished:
            with self.one_thread:
                self.check_open()
                if turn != self._turn:  # another call has used the cache
                    state.invalidate_cache()
                if state.needs_prefill:
                    logits = self._begin(state.pending)
                else:
                    logits = self._append(state.pending[0])
                turn = self._turn
            yield from state.push(logits)

    def _appendable(self, ids):
        """Return ids as a list, seen to be known and to have room in the cache."""
        ids = arguments.ids(ids)
        if ids:
            self._check_ids(ids)
        free = self.context_length - self.position
        if len(ids) > free:
            raise InputError(
                f"The cache of {self.context_length} tokens has room for {free} more. "
                f"Received: {len(ids)}. Call `reset()` first, or pass the text's end."
            )
        self._turn += 1
        return ids

    def _begin(self, window):
        """Put a text into the empty cache; return the logits of what follows."""
        self.reset()
        self._fill(window[:-1])
        return self._append(window[-1])

    def _fill(self, ids):
        self._session_here().prefill(ids)
        self._ids += ids

    def _append(self, token):
        logits = self._session_here().decode(token)
        self._ids.append(token)
        return logits

    def _session_here(self):
        """Return the session, its position after the last token that counts."""
        self._session.position = len(self._ids)
        return self._session

    def _ids_of(self, prompt):
        rows, _, is_list = sequence.rows_of(prompt, self.tokenizer)
        if is_list:
            raise InputError(
                "Scoring expects one text, or its ids. Received: a list of "
                f"{len(rows)}. Score them one by one."
            )
        self._check_ids(rows[0], "The text")
        return rows[0]

    def _check_ids(self, ids, name="The list of ids"):
        if not ids:
            raise InputError(f"{name} is empty. Give it at least one token.")
        sequence.check_rows([ids], self.config["vocab_size"])

    def sampler(self, *options) -> Sampler:
        """Return a `Sampler` with these options that chooses no id without a token."""
        return Sampler(*options, suppress_tokens=self._suppressed)

    @property
    def limits(self) -> dict:
        """What `generation.sequence.begin` asks about the model."""
        return {
            "vocab_size": self.config["vocab_size"],
            "context_length": self.context_length,
            "tokenizer": self.tokenizer,
            "slides": self.when_full == "slide",
        }

    def new_session(self) -> Session:
        """Begin a text with a cache of its own, beside the one that `reset` empties."""
        with self.one_thread:
            self.check_open()
            return self._executor.session()

    def check_open(self) -> None:
        """Refuse to go on with a closed model.

        Raises:
            InputError: It was closed.
        """
        if self._executor is None:
            raise InputError("The model was closed. Open it again: `EdgeGPT(path)`.")


class _OneThread:
    """Keeps other threads out while a block runs, by an error."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self):
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "An open model expects one thread at a time. Received: a call while "
                "another thread's is running. Open the file once per thread, or take "
                "turns by a lock."
            )

    def __exit__(self, *exception):
        self._lock.release()


def default_threads() -> int:
    """Return how many threads compute: a physical core each, at most 4."""
    try:
        cores = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        cores = range(os.cpu_count() or 1)
    place = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        threads = len({Path(place.format(core)).read_text() for core in cores})
    except OSError:
        threads = len(cores)
    return max(1, min(threads, _MOST_THREADS))


def _log_probabilities(logits, targets):
    """Return the log-probability `(n,)` that logits `(n, V)` give to tokens."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    sums = np.log(np.exp(logits).sum(axis=-1, dtype=np.float64))
    return logits[np.arange(len(targets)), targets] - sums
