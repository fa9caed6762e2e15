"""The files as points of the plane: where each stands, and which are the frontier."""

from collections.abc import Iterable

from gpt_tf.reporting.pictures import canvas
from gpt_tf.reporting.pictures.verdict import outside_of

_LARGEST_AREA = 700.0  # of a point, in square points
_INCREASE_OF_REFERENCE = {"value": 0.0, "low": 0.0, "high": 0.0}


def pareto_points(report: dict) -> tuple[list[dict], bool]:
    """Return the files that have both accuracy and latency, as points.

    Args:
        report: As `gpt_tf.evaluation.report` states it.

    Returns:
        The points in the order of the report, and whether upwards is 1 + the
        perplexity's increase over the reference, as it is where every file has one;
        else it is perplexity. A point is a dict: `name`; `x`, the median inter-token
        latency in ms; `p95` of the same; `y`; its `interval`, `(low, high)`;
        `size_mb`; and whether it `is_outside` the budgets, `is_choice`, and
        `is_reference`.

    Raises:
        DamagedFileError: A number in the report is none.
    """
    measured = []
    for entry in report["entries"]:
        spread = (entry["latency"] or {}).get("inter_token_latency_ms")
        accuracy = entry["accuracy"] or {}
        if spread and accuracy.get("perplexity") and spread["median"] > 0:
            measured.append((entry, spread, accuracy))
    increases = {
        entry["name"]: accuracy.get("perplexity_increase")
        or (_INCREASE_OF_REFERENCE if entry["name"] == report["reference"] else None)
        for entry, _, accuracy in measured
    }
    is_increase = bool(increases) and all(increases.values())
    points = []
    for entry, spread, accuracy in measured:
        interval = increases[entry["name"]] if is_increase else accuracy["perplexity"]
        value, low, high = (
            interval[part] + is_increase for part in ("value", "low", "high")
        )
        points.append(_point(entry, spread, value, low, high))
    return _marked(points, report), is_increase


def _point(entry, spread, value, low, high):
    return {
        "name": entry["name"],
        "x": spread["median"],
        "p95": max(spread["p95"], spread["median"]),
        "y": value,
        "interval": (min(low, value), max(high, value)),
        "size_mb": (entry["size_bytes"] or 0) / 1e6,
    }


def _marked(points, report):
    """The points with what is said of them."""
    outside = outside_of(report)
    choice = (report.get("recommendation") or {}).get("choice")
    return [
        {
            **point,
            "is_outside": point["name"] in outside,
            "is_choice": point["name"] == choice,
            "is_reference": point["name"] == report["reference"],
        }
        for point in points
    ]


def frontier_of(points: Iterable[dict]) -> list[dict]:
    """Return the points within the budgets that no other one of them beats.

    A point beats another if it is smaller in one of `x` and `y` and larger in neither.
    So equal points do not beat each other: all of them are on the frontier or none.

    Args:
        points: Dicts with the numbers `x` and `y`, both better when smaller, and
            `is_outside`. If all are outside the budgets, all count.

    Returns:
        Those on the frontier, by `x`; equal ones in the order in which they came.

    Example:
        >>> places = [(2, 2), (3, 3), (1, 5)]
        >>> points = [{"x": x, "y": y, "is_outside": False} for x, y in places]
        >>> [(point["x"], point["y"]) for point in frontier_of(points)]
        [(1, 5), (2, 2)]
    """
    frontier, points = [], list(points)
    within = [point for point in points if not point["is_outside"]]
    for point in sorted(within or points, key=_place):
        is_lower = not frontier or point["y"] < frontier[-1]["y"]
        if is_lower or _place(point) == _place(frontier[-1]):
            frontier.append(point)
    return frontier


def corners_of(points):
    """Return the places `(x, y)` on the frontier, by x; equal points share one."""
    return list(dict.fromkeys(map(_place, frontier_of(points))))


def _place(point):
    return point["x"], point["y"]


def area_of(size_mb, points):
    """Return the area of a point, proportional to the file's size, in square points.

    Args:
        size_mb: The file's size.
        points: All that are drawn; the largest of them has the area that is largest.
    """
    largest = max(point["size_mb"] for point in points) or 1.0
    return _LARGEST_AREA * size_mb / largest


def colour_of(point):
    """Return the colour of a point's marks."""
    if point["is_choice"]:
        return canvas.VERMILION
    return canvas.PALE if point["is_outside"] else canvas.BLUE
