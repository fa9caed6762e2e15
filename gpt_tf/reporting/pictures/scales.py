"""Scales of axes: when they are logarithmic, where they end, which ticks they have."""

import math

# Beyond this ratio of the largest to the smallest an axis is logarithmic.
LOG_RATIO = 8.0
_MOST_TICKS = 8
_INCREASES = (
    *(-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0),
)


def limits(reach, budget, is_log, least):
    """Return limits with room for labels, and whether the budget lies in them.

    Args:
        reach: All numbers that are drawn.
        budget: A number, or None.
        is_log: Whether the axis is logarithmic.
        least: Room on either side that there is at least, as a part of the number.

    Returns:
        `((lower, upper), is_drawn)`.
    """
    forward, back = (math.log, math.exp) if is_log else (float, float)
    low, high = forward(min(reach)), forward(max(reach))
    at = None
    if budget is not None and (budget > 0 or not is_log):
        at = forward(budget)
        both = max(high, at) - min(low, at)
        # A far budget would press the points into a corner.
        if both > 0 and (high - low) / both > 0.3:
            low, high = min(low, at), max(high, at)
    # One point, or equal ones, get some room too.
    smallest = least if is_log else max(abs(low), abs(high), 1e-9) * least
    room = max((high - low) * 0.16, smallest)
    lower, upper = low - room, high + room
    if not is_log and low >= 0 > lower:
        lower = -0.04 * upper
    return (back(lower), back(upper)), at is not None and lower <= at <= upper


def decades(low, high):
    """Return ticks 1, 2, 5 of each power of ten between two numbers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return thinned(
        [
            digit * 10.0**exponent
            for exponent in exponents
            for digit in (1, 2, 5)
            if low <= digit * 10.0**exponent <= high
        ]
    )


def thinned(ticks):
    """Return every so many of a list of ticks, so that they do not touch."""
    if len(ticks) <= _MOST_TICKS:
        return ticks
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]


def increases(low, high):
    """Return ticks of a logarithmic axis of 1 + increase that do not touch."""
    low, high = math.log(low), math.log(high)
    ticks = []
    # Zero first: the reference's own place.
    for increase in sorted(_INCREASES, key=abs):
        at = math.log1p(increase)
        if low <= at <= high and all(
            abs(at - math.log(tick)) > (high - low) * 0.055 for tick in ticks
        ):
            ticks.append(1 + increase)
    return sorted(ticks)
