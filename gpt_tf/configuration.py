"""What the configurations of all rooms have in common: checks, and a way to a file."""

import dataclasses
import math
import numbers

from gpt_tf.errors import InputError


def differences(old: dict, new: dict) -> str:
    """Say in which fields a configuration differs from the one asked for.

    Args:
        old: Fields as they are.
        new: Fields as they were asked for.

    Returns:
        `"steps=10 instead of 20, ..."`; empty where all are the same.
    """
    return ", ".join(
        f"{key}={old.get(key)} instead of {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    )


class Configuration:
    """Base of frozen dataclasses whose fields are values that JSON knows.

    A subclass calls `_check` in its `__post_init__`, after its base's, and says by
    `title` what an error calls it.

    Raises:
        InputError: A number is NaN or infinite.
    """

    title = "A configuration"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            finite = not isinstance(value, numbers.Real) or -math.inf < value < math.inf
            self._check(field.name, finite, "that is finite")

    @classmethod
    def of(cls, value):
        """Return a configuration from one, from a dict of its fields, or from None.

        Raises:
            InputError: A field is unknown, or its value is.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or not set(value) <= known:
            raise InputError(
                f"{cls.title} expects a {cls.__name__} or a dict of its "
                f"fields, {', '.join(sorted(known))}. Received: {value!r}."
            )
        return cls(**value)

    def get_config(self):
        """Return the fields as a dict of JSON values."""
        return dataclasses.asdict(self)

    def _check(self, name, good, expected):
        if not good:
            raise InputError(
                f"`{name}` expects a value {expected}. "
                f"Received: {getattr(self, name)!r}."
            )
