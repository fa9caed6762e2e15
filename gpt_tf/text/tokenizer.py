"""Text to token ids and back: byte-level BPE, and single characters.

Both are the `tokenizers` library's and are kept in Hugging Face's `tokenizer.json`.
"""

import abc
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.settings import arguments
from gpt_tf.text.chat import CONFIG_NAME, ChatTemplate, read_template

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"


def byte_alphabet() -> dict[str, int]:
    """Map GPT-2's printable stand-ins to the bytes they stand for.

    Reference: `bytes_to_unicode` in the code of Radford et al. (2019).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    characters = [chr(byte) for byte in printable]
    characters += [chr(256 + index) for index in range(len(others))]
    return dict(zip(characters, printable + others, strict=True))


_BYTE_OF = byte_alphabet()
_STANDS_FOR = {byte: character for character, byte in _BYTE_OF.items()}
_LATIN_1 = {ord(character): byte for character, byte in _BYTE_OF.items()}
_STAND_INS = re.compile(f"[{re.escape(''.join(_BYTE_OF))}]*")


def bytes_of_stand_ins(token: str) -> bytes | None:
    """Return the bytes that a token of byte-level BPE stands for; None of any other."""
    if _STAND_INS.fullmatch(token) is None:
        return None
    return token.translate(_LATIN_1).encode("latin-1")


def text_and_broken_bytes(data: bytes) -> tuple[list[str], list[str]]:
    """Part bytes into UTF-8 and what is none.

    Returns:
        Texts, and the stand-ins of the bytes between each two of them.
    """
    # What Python's `surrogateescape` makes of bytes that are not UTF-8.
    pieces = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
    broken = ["".join(_STANDS_FOR[ord(c) - 0xDC00] for c in b) for b in pieces[1::2]]
    return pieces[::2], broken


# Text on which a tokenizer that changes text gives itself away, unless it does so with
# a few texts only: so normalizers and pre-tokenizers must be known ones, too.
_PROBE = "a  b\n\t<|endoftext|> \u00e9\u4e2d\U0001f600 C"
_NORMALIZERS = {"ByteLevel", "NFC"}
_PRE_TOKENIZERS = {
    *("ByteLevel", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"),
}


class TokenizerWarning(UserWarning):
    """A tokenizer is used otherwise than its file says."""


class Tokenizer(abc.ABC):
    """What every tokenizer of gpt_tf can do.

    Attributes:
        kind: `"bpe"` or `"character"`.
        backend: The `tokenizers.Tokenizer` behind it.
        vocab_size: Number of ids: they run from 0 to `vocab_size - 1`.
        end_of_text_id: Id of the token between documents, or None.
        chat_template: The `ChatTemplate` of its model, or None.
    """

    kind: str
    chat_template: ChatTemplate | None = None

    def __init__(self, backend: tokenizers.Tokenizer):
        # A foreign file may ask for these; they would cut or lengthen text.
        backend.no_truncation()
        backend.no_padding()
        # Text is text, "<|endoftext|>" included, but where `special` is asked for.
        backend.encode_special_tokens = True
        self.backend = backend
        vocabulary = backend.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary):
            raise DamagedFileError(
                "A tokenizer expects at least half of its ids to have a token. "
                f"Received: {len(vocabulary)} tokens and ids up to "
                f"{self.vocab_size - 1}, for each of which a model has a row. Number "
                "the tokens from 0."
            )
        self.end_of_text_id = backend.token_to_id(END_OF_TEXT)
        self._bytes_of = self._read_vocabulary()
        # Added tokens are written as they read, not in GPT-2's alphabet.
        for index, token in backend.get_added_tokens_decoder().items():
            self._bytes_of[index] = token.content.encode("utf-8")
        self._bytes_of.pop(self.end_of_text_id, None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Any text.
            special: Whether special tokens that are written in it, such as
                `"<|endoftext|>"`, become their one id each, as in a prompt. If not,
                they are text like any other, which is what a corpus holds.

        Returns:
            The ids; with `special` those of Hugging Face's `encode` without the
            tokens that it adds itself.
        """
        arguments.text("text", text)
        is_found = special and any(token in text for token in self._special_tokens)
        return self._encode_special(text) if is_found else self.encode_batch([text])[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end what a model writes: the end of text, and the template's."""
        ids = [self.end_of_text_id]
        if self.chat_template is not None:
            ids += map(self.backend.token_to_id, self.chat_template.end_tokens)
        return tuple(dict.fromkeys(token for token in ids if token is not None))

    @functools.cached_property
    def _special_tokens(self) -> list[str]:
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    @functools.cached_property
    def _finds_special(self) -> tokenizers.Tokenizer:
        # Of its own: a switch on the shared one would be seen by other threads.
        return tokenizers.Tokenizer.from_str(self.to_json())

    def _encode_special(self, text: str) -> list[int]:
        """Return the ids of a text in which there are special tokens."""
        return self._finds_special.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""
        encoded = self.backend.encode_batch_fast(
            [_clean(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encoded]

    @abc.abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of bytes, which need not be UTF-8 for a `BPETokenizer`."""

    @abc.abstractmethod
    def _read_vocabulary(self) -> dict[int, bytes]:
        """Check the backend and return each id's bytes, but for added tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that ids stand for; broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that ids stand for; the end-of-text token has none.

        Raises:
            InputError: An id is negative or not below `vocab_size`.
        """
        ids = arguments.ids(ids)
        self.check_ids(ids)
        # Ids without a token are gaps in a foreign vocabulary.
        return b"".join(self._bytes_of.get(token, b"") for token in ids)

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return self.backend.to_str(pretty=False)

    def fingerprint(self) -> str:
        """Return a SHA-256 that two tokenizers share only if they are the same."""
        content = artifacts.parse_json(self.to_json())
        canonical = artifacts.to_json(content, sort_keys=True)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.json` into a folder, or to the `.json` file named.

        In a folder a chat template is written beside it, in `tokenizer_config.json`.
        """
        path = Path(path)
        if path.suffix != ".json":
            path = path / FILE_NAME
        with artifacts.atomic_file(path, "w") as file:
            file.write(self.to_json())
        if self.chat_template is not None and path.name == FILE_NAME:
            config = self.chat_template.to_config()
            artifacts.write_json(path.with_name(CONFIG_NAME), config)

    def check_ids(self, ids: Iterable[int]) -> None:
        """Refuse ids that are negative or not below `vocab_size`."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"Token ids run from 0 to {self.vocab_size - 1}. "
                    f"Received: {token}. Use the tokenizer that made them."
                )


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding as in GPT-2; every byte sequence has ids.

    The text that was encoded comes back, and the same text always has the same ids:
    of a foreign tokenizer, BPE dropout is switched off, and Unicode's composition (the
    normalizer NFC) is left out with a `TokenizerWarning`. Other normalizers, and
    whatever else changes text, are refused.

    Example:
        >>> tokenizer = BPETokenizer.train(["low lower lowest " * 9], vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("lowest"))
        'lowest'

    Reference: Radford et al. (2019), section 2.2; Sennrich, Haddow and Birch,
    "Neural Machine Translation of Rare Words with Subword Units",
    arXiv:1508.07909.
    """

    kind = "bpe"

    def __init__(self, backend: tokenizers.Tokenizer):
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        parts, splitters = map(_parts_of, (backend.normalizer, backend.pre_tokenizer))
        changing = [part for part in parts if part not in _NORMALIZERS]
        changing += [part for part in splitters if part not in _PRE_TOKENIZERS]
        if "NFC" in parts and not changing:
            in_bytes = normalizers.ByteLevel() if "ByteLevel" in parts else None
            backend.normalizer = in_bytes
            warnings.warn(
                "The tokenizer's normalizer NFC is left out, so that text comes back "
                "as it was. Text with decomposed characters, an e and an accent for "
                "example, has other ids than with it; all other text has the same.",
                TokenizerWarning,
                stacklevel=2,
            )
        super().__init__(backend)
        added = backend.get_added_tokens_decoder().values()
        probe = _PROBE + "".join(f" {token.content} " for token in added)
        if changing or self.decode(self.encode(probe)) != probe:
            what = f"{changing[0]}, which" if changing else "one that"
            raise DamagedFileError(
                "A byte-level BPE tokenizer expects to give back the text it encoded. "
                f"Received: {what} changes spaces, case or characters. Use one like "
                "GPT-2's: no normalizer, and ByteLevel without a prefix space."
            )

    def _read_vocabulary(self):
        vocabulary = self.backend.get_vocab()
        missing = [c for c in _BYTE_OF if c not in vocabulary]
        if missing or not isinstance(self.backend.model, models.BPE):
            raise DamagedFileError(
                "A byte-level BPE tokenizer expects a token for each of the 256 bytes. "
                f"Received: {type(self.backend.model).__name__} without {len(missing)} "
                "of them. Use a GPT-2 style tokenizer.json."
            )
        return {
            index: data
            for token, index in vocabulary.items()
            if (data := bytes_of_stand_ins(token)) is not None
        }

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn a vocabulary; the same texts give the same one.

        Args:
            texts: The training text, in pieces.
            vocab_size: At least 257: the 256 bytes and the end-of-text token, which
                has id 0. The vocabulary is smaller where the texts support no more:
                where every word of them is a token.
        """
        _refuse_single_text(texts)
        repair = "256 bytes and the end of text are tokens always."
        vocab_size = arguments.integer(
            "vocab_size", vocab_size, 257, arguments.MOST_TOKENS, repair=repair
        )
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(_BYTE_OF),
            show_progress=False,
        )
        backend.train_from_iterator(map(_clean, texts), trainer)
        return cls(backend)

    @classmethod
    def from_gpt2_files(
        cls, vocab: str | os.PathLike, merges: str | os.PathLike
    ) -> "BPETokenizer":
        """Read GPT-2's `vocab.json` and `merges.txt`, or refuse damaged ones."""
        try:
            backend = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:
            raise DamagedFileError(
                f"{vocab} and {merges} cannot be read as GPT-2's vocabulary and "
                f"merges: {error}."
            ) from None
        if backend.token_to_id(END_OF_TEXT) is not None:
            backend.add_special_tokens([END_OF_TEXT])
        return cls(backend)

    def encode_bytes(self, data: bytes) -> list[int]:
        texts, broken = text_and_broken_bytes(data)
        encoded = self.encode_batch(texts)
        for ids, characters in zip(encoded, broken, strict=False):
            ids += map(self.backend.token_to_id, characters)
        return [token for ids in encoded for token in ids]


class CharacterTokenizer(Tokenizer):
    """One token per character: the simplest tokenizer there is.

    Ids follow the order of the characters; the end-of-text token, if any, is last.

    Example:
        >>> CharacterTokenizer.train(["abba"], end_of_text=False).encode("ba")
        [1, 0]
    """

    kind = "character"

    def _read_vocabulary(self):
        vocabulary = self.backend.get_vocab()
        vocabulary.pop(END_OF_TEXT, None)
        words = [token for token in vocabulary if len(token) != 1]
        if words or not isinstance(self.backend.model, models.WordLevel):
            raise DamagedFileError(
                "A character tokenizer expects tokens of one character each. Received: "
                f"{type(self.backend.model).__name__} with {len(words)} longer ones. "
                "Use a tokenizer.json that `CharacterTokenizer` saved."
            )
        self._ids = vocabulary
        return {index: token.encode("utf-8") for token, index in vocabulary.items()}

    @classmethod
    def train(
        cls, texts: Iterable[str], *, end_of_text: bool = True
    ) -> "CharacterTokenizer":
        """Take every character of the texts as a token.

        Args:
            texts: All text that will be encoded, in pieces.
            end_of_text: Whether there is an end-of-text token too.
        """
        _refuse_single_text(texts)
        end_of_text = arguments.switch("end_of_text", end_of_text)
        characters = set()
        for text in texts:
            characters.update(_clean(text))
        if not characters:
            raise InputError("A character vocabulary expects text. Received: none.")
        vocabulary = {c: index for index, c in enumerate(sorted(characters))}
        if end_of_text:
            vocabulary[END_OF_TEXT] = len(vocabulary)
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=""))
        backend.pre_tokenizer = pre_tokenizers.Split(
            tokenizers.Regex(r"[\s\S]"), "isolated"
        )
        backend.decoder = decoders.Fuse()
        if end_of_text:
            backend.add_special_tokens([END_OF_TEXT])
        return cls(backend)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._ids_of(text) for text in texts]

    def _encode_special(self, text: str) -> list[int]:
        wanted = "|".join(map(re.escape, self._special_tokens))
        return self._ids_of(re.findall(rf"{wanted}|[\s\S]", text))

    def _ids_of(self, symbols: Sequence[str]) -> list[int]:
        try:
            return [
                self.end_of_text_id if symbol == END_OF_TEXT else self._ids[symbol]
                for symbol in symbols
            ]
        except KeyError as error:
            symbol = error.args[0]
            place = len("".join(symbols[: symbols.index(symbol)]))
            raise InputError(
                f"The vocabulary of {len(self._ids)} characters lacks {symbol!r}, "
                f"at position {place}. Train the tokenizer on this text too, or use a "
                "bpe tokenizer."
            ) from None

    def encode_bytes(self, data: bytes) -> list[int]:
        try:
            return self.encode(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                "A character tokenizer expects UTF-8. Received: byte "
                f"{data[error.start]:#04x} at offset {error.start}. Use a bpe "
                "tokenizer for any bytes."
            ) from None


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: A `tokenizer.json`, or a folder that holds one, or one that holds
            GPT-2's `vocab.json` and `merges.txt`. A chat template is read from
            Hugging Face's files beside it.

    Raises:
        InputError: There is none.
        DamagedFileError: It is none that gpt_tf knows.
    """
    path = arguments.path("path", path)
    found = _load(path)
    if path.is_dir() or path.name == FILE_NAME:
        folder = path if path.is_dir() else path.parent
        found.chat_template = read_template(folder, found.backend)
    return found


def _load(path):
    if path.is_dir():
        gpt2 = (path / "vocab.json", path / "merges.txt")
        path = path / FILE_NAME
        if not path.is_file() and all(file.is_file() for file in gpt2):
            return BPETokenizer.from_gpt2_files(*gpt2)
    if not path.is_file():
        raise InputError(
            f"Expected a tokenizer at {path}; there is none. Name a tokenizer.json, "
            "or use bpe or character."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as a tokenizer.json: {error}."
        ) from None
    return tokenizer_from_json(text, str(path))


def tokenizer_from_json(text: str, name: str = "the text") -> Tokenizer:
    """Make a tokenizer of the text of a `tokenizer.json`, which errors call `name`.

    Raises:
        DamagedFileError: It is none that gpt_tf knows.
    """
    known = {models.BPE: BPETokenizer, models.WordLevel: CharacterTokenizer}
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        for model, kind in known.items():
            if isinstance(backend.model, model):
                try:
                    return kind(backend)
                except DamagedFileError as error:
                    return _foreign(text, name, error)
        return _foreign(text, name, "it is of another kind")
    except (InputError, TokenizerWarning, KeyboardInterrupt, SystemExit):
        raise  # warnings are errors where somebody wants it so
    except BaseException as error:  # a panic of the library is no Exception
        raise DamagedFileError(
            f"{name} cannot be read as a tokenizer.json: {error}."
        ) from None


def _foreign(text, name, reason):
    """Take a tokenizer as it is, and say that it is none of ours."""
    from gpt_tf.text.foreign import ForeignTokenizer

    found = ForeignTokenizer(tokenizers.Tokenizer.from_str(text))
    warnings.warn(
        f"The tokenizer of {name} is used as it stands; text may not come back from it "
        f"as it was, because: {reason}",
        TokenizerWarning,
        stacklevel=3,
    )
    return found


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _parts_of(component) -> list[str]:
    """Return what a normalizer or pre-tokenizer consists of, by the library's names."""

    def names(settings):
        inner = settings.get("normalizers", settings.get("pretokenizers"))
        if inner is not None:
            return [name for each in inner for name in names(each)]
        removes = settings.get("behavior") == "Removed"
        return [settings["type"] + " with behavior Removed" * removes]

    if component is None:
        return []
    return names(artifacts.parse_json(component.__getstate__()))


def _clean(text: str) -> str:
    """Replace lone surrogates by "?"; no UTF-8 has them, and the library refuses."""
    arguments.text("texts", text)
    return text.encode("utf-8", "replace").decode("utf-8")


def _refuse_single_text(texts) -> None:
    if isinstance(texts, (str, bytes)) or not np.iterable(texts):
        arguments.refuse("texts", texts, "several texts, a list for example")
