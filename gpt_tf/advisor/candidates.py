"""The entries of a report as the advisor sees them: their numbers, what they break."""

import dataclasses
import math
from typing import NamedTuple

from gpt_tf.advisor.constraints import KINDS
from gpt_tf.evaluation.report import check_report

# The order in which equals are told apart. All but throughput should be small.
MEASURES = tuple(kind.measure for kind in KINDS.values())
BUDGET_OF = {kind.measure: name for name, kind in KINDS.items()}


class Value(NamedTuple):
    """A measured quantity of an entry, and its 95 % interval if there is one."""

    number: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An entry with its quantities by the names of `MEASURES`; None was not measured.

    Accuracy is the increase of perplexity, and latency the median, as the pictures show
    it; among the quantities are `"perplexity"` and `"p95"` too.
    """

    name: str
    kind: str
    values: dict

    def cost(self, measure: str) -> float:
        """Return a number that should be small; infinite where nothing is known."""
        value = self.values[measure]
        if value is None:
            return math.inf
        return -value.number if measure == "throughput" else value.number

    def costs(self) -> tuple:
        """Return the costs of all measures, in their order."""
        return tuple(map(self.cost, MEASURES))

    @property
    def place(self) -> tuple[float, float]:
        """Latency and accuracy, as they are drawn against each other."""
        return self.cost("latency"), self.cost("accuracy")

    def of(self, name: str) -> Value | None:
        """Return the quantity that a budget is about."""
        measure = KINDS[name].measure
        return self.values["p95" if measure == "latency" else measure]

    def worsened(self, share: float) -> "Candidate":
        """Return what a measurement that came out worse by a share would have found."""
        # Accuracy and size are the same in every measurement.
        factors = {"accuracy": 1, "score": 1, "size": 1, "throughput": 1 / (1 + share)}
        values = dict(self.values)
        for name, value in values.items():
            if value is not None:
                number = value.number * factors.get(name, 1 + share)
                values[name] = value._replace(number=number)
        return dataclasses.replace(self, values=values)

    def share(self, name: str, limit: float) -> float:
        """Return what of a budget is used; above 1 it is broken."""
        number = self.of(name).number
        return limit / number if KINDS[name].is_least else number / limit

    def broken(self, given: dict) -> list[str]:
        """Return the budgets that are known to be broken, the most broken one first."""
        names = [
            name
            for name, limit in given.items()
            # Compared as they are: the share could round to 1.
            if self.of(name) and KINDS[name].is_broken(self.of(name).number, limit)
        ]
        return sorted(names, key=lambda name: -self.share(name, given[name]))

    def missing(self, given: dict) -> list[str]:
        """Return the budgets about quantities that were not measured."""
        return [name for name in given if self.of(name) is None]

    def keeps(self, given: dict) -> bool:
        """Whether all budgets are kept, and known to be."""
        return not self.missing(given) and not self.broken(given)


def dominates(one: tuple, other: tuple) -> bool:
    """Whether some costs are nowhere above others and somewhere below them.

    Example:
        >>> dominates((1, 2), (1, 3)), dominates((1, 2), (1, 2))
        (True, False)
    """
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def candidates_of(report: dict, concurrent: bool) -> list[Candidate]:
    """Read the entries of a report.

    Args:
        report: As `gpt_tf.evaluation.report.read_report` returns it.
        concurrent: Whether throughput is the best over numbers of concurrent requests;
            if not, that of one request.

    Raises:
        DamagedFileError: The report is not of the shape that it should be.
    """
    check_report(report)
    found = []
    for entry in report["entries"]:
        accuracy, latency = entry["accuracy"] or {}, entry["latency"] or {}
        step = latency.get("inter_token_latency_ms") or {}
        first = latency.get("time_to_first_token_ms") or {}
        speed = latency.get("tokens_per_s")
        if concurrent:
            rates = [row["tokens_per_s"] for row in latency.get("throughput") or []]
            speed = max(rates, default=speed)
        values = {
            "perplexity": _value(accuracy.get("perplexity")),
            "accuracy": _value(accuracy.get("perplexity_increase")),
            "score": _drop((accuracy.get("task") or {}).get("difference")),
            "latency": _value(step.get("median")),
            "p95": _value(step.get("p95")),
            "size": _value(entry["size_bytes"], 1e-6),
            "memory": _value(latency.get("peak_memory_bytes"), 1e-6),
            "first_token": _value(first.get("median")),
            "throughput": _value(speed),
        }
        found.append(Candidate(entry["name"], entry["kind"], values))
    perplexities = {one.name: one.values["perplexity"] for one in found}
    reference = perplexities.get(report["reference"])
    for one in found:
        perplexity = one.values["perplexity"]
        if one.values["accuracy"] is None and perplexity and reference:
            one.values["accuracy"] = _value(perplexity.number / reference.number - 1)
    return found


def _drop(difference):
    """Return how much a score fell, as a `Value`, or None."""
    if difference is None:
        return None
    # Not -0.0, which would be told.
    parts = (0.0 - difference[part] for part in ("value", "high", "low"))
    return Value(*parts)


def _value(found, scale=1):
    """Return a number, or an interval of a report, as a `Value`; None as it is."""
    if found is None:
        return None
    if isinstance(found, dict):
        return Value(found["value"], found["low"], found["high"])
    return Value(*[found * scale] * 3)
