"""Numbers, intervals and names as pictures and the page write them."""

import math
import re

_LONGEST_NAME = 44
_LONGEST_LINE = 20
_MINUS = "\N{MINUS SIGN}"


def format_number(value: float) -> str:
    """Return three significant digits, without an exponent where it can be avoided.

    Args:
        value: Any finite number.

    Example:
        >>> format_number(0.071234)
        '0.0712'
    """
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace("-", _MINUS)
    digits = 2 - math.floor(math.log10(abs(value)))
    if digits > 6:
        return f"{value:.1e}".replace("-", _MINUS)
    text = f"{value:.{max(digits, 0)}f}".rstrip("0").rstrip(".")
    return text.replace("-", _MINUS)


def format_percent(value: float) -> str:
    """Return a change in percent, always with its sign.

    Args:
        value: The change as a fraction.

    Example:
        >>> format_percent(0.031)
        '+3.1 %'
    """
    percent = value * 100
    if abs(percent) < 5e-4:
        return "0 %"
    digits = 0 if abs(percent) >= 100 else 1 if abs(percent) >= 10 else 2
    text = f"{percent:+,.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", _MINUS) + " %"


def format_interval(interval: dict, scale: float = 1.0, sign: str = "") -> tuple:
    """Return value, low and high, with as many digits as their width is worth.

    Args:
        interval: As `gpt_tf.evaluation.report` states it.
        scale: What they are multiplied by, 100 for percent.
        sign: `"+"` to write it always.

    Example:
        >>> format_interval({"value": 5.8312, "low": 5.7712, "high": 5.8912})
        ('5.83', '5.77', '5.89')
    """
    numbers = [interval[part] * scale for part in ("value", "low", "high")]
    width = abs(numbers[2] - numbers[1]) or abs(numbers[0]) / 10 or 1.0
    digits = min(max(1 - math.floor(math.log10(width)), 0), 9)
    texts = [f"{number:{sign},.{digits}f}" for number in numbers]
    return tuple(text.replace("-", _MINUS) for text in texts)


def shorten(name):
    """Return a name as it is drawn: one line, not too long."""
    name = "".join(char if char.isprintable() else " " for char in str(name))
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def wrap(name):
    """Break a long name in two lines, after the mark nearest to its middle."""
    if len(name) <= _LONGEST_LINE:
        return name
    breaks = [found.end() for found in re.finditer(r"[-_ .,/]", name[:-1])]
    at = min(breaks, key=lambda place: abs(place - len(name) / 2), default=None)
    if at is None or not len(name) / 4 < at < len(name) * 3 / 4:
        return name
    return f"{name[:at]}\n{name[at:]}"
