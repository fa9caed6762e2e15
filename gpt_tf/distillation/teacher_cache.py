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
from collections.abc import Callable
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

    64 hexadecimal digits of configuration and weights; the name has no part.
    """
    config = {key: v for key, v in model.get_config().items() if key != "name"}
    digest = hashlib.sha256(artifacts.to_json(config, sort_keys=True).encode())
    for variable in model.weights:
        value = variable.numpy()
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


class KnowledgeStore:
    """A teacher's top-k probabilities of every token of a text, read as needed.

    Attributes:
        path: The folder.
        manifest: What `extract` recorded.
        top_k: `k`, the number of probabilities of each next token.
        passes: How often the text was cut into windows.
        mapping: `"same"` tokenizer as the teacher's, `"derived"` from it, or
            `"sorted"`.
        has_ids: Whether it says which tokens the probabilities are of.
        context_length: `T`, the length of the teacher's windows in its own tokens.
        bytes_per_token: Size of a record: what one pass takes for each token.
        size_bytes: Size of all passes together.

    Example:
        >>> store = extract(teacher, tokens, "knowledge", tokenizer=tokenizer)
        >>> windows = KnowledgeStore.open("knowledge").windows(tokens, batch_size=8)
        >>> distiller = Distiller(teacher=None, student=student)
        >>> distiller.fit(windows.dataset(), steps_per_epoch=windows.steps_per_epoch)
    """

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.manifest = manifest
        self.top_k = manifest["top_k"]
        self.passes = manifest["passes"]
        self.mapping = manifest["mapping"]
        self.has_ids = self.mapping != "sorted"
        self.context_length = manifest["context_length"]
        self.bytes_per_token = manifest["bytes_per_token"]
        self.size_bytes = sum(e["size_bytes"] for e in manifest["files"].values())
        rows = (self.passes, manifest["count"] - 1)
        width = self.top_k
        self._codes = np.memmap(path / _CODES, "u1", "r", shape=(*rows, width + 1))
        if self.has_ids:
            dtype = _id_type(manifest)
            self._ids = np.memmap(path / _IDS, dtype, "r", shape=(*rows, width))

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = True) -> "KnowledgeStore":
        """Open the store in the folder that `extract` wrote.

        Args:
            path: The folder.
            verify: Whether to compare its bytes with the manifest's SHA-256, for
                which all of it is read; sizes are compared always.

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

    def check_fits(
        self, *, token_file, tokenizer=None, teacher=None, context_length=None
    ) -> None:
        """Refuse a store that is about something else.

        Args:
            token_file: The student's training text, a `TokenFile`.
            tokenizer: The student's. None here and below: it does not matter.
            teacher: The teacher that the knowledge should be of.
            context_length: Of the student's windows.

        Raises:
            InputError: The store is of another text, tokenizer, teacher or context.
        """
        if not isinstance(token_file, TokenFile):
            raise InputTypeError(
                "`token_file` expects the TokenFile that the knowledge was extracted "
                f"from. Received: {type(token_file).__name__}. Use `TokenFile.open`."
            )
        found = {}
        if tokenizer is not None:
            found["tokenizer"] = "tokenizer_fingerprint", tokenizer.fingerprint()
        found["text"] = "tokens_sha256", token_file.manifest["sha256"]
        if teacher is not None:
            found["teacher"] = "teacher_fingerprint", fingerprint_of(teacher)
        for what, (key, received) in found.items():
            if self.manifest[key] != received:
                raise InputError(
                    f"The knowledge in {self.path} expects the {what} that it was "
                    f"extracted with. Received: another {what} (SHA-256 "
                    f"{received[:12]}, not {self.manifest[key][:12]}). Use that one, "
                    "or extract the knowledge again."
                )
        if self.mapping == "same" and context_length not in (None, self.context_length):
            raise InputError(
                f"The knowledge in {self.path} is of windows of {self.context_length} "
                f"tokens. Received: context_length={context_length}. What the teacher "
                "says depends on what it sees: use the same, or extract it with that "
                "context."
            )

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

    def windows(self, token_file: TokenFile, batch_size: int, **options):
        """Return the `KnowledgeWindows` of this store."""
        return KnowledgeWindows(self, token_file, batch_size, **options)


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
        token_file: The text that it is about, in the student's tokens.
        batch_size: As for `Windows`.
        context_length: `T` of the student. With the teacher's tokenizer it is the
            store's; with another, any.
        seed: As for `Windows`.

    Raises:
        InputError: The store is of another text or context.
    """

    def __init__(self, store, token_file, batch_size, *, context_length=None, seed=0):
        store.check_fits(token_file=token_file, context_length=context_length)
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
    check_language_model(teacher, "teacher")
    if tokenizer.vocab_size > teacher.vocab_size:
        raise InputError(
            f"A tokenizer of at most the teacher's {teacher.vocab_size} tokens was "
            f"expected. Received: one of {tokenizer.vocab_size}. Use the teacher's."
        )
    length = teacher.context_length
    if context_length is not None:
        length = arguments.integer("context_length", context_length, 1, length)
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
    plan, make = _reading(facts, teacher, token_file.tokens, mapping)
    windows = [-(-(stop - start) // length) for _, start, stop in plan]
    done = list(itertools.accumulate(windows))

    def tell(steps):
        if on_progress is not None:
            on_progress(done[steps - 1], done[-1])

    every = max(1, _PART_WINDOWS // batch_size)
    fill(path, facts, sizes, len(plan), make, every, overwrite=overwrite, tell=tell)
    return KnowledgeStore.open(path, verify=False)


def _facts_of_text(tokenizer, token_file, whose=""):
    return {
        f"{whose}count": token_file.count,
        f"{whose}tokens_sha256": token_file.manifest["sha256"],
        f"{whose}tokenizer_fingerprint": tokenizer.fingerprint(),
    }


def _reading(facts, teacher, tokens, mapping):
    """Return the batches of a text, and a function that makes the records of one.

    A batch is the offset of its pass, its first position and its end.
    """
    length, rows = facts["context_length"], facts["batch_size"]
    positions, sizes = len(tokens) - 1, _record_bytes(facts)
    plan = [
        (offset, start, min(start + length * rows, positions))
        for offset in facts["offsets"]
        for start in range(offset, positions, length * rows)
    ]
    forward = _compiled(teacher, mapping, rows, length)

    def make(step):
        offset, start, stop = plan[step]
        batch = np.zeros(rows * length, np.int32)
        batch[: stop - start] = tokens[start:stop]
        with tf.device(placement.device_of(teacher)):
            outputs = forward(tf.constant(batch.reshape(rows, length)))
        outputs = [tensor.numpy()[: stop - start] for tensor in outputs]
        ids, codes = mapping.records(start, *outputs)
        if start == offset:
            before = records.unknown(mapping.settled(start), mapping.top_k)
            ids, codes = map(np.concatenate, zip(before, (ids, codes), strict=True))
        arrays = {_IDS: ids.astype(_id_type(facts)), _CODES: codes}
        return {name: arrays[name] for name in sizes}

    return plan, make


def fill(
    path, facts, record_bytes, num_steps, make, every, *, overwrite=False, tell=None
):
    """Fill a store with the records of each step; it takes its place when it is whole.

    Every few steps they are forced to disk, and only then counted. What an interrupted
    call counted is gone on with by the next one of the same facts.

    Args:
        path: Final place.
        facts: What is being made, and from what, as JSON values, for the manifest too.
        record_bytes: Bytes of one record, by the name of the file.
        num_steps: Number of steps.
        make: A function of a step that returns arrays by the name of the file.
        every: Number of steps between counts.
        overwrite: Whether a folder that stands at `path` gives way.
        tell: Called after each step with the number that are done.

    Raises:
        InputError: As for `artifacts.atomic_folder`.
    """
    facts = artifacts.parse_json(artifacts.to_json(facts))
    with (
        artifacts.atomic_folder(path, replace=overwrite, keep=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        for other in set(os.listdir(folder)) - {*record_bytes}:
            os.unlink(folder / other)
        # Beside the folder, since it is not to stay.
        progress = folder.parent.parent / "progress.json"
        files = {
            name: stack.enter_context(open(folder / name, "ab"))
            for name in record_bytes
        }
        begun, count = _begun(progress, facts, folder, record_bytes)
        for name, file in files.items():
            file.truncate(count * record_bytes[name])
            file.seek(0, os.SEEK_END)
        for steps in range(begun + 1, num_steps + 1):
            for name, array in make(steps - 1).items():
                files[name].write(np.ascontiguousarray(array).tobytes())
            if steps % every == 0 or steps == num_steps:
                for name, file in files.items():
                    file.flush()
                    os.fsync(file.fileno())
                    count = file.tell() // record_bytes[name]
                made = {"facts": facts, "steps": steps, "records": count}
                artifacts.write_json(progress, made)
            if tell is not None:
                tell(steps)
        artifacts.write_manifest(folder, KIND, list(record_bytes), **facts)


def _begun(progress, facts, folder, record_bytes):
    """Return the steps and records that an interrupted `fill` counted."""
    shape = {"facts": dict, "steps": int, "records": int}
    try:
        found = artifacts.read_json(progress, shape)
    except DamagedFileError:
        return 0, 0
    if found["facts"] != facts:
        logger.info(f"{folder.name} was begun from other things: it starts anew")
        return 0, 0
    for name, size in record_bytes.items():
        if (folder / name).stat().st_size < found["records"] * size:
            logger.info(f"{folder.name} lacks bytes of {name}: it starts anew")
            return 0, 0
    logger.info(f"going on with {folder.name} after {found['records']:,} records")
    return found["steps"], found["records"]


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
    is_same = own_tokenizer.fingerprint() == tokenizer.fingerprint()
    derived = is_derived(tokenizer, own_tokenizer)
    told = teacher if is_same else own_tokenizer if derived else tokenizer
    if top_k > told.vocab_size:
        raise InputError(
            f"`top_k` expects at most {told.vocab_size}, the size of the vocabulary. "
            f"Received: {top_k}."
        )
    if is_same:
        if own_file.manifest["sha256"] != token_file.manifest["sha256"]:
            raise InputError(
                "`student` expects the text that the teacher reads. Received: "
                f"{own_file.path}, which holds other tokens than {token_file.path}. "
                "Encode the same documents with both tokenizers."
            )
        return records.SameVocabulary(top_k, teacher.vocab_size)
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
    shape = {**dict.fromkeys(_SIZES, int), **dict.fromkeys(_COMPARED, str)}
    artifacts.check_shape(
        manifest,
        {**shape, "count": int, "offsets": [int], "mapping": str},
        path / artifacts.MANIFEST_NAME,
    )
    count = manifest["passes"] * (manifest["count"] - 1)
    found = {name: e["size_bytes"] for name, e in manifest["files"].items()}
    offsets = manifest["offsets"]
    if not (
        all(manifest[key] > 0 for key in _SIZES)
        and count > 0
        and found == {name: n * count for name, n in _record_bytes(manifest).items()}
        and len(offsets) == manifest["passes"]
        and all(0 <= offset < manifest["context_length"] for offset in offsets)
    ):
        raise DamagedFileError(
            f"{path} is no {KIND} of this version of gpt_tf. Extract it again."
        )


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
