"""A text as it is continued, whoever computes the logits.

`EdgeGPT` and `EdgeScheduler` ask a `Continuation` what to compute next and give it the
logits. So one seed gives one text in both, whatever else they compute meanwhile.
"""

from collections.abc import Sequence

import numpy as np

from gpt_tf.sampling import Sampler
from gpt_tf.text.tokenizer import StreamDecoder, Tokenizer


class Continuation:
    """One text, its new tokens, and what has to be computed for the next one.

    Args:
        prompt: Token ids, at least one.
        max_new_tokens: Largest number of tokens to add, at least 0.
        sampler: How tokens are chosen.
        generator: Source of randomness.
        end: The id that ends a text, or None.
        context_length: Positions that the model sees.
        ahead: Length of the longest text of a list: when that fills the context, the
            oldest half of this one is dropped. None: it ends when full.

    Attributes:
        text: Prompt and new tokens.
        new: The new tokens.
        begins: Whether the cache is to be emptied first.
        pending: Ids to append to the cache; the logits behind the last are wanted.
        count: Number of ids in the cache, the pending ones included.
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
        ahead: int | None,
    ):
        self.text = list(prompt)
        self.new = []
        self.finished = not max_new_tokens
        self._left = max_new_tokens
        self._sampler, self._generator, self._end = sampler, generator, end
        self._context_length = context_length
        self._ahead = ahead
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
        token = self._sampler.choose(logits, self.text, self._generator)
        if token == self._end:
            self.finished = True
            return None
        self.text.append(token)
        self.new.append(token)
        self._left -= 1
        if not self._left:
            self.finished = True
        elif self.count < self._full:
            self.count += 1
            self.begins, self.pending = False, [token]
        elif self._ahead is None:
            self.finished = True
        else:
            self._ahead = half_of(self._context_length)
            self._begin(self._ahead)
        return token

    def restart(self) -> None:
        """Have the cache filled anew, after another text was in it."""
        self.begins, self.pending = True, self.text[-self.count :]

    def _begin(self, keep):
        self.begins, self.pending = True, self.text[-keep:]
        self.count, self._full = len(self.pending), self._context_length
        if self._ahead is not None:
            self._full += self.count - self._ahead


def continuations(
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    end: int | None,
    context_length: int,
    when_full: str,
) -> list[Continuation]:
    """Begin the texts of one list, as `gpt_tf.generate` would.

    Args:
        rows: Prompts, lists of ids.
        when_full: `"slide"` or `"stop"`, as for `EdgeGPT`.
        max_new_tokens, sampler, end, context_length: As for `Continuation`.
    """
    windows = [row[-context_length:] for row in rows]
    # The Keras side shifts the rows of a list together.
    ahead = max(map(len, windows)) if when_full == "slide" else None
    return [
        Continuation(row, max_new_tokens, sampler, source, end, context_length, ahead)
        for row, source in zip(windows, sampler.generators(len(rows)), strict=True)
    ]


def half_of(context_length: int) -> int:
    """Return how many tokens are kept of a text that fills the context."""
    return max(1, context_length // 2)


class GrowingText:
    """Tokens as text, for whoever gets them one by one.

    Args:
        tokenizer: The tokenizer.
        stop: Texts that end it; they are cut off.

    Attributes:
        text: All that was said so far.
        stopped: Whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = max(0, max(map(len, stop), default=0) - 1)
        self._whole = ""

    def push(self, token: int) -> str:
        """Append a token; return what is complete, and cannot be part of a stop."""
        self._whole += self._decoder.push(token)
        return self._say(len(self._whole) - self._held)

    def finish(self) -> str:
        """Return what was held back."""
        if not self.stopped:
            self._whole += self._decoder.finish()
        return self._say(len(self._whole))

    def _say(self, end):
        places = [self._whole.find(item) for item in self._stop if item]
        places = [place for place in places if place >= 0]
        if places:
            self.stopped, end = True, min(places)
            self._whole = self._whole[:end]
        piece = self._whole[len(self.text) : max(end, len(self.text))]
        self.text += piece
        return piece
