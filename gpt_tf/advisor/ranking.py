"""Which file to ship: the best at what matters among those that keep the budgets.

`RULE` states the order, in which measured files alone are ranked. So the order of the
entries does not matter, and the runner-up is what would be chosen without the choice.
"""

import dataclasses
import decimal
import math

from gpt_tf.advisor.candidates import BUDGET_OF, MEASURES, candidates_of, dominates
from gpt_tf.advisor.constraints import KINDS, Budgets, objective_of, option, scenario_of
from gpt_tf.formatting import number
from gpt_tf.settings import arguments

# 1 % more perplexity weighs as much as this many % of speed or of size.
_PERPLEXITY_WEIGHT = 10
# Measurement error: what differs by less ties. Of perplexity it is about what 40,000
# tokens of text leave open, of times what `benchmark --baseline` takes for noise.
_TIE_PERPLEXITY = 0.001
_TIE_SHARE = 0.05
_TIE_SIZE = 0.01

RULE = (
    "Of the files within all budgets the one with the smallest increase in perplexity, "
    "or what is best at what is wanted instead; where several tie within measurement "
    f"error ({100 * _TIE_PERPLEXITY:g} points of perplexity, {100 * _TIE_SHARE:g} % of "
    "a time), the most accurate of them, then the fastest, then the smallest."
)

_WORSE_OR_BETTER = {
    "accuracy": ("less accurate", "more accurate"),
    "score": ("worse at the task", "better at the task"),
    "latency": ("slower", "quicker"),
    "size": ("larger", "smaller"),
    "memory": ("higher in peak memory", "lower in peak memory"),
    "first_token": ("later with the first token", "earlier with the first token"),
    "throughput": ("lower in throughput", "higher in throughput"),
}
# Where nothing else decides.
_DECIDING = ("accuracy", "latency", "size")
# What is weighed against accuracy.
_BALANCED = {"balance": _DECIDING, "server": ("accuracy", "throughput")}
_SHIPPABLE = ("tflite", "litertlm")


def recommend(
    report: dict,
    budgets: Budgets | dict | None = None,
    scenario: str = "custom",
    prefer: str | None = None,
) -> dict:
    """Choose the file to ship among those of a report.

    Keras models are references and never chosen. What has a budget and was not measured
    rules a file out. What is chosen for accuracy or latency is on the Pareto frontier
    of both.

    Args:
        report: As `gpt_tf.evaluation.report.read_report` returns it.
        budgets: They come before the scenario's. None: the scenario's alone; of
            `"custom"`, which has none, the report's own.
        scenario: A key of `SCENARIOS`; see `Scenario` for what it makes best.
        prefer: One of `PREFERENCES`, to be best among the files that keep the budgets.
            None: what the scenario makes best.

    Returns:
        A dict of JSON values:

        - `scenario`, `prefer`, and `budgets` by name, None where there is none;
        - `choice`: the name of an entry, or None if none keeps the budgets;
        - `why`: sentences;
        - `ties`: names that another measurement, being off by its error, may choose;
        - `runner_up`: what would be chosen without it, or None, and
          `runner_up_cost`: a sentence with what that would cost and win;
        - `ranking`: the names of all that keep the budgets, best first;
        - `ruled_out`: of the others `name`, `constraint` (the budget that is broken
          most, `"not measured"` or `"not shippable"`) and `sentence`;
        - `nearest_miss`: where there is no choice: `name`, `excess` (0.1: a tenth over
          the budget), `options` (of the command line, that would admit it) and
          `sentence`.

    Raises:
        InputError: A budget, the scenario or the preference cannot be used.
        DamagedFileError: The report is not of the shape that it should be.

    Example:
        >>> recommend(read_report("report.json"), Budgets("3%", 15, 8))["choice"]
        'student-int8'

    Reference: article 6.3.
    """
    arguments.instance("report", report, dict, "what `read_report` returns")
    objective = objective_of(scenario, prefer)
    if budgets is None and scenario == "custom":
        budgets = report.get("budgets")
    limits = Budgets.of(budgets).over(scenario_of(scenario).budgets)
    given = limits.given()
    if objective == "custom":
        # Where a task says what is good enough, the smallest file is wanted.
        order = _DECIDING[::-1] if "max_score_drop" in given else _DECIDING
        free = (name for name in order if BUDGET_OF[name] not in given)
        objective = next(free, "accuracy")
    candidates = candidates_of(report, concurrent=scenario == "server")
    candidates.sort(key=lambda one: one.name)
    shippable = [one for one in candidates if one.kind in _SHIPPABLE]
    left, fitting = [one for one in shippable if one.keeps(given)], []
    while left:
        fitting.append(_best(left, objective))
        left.remove(fitting[-1])
    ties = _ties(shippable, fitting[0], objective, given) if fitting else []
    others = [one for one in candidates if one not in fitting]
    return {
        "scenario": scenario,
        "prefer": prefer,
        "budgets": dataclasses.asdict(limits),
        "choice": fitting[0].name if fitting else None,
        "why": _why(fitting, ties, objective, given),
        "ties": ties,
        "runner_up": fitting[1].name if len(fitting) > 1 else None,
        "runner_up_cost": _runner_up_cost(*fitting[:2]) if fitting else None,
        "ranking": [one.name for one in fitting],
        "ruled_out": [_ruled_out(one, given) for one in others],
        "nearest_miss": None if fitting else _nearest_miss(shippable, given),
    }


