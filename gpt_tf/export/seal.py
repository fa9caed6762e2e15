"""The seal of a `.tflite`: what it is, and a SHA-256 that covers every byte of it.

LiteRT reads a flatbuffer without checking it, and a damaged one can end the process.
So a file carries its own hash in a metadata entry, which is found by search and not
by parsing: nothing unverified reaches native code. Neither TensorFlow nor LiteRT is
needed here.
"""

import hashlib
import re

from gpt_tf import files
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.signatures import SEAL_DIGITS, SEAL_PREFIX

_BLANK = b"0" * SEAL_DIGITS
_PIECE = 1 << 20
_LONGEST_JSON = 1 << 20


def blank_seal(**facts) -> bytes:
    """Return the metadata of a file that is not sealed yet: JSON in ASCII.

    Args:
        **facts: What the file is, as JSON values: mode, config and so on.

    Example:
        >>> data = bytearray(b"TFL3..." + blank_seal(mode="float32") + b"...")
        >>> seal(data)
        >>> read_seal(data)["mode"]
        'float32'
    """
    taken = {"format", "sha256"} & facts.keys()
    if taken:
        raise InputError(f"The seal has its own {min(taken)!r}. Rename that fact.")
    rest = files.to_json(facts, sort_keys=True)[1:].encode("ascii")
    return SEAL_PREFIX + _BLANK + (b'", ' if facts else b'"') + rest


def seal(data: bytearray) -> None:
    """Write the SHA-256 of a whole `.tflite` into its blank seal, in place.

    Args:
        data: The file's bytes, `blank_seal(...)` among them.

    Raises:
        InputError: There is no blank seal.
    """
    start = _find(memoryview(data))
    if start is None or data[start : start + SEAL_DIGITS] != _BLANK:
        raise InputError(
            "Sealing expects bytes that hold a blank seal. Received: "
            f"{len(data)} bytes without one. Put `blank_seal(...)` into the metadata."
        )
    digits = _digest(memoryview(data), start)
    data[start : start + SEAL_DIGITS] = digits


def read_seal(buffer, name: str = "the file") -> dict:
    """Verify every byte of a `.tflite` and return what its seal says of it.

    Args:
        buffer: The file's bytes: `bytes`, a memory map, or a `memoryview`.
        name: How messages call it.

    Returns:
        The metadata, as `blank_seal` was given them, with `"format"` and `"sha256"`.

    Raises:
        DamagedFileError: It is empty, altered, or was not exported by gpt_tf.
    """
    with memoryview(buffer) as view:
        if not len(view):
            raise DamagedFileError(
                f"Expected a model exported by gpt_tf in {name}. Received: an empty "
                "file. Export or copy it again."
            )
        start = _find(view)
        if start is None:
            raise DamagedFileError(
                f"Expected a model exported by gpt_tf in {name}. Received: "
                f"{len(view)} bytes without gpt_tf's seal: another program wrote it, "
                "or it is truncated. Export the model with gpt_tf."
            )
        stated = bytes(view[start : start + SEAL_DIGITS])
        if not re.fullmatch(rb"[0-9a-f]{64}", stated) or stated != _digest(view, start):
            raise DamagedFileError(
                f"The bytes of {name} do not have the SHA-256 that its seal states: "
                "it is truncated or was altered. Export or copy it again."
            )
        begin = start - len(SEAL_PREFIX)
        text = bytes(view[begin : begin + _LONGEST_JSON]).decode("latin-1")
    try:
        return files.JSON_DECODER.raw_decode(text)[0]
    except ValueError as error:
        raise DamagedFileError(
            f"The seal of {name} is not JSON: {error}. Export the model again."
        ) from None


def _find(view):
    """Return where the digits of the last seal begin, or None."""
    overlap = len(SEAL_PREFIX) - 1
    for end in range(len(view), 0, -_PIECE):
        begin = max(0, end - _PIECE)
        place = bytes(view[begin : end + overlap]).rfind(SEAL_PREFIX)
        if place >= 0:
            return begin + place + len(SEAL_PREFIX)
    return None


def _digest(view, start):
    digest = hashlib.sha256(view[:start])
    digest.update(_BLANK)
    digest.update(view[start + SEAL_DIGITS :])
    return digest.hexdigest().encode("ascii")
