"""What the configurations of all rooms have in common: checks, and a way to a file.

A configuration is a pydantic dataclass: a field states its name, type, default, range
and description, and from these follow the constructor, its checks, and the options of
the command line (`gpt_tf.cli.options`).
"""

import dataclasses
import functools
import os
from typing import Annotated, ClassVar

import pydantic
from pydantic import Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.settings import arguments

Count = Annotated[int, Field(ge=1, le=arguments.LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=arguments.LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _path(value, info):
    arguments.path(info.field_name, value)
    return value


# The path of a file or folder, as text.
PathText = Annotated[str, pydantic.AfterValidator(_path)]

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_JSON = (bool, int, float, str, dict, type(None))


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


def configuration(cls):
    """Make a frozen dataclass whose fields are checked, and refused in our words."""
    cls = pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)(cls)
    check = cls.__init__

    @functools.wraps(check)
    def __init__(self, *values, **fields):
        try:
            check(self, *values, **fields)
        except pydantic.ValidationError as error:
            given = dict(zip(fields_of(cls), values, strict=False)) | fields
            raise _refusal(cls, given, error.errors()) from None

    cls.__init__ = __init__
    return cls


def fields_of(cls) -> dict[str, FieldInfo]:
    """Return what a configuration states of its fields, by name."""
    return cls.__pydantic_fields__


class Configuration:
    """Base of configurations, whose fields are values that JSON knows.

    Paths are kept as texts, lists as tuples, and NumPy's numbers as Python's own. A
    subclass checks in `__post_init__` by `_check` what concerns several fields.

    Raises:
        InputError: A field is of another type, or out of its range.
    """

    title: ClassVar[str] = "A configuration"

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value):
        if isinstance(value, list | tuple):
            return tuple(map(cls._plain, value))
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if hasattr(value, "item") and not hasattr(value, "__len__"):
            value = value.item()  # a number of NumPy's, and no array
        if not isinstance(value, _JSON):  # pydantic takes whatever has a `__float__`
            raise PydanticCustomError("json", "Input should be a value of JSON")
        return value

    @classmethod
    def of(cls, value):
        """Return a configuration from one, from a dict of its fields, or from None.

        Raises:
            InputError: A field is unknown, or its value is.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        if not isinstance(value, dict) or not all(isinstance(n, str) for n in value):
            raise _unknown(cls, arguments.shown(value))
        return cls(**value)

    def get_config(self):
        """Return the fields as a dict of JSON values."""
        return dataclasses.asdict(self)

    def _check(self, name, good, expected):
        if not good:
            arguments.refuse(name, getattr(self, name), f"a value {expected}")


def _refusal(cls, given, errors):
    """Return the error of ours for the field that pydantic refused first."""
    cause = errors[0].get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    name = errors[0]["loc"][0]
    if name not in given or name not in fields_of(cls):
        return _unknown(cls, f"`{name}`")
    said = (error["msg"] for error in errors if error["loc"][0] == name)
    expected = ", or ".join(dict.fromkeys(map(_in_our_words, said)))
    received = arguments.shown(given[name])
    return InputError(f"`{name}` expects {expected}. Received: {received}.")


def _in_our_words(message):
    """Return what pydantic says that an input should be, as what is expected."""
    expected = message.removeprefix("Input should be ").replace("tuple", "list")
    return expected if expected.startswith(("a ", "'")) else f"a value {expected}"


def _unknown(cls, received):
    return InputTypeError(
        f"{cls.title} expects a {cls.__name__} or a dict of its fields, "
        f"{', '.join(sorted(fields_of(cls)))}. Received: {received}."
    )
