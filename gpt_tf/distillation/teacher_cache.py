"""What a teacher predicts of a text, computed once and kept in a folder.

    extract(teacher, ...) -> KnowledgeStore -> windows(...) -> Distiller.fit

Of every next token the store keeps the teacher's `k` most probable ones, in 97 bytes
where `k` is 32. Students then train without the teacher, as often as wanted.

    manifest.json   what was extracted, of which text, from which teacher
    ids.bin         (passes, N, k)      token ids, uint16 or uint32
    codes.bin       (passes, N, k + 1)  probabilities and what remains, uint8

`N` is the number of positions that predict a token of the text. `ids.bin` is missing
where only the sorted probabilities are kept. A pass is the whole text, cut into the
teacher's windows anew, so that its positions see another context.
"""

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from gpt_tf import artifacts
from gpt_tf.distillation import top_k as records
from gpt_tf.distillation.tokenizer_alignment import VocabularyMap, align, is_derived
from gpt_tf.distillation.top_k import log_probabilities_of
from gpt_tf.errors import DamagedFileError, InputError, InputTypeError
from gpt_tf.models import placement, xla
from gpt_tf.models.language_model import check_language_model
from gpt_tf.settings import arguments
from gpt_tf.text.dataset import TokenFile, Windows
from gpt_tf.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

KIND = "knowledge"
_IDS, _CODES = "ids.bin", "codes.bin"

_SIZES = ("top_k", "vocab_size", "passes", "context_length", "bytes_per_token")
_COMPARED = ("tokenizer_fingerprint", "tokens_sha256", "teacher_fingerprint")

# Windows after which what was extracted is forced to disk.
_PART_WINDOWS = 256


def fingerprint_of(model) -> str:
    """Return a SHA-256 that two models share only if they compute the same.

    Args:
        model: A `GPTModel`, or a `QuantizationAwareGPT`.

    Returns:
        64 hexadecimal digits, of configuration and weights; the name has no part.
    """
    config = {key: v for key, v in model.get_config().items() if key != "name"}
    digest = hashlib.sha256(artifacts.to_json(config, sort_keys=True).encode())
    for variable in model.weights:
        value = variable.numpy()
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


