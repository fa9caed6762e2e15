"""What a file may cost: budgets, and the scenarios that bring their own.

A scenario is a set of budgets and what is best among the files that keep them; the
numbers stand in `SCENARIOS`. Where they come from:

- *phone*: one reads 238 words a minute (Brysbaert, 2019), a token in about 170 ms; 50
  ms leave two thirds of the time to the app. After one second one's thought is
  interrupted (Nielsen, 1993). 100 MB do not hinder a download, and with 300 MB the
  system still keeps the app in the background.
- *board*: 150 ms a token just keep up with a reader; half of 512 MB is left to the
  system.
- *server*: nearly no loss, since there is room for the better file; half of the second
  belongs to the network.
- *custom*: no budgets of its own; see `Scenario`.
"""

import dataclasses
import math
import numbers

from gpt_tf import formatting
from gpt_tf.settings import arguments


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a budget is about."""

    what: str  # in a sentence
    measure: str  # the quantity, as `gpt_tf.advisor.candidates` names it
    unit: str
    is_least: bool = False  # whether the least is wanted and not the most

    def is_broken(self, value: float, limit: float) -> bool:
        """Whether a value is beyond the budget."""
        return value < limit if self.is_least else value > limit

    def text(self, value: float, digits: int = 3) -> str:
        """Return a value with its unit, to so many significant digits."""
        scaled = value * 100 if self.unit == "%" else value
        return f"{formatting.number(scaled, digits=digits)} {self.unit}"


KINDS = {
    "max_perplexity_increase": Kind("perplexity increase", "accuracy", "%"),
    "max_score_drop": Kind("score drop", "score", "%"),
    "max_latency_ms": Kind("p95 latency", "latency", "ms"),
    "max_size_mb": Kind("size", "size", "MB"),
    "max_memory_mb": Kind("peak memory", "memory", "MB"),
    "max_first_token_ms": Kind("time to first token", "first_token", "ms"),
    "min_tokens_per_s": Kind("throughput", "throughput", "tokens/s", True),
}

# What a file may be chosen by: a quantity, or perplexity, latency and size together.
PREFERENCES = (*(kind.measure for kind in KINDS.values()), "balance")


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What may be spent. None is no limit.

    Every field also takes the text of a command line.

    Args:
        max_perplexity_increase: Above the reference's, as a fraction: 0.03, or `"3%"`.
        max_latency_ms: 95th percentile of the time between two tokens.
        max_size_mb: The file, in units of 10^6 bytes.
        max_memory_mb: Most memory of a process that runs it, in units of 10^6 bytes.
        max_first_token_ms: Median time from the prompt to the first token.
        min_tokens_per_s: Of one request; of a server's best number of requests.
        max_score_drop: Of a task's rows the share that fewer are right than of the
            reference: 0.01, or `"1%"`.

    Raises:
        InputError: One is no number, not finite, not above 0, or an increase of
            100 % or more.

    Example:
        >>> Budgets("3%", max_latency_ms="15").max_perplexity_increase
        0.03
    """

    max_perplexity_increase: str | float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    max_memory_mb: float | None = None
    max_first_token_ms: float | None = None
    min_tokens_per_s: float | None = None
    max_score_drop: str | float | None = None

    def __post_init__(self):
        for name, value in self.given().items():
            object.__setattr__(self, name, _limit(name, value))

    @classmethod
    def of(cls, value) -> "Budgets":
        """Return budgets from some, from a dict of them, or from None."""
        if value is None or isinstance(value, cls):
            return value or cls()
        if not isinstance(value, dict) or not value.keys() <= KINDS.keys():
            expected = f"a Budgets or a dict of its fields, {', '.join(KINDS)}"
            arguments.refuse("budgets", value, expected)
        return cls(**value)

    def given(self) -> dict:
        """Return those that are not None, by name."""
        values = {name: getattr(self, name) for name in KINDS}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, others: "Budgets") -> "Budgets":
        """Return others, where these say nothing."""
        return Budgets(**{**others.given(), **self.given()})


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Where a file is to run.

    Args:
        budgets: Those that hold unless others are given.
        objective: What is best among the files that keep them: `"latency"`, `"size"`,
            `"server"`, which is throughput, of which 1 % more perplexity costs 10 %,
            or `"custom"`: the first of accuracy, latency and size that has no budget,
            and accuracy if all three have one.
    """

    budgets: Budgets
    objective: str


def scenario_of(name: str) -> Scenario:
    """Return the scenario of that name, or refuse it."""
    return SCENARIOS[arguments.one_of("scenario", name, SCENARIOS)]


def objective_of(scenario: str, prefer: str | None = None) -> str:
    """Return what is to be best: one of `PREFERENCES`, or the scenario's objective."""
    own = scenario_of(scenario).objective
    return own if prefer is None else arguments.one_of("prefer", prefer, PREFERENCES)


def option(name: str) -> str:
    """Return how the command line calls a budget."""
    return "--" + name.replace("_", "-")


def _limit(name, value):
    """Return a budget as a number: of accuracy a fraction, which may be "3%"."""
    is_fraction = KINDS[name].unit == "%"
    text = value.strip() if isinstance(value, str) else ""
    is_percent = is_fraction and text.endswith("%")
    good = isinstance(value, str | numbers.Real) and not isinstance(value, bool)
    try:
        limit = float((text[:-1] if is_percent else value) if good else "")
    except (ValueError, OverflowError):
        limit = math.nan
    limit = limit / 100 if is_percent else limit
    if not 0 < limit < (1 if is_fraction else math.inf):
        expected = f"a number above 0, in {KINDS[name].unit}"
        repair = "Write it without a unit, or leave it out for no limit."
        if is_fraction:
            expected = "a part of 1 above 0, 0.03 for example, or 3%"
            repair = "Leave it out for no limit."
            if 1 <= limit < 100 and not is_percent:
                repair = f"Did you mean {limit:g}%?"
        arguments.refuse(name, value, expected, repair)
    return limit


# At the end, since its budgets are checked by what stands above.
SCENARIOS = {
    "phone": Scenario(Budgets(0.05, 50, 100, 300, max_first_token_ms=1000), "latency"),
    "board": Scenario(Budgets(0.10, 150, 32, 256), "size"),
    "server": Scenario(Budgets(0.01, max_first_token_ms=500), "server"),
    "custom": Scenario(Budgets(), "custom"),
}
