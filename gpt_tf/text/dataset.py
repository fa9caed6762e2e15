"""Token files on disk, and the windows over them that training sees.

A token file is a flat array of ids, memory-mapped, with a manifest beside it. A
batch of windows is a pure function of file, seed and step, so that training resumes
at any step, workers agree without talking, and nothing grows with the corpus.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from gpt_tf import files
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.text.corpus import Document
from gpt_tf.text.tokenizer import Tokenizer

_ENCODE_CHARACTERS = 1 << 20


class TokenFile:
    """A memory-mapped array of token ids.

    Attributes:
        path: The file.
        tokens: Ids `(count,)`, uint16 or uint32, read from disk as needed.
        manifest: What `write_token_file` recorded.
    """

    def __init__(self, path: Path, tokens: np.ndarray, manifest: dict):
        self.path = path
        self.tokens = tokens
        self.manifest = manifest

    @property
    def count(self) -> int:
        return int(self.manifest["count"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text that the tokens stand for."""
        return int(self.manifest["text_bytes"])

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = True) -> "TokenFile":
        """Open a token file.

        Args:
            path: The file that `write_token_file` wrote.
            verify: Whether to compare its bytes with the manifest's SHA-256.

        Raises:
            DamagedFileError: File or manifest is missing, truncated or altered.
        """
        path = Path(path)
        manifest = files.read_json(_manifest_path(path))
        try:
            dtype, size = np.dtype(manifest["dtype"]), int(manifest["size_bytes"])
            sha256 = manifest["sha256"]
        except (KeyError, TypeError, ValueError):
            raise DamagedFileError(
                f"{_manifest_path(path)} is no manifest of a token file."
            ) from None
        if not path.is_file():
            raise DamagedFileError(f"Expected a token file at {path}; there is none.")
        found = path.stat().st_size
        if found != size:
            raise DamagedFileError(
                f"{path} should have {size} bytes but has {found}: it is truncated or "
                "was written over. Prepare the corpus again."
            )
        if verify and files.sha256_of(path) != sha256:
            raise DamagedFileError(
                f"{path} does not have the SHA-256 that its manifest states: its "
                "bytes were altered. Prepare the corpus again."
            )
        return cls(path, np.memmap(path, dtype, mode="r"), manifest)

    def check_fits(self, vocab_size: int) -> None:
        """Refuse ids that a model or tokenizer of this size does not have.

        Raises:
            InputError: An id is `vocab_size` or larger.
        """
        largest = 0
        for start in range(0, self.count, 1 << 24):
            largest = max(largest, int(self.tokens[start : start + (1 << 24)].max()))
        if largest >= vocab_size:
            raise InputError(
                f"Token ids from 0 to {vocab_size - 1} were expected in {self.path}. "
                f"Received: {largest}. Encode the text with this model's tokenizer."
            )


def write_token_file(
    path: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    on_progress: Callable[[int], None] | None = None,
    facts: dict | None = None,
) -> TokenFile:
    """Encode documents into a token file, whole or not at all.

    Documents are joined by the end-of-text token where the tokenizer has one. Ids
    are uint16 where the vocabulary fits, else uint32. Memory does not grow with
    the text.

    Args:
        path: Where to write; the manifest goes to the same name with `.json`.
        documents: The text.
        tokenizer: Turns it into ids.
        on_progress: Called with the number of tokens written so far.
        facts: More to record in the manifest.

    Returns:
        The file, opened.

    Raises:
        InputError: The documents hold no text.
    """
    path = Path(path)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest = hashlib.sha256()
    count = text_bytes = num_documents = 0
    with files.atomic_file(path) as file:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if document.ends and tokenizer.end_of_text_id is not None:
                    ids = [*ids, tokenizer.end_of_text_id]
                num_documents += document.ends
                text_bytes += len(document.text.encode("utf-8", "replace"))
                data = np.asarray(ids, dtype).tobytes()
                digest.update(data)
                file.write(data)
                count += len(ids)
            if on_progress is not None:
                on_progress(count)
        if not text_bytes:
            raise InputError(
                "A token file expects text. Received: documents without any."
            )
    manifest = {
        "kind": "tokens",
        "dtype": dtype.str,
        "count": count,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "documents": num_documents,
        "text_bytes": text_bytes,
        "size_bytes": count * dtype.itemsize,
        "sha256": digest.hexdigest(),
        "versions": files.versions(),
        **(facts or {}),
    }
    files.write_json(_manifest_path(path), manifest)
    return TokenFile.open(path, verify=False)