class KnowledgeStore:
    """What a teacher says of every token of a text, read from disk as needed.

    Attributes:
        path: The folder.
        manifest: What `extract` recorded.

    Example:
        >>> store = extract(teacher, tokens, "knowledge", tokenizer=tokenizer)
        >>> windows = KnowledgeStore.open("knowledge").windows(tokens, batch_size=8)
        >>> distiller = Distiller(teacher=None, student=student)
        >>> distiller.fit(windows.dataset(), steps_per_epoch=windows.steps_per_epoch)
    """

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.manifest = manifest
        rows = (self.passes, manifest["count"] - 1)
        width = self.top_k
        self._codes = np.memmap(path / _CODES, "u1", "r", shape=(*rows, width + 1))
        self._ids = None
        if self.has_ids:
            dtype = _id_type(manifest)
            self._ids = np.memmap(path / _IDS, dtype, "r", shape=(*rows, width))

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = True) -> "KnowledgeStore":
        """Open a store.

        Args:
            path: The folder that `extract` wrote.
            verify: Whether to compare its bytes with the manifest's SHA-256, for
                which all of it is read; sizes are compared always.

        Returns:
            The store, opened for reading.

        Raises:
            DamagedFileError: It is missing, unfinished, truncated or altered.
        """
        path = Path(path)
        if not path.exists() and artifacts.partial_path(path).exists():
            raise DamagedFileError(
                f"Expected a {KIND} in {path}. Received: one whose extraction was "
                "interrupted. Extract again with the same options to go on with it."
            )
        manifest = artifacts.check_manifest(path, KIND, verify=verify)
        _check_sound(manifest, path)
        return cls(path, manifest)

    @property
    def top_k(self) -> int:
        """`k`, the number of probabilities of each next token."""
        return self.manifest["top_k"]

    @property
    def passes(self) -> int:
        """How often the text was cut into windows."""
        return self.manifest["passes"]

    @property
    def mapping(self) -> str:
        """`"same"` tokenizer as the teacher's, `"derived"` from it, or `"sorted"`."""
        return self.manifest["mapping"]

    @property
    def has_ids(self) -> bool:
        """Whether it says which tokens the probabilities are of."""
        return self.mapping != "sorted"

    @property
    def context_length(self) -> int:
        """`T`, the length of the teacher's windows in its own tokens."""
        return self.manifest["context_length"]

    @property
    def bytes_per_token(self) -> int:
        """Size of a record: what one pass takes for each token."""
        return self.manifest["bytes_per_token"]

    @property
    def size_bytes(self) -> int:
        """Size of all passes together."""
        return sum(entry["size_bytes"] for entry in self.manifest["files"].values())

    def check_fits(
        self,
        *,
        token_file: TokenFile,
        tokenizer: Tokenizer,
        teacher=None,
        context_length: int | None = None,
    ) -> None:
        """Refuse a store that is about something else.

        Args:
            token_file: The student's training text.
            tokenizer: The student's.
            teacher: The teacher that the knowledge should be of, if that matters.
            context_length: Of the student's windows, as for `windows`.

        Raises:
            InputError: The store is of another text, tokenizer, teacher or context.
        """
        self._compare("tokenizer_fingerprint", tokenizer.fingerprint(), "tokenizer")
        self._check_text(token_file)
        if teacher is not None:
            self._compare("teacher_fingerprint", fingerprint_of(teacher), "teacher")
        self._check_context(context_length)

    def read(self, pass_index: int, positions) -> tuple[np.ndarray, np.ndarray]:
        """Read records.

        Args:
            pass_index: 0 to `passes - 1`.
            positions: `(...)` integers: position `j` predicts token `j + 1`.

        Returns:
            ids: `(..., k)` int32, falling in probability; ids of which the codes say
                nothing may be repeated. Ranks 0 to `k - 1` where the store holds
                sorted probabilities only.
            codes: `(..., k + 1)` uint8 for `log_probabilities_of`, the last of the
                remaining mass.
        """
        codes = self._codes[pass_index, positions]
        if not self.has_ids:
            shape = (*codes.shape[:-1], self.top_k)
            return np.broadcast_to(np.arange(self.top_k, dtype=np.int32), shape), codes
        return self._ids[pass_index, positions].astype(np.int32), codes

    def windows(
        self,
        token_file: TokenFile,
        batch_size: int,
        *,
        context_length: int | None = None,
        seed: int = 0,
    ) -> "KnowledgeWindows":
        """Return training windows that bring the teacher's knowledge.

        Args:
            token_file: The text that the store is about, in the student's tokens.
            batch_size: `B`, windows per batch, at least 1.
            context_length: `T` of the student. With the teacher's tokenizer it is
                the store's; with another, any.
            seed: Decides the order, 0 or more.

        Raises:
            InputError: The store is of another text or context.
        """
        return KnowledgeWindows(
            self, token_file, batch_size, context_length=context_length, seed=seed
        )

    def _check_text(self, token_file):
        if not isinstance(token_file, TokenFile):
            raise InputTypeError(
                "`token_file` expects the TokenFile that the knowledge was extracted "
                f"from. Received: {type(token_file).__name__}. Use `TokenFile.open`."
            )
        self._compare("tokens_sha256", token_file.manifest["sha256"], "text")

    def _check_context(self, context_length):
        if self.mapping != "same" or context_length in (None, self.context_length):
            return
        raise InputError(
            f"The knowledge in {self.path} is of windows of {self.context_length} "
            f"tokens. Received: context_length={context_length}. What the teacher says "
            "depends on what it sees: use the same, or extract it with that context."
        )

    def _compare(self, key, received, what):
        if self.manifest[key] != received:
            raise InputError(
                f"The knowledge in {self.path} expects the {what} that it was "
                f"extracted with. Received: another {what} (SHA-256 "
                f"{received[:12]}, not {self.manifest[key][:12]}). Use that one, or "
                "extract the knowledge again."
            )


