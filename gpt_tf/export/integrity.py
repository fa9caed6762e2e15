"""The seal of a file: what it is, and a SHA-256 that covers every byte of it.

A `.tflite` carries its own hash in a metadata entry, a `.litertlm` in its header. It
is found by search and not by parsing, so that damage is noticed before anything is
read. Who alters a file on purpose can compute the hash anew: what a graph may
hold is checked by `gpt_tf.export.structure`. Neither TensorFlow nor LiteRT is needed
here.
"""

import hashlib

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.signatures import SEAL_DIGITS, SEAL_PREFIX

_BLANK = b"0" * SEAL_DIGITS
_PIECE = 1 << 20
_LONGEST_JSON = 1 << 20


def blank_seal(prefix: bytes = SEAL_PREFIX, **facts) -> bytes:
    """Return the metadata of a file that is not sealed yet: JSON in ASCII.

    Args:
        prefix: How it begins, which says what kind of file it is.
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
    rest = artifacts.to_json(facts, sort_keys=True)[1:].encode("ascii")
    return prefix + _BLANK + (b'", ' if facts else b'"') + rest


def seal(data, prefix: bytes = SEAL_PREFIX) -> None:
    """Write the SHA-256 of a whole file into its blank seal, in place.

    Args:
        data: The file's bytes, `blank_seal(...)` among them: a `bytearray` or a
            memory map.
        prefix: As for `blank_seal`.

    Raises:
        InputError: There is no blank seal.
    """
    with memoryview(data) as view:
        start = _find(view, prefix)
        digits = start and _digest(view, start)
    if start is None or data[start : start + SEAL_DIGITS] != _BLANK:
        raise InputError(
            "Sealing expects bytes that hold a blank seal. Received: "
            f"{len(data)} bytes without one. Put `blank_seal(...)` into the metadata."
        )
    data[start : start + SEAL_DIGITS] = digits


def read_seal(
    buffer, name: str = "the file", prefix: bytes = SEAL_PREFIX, verify: bool = True
) -> dict:
    """Verify every byte of a file and return what its seal says of it.

    Args:
        buffer: The file's bytes: `bytes`, a memory map, or a `memoryview`.
        name: How messages call it.
        prefix: As for `blank_seal`.
        verify: Whether to; no, where the seal of a whole covers this part.

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
        start = _find(view, prefix)
        if start is None:
            raise DamagedFileError(
                f"Expected a model exported by gpt_tf in {name}. Received: "
                f"{len(view)} bytes without gpt_tf's seal: another program wrote it, "
                "or it is truncated. Export the model with gpt_tf."
            )
        stated = bytes(view[start : start + SEAL_DIGITS])
        if verify and stated != _digest(view, start):
            raise DamagedFileError(
                f"The bytes of {name} do not have the SHA-256 that its seal states: "
                "it is truncated or was altered. Export or copy it again."
            )
        begin = start - len(prefix)
        text = bytes(view[begin : begin + _LONGEST_JSON]).decode("latin-1")
    try:
        return artifacts.JSON_DECODER.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"The seal of {name} is not JSON: {error}. Export the model again."
        ) from None


def _find(view, prefix):
    """Return where the digits of the last seal begin, or None."""
    overlap = len(prefix) - 1
    for end in range(len(view), 0, -_PIECE):
        begin = max(0, end - _PIECE)
        place = bytes(view[begin : end + overlap]).rfind(prefix)
        if place >= 0:
            return begin + place + len(prefix)
    return None


def _digest(view, start):
    digest = hashlib.sha256(view[:start])
    digest.update(_BLANK)
    digest.update(view[start + SEAL_DIGITS :])
    return digest.hexdigest().encode("ascii")
