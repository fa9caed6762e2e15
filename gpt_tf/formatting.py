"""Numbers as people read them: the same in the terminal, in plots and on the page.

What was not measured is None, and is written as `NOT_MEASURED`.
"""

import datetime
import math

NOT_MEASURED = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """Return `digits` significant digits, without an exponent where it can be avoided.

    Digits before the decimal point are always written; `signed` writes a plus too.

    Example:
        >>> number(0.071234)
        '0.0712'
    """
    if value is None:
        return NOT_MEASURED
    if value == 0:
        return "0"
    sign = "+" if signed else ""
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if places <= 0:
        text = f"{value:{sign},.0f}"
    elif places <= digits + 3:
        text = f"{value:{sign},.{places}f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:{sign}.1e}"
    return text.replace("-", _MINUS)


def quantity(value: float | None, unit: str) -> str:
    """Return a number with its unit."""
    return NOT_MEASURED if value is None else f"{number(value)} {unit}".rstrip()


def percent(share: float | None, signed: bool = False) -> str:
    """Return a share of 1 in percent; a change is `signed`.

    Example:
        >>> percent(0.031, signed=True)
        '+3.1 %'
    """
    if share is None:
        return NOT_MEASURED
    if abs(share) < 5e-6:
        return "0 %"
    return f"{number(share * 100, signed)} %"


def interval(found: dict, scale: float = 1.0, signed: bool = False) -> tuple:
    """Return value, low and high, with as many digits as their width is worth.

    Example:
        >>> interval({"value": 5.8312, "low": 5.7712, "high": 5.8912})
        ('5.83', '5.77', '5.89')
    """
    numbers = [found[part] * scale for part in ("value", "low", "high")]
    width = abs(numbers[2] - numbers[1]) or abs(numbers[0]) / 10 or 1.0
    digits = min(max(1 - math.floor(math.log10(width)), 0), 9)
    sign = "+" if signed else ""
    texts = [f"{each:{sign},.{digits}f}" for each in numbers]
    return tuple(text.replace("-", _MINUS) for text in texts)


def megabytes(size_bytes: float | None) -> str:
    """Return a size in units of 10^6 bytes, or of 10^9."""
    if size_bytes is not None and size_bytes >= 1e9:
        return quantity(size_bytes / 1e9, "GB")
    return NOT_MEASURED if size_bytes is None else quantity(size_bytes / 1e6, "MB")


def bandwidth(rates: dict[str, float | None]) -> str:
    """Return how fast memory is read, from bytes per second by numbers of threads."""
    return ", ".join(
        f"{quantity(rate / 1e9, 'GB/s')} to {count(int(threads), 'thread')}"
        for threads, rate in rates.items()
        if rate
    )


def milliseconds(value: float | None) -> str:
    """Return milliseconds, as seconds where these are thousands."""
    if value is not None and value >= 1000:
        return quantity(value / 1000, "s")
    return quantity(value, "ms")


def duration(seconds: float | None) -> str:
    """Return seconds, as minutes and hours where these are many."""
    if seconds is None or seconds < 60:
        return quantity(seconds, "s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


def count(value: int | None, one: str) -> str:
    """Return how many there are of something, "2 tokens" for example."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,} {one if value == 1 else one + 's'}"


def times(ratio: float, more: str, less: str) -> str:
    """Return how many times as much something is, as `more`, or as `less` below 1."""
    if 1 / 1.05 < ratio < 1.05:
        return "within 5 %"
    factor, word = (ratio, more) if ratio > 1 else (1 / ratio, less)
    factor = round(factor) if factor >= 10 else round(factor, 1)
    return f"{number(factor)}\N{MULTIPLICATION SIGN} {word}"


def moment(made_at: str | None) -> str:
    """Return an ISO time as a day and a time."""
    try:
        return f"{datetime.datetime.fromisoformat(made_at):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError):
        return str(made_at or NOT_MEASURED)