class KnowledgeWindows(Windows):
    """Shuffled training windows with the teacher's knowledge of each token.

    Epoch `e` reads pass `e % passes`. With the teacher's tokenizer its windows are
    exactly the teacher's, so that the student sees what the teacher saw. With another
    they are cut anywhere.

    `batch` returns and `dataset` yields a dict, targets and weights. In the dict are
    `"tokens"` `(B, T)` int32, `"teacher_log_probs"` `(B, T, k + 1)` float32 and, where
    the store has them, `"teacher_ids"` `(B, T, k)` int32.

    Args:
        store: A `KnowledgeStore`.
        token_file: The text that it is about.
        batch_size: As for `Windows`.
        context_length: As for `KnowledgeStore.windows`.
        seed: As for `Windows`.

    Raises:
        InputError: The store is of another text or context.
    """

    def __init__(self, store, token_file, batch_size, *, context_length=None, seed=0):
        store._check_text(token_file)
        store._check_context(context_length)
        super().__init__(
            token_file, context_length or store.context_length, batch_size, seed=seed
        )
        self.store = store
        beside = [(tf.int32, (store.top_k,)), (tf.uint8, (store.top_k + 1,))]
        self._kinds = (*Windows._kinds, *beside[not store.has_ids :])

    def batch(self, step, shard=0, num_shards=1):
        element = super().batch(step, shard, num_shards)
        return tf.nest.map_structure(np.asarray, element)

    def _offset(self, epoch, random):
        if self.store.mapping == "same":
            return self.store.manifest["offsets"][epoch % self.store.passes]
        return super()._offset(epoch, random)

    def _beside(self, epoch, starts):
        positions = starts[..., None] + np.arange(self.context_length)
        found = self.store.read(epoch % self.store.passes, positions)
        return found if self.store.has_ids else found[1:]

    def _element(self, x, y, weights, *beside):
        inputs = {"tokens": x, "teacher_log_probs": log_probabilities_of(beside[-1])}
        if self.store.has_ids:
            inputs["teacher_ids"] = beside[0]
        return inputs, y, weights


