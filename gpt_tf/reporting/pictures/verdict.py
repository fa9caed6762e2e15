"""What the budgets, and the recommendation if there is one, say of a report's files."""

from gpt_tf.advisor.candidates import Candidate, candidates_of


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
