"""A GPT on a device: open a file, continue text, score text."""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt_tf.edge import session_file
from gpt_tf.edge.batch import BatchDecoder
from gpt_tf.edge.loader import open_artefact
from gpt_tf.edge.session import Executor, Session
from gpt_tf.edge.speculation import Speculator
from gpt_tf.edge.weight_cache import KINDS
from gpt_tf.errors import InputError
from gpt_tf.generation import conversation, sequence
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
    running raises an InputError. Threads may take turns, by a lock around each call
    and each piece of a stream. A call that was interrupted, by Ctrl-C for example,
    may be made again.

    Args:
        path: A `.tflite` or a `.litertlm`.
        tokenizer: A `Tokenizer`, or the path of one. Default: the one inside a
            `.litertlm`, or `tokenizer.json` beside a `.tflite`. Without any the
            model still works on ids.
        num_threads: Threads that compute; default: the physical cores, at most 4.
        when_full: `"slide"` drops the oldest half of a text that fills the context
            and goes on, as the Keras side does; `"stop"` ends there.
        speculate: `"lookup"` proposes what followed the last tokens where they occurred
            before, and verifies several tokens in one call where that saves time;
            `"none"` does not. The text is the same.
        draft: A smaller model with the same tokenizer, which writes ahead where that
            saves time: a file, or an open `EdgeGPT`, which stays open.
        weight_cache: Where weights are kept as the kernels want them: `"disk"`, on
            Linux and of a model of 16 MB and more a file in the user's cache folder,
            which later starts and other processes map; `"memory"`; `"none"`, a copy
            for each signature.

    Attributes:
        config: The model's sizes: `vocab_size`, `num_layers` and so on.
        mode: How it is quantised, `"dynamic_int8"` for example.
        context_length: Positions that it sees at once.
        tokenizer: Its tokenizer, or None.
        suppressed_ids: Ids without a token, which are never chosen.

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
        speculate: str = "lookup",
        draft: "str | os.PathLike | EdgeGPT | None" = None,
        weight_cache: str = "disk",
    ):
        num_threads = arguments.integer(
            "num_threads", num_threads, 1, arguments.MOST_THREADS, or_none=True
        )
        arguments.one_of("when_full", when_full, ("slide", "stop"))
        arguments.one_of("speculate", speculate, ("lookup", "none"))
        arguments.one_of("weight_cache", weight_cache, KINDS)
        artefact = open_artefact(path, tokenizer)
        self.config = artefact.facts["config"]
        self.mode = artefact.facts["mode"]
        self.tokenizer = artefact.tokenizer
        self.suppressed_ids = sequence.ids_without_token(
            self.tokenizer, self.config["vocab_size"]
        )
        self.num_threads = num_threads or default_threads()
        self.when_full = when_full
        self._executor = Executor(
            artefact.model, artefact.facts, self.num_threads, str(path), weight_cache
        )
        self._session = self._executor.session()
        self._sha256 = artefact.facts["sha256"]
        self._loaded = []  # the tokens of the session that was loaded
        self.context_length = self._executor.limit
        self.one_thread = _OneThread()
        self._owned_draft = None
        if draft is not None and not isinstance(draft, EdgeGPT):
            draft = self._owned_draft = EdgeGPT(
                draft,
                num_threads=self.num_threads,
                speculate="none",
                weight_cache=weight_cache,
            )
        if draft is not None:
            self._check_draft(draft)
        self._speculator = Speculator(self._executor, speculate == "lookup", draft)

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
                text special tokens are recognised, as `"<|endoftext|>"`; in bytes
                they are not. Of a prompt longer than the context the end is used,
                with a `GenerationNotice`.
            max_new_tokens: Largest number of tokens to add, at least 0.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Choose among this many tokens.
            top_p: Choose among the most likely that have this probability together.
            repetition_penalty: Above 1 makes tokens that occurred less likely.
            seed: The same seed gives the same text.
            stop: Texts that end the generation; they are cut off. The end-of-text
                token always ends it.
            stream: Return an iterator over pieces instead; for one prompt only.

        Returns:
            What was added: a text for a text, a list of texts for a list of texts,
            and so on. Of ids, those that were drawn, up to the last that lies wholly
            before a stop text.

        Raises:
            InputError: A prompt or an option cannot be used.

        Example:
            >>> gpt.generate(["def", "class"], max_new_tokens=20, seed=1)
        """
        sampling = temperature, top_k, top_p, repetition_penalty, seed
        limits = {"max_new_tokens": max_new_tokens, "stop": stop}
        return self._generate(prompt, sampling, limits, stream)

    def stream(self, prompt, **options) -> Iterator[str]:
        """Continue one prompt piece by piece: `generate` with `stream=True`."""
        return self.generate(prompt, stream=True, **options)

    def chat(
        self,
        messages: Sequence[dict],
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
    ):
        """Answer a conversation, by the chat template of the model's tokenizer.

        The answer ends with its turn. What of the conversation is in the cache from
        the turn before is not computed again. Where the conversation is too long for
        the context, its oldest turns are left out, with a `GenerationNotice`; system
        messages at the beginning stay.

        Args:
            messages: Each with a `role`, `"system"`, `"user"` or `"assistant"`, and
                `content`, a text. Special tokens in a text are recognised, as
                Hugging Face's `apply_chat_template` does.
            max_new_tokens: Largest number of tokens of the answer; there may be room
                for fewer, half of the context at least.
            temperature: This and what follows are as for `generate`.
            top_k: See `generate`.
            top_p: See `generate`.
            repetition_penalty: See `generate`.
            seed: See `generate`. Rounding may differ with what is in the cache.
            stop: Further texts that end the answer.
            stream: Return an iterator over pieces instead.

        Returns:
            The answer, a text.

        Raises:
            InputError: The model has no chat template, the template refuses the
                messages, or an option cannot be used.

        Example:
            >>> messages = [{"role": "user", "content": "What is the sea?"}]
            >>> gpt.chat(messages, max_new_tokens=50, seed=1)
        """
        prompt, limits = conversation.begin(
            messages,
            self.tokenizer,
            context_length=self.context_length,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        sampling = temperature, top_k, top_p, repetition_penalty, seed
        return self._generate(prompt, sampling, limits, stream, reuse=True)

    def options_for(self, sampling) -> dict:
        """Return what `sequence.begin` asks about the model, and a `Sampler`."""
        return {
            "sampler": Sampler(*sampling, suppress_tokens=self.suppressed_ids),
            "vocab_size": self.config["vocab_size"],
            "context_length": self.context_length,
            "tokenizer": self.tokenizer,
            "slides": self.when_full == "slide",
        }

    def score(self, prompt) -> np.ndarray:
        """Return how likely each token of a text is after those before it.

        A text longer than the context is read in windows, each of which has half of
        its tokens in common with the one before.

        Args:
            prompt: A text of `N` tokens, read as by `generate`, or their ids.

        Returns:
            Log-probabilities in nats `(N - 1,)` float32, of every token but the
            first. Their mean, negated, is the text's loss.

        Raises:
            InputError: The text is empty, or cannot be read.

        Example:
            >>> perplexity = np.exp(-gpt.score("the quick brown fox").mean())
        """
        rows, _, is_list = sequence.rows_of(prompt, self.tokenizer)
        if is_list:
            raise InputError(
                "Scoring expects one text, or its ids. Received: a list of "
                f"{len(rows)}. Score them one by one."
            )
        (ids,) = rows
        sequence.check_rows(rows, self.config["vocab_size"])
        with self.one_thread:
            return self._session.log_probabilities(ids)

    @property
    def position(self) -> int:
        """Number of tokens in the cache; after an interruption, what is left of it."""
        return self._session.position

    def reset(self) -> None:
        """Empty the cache: the next token is the first of a text."""
        with self.one_thread:
            self._session.reset()

    def prefill(self, ids: Sequence[int]) -> int:
        """Append tokens to the text in the cache; return the position.

        Raises:
            InputError: An id is unknown, or there is no room for so many.

        Example:
            >>> gpt.reset()
            >>> gpt.prefill(ids[:-1])
            >>> logits = gpt.decode(ids[-1])
        """
        with self.one_thread:
            self._session.prefill(sequence.appendable(ids, self))
            return self.position

    def rewind(self, position: int) -> None:
        """Forget the tokens in the cache from a position on; there may be none.

        Example:
            >>> gpt.prefill(prompt)
            >>> for ids in choices:
            ...     gpt.rewind(len(prompt))
            ...     logits = gpt.logits(ids)
        """
        with self.one_thread:
            self._session.position = arguments.integer("position", position)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Append `N` tokens as `prefill`; return what may follow each, `(N, V)`."""
        with self.one_thread:
            pieces = list(self._session.score(sequence.appendable(ids, self)))
        return np.concatenate(pieces or [np.zeros((0, self.config["vocab_size"]))])

    def decode(self, token: int) -> np.ndarray:
        """Append a token; return the logits of what may follow it, `(V,)` float32.

        If the cache is full, `when_full="slide"` keeps the newest half of the text.

        Raises:
            InputError: The id is unknown, or the cache is full and
                `when_full="stop"`.
        """
        (token,) = arguments.ids([token])
        sequence.check_rows([[token]], self.config["vocab_size"])
        with self.one_thread:
            if self.position < self.context_length:
                return self._session.decode(token)
            if self.when_full == "stop":
                raise InputError(
                    f"The cache is full: it has {self.context_length} tokens. Call "
                    '`reset()` first, or open the model with when_full="slide".'
                )
            half = sequence.half_of(self.context_length)
            return self._decode_anew([*self._session.ids, token][-half:])

    def save_session(self, path: str | os.PathLike) -> None:
        """Write the text in the cache to a file, for `load_session`.

        It is written whole or not at all, and takes as many bytes as the cache: two
        vectors of `C` values a token and block, where heads share none.

        Args:
            path: The file.

        Raises:
            InputError: The cache is empty, or the file cannot be written.

        Example:
            >>> gpt.reset()
            >>> gpt.prefill(gpt.tokenizer.encode(document))
            >>> gpt.save_session("document.session")
        """
        with self.one_thread:
            session_file.write(path, self._session, self._sha256)

    def load_session(self, path: str | os.PathLike) -> int:
        """Put a text in the cache that `save_session` wrote; return its length.

        A prompt that begins as it does, with half of it at least, is then computed from
        where they part only, in `generate` too, until another text has taken its place
        in the cache.

        Args:
            path: The file. Opening it never runs what is in it.

        Raises:
            InputError: There is no such file, or it is of another model.
            DamagedFileError: It is truncated, altered or something else.

        Example:
            >>> gpt.load_session("document.session")
            >>> print(gpt.generate(document + "In short:"))
        """
        with self.one_thread:
            session_file.read(path, self._session, self._sha256)
            self._loaded = list(self._session.ids)
            return self.position

    def close(self) -> None:
        """Free the model's memory; the object is of no use afterwards."""
        if not self.one_thread.closed:
            with self.one_thread:
                self.one_thread.closed = True
                self._session.close()
                self._executor.close()
                if self._owned_draft is not None:
                    self._owned_draft.close()

    def __enter__(self) -> "EdgeGPT":
        return self

    def __exit__(self, *exception):
        self.close()

    def new_session(self) -> Session:
        """Begin a text with a cache of its own, beside the one that `reset` empties."""
        with self.one_thread:
            return self._executor.session()

    def foresee(self, session: Session, state: sequence.SequenceState):
        """Return what takes the steps of a text, of several tokens where that pays."""
        return self._speculator.begin(session, state)

    def batch_decoder(self) -> BatchDecoder:
        """Return what decodes several of those texts in one call."""
        with self.one_thread:
            return BatchDecoder(self._executor)

    def _generate(self, prompt, sampling, limits, stream, reuse=False):
        with self.one_thread:
            options = self.options_for(sampling) | limits
            sequences, is_list = sequence.begin(prompt, **options, stream=stream)
        pieces = itertools.chain.from_iterable(
            self._continue(state, reuse) for state in sequences
        )
        return sequence.results(sequences, is_list, pieces, stream)

    def _continue(self, state, reuse):
        """Yield what can be shown of one sequence until it has finished."""
        text = self._speculator.begin(self._session, state)
        while not state.finished:
            with self.one_thread:
                before = state.ids[-state.window_length : -1]
                if self._session.ids != before:  # another call has used the cache
                    state.invalidate_cache()
                if state.needs_prefill:
                    pieces = state.push(self._decode_anew(state.pending, reuse))
                else:
                    pieces = text.step()
            yield from pieces

    def _check_draft(self, gpt):
        """Refuse a model to write ahead that has other tokens."""
        same = gpt.config["vocab_size"] == self.config["vocab_size"]
        if self.tokenizer is not None and gpt.tokenizer is not None:
            same = self.tokenizer.fingerprint() == gpt.tokenizer.fingerprint()
        if not same:
            raise InputError(
                f"`draft` expects a model with the tokenizer of this one, of "
                f"{self.config['vocab_size']} tokens. Received: one with another, of "
                f"{gpt.config['vocab_size']}. Distil a student of this model, or leave "
                "it out."
            )

    def _decode_anew(self, window, reuse=False):
        """Put a text into the cache; return the logits of what follows.

        Args:
            window: Its ids.
            reuse: Whether the beginning stays that the text in the cache shares. It
                may have been computed in other pieces, and be rounded otherwise.
        """
        known = sequence.common_length(self._session.ids, window[:-1])
        if not reuse:  # but a session that was loaded, if the text has half of it
            known = min(known, len(self._loaded))
            known *= 2 * known >= min(len(self._loaded), len(window) - 1)
        self._session.position = known
        self._session.prefill(window[known:-1])
        return self._session.decode(window[-1])


class _OneThread:
    """Keeps other threads out while a block runs, and all when the model is closed."""

    def __init__(self):
        self._lock = threading.RLock()
        self.closed = False

    def __enter__(self):
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "An open model expects one thread at a time. Received: a call while "
                "another thread's is running. Open the file once per thread, or take "
                "turns by a lock."
            )
        if self.closed:
            self._lock.release()
            raise InputError("The model was closed. Open it again: `EdgeGPT(path)`.")

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
