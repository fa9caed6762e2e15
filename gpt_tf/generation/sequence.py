"""What continuing a prompt means, whoever computes the logits.

Keras models and the edge runtime share this, so that the same prompts, options and
messages hold in both, and one seed gives one text wherever the logits agree. NumPy
and a tokenizer are all it needs.
"""

import codecs
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.generation.sampler import Sampler
from gpt_tf.settings import arguments
from gpt_tf.text.tokenizer import Tokenizer


class GenerationNotice(UserWarning):
    """A prompt was changed before it was used."""


class Request(NamedTuple):
    """Prompts and options that were checked.

    Attributes:
        rows: The prompts as lists of ids.
        is_text: Whether they were texts.
        is_list: Whether they were several.
        stop: The stop texts as bytes.
    """

    rows: list[list[int]]
    is_text: bool
    is_list: bool
    stop: list[bytes]


def check_request(
    prompt,
    *,
    vocab_size: int,
    context_length: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    stop: Sequence[str],
    stream: bool,
) -> Request:
    """Check prompts and options; the arguments are those of `answer`.

    Raises:
        InputError: One of them cannot be used.
    """
    arguments.integer("max_new_tokens", max_new_tokens)
    arguments.switch("stream", stream)
    stop = arguments.texts("stop", stop)
    rows, is_text, is_list = rows_of(prompt, tokenizer)
    check_rows(rows, vocab_size)
    if stop and tokenizer is None:
        raise InputError("`stop` expects a tokenizer, to compare text with.")
    if stream and is_list:
        raise InputError(
            f"`stream` follows one prompt. Received: a list of {len(rows)}. "
            "Pass the prompts one by one."
        )
    longest = max(map(len, rows))
    if longest > context_length and max_new_tokens:
        warnings.warn(
            f"The prompt of {longest} tokens is longer than the context of "
            f"{context_length}; its beginning was cut off.",
            GenerationNotice,
            stacklevel=4,
        )
    # A lone surrogate is no text that a model could write.
    stop = [text.encode("utf-8", "surrogatepass") for text in stop if text]
    return Request(rows, is_text, is_list, stop)


def answer(
    prompt,
    steps_of: Callable,
    *,
    vocab_size: int,
    context_length: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    stop: Sequence[str],
    stream: bool,
):
    """Continue prompts with the tokens that an engine chooses.

    Args:
        prompt: A text, a list of texts, token ids, or a list of token ids. In a text
            special tokens are recognised, as `"<|endoftext|>"`. A text may be bytes,
            which are taken literally and need not be UTF-8 for a byte-level tokenizer.
            Ids may be integers of NumPy, and stand in an array or tensor.
        steps_of: Called with the prompts as lists of ids, the id that ends a text or
            None, and a set of rows to which no more tokens need be added, which
            grows. Returns an iterator over dicts of row to new token.
        vocab_size: The model's number of token ids.
        context_length: Positions that the model sees.
        tokenizer: Needed for texts.
        max_new_tokens: Largest number of tokens to add, at least 0.
        stop: Texts that end the generation; they are cut off.
        stream: Return an iterator over pieces instead; for one prompt only.

    Returns:
        What was added: a text for a text, a list of texts for a list of texts,
        a list of ids for ids, and so on. Of ids, those that were drawn, up to the
        last that lies wholly before a stop text. With `stream`, an iterator over
        texts, or over ids where the prompt was ids.

    Raises:
        InputError: A prompt or an option cannot be used.
    """
    request = check_request(
        prompt,
        vocab_size=vocab_size,
        context_length=context_length,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stream=stream,
    )
    rows = request.rows
    outputs = [Output(tokenizer, request.stop, request.is_text) for _ in rows]
    end = None if tokenizer is None else tokenizer.end_of_text_id
    done = set()
    pieces = _follow(steps_of(rows, end, done), outputs, done)
    if stream:
        return pieces
    for _ in pieces:
        pass
    results = [output.value for output in outputs]
    return results if request.is_list else results[0]


