from pathlib import Path

import numpy as np
import pytest

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.settings import arguments


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_numpy_become_pythons(value):
    found = arguments.integer("size", value, 1)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [2, np.float32(2), np.int16(2), 2.0])
def test_numbers_of_numpy_become_pythons(value):
    found = arguments.number("rate", value, least=0)
    assert (found, type(found)) == (2.0, float)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "`size` expects an integer of at least 1. Received: 0."),
        (True, "`size` expects an integer of at least 1. Received: True."),
        (2**31, "`size` expects an integer from 1 to 2,147,483,647."),
    ],
)
def test_the_end_that_was_passed_is_named(value, expected):
    with pytest.raises(InputError) as refused:
        arguments.integer("size", value, 1)
    assert str(refused.value).startswith(expected)


def test_what_came_is_shown_in_one_short_line():
    for value in (10**5000, "x" * 10**6, list(range(10**5)), "two\nlines"):
        shown = arguments.shown(value)
        assert len(shown) < 120
        assert "\n" not in shown


def test_what_cannot_say_what_it_is_is_shown_by_its_type():
    class Mute:
        def __repr__(self):
            raise RuntimeError

    assert arguments.shown(Mute()) == "a value of type Mute"


@pytest.mark.parametrize(
    "value", ["", "a\0b", "n" * 256, "/".join(["deep"] * 1500), b"x", 3, None]
)
def test_what_no_file_system_takes_is_no_path(value):
    with pytest.raises(InputError, match="`out` expects the path"):
        arguments.path("out", value)
    assert arguments.path("out", "n" * 255) == Path("n" * 255)


def test_a_text_is_no_list_of_its_letters():
    for check in (arguments.items, arguments.integers, arguments.paths):
        with pytest.raises(InputError, match="brackets"):
            check("files", "abc")
    assert arguments.texts("stop", "abc") == ["abc"]


def test_an_object_of_another_class_is_an_error_of_its_type():
    with pytest.raises(InputTypeError, match="Received: 3"):
        arguments.instance("report", 3, dict, "a report")
