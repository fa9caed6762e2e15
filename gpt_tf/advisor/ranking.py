"""Which file to ship: the best at what matters among those that keep the budgets.

`RULE` states the order, in which measured files alone are ranked. So the order of the
entries does not matter, the runner-up is what would be chosen without the choice, and a
dominated file is never chosen.
"""

import dataclasses
import decimal
import math

from gpt_tf.advisor.candidates import BUDGET_OF, MEASURES, candidates_of
from gpt_tf.advisor.constraints import (
    KINDS,
    SCENARIOS,
    Budgets,
    Scenario,
    objective_of,
    option,
    scenario_of,
    shown,
    significant,
)
from gpt_tf.settings import arguments

__all__ = [
    "RULE",
    "SCENARIOS",
    "Budgets",
    "Scenario",
    "print_recommendation",
    "recommend",
]

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

_BETTER = {
    "accuracy": ("less accurate", "more accurate"),
    "latency": ("slower", "quicker"),
    "size": ("larger", "smaller"),
    "memory": ("higher in peak memory", "lower in peak memory"),
    "first_token": ("later with the first token", "earlier with the first token"),
    "throughput": ("lower in throughput", "higher in throughput"),
}
_SHIPPABLE = ("tflite", "litertlm")
# What is weighed against accuracy.
_BALANCED = {
    "balance": ("accuracy", "latency", "size"),
    "server": ("accuracy", "throughput"),
}


def recommend(
    report: dict,
    budgets: Budgets | dict | None = None,
    scenario: str = "custom",
    prefer: str | None = None,
) -> dict:
    """Choose the file to ship among those of a report.

    Keras models are references and never chosen. What has a budget and was not measured
    rules a file out. An increase of perplexity counts by its value; where its interval
    reaches across the budget, a sentence says so. Latencies are compared by their
    medians, as they are drawn. What is chosen for accuracy or latency is on the Pareto
    frontier of both; where another choice is not, a sentence says so.

    Args:
        report: As `gpt_tf.evaluation.report.read_report` returns it.
        budgets: They come before the scenario's. None: the scenario's alone; of
            `"custom"`, which has none, the report's own.
        scenario: A key of `SCENARIOS`; see `Scenario` for what it makes best.
        prefer: What is to be best instead, among the files that keep the budgets:
            `"accuracy"`, `"latency"`, `"size"`, `"memory"`, `"first_token"`,
            `"throughput"`, or `"balance"`. None: what the scenario makes best.

    Returns:
        A dict of JSON values:

        - `scenario`, `prefer`, and `budgets` by name, None where there is none;
        - `choice`: the name of an entry, or None if none keeps the budgets;
        - `why`: sentences;
        - `ties`: the names of those that another measurement of the same files may
          choose, being off by its error;
        - `runner_up`: what would be chosen without it, or None, and
          `runner_up_cost`: a sentence with what that would cost and win;
        - `ranking`: the names of all that keep the budgets, best first;
        - `ruled_out`: of the others `name`, `constraint` (the budget that is broken
          most, `"not measured"` or `"not shippable"`) and `sentence`;
        - `dominated`: of those that keep the budgets, but are dominated by another:
          `name`, `by` and `sentence`;
        - `nearest_miss`: where there is no choice: `name`, `excess` (0.1: a tenth over
          the budget), `changes` (budgets that would admit it, by name; None where
          only none at all would), `options` (the same for the command line) and
          `sentence`; else None.

    Raises:
        InputError: A budget cannot be used, or the scenario or what to prefer is
            unknown.
        DamagedFileError: A number in the report is none.

    Example:
        >>> recommend(read_report("report.json"), Budgets("3%", 15, 8))["choice"]
        'student-int8'

    Reference: article 6.3.
    """
    arguments.instance("report", report, dict, "what `read_report` returns")
    wanted = objective_of(scenario, prefer)
    if budgets is None and scenario == "custom":
        budgets = report.get("budgets")
    limits = Budgets.of(budgets).over(scenario_of(scenario).budgets)
    given = limits.given()
    objective = wanted
    if wanted == "custom":
        # The first that has no budget is made best, or accuracy.
        free = (m for m in ("accuracy", "latency", "size") if BUDGET_OF[m] not in given)
        objective = next(free, "accuracy")
    candidates = candidates_of(report, concurrent=scenario == "server")
    shippable = [one for one in candidates if one.kind in _SHIPPABLE]
    fitting = _ranked(shippable, objective, given)
    ties = _ties(shippable, objective, given)
    return {
        "scenario": scenario,
        "prefer": prefer,
        "budgets": dataclasses.asdict(limits),
        "choice": fitting[0].name if fitting else None,
        "why": _why(fitting, ties, objective, given),
        "ties": ties,
        "runner_up": fitting[1].name if len(fitting) > 1 else None,
        "runner_up_cost": _runner_up_cost(fitting),
        "ranking": [one.name for one in fitting],
        "ruled_out": [
            _ruled_out(one, given)
            for one in sorted(candidates, key=lambda one: one.name)
            if one not in fitting
        ],
        "dominated": _dominated(fitting),
        "nearest_miss": None if fitting else _nearest_miss(shippable, given),
    }


