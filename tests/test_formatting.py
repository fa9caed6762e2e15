import pytest

from gpt_tf import formatting
from gpt_tf.formatting import NOT_MEASURED

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345.6, "12,346"),
        (99.96, "100"),
        (15.04, "15"),
        (0.071234, "0.0712"),
        (-2.5, f"{MINUS}2.5"),
        (1e-9, f"1.0e{MINUS}09"),
        (None, NOT_MEASURED),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert formatting.number(value) == text


def test_more_digits_tell_near_numbers_apart():
    assert formatting.number(8.0004) == formatting.number(8) == "8"
    assert formatting.number(8.0004, digits=5) == "8.0004"
    assert formatting.number(12345.678, digits=7) == "12,345.68"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (0.03, "+3 %"),
        (0.0123, "+1.23 %"),
        (-0.0021, f"{MINUS}0.21 %"),
        (0.1234, "+12.3 %"),
        (3.5, "+350 %"),
    ],
)
def test_changes_are_in_percent_with_their_sign(value, text):
    assert formatting.percent(value, signed=True) == text


def test_intervals_have_the_digits_that_their_width_is_worth():
    wide = {"value": 5.83124, "low": 5.2, "high": 6.4}
    narrow = {"value": 5.83124, "low": 5.8300, "high": 5.8325}
    change = {"value": 0.0213, "low": -0.0031, "high": 0.0457}
    assert formatting.interval(wide) == ("5.8", "5.2", "6.4")
    assert formatting.interval(narrow) == ("5.8312", "5.8300", "5.8325")
    assert formatting.interval(change, 100, True) == ("+2.1", f"{MINUS}0.3", "+4.6")


def test_quantities_have_the_unit_that_fits():
    assert formatting.megabytes(1_570_000) == "1.57 MB"
    assert formatting.megabytes(8.3e9) == "8.3 GB"
    assert formatting.milliseconds(12.34) == "12.3 ms"
    assert formatting.milliseconds(1234) == "1.23 s"
    assert formatting.duration(8.25) == "8.25 s"
    assert formatting.duration(3671) == "1 h 1 min 11 s"
    assert formatting.count(1, "token") == "1 token"
    assert formatting.count(20_000, "token") == "20,000 tokens"
    assert formatting.moment("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC"


def test_ratios_are_told_from_the_larger_side():
    assert formatting.times(4.66, "faster", "slower").endswith("faster")
    assert (
        formatting.times(0.25, "faster", "slower") == "4\N{MULTIPLICATION SIGN} slower"
    )
    assert formatting.times(1.04, "faster", "slower") == "within 5 %"