class Windows:
    """Batches of windows over tokens, each batch a function of its step.

    With `shuffle`, each epoch shifts all windows by a random offset and visits them
    in a random order, computed without a table of all windows. Without, windows
    follow each other, every token is the target once, and the end is padded with
    tokens of weight 0.

    Args:
        tokens: A `TokenFile` or ids `(N,)`.
        context_length: `T`, tokens per window, at least 1.
        batch_size: `B`, windows per batch, at least 1.
        seed: Decides offsets and order.
        shuffle: Whether for training (True) or for measuring (False).

    Raises:
        InputError: The text is shorter than a window.

    Example:
        >>> x, y, weights = Windows(np.arange(100), 8, 4, seed=1).batch(step=0)
        >>> bool((x[:, 1:] == y[:, :-1]).all())
        True
    """

    def __init__(self, tokens, context_length, batch_size, *, seed=0, shuffle=True):
        self.token_file = tokens if isinstance(tokens, TokenFile) else None
        self.tokens = tokens.tokens if self.token_file else np.asarray(tokens)
        for name, value in (
            ("context_length", context_length),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise InputError(f"`{name}` expects at least 1. Received: {value}.")
        self.context_length = int(context_length)
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.shuffle = bool(shuffle)
        count = len(self.tokens)
        if count < 2 or (shuffle and count < self.context_length + 1):
            raise InputError(
                f"The context of {context_length} tokens is longer than the text, "
                f"which has {count}. Give more text or a shorter context."
            )
        if shuffle:
            self.num_windows = max(1, count // self.context_length - 1)
        else:
            self.num_windows = -(-(count - 1) // self.context_length)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the text."""
        if self.shuffle:
            return max(1, self.num_windows // self.batch_size)
        return -(-self.num_windows // self.batch_size)

    def batch(self, step: int, shard: int = 0, num_shards: int = 1):
        """Return the batch of a step.

        Args:
            step: Any step from 0.
            shard: Which part of the batch.
            num_shards: Number of equal parts.

        Returns:
            Inputs `(B, T)` int32, targets `(B, T)` int32, and weights `(B, T)`
            float32, 0 where padded.
        """
        rows = self.batch_size // num_shards
        first = shard * rows
        if self.shuffle:
            return self._random(step, first, rows)
        return self._ordered(step, first, rows)

    def _random(self, step, first, rows):
        epoch, position = divmod(int(step), self.steps_per_epoch)
        length, count = self.context_length, len(self.tokens)
        slack = count - 1 - self.num_windows * length
        key = np.random.SeedSequence([self.seed, epoch]).generate_state(6, np.uint32)
        offset = int(key[0]) % (slack + 1)
        places = position * self.batch_size + first + np.arange(rows)
        chosen = permute(places % self.num_windows, self.num_windows, key[1:])
        starts = offset + chosen.astype(np.int64) * length
        block = self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)
        return (
            np.ascontiguousarray(block[:, :-1]),
            np.ascontiguousarray(block[:, 1:]),
            np.ones((rows, length), np.float32),
        )

    def _ordered(self, step, first, rows):
        length = self.context_length
        x = np.zeros((rows, length), np.int32)
        y = np.zeros((rows, length), np.int32)
        weights = np.zeros((rows, length), np.float32)
        position = int(step) % self.steps_per_epoch
        for row in range(rows):
            start = (position * self.batch_size + first + row) * length
            piece = self.tokens[start : start + length + 1].astype(np.int32)
            size = max(0, len(piece) - 1)
            x[row, :size] = piece[:-1][:size]
            y[row, :size] = piece[1:]
            weights[row, :size] = 1.0
        return x, y, weights

    def dataset(
        self,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
        repeat: bool = True,
        num_shards: int = 1,
        shard: int = 0,
    ) -> tf.data.Dataset:
        """Return the batches from a step on as a dataset for `fit`.

        Args:
            start_step: The first step, so that a resumed run goes on exactly.
            num_steps: Number of batches; None takes one epoch, or all there are to
                come with `repeat`.
            repeat: Whether the text is visited again and again.
            num_shards: Number of workers among which each batch is divided.
            shard: Which of them this one is.

        Returns:
            A dataset of inputs, targets and weights, each `(B / num_shards, T)`.

        Raises:
            InputError: The batch cannot be divided so.
        """
        if self.batch_size % num_shards:
            raise InputError(
                f"The batch of {self.batch_size} is to be divided among {num_shards} "
                f"workers. Use a batch size that is a multiple of {num_shards}."
            )
        if num_steps is None:
            num_steps = tf.int64.max - start_step if repeat else self.steps_per_epoch
        shape = (self.batch_size // num_shards, self.context_length)
        kinds = (tf.int32, tf.int32, tf.float32)

        def load(step):
            tensors = tf.numpy_function(
                lambda step: self.batch(step, shard, num_shards), [step], kinds
            )
            return tuple(tf.ensure_shape(tensor, shape) for tensor in tensors)

        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF
        )
        dataset = tf.data.Dataset.range(start_step, start_step + num_steps)
        return dataset.map(load).prefetch(4).with_options(options)


def permute(values: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Map 0..size-1 onto itself in a random order, without a table.

    A Feistel network over the next even power of two, applied again where the
    result falls outside.

    Args:
        values: Integers from 0 to `size - 1`.
        size: Number of values, at least 1.
        key: Random uint32s, the rounds' keys.

    Returns:
        The images, uint64, shaped as `values`.

    Reference: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    CT-RSA 2002.
    """
    half = max(1, ((int(size) - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    bits = np.uint64(half)
    result = np.asarray(values, np.uint64).copy()
    outside = np.ones(result.shape, bool)
    while outside.any():
        x = result[outside]
        left, right = x >> bits, x & mask
        for k in key:
            left, right = right, left ^ (_mix(right + np.uint64(k)) & mask)
        result[outside] = (left << bits) | right
        outside = result >= size
    return result


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _batches(documents: Iterable[Document]):
    """Gather documents until there is enough text to encode at once."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
