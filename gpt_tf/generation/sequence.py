"""The state of a sequence while it is generated, and the checks of prompts.

    begin -> (compute the logits of `pending` -> push) until finished -> results

Keras models, the edge runtime and its scheduler drive the same `SequenceState`, so
that the same prompts, options and messages hold in all.
"""

import codecs
import copy
import dataclasses
import itertools
import numbers
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.generation.sampler import Sampler
from gpt_tf.settings import arguments
from gpt_tf.text.tokenizer import Tokenizer


class GenerationNotice(UserWarning):
    """A prompt was changed before it was used."""


def begin(
    prompt,
    sampler: Sampler,
    *,
    vocab_size: int,
    context_length: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    stop: Sequence[str],
    stream: bool,
    slides: bool = True,
    as_text: bool | None = None,
    first_row: int = 0,
    ignore_eos: bool = False,
) -> tuple[list["SequenceState"], bool]:
    """Check prompts and options, and begin a sequence for each prompt.

    Args:
        prompt: A text, a list of texts, token ids, or a list of token ids. In a text
            special tokens are recognised, as `"<|endoftext|>"`. A text may be bytes,
            which are taken literally and need not be UTF-8 for a byte-level tokenizer.
            Ids may be integers of NumPy, and stand in an array or tensor.
        sampler: Chooses the tokens; each sequence has a random generator of its own.
        vocab_size: The model's number of token ids.
        context_length: Positions that the model sees.
        tokenizer: Needed for texts.
        max_new_tokens: Largest number of tokens to add, at least 0.
        stop: Texts that end the generation; they are cut off.
        stream: Whether the pieces are wanted as they come; for one prompt only.
        slides: As for `SequenceState`.
        as_text: Whether text is shown, or ids. None: as the prompt is.
        first_row: Which row of a longer list the first prompt is; each has random
            numbers of its own.
        ignore_eos: Go on after a token that ends a text.

    Returns:
        The sequences, and whether the prompt was a list of prompts.

    Raises:
        InputError: A prompt or an option cannot be used.
    """
    arguments.integer("max_new_tokens", max_new_tokens)
    arguments.switch("stream", stream)
    stop = arguments.texts("stop", stop)
    rows, is_text, is_list = rows_of(prompt, tokenizer)
    is_text = is_text if as_text is None else as_text
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
            stacklevel=3,
        )
    # A lone surrogate is no text that a model could generate.
    stop = [text.encode("utf-8", "surrogatepass") for text in stop if text]
    end_ids = () if tokenizer is None or ignore_eos else tokenizer.end_ids
    generators = sampler.generators(first_row + len(rows))
    sequences = [
        SequenceState(
            row,
            sampler,
            generator,
            Detokenizer(tokenizer, stop, is_text),
            context_length=context_length,
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            slides=slides,
        )
        for row, generator in zip(rows, generators[first_row:], strict=True)
    ]
    return sequences, is_list


def results(sequences, is_list: bool, pieces: Iterator, stream: bool):
    """Return what was added to the prompts.

    Args:
        sequences: As from `begin`.
        is_list: As from `begin`.
        pieces: An iterator over what is new, which computes as it goes on.
        stream: Whether to return `pieces` itself.

    Returns:
        Texts or lists of ids, as the prompts were, one or several. Of ids, those that
        were drawn, up to the last that lies wholly before a stop text.
    """
    if stream:
        return pieces
    for _ in pieces:
        pass
    values = [sequence.value for sequence in sequences]
    return values if is_list else values[0]


