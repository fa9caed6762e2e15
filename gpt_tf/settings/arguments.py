"""The check of one argument: what it is to be, and what is said where it is not.

Whole configurations are checked by `gpt_tf.settings.configuration`, in these words;
here is what functions and constructors call, on a device too. Each returns the value as
Python's own, or raises an `InputError` that names the argument. NumPy's numbers are
numbers, and True and False are none.
"""

import math
import numbers
import operator
import os
from collections.abc import Iterable
from pathlib import Path

from gpt_tf.errors import InputError, InputTypeError

# Sizes are told to TensorFlow and to files as int32.
LARGEST = 2**31 - 1
# Seeds become uint64 at most.
LARGEST_SEED = 2**64 - 1
MOST_THREADS = 1024
# The trainer of a vocabulary takes memory for all of it before it counts anything.
MOST_TOKENS = 2**24
# An upper end above this one is only spoken of where a value exceeds it.
_TOLD_UP_TO = 1024
_LONGEST_SHOWN = 80
# Of file systems.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
_DEEPEST = 300  # folders; Python makes them by calls within calls


def integer(
    name: str, value, least: int = 0, most: int = LARGEST, *, or_none=False, repair=""
):
    """Return an integer from `least` to `most`; `repair` says how to mend another.

    Example:
        >>> integer("rounds", np.int64(3), 1)
        3
    """
    if value is None and or_none:
        return None
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        expected = phrase("an integer", value, least, most, or_none=or_none)
        refuse(name, value, expected, repair)
    return int(value)


def number(name: str, value, *, or_none=False, **limits: float):
    """Return a finite number within `least`, `most`, `above` and `below`.

    Example:
        >>> number("temperature", 1, above=0)
        1.0
    """
    if value is None and or_none:
        return None
    try:
        known = isinstance(value, numbers.Real) and not isinstance(value, bool)
        found = float(value) if known else math.nan
    except OverflowError:
        found = math.inf
    if not (
        math.isfinite(found)
        and limits.get("least", -math.inf) <= found <= limits.get("most", math.inf)
        and limits.get("above", -math.inf) < found < limits.get("below", math.inf)
    ):
        refuse(name, value, phrase("a number", value, or_none=or_none, **limits))
    return found


def items(name: str, values: Iterable, expected: str = "a list") -> list:
    """Return what a list or the like holds; a text is none."""
    try:
        if not isinstance(values, str | bytes):
            return list(values)
    except TypeError:
        pass
    refuse(name, values, expected, "Put it in brackets.")


def integers(name: str, values: Iterable[int], least: int = 0, most: int = LARGEST):
    """Return several integers, each once.

    Example:
        >>> integers("requests", (1, 4, 4), 1)
        [1, 4]
    """
    found = items(name, values, "a list of integers")
    return list(dict.fromkeys(integer(name, value, least, most) for value in found))


def ids(values: Iterable[int]) -> list[int]:
    """Return token ids, of any size."""
    try:
        return [operator.index(token) for token in items("ids", values)]
    except TypeError:
        refuse("ids", values, "token ids, a list of integers")


def one_of(name: str, value, choices: Iterable[str]) -> str:
    """Return a value that is one of some texts."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, f"one of {', '.join(choices)}")
    return value


def switch(name: str, value) -> bool:
    """Return True or False."""
    if type(value).__name__ not in ("bool", "bool_") or getattr(value, "shape", ()):
        refuse(name, value, "True or False")
    return bool(value)


def text(name: str, value, *, or_none=False):
    """Return a text."""
    if not (isinstance(value, str) or (value is None and or_none)):
        refuse(name, value, "a text" + ", or None" * or_none)
    return value


def path(name: str, value, *, or_none=False):
    """Return the path of a file or folder that a file system takes."""
    if value is None and or_none:
        return None
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not _is_path(given):
        refuse(name, value, "the path of a file or folder" + ", or None" * or_none)
    return Path(given)


def _is_path(value):
    try:
        parts = os.fsencode(value).split(b"/")
    except UnicodeError:
        return False
    whole = 0 < len(value) < _LONGEST_PATH and "\0" not in value
    return whole and len(parts) <= _DEEPEST and max(map(len, parts)) <= _LONGEST_NAME


def paths(name: str, values: Iterable[str | os.PathLike]) -> list[Path]:
    """Return several paths; of a single one, the letters are no paths."""
    return [path(name, value) for value in items(name, values, "a list of files")]


def texts(name: str, values: str | Iterable[str]) -> list[str]:
    """Return texts, or one, as a list."""
    expected = "a text, or a list of texts"
    found = [values] if isinstance(values, str) else items(name, values, expected)
    if not all(isinstance(value, str) for value in found):
        refuse(name, values, expected)
    return found


def instance(name: str, value, kind: type, expected: str, *, or_none=False):
    """Return an object of a class; another is an `InputTypeError`."""
    if not (isinstance(value, kind) or (value is None and or_none)):
        expected += ", or None" * or_none
        raise InputTypeError(f"`{name}` expects {expected}. Received: {shown(value)}.")
    return value


def phrase(kind, value, least=None, most=None, above=None, below=None, or_none=False):
    """Return what is expected, in words.

    Example:
        >>> phrase("a number", "3", above=0, most=1, or_none=True)
        'a number above 0 and at most 1, or None'
    """
    if most is not None and most > _TOLD_UP_TO:
        known = isinstance(value, numbers.Real) and not isinstance(value, bool)
        most = most if known and value > most else None
    if least is not None and most is not None:
        words = [f"from {least:,} to {most:,}"]
    else:
        words = [
            f"{said} {limit:,}"
            for said, limit in (
                ("of at least", least),
                ("above", above),
                ("at most", most),
                ("below", below),
            )
            if limit is not None
        ]
    said = " ".join([kind, " and ".join(words)]) if words else kind
    return said + ", or None" * or_none


def printable(path: str | os.PathLike) -> str:
    """Return a path as text that every stream and log can hold, UTF-8 or not."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(value) -> str:
    """Return a value as one short line, whatever it is."""
    try:
        said = " ".join(repr(value).split())
    except Exception:  # an integer of too many digits, an object that cannot say
        said = f"a value of type {type(value).__name__}"
    if len(said) > _LONGEST_SHOWN:
        said = f"{said[:_LONGEST_SHOWN]}... ({type(value).__name__})"
    return said


def refuse(name: str, value, expected: str, repair: str = ""):
    """Raise the `InputError` of an argument that cannot be used."""
    raise InputError(
        f"`{name}` expects {expected}. Received: {shown(value)}. {repair}".rstrip()
    )
