"""The entries of a report as the advisor sees them: their numbers, what they break."""

import dataclasses
import math

from gpt_tf.advisor.constraints import KINDS
from gpt_tf.evaluation.report import check_report

# The order in which equals are told apart. All but throughput should be small.
MEASURES = ("accuracy", "latency", "size", "memory", "first_token", "throughput")
BUDGET_OF = {kind.measure: name for name, kind in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Value:
    """A measured quantity of an entry, with its 95 % interval if there is one."""

    number: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An entry with its quantities by the names of `MEASURES`; None was not measured.

    Latency is the median, as the pictures show it; the budget is about `p95`.
    """

    name: str
    kind: str
    values: dict
    p95: Value | None
    p99_ms: float | None

    def cost(self, measure: str) -> float:
        """Return a number that should be small; infinite where nothing is known."""
        value = self.values[measure]
        if value is None:
            return math.inf
        return -value.number if measure == "throughput" else value.number

    def costs(self) -> tuple:
        """Return the costs of all measures, in their order."""
        return tuple(self.cost(measure) for measure in MEASURES)

    def of(self, name: str) -> Value | None:
        """Return the quantity that a budget is about."""
        return (
            self.p95 if name == "max_latency_ms" else self.values[KINDS[name].measure]
        )

    def worsened(self, share: float) -> "Candidate":
        """Return what a measurement that came out worse by a share would have found.

        Accuracy and size are the same in every measurement.
        """
        factors = {"accuracy": 1, "size": 1, "throughput": 1 / (1 + share)}

        def moved(measure, value):
            factor = factors.get(measure, 1 + share)
            return value and dataclasses.replace(value, number=value.number * factor)

        values = {name: moved(name, value) for name, value in self.values.items()}
        return dataclasses.replace(self, values=values, p95=moved("p95", self.p95))

    def share(self, name: str, limit: float) -> float:
        """Return what of a budget is used; above 1 it is broken."""
        number = self.of(name).number
        return limit / number if KINDS[name].is_least else number / limit

    def breaks(self, name: str, limit: float) -> bool:
        """Whether a budget is broken by what is known."""
        value = self.of(name)
        if value is None:
            return False
        # Compared as they are: the share could round to 1.
        number = value.number
        return number < limit if KINDS[name].is_least else number > limit

    def broken(self, given: dict) -> list[str]:
        """Return the budgets that are broken, the most broken one first."""
        names = [name for name, limit in given.items() if self.breaks(name, limit)]
        return sorted(names, key=lambda name: -self.share(name, given[name]))

    def missing(self, given: dict) -> list[str]:
        """Return the budgets about quantities that were not measured."""
        return [name for name in given if self.of(name) is None]

    def keeps(self, given: dict) -> bool:
        """Whether all budgets are kept, and known to be."""
        return not self.missing(given) and not self.broken(given)


def candidates_of(report: dict, concurrent: bool) -> list[Candidate]:
    """Read the entries of a report.

    Args:
        report: As `gpt_tf.evaluation.report.read_report` returns it.
        concurrent: Whether throughput is the best over numbers of concurrent requests;
            if not, that of one request.

    Raises:
        DamagedFileError: A number is none, not finite, or not above 0 where it has to.
    """
    check_report(report)
    reference = None
    for entry in report["entries"]:
        if entry["name"] == report.get("reference"):
            reference = _perplexity(entry)
    found = []
    for entry in report["entries"]:
        latency = entry.get("latency") or {}
        step = latency.get("inter_token_latency_ms") or {}
        first = latency.get("time_to_first_token_ms") or {}
        speed = latency.get("tokens_per_s")
        if concurrent:
            rates = [row["tokens_per_s"] for row in latency.get("throughput") or []]
            speed = max(rates, default=speed)
        measured = {
            "latency": step.get("median"),
            "size": _megabytes(entry.get("size_bytes")),
            "memory": _megabytes(latency.get("peak_memory_bytes")),
            "first_token": first.get("median"),
            "throughput": speed,
        }
        values = {name: _value(number) for name, number in measured.items()}
        values["accuracy"] = _increase(entry, reference)
        p95, p99 = _value(step.get("p95")), step.get("p99")
        found.append(Candidate(entry["name"], entry["kind"], values, p95, p99))
    return found


def _increase(entry, reference):
    """Return the increase of perplexity, or None where it cannot be told."""
    interval = (entry.get("accuracy") or {}).get("perplexity_increase")
    if interval is not None:
        return Value(interval["value"], interval["low"], interval["high"])
    perplexity = _perplexity(entry)
    if perplexity is None or reference is None:
        return None
    return Value(perplexity / reference - 1)


def _perplexity(entry):
    interval = (entry.get("accuracy") or {}).get("perplexity")
    return interval and interval["value"]


def _value(number):
    return None if number is None else Value(number)


def _megabytes(number):
    return None if number is None else number * 1e-6
