"""Token files on disk, and the windows over them that training sees.

A token file is a flat array of ids, memory-mapped, with a manifest beside it. A
batch of windows is a pure function of file, seed and step, so that training resumes
at any step, workers agree without talking, and nothing grows with the corpus.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.settings import arguments
from gpt_tf.text.augment import AugmentationConfig, Augmenter
from gpt_tf.text.corpus import Document
from gpt_tf.text.rng import permute
from gpt_tf.text.tokenizer import Tokenizer

# The label of a token that does not count, as in Hugging Face's libraries.
IGNORED = -100

# Text encoded at once, and the longest part of it that one thread encodes: they
# bound the memory, and let all processors take part in a long document.
_ENCODE_CHARACTERS = 1 << 20
_PART_CHARACTERS = 1 << 17

# Tokens of the batches that one call from tf.data makes: the call costs more than
# a small batch.
_CALL_TOKENS = 1 << 15


class TokenFile:
    """A memory-mapped array of token ids.

    Attributes:
        path: The file.
        tokens: Ids `(count,)`, uint16 or uint32, read from disk as needed.
        manifest: What `write_token_file` recorded.

    Example:
        >>> train = TokenFile.open("runs/quickstart/data/train.tokens")
        >>> train.count == len(train.tokens)
        True
    """

    def __init__(self, path: Path, tokens: np.ndarray, manifest: dict):
        self.path = path
        self.tokens = tokens
        self.manifest = manifest

    @property
    def count(self) -> int:
        """Number of tokens."""
        return int(self.manifest["count"])

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text that the tokens stand for."""
        return int(self.manifest["text_bytes"])

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = True) -> "TokenFile":
        """Open a token file.

        Args:
            path: The file that `write_token_file` wrote.
            verify: Whether to compare its bytes with the manifest's SHA-256, for
                which the whole file is read; its size is compared always.

        Raises:
            DamagedFileError: File or manifest is missing, truncated or altered.
        """
        path = arguments.path("path", path)
        manifest = artifacts.read_json(_manifest_path(path))
        _check_token_manifest(manifest, _manifest_path(path))
        dtype, size = np.dtype(manifest["dtype"]), manifest["size_bytes"]
        if not path.is_file():
            raise DamagedFileError(f"Expected a token file at {path}; there is none.")
        is_other = path.stat().st_size != size or (
            verify and artifacts.sha256_of(path) != manifest["sha256"]
        )
        if is_other:
            raise DamagedFileError(
                f"{path} does not have the bytes that its manifest states: it was "
                "truncated or altered. Prepare the corpus again."
            )
        return cls(path, np.memmap(path, dtype, mode="r"), manifest)

    def check_fits(self, vocab_size: int) -> None:
        """Refuse ids of `vocab_size` or more by an `InputError`."""
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
        facts: More to record in the manifest, as JSON values.

    Example:
        >>> documents = [Document("a", "to be"), Document("b", "or not to be")]
        >>> tokenizer = CharacterTokenizer.train(d.text for d in documents)
        >>> write_token_file("some.tokens", documents, tokenizer).count
        19
    """

    def encoded():
        for batch in _batches(documents):
            texts = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, texts, strict=True):
                if document.ends and tokenizer.end_of_text_id is not None:
                    ids = [*ids, tokenizer.end_of_text_id]
                size = len(document.text.encode("utf-8", "replace"))
                yield ids, size, document.ends

    return _write_ids(path, encoded(), tokenizer, facts or {})


def write_rows(
    path: str | os.PathLike,
    rows: Sequence[Sequence[Sequence[int]]],
    tokenizer: Tokenizer,
    *,
    facts: dict | None = None,
) -> TokenFile:
    """Write rows of ids into a token file, for `RowWindows`; as `write_token_file`.

    Args:
        path: Where to write; the manifest goes to the same name with `.json`.
        rows: Each row's ids in parts, of which the first is read, the second learnt,
            and so on in turn. The manifest holds their lengths as `rows`.
        tokenizer: The ids are its.
        facts: More to record in the manifest, as JSON values.
    """

    def encoded():
        for row in rows:
            ids = [token for part in row for token in part]
            yield ids, len(tokenizer.decode_bytes(ids)), True

    lengths = [[len(part) for part in row] for row in rows]
    return _write_ids(path, encoded(), tokenizer, {**(facts or {}), "rows": lengths})


def _write_ids(path, encoded, tokenizer, facts):
    """Write ids that come with the bytes of their text, and whether it ends."""
    path = Path(path)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest = hashlib.sha256()
    count = text_bytes = num_documents = 0
    beside = _manifest_path(path).name
    with artifacts.replaced(path, beside) as new:
        with open(new / path.name, "wb") as file:
            for ids, size, ends in encoded:
                num_documents += ends
                text_bytes += size
                data = np.asarray(ids, dtype).tobytes()
                digest.update(data)
                file.write(data)
                count += len(ids)
        if not text_bytes:
            raise InputError(
                "A token file expects text. Received: documents without any."
            )
        manifest = {
            **facts,
            "kind": "tokens",
            "dtype": dtype.str,
            "count": count,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "documents": num_documents,
            "text_bytes": text_bytes,
            "size_bytes": count * dtype.itemsize,
            "sha256": digest.hexdigest(),
            "versions": artifacts.versions(),
        }
        artifacts.write_json(new / beside, manifest)
    return TokenFile.open(path, verify=False)


class Windows:
    """Batches of windows over tokens, each batch a function of its step.

    With `shuffle`, each epoch shifts all windows by a random offset and visits them
    in a random order, but for those that do not fill its last batch; with
    `augmentation` it reads them otherwise, too. Without `shuffle`, windows follow each
    other, every token is the target once, and the end is padded. A target that is
    padding, or that cannot be known, is -100 and has the weight 0.

    Args:
        tokens: A `TokenFile` or integer ids `(N,)`.
        context_length: `T`, tokens per window, at least 1.
        batch_size: `B`, windows per batch over all shards, at least 1.
        seed: Decides offsets and order; 0 or more.
        shuffle: Whether for training (True) or for measuring (False).
        augmentation: An `AugmentationConfig`, or a dict of its fields, for training
            only; None shifts windows and changes nothing in them.
        tokenizer: The text's, where the augmentation changes windows.

    Attributes:
        num_windows: Windows in one pass over the text.
        steps_per_epoch: Batches in one pass over the text.
        largest_offset: How far an epoch may shift its windows, in tokens.

    Example:
        >>> x, y, weights = Windows(np.arange(100), 8, 4, seed=1).batch(step=0)
        >>> bool((x[:, 1:] == y[:, :-1]).all())
        True

    Reference: article 6.4 for `augmentation`.
    """

    # What `_batches` returns of each token: types, and shapes after `(B, T)`.
    _kinds = ((tf.int32, ()), (tf.int32, ()), (tf.float32, ()))

    def __init__(
        self,
        tokens,
        context_length,
        batch_size,
        *,
        seed=0,
        shuffle=True,
        augmentation=None,
        tokenizer=None,
    ):
        self.token_file = tokens if isinstance(tokens, TokenFile) else None
        self.tokens = tokens.tokens if self.token_file else np.asarray(tokens)
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise InputError(
                "`tokens` expects a TokenFile or integer ids of shape (N,). Received: "
                f"{self.tokens.dtype} of shape {self.tokens.shape}."
            )
        self.context_length = arguments.integer("context_length", context_length, 1)
        self.batch_size = arguments.integer("batch_size", batch_size, 1)
        self.seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
        self.shuffle = arguments.switch("shuffle", shuffle)
        count = len(self.tokens)
        if count < self.context_length + 1:
            raise InputError(
                f"The context of {context_length} tokens and the token after it are "
                f"longer than the text, which has {count} tokens. Give more text or "
                "a shorter context."
            )
        if self.shuffle:
            # One window fewer than fit, so that there is room for the offset.
            self.num_windows = max(1, count // self.context_length - 1)
            self.largest_offset = count - 1 - self.num_windows * self.context_length
        else:
            self.num_windows = -(-(count - 1) // self.context_length)
            self.largest_offset = 0
        self.augmentation = AugmentationConfig.of(augmentation)
        self._augmenter = None
        if augmentation is not None and not self.shuffle:
            raise InputError(
                "`augmentation` expects windows for training. Received: shuffle=False, "
                "windows for measuring, which read the text as it stands. Leave it out."
            )
        if self.augmentation.changes_windows:
            arguments.instance("tokenizer", tokenizer, Tokenizer, "that of the tokens")
            self._augmenter = Augmenter(
                self.augmentation, tokenizer, self.tokens, context_length, self.seed
            )

    @property
    def steps_per_epoch(self) -> int:
        if self.shuffle:
            return max(1, self.num_windows // self.batch_size)
        return -(-self.num_windows // self.batch_size)

    def batch(self, step: int, shard: int = 0, num_shards: int = 1):
        """Return the batch of any step from 0, or one of `num_shards` parts of it.

        Returns:
            Inputs `(B, T)` int32, targets `(B, T)` int32, and weights `(B, T)`
            float32; of several shards, each has `B / num_shards` rows.

        Raises:
            InputError: The step is negative, or the batch cannot be divided so.
        """
        step = arguments.integer("step", step)
        self._check_shard(shard, num_shards)
        arrays = self._batches(step, step + 1, shard, num_shards)
        return self._element(*(array[0] for array in arrays))

    # A subclass that brings more than tokens changes these, and `_kinds`.

    def _offset(self, epoch, random):
        """Return by how many tokens an epoch shifts its windows."""
        if not self.augmentation.random_offsets:
            return 0
        return random % (self.largest_offset + 1)

    def _beside(self, epoch, starts):
        """Return more arrays `(steps, B, T, ...)` of the windows that start there."""
        return ()

    def _element(self, x, y, weights):
        """Return arrays or tensors in the structure that `fit` takes."""
        return x, y, weights

    def _batches(self, start, stop, shard, num_shards):
        """Return the batches of several steps, stacked on a new first axis."""
        rows = self.batch_size // num_shards
        pieces = []
        while start < stop:
            epoch, position = divmod(int(start), self.steps_per_epoch)
            steps = min(int(stop - start), self.steps_per_epoch - position)
            first = (position + np.arange(steps)) * self.batch_size + shard * rows
            places = first[:, None] + np.arange(rows)  # (steps, B)
            make = self._shuffled if self.shuffle else self._in_order
            x, y, weights, *others = make(epoch, places)
            y = np.where(weights > 0.0, y, np.int32(IGNORED))
            pieces.append((x, y, weights, *others))
            start += steps
        if len(pieces) == 1:
            return pieces[0]
        return tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))

    def _shuffled(self, epoch, places):
        length = self.context_length
        key = np.random.SeedSequence([self.seed, epoch]).generate_state(6, np.uint32)
        offset = self._offset(epoch, int(key[0]))
        # A text of less than a batch is visited more than once in it.
        chosen = permute(places % self.num_windows, self.num_windows, key[1:])
        starts = offset + chosen.astype(np.int64) * length
        if self._augmenter is not None:
            x, y, weights = self._augmenter.read(epoch, places, starts)
        else:
            ids = self.tokens[starts[..., None] + np.arange(length + 1)]
            ids = ids.astype(np.int32)
            weights = np.ones((*places.shape, length), np.float32)
            x = np.ascontiguousarray(ids[..., :-1])
            y = np.ascontiguousarray(ids[..., 1:])
        return x, y, weights, *self._beside(epoch, starts)

    def _in_order(self, epoch, places):
        length, last = self.context_length, len(self.tokens) - 1
        targets = places[..., None] * length + np.arange(1, length + 1)
        is_text = targets <= last
        targets = np.minimum(targets, last)
        x = np.where(is_text, self.tokens[targets - 1], 0).astype(np.int32)
        y = np.where(is_text, self.tokens[targets], 0).astype(np.int32)
        return x, y, is_text.astype(np.float32)

    def _check_shard(self, shard, num_shards):
        arguments.integer("num_shards", num_shards, 1)
        if self.batch_size % num_shards:
            raise InputError(
                f"The batch of {self.batch_size} is to be divided among {num_shards} "
                f"workers. Use a batch size that is a multiple of {num_shards}."
            )
        arguments.integer("shard", shard, 0, num_shards - 1)

    def dataset(
        self,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
        repeat: bool = True,
        num_shards: int = 1,
        shard: int = 0,
    ) -> tf.data.Dataset:
        """Return the batches from a step on, in a fixed order, as a dataset for `fit`.

        `MirroredStrategy` divides each among its replicas.

        Args:
            start_step: The first step, so that a resumed run goes on exactly.
            num_steps: Number of batches; None takes all there are to come.
            repeat: Whether epoch follows epoch without end. If not, the dataset
                ends with the epoch of `start_step` at the latest.
            num_shards: Number of workers among which each batch is divided.
            shard: Which of them this one is.

        Returns:
            A dataset of inputs, targets and weights, each `(B / num_shards, T)`.

        Example:
            >>> windows = Windows(np.arange(100), context_length=8, batch_size=4)
            >>> model.fit(windows.dataset(), steps_per_epoch=windows.steps_per_epoch)
        """
        start_step = arguments.integer("start_step", start_step)
        num_steps = arguments.integer("num_steps", num_steps, or_none=True)
        repeat = arguments.switch("repeat", repeat)
        self._check_shard(shard, num_shards)
        if not repeat:
            rest = self.steps_per_epoch - start_step % self.steps_per_epoch
            num_steps = rest if num_steps is None else min(num_steps, rest)
        rows = self.batch_size // num_shards
        stride = max(1, _CALL_TOKENS // (rows * self.context_length))
        stop_step = tf.int64.max if num_steps is None else start_step + num_steps
        starts = tf.data.Dataset.range(start_step, stop_step, stride)

        def make(start):
            stop = min(start + stride, stop_step)
            return self._batches(start, stop, shard, num_shards)

        def load(start):
            types, shapes = zip(*self._kinds, strict=True)
            tensors = tf.numpy_function(make, [start], types)
            shaped = (
                tf.ensure_shape(tensor, (None, rows, self.context_length, *more))
                for tensor, more in zip(tensors, shapes, strict=True)
            )
            return self._element(*shaped)

        count = tf.data.INFINITE_CARDINALITY if num_steps is None else num_steps
        dataset = starts.map(load).unbatch()
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(count))
        options = tf.data.Options()
        options.deterministic = True
        # There is nothing to tune, and the end of an iterator waits for the thread
        # that would.
        options.autotune.enabled = False
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF
        )
        return dataset.prefetch(4).with_options(options)


class RowWindows(Windows):
    """Batches of rows, one a window, of which the answers alone are learnt.

    A window is as long as the longest row, and the others are padded on the right. An
    epoch visits the rows in a random order, but for those that do not fill its last
    batch; without `shuffle`, in theirs. A target that is read and not learnt, like one
    that is padding, is -100 and has the weight 0.

    Args:
        token_file: A `TokenFile` that `write_rows` wrote.
        batch_size: `B`, rows per batch over all shards, at least 1.
        seed: Decides the order; 0 or more.
        shuffle: Whether for training (True) or for measuring (False).
        answers_only: Whether inputs are `(ids, places)`, and targets and weights are
            those of `places (B, K)`, the positions whose targets are learnt and, where
            a row has fewer than `K`, others. A model then need not score the rest.

    Attributes:
        num_windows: Number of rows.
        context_length: `T`, tokens of the longest row but the last one.
        is_learnt: Of each token of the file, whether it is part of an answer.

    Raises:
        DamagedFileError: The manifest states no rows, or others than the file holds.

    Example:
        >>> x, y, weights = RowWindows(token_file, 4).batch(step=0)
        >>> bool((y[weights == 0] == -100).all())
        True
    """

    _kinds = (*Windows._kinds, (tf.int32, ()))

    def __init__(
        self, token_file, batch_size, *, seed=0, shuffle=True, answers_only=False
    ):
        self.token_file, self.tokens = token_file, token_file.tokens
        rows = token_file.manifest.get("rows")
        path = _manifest_path(token_file.path)
        artifacts.check_shape(rows, [[int]], path)
        parts = [length for row in rows for length in row]
        is_learnt = [index % 2 == 1 for row in rows for index, _ in enumerate(row)]
        if not rows or min(parts, default=-1) < 0 or sum(parts) != token_file.count:
            raise DamagedFileError(
                f"{path} states other rows than its token file holds. Prepare the "
                "data again."
            )
        sizes = np.array([sum(row) for row in rows], np.int64)
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self.is_learnt = np.repeat(is_learnt, parts)
        self.num_windows = len(rows)
        self.context_length = max(1, int(sizes.max()) - 1)
        self.largest_offset = 0
        # Of each row, but for its first token, which is no target.
        before = np.concatenate([[0], np.cumsum(self.is_learnt)])
        learnt = before[self._starts + sizes] - before[self._starts + 1]
        self.num_places = max(1, int(learnt.max())) if answers_only else None
        self.batch_size = arguments.integer("batch_size", batch_size, 1)
        self.seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
        self.shuffle = arguments.switch("shuffle", shuffle)

    @property
    def longest_row(self) -> np.ndarray:
        """Ids of the longest row."""
        place = int(self._sizes.argmax())
        return self.tokens[self._starts[place] :][: self._sizes[place]]

    def _element(self, x, y, weights, places):
        count = self.num_places
        if count is None:
            return x, y, weights
        return (x, places[..., :count]), y[..., :count], weights[..., :count]

    def _shuffled(self, epoch, places):
        key = np.random.SeedSequence([self.seed, epoch]).generate_state(5, np.uint32)
        chosen = permute(places % self.num_windows, self.num_windows, key)
        return self._padded(chosen.astype(np.int64), True)

    def _in_order(self, epoch, places):
        is_row = places < self.num_windows
        return self._padded(np.where(is_row, places, 0), is_row[..., None])

    def _padded(self, rows, is_row):
        """Return inputs, targets, weights and places `(..., T)` of rows `(...)`."""
        places = np.arange(self.context_length + 1)
        is_inside = (places < self._sizes[rows][..., None]) & is_row
        at = np.where(is_inside, self._starts[rows][..., None] + places, 0)
        ids = np.where(is_inside, self.tokens[at], 0).astype(np.int32)
        weights = (is_inside & self.is_learnt[at]).astype(np.float32)
        x, y, weights = ids[..., :-1], ids[..., 1:], weights[..., 1:]
        order = np.broadcast_to(np.arange(self.context_length), x.shape)
        if self.num_places is not None:
            order = np.argsort(weights == 0.0, axis=-1, kind="stable")
            y, weights = (np.take_along_axis(a, order, -1) for a in (y, weights))
        arrays = (x, y, weights, order.astype(np.int32))
        return tuple(map(np.ascontiguousarray, arrays))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Gather documents until there is enough text to encode at once."""
    batch, size = [], 0
    for document in documents:
        for part in _parts(document):
            batch.append(part)
            size += len(part.text)
            if size >= _ENCODE_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(document: Document) -> Iterator[Document]:
    """Cut a long document, at line ends where there are any."""
    text, start = document.text, 0
    while len(text) - start > _PART_CHARACTERS:
        stop = text.rfind("\n", start, start + _PART_CHARACTERS) + 1
        stop = stop or start + _PART_CHARACTERS
        yield Document(document.name, text[start:stop], ends=False)
        start = stop
    yield Document(document.name, text[start:], document.ends)


def _manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


_TOKEN_MANIFEST = {
    **dict.fromkeys(("kind", "dtype", "sha256", "tokenizer_fingerprint"), str),
    **dict.fromkeys(("count", "size_bytes", "vocab_size", "text_bytes"), int),
}


def _check_token_manifest(manifest, path: Path) -> None:
    artifacts.check_shape(manifest, _TOKEN_MANIFEST, path)
    bytes_each = {"<u2": 2, "<u4": 4}.get(manifest["dtype"], 0)
    if not (
        manifest["kind"] == "tokens"
        and manifest["count"] * bytes_each == manifest["size_bytes"] > 0
        and manifest["vocab_size"] > 0
        and manifest["text_bytes"] > 0
    ):
        raise DamagedFileError(
            f"{path} is no sound manifest of a token file. Prepare the corpus again."
        )
