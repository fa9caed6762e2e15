"""The files of a report as points of accuracy and latency, and their frontier."""

from collections.abc import Iterable

from gpt_tf.advisor.candidates import candidates_of, dominates


def budgets_of(report: dict) -> dict:
    """Return the budgets that the choice was made by, those that are numbers.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
    """
    budgets = (report["recommendation"] or {}).get("budgets") or report["budgets"]
    return {name: value for name, value in budgets.items() if value is not None}


def outside_of(report: dict) -> set[str]:
    """Return the names of the files that the budgets exclude.

    These are what the recommendation rules out or, without one, the files whose
    measured numbers exceed a budget.

    Args:
        report: As `gpt_tf.evaluation.report` states it.

    Raises:
        DamagedFileError: A number in the report is none.
    """
    if report["recommendation"]:
        return {row["name"] for row in report["recommendation"].get("ruled_out") or []}
    budgets, candidates = budgets_of(report), candidates_of(report, concurrent=False)
    return {one.name for one in candidates if one.broken(budgets)}


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
    measured = [
        one
        for one in candidates_of(report, concurrent=False)
        if one.values["latency"] and one.values["perplexity"]
    ]
    is_increase = bool(measured) and all(one.values["accuracy"] for one in measured)
    outside = outside_of(report)
    choice = (report["recommendation"] or {}).get("choice")
    points = []
    for one in measured:
        found = one.values["accuracy" if is_increase else "perplexity"]
        median, p95, size = (one.values[name] for name in ("latency", "p95", "size"))
        points.append(
            {
                "name": one.name,
                "x": median.number,
                "p95": max(p95.number if p95 else 0, median.number),
                "y": found.number + is_increase,
                "interval": (
                    min(found.low, found.number) + is_increase,
                    max(found.high, found.number) + is_increase,
                ),
                "size_mb": size.number if size else 0,
                "is_outside": one.name in outside,
                "is_choice": one.name == choice,
                "is_reference": one.name == report["reference"],
            }
        )
    return points, is_increase


def frontier_of(points: Iterable[dict]) -> list[dict]:
    """Return the points within the budgets that are dominated by no other one of them.

    A point dominates another if it is smaller in one of `x` and `y` and larger in
    neither. So equal points do not dominate each other: all of them are on the
    frontier or none.

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
    points = list(points)
    points = [point for point in points if not point["is_outside"]] or points
    places = [(point["x"], point["y"]) for point in points]
    frontier = [
        point
        for point, place in zip(points, places, strict=True)
        if not any(dominates(other, place) for other in places)
    ]
    return sorted(frontier, key=lambda point: point["x"])
