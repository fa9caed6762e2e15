"""The files of a report as points of accuracy and latency, and their frontier."""

from collections.abc import Iterable

from gpt_tf.advisor.candidates import Candidate, candidates_of

_INCREASE_OF_REFERENCE = {"value": 0.0, "low": 0.0, "high": 0.0}


def budgets_of(report: dict) -> dict:
    """Return the budgets that the choice was made by, those that are numbers.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
    """
    budgets = (report.get("recommendation") or {}).get("budgets") or report["budgets"]
    return {name: value for name, value in budgets.items() if value is not None}


def candidates_by_name(report: dict) -> dict[str, Candidate]:
    """Return the entries as the advisor saw them, by name.

    Args:
        report: As `gpt_tf.evaluation.report` states it.

    Raises:
        DamagedFileError: A number in the report is none.
    """
    scenario = (report.get("recommendation") or {}).get("scenario")
    candidates = candidates_of(report, concurrent=scenario == "server")
    return {one.name: one for one in candidates}


def outside_of(report: dict) -> set[str]:
    """Return the names of the files that the budgets exclude.

    These are what the recommendation rules out or, without one, the files whose
    measured numbers exceed a budget.

    Args:
        report: As `gpt_tf.evaluation.report` states it.

    Raises:
        DamagedFileError: A number in the report is none.
    """
    recommendation = report.get("recommendation")
    if recommendation:
        return {row["name"] for row in recommendation.get("ruled_out") or []}
    budgets = budgets_of(report)
    candidates = candidates_by_name(report)
    return {name for name, one in candidates.items() if one.broken(budgets)}


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
    outside = outside_of(report)
    choice = (report.get("recommendation") or {}).get("choice")
    points = []
    for entry, spread, accuracy in measured:
        name = entry["name"]
        interval = increases[name] if is_increase else accuracy["perplexity"]
        value, low, high = (
            interval[part] + is_increase for part in ("value", "low", "high")
        )
        points.append(
            {
                "name": name,
                "x": spread["median"],
                "p95": max(spread["p95"], spread["median"]),
                "y": value,
                "interval": (min(low, value), max(high, value)),
                "size_mb": (entry["size_bytes"] or 0) / 1e6,
                "is_outside": name in outside,
                "is_choice": name == choice,
                "is_reference": name == report["reference"],
            }
        )
    return points, is_increase


def frontier_of(points: Iterable[dict]) -> list[dict]:
    """Return the points within the budgets that no other one of them dominates.

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

    def place(point):
        return point["x"], point["y"]

    frontier, points = [], list(points)
    within = [point for point in points if not point["is_outside"]]
    for point in sorted(within or points, key=place):
        is_lower = not frontier or point["y"] < frontier[-1]["y"]
        if is_lower or place(point) == place(frontier[-1]):
            frontier.append(point)
    return frontier
