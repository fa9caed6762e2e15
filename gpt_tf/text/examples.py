"""Rows to fine-tune on: texts, prompts with their answers, or conversations.

A file holds one JSON object a line, all of one kind:

    {"text": "..."}                                            all of it is learnt
    {"prompt": "...", "completion": "..."}                     the completion is
    {"messages": [{"role": "user", "content": "..."}, ...]}    the assistant's are

A row becomes ids in parts that are read and learnt in turn, and a token file in which
its rows follow each other; `gpt_tf.text.dataset.RowWindows` reads it.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.settings import arguments
from gpt_tf.text.chat import check_messages
from gpt_tf.text.corpus import SPLITS, Document
from gpt_tf.text.dataset import write_rows
from gpt_tf.text.records import read_records
from gpt_tf.text.rng import permute
from gpt_tf.text.tokenizer import Tokenizer

# The fields of each kind, by the one that tells it.
KINDS = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}
_EXPECTED = "`text`, or `prompt` and `completion`, or `messages`"


class Example(NamedTuple):
    """A row of a file.

    Attributes:
        place: File and line, for messages.
        kind: One of `KINDS`.
        fields: The values of the kind's fields, checked.
    """

    place: str
    kind: str
    fields: dict

    def encode(self, tokenizer: Tokenizer, context_length: int) -> list[list[int]]:
        """Return the ids in parts, read and learnt in turn, the first one read.

        Special tokens that are written in a row are one id each, as in a prompt of
        `generate`. A text and a completion are ended by the first of the tokenizer's
        `end_ids`, an assistant's message by what the template ends it by.

        Args:
            tokenizer: With a `chat_template` for conversations.
            context_length: Most tokens that a model reads at once.

        Raises:
            InputError: The row is longer, or nothing in it can be learnt.
        """
        if self.kind == "messages":
            texts, end = self._rendered(tokenizer), ()
        else:
            texts = ["", *self.fields.values()][-2:]
            end = tokenizer.end_ids[:1]
        parts = [tokenizer.encode(text, special=True) for text in texts]
        parts[-1] += end
        count = sum(map(len, parts))
        if count - 1 > context_length:
            raise InputError(
                f"{self.place} expects at most {context_length + 1} tokens, the "
                f"context and the one after it. Received: {count}. Shorten the row, or "
                "give a larger `context_length` if the model has it."
            )
        if count - len(parts[0]) < (1 if parts[0] else 2):
            raise InputError(
                f"{self.place} expects an answer of at least one token. "
                f"Received: {count} tokens in all. Leave the row out, or complete it."
            )
        return parts

    def _rendered(self, tokenizer):
        """Return the texts of a conversation, read and learnt in turn."""
        template = tokenizer.chat_template
        if template is None:
            raise InputError(
                f"{self.place} expects a tokenizer with a chat template, for its "
                "`messages`. Received: one without. Give rows of `prompt` and "
                "`completion`, or a model with a template."
            )
        messages, texts, done = self.fields["messages"], [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = template.render(messages[:index])
                whole = template.render(messages[: index + 1], False)
            except InputError as error:
                raise InputError(f"{self.place}: {error}") from None
            if not (before.startswith(done) and whole.startswith(before)):
                raise InputError(
                    f"{self.place} expects a chat template that leaves earlier turns "
                    "as they were. Received: one that rewrites them. Make a row of "
                    "each answer, with the turns before it."
                )
            texts += [before[len(done) :], whole[len(before) :]]
            done = whole
        return texts


class Examples:
    """The rows of a file, in two splits; stands where a `Corpus` does.

    Args:
        path: Of JSON lines.
        validation: File of rows to hold out; a share of `path` unless given.
        validation_fraction: That share, in (0, 1): at least one row.
        seed: Decides which.

    Raises:
        InputError: A line is no row, the rows are of several kinds, or there are too
            few.

    Example:
        >>> Examples("train.jsonl").describe()["kind"]
        'prompt'
    """

    def __init__(self, path, validation=None, *, validation_fraction=0.1, seed=0):
        self.files = [Path(p) for p in (path, validation) if p is not None]
        rows = [read_examples(file) for file in self.files]
        if validation is None:
            rows = _divided(self.files[0], rows[0], validation_fraction, seed)
        elif rows[0][0].kind != rows[1][0].kind:
            raise InputError(
                f"{validation} expects rows of the kind of {path}, with "
                f"`{rows[0][0].kind}`. Received: `{rows[1][0].kind}`."
            )
        self.name = self.files[0].name
        self.splits = dict(zip(SPLITS, rows, strict=True))

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the texts of rows, for what reads them without learning from them."""
        for row in self.splits[split]:
            texts = row.fields.values()
            if row.kind == "messages":
                texts = (message["content"] for message in row.fields["messages"])
            yield Document(row.place, "".join(t for t in texts if isinstance(t, str)))

    def write(self, path, split: str, tokenizer: Tokenizer, context_length: int):
        """Write a split's token file, whole or not at all; return it.

        Raises:
            InputError: As of `Example.encode`.
        """
        rows = [row.encode(tokenizer, context_length) for row in self.splits[split]]
        facts = {"corpus": self.name, "split": split}
        return write_rows(path, rows, tokenizer, facts=facts)

    def describe(self) -> dict:
        """Describe the rows for a manifest, as `Corpus.describe`."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(artifacts.sha256_of(file).encode())
        return {
            "name": self.name,
            "files": len(self.files),
            "size_bytes": sum(file.stat().st_size for file in self.files),
            "sha256": digest.hexdigest(),
            "kind": self.splits["train"][0].kind,
            "rows": {split: len(rows) for split, rows in self.splits.items()},
        }


def read_examples(path: str | os.PathLike) -> list[Example]:
    """Read a file of rows; lines without text are passed over.

    Raises:
        InputError: There is no file, a line is no row, the rows are of several kinds,
            or there are none.
    """
    path, rows = arguments.path("data", path), []
    for number, fields in read_records(path):
        row = _example(f"{path.name}, line {number}", fields)
        if rows and row.kind != rows[0].kind:
            raise InputError(
                f"{row.place} expects a row with `{rows[0].kind}`, as those before "
                f"it. Received: one with `{row.kind}`. A file has rows of one kind."
            )
        rows.append(row)
    return rows


def _example(place, row):
    """Check a row, and return it as an `Example`."""
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1:
        _refuse(place, f"one of {_EXPECTED}", f"the fields {arguments.shown([*row])}")
    fields = {name: row.get(name) for name in KINDS[kinds[0]]}
    if kinds[0] == "messages":
        _check_messages(place, fields["messages"])
    else:
        for name, text in fields.items():
            # A prompt may be empty: then there is only what is learnt.
            _check_text(place, name, text, may_be_empty=name == "prompt")
    return Example(place, kinds[0], fields)


def _check_messages(place, messages):
    try:
        check_messages(messages)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    for message in messages:
        if isinstance(message["content"], str):
            _check_text(place, "messages", message["content"], may_be_empty=True)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        roles = [message["role"] for message in messages]
        _refuse(place, "a message of the role assistant", arguments.shown(roles))
    for answer in answers:
        _check_text(place, "content` of each of the assistant's `messages", answer)


def _check_text(place, name, text, may_be_empty=False):
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        _refuse(place, f"`{name}` with text", arguments.shown(text))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a pair of UTF-16
        _refuse(place, f"`{name}` in whole characters", arguments.shown(text))


def _refuse(place, expected, received):
    raise InputError(f"{place} expects {expected}. Received: {received}.") from None


def _divided(path, rows, fraction, seed):
    """Return the rows to train on and those that are held out."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise InputError(
            f"{path} expects at least two rows, one of them to hold out. "
            f"Received: {len(rows)}, of which `validation_fraction` holds out {count}. "
            "Give more rows, or `validation`, a file of rows of its own."
        )
    key = np.random.SeedSequence([seed]).generate_state(5, np.uint32)
    is_held_out = permute(np.arange(len(rows)), len(rows), key) < count
    return [
        [row for row, held in zip(rows, is_held_out, strict=True) if held == split]
        for split in (False, True)
    ]
