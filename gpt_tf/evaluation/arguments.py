"""Arguments of measurements: they are checked, and made what JSON takes."""

import numbers
import os
from collections.abc import Iterable

from gpt_tf.errors import InputError


def at_least(name: str, value: int, least: int) -> int:
    """Return a whole number as Python's own, or refuse it.

    Args:
        name: Of the argument.
        value: Any whole number, NumPy's too.
        least: The smallest that is good.

    Raises:
        InputError: It is no whole number, or less.

    Example:
        >>> at_least("rounds", 3, 1)
        3
    """
    whole = isinstance(value, numbers.Integral)
    if not whole or value < least:
        kind = "" if whole else "a whole number, "
        raise InputError(
            f"`{name}` expects {kind}at least {least}. Received: {value!r}."
        )
    return int(value)


def all_at_least(name: str, values: Iterable[int], least: int) -> list[int]:
    """Return several whole numbers, each once, or refuse them.

    Raises:
        InputError: They are no list, or one of them is no whole number, or less.

    Example:
        >>> all_at_least("requests", (1, 4, 4), 1)
        [1, 4]
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(
            f"`{name}` expects a list of whole numbers. Received: {values!r}. Put it "
            "in brackets."
        )
    return list(dict.fromkeys(at_least(name, value, least) for value in values))


def list_of_paths(paths: Iterable[str | os.PathLike]) -> list[str]:
    """Return paths as texts, or refuse a single one, whose letters are no paths.

    Raises:
        InputError: It is a single one.

    Example:
        >>> list_of_paths([Path("a.litertlm")])
        ['a.litertlm']
    """
    if isinstance(paths, str | os.PathLike):
        raise InputError(
            f"`paths` expects a list of files. Received: one, {str(paths)!r}. Put it "
            "in brackets."
        )
    return [str(path) for path in paths]
