"""Text read in other ways each time, so that a model learns the text's language.

A model that sees a small text often learns it by heart. Each switch here lets the
same text look otherwise in each epoch:

bpe_dropout         the same text in other tokens
random_offsets      windows cut at other places
token_dropout       inputs blanked; what is to be predicted stays
token_replacement   inputs exchanged for other tokens; what is to be predicted stays
mix_documents       windows that go on with another place of the text

They are made for each window when it is needed, a function of seed, epoch and window
alone: a run that was interrupted sees what an uninterrupted one does, and workers
agree. None of it happens in validation.

Reference: article 6.4.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.settings import arguments
from gpt_tf.text.config import AugmentationConfig
from gpt_tf.text.rng import draw, uniform
from gpt_tf.text.tokenizer import (
    BPETokenizer,
    byte_alphabet,
    text_and_broken_bytes,
)

# What the streams of a window are for; a new purpose takes a new number.
_SEGMENTATION, _OTHER_SEGMENTATION, _IS_MIXED, _CUT, _OTHER_PLACE = range(5)
_IS_REPLACED, _REPLACEMENT, _IS_DROPPED = range(5, 8)

# Tells an epoch's key here from that of `Windows`.
_EPOCH = 6

# A token that is never taken apart stands among words as one character, this one
# and its id; GPT-2's stand-ins for bytes come long before.
_WHOLE = 0x10000


class BPEDropout:
    """Encoding that leaves out merges at random: the same text in other tokens.

    The ids are those of the tokenizer, and decode to the same text. At rate 0 they are
    the tokenizer's own, at rate 1 there is one for each byte.

    Args:
        tokenizer: A `BPETokenizer`.
        rate: Probability with which each possible merge is left out at each step, in
            [0, 1].

    Example:
        >>> tokenizer = BPETokenizer.train(["low lower lowest " * 9], vocab_size=260)
        >>> ids = BPEDropout(tokenizer, rate=0.5).encode("lowest", seed=1)
        >>> tokenizer.decode(ids)
        'lowest'

    Reference: Provilkov, Emelianenko and Voita, "BPE-Dropout: Simple and Effective
    Subword Regularization", arXiv:1910.13267, algorithm 1.
    """

    def __init__(self, tokenizer: BPETokenizer, rate: float):
        AugmentationConfig(bpe_dropout=0.5).check_fits(tokenizer)
        self.tokenizer = tokenizer
        self.rate = arguments.number("rate", rate, least=0, most=1)
        backend = tokenizer.backend
        vocabulary = backend.get_vocab()
        self._byte_ids = np.zeros(max(map(ord, byte_alphabet())) + 1, np.int64)
        for character in byte_alphabet():
            self._byte_ids[ord(character)] = vocabulary[character]
        self._whole = set(backend.get_added_tokens_decoder())
        merges = artifacts.parse_json(tokenizer.to_json())["model"]["merges"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in merges]
        pairs = np.array(
            [
                (vocabulary[left], vocabulary[right], vocabulary[left + right])
                for left, right in merges
            ],
            np.int64,
        ).reshape(-1, 3)
        codes = pairs[:, 0] * tokenizer.vocab_size + pairs[:, 1]
        order = np.argsort(codes, kind="stable")
        # The last code is no pair's: where a search ends that found nothing.
        self._codes = np.append(codes[order], np.iinfo(np.int64).max)
        self._ranks = np.append(order, 0)
        self._merged = np.append(pairs[order, 2], 0)

    def encode(self, text: str, seed: int = 0) -> list[int]:
        """Return ids of a text; the same seed, from 0, gives the same ones."""
        seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
        ids = np.asarray(self.tokenizer.encode(text), np.int64)
        key = draw(np.uint64(0), np.array([seed]))
        return self.resegment([ids], key)[0].tolist()

    def resegment(self, rows: Sequence[np.ndarray], keys) -> list[np.ndarray]:
        """Return for each row other ids of the same text, about as many or more.

        Args:
            rows: Ids `(T,)` of each text. Tokens that the tokenizer has added, as the
                end of text, stay as they are.
            keys: uint64s `(len(rows),)`, each of which decides for its row alone.
        """
        words = [self._words(row) for row in rows]
        lengths = np.array([len(w) for row in words for w in row], np.int64)
        per_row = np.array([sum(map(len, row)) for row in words], np.int64)
        text = "".join(itertools.chain.from_iterable(words))
        symbols = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
        is_byte = symbols < _WHOLE
        symbols[~is_byte] -= _WHOLE
        symbols[is_byte] = self._byte_ids[symbols[is_byte]]
        word_of = np.repeat(np.arange(len(lengths)), lengths)
        row_of = np.repeat(np.arange(len(rows)), per_row)
        firsts = np.cumsum(per_row) - per_row
        ids, row_of = self._merge(
            symbols,
            word_of,
            row_of,
            np.arange(len(symbols)) - firsts[row_of],
            np.asarray(keys, np.uint64),
        )
        counts = np.bincount(row_of, minlength=len(rows))
        return np.split(ids, np.cumsum(counts)[:-1])

    def _words(self, ids):
        """Cut a row into the words in which merges happen, in GPT-2's alphabet."""
        words, run = [], []
        for token in ids.tolist():
            if token in self._whole:
                words += [*self._words_of(run), chr(_WHOLE + token)]
                run = []
            else:
                run.append(token)
        return words + self._words_of(run)

    def _words_of(self, ids):
        # A window may begin and end within a character.
        texts, broken = text_and_broken_bytes(self.tokenizer.decode_bytes(ids))
        split = self.tokenizer.backend.pre_tokenizer.pre_tokenize_str
        words = []
        for text, characters in itertools.zip_longest(texts, broken, fillvalue=""):
            words += [*(word for word, _ in split(text)), *characters]
        return words

    def _merge(self, symbols, word_of, row_of, places, keys):
        """Merge pairs within words: in each turn one in every word that has any.

        Args:
            symbols: Ids `(N,)` of all rows' bytes.
            word_of: The word of each, rising.
            row_of: The row of each, rising.
            places: The place of each in its row.
            keys: The key of each row.

        Returns:
            Ids `(M,)` and the row of each.
        """
        order = np.arange(len(symbols))
        finished = [(symbols[:0], row_of[:0], order[:0])]
        never = np.iinfo(np.int64).max
        for turn in itertools.count():
            count = len(symbols)
            if not count:
                break
            starts_word = np.append(True, word_of[1:] != word_of[:-1])
            codes = symbols[:-1] * self.tokenizer.vocab_size + symbols[1:]
            found = np.searchsorted(self._codes, codes)
            is_pair = (self._codes[found] == codes) & ~starts_word[1:]
            if self.rate:
                chances = uniform(draw(keys, turn)[row_of[:-1]], places[:-1])
                is_pair &= chances >= self.rate
            # The best pair of a word is the one learnt first, then the leftmost.
            scores = np.full(count, never)
            at = np.flatnonzero(is_pair)
            scores[at] = self._ranks[found[at]] * count + at
            starts = np.flatnonzero(starts_word)
            best = np.minimum.reduceat(scores, starts)
            goes_on = best < never
            at = best[goes_on] % count
            symbols[at] = self._merged[found[at]]
            is_open = np.repeat(goes_on, np.diff(np.append(starts, count)))
            finished.append((symbols[~is_open], row_of[~is_open], order[~is_open]))
            is_open[at + 1] = False
            symbols, word_of, row_of, places, order = (
                array[is_open] for array in (symbols, word_of, row_of, places, order)
            )
        symbols, row_of, order = map(np.concatenate, zip(*finished, strict=True))
        order = np.argsort(order)
        return symbols[order], row_of[order]