def _follow(steps, outputs, done) -> Iterator:
    """Push what an engine chooses to the outputs; yield what each shows."""
    for step in steps:
        for row, token in step.items():
            if row not in done:
                yield from outputs[row].push(token)
                if outputs[row].stopped:
                    done.add(row)
        if len(done) == len(outputs):
            break
    for output in outputs:
        yield from output.finish()


def rows_of(prompt, tokenizer) -> tuple[list[list[int]], bool, bool]:
    """Return prompts as lists of ids; whether they were text, and several.

    Raises:
        InputError: It is neither text nor ids, or text without a tokenizer.
    """
    given = prompt
    if hasattr(prompt, "__array__"):  # of NumPy or TensorFlow
        prompt = np.asarray(prompt).tolist()
    is_list = isinstance(prompt, (list, tuple)) and (
        len(prompt) > 0 and not _is_id(prompt[0])
    )
    prompts = list(prompt) if is_list else [prompt]
    if all(isinstance(item, (str, bytes)) for item in prompts):
        if tokenizer is None:
            raise InputError(
                "A prompt of text expects `tokenizer`. Received: None. Pass the "
                "tokenizer that the model was trained with, or token ids."
            )
        rows = [
            tokenizer.encode(item, special=True)
            if isinstance(item, str)
            else tokenizer.encode_bytes(item)
            for item in prompts
        ]
        return rows, True, is_list
    try:
        rows = [[operator.index(token) for token in item] for item in prompts]
    except TypeError:
        raise InputError(
            "A prompt is a text or token ids, or a list of one kind. "
            f"Received: {arguments.shown(given)}."
        ) from None
    return rows, False, is_list


def _is_id(item):
    try:
        operator.index(item)
    except TypeError:
        return False
    return True


def check_rows(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse prompts that are empty or have ids that the model does not know.

    Raises:
        InputError: Such a prompt.
    """
    for index, row in enumerate(rows):
        if not row:
            raise InputError(
                f"Prompt {index} is empty. Give it at least one token, a line break "
                "for example."
            )
        if min(row) < 0 or max(row) >= vocab_size:
            raise InputError(
                f"Token ids run from 0 to {vocab_size - 1}. Received: {min(row)} to "
                f"{max(row)}. Use the tokenizer that the model was trained with."
            )


def ids_without_token(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """Return the ids of a model to which its tokenizer has no token.

    A table is often padded, from 50257 to 50304 rows for example, and a foreign
    vocabulary may have gaps. Such ids are never to be chosen.

    Args:
        tokenizer: The tokenizer; None knows nothing of ids, so none is returned.
        vocab_size: The model's number of token ids.

    Returns:
        `(n,)` integers, ascending.
    """
    expected = "a tokenizer of gpt_tf"
    arguments.instance("tokenizer", tokenizer, Tokenizer, expected, or_none=True)
    if tokenizer is None:
        return np.arange(0)
    if tokenizer.backend.get_vocab_size() == tokenizer.vocab_size:  # no gaps
        return np.arange(tokenizer.vocab_size, vocab_size)
    known = list(tokenizer.backend.get_vocab().values())
    return np.setdiff1d(np.arange(vocab_size), known)


class Continuation:
    """One text, its new tokens, and what has to be computed for the next one.

    The model sees a window of the text. When that fills the context, the newest half
    is kept.

    Args:
        prompt: Token ids, at least one.
        max_new_tokens: Largest number of tokens to add, at least 0.
        sampler: How tokens are chosen.
        generator: Source of randomness.
        end: The id that ends a text, or None.
        context_length: Positions that the model sees.
        slides: False: the text ends where its window is full.

    Attributes:
        text: Prompt and new tokens.
        new: The new tokens.
        begins: Whether the cache is to be emptied first.
        pending: Ids to append to the cache; the logits behind the last are wanted.
        count: Number of ids in the window, the pending ones included.
        left: Number of tokens that may still be added.
        finished: Whether nothing more is to be computed.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampler: Sampler,
        generator: np.random.Generator,
        end: int | None,
        context_length: int,
        slides: bool = True,
    ):
        self.text = list(prompt)
        self.new = []
        self.left = max_new_tokens
        self.finished = not max_new_tokens
        self._sampler, self._generator, self._end = sampler, generator, end
        self._context_length, self._slides = context_length, slides
        # Of all the text, what was cut off and what slid out of the window included.
        self._seen = set(prompt)
        self._begin(context_length)

    def push(self, logits: np.ndarray) -> int | None:
        """Choose the next token.

        Args:
            logits: `(V,)`, those behind the last pending id.

        Returns:
            The token, or None where the text has ended.

        Raises:
            InputError: The logits are not finite.
        """
        token = self._sampler.choose(logits, self._seen, self._generator)
        if token == self._end:
            self.finished = True
            return None
        self.text.append(token)
        self.new.append(token)
        self._seen.add(token)
        self.left -= 1
        is_full = self.count == self._context_length
        if not self.left or (is_full and not self._slides):
            self.finished = True
        elif is_full:
            self._begin(half_of(self._context_length))
        else:
            self.count += 1
            self.begins, self.pending = False, [token]
        return token

    def restart(self) -> None:
        """Have the cache filled anew, after another text was in it."""
        self._begin(self.count)

    def _begin(self, keep):
        self.begins, self.pending = True, self.text[-keep:]
        self.count = len(self.pending)


