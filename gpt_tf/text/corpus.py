"""Where text comes from: the user's files, Python's own sources, or Shakespeare.

Every corpus yields documents, split into train and validation so that no text is
on both sides. Files are read one at a time and long ones in pieces, so that a
corpus may be larger than memory.
"""

import codecs
import dataclasses
import hashlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_tf.errors import DamagedFileError, InputError

SPLITS = ("train", "validation")
PIECE_BYTES = 4 << 20

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
    "tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


class CorpusWarning(UserWarning):
    """Something in a corpus was left out or replaced."""


class Document(NamedTuple):
    """A piece of text.

    Attributes:
        name: File it comes from, relative to the corpus.
        text: The text.
        ends: False where the same file goes on in the next document, so that no
            end-of-text token belongs between them.
    """

    name: str
    text: str
    ends: bool = True


class _Part(NamedTuple):
    """Bytes `start` to `stop` of a file; `stop` None is its end."""

    name: str
    path: Path
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass
class Corpus:
    """Documents in two splits.

    Attributes:
        name: What it is called in manifests and messages.
        parts: For each split, the files or parts of files it holds.
        facts: More about it for manifests.
        on_notice: Takes one-line notices about the text.
    """

    name: str
    parts: dict[str, list[_Part]]
    facts: dict
    on_notice: Callable[[str], None]

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of `"train"` or `"validation"`, in a fixed order."""
        if split not in SPLITS:
            raise InputError(f"A split is one of {SPLITS}. Received: {split!r}.")
        for part in self.parts[split]:
            yield from _read(part, self.on_notice)

    def describe(self) -> dict:
        """Return name, sizes and a fingerprint over all names and bytes."""
        digest = hashlib.sha256()
        total = 0
        names = {part.name: part.path for s in SPLITS for part in self.parts[s]}
        for name, path in sorted(names.items()):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            with open(path, "rb") as file:
                while piece := file.read(PIECE_BYTES):
                    total += len(piece)
                    digest.update(piece)
        return {
            "name": self.name,
            "files": len(names),
            "size_bytes": total,
            "sha256": digest.hexdigest(),
            **self.facts,
        }


def open_corpus(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    validation_fraction: float = 0.1,
    on_notice: Callable[[str], None] | None = None,
) -> Corpus:
    """Open a corpus by name or by path.

    Args:
        source: `"python-stdlib"`, the sources of the running interpreter's standard
            library without its tests; `"shakespeare"`, downloaded and checked; or
            one or more paths of UTF-8 files and folders.
        validation_fraction: Share of the text to hold out, in (0, 1). Files are
            assigned by a hash of their name; a corpus of one file is cut at a line.
        on_notice: Takes notices about what was skipped or replaced; a
            `CorpusWarning` is issued unless given.

    Returns:
        A `Corpus` with text in both splits.

    Raises:
        InputError: A path is missing, empty, or binary, or there is no text.

    Example:
        >>> corpus = open_corpus("python-stdlib")
        >>> next(corpus.documents("validation")).name.endswith(".py")
        True
    """
    if not 0.0 < validation_fraction < 1.0:
        raise InputError(
            "`validation_fraction` expects a share between 0 and 1. "
            f"Received: {validation_fraction}."
        )
    notice = on_notice or (lambda line: warnings.warn(line, CorpusWarning, 3))
    facts = {}
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    sources = [str(item) for item in source]
    if sources == ["python-stdlib"]:
        name, found = "python-stdlib", _stdlib_files()
        facts["python"] = sys.version.split()[0]
    elif sources == ["shakespeare"]:
        path = download_shakespeare()
        name, found = "shakespeare", [_Part("shakespeare.txt", path)]
    else:
        if not sources:
            raise InputError(
                "A corpus expects at least one path. Received: none. Name files or "
                "folders, or use python-stdlib."
            )
        name = ", ".join(Path(item).name or item for item in sources)
        found = [part for item in sources for part in _user_files(Path(item), notice)]
    if len({part.path.resolve() for part in found}) < len(found):
        unique = {part.path.resolve(): part for part in reversed(found)}
        found = [part for part in found if unique[part.path.resolve()] is part]
    parts = _split(found, validation_fraction)
    corpus = Corpus(name, parts, facts, notice)
    _require_text(corpus)
    return corpus


def download_shakespeare(
    url: str = SHAKESPEARE_URL, sha256: str = SHAKESPEARE_SHA256
) -> Path:
    """Fetch the tiny Shakespeare text, or find it where Keras stored it before.

    Args:
        url: Where to fetch it.
        sha256: What its bytes must be.

    Returns:
        Path of the file.

    Raises:
        InputError: It cannot be fetched.
        DamagedFileError: What came is something else.
    """
    import tf_keras as keras

    try:
        path = keras.utils.get_file("gpt_tf_shakespeare.txt", url)
    except Exception as error:
        raise InputError(
            f"The corpus shakespeare could not be downloaded from {url}: {error}. "
            "Without a network use `python-stdlib` or a file of your own."
        ) from None
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != sha256:
        Path(path).unlink()
        raise DamagedFileError(
            f"The text from {url} should have the SHA-256 {sha256}. Received: {found}. "
            "It was removed; try again, or use a file of your own."
        )
    return Path(path)


def _stdlib_files() -> list[_Part]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _TEST_FOLDERS | _FOREIGN_FOLDERS
            and not name.startswith((".", "config-"))
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and path.stat().st_size:
                found.append(_Part(path.relative_to(root).as_posix(), path))
    if not found:
        raise InputError(
            f"Expected the sources of Python's standard library in {root}; there are "
            "none. This Python ships without them: use files of your own."
        )
    return found


def _user_files(path: Path, notice) -> list[_Part]:
    if not path.exists():
        raise InputError(
            f"The corpus expects a file or folder at {path}; there is none. "
            "Check the path, or use python-stdlib."
        )
    if not path.is_dir():
        if not path.stat().st_size:
            raise InputError(f"The corpus expects text in {path}, but it is empty.")
        if _is_binary(path):
            raise InputError(
                f"The corpus expects UTF-8 text in {path}, but it is a binary file. "
                "Convert it to text first."
            )
        return [_Part(path.name, path)]
    found, binary = [], []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith(".") or not file.is_file() or not file.stat().st_size:
                continue
            if _is_binary(file):
                binary.append(file)
                continue
            relative = file.relative_to(path).as_posix()
            found.append(_Part(f"{path.name}/{relative}", file))
    if binary:
        notice(f"{len(binary)} binary files were skipped, {binary[0]} first")
    if not found:
        raise InputError(
            f"The corpus expects text files in {path}; there are none. "
            "Name a folder that holds UTF-8 text."
        )
    return found


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def _split(found: list[_Part], fraction: float) -> dict[str, list[_Part]]:
    if len(found) == 1:
        part = found[0]
        cut = _line_end(part.path, int(part.path.stat().st_size * (1 - fraction)))
        return {
            "train": [part._replace(stop=cut)],
            "validation": [part._replace(start=cut)],
        }
    shares = {part: _share(part.name) for part in found}
    held = {part for part in found if shares[part] < fraction}
    ranked = sorted(found, key=lambda part: (shares[part], part.name))
    if not held:
        held = {ranked[0]}
    elif len(held) == len(found):
        held.discard(ranked[-1])
    return {
        "train": [part for part in found if part not in held],
        "validation": [part for part in found if part in held],
    }


def _share(name: str) -> float:
    """Map a name to [0, 1), the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _line_end(path: Path, near: int) -> int:
    """Return the offset after the line that holds byte `near`, or a character's."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(near)
        rest = file.read(PIECE_BYTES)
    end = rest.find(b"\n")
    if end >= 0 and near + end + 1 < size:
        return near + end + 1
    skip = 0
    while skip < len(rest) and rest[skip] & 0xC0 == 0x80:
        skip += 1
    return max(1, min(near + skip, size - 1)) if size > 1 else size


def _read(part: _Part, notice) -> Iterator[Document]:
    """Yield a file as documents of bounded size, cut at line ends where it can."""
    stop = part.path.stat().st_size if part.stop is None else part.stop
    damage = _Damage()
    decoder = codecs.getincrementaldecoder("utf-8")(errors=damage.handler)
    pending = ""
    with open(part.path, "rb") as file:
        file.seek(part.start)
        offset = part.start
        while offset < stop:
            data = file.read(min(PIECE_BYTES, stop - offset))
            if not data:
                break
            damage.offset = offset - len(decoder.getstate()[0])
            offset += len(data)
            text = decoder.decode(data, final=offset >= stop)
            if offset - len(data) == 0:
                text = text.removeprefix("\ufeff")
            pending += text
            if offset < stop:
                cut = pending.rfind("\n") + 1 or len(pending)
                if pending[:cut]:
                    yield Document(part.name, pending[:cut], ends=False)
                pending = pending[cut:]
    if damage.count:
        notice(
            f"{part.path}: {damage.count} undecodable bytes were replaced, the first "
            f"at offset {damage.first}"
        )
    yield Document(part.name, pending)


class _Damage:
    """A decoding error handler that replaces, counts and remembers the first."""

    def __init__(self):
        self.offset = 0
        self.count = 0
        self.first = None
        self.handler = f"gpt_tf_replace_{id(self)}"
        codecs.register_error(self.handler, self)

    def __call__(self, error):
        if self.first is None:
            self.first = self.offset + error.start
        self.count += error.end - error.start
        return "\ufffd", error.end


def _require_text(corpus: Corpus) -> None:
    quiet = dataclasses.replace(corpus, on_notice=lambda line: None)
    for split in SPLITS:
        if not any(document.text.strip() for document in quiet.documents(split)):
            raise InputError(
                f"The corpus {corpus.name} expects text for training and validation; "
                f"its {split} part holds nothing but white space. Give it more text."
            )
