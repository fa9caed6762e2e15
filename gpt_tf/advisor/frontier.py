"""The files of a report as points of accuracy and latency, and their frontier."""

from collections.abc import Iterable

from gpt_tf.advisor.candidates import candidates_of, dominates


def budgets_of(report: dict) -> dict:
    """Return the limits that a report's choice was made by."""
    budgets = (report["recommendation"] or {}).get("budgets") or report["budgets"]
    return {name: value for name, value in budgets.items() if value is not None}


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
        `is_reference`. What the recommendation ruled out is outside or, without one,
        what exceeds a budget.

    Raises:
        DamagedFileError: The report is not of the shape that it should be.
    """
    candidates = candidates_of(report, concurrent=False)
    said, budgets = report["recommendation"], budgets_of(report)
    outside = {one.name for one in candidates if one.broken(budgets)}
    if said:
        outside = {row["name"] for row in said.get("ruled_out") or []}
    measured = [
        one for one in candidates if one.values["latency"] and one.values["perplexity"]
    ]
    is_increase = bool(measured) and all(one.values["accuracy"] for one in measured)
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
                "interval": (found.low + is_increase, found.high + is_increase),
                "size_mb": size.number if size else 0,
                "is_outside": one.name in outside,
                "is_choice": bool(said) and one.name == said.get("choice"),
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
