"""Files of JSON lines: rows of a task, one a line."""

import os

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.settings import arguments


def read_records(path: str | os.PathLike) -> list[tuple[int, dict]]:
    """Read a file with a JSON object in every line; empty lines are left out.

    Args:
        path: The file, in UTF-8.

    Returns:
        Each object with the number of its line, from 1.

    Raises:
        InputError: There is no such file, a line is no JSON object, or there is none.

    Example:
        >>> read_records("tasks.jsonl")
        [(1, {'prompt': '1 + 1 =', 'answer': '2'})]
    """
    path = arguments.path("path", path)
    expected = "a JSON object in every line"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path} is expected to be a file with {expected}. Received: "
            f"{error.strerror}. Name another."
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = artifacts.parse_json(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} expects {expected}. Received, in line {number}, what is none: "
                f"{error}. Mend the line, or remove it."
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path} expects {expected}. Received, in line {number}: "
                f"{arguments.shown(record)}. Mend the line, or remove it."
            )
        records.append((number, record))
    if not records:
        raise InputError(
            f"{path} expects {expected}. Received: none. Give it a row at least."
        )
    return records
