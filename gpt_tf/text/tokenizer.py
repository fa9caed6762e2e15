"""Text to token ids and back: byte-level BPE, and single characters.

Both are the `tokenizers` library's and are kept in Hugging Face's `tokenizer.json`.
"""

import abc
import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt_tf import files
from gpt_tf.errors import DamagedFileError, InputError

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"


def _byte_alphabet() -> dict[str, int]:
    """Map GPT-2's printable stand-ins to the bytes they stand for.

    Reference: `bytes_to_unicode` in the code of Radford et al. (2019).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    characters = [chr(byte) for byte in printable]
    characters += [chr(256 + index) for index in range(len(others))]
    return dict(zip(characters, printable + others, strict=True))


_BYTE_OF = _byte_alphabet()
_STANDS_FOR = {byte: character for character, byte in _BYTE_OF.items()}


class Tokenizer(abc.ABC):
    """What every tokenizer of gpt_tf can do.

    Attributes:
        backend: The `tokenizers.Tokenizer` behind it.
        end_of_text_id: Id of the token between documents, or None.
    """

    kind: str

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.encode_special_tokens = True
        self.backend = backend
        self.end_of_text_id = backend.token_to_id(END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        """Number of ids: they run from 0 to `vocab_size - 1`."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; the end-of-text token is never among them."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""

    @abc.abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that ids stand for; the end-of-text token has none."""

    @abc.abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that ids stand for; broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return self.backend.to_str(pretty=False)

    def fingerprint(self) -> str:
        """Return a SHA-256 that two tokenizers share only if they are the same."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.json` into a folder, or to the `.json` file named."""
        path = Path(path)
        if path.suffix != ".json":
            path = path / FILE_NAME
        with files.atomic_file(path, "w") as file:
            file.write(self.to_json())

    def check_ids(self, ids: Iterable[int]) -> None:
        """Refuse ids that no token has.

        Raises:
            InputError: An id is negative or not below `vocab_size`.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"Token ids run from 0 to {self.vocab_size - 1}. "
                    f"Received: {token}. Use the tokenizer that made them."
                )


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding as in GPT-2; every byte sequence has ids.

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
        super().__init__(backend)
        vocabulary = backend.get_vocab()
        missing = [c for c in _BYTE_OF if c not in vocabulary]
        if missing or not isinstance(backend.model, models.BPE):
            raise DamagedFileError(
                "A byte-level BPE tokenizer expects a token for each of the 256 bytes. "
                f"Received: {type(backend.model).__name__} without {len(missing)} of "
                "them. Use a GPT-2 style tokenizer.json."
            )
        self._bytes_of = {
            index: bytes(_BYTE_OF[c] for c in token)
            for token, index in vocabulary.items()
            if token != END_OF_TEXT and all(c in _BYTE_OF for c in token)
        }

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn a vocabulary of exactly `vocab_size` tokens from texts.

        Args:
            texts: The training text, in pieces.
            vocab_size: At least 257: the 256 bytes and the end-of-text token.

        Raises:
            InputError: The size is too small, or larger than the text supports.
        """
        if vocab_size < 257:
            raise InputError(
                "A byte-level vocabulary expects at least 257 tokens: 256 bytes and "
                f"the end of text. Received: {vocab_size}."
            )
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(_BYTE_OF),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        reached = backend.get_vocab_size()
        if reached < vocab_size:
            raise InputError(
                f"The text supports a vocabulary of at most {reached} tokens. "
                f"Received: vocab_size={vocab_size}. Ask for {reached} or fewer, or "
                "give more text."
            )
        return cls(backend)

    @classmethod
    def from_gpt2_files(
        cls, vocab: str | os.PathLike, merges: str | os.PathLike
    ) -> "BPETokenizer":
        """Read GPT-2's `vocab.json` and `merges.txt`."""
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

    def save_gpt2_files(self, folder: str | os.PathLike) -> None:
        """Write GPT-2's `vocab.json` and `merges.txt` into a folder."""
        content = json.loads(self.to_json())["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
        vocabulary = dict(self.backend.get_vocab())
        with files.atomic_file(Path(folder) / "vocab.json", "w") as file:
            json.dump(vocabulary, file, ensure_ascii=False)
        with files.atomic_file(Path(folder) / "merges.txt", "w") as file:
            file.write("#version: 0.2\n" + "\n".join(merges) + "\n")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Lone surrogates cannot be UTF-8; the library would refuse them.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        encoded = self.backend.encode_batch_fast(clean, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_bytes(self, data: bytes) -> list[int]:
        ids = []
        for text, broken in _runs(data):
            ids += self.encode(text) if text else []
            ids += [self.backend.token_to_id(_STANDS_FOR[byte]) for byte in broken]
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        known = self._bytes_of
        pieces = []
        for token in ids:
            token = int(token)
            if token in known:
                pieces.append(known[token])
            elif token != self.end_of_text_id:
                self.check_ids([token])
        return b"".join(pieces)


class CharacterTokenizer(Tokenizer):
    """One token per character: the simplest tokenizer there is.

    Ids follow the order of the characters; the end-of-text token, if any, is last.

    Example:
        >>> CharacterTokenizer.train(["abba"], end_of_text=False).encode("ba")
        [1, 0]
    """

    kind = "character"

    def __init__(self, backend: tokenizers.Tokenizer):
        super().__init__(backend)
        self._ids = {
            token: index
            for token, index in backend.get_vocab().items()
            if token != END_OF_TEXT
        }
        self._characters = {index: token for token, index in self._ids.items()}

    @classmethod
    def train(
        cls, texts: Iterable[str], *, end_of_text: bool = True
    ) -> "CharacterTokenizer":
        """Take every character of the texts as a token.

        Args:
            texts: All text that will be encoded, in pieces.
            end_of_text: Whether there is an end-of-text token too.

        Raises:
            InputError: There is no text.
        """
        characters = set()
        for text in texts:
            characters.update(text)
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
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise InputError(
                f"The vocabulary of {len(self._ids)} characters lacks {character!r}, "
                f"at position {text.index(character)}. Train the tokenizer on this "
                "text too, or use a bpe tokenizer."
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

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        pieces = []
        for token in ids:
            token = int(token)
            if token in self._characters:
                pieces.append(self._characters[token])
            elif token != self.end_of_text_id:
                self.check_ids([token])
        return "".join(pieces).encode("utf-8", "surrogatepass")


class StreamDecoder:
    """Turn ids into text as they come, holding back unfinished characters.

    Args:
        tokenizer: The tokenizer of the ids.

    Example:
        >>> decoder = StreamDecoder(tokenizer)
        >>> text = "".join(decoder.push(i) for i in ids) + decoder.finish()
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take an id and return the text that is now complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """Return what is left, unfinished characters as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: A `tokenizer.json`, or a folder that holds one, or one that holds
            GPT-2's `vocab.json` and `merges.txt`.

    Raises:
        InputError: There is none.
        DamagedFileError: The file is no tokenizer that gpt_tf knows.
    """
    path = Path(path)
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
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise DamagedFileError(
            f"{path} cannot be read as a tokenizer.json: {error}."
        ) from None
    known = {models.BPE: BPETokenizer, models.WordLevel: CharacterTokenizer}
    for model, kind in known.items():
        if isinstance(backend.model, model):
            return kind(backend)
    raise DamagedFileError(
        f"{path} holds a {type(backend.model).__name__} tokenizer. gpt_tf knows "
        "byte-level BPE and single characters."
    )


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _runs(data: bytes):
    """Cut bytes into pairs of valid UTF-8 text and the broken bytes after it."""
    while data:
        try:
            yield data.decode("utf-8"), b""
            return
        except UnicodeDecodeError as error:
            yield data[: error.start].decode("utf-8"), data[error.start : error.end]
            data = data[error.end :]