class Augmenter:
    """Reads the windows of a text otherwise in each epoch.

    Args:
        config: An `AugmentationConfig`.
        tokenizer: The `Tokenizer` that the text was encoded with.
        tokens: Ids `(N,)` of the text.
        context_length: `T`, tokens per window, below `N`.
        seed: Decides everything, 0 or more.

    Raises:
        InputError: The tokenizer cannot do what is asked.
    """

    def __init__(self, config, tokenizer, tokens, context_length, seed):
        config.check_fits(tokenizer)
        self.config = config
        self.tokens = tokens
        self.context_length = context_length
        self.seed = seed
        self.end_id = tokenizer.end_of_text_id
        self._bpe = None
        if config.bpe_dropout:
            self._bpe = BPEDropout(tokenizer, config.bpe_dropout)
        # How often each id is drawn as a replacement, and before it all smaller ones.
        # The end of a document is never made up.
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        if config.token_dropout or config.token_replacement:
            counts = _counts(tokens, tokenizer.vocab_size)
        self.blank_id = int(counts.argmax()) if self.end_id is None else self.end_id
        if config.replacement == "uniform":
            counts[:] = 0
            counts[list(tokenizer.backend.get_vocab().values())] = 1
        if self.end_id is not None:
            counts[self.end_id] = 0
        if config.token_replacement and not counts.any():
            raise InputError(
                "`token_replacement` expects text to take tokens from. Received: a "
                "text of nothing but ends of text. Leave it out."
            )
        self._up_to = np.cumsum(counts)

    def read(self, epoch: int, places, starts):
        """Return windows as this epoch reads them.

        Args:
            epoch: Number of the epoch, from 0.
            places: Integers `(...)`: the place of each window in the epoch.
            starts: Integers `(...)`: where each begins in the text.

        Returns:
            Inputs `(..., T)` int32, targets `(..., T)` int32, and weights `(..., T)`
            float32: 0 where a target cannot be known.
        """
        key = np.random.SeedSequence([self.seed, epoch, _EPOCH])
        keys = draw(key.generate_state(1, np.uint64), np.ravel(places))  # (R,)
        ids, known = self._text(np.ravel(starts), draw(keys, _SEGMENTATION))
        if self.config.mix_documents and self.context_length > 1:
            ids, known = self._mixed(ids, known, keys)
        shape = (*np.shape(places), self.context_length)
        return (
            self._noisy(ids[:, :-1], keys).astype(np.int32).reshape(shape),
            ids[:, 1:].astype(np.int32).reshape(shape),
            known[:, 1:].astype(np.float32).reshape(shape),
        )

    def _text(self, starts, keys):
        """Return ids `(R, T + 1)` of the text from `starts` on, and which are text."""
        columns = np.arange(self.context_length + 1)
        ids = self.tokens[starts[:, None] + columns].astype(np.int64)
        known = np.ones(ids.shape, bool)
        if self._bpe is not None:
            for row, other in enumerate(self._bpe.resegment(ids, keys)):
                other = other[: len(columns)]
                ids[row, : len(other)] = other
                ids[row, len(other) :] = self.blank_id
                known[row, len(other) :] = False
        return ids, known

    def _mixed(self, ids, known, keys):
        """Let some windows go on with text from elsewhere."""
        rate = self.config.mix_documents
        rows = np.flatnonzero(uniform(keys, _IS_MIXED) < rate)
        if not len(rows):
            return ids, known
        length, keys = self.context_length, keys[rows]
        cuts = 1 + (draw(keys, _CUT) % np.uint64(length - 1)).astype(np.int64)
        room = np.uint64(len(self.tokens) - length)
        starts = (draw(keys, _OTHER_PLACE) % room).astype(np.int64)
        others, others_known = self._text(starts, draw(keys, _OTHER_SEGMENTATION))
        behind = np.arange(length + 1) - cuts[:, None]  # the cut, 0, and what follows
        has_mark = self.end_id is not None
        sources = np.maximum(behind - has_mark, 0)
        spliced = np.take_along_axis(others, sources, 1)
        if has_mark:
            spliced[behind == 0] = self.end_id
        spliced_known = np.take_along_axis(others_known, sources, 1)
        # The mark, and what begins behind it.
        spliced_known[(behind == 0) | (behind == int(has_mark))] = False
        ids[rows] = np.where(behind < 0, ids[rows], spliced)
        known[rows] = np.where(behind < 0, known[rows], spliced_known)
        return ids, known

    def _noisy(self, x, keys):
        """Exchange and blank inputs `(R, T)`; ends of documents stay."""
        columns = np.arange(x.shape[1])
        stays = x == (-1 if self.end_id is None else self.end_id)

        def chosen(purpose, rate):
            chances = uniform(draw(keys, purpose)[:, None], columns)
            return (chances < rate) & ~stays

        if rate := self.config.token_replacement:
            drawn = draw(draw(keys, _REPLACEMENT)[:, None], columns)
            drawn = (drawn % np.uint64(self._up_to[-1])).astype(np.int64)
            drawn = np.searchsorted(self._up_to, drawn, side="right")
            x = np.where(chosen(_IS_REPLACED, rate), drawn, x)
        if rate := self.config.token_dropout:
            x = np.where(chosen(_IS_DROPPED, rate), self.blank_id, x)
        return x


def _counts(tokens, vocab_size):
    """Count each id, a stretch at a time: the text may be larger than memory."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), 1 << 22):
        found = np.bincount(tokens[start : start + (1 << 22)], minlength=vocab_size)
        if len(found) > vocab_size:
            raise InputError(
                f"`tokens` expects ids below {vocab_size}, the tokenizer's. Received: "
                f"{len(found) - 1}. Use the tokenizer that made them."
            )
        counts += found
    return counts
