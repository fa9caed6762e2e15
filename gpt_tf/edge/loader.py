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

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import structure
from gpt_tf.export.integrity import read_seal
from gpt_tf.export.reader import (
    U8,
    U64,
    BrokenError,
    Flatbuffer,
    packed_integers,
    protobuf,
)
from gpt_tf.export.signatures import BARE_TEMPLATE, BUNDLE_PREFIX
from gpt_tf.settings import arguments
from gpt_tf.text.chat import ChatTemplate, tokens_of
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
_HEADER_BLOCK = 1 << 14
_TIME = b"creation_timestamp"

# Kinds of sections, `AnySectionDataType` of the schema.
_NEEDED = {3: "model", 6: "Hugging Face tokenizer"}
_METADATA = 5
# Fields of LiteRT-LM's `LlmMetadata`, and of what its stop tokens are in.
_STOP_TOKENS, _TEMPLATE = 2, 7
_TOKEN_IDS, _IDS = 1, 1

# No tokenizer is larger; what claims to be is damaged.
_LARGEST_TOKENIZER_BYTES = 1 << 28

# Fields of the header's tables, by index.
_HEADER = {1: Flatbuffer.follow}
_SECTIONS = {0: Flatbuffer.tables}
_SECTION = {1: U64, 2: U64, 3: U8}


class Artefact(NamedTuple):
    """A file that was found sound."""

    model: str | bytes  # name of the `.tflite`, or the bytes of one inside a file
    facts: dict  # what its seal says of it; `sha256` is of all that was verified
    tokenizer: Tokenizer | None


def open_artefact(path: str | os.PathLike, tokenizer=None) -> Artefact:
    """Check a `.tflite` or `.litertlm` and find its tokenizer.

    Args:
        path: The file. If `<file name>.json` is beside it, that is checked first.
        tokenizer: A `Tokenizer`, or the path of one, to be used instead of the file's
            own or of the `tokenizer.json` beside it.

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
    artifacts.check_file_manifest(path)
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            read_seal(b"", str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model, facts, own = _contents(data, path)
    beside = path.with_name(FILE_NAME)
    if tokenizer is None and own is None and beside.is_file():
        tokenizer = beside
    name = str(path)
    if tokenizer is None and own is not None:
        packed, about = own
        tokenizer = _unpack_tokenizer(packed, name)
        tokenizer.chat_template = _template_of(about, tokenizer, name)
    elif not isinstance(tokenizer, Tokenizer | None):
        name = str(arguments.path("tokenizer", tokenizer))
        tokenizer = _named(lambda: load_tokenizer(name), name)
    if tokenizer is not None:
        _check_pair(facts, tokenizer, path, name)
    return Artefact(model, facts, tokenizer)


def _contents(data, path):
    """Check a file's bytes; return the model, its facts, and what comes with it.

    That is, of a `.litertlm`, the packed tokenizer and LiteRT-LM's metadata.
    """
    if data[4:8] == _TFLITE_MAGIC:
        model, own = str(path), None
        facts = read_seal(data, str(path))
    else:
        sections = read_sections(data, str(path))
        # Files with a time in their header have a seal of the model only.
        is_sealed = data.find(_TIME, 0, _HEADER_BLOCK) < 0
        whole = read_seal(data, str(path), BUNDLE_PREFIX) if is_sealed else {}
        # LiteRT takes the model as `bytes`, so this copy is what it keeps.
        model, tokenizer = (
            data[slice(*_section(sections, kind, path))] for kind in _NEEDED
        )
        own = tokenizer, data[slice(*sections.get(_METADATA, (0, 0)))]
        data = model
        facts = read_seal(model, str(path), verify=not is_sealed)
        # Of what was verified; a stranger's file may state anything of its parts.
        facts["sha256"] = whole.get("sha256", facts.get("sha256"))
    try:
        structure.check(data, facts)
    except BrokenError as error:
        raise DamagedFileError(
            f"Expected in {path} the graph that gpt_tf writes. Received: {error}. The "
            "file was altered, or a version of gpt_tf with another graph exported it: "
            "export the model again."
        ) from None
    return model, facts, own


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
            raise BrokenError(f"version {major}")
        if not _HEADER_BEGIN < end <= len(data):
            raise BrokenError(f"an end at byte {end} of {len(data)}")
        found = _find_sections(Flatbuffer(data[_HEADER_BEGIN:end], strict=False))
        for begin, end in found.values():
            if not _HEADER_BEGIN < begin < end <= len(data):
                raise BrokenError(f"a section from {begin} to {end} of {len(data)}")
    except (BrokenError, struct.error) as error:
        raise DamagedFileError(
            f"Expected a sound header in {name}. Received: {error}. The file is "
            "truncated or was altered; export or copy it again."
        ) from None
    return found


def _find_sections(header):
    root = header.table(header.follow(0), _HEADER)
    if 1 not in root:
        raise BrokenError("no list of sections")
    found = {}
    for position in header.table(root[1], _SECTIONS).get(0, ()):
        section = {1: 0, 2: 0, 3: 0} | header.table(position, _SECTION)
        kind = section[3]
        if kind in (*_NEEDED, _METADATA):
            if kind in found:
                raise BrokenError(f"several sections of kind {kind}")
            found[kind] = section[1], section[2]
    return found


def _section(sections, kind, path):
    if kind not in sections:
        raise DamagedFileError(
            f"Expected a {_NEEDED[kind]} in {path}. Received: none. gpt_tf did not "
            "export it, or it was altered."
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
    return _named(lambda: tokenizer_from_json(text, f"the tokenizer in {name}"), name)


def _template_of(metadata, tokenizer, name):
    """Return the chat template in LiteRT-LM's metadata, or None."""
    try:
        found = protobuf(metadata)
        source = b"".join(found.get(_TEMPLATE, [])[-1:]).decode("utf-8")
        ids = []
        for token in found.get(_STOP_TOKENS, []):
            for one in protobuf(token).get(_TOKEN_IDS, []):
                for packed in protobuf(one).get(_IDS, []):
                    ids += packed_integers(packed)
    except (BrokenError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"The metadata in {name} cannot be read: {error}. The file is truncated or "
            "was altered; export or copy it again."
        ) from None
    if source in ("", BARE_TEMPLATE):
        return None
    return ChatTemplate(source, {}, tuple(tokens_of(ids, tokenizer.backend)))


def _named(load, name):
    """Load a tokenizer so that whatever goes wrong names the file."""
    try:
        return load()
    except InputError as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from None


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