def extract(
    teacher,
    token_file: TokenFile,
    path: str | os.PathLike,
    *,
    tokenizer: Tokenizer,
    context_length: int | None = None,
    top_k: int = 32,
    passes: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    student: tuple[Tokenizer, TokenFile] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> KnowledgeStore:
    """Store what a teacher says of every token of a text.

    After an interruption, call it again with the same arguments: it goes on where
    it stopped, to the same bytes. `path` appears when all is there.

    Args:
        teacher: A trained `GPTModel`, or a quantisation-aware one.
        token_file: The text in the teacher's tokens.
        path: Folder of the store.
        tokenizer: The teacher's.
        context_length: `T`, length of the windows; the teacher's unless given.
        top_k: `k`, probabilities to keep, 1 to the size of the vocabulary.
        passes: How often the text is cut anew, at least 1. Each pass has an offset
            of its own, from which on there is knowledge; the first has offset 0.
        batch_size: `B`, windows computed at once, at least 1.
        seed: Decides the offsets, 0 or more.
        student: Tokenizer of the student and the text in its tokens, if they are not
            the teacher's. The store is then about the student's tokens.
        on_progress: Called with the number of windows done and that of all.
        overwrite: Whether a store that stands at `path` gives way.

    Returns:
        The store, opened.

    Raises:
        InputError: Something stands at `path`, texts and tokenizers do not belong
            together, or a number is out of its range.
        InputTypeError: The teacher is no GPT of this package.

    Example:
        >>> tokens = TokenFile.open("runs/teacher/data/train.tokens")
        >>> extract(teacher, tokens, "knowledge", tokenizer=tokenizer).bytes_per_token
        97
    """
    path = arguments.path("path", path)
    _check_teacher(teacher, tokenizer, context_length)
    passes = arguments.integer("passes", passes, 1)
    top_k = arguments.integer("top_k", top_k, 1)
    batch_size = arguments.integer("batch_size", batch_size, 1)
    seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
    overwrite = arguments.switch("overwrite", overwrite)
    artifacts.settle(path)
    _check_place(path, overwrite)
    own = student or (tokenizer, token_file)
    for pair in ((tokenizer, token_file), own):
        _check_written_with(*pair)
    mapping = _mapping(teacher, tokenizer, token_file, *own, top_k)
    length = int(context_length or teacher.context_length)
    facts = {
        "mapping": mapping.name,
        "top_k": top_k,
        "vocab_size": mapping.vocab_size,
        "passes": passes,
        "offsets": _offsets(mapping.name, token_file, length, passes, seed),
        "context_length": length,
        "batch_size": batch_size,
        "seed": seed,
        "teacher_fingerprint": fingerprint_of(teacher),
        **_facts_of_text(tokenizer, token_file, "teacher_"),
        **_facts_of_text(*own),
    }
    sizes = _record_bytes(facts)
    facts["bytes_per_token"] = sum(sizes.values())
    megabytes = facts["bytes_per_token"] * passes * (facts["count"] - 1) / 1e6
    logger.info(f"{facts['bytes_per_token']} bytes a token, {megabytes:,.1f} MB in all")
    with unfinished(path, facts, sizes, overwrite=overwrite) as store:
        _fill(store, facts, teacher, token_file.tokens, mapping, on_progress)
    return KnowledgeStore.open(path, verify=False)


def _facts_of_text(tokenizer, token_file, whose=""):
    return {
        f"{whose}count": token_file.count,
        f"{whose}tokens_sha256": token_file.manifest["sha256"],
        f"{whose}tokenizer_fingerprint": tokenizer.fingerprint(),
    }


def _fill(store, facts, teacher, tokens, mapping, on_progress):
    """Let the teacher read the text from where the store ends, and write it down."""
    length, rows = facts["context_length"], facts["batch_size"]
    plan = list(_plan(len(tokens) - 1, facts["offsets"], length * rows))
    windows = [-(-(stop - start) // length) for _, start, stop in plan]
    done = list(itertools.accumulate(windows))
    forward = _compiled(teacher, mapping, rows, length)
    part = max(1, _PART_WINDOWS // rows)
    for index in range(store.steps, len(plan)):
        offset, start, stop = plan[index]
        if start == offset:
            _write(store, facts, records.unknown(mapping.settled(start), mapping.top_k))
        batch = np.zeros(rows * length, np.int32)
        batch[: stop - start] = tokens[start:stop]
        with tf.device(placement.device_of(teacher)):
            outputs = forward(tf.constant(batch.reshape(rows, length)))
        outputs = [tensor.numpy()[: stop - start] for tensor in outputs]
        _write(store, facts, mapping.records(start, *outputs))
        if (index + 1) % part == 0 or index + 1 == len(plan):
            store.save(index + 1)
        if on_progress is not None:
            on_progress(done[index], done[-1])


def _plan(positions, offsets, size) -> Iterator[tuple[int, int, int]]:
    """Yield the offset of the pass, first position and end of each batch."""
    for offset in offsets:
        for start in range(offset, positions, size):
            yield offset, start, min(start + size, positions)


def _write(store, facts, made):
    ids, codes = made
    arrays = {_IDS: ids.astype(_id_type(facts)), _CODES: codes}
    store.write(**{name: arrays[name] for name in _record_bytes(facts)})


def _compiled(teacher, mapping, rows, length):
    """Return a function of tokens `(B, T)` that gives `mapping.outputs` of them."""

    def run(tokens):
        logits = tf.cast(teacher(tokens, training=False), tf.float32)
        logits = tf.reshape(logits, [-1, logits.shape[-1]])  # (B * T, V)
        return mapping.outputs(logits)

    specification = tf.TensorSpec([rows, length], tf.int32)
    return xla.compiled(run).get_concrete_function(specification)


def _mapping(teacher, tokenizer, token_file, own_tokenizer, own_file, top_k):
    """Choose how the teacher's probabilities become records of the student."""
    if own_tokenizer.fingerprint() == tokenizer.fingerprint():
        if own_file.manifest["sha256"] != token_file.manifest["sha256"]:
            raise InputError(
                "`student` expects the text that the teacher reads. Received: "
                f"{own_file.path}, which holds other tokens than {token_file.path}. "
                "Encode the same documents with both tokenizers."
            )
        _check_top_k(top_k, teacher.vocab_size)
        return records.SameVocabulary(top_k, teacher.vocab_size)
    derived = is_derived(tokenizer, own_tokenizer)
    _check_top_k(top_k, (own_tokenizer if derived else tokenizer).vocab_size)
    alignment = align(token_file.tokens, own_file.tokens, tokenizer, own_tokenizer)
    if derived:
        vocabulary_map = VocabularyMap(tokenizer, own_tokenizer)
        return records.DerivedVocabulary(
            top_k, vocabulary_map, own_file.tokens, alignment
        )
    sizes = tokenizer.vocab_size, own_tokenizer.vocab_size
    return records.SortedProbabilities(top_k, alignment, *sizes)


def _offsets(mapping, token_file, length, passes, seed) -> list[int]:
    """Return where the windows of each pass begin, all different if there is room."""
    room = min(length, token_file.count - 1)
    if mapping == "same":
        # The student's windows, which are to be the same ones, fill the text so far.
        room = min(room, Windows(token_file, length, 1).largest_offset + 1)
    others = 1 + np.random.default_rng(seed).permutation(room - 1)
    return np.resize([0, *others], passes).tolist()


def _id_type(facts) -> np.dtype:
    return np.dtype("<u2" if facts["vocab_size"] <= 1 << 16 else "<u4")


def _record_bytes(facts) -> dict[str, int]:
    """Return the size of a record in each file that a store has."""
    sizes = {_CODES: facts["top_k"] + 1}
    if facts["mapping"] != "sorted":
        sizes[_IDS] = facts["top_k"] * _id_type(facts).itemsize
    return sizes


@contextlib.contextmanager
def unfinished(
    path: Path, facts: dict, record_bytes: dict[str, int], *, overwrite: bool = False
) -> Iterator["Unfinished"]:
    """Fill a store that takes its place, with a manifest, when the block ends well.

    What an interrupted block left is gone on with by the next one of the same facts.

    Args:
        path: Final place.
        facts: What is being made, and from what, as JSON values, for the manifest too.
            A store that was begun with other facts is begun anew.
        record_bytes: Bytes of one record, by the name of the file.
        overwrite: Whether a folder that stands at `path` gives way.

    Yields:
        The store in the making.

    Raises:
        InputError: As for `artifacts.atomic_folder`.

    Example:
        >>> with unfinished(Path("squares"), {"power": 2}, {"values": 8}) as store:
        ...     for step in range(store.steps, 100):
        ...         store.write(values=np.array([step**2]))
        ...         store.save(step + 1)
    """
    with artifacts.atomic_folder(path, replace=overwrite, keep=True) as folder:
        for other in set(os.listdir(folder)) - {*record_bytes}:
            os.unlink(folder / other)
        with contextlib.ExitStack() as stack:
            opened = {
                name: stack.enter_context(open(folder / name, "ab"))
                for name in record_bytes
            }
            # Beside the folder, since it is not to stay.
            progress = folder.parent.parent / "progress.json"
            yield Unfinished(path, opened, progress, facts, record_bytes)
        artifacts.write_manifest(folder, KIND, list(record_bytes), **facts)


class Unfinished:
    """Files that grow record by record, in a folder that is not whole yet.

    Now and then `save` forces them to disk and only then counts what they hold. What
    stands after that when the work was interrupted is cut off, and done again.

    Attributes:
        steps: Number of steps that were saved.
    """

    def __init__(self, path, opened, progress, facts, record_bytes):
        self._open = opened
        self._progress = progress
        self._facts = artifacts.parse_json(artifacts.to_json(facts))
        self._record_bytes = record_bytes
        self.steps, self._saved = self._begun(path)
        for name, file in opened.items():
            file.truncate(self._saved * record_bytes[name])
            file.seek(0, os.SEEK_END)

    def write(self, **arrays: np.ndarray) -> None:
        """Append records: for each file an array whose bytes are to be written."""
        for name, array in arrays.items():
            self._open[name].write(np.ascontiguousarray(array).tobytes())

    def save(self, steps: int) -> None:
        """Force to disk what was written, and count it.

        Args:
            steps: Number of steps that are done.
        """
        for name, file in self._open.items():
            file.flush()
            os.fsync(file.fileno())
            self._saved = file.tell() // self._record_bytes[name]
        self.steps = steps
        artifacts.write_json(
            self._progress,
            {"facts": self._facts, "steps": steps, "records": self._saved},
        )

    def _begun(self, path):
        """Return the steps and records that an interrupted work left."""
        try:
            progress = artifacts.read_json(self._progress)
            facts, steps = progress["facts"], progress["steps"]
            count = progress["records"]
        except (DamagedFileError, KeyError, TypeError):
            return 0, 0
        if facts != self._facts:
            logger.info(f"{path} was begun from other things: it starts anew")
            return 0, 0
        for name, file in self._open.items():
            if file.seek(0, os.SEEK_END) < count * self._record_bytes[name]:
                logger.info(f"what there is of {path} lacks bytes: it starts anew")
                return 0, 0
        if steps:
            logger.info(f"going on with {path} after {count:,} records")
        return steps, count


def _check_place(path, overwrite):
    """Refuse to write where something stands that must stay."""
    if not path.exists():
        return
    if not overwrite:
        raise InputError(
            f"A new folder of {KIND} was to be written at {path}, but something stands "
            "there. Choose another name, or pass `overwrite` to replace it."
        )
    is_ours = path.is_dir() and not any(path.iterdir())
    with contextlib.suppress(DamagedFileError):
        manifest = artifacts.read_json(path / artifacts.MANIFEST_NAME)
        is_ours |= isinstance(manifest, dict) and manifest.get("kind") == KIND
    if not is_ours:
        raise InputError(
            f"Only {KIND} can be overwritten at {path}. Received: something that "
            "gpt_tf did not write there. Remove it, or choose another name."
        )


def _check_sound(manifest, path):
    """Refuse a manifest that is whole but not as this version writes it."""
    numbers = ("passes", "count", "top_k", "vocab_size", "context_length")
    shape = {name: int for name in (*numbers, "batch_size", "seed", "bytes_per_token")}
    artifacts.check_shape(
        manifest,
        {**shape, "offsets": [int], "mapping": str},
        path / artifacts.MANIFEST_NAME,
    )
    try:
        count = manifest["passes"] * (manifest["count"] - 1)
        found = {name: e["size_bytes"] for name, e in manifest["files"].items()}
        sizes = {name: n * count for name, n in _record_bytes(manifest).items()}
        offsets, length = manifest["offsets"], manifest["context_length"]
        is_sound = (
            all(manifest[key] > 0 for key in _SIZES)
            and count > 0
            and found == sizes
            and len(offsets) == manifest["passes"]
            and all(0 <= n < length for n in offsets)
            and all(isinstance(manifest[key], str) for key in _COMPARED)
        )
    except (AttributeError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise DamagedFileError(
            f"{path} is no {KIND} of this version of gpt_tf. Extract it again."
        )


def _check_teacher(teacher, tokenizer, context_length):
    check_language_model(teacher, "teacher")
    if tokenizer.vocab_size > teacher.vocab_size:
        raise InputError(
            f"A tokenizer of at most the teacher's {teacher.vocab_size} tokens was "
            f"expected. Received: one of {tokenizer.vocab_size}. Use the teacher's."
        )
    most = teacher.context_length
    arguments.integer("context_length", context_length, 1, most, or_none=True)


def _check_written_with(tokenizer, token_file):
    if not isinstance(token_file, TokenFile):
        raise InputTypeError(
            "Knowledge is extracted from a TokenFile. Received: "
            f"{type(token_file).__name__}. Use `TokenFile.open` or `write_token_file`."
        )
    if token_file.manifest["tokenizer_fingerprint"] != tokenizer.fingerprint():
        raise InputError(
            f"{token_file.path} expects the tokenizer that it was written with. "
            f"Received: another one, of {tokenizer.vocab_size} tokens. Encode the text "
            "with this tokenizer first."
        )


def _check_top_k(top_k, vocab_size):
    if top_k > vocab_size:
        raise InputError(
            f"`top_k` expects at most {vocab_size}, the size of the vocabulary. "
            f"Received: {top_k}."
        )
