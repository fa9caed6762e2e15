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
    start = data.rfind(prefix + _BLANK) + len(prefix)
    if start < len(prefix):
        raise InputError(f"Sealing expects a blank seal in {len(data)} bytes.")
    data[start : start + SEAL_DIGITS] = _digest(data, start)


def read_seal(
    data, name: str = "the file", prefix: bytes = SEAL_PREFIX, verify: bool = True
) -> dict:
    """Verify every byte of a file and return what its seal says of it.

    Args:
        data: The file's bytes: `bytes`, a `bytearray` or a memory map.
        name: How messages call it.
        prefix: As for `blank_seal`.
        verify: Whether to; no, where the seal of a whole covers this part.

    Returns:
        The metadata, as `blank_seal` was given them, with `"format"` and `"sha256"`.

    Raises:
        DamagedFileError: It is empty, altered, or was not exported by gpt_tf.
    """
    begin = data.rfind(prefix)
    if begin < 0:
        received = f"{len(data)} bytes without gpt_tf's seal: another program wrote it"
        raise DamagedFileError(
            f"Expected a model exported by gpt_tf in {name}. Received: "
            f"{received if len(data) else 'an empty file'}, or it is truncated. Export "
            "the model with gpt_tf, or copy it again."
        )
    start = begin + len(prefix)
    if verify and data[start : start + SEAL_DIGITS] != _digest(data, start):
        raise DamagedFileError(
            f"The bytes of {name} do not have the SHA-256 that its seal states: "
            "it is truncated or was altered. Export or copy it again."
        )
    text = data[begin : begin + _LONGEST_JSON].decode("latin-1")
    try:
        return artifacts.JSON_DECODER.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"The seal of {name} is not JSON: {error}. Export the model again."
        ) from None


def _digest(data, start):
    """Return the hash of a file whose seal's digits are blank."""
    with memoryview(data) as view:
        digest = hashlib.sha256(view[:start])
        digest.update(_BLANK)
        digest.update(view[start + SEAL_DIGITS :])
    return digest.hexdigest().encode("ascii")