def rows_of(prompt, tokenizer) -> tuple[list[list[int]], bool, bool]:
    """Return prompts as lists of ids; whether they were text, and several.

    Raises:
        InputError: It is neither text nor ids, or text without a tokenizer.
    """
    given = prompt
    if hasattr(prompt, "__array__"):  # of NumPy or TensorFlow
        prompt = np.asarray(prompt).tolist()
    is_list = isinstance(prompt, (list, tuple)) and (
        len(prompt) > 0 and not isinstance(prompt[0], numbers.Integral)
    )
    prompts = list(prompt) if is_list else [prompt]
    if all(isinstance(item, (str, bytes)) for item in prompts):
        if tokenizer is None:
            raise InputError(
                "A prompt of text expects `tokenizer`. Received: None. Pass the "
                "tokenizer that the model was trained with, or token ids."
            )
        encode, encode_bytes = tokenizer.encode, tokenizer.encode_bytes
        rows = [
            encode(item, special=True) if isinstance(item, str) else encode_bytes(item)
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


def check_rows(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse prompts that are empty or have ids that the model does not know."""
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


def appendable(ids, model) -> list[int]:
    """Return ids as a list, seen to be known and to have room in a model's cache."""
    ids = arguments.ids(ids)
    if ids:
        check_rows([ids], model.config["vocab_size"])
    room = model.context_length - model.position
    if len(ids) > room:
        raise InputError(
            f"The cache of {model.context_length} tokens has room for {room} more. "
            f"Received: {len(ids)}. Call `reset()` first, or pass the text's end."
        )
    return ids


def ids_without_token(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """Return the ids `(n,)` of a model to which its tokenizer has no token.

    A table is often padded, from 50257 to 50304 rows for example, and a foreign
    vocabulary may have gaps. Such ids are never to be chosen. Without a tokenizer
    nothing is known, and none is returned.
    """
    expected = "a tokenizer of gpt_tf"
    arguments.instance("tokenizer", tokenizer, Tokenizer, expected, or_none=True)
    if tokenizer is None:
        return np.arange(0)
    if tokenizer.backend.get_vocab_size() == tokenizer.vocab_size:  # no gaps
        return np.arange(tokenizer.vocab_size, vocab_size)
    known = list(tokenizer.backend.get_vocab().values())
    return np.setdiff1d(np.arange(vocab_size), known)


class SequenceState:
    """One sequence while it grows: its ids, the model's window, what may be shown.

    When the window fills the context, its newest half is kept.

    Args:
        prompt: Token ids, at least one.
        sampler: How tokens are chosen.
        generator: Source of randomness.
        detokenizer: Makes of new tokens what is shown.
        context_length: As for `begin`.
        max_new_tokens: As for `begin`.
        end_ids: The ids that end a sequence.
        slides: False: the sequence ends where its window is full.

    Attributes:
        ids: Prompt and new tokens.
        new_ids: The new tokens, those of a stop text among them.
        pending: Ids to append to the cache; the last one's logits are wanted.
        needs_prefill: Whether the cache is to be emptied before.
        window_length: Number of ids in the window, the pending ones included.
        remaining: Number of tokens that may still be added.
        finished: Whether nothing more is to be computed.
        at_limit: Whether it finished because no more tokens may be added.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        generator: np.random.Generator,
        detokenizer: "Detokenizer",
        *,
        context_length: int,
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
        slides: bool = True,
    ):
        self.ids = list(prompt)
        self.new_ids = []
        self.remaining = max_new_tokens
        self.finished = self.at_limit = not max_new_tokens
        self._sampler, self._generator = sampler, generator
        self._detokenizer = detokenizer
        self._context_length, self._end_ids = context_length, end_ids
        self._slides = slides
        # Of all the text, what was cut off and what slid out of the window included.
        self._seen = set(prompt)
        self._keep(context_length)

    @property
    def value(self) -> str | list[int]:
        """All that was shown, text or ids as the prompt."""
        return self._detokenizer.value

    @property
    def num_shown(self) -> int:
        """Number of the new tokens that were shown to their end."""
        return self._detokenizer.num_shown

    def push(self, logits: np.ndarray) -> list:
        """Choose the next token by the logits `(V,)` of the last pending id.

        Returns:
            The pieces of text, or the ids, that can be shown now.

        Raises:
            InputError: The logits are not finite.
        """
        token = self._sampler.choose(logits, self._seen, self._generator)
        if token in self._end_ids:
            return self.finish()
        self.ids.append(token)
        self.new_ids.append(token)
        self._seen.add(token)
        self.remaining -= 1
        pieces = self._detokenizer.push(token)
        is_full = self.window_length == self._context_length
        ends_here = not self.remaining or (is_full and not self._slides)
        if ends_here or self._detokenizer.stopped:
            self.at_limit = not self._detokenizer.stopped
            return pieces + self.finish()
        if is_full:
            self._keep(half_of(self._context_length))
        else:
            self.window_length += 1
            self.needs_prefill, self.pending = False, [token]
        return pieces

    def rehearsal(self, suppress_tokens=()) -> Callable[[np.ndarray], int]:
        """Return a function that chooses tokens as `push` would, and changes nothing.

        It uses copies of what `push` uses, random numbers among it. So a model that
        resembles the one of this sequence tends to choose what that one will.

        Args:
            suppress_tokens: Ids of that model that are never chosen.
        """
        sampler = dataclasses.replace(self._sampler, suppress_tokens=suppress_tokens)
        generator, seen = copy.deepcopy(self._generator), set(self._seen)

        def choose(logits):
            token = sampler.choose(logits, seen, generator)
            seen.add(token)
            return token

        return choose

    def finish(self) -> list:
        """End the sequence; return the pieces that were held back."""
        self.finished = True
        return self._detokenizer.finish()

    def invalidate_cache(self) -> None:
        """Ask for the whole window anew, after another sequence was in the cache."""
        self._keep(self.window_length)

    def _keep(self, count):
        self.needs_prefill, self.pending = True, self.ids[-count:]
        self.window_length = len(self.pending)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return with how many of the same ids two texts begin."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def half_of(context_length: int) -> int:
    """Return how many tokens are kept of a window that fills the context."""
    return max(1, context_length // 2)


class Detokenizer:
    """Makes of new tokens text, or ids, as soon as no stop text can cut them off.

    Args:
        tokenizer: The tokenizer; None does for ids without stop texts.
        stop: Texts that end it, as bytes; they are cut off.
        is_text: Whether text is shown, or ids.

    Attributes:
        pieces: All that was shown: texts, none of them empty, or ids.
        num_shown: Number of tokens that were shown to their end.
        stopped: Whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[bytes], is_text):
        self.pieces = []
        self.num_shown = 0
        self.stopped = False
        self._tokenizer, self._stop, self._is_text = tokenizer, stop, is_text
        self._reserve = max(map(len, stop), default=1) - 1  # may begin a stop text
        self._held = b""
        self._ids = []  # not shown: each with its end in `_held`
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
        found = [self._held.find(text) for text in self._stop]
        found = [begin for begin in found if begin >= 0]
        if found:
            self.stopped = True
            return self._show(min(found), final=True)
        return self._show(max(0, len(self._held) - self._reserve))

    def finish(self) -> list:
        """Return the pieces that were held back; there may be none."""
        return [] if self.stopped else self._show(len(self._held), final=True)

    def _show(self, end, final=False):
        """Show what ends at `end`, or before, in the bytes that are held."""
        text = self._decoder.decode(self._held[:end], final)
        ids = [token for token, last in self._ids if last <= end]
        self._ids = [(token, last - end) for token, last in self._ids[len(ids) :]]
        self._held = self._held[end:]
        self.num_shown += len(ids)
        pieces = ids if not self._is_text else [text] if text else []
        self.pieces += pieces
        return pieces