def print_recommendation(result: dict, console=None) -> None:
    """Print a recommendation: the choice and why, the runner-up, and the others.

    Args:
        result: As `recommend` returns it.
        console: Where to write; standard output unless given.
    """
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    choice, miss = result["choice"], result["nearest_miss"]
    lines = [Text(sentence) for sentence in result["why"]]
    if miss is not None:
        lines.append(Text(miss["sentence"], style="yellow"))
    if result["runner_up"] is not None:
        lines += [Text(""), Text(result["runner_up_cost"])]
    title = Text(f"Ship {choice}" if choice is not None else "Nothing fits")
    limits = [
        shown(name, value) + " " + KINDS[name].what
        for name, value in result["budgets"].items()
        if value is not None
    ]
    subtitle = Text(f"{result['scenario']}: {', '.join(limits) or 'no budgets'}")
    if result["prefer"] is not None:
        subtitle.append(f"; {result['prefer'].replace('_', ' ')} first")
    style = "green" if choice is not None else "red"
    # Names may hold brackets; none of it is rich's markup.
    console.print(Panel(Group(*lines), title=title, border_style=style))
    console.print(subtitle)
    rows = [(one["name"], one["constraint"], one) for one in result["ruled_out"]]
    rows += [(one["name"], "dominated", one) for one in result["dominated"]]
    if rows:
        table = Table(title="The others", show_lines=False)
        for heading in ("file", "because of", "in numbers"):
            table.add_column(heading, overflow="fold")
        for name, constraint, one in rows:
            what = option(constraint) if constraint in KINDS else constraint
            table.add_row(Text(name), Text(what), Text(one["sentence"]))
        console.print(table)


def _beats(one, other):
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


# Order


def _ranked(candidates, objective, given):
    """Return those that keep the budgets, the best of them first, then the next."""
    left = [one for one in candidates if one.keeps(given)]
    ranked = []
    while left:
        ranked.append(_best(left, objective))
        left.remove(ranked[-1])
    return ranked


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
    """Return one that is before another in the plane that is drawn, or None."""
    return next((other for other in others if _beats(_place(other), _place(one))), None)


def _place(one):
    return one.cost("latency"), one.cost("accuracy")


def _tie(measure, cost):
    """Return by how much something may exceed a cost and tie with it."""
    if measure == "accuracy":
        return _TIE_PERPLEXITY
    if measure in _BALANCED:  # a sum of logarithms
        return _TIE_SHARE
    return (_TIE_SIZE if measure == "size" else _TIE_SHARE) * abs(cost)


def _ties(candidates, objective, given):
    """Return who would be chosen if it came out better and all others worse."""

    def choice(those):
        those = [one for one in those if one.keeps(given)]
        return _best(those, objective).name if those else None

    chosen, found = choice(candidates), []
    for one in sorted(candidates, key=lambda one: one.name):
        moved = [
            other.worsened(-_TIE_SHARE if other is one else _TIE_SHARE)
            for other in candidates
        ]
        if chosen not in (None, one.name) and choice(moved) == one.name:
            found.append(one.name)
    return found


def _cost(candidate, objective):
    if objective in MEASURES:
        return candidate.cost(objective)
    measures = _weighed(objective)
    if any(candidate.values[name] is None for name in measures):
        return math.inf
    score = _PERPLEXITY_WEIGHT * math.log1p(candidate.values["accuracy"].number)
    for name in measures[1:]:
        sign = -1 if name == "throughput" else 1
        score += sign * math.log(candidate.values[name].number)
    return score


