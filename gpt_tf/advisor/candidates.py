"""The entries of a report as an advisor sees them: their numbers, what they break."""

import dataclasses
import math

from gpt_tf.advisor.constraints import KINDS
from gpt_tf.errors import DamagedFileError

# The order in which equals are told apart. All but throughput should be small.
MEASURES = ("accuracy", "latency", "size", "memory", "first_token", "throughput")
BUDGET_OF = {kind.measure: name for name, kind in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Value:
    """A quantity of an entry: number, 95 % interval if known, and where it is from."""

    number: float
    low: float | None = None
    high: float | None = None
    is_estimate: bool = False


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An entry with its quantities by the names of `MEASURES`; None is not known.

    Latency is the median, as the pictures have it; the budget is about `p95`.
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

    def is_estimate(self, measure: str) -> bool:
        """Whether a quantity is known by an estimate only."""
        value = self.values[measure]
        return value is not None and value.is_estimate

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
        """Return the budgets about quantities that are not known."""
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
    reference = _reference_perplexity(report)
    found = []
    for entry in report["entries"]:
        values = _values(entry, reference, concurrent)
        p95 = values.pop("p95")
        p99 = _spread(entry, "inter_token_latency_ms").get("p99")
        p99 = _number(entry, p99, "p99")
        found.append(Candidate(entry["name"], entry["kind"], values, p95, p99))
    return found


def _values(entry, reference, concurrent):
    latency = _part(entry, entry.get("latency"), "latency")
    guess = _part(entry, entry.get("estimate"), "estimate")
    step, first = (
        _spread(entry, name)
        for name in ("inter_token_latency_ms", "time_to_first_token_ms")
    )
    speed = latency.get("tokens_per_s")
    if concurrent:
        rows = latency.get("throughput") or []
        if not isinstance(rows, list):
            _damaged(entry, "throughput", rows)
        speeds = [_part(entry, row, "throughput").get("tokens_per_s") for row in rows]
        speeds = [_number(entry, one, "tokens_per_s") for one in speeds]
        speed = max((one for one in speeds if one is not None), default=speed)
    memory, guessed = latency.get("peak_memory_bytes"), guess.get("memory_bytes")
    found = {
        "latency": (step.get("median"), guess.get("latency_ms"), 1),
        "p95": (step.get("p95"), guess.get("latency_ms"), 1),
        "size": (entry.get("size_bytes"), guess.get("size_bytes"), 1e-6),
        "memory": (memory, guessed, 1e-6),
        "first_token": (first.get("median"), guess.get("first_token_ms"), 1),
        "throughput": (speed, guess.get("tokens_per_s"), 1),
    }
    values = {"accuracy": _accuracy(entry, reference)}
    for measure, (measured, guessed, factor) in found.items():
        number = _number(entry, measured, measure, above_0=True)
        guessed = _number(entry, guessed, f"estimated {measure}", above_0=True)
        if number is None and guessed is None:
            values[measure] = None
        elif number is None:
            values[measure] = Value(guessed * factor, is_estimate=True)
        else:
            values[measure] = Value(number * factor)
    return values


def _accuracy(entry, reference):
    """Return the increase of perplexity, or None where it cannot be told."""
    accuracy = _part(entry, entry.get("accuracy"), "accuracy")
    interval = accuracy.get("perplexity_increase")
    if interval is None:
        perplexity = _part(entry, accuracy.get("perplexity"), "perplexity")
        value = _number(entry, perplexity.get("value"), "perplexity", above_0=True)
        if value is None or reference is None:
            return None
        return Value(value / reference - 1)
    interval = _part(entry, interval, "perplexity_increase")
    numbers = [
        _number(entry, interval.get(name), f"perplexity_increase.{name}")
        for name in ("value", "low", "high")
    ]
    if numbers[0] is None or numbers[0] <= -1:
        _damaged(entry, "perplexity_increase", interval)
    return Value(*numbers)


def _reference_perplexity(report):
    for entry in report["entries"]:
        if entry["name"] == report.get("reference"):
            accuracy = _part(entry, entry.get("accuracy"), "accuracy")
            perplexity = _part(entry, accuracy.get("perplexity"), "perplexity")
            return _number(entry, perplexity.get("value"), "perplexity", above_0=True)
    return None


def _spread(entry, name):
    latency = _part(entry, entry.get("latency"), "latency")
    return _part(entry, latency.get(name), name)


def _part(entry, part, name):
    if part is None:
        return {}
    if not isinstance(part, dict):
        _damaged(entry, name, part)
    return part


def _number(entry, value, name, above_0=False):
    if value is None:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or (above_0 and value <= 0):
        _damaged(entry, name, value)
    return value


def _damaged(entry, name, value):
    raise DamagedFileError(
        f"Expected a number for {name} of {entry.get('name')!r} in the report. "
        f"Received: {value!r}. The report was altered; measure again."
    )
