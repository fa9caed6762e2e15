"""What is in a `.tflite` or `.litertlm`, checked before native code sees any of it.

A `.litertlm` is a header and sections: the model, the tokenizer, and metadata for
LiteRT-LM. The header is a flatbuffer, read here with every offset checked, because
a damaged one must be refused and not followed.

Reference: LiteRT-LM's file format, schema/core/litertlm_header_schema.fbs in
github.com/google-ai-edge/LiteRT-LM.
"""

import mmap
import os
import struct
import zlib
from typing import NamedTuple

from gpt_tf import arguments, files
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.seal import read_seal
from gpt_tf.text.tokenizer import (
    FILE_NAME,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_json,
)

_TFLITE_MAGIC = b"TFL3"  # from byte 4 on
_LITERTLM_MAGIC = b"LITERTLM"
_LITERTLM_MAJOR_VERSION = 1
_HEADER_END = 24  # where the header's end is written
_HEADER_BEGIN = 32

# Kinds of sections, `AnySectionDataType` of the schema.
_MODEL = 3
_TOKENIZER = 6

# No tokenizer is larger; what claims to be is damaged.
_LARGEST_TOKENIZER_BYTES = 1 << 28

# What a seal says of a model, and must.
_FACTS = {"mode", "config", "capacity", "cache_dtype", "tokenizer_fingerprint"}


class Artefact(NamedTuple):
    """A file that was found sound.

    Attributes:
        model: Name of the `.tflite`, or the bytes of one that is part of a file.
        facts: What its seal says of it.
        tokenizer: Its tokenizer, or None.
    """

    model: str | bytes
    facts: dict
    tokenizer: Tokenizer | None


