"""The cache of a text in a file, so that its prompt need not be computed again.

A file holds the rows of every cache, in the model's order, and behind them
a seal: the SHA-256 of the whole, which model the rows are of, and the tokens. Opening
one runs nothing; what has another size than its tokens say is refused.
"""

import mmap
import os

import numpy as np

from gpt_tf import artifacts
from gpt_tf.edge.session import Session
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import integrity
from gpt_tf.settings import arguments

PREFIX = b'{"format": "gpt_tf.session/1", "sha256": "'
_LONGEST_SEAL = 1 << 20


def write(path: str | os.PathLike, session: Session, model: str) -> None:
    """Write what is in a session's cache, whole or not at all.

    Args:
        path: The file.
        session: The session.
        model: SHA-256 of the model, of its seal.

    Raises:
        InputError: The cache is empty, or the file cannot be written.
    """
    path = arguments.path("path", path)
    if not session.ids:
        raise InputError(
            "Saving a session expects a text in the cache. Received: an empty one. "
            "Call `prefill` or `generate` first."
        )
    rows = (values.tobytes() for values in session.rows(session.position))
    data = bytearray().join(rows)
    data += integrity.blank_seal(PREFIX, model=model, ids=session.ids)
    integrity.seal(data, PREFIX)
    with artifacts.atomic_file(path) as file:
        file.write(data)


def read(path: str | os.PathLike, session: Session, model: str) -> None:
    """Fill a session's cache from a file.

    Args:
        path: The file that `write` wrote.
        session: A session of the same model; what is in its cache is replaced.
        model: As for `write`.

    Raises:
        InputError: There is no such file, or it is of another model.
        DamagedFileError: It is truncated, altered or something else.
    """
    path = arguments.path("path", path)
    if not path.is_file():
        raise InputError(
            f"Expected a session at {path}. Received: nothing. Name the file that "
            "`save_session` wrote."
        )
    caches, heads, width = session.row_shape
    row_bytes = caches * heads * width * session.dtype.itemsize
    most = session.limit * row_bytes + _LONGEST_SEAL
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    try:
        facts = integrity.read_seal(data if size <= most else b"", str(path), PREFIX)
        artifacts.check_shape(facts, {"model": str, "ids": [int]}, path)
        ids = facts["ids"]
        if not 0 < len(ids) <= session.limit or min(ids) < 0:
            raise DamagedFileError("other tokens than there may be")
        if data.rfind(PREFIX) != len(ids) * row_bytes:
            raise DamagedFileError("other rows than tokens")
        count = len(ids) * row_bytes // session.dtype.itemsize
        values = np.frombuffer(data, session.dtype, count)
        if not np.isfinite(values).all():
            raise DamagedFileError("numbers that are not finite")
    except DamagedFileError:
        raise DamagedFileError(
            f"Expected in {path} a session that `save_session` wrote. Received: "
            f"{size} bytes that are truncated, were altered or are something "
            "else. Save the session again."
        ) from None
    if facts["model"] != model:
        raise InputError(
            f"Expected a session of this model in {path}. Received: one of another, "
            f"whose SHA-256 is {arguments.shown(facts['model'])}. Open that model, or "
            "save the session again."
        )
    session.reset()
    session.plan(len(ids))  # makes room
    session.fill(ids, values.reshape(caches, heads, len(ids), width))