def print_recommendation(result: dict, console=None) -> None:
    """Print what `recommend` returned: the choice and why, and the others."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    choice, lines = result["choice"], list(result["why"])
    if result["nearest_miss"] is not None:
        lines.append(result["nearest_miss"]["sentence"])
    if result["runner_up"] is not None:
        lines += ["", result["runner_up_cost"]]
    title = "Nothing fits" if choice is None else f"Ship {choice}"
    limits = [
        f"{KINDS[name].text(value)} {KINDS[name].what}"
        for name, value in result["budgets"].items()
        if value is not None
    ]
    wanted = f"{result['scenario']}: {', '.join(limits) or 'no budgets'}"
    if result["prefer"] is not None:
        wanted += f"; {result['prefer'].replace('_', ' ')} first"
    # Names may hold brackets; none of it is rich's markup.
    style = "red" if choice is None else "green"
    console.print(Panel(Text("\n".join(lines)), title=Text(title), border_style=style))
    console.print(Text(wanted))
    table = Table(title="Ruled out")
    for heading in ("file", "because of", "in numbers"):
        table.add_column(heading, overflow="fold")
    for one in result["ruled_out"]:
        reason = one["constraint"]
        reason = option(reason) if reason in KINDS else reason
        table.add_row(*map(Text, (one["name"], reason, one["sentence"])))
    if table.rows:
        console.print(table)


# Order


def _best(left, objective):
    """Return the best by `RULE`."""
    if objective in ("accuracy", "latency"):
        # Those on the frontier that is drawn, however little others are beaten by.
        left = [one for one in left if _ahead_of(one, left) is None]
    for measure in (objective, "accuracy", "latency"):
        least = min(_cost(one, measure) for one in left)
        most = least + _tie(measure, least)
        left = [one for one in left if _cost(one, measure) <= most]
    return min(left, key=lambda one: (one.cost("size"), one.costs(), one.name))


def _ahead_of(one, others):
    """Return one that dominates another in the plane that is drawn, or None."""
    return next((other for other in others if dominates(other.place, one.place)), None)


def _tie(measure, cost):
    """Return by how much something may exceed a cost and tie with it."""
    if measure in ("accuracy", "score"):
        return _TIE_PERPLEXITY
    if measure in _BALANCED:  # a sum of logarithms
        return _TIE_SHARE
    return (_TIE_SIZE if measure == "size" else _TIE_SHARE) * abs(cost)


def _cost(candidate, objective):
    if objective in MEASURES:
        return candidate.cost(objective)
    accuracy, *others = (candidate.values[name] for name in _BALANCED[objective])
    if None in (accuracy, *others):
        return math.inf
    sign = -1 if objective == "server" else 1
    logarithms = sum(math.log(value.number) for value in others)
    return _PERPLEXITY_WEIGHT * math.log1p(accuracy.number) + sign * logarithms


def _ties(candidates, best, objective, given):
    """Return who would be chosen if it came out better and all others worse."""

    def is_chosen_if_better(one):
        moved = [
            other.worsened(-_TIE_SHARE if other is one else _TIE_SHARE)
            for other in candidates
        ]
        left = [other for other in moved if other.keeps(given)]
        return bool(left) and _best(left, objective).name == one.name

    others = [one for one in candidates if one is not best]
    return [one.name for one in others if is_chosen_if_better(one)]


# Sentences


def _why(fitting, ties, objective, given):
    if not fitting:
        return ["No file keeps the budgets."]
    best = fitting[0]
    sentences = [f"{best.name} is the only file that keeps the budgets."]
    if len(fitting) > 1:
        sentences = [_objective_sentence(fitting, objective, given)]
    if ties:
        sentences.append(
            f"It ties with {_listed(ties)}: a measurement that is off by "
            f"{100 * _TIE_SHARE:g} % may choose differently."
        )
    ahead = _ahead_of(best, fitting)
    if ahead is not None:
        sentences.append(
            f"It is off the frontier of latency and perplexity, where {ahead.name} is "
            "ahead of it."
        )
    sentences += [_budget_sentence(best, name, given[name]) for name in given]
    unknown = [_what(name) for name in ("accuracy", "latency") if not best.values[name]]
    if unknown:
        sentences.append(
            f"The choice is made without its {_listed(unknown)}: not measured."
        )
    return sentences


def _objective_sentence(fitting, objective, given):
    """Say at what the first of several candidates is the best."""
    best, weighed = fitting[0], _BALANCED.get(objective, (objective,))
    among = f"of the {len(fitting)} files{' that keep the budgets' if given else ''}"
    unknown = sum(not all(one.values[name] for name in weighed) for one in fitting)
    if unknown == len(fitting):
        return (
            f"{best.name} is chosen {among} by accuracy, then latency and size, since "
            f"{_listed([_what(name) for name in weighed])} was measured of none."
        )
    but = f" Of {unknown} of them not all was measured." if unknown else ""
    if objective in _BALANCED:
        facts = ", ".join(f"{_what(name)} {_text(name, best)}" for name in weighed)
        return (
            f"{best.name} has the best balance {among}, where 1 % of perplexity weighs "
            f"as much as {_PERPLEXITY_WEIGHT} % of {' or '.join(weighed[1:])}: {facts}."
            + but
        )
    best_of = {"size": "smallest", "throughput": "highest"}.get(objective, "lowest")
    fact = f"the {best_of} {_what(objective)} {among}: {_text(objective, best)}"
    first = min(fitting, key=lambda one: (one.cost(objective), one.name))
    if first.cost(objective) == best.cost(objective):
        return f"{best.name} has {fact}.{but}"
    least = _text(objective, first)
    return f"{best.name} ties for {fact}, where {first.name} has {least}.{but}"


def _budget_sentence(candidate, name, limit):
    """Say how a candidate stands to a budget that it keeps or breaks."""
    kind, value = KINDS[name], candidate.of(name)
    words = ("not below", "below") if kind.is_least else ("within", "above")
    word = words[kind.is_broken(value.number, limit)]
    found, budget = _told_apart(kind, value.number, limit)
    sentence = f"Its {kind.what}, {found}, is {word} {budget}"
    if value.low <= limit < value.high:
        low, high = kind.text(value.low), kind.text(value.high)
        sentence += f"; its 95 % interval, {low} to {high}, has values on both sides"
    return sentence + "."


def _ruled_out(candidate, given):
    broken = candidate.broken(given)
    if candidate.kind not in _SHIPPABLE:
        constraint = "not shippable"
        sentence = f"It is a model of kind {candidate.kind}, to compare files with."
    elif broken:
        constraint = broken[0]
        parts = [_budget_sentence(candidate, name, given[name]) for name in broken]
        sentence = " ".join(parts)
    else:
        constraint = "not measured"
        parts = [
            f"{KINDS[name].what} (budget {KINDS[name].text(given[name])})"
            for name in candidate.missing(given)
        ]
        sentence = f"What has a budget was not measured: {', '.join(parts)}."
    return {"name": candidate.name, "constraint": constraint, "sentence": sentence}


def _runner_up_cost(best, second=None):
    if second is None:
        return "No other file keeps the budgets."
    costs, gains = [], []
    for measure in MEASURES:
        if second.values[measure] and best.values[measure]:
            low, high = sorted((best.cost(measure), second.cost(measure)))
            if high > low + _tie(measure, low):  # else nobody would notice
                is_gain = second.cost(measure) == low
                numbers = (one.values[measure].number for one in (second, best))
                own, others = _told_apart(KINDS[BUDGET_OF[measure]], *numbers)
                word = _WORSE_OR_BETTER[measure][is_gain]
                (gains if is_gain else costs).append(
                    f"{word} ({own} instead of {others})"
                )
    facts = ", ".join(costs + gains) or "as good in everything that was measured"
    return f"The runner-up {second.name} would be {facts}."


def _nearest_miss(shippable, given):
    """Return the entry that breaks its budgets least, and what would admit it."""

    def excess(one):
        parts = [one.share(name, given[name]) - 1 for name in one.broken(given)]
        return max(parts), sum(parts)

    known = [one for one in shippable if not one.missing(given)]
    if not known:
        return None
    nearest = min(known, key=lambda one: (excess(one), one.name))
    most = excess(nearest)[0]
    beyond = number(100 * most, digits=2)
    sentences = [f"The nearest miss is {nearest.name}, {beyond} % beyond a budget."]
    options, without = [], []
    for name in nearest.broken(given):
        kind, found = KINDS[name], nearest.of(name).number
        sentences.append(_budget_sentence(nearest, name, given[name]))
        # Three digits, rounded so that they just admit it.
        rounding = decimal.ROUND_FLOOR if kind.is_least else decimal.ROUND_CEILING
        context = decimal.Context(prec=3, rounding=rounding)
        limit = context.create_decimal(repr(float(found)))
        scale, sign = (100, "%") if kind.unit == "%" else (1, "")
        if kind.unit == "%" and limit >= 1:  # would be refused
            without.append(f"without a budget of {kind.what}")
        else:
            options.append(f"{option(name)} {(limit * scale).normalize():f}{sign}")
    ways = [f"with {' '.join(options)}"] if options else []
    sentences.append(
        f"It would fit {' and '.join(ways + without)}. Relax the budget, or make a "
        "smaller or better model."
    )
    return {
        "name": nearest.name,
        "excess": most,
        "options": " ".join(options),
        "sentence": " ".join(sentences),
    }


def _what(measure):
    return "median latency" if measure == "latency" else KINDS[BUDGET_OF[measure]].what


def _text(measure, candidate):
    value = candidate.values[measure]
    return KINDS[BUDGET_OF[measure]].text(value.number) if value else "not measured"


def _listed(names):
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _told_apart(kind, one, other):
    """Return two values with as many digits as it takes to see that they differ."""
    for digits in range(3, 17):
        texts = kind.text(one, digits), kind.text(other, digits)
        if one == other or texts[0] != texts[1]:
            break
    return texts