def continuations(
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    end: int | None,
    context_length: int,
    slides: bool = True,
) -> list[Continuation]:
    """Begin the texts of one list, each with a random generator of its own.

    Args:
        rows: Prompts, lists of ids.
        max_new_tokens, sampler, end, context_length, slides: As for `Continuation`.
    """
    return [
        Continuation(row, max_new_tokens, sampler, source, end, context_length, slides)
        for row, source in zip(rows, sampler.generators(len(rows)), strict=True)
    ]


def half_of(context_length: int) -> int:
    """Return how many tokens are kept of a text that fills the context."""
    return max(1, context_length // 2)


class Output:
    """Shows new tokens, as text or as ids, as soon as no stop text can cut them off.

    Args:
        tokenizer: The tokenizer; None does for ids without stop texts.
        stop: Texts that end it, as bytes; they are cut off.
        is_text: Whether text is shown, or ids.

    Attributes:
        pieces: All that was shown: texts, none of them empty, or ids.
        stopped: Whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[bytes], is_text):
        self.pieces = []
        self.stopped = False
        self._tokenizer, self._stop, self._is_text = tokenizer, stop, is_text
        self._reserve = max(map(len, stop), default=1) - 1  # may begin a stop text
        self._held = b""
        self._ids = []  # not shown: each with the place in `_held` where it ends
        # A character may need several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def value(self) -> str | list[int]:
        """All that was shown."""
        return "".join(self.pieces) if self._is_text else list(self.pieces)

    def push(self, token: int) -> list:
        """Take a token; return the pieces that are shown now."""
        if self._is_text or self._stop:
            self._held += self._tokenizer.decode_bytes([token])
        self._ids.append((token, len(self._held)))
        places = [self._held.find(text) for text in self._stop]
        places = [place for place in places if place >= 0]
        if places:
            self.stopped = True
            return self._show(min(places), final=True)
        return self._show(max(0, len(self._held) - self._reserve))

    def finish(self) -> list:
        """Return the pieces that were held back; there may be none."""
        return [] if self.stopped else self._show(len(self._held), final=True)

    def _show(self, end, final=False):
        """Show what lies before a place in what is held."""
        text = self._decoder.decode(self._held[:end], final)
        ids = [token for token, place in self._ids if place <= end]
        self._ids = [(token, place - end) for token, place in self._ids[len(ids) :]]
        self._held = self._held[end:]
        pieces = ids if not self._is_text else [text] if text else []
        self.pieces += pieces
        return pieces