def _weighed(objective):
    """Return the measures that an objective looks at."""
    return _BALANCED.get(objective, (objective,))


def _dominated(fitting):
    """Return of every dominated candidate which other one dominates it."""
    found = []
    for index, one in enumerate(fitting):
        # What dominates it is ranked before it; the best of them is named.
        by = next((other for other in fitting[:index] if _dominates(other, one)), None)
        if by is not None:
            better = [name for name in MEASURES if by.cost(name) < one.cost(name)]
            # What nobody would notice is told only where there is nothing else.
            noticed = [name for name in better if _is_noticed(by, one, name)]
            parts = [_comparison(by, one, name) for name in noticed or better]
            sentence = f"It is dominated by {by.name}, which is {', '.join(parts)}."
            found.append({"name": one.name, "by": by.name, "sentence": sentence})
    return found


def _dominates(one, other):
    """Whether one is nowhere worse and somewhere better, of the same measures."""
    known = [
        {name for name, value in each.values.items() if value} for each in (one, other)
    ]
    return known[0] == known[1] and _beats(one.costs(), other.costs())


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
    limit = given.get("max_latency_ms")
    if limit and best.p99_ms and best.p99_ms > limit:
        sentences.append(
            f"One token in a hundred takes longer than {significant(limit)} ms: the "
            f"99th percentile is {significant(best.p99_ms)} ms."
        )
    unknown = [m for m in ("accuracy", "latency") if best.values[m] is None]
    if unknown:
        sentences.append(
            f"The choice is made without its {_listed(map(_what, unknown))}: not "
            "measured."
        )
    return sentences


def _objective_sentence(fitting, objective, given):
    """Say at what the first of several candidates is the best."""
    best = fitting[0]
    among = f"of the {len(fitting)} files{' that keep the budgets' if given else ''}"
    weighed = _weighed(objective)
    unknown = sum(any(one.values[m] is None for m in weighed) for one in fitting)
    if unknown == len(fitting):
        return (
            f"{best.name} is chosen {among} by accuracy, then latency and size, since "
            f"{_listed(map(_what, weighed))} was measured of none."
        )
    but = f" Of {unknown} of them not all was measured." if unknown else ""
    facts = ", ".join(f"{_what(name)} {_shown(best, name)}" for name in weighed)
    if objective in _BALANCED:
        return (
            f"{best.name} has the best balance {among}, where 1 % of perplexity weighs "
            f"as much as {_PERPLEXITY_WEIGHT} % of {' or '.join(weighed[1:])}: {facts}."
            + but
        )
    best_of = {"size": "smallest", "throughput": "highest"}.get(objective, "lowest")
    sentence = f"the {best_of} {_what(objective)} {among}: {_shown(best, objective)}"
    first = min(fitting, key=lambda one: (one.cost(objective), one.name))
    if first.cost(objective) == best.cost(objective):
        return f"{best.name} has {sentence}.{but}"
    better = [
        _comparison(best, first, name)
        for name in ("accuracy", "latency", "size")
        if _is_noticed(best, first, name) and best.cost(name) < first.cost(name)
    ]
    return (
        f"{best.name} ties for {sentence}, {_shown(first, objective)} of {first.name}; "
        f"it is {' and '.join(better) or 'smaller'}.{but}"
    )


def _budget_sentence(candidate, name, limit):
    """Say how a candidate stands to a budget that it keeps or breaks."""
    kind, value = KINDS[name], candidate.of(name)
    broken = candidate.breaks(name, limit)
    if kind.is_least:
        word = "below" if broken else "not below"
    else:
        word = "above" if broken else "within"
    number, budget = _told_apart(name, value.number, limit)
    sentence = f"Its {kind.what}, {number}, is {word} {budget}"
    if value.low is not None and value.low <= limit < value.high:
        low, high = (shown(name, bound) for bound in (value.low, value.high))
        sentence += f"; its 95 % interval, {low} to {high}, has values on both sides"
    return sentence + "."