def open_artefact(path: str | os.PathLike, tokenizer=None) -> Artefact:
    """Check a `.tflite` or `.litertlm` and find its tokenizer.

    Args:
        path: The file. If `<file name>.json` is beside it, that is checked first.
        tokenizer: A `Tokenizer`, or the path of one, to be used instead of the file's
            own or of the `tokenizer.json` beside it.

    Returns:
        Model, facts and tokenizer.

    Raises:
        InputError: There is no such file, or tokenizer and model do not belong
            together.
        DamagedFileError: A file is empty, truncated, altered or foreign.
    """
    path = arguments.path("path", path)
    if not path.is_file():
        received = "a folder" if path.is_dir() else "nothing"
        raise InputError(
            f"Expected a .tflite or .litertlm at {path}. Received: {received}. Name "
            "the file that gpt_tf exported."
        )
    files.check_file_manifest(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            read_seal(b"", str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] == _TFLITE_MAGIC:
                facts = read_seal(data, str(path))
                model, own = str(path), _tokenizer_beside(path)
            else:
                sections = read_sections(data, str(path))
                begin, end = _section(sections, _MODEL, path)
                # LiteRT takes the model as `bytes`, so this copy is what it keeps.
                model = data[begin:end]
                facts = read_seal(model, str(path))
                begin, end = _section(sections, _TOKENIZER, path)
                own = data[begin:end]
    _check_facts(facts, path)
    name = str(path)
    if tokenizer is None:
        if isinstance(own, bytes):
            tokenizer = _unpack_tokenizer(own, name)
        elif own is not None:
            tokenizer, name = _load_tokenizer(own), str(own)
    elif not isinstance(tokenizer, Tokenizer):
        name = str(arguments.path("tokenizer", tokenizer))
        tokenizer = _load_tokenizer(tokenizer)
    if tokenizer is not None:
        _check_pair(facts, tokenizer, path, name)
    return Artefact(model, facts, tokenizer)


def read_sections(data, name: str) -> dict[int, tuple[int, int]]:
    """Return where the sections of a `.litertlm` lie: begin and end by their kind.

    Args:
        data: The file's bytes, sliceable.
        name: How messages call it.

    Raises:
        DamagedFileError: The header is not one of a `.litertlm`.
    """
    if data[:8] != _LITERTLM_MAGIC:
        raise DamagedFileError(
            f"Expected a .tflite or .litertlm in {name}. Received: {len(data)} bytes "
            f"that begin with {bytes(data[:8])!r}. Name the file that gpt_tf exported."
        )
    try:
        (major,) = struct.unpack_from("<I", data, 8)
        (end,) = struct.unpack_from("<Q", data, _HEADER_END)
        if major != _LITERTLM_MAJOR_VERSION:
            raise _Broken(f"version {major}")
        if not _HEADER_BEGIN < end <= len(data):
            raise _Broken(f"an end at byte {end} of {len(data)}")
        found = _find_sections(_Flatbuffer(data[_HEADER_BEGIN:end]))
        for begin, end in found.values():
            if not _HEADER_BEGIN < begin < end <= len(data):
                raise _Broken(f"a section from {begin} to {end} of {len(data)} bytes")
    except (_Broken, struct.error) as error:
        raise DamagedFileError(
            f"Expected a sound header in {name}. Received: {error}. The file is "
            "truncated or was altered; export or copy it again."
        ) from None
    return found


def _find_sections(buffer):
    root = buffer.root()
    objects = buffer.tables(buffer.table(root, 1), 0)
    found = {}
    for section in objects:
        kind = buffer.scalar(section, 3, "<B", 0)
        begin = buffer.scalar(section, 1, "<Q", 0)
        end = buffer.scalar(section, 2, "<Q", 0)
        if kind in (_MODEL, _TOKENIZER):
            if kind in found:
                raise _Broken(f"several sections of kind {kind}")
            found[kind] = begin, end
    return found


class _Broken(Exception):
    """A header leads nowhere."""


class _Flatbuffer:
    """The little of the flatbuffer format that a header needs, bounds checked.

    A table is known by its position. Python refuses negative positions in none of
    these reads, so they are refused here.
    """

    def __init__(self, data: bytes):
        self.data = data

    def read(self, layout, position):
        if not 0 <= position <= len(self.data) - struct.calcsize(layout):
            raise _Broken(f"an offset to byte {position} of its {len(self.data)}")
        return struct.unpack_from(layout, self.data, position)[0]

    def root(self):
        return self.read("<I", 0)

    def field(self, table, index):
        """Return the position of a table's field, or None where it is left out."""
        fields = table - self.read("<i", table)
        entry = 4 + 2 * index
        if entry + 2 > self.read("<H", fields):
            return None
        offset = self.read("<H", fields + entry)
        return table + offset if offset else None

    def scalar(self, table, index, layout, default):
        position = self.field(table, index)
        return default if position is None else self.read(layout, position)

    def follow(self, position):
        return position + self.read("<I", position)

    def table(self, table, index):
        position = self.field(table, index)
        if position is None:
            raise _Broken("no list of sections")
        return self.follow(position)

    def tables(self, table, index):
        vector = self.table(table, index)
        count = self.read("<I", vector)
        if count > len(self.data) // 4:
            raise _Broken(f"{count} sections")
        return [self.follow(vector + 4 + 4 * i) for i in range(count)]


def _check_facts(facts, path):
    missing = _FACTS - facts.keys()
    if missing:
        raise DamagedFileError(
            f"Expected a seal in {path} that states {min(missing)}. Received: none. "
            "Another version of gpt_tf exported it; export it again."
        )


def _section(sections, kind, path):
    if kind not in sections:
        what = {_MODEL: "model", _TOKENIZER: "Hugging Face tokenizer"}[kind]
        raise DamagedFileError(
            f"Expected a {what} in {path}. Received: none. gpt_tf did not export it, "
            "or it was altered."
        )
    return sections[kind]


def _unpack_tokenizer(data, name):
    """Return the tokenizer of a section: its size in bytes, and it, compressed."""
    try:
        (size,) = struct.unpack_from("<Q", data, 0)
        if size > _LARGEST_TOKENIZER_BYTES:
            raise ValueError(f"it claims to have {size} bytes")
        decompress = zlib.decompressobj()
        text = decompress.decompress(data[8:], size + 1)
        if len(text) != size or not decompress.eof:
            raise ValueError(f"it does not have the {size} bytes that it states")
        text = text.decode("utf-8")
    except (struct.error, zlib.error, ValueError) as error:
        raise DamagedFileError(
            f"The tokenizer in {name} cannot be unpacked: {error}. The file is "
            "truncated or was altered; export or copy it again."
        ) from None
    return _make(lambda: tokenizer_from_json(text, f"the tokenizer in {name}"), name)


def _tokenizer_beside(path):
    beside = path.with_name(FILE_NAME)
    return beside if beside.is_file() else None


def _load_tokenizer(path):
    return _make(lambda: load_tokenizer(path), os.fspath(path))


def _make(load, name):
    """Load a tokenizer so that whatever goes wrong names the file."""
    try:
        return load()
    except InputError as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from None
    except BaseException as error:
        # How a defect of the library's native code shows itself.
        if type(error).__name__ != "PanicException":
            raise
        raise DamagedFileError(
            f"{name} cannot be read as a tokenizer: {error}."
        ) from None


def _check_pair(facts, tokenizer, path, name):
    """Refuse a tokenizer that the model was not trained with."""
    stated = facts["tokenizer_fingerprint"]
    vocab_size = facts["config"]["vocab_size"]
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"The model in {path} knows {vocab_size} tokens. Received: a tokenizer of "
            f"{tokenizer.vocab_size}, from {name}. They do not belong together: pass "
            "the tokenizer that the model was trained with."
        )
    if stated is not None and stated != tokenizer.fingerprint():
        raise InputError(
            f"The model in {path} was exported with another tokenizer than that of "
            f"{name}: they do not belong together. Pass the tokenizer that the model "
            "was trained with."
        )
