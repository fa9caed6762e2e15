"""Text that a model has not learnt from, to judge it by."""

import codecs
import dataclasses
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.report import note
from gpt_tf.settings import arguments
from gpt_tf.text.corpus import Document, open_corpus
from gpt_tf.text.tokenizer import load_tokenizer

DEFAULT_CORPUS = "python-stdlib"

# More than this is thinned out evenly. Longer documents are cut first, at line ends
# where they can, so that what is left is spread over them too.
MOST_BYTES = 4 << 20
_PIECE_CHARACTERS = 1 << 18
_TOKENS_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Documents to judge a model by.

    Example:
        >>> HeldOutText.of("to be or not to be").size_bytes
        18
    """

    name: str  # of the corpus
    split: str  # "validation", or "all" of it
    documents: tuple[Document, ...]  # none empty

    @classmethod
    def of(cls, text) -> "HeldOutText":
        """Take a text, several of them, or a `HeldOutText` as one.

        Raises:
            InputError: It is none of these, or there is no text in it.
        """
        if isinstance(text, cls):
            return text
        texts = [text] if isinstance(text, str | Document) else text
        texts = list(texts) if isinstance(texts, Iterable) else [None]
        if not all(isinstance(item, str | Document) for item in texts):
            raise InputError(
                "Judging a model expects a text, a list of texts or a HeldOutText. "
                f"Received: {type(text).__name__}. Read what lies at a path with "
                "`held_out_text(path, whole=True)`."
            )
        # A document is a tuple itself, and text where it is judged.
        documents = [
            item if isinstance(item, Document) else Document(f"text {index}", item)
            for index, item in enumerate(texts)
        ]
        return cls("text", "all", _with_text(documents, "the text"))

    @property
    def size_bytes(self) -> int:
        """Bytes of UTF-8."""
        return sum(_size_of(document) for document in self.documents)

    @property
    def is_python(self) -> bool:
        """Whether it is a corpus of Python's source files."""
        return self.name == DEFAULT_CORPUS or all(
            document.name.endswith(".py") for document in self.documents
        )


def held_out_text(
    source: str | os.PathLike | Iterable[str | os.PathLike] = DEFAULT_CORPUS,
    *,
    whole: bool = False,
    validation_fraction: float = 0.1,
    validation: str | os.PathLike | None = None,
    separator: str | None = None,
    notes: list[str] | None = None,
) -> HeldOutText:
    """Read text that was held out of training.

    Args:
        source: A run's folder, whose own validation tokens are turned back into text;
            or a corpus as for `open_corpus`.
        whole: Whether all of a corpus was held out, such as a file that no model has
            seen. If not, it is the part that training on this corpus does not see.
        validation_fraction, validation, separator: As for `open_corpus`, and as
            training had them.
        notes: What is worth knowing about the text is appended here, for a report;
            it is logged too.

    Raises:
        InputError: There is no such corpus, or no text in it.
        DamagedFileError: A run's tokens or tokenizer were altered.

    Example:
        >>> text = held_out_text("python-stdlib")
        >>> text.is_python
        True
    """
    notes = [] if notes is None else notes
    whole = arguments.switch("whole", whole)
    folder = Path(source) if isinstance(source, str | os.PathLike) else None
    if folder is not None and is_run(folder):
        corpus, split = None, "validation"
        name, documents = _text_of_run(folder)
    else:
        is_model = folder is not None and any(
            (folder / sub / "model.keras").is_file() for sub in ("", "model")
        )
        if is_model:
            raise InputError(
                f"A corpus expects text. Received: {source}, a model without the text "
                "that it learnt from. Name the run's folder, a folder of text, or "
                f"{DEFAULT_CORPUS}."
            )
        corpus = open_corpus(
            source,
            validation_fraction=validation_fraction,
            validation=validation,
            separator=separator,
            whole=whole,
        )
        name, split = corpus.name, "all" if whole else "validation"
        documents = corpus.documents("validation")
    kept = _thinned(documents, name, notes)
    if corpus is not None:
        notes += corpus.notices
    return HeldOutText(name, split, _with_text(kept, name))


def is_run(path: str | os.PathLike) -> bool:
    """Tell whether a folder is a run's that has its held-out text."""
    return (Path(path) / "data" / "validation.tokens").is_file()


def _text_of_run(folder):
    """Return the name of a run's corpus, and its validation documents, decoded."""
    # Imported here: it loads TensorFlow, which text from elsewhere does without.
    from gpt_tf.text.dataset import TokenFile

    file = TokenFile.open(folder / "data" / "validation.tokens")
    tokenizer = load_tokenizer(folder)
    written_by = file.manifest.get("tokenizer_fingerprint")
    if written_by not in (None, tokenizer.fingerprint()):
        raise DamagedFileError(
            f"Expected the tokenizer that wrote {file.path} in {folder}. Received: "
            "another tokenizer.json. Put back the run's own."
        )
    tokens, end = file.tokens, tokenizer.end_of_text_id
    ends = [] if end is None else np.flatnonzero(tokens == end).tolist()

    def documents():
        begin = 0
        for index, stop in enumerate([*ends, len(tokens)]):
            own = tokens[begin:stop]
            parts = (
                tokenizer.decode_bytes(own[first : first + _TOKENS_AT_ONCE])
                for first in range(0, len(own), _TOKENS_AT_ONCE)
            )
            for text in codecs.iterdecode(parts, "utf-8", "replace"):
                yield Document(f"document {index}", text, ends=False)
            begin = stop + 1

    return str(file.manifest.get("corpus", folder.name)), documents()


def _thinned(documents, name, notes):
    """Keep every document, or every second, or every fourth, so that they fit."""
    kept, stride, kept_bytes, all_bytes = [], 1, 0, 0
    for index, piece in enumerate(_pieces(documents)):
        size = _size_of(piece)
        all_bytes += size
        if index % stride:
            continue
        kept.append(piece)
        kept_bytes += size
        while kept_bytes > MOST_BYTES and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            kept_bytes = sum(map(_size_of, kept))
    if kept_bytes < all_bytes:
        note(
            notes,
            f"{name} has {all_bytes / 1e6:,.1f} MB to judge by; one in {stride} of its "
            f"documents is read, {kept_bytes / 1e6:,.1f} MB",
        )
    return kept


def _pieces(documents):
    """Yield documents whole, those of the same file together, and long ones cut."""
    for _, parts in itertools.groupby(documents, lambda document: document.name):
        text = ""
        for part in parts:
            text += part.text
            while len(text) > _PIECE_CHARACTERS:
                cut = text.rfind("\n", 0, _PIECE_CHARACTERS) + 1 or _PIECE_CHARACTERS
                yield Document(part.name, text[:cut], ends=False)
                text = text[cut:]
            if part.ends and text:
                yield Document(part.name, text)
                text = ""
        if text:
            yield Document(part.name, text)


def _size_of(document):
    return len(document.text.encode("utf-8", "replace"))


def _with_text(documents, name):
    found = tuple(document for document in documents if document.text)
    if not any(document.text.strip() for document in found):
        raise InputError(
            f"Judging a model expects text. Received: {name}, which holds none. Name "
            "another corpus."
        )
    return found