def _ruled_out(candidate, given):
    missing, broken = candidate.missing(given), candidate.broken(given)
    if candidate.kind not in _SHIPPABLE:
        constraint = "not shippable"
        sentence = f"It is a model of kind {candidate.kind}, to compare files with."
    elif broken:
        constraint = broken[0]
        sentence = " ".join(
            _budget_sentence(candidate, each, given[each]) for each in broken
        )
    else:
        constraint = "not measured"
        parts = [
            f"{KINDS[each].what} (budget {shown(each, given[each])})"
            for each in missing
        ]
        sentence = f"What has a budget was not measured: {', '.join(parts)}."
    return {"name": candidate.name, "constraint": constraint, "sentence": sentence}


def _runner_up_cost(fitting):
    if not fitting:
        return None
    if len(fitting) == 1:
        return "No other file keeps the budgets."
    best, second = fitting[:2]
    noticed = [
        measure
        for measure in MEASURES
        if best.values[measure] and second.values[measure]
        if _is_noticed(second, best, measure)
    ]
    if not noticed:
        return (
            f"The runner-up {second.name} is as good in everything that was measured."
        )
    # What it costs first, then what it wins.
    noticed.sort(key=lambda measure: second.cost(measure) < best.cost(measure))
    parts = [_comparison(second, best, measure) for measure in noticed]
    return f"The runner-up {second.name} would be {', '.join(parts)}."


def _is_noticed(one, other, measure):
    """Whether a difference is more than a tie."""
    low, high = sorted((one.cost(measure), other.cost(measure)))
    return high > low + _tie(measure, low)


def _comparison(one, other, measure):
    """Return in what one differs from another, "smaller (3 MB instead of 8 MB)"."""
    word = _BETTER[measure][one.cost(measure) < other.cost(measure)]
    numbers = (each.values[measure].number for each in (one, other))
    texts = _told_apart(BUDGET_OF[measure], *numbers)
    return f"{word} ({texts[0]} instead of {texts[1]})"


def _nearest_miss(shippable, given):
    """Return the entry that breaks its budgets least, and what would admit it."""

    def excess(one):
        parts = [one.share(name, given[name]) - 1 for name in one.broken(given)]
        return max(parts), sum(parts)

    known = [one for one in shippable if not one.missing(given)]
    if not known:
        return None
    nearest = min(known, key=lambda one: (excess(one), one.name))
    changes = {
        name: _admitting(name, nearest.of(name).number)
        for name in nearest.broken(given)
    }
    # A budget of 100 % of perplexity or more is none.
    refused = [n for n, value in changes.items() if KINDS[n].unit == "%" and value >= 1]
    changes |= dict.fromkeys(refused)
    options = " ".join(
        f"{option(name)} {_typed(name, value)}"
        for name, value in changes.items()
        if value is not None
    )
    ways = [f"with {options}"] if options else []
    ways += [f"without a budget of {KINDS[name].what}" for name in refused]
    beyond = significant(100 * excess(nearest)[0], 2)
    sentences = [
        f"The nearest miss is {nearest.name}, {beyond} % beyond a budget.",
        *(_budget_sentence(nearest, name, given[name]) for name in changes),
        f"It would fit {' and '.join(ways)}. Relax the budget, or make a smaller or "
        "better model.",
    ]
    return {
        "name": nearest.name,
        "excess": excess(nearest)[0],
        "changes": {
            name: None if value is None else float(value)
            for name, value in changes.items()
        },
        "options": options,
        "sentence": " ".join(sentences),
    }


def _admitting(name, number):
    """Return a budget of three digits, as a decimal, that just admits a number."""
    is_least = KINDS[name].is_least
    exact = decimal.Decimal(repr(float(number)))
    rounding = decimal.ROUND_FLOOR if is_least else decimal.ROUND_CEILING
    return decimal.Context(prec=3, rounding=rounding).plus(exact)


def _typed(name, value):
    if KINDS[name].unit == "%":
        return f"{(value * 100).normalize():f}%"
    return f"{value.normalize():f}"


def _what(measure):
    return "median latency" if measure == "latency" else KINDS[BUDGET_OF[measure]].what


def _listed(names):
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _shown(candidate, measure):
    value = candidate.values[measure]
    if value is None:
        return "not measured"
    return shown(BUDGET_OF[measure], value.number)


def _told_apart(name, one, other):
    """Return two values with as many digits as it takes to see that they differ."""
    for digits in range(3, 17):
        texts = [shown(name, value, digits) for value in (one, other)]
        if one == other or texts[0] != texts[1]:
            break
    return texts
