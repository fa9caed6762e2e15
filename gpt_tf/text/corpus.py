"""Where text comes from: the user's files, Python's own sources, or Shakespeare.

Documents are split into train and validation so that no text is on both sides. Files
are read one at a time and long ones in pieces: a corpus may be larger than memory.
"""

import codecs
import collections
import dataclasses
import fnmatch
import hashlib
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.settings import arguments

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
PIECE_BYTES = 4 << 20
HEAD_BYTES = 8 << 10

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
    "tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Folders of the standard library that are no text to learn from. `encodings` and
# `pydoc_data` are generated tables, an eighth of it: of characters, and of help texts.
_LEFT_OUT = (
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__", "config-*"),
)

# How far the share that is held out may lie from the one asked for, in parts of the
# text: at most two points, and less where less than a tenth is to be on one side.
_TOLERANCE = 0.02
_MOST_ATTEMPTS = 100

# What a file's or folder's name says about the use of its text.
_USES = {
    **{"train": "train", "test": "test"},
    **dict.fromkeys(("valid", "val", "validation", "dev"), "validation"),
}
# A program's `train.py` or `test_it.py` says what it does, not what it is for.
_PROGRAM_SUFFIXES = {
    *(".py", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java"),
    *(".js", ".jsx", ".kt", ".php", ".rb", ".rs", ".sh", ".swift", ".ts", ".tsx"),
}

# What Python's `surrogateescape` makes of a byte that is not UTF-8.
_UNDECODABLE = re.compile("[\udc80-\udcff]")


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
    """Bytes `start` to `stop` of a file; `stop` None is its end.

    `use` is what its names say it is for: train, validation, test, or None.
    """

    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    use: str | None = None


class _Notices(list):
    """Lines about a text, each logged and kept once."""

    def add(self, line):
        if line not in self:
            self.append(line)
            logger.info(line)


@dataclasses.dataclass
class Corpus:
    """Documents in two splits.

    Attributes:
        name: What it is called in manifests and messages.
        parts: For each split, the files or parts of files it holds.
        facts: More about it for manifests.
        notices: What is worth knowing about the text, each line once.
        separator: Text between the documents of one file, or None.

    Example:
        >>> corpus = open_corpus("python-stdlib")
        >>> corpus.describe()["name"]
        'python-stdlib'
    """

    name: str
    parts: dict[str, list[_Part]]
    facts: dict
    notices: _Notices
    separator: str | None = None

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of `"train"` or `"validation"` in a fixed order.

        Raises:
            InputError: There is no such split, or a file cannot be read.
        """
        arguments.one_of("split", split, SPLITS)
        ended = 0
        for part in self.parts[split]:
            for document in _read(part, self.notices.add, self.separator):
                ended += document.ends
                yield document
        if self.separator and split == "train" and ended <= len(self.parts[split]):
            self.notices.add(
                f"the separator {self.separator!r} divides none of the files that "
                f"{self.name} has for training"
            )

    def describe(self) -> dict:
        """Describe the corpus for a manifest, for which all files are read once.

        Returns:
            `name`, `files`, `size_bytes`, and `sha256` over every file's name, size
            and bytes, wherever the files lie.
        """
        sources = {(part.name, part.path) for s in SPLITS for part in self.parts[s]}
        entries = sorted(
            (name, path.stat().st_size, artifacts.sha256_of(path))
            for name, path in sources
        )
        digest = hashlib.sha256()
        for name, size, sha256 in entries:
            digest.update(f"{size} {sha256} ".encode())
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        return {
            "name": self.name,
            "files": len(entries),
            "size_bytes": sum(size for _, size, _ in entries),
            "sha256": digest.hexdigest(),
            **self.facts,
        }


def open_corpus(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    validation_fraction: float = 0.1,
    validation: str | os.PathLike | None = None,
    separator: str | None = None,
    whole: bool = False,
) -> Corpus:
    """Open a corpus by name or by path, and divide it.

    The first of these that there is decides what is held out:

    1. `validation`.
    2. The files whose name says so, in a word of its own (`valid`, `val`,
       `validation` or `dev`, as in `wiki.valid.tokens`), or whose folder is called
       so. Files called `test` are left out then; without validation files they are
       what is held out. Programs (`test_it.py`) count by their folders only.
    3. `validation_fraction` of the bytes, within two points: whole files by a hash of
       their path in the folder, so that most stay in their split when others come and
       go, and the end of a large file where whole ones do not come near enough. It is
       cut after a separator or a line where one is near.

    Args:
        source: `"python-stdlib"`, the sources of the running interpreter's standard
            library without its tests and generated tables; `"shakespeare"`, downloaded
            and checked; or one or more paths of UTF-8 files and folders.
        validation_fraction: Share of the text to hold out, in (0, 1).
        validation: A file or folder whose text is held out; all of `source` but that,
            and what its names hold out, is for training.
        separator: Text that ends a document within a file, such as
            `"<|endoftext|>"`. It belongs to no document. None: a file is a document.
        whole: Whether all of `source` is held out, and none of it for training.

    Raises:
        InputError: A path is missing, empty, or binary, or a split has no text, or
            Shakespeare cannot be downloaded.

    Example:
        >>> corpus = open_corpus("python-stdlib")
        >>> next(corpus.documents("validation")).name.endswith(".py")
        True
    """
    validation_fraction = arguments.number(
        "validation_fraction", validation_fraction, above=0, below=1
    )
    validation = arguments.path("validation", validation, or_none=True)
    check_separator(separator)
    whole = arguments.switch("whole", whole)
    notices = _Notices()
    notice = notices.add
    facts = {} if separator is None else {"separator": separator}
    several = [source] if isinstance(source, (str, os.PathLike)) else source
    sources = [str(item) for item in arguments.paths("corpus", several)]
    if sources == ["python-stdlib"]:
        name, found = "python-stdlib", _without_copies(_stdlib_files())
        facts["python"] = sys.version.split()[0]
    elif sources == ["shakespeare"]:
        name, found = "shakespeare", [_Part("shakespeare.txt", download_shakespeare())]
    else:
        if not sources:
            arguments.refuse("corpus", source, "at least one path")
        names = (Path(item).name or item for item in sources)
        name = ", ".join(map(arguments.printable, names))
        found = _without_copies(_files_of(sources, notice), notice)
    if whole:
        parts = {"train": [], "validation": found}
    elif validation is not None:
        parts = _split_by_hand(found, _user_files(Path(validation), notice), notice)
    else:
        parts = _split_by_name(found, notice)
    if parts is None:
        parts = _split_by_share(found, validation_fraction, sources, separator)
        share = _held_share(parts)
        if abs(share - validation_fraction) > _TOLERANCE:
            notice(
                f"{share:.1%} of {name} is held out, where {validation_fraction:.1%} "
                "was asked for. To choose the text yourself, name it as `validation`"
            )
    corpus = Corpus(name, parts, facts, notices, separator)
    for split in SPLITS[whole:]:
        if not any(document.text.strip() for document in corpus.documents(split)):
            raise InputError(
                f"The corpus {name} expects text for training and validation; its "
                f"{split} part holds nothing but white space. Give it more text."
            )
    return corpus


def check_separator(separator: str | None) -> None:
    """Refuse what is neither a text of at least one character nor None."""
    if separator is not None and not (isinstance(separator, str) and separator):
        expected = "the text between two documents, at least one character, or None"
        arguments.refuse("separator", separator, expected)


def download_shakespeare(
    url: str = SHAKESPEARE_URL, sha256: str = SHAKESPEARE_SHA256
) -> Path:
    """Fetch the tiny Shakespeare text, or find it where Keras stored it before.

    Raises:
        InputError: It cannot be fetched, or what came has another SHA-256.

    Reference: Karpathy, char-rnn, `data/tinyshakespeare`.
    """
    import tf_keras as keras

    name = "gpt_tf_shakespeare.txt"
    try:
        return Path(keras.utils.get_file(name, url, file_hash=sha256))
    except Exception as error:
        raise InputError(
            f"The corpus shakespeare could not be downloaded from {url}: {error}. "
            "Without a network use `python-stdlib` or a file of your own."
        ) from None


# Finding files


def _stdlib_files() -> list[_Part]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        _Part(path.relative_to(root).as_posix(), path)
        for path in _walk(root, lambda line: None, _LEFT_OUT)
        if path.suffix == ".py" and _content(path) == "text"
    ]
    if not found:
        raise InputError(
            f"Expected the sources of Python's standard library in {root}; there are "
            "none. This Python ships without them: use files of your own."
        )
    return found


def _files_of(sources: list[str], notice) -> list[_Part]:
    """Return the files of the user's paths, with what their names say of their use."""
    found = []
    for item in sources:
        # Of several folders, each one's own name says something, too.
        above = f"{Path(item).name}/" if len(sources) > 1 else ""
        for part in _user_files(Path(item), notice):
            found.append(part._replace(use=_use_of(above + part.name)))
    return found


def _user_files(path: Path, notice) -> list[_Part]:
    try:
        if path.is_dir():
            return _folder_files(path, notice)
        if not path.is_file():
            what = "it is a device or a pipe" if path.exists() else "there is none"
            raise InputError(
                f"The corpus expects a file or folder at {path}; {what}. "
                "Check the path, or use python-stdlib."
            )
        content = _content(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if content != "text":
        raise InputError(
            f"The corpus expects UTF-8 text in {path}. Received: a {content} file. "
            "Name another one, or convert it to text first."
        )
    return [_Part(path.name, path)]


def _folder_files(path: Path, notice) -> list[_Part]:
    found, binary = [], []
    for file in _walk(path, notice):
        content = _content(file)
        if content == "text":
            found.append(_Part(file.relative_to(path).as_posix(), file))
        elif content == "binary":
            binary.append(file)
    if binary:
        notice(f"{len(binary)} binary files were skipped, {binary[0]} first")
    if not found:
        raise InputError(
            f"The corpus expects text files in {path}; there are none. "
            "Name a folder that holds UTF-8 text."
        )
    return found


def _walk(root: Path, notice, left_out: Sequence[str] = ()) -> Iterator[Path]:
    """Yield regular files in a fixed order, without hidden ones.

    Links to folders are not followed, so that a loop of links does no harm; nor are
    folders whose names fit a pattern in `left_out`.
    """
    folders = [root]  # no recursion: they may be nested deeper than Python's calls
    while folders:
        try:
            entries = sorted(os.scandir(folders.pop()), key=lambda entry: entry.name)
        except OSError as error:
            notice(f"{error.filename} cannot be read and was skipped: {error.strerror}")
            continue
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in entries:
            if (path := Path(entry.path)).is_file():
                yield path
        folders += [
            entry.path
            for entry in reversed(entries)
            if entry.is_dir(follow_symlinks=False)
            and not any(fnmatch.fnmatchcase(entry.name, name) for name in left_out)
        ]


def _content(path: Path) -> str:
    """Tell `"binary"`, `"blank"` and `"text"` apart by a file's first bytes."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if b"\0" in head:
        return "binary"
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    return "text" if text.strip() or len(head) == HEAD_BYTES else "blank"


def _without_copies(found: list[_Part], notice=None) -> list[_Part]:
    """Keep the first of files with the same bytes, or splits could share text."""
    sizes = [part.path.stat().st_size for part in found]
    count_of = collections.Counter(sizes)
    kept, copies, seen = [], [], set()
    for part, size in zip(found, sizes, strict=True):
        content = artifacts.sha256_of(part.path) if count_of[size] > 1 else part
        (copies if content in seen else kept).append(part)
        seen.add(content)
    if copies and notice:
        notice(
            f"{len(copies)} files were skipped as copies of others, "
            f"{copies[0].path} first"
        )
    return kept


# Splitting


def _split_by_hand(found, held, notice) -> dict[str, list[_Part]]:
    """Hold out the files that were named, and train on the others."""
    paths = {part.path.resolve() for part in held}
    others = [part for part in found if part.path.resolve() not in paths]
    different = _without_copies([*held, *others], notice)
    held = [part for part in different if part.path.resolve() in paths]
    others = [part for part in different if part.path.resolve() not in paths]
    train = [part for part in others if part.use in (None, "train")] or others
    left_out = [part for part in others if part not in train]
    if left_out:
        notice(f"{_named(left_out)} left out of training, by name")
    return {"train": train, "validation": held}


def _split_by_name(found, notice) -> dict[str, list[_Part]] | None:
    """Divide files as their names say, or return None where they say nothing."""
    used = {use: [part for part in found if part.use == use] for use in _USES.values()}
    train = [part for part in found if part.use in (None, "train")]
    held = used["validation"] or used["test"]
    if not (train and held):
        return None
    parts = {"train": train, "validation": held}
    left_out = used["test"] if used["validation"] else []
    notice(
        f"{_named(held)} held out, by name: {_held_share(parts):.1%} of the text"
        + (f"; {_named(left_out)} left out as test text" if left_out else "")
    )
    return parts


def _named(parts):
    more = f" and {len(parts) - 1} more files are" if len(parts) > 1 else " is"
    return parts[0].name + more


def _use_of(name: str) -> str | None:
    """Return what a path's names say its text is for: the file's, else a folder's."""
    *folders, file = name.lower().split("/")
    is_program = Path(file).suffix in _PROGRAM_SUFFIXES
    words = [] if is_program else re.split(r"[\W_]+", file)
    for names in (words, *([folder] for folder in reversed(folders))):
        uses = {_USES[word] for word in names if word in _USES}
        if len(uses) == 1:
            return uses.pop()
    return None


def _split_by_share(found, fraction, sources, separator) -> dict[str, list[_Part]]:
    """Hold out a share of the bytes: whole files, and the end of one if need be."""
    sizes = {part: part.path.stat().st_size for part in found}
    total = sum(sizes.values())
    wanted, slack = fraction * total, _tolerance(fraction) * total
    by_hash = {part: sizes[part] for part in found if _share(part.name) < fraction}
    held, size = set(by_hash), sum(by_hash.values())
    # What of the library is held out stays so in every version of it.
    is_near = abs(size - wanted) <= slack or sources == ["python-stdlib"]
    cut = {}
    if not (0 < size < total and is_near):
        held, size = _held_by_size(sizes, wanted, slack)
        if wanted - size > slack:
            largest = max((part for part in found if part not in held), key=sizes.get)
            # It is cut; so the small files beside it need not all be held out.
            some, some_size = _held_by_size(by_hash, wanted, slack)
            if largest not in some and sizes[largest] > wanted - some_size:
                held, size = some, some_size
            near = int(total * (1 - fraction) - (total - size - sizes[largest]))
            marks = [mark.encode() for mark in (separator, "\n") if mark]
            # nanoGPT cuts Shakespeare at the very character; so do published losses.
            marks = [] if sources == ["shakespeare"] else marks
            cut[largest] = _cut(largest.path, near, slack, marks)
    return {
        "train": [
            part._replace(stop=cut.get(part)) for part in found if part not in held
        ],
        "validation": [
            part._replace(start=cut.get(part, 0))
            for part in found
            if part in held or part in cut
        ],
    }


def _held_by_size(sizes, wanted, slack):
    """Return whole files whose bytes come near what is wanted, or else too few.

    They are taken in the order of their hash; where that leaves a gap, another one is
    the first.
    """
    ranked = sorted(sizes, key=lambda part: (_share(part.name), str(part.path)))
    tried = [(set(), 0)]
    for first in range(min(len(ranked), _MOST_ATTEMPTS)):
        held, size = set(), 0
        for part in ranked[first:] + ranked[:first]:
            grown = size + sizes[part]
            is_nearer = abs(grown - wanted) < abs(size - wanted)
            if is_nearer and grown <= wanted + slack and len(held) + 1 < len(ranked):
                held.add(part)
                size = grown
            elif wanted - size <= slack:
                return held, size
        tried.append((held, size))
    return max(tried, key=lambda attempt: attempt[1])


def _tolerance(fraction):
    return min(_TOLERANCE, fraction / 5, (1 - fraction) / 5)


def _held_share(parts):
    """Return the share of the bytes that is held out."""
    size = {
        split: sum(
            (part.path.stat().st_size if part.stop is None else part.stop) - part.start
            for part in parts[split]
        )
        for split in SPLITS
    }
    return size["validation"] / sum(size.values())


def _share(name: str) -> float:
    """Map a name to [0, 1), the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(path: Path, near: int, slack: float, marks: list[bytes]) -> int:
    """Return where to cut a file near a byte, with text on both sides.

    After a mark that is at most `slack` bytes away, one of the first kind that is
    there; else at a character.
    """
    with open(path, "rb") as file:
        start = max(0, near - PIECE_BYTES)
        file.seek(start)
        around = file.read(near - start + PIECE_BYTES)
    at_end = start + len(around) == path.stat().st_size
    last = len(around.rstrip()) if at_end else len(around)
    first = len(around) - len(around.lstrip()) if start == 0 else 0
    middle, ends = near - start, []
    for mark in marks:
        after = around.find(mark, max(first, middle - len(mark) + 1), last)
        before = around.rfind(mark, first, min(middle, last))
        ends = [place + len(mark) for place in (before, after) if place >= 0]
        ends.sort(key=lambda end: abs(end - middle))
        if ends and abs(ends[0] - middle) <= slack:
            return start + ends[0]
    cut = _character_start(path, near)
    if ends and not first < cut - start < last:
        return start + ends[0]
    return cut


def _character_start(path: Path, near: int) -> int:
    """Return the offset of the character that byte `near` belongs to."""
    with open(path, "rb") as file:
        start = max(0, near - 3)
        file.seek(start)
        before = file.read(near - start + 1)
    while near > start and before[near - start] & 0xC0 == 0x80:
        near -= 1
    return near


# Reading


def _read(part: _Part, notice, separator: str | None = None) -> Iterator[Document]:
    """Yield a file as documents of bounded size, cut at line ends where it can."""
    pending, begun = "", False
    for text, is_last in _decoded(part, notice):
        pending += text
        *ended, pending = pending.split(separator) if separator else [pending]
        for whole in ended:
            if begun or whole.strip():
                yield Document(part.name, whole)
            begun = False
        if is_last:
            break
        # The beginning of a separator waits for its rest.
        ready = max(0, len(pending) + 1 - len(separator or " "))
        cut = pending.rfind("\n", 0, ready) + 1 or ready
        if cut:
            yield Document(part.name, pending[:cut], ends=False)
            begun = True
        pending = pending[cut:]
    if begun or pending.strip() or not separator:
        yield Document(part.name, pending)


def _decoded(part: _Part, notice) -> Iterator[tuple[str, bool]]:
    """Yield the text of a file in pieces, each with whether it is the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    count, is_start = 0, part.start == 0
    with _open(part.path) as file:
        stop = os.fstat(file.fileno()).st_size if part.stop is None else part.stop
        file.seek(offset := part.start)
        while True:
            data = file.read(min(PIECE_BYTES, stop - offset))
            offset += len(data)
            is_last = offset >= stop or not data
            text = decoder.decode(data, final=is_last)
            text, replaced = _UNDECODABLE.subn("\ufffd", text)
            count += replaced
            if is_start and text:
                text, is_start = text.removeprefix("\ufeff"), False
            if is_last and count:
                notice(f"{part.path}: {count} undecodable bytes were replaced")
            yield text, is_last
            if is_last:
                return


def _open(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"The corpus cannot read {error.filename or path}: {error.strerror}. "
        "Check the path and its permissions."
    )
