"""The page's answer: the recommended file, its budgets, and the reasons."""

import os
import shlex

from gpt_tf.advisor.constraints import KINDS, shown
from gpt_tf.advisor.ranking import RULE
from gpt_tf.reporting import pictures as drawing
from gpt_tf.reporting.page import elements
from gpt_tf.reporting.pictures import format_interval, format_number


def answer(report, folder):
    """The title and the first thing that is read."""
    recommendation = report["recommendation"]
    if recommendation is None:
        return _summary(report, folder)
    scenario = recommendation.get("scenario")
    choice = elements.entries_by_name(report).get(recommendation.get("choice"))
    eyebrow = f"for a {scenario}" if scenario not in (None, "custom") else ""
    if choice is None:
        title = "Nothing fits the budgets"
        return title, elements.join(
            elements.tag("p", f"gpt-tf report {eyebrow}", class_="eyebrow"),
            elements.tag("h1", title),
            elements.tag(
                "p",
                f"Of {elements.count(len(report['entries']), 'file')} none stays "
                "within all of them.",
            ),
            _nearest_miss(recommendation),
        )
    basis = recommendation.get("basis")
    return choice["name"], elements.join(
        elements.tag("p", f"Recommended file {eyebrow}", class_="eyebrow"),
        elements.tag("h1", choice["name"]),
        elements.tag("p", _what_it_is(choice), class_="what"),
        elements.tag("p", f"The choice is {basis}.", class_="warn")
        if basis not in (None, "measured")
        else None,
        _figures(report, choice),
        _sample(recommendation.get("sample")),
        _command(choice, recommendation.get("sample"), folder),
    )


def _nearest_miss(recommendation):
    miss = recommendation.get("nearest_miss")
    if not miss:
        return None
    return elements.tag("p", elements.sentence(miss), class_="miss")


def _what_it_is(entry):
    parts = [_MODES.get(entry["mode"], entry["mode"])]
    if entry["parameters"]:
        parts.append(elements.count(entry["parameters"], "parameter"))
    if entry["context_length"]:
        parts.append(f"context of {elements.count(entry['context_length'], 'token')}")
    if entry["made_from"]:
        parts.append(str(entry["made_from"]).rstrip("."))
    return ", ".join(str(part) for part in parts if part)


_MODES = {
    "float32": "float32 weights",
    "float16": "float16 weights, computed in float32",
    "dynamic_int8": "int8 weights, activations quantised as it runs",
    "int8": "int8 weights and activations",
    "int8_full": "int8 weights, activations and cache",
    "int16x8": "int8 weights, int16 activations",
    "int4": "int4 weights",
    "keras": "Keras model in float32",
    "keras_qat": "quantisation-aware Keras model",
}


def _figures(report, entry):
    """Size, latency and perplexity, and what each is beside the reference.

    Of each: what it is, the number, a detail, and `(sentence, is_better)` or None.
    """
    reference = elements.entries_by_name(report).get(report["reference"])
    is_reference = reference is not None and reference["name"] == entry["name"]
    other = None if is_reference else reference
    shown = []
    if entry["size_bytes"]:
        beside = None
        if other is not None and other["size_bytes"]:
            ratio = other["size_bytes"] / entry["size_bytes"]
            beside = _times(ratio, "smaller than", "the size of", other["name"])
        shown.append(("Size", elements.megabytes(entry["size_bytes"]), None, beside))
    spread = (entry["latency"] or {}).get("inter_token_latency_ms")
    if spread:
        beside = None
        others = ((other or {}).get("latency") or {}).get("inter_token_latency_ms")
        if others:
            ratio = others["median"] / spread["median"]
            beside = _times(ratio, "faster than", "the latency of", other["name"])
        shown.append(
            (
                elements.term("Latency, median", "inter-token"),
                elements.spread(spread, "median"),
                f"between two tokens; p95 {elements.spread(spread, 'p95')}",
                beside,
            )
        )
    accuracy = entry["accuracy"] or {}
    if accuracy.get("perplexity"):
        beside, increase = None, accuracy.get("perplexity_increase")
        if increase and other is not None:
            value, low, high = format_interval(increase, 100, "+")
            beside = (
                f"{value}{elements.SPACE}% ({low} to {high}{elements.SPACE}%) against "
            )
            beside = (beside + other["name"], increase["value"] <= 0)
        value, low, high = format_interval(accuracy["perplexity"])
        shown.append(
            (
                elements.term("Perplexity", "perplexity"),
                value,
                f"95{elements.SPACE}% interval {low} to {high}",
                beside,
            )
        )
    first = (entry["latency"] or {}).get("time_to_first_token_ms")
    if first:
        prompt = entry["latency"].get("prompt_tokens")
        shown.append(
            (
                elements.term("First token", "first-token"),
                elements.spread(first, "median"),
                f"median, after a prompt of {elements.count(prompt, 'token')}"
                if prompt
                else "median",
                None,
            )
        )
    if not shown:
        return None
    return elements.tag(
        "dl",
        [
            elements.tag(
                "div",
                elements.tag("dt", label),
                elements.tag("dd", value, class_="big"),
                elements.tag("dd", detail) if detail else None,
                elements.tag("dd", beside[0], class_="better" if beside[1] else "cost")
                if beside
                else None,
            )
            for label, value, detail, beside in shown
        ],
        class_="figures",
    )


def _times(ratio, better, share, name):
    """Compare with another file: a sentence, and whether this one is better."""
    if ratio >= 1.05:
        return f"{format_number(elements.rounded(ratio))} times {better} {name}", True
    if ratio > 1 / 1.05:
        return f"{share} {name}, within 5{elements.SPACE}%", True
    return f"{format_number(elements.rounded(1 / ratio))} times {share} {name}", False


def _sample(sample):
    if not sample or not sample.get("text"):
        return None
    return elements.tag(
        "figure",
        elements.tag(
            "pre",
            elements.tag("b", sample.get("prompt") or ""),
            sample["text"],
            class_="sample",
            tabindex="0",
        ),
        elements.tag(
            "figcaption", "What it writes: the prompt is bold, the rest is its own."
        ),
    )


def _command(entry, sample, folder):
    prompt = (sample or {}).get("prompt") or "def"
    path = entry["path"] or entry["name"]
    command = f"gpt-tf generate --model {shlex.quote(str(path))}"
    command += f" --prompt {shlex.quote(prompt)}"
    # Paths of what lies elsewhere are as they were given.
    is_below = not os.path.isabs(path) and (folder / path).exists()
    where = " in the folder of this page" if is_below else ""
    return elements.tag(
        "figure",
        elements.tag(
            "pre", elements.tag("code", command), class_="command", tabindex="0"
        ),
        elements.tag("figcaption", f"Run it{where}."),
    )


def _summary(report, folder):
    """Without a recommendation: what is best in each way."""
    entries = report["entries"]
    title = f"{elements.count(len(entries), 'file')} measured"
    if len(entries) == 1:
        title = entries[0]["name"]
        return title, elements.join(
            elements.tag("p", "Measured file", class_="eyebrow"),
            elements.tag("h1", title),
            elements.tag("p", _what_it_is(entries[0]), class_="what"),
            _figures(report, entries[0]),
            _command(entries[0], None, folder),
        )
    bests = []
    for label, value_of, write in (
        ("Smallest", lambda entry: entry["size_bytes"], elements.megabytes),
        (
            "Lowest latency between tokens, median",
            lambda entry: (
                (entry["latency"] or {}).get("inter_token_latency_ms") or {}
            ).get("median"),
            elements.ms,
        ),
        (
            "Lowest perplexity",
            lambda entry: ((entry["accuracy"] or {}).get("perplexity") or {}).get(
                "value"
            ),
            format_number,
        ),
    ):
        measured = [entry for entry in entries if value_of(entry) is not None]
        if measured:
            best = min(measured, key=value_of)
            bests.append((label, write(value_of(best)), best["name"]))
    return title, elements.join(
        elements.tag("p", "gpt-tf report", class_="eyebrow"),
        elements.tag("h1", title),
        elements.tag(
            "dl",
            [
                elements.tag(
                    "div",
                    elements.tag("dt", label),
                    elements.tag("dd", value, class_="big"),
                    elements.tag("dd", name),
                )
                for label, value, name in bests
            ],
            class_="figures",
        )
        if bests
        else None,
    )


def budgets(report):
    budgets = drawing.budgets_of(report)
    recommendation = report["recommendation"]
    if not budgets:
        said = "None was set." if recommendation is not None else None
        return elements.section(
            "budgets", "Budgets", elements.tag("p", said) if said else None
        )
    candidates = drawing.candidates_by_name(report)
    said = recommendation or {}
    shown_one = said.get("choice") or (said.get("nearest_miss") or {}).get("name")
    names = [shown_one] if shown_one in candidates else list(candidates)
    rows = []
    for name in names:
        row = [name]
        for budget, limit in budgets.items():
            value = candidates[name].of(budget)
            if value is None:
                row.append("not measured")
                continue
            row.append(
                elements.join(
                    elements.nonbreaking(shown(budget, value.number)),
                    ", estimated " if value.is_estimate else " ",
                    elements.verdict(not candidates[name].breaks(budget, limit)),
                )
            )
        rows.append(row)
    heads = ["File", *(_limit(name, limit) for name, limit in budgets.items())]
    return elements.section(
        "budgets",
        "Budgets",
        elements.table(heads, rows, texts=heads, cards=len(rows) == 1),
    )


def _limit(name, limit):
    """A budget as a column is called."""
    kind = KINDS[name]
    word = "at least" if kind.is_least else "at most"
    what = kind.what[0].upper() + kind.what[1:]
    return f"{what}: {word} {elements.nonbreaking(shown(name, limit))}"


def reasons(report):
    recommendation = report["recommendation"]
    if recommendation is None:
        return None
    why = recommendation.get("why") or []
    why = [why] if isinstance(why, str) else why
    ruled_out = recommendation.get("ruled_out") or []
    dominated = recommendation.get("dominated") or []
    runner_up = recommendation.get("runner_up")
    cost = recommendation.get("runner_up_cost")
    cost = [cost] if isinstance(cost, str | dict) else cost or []
    return elements.section(
        "reasons",
        "Why this one" if recommendation.get("choice") else "Why none",
        elements.tag("p", RULE),
        elements.tag(
            "ul", [elements.tag("li", elements.sentence(reason)) for reason in why]
        )
        if why
        else None,
        elements.tag("h3", "Runner-up") if runner_up else None,
        [elements.tag("p", elements.sentence(said)) for said in cost] or None,
        elements.table(
            ["File", "Ruled out by", "Because"],
            [
                [row["name"], _constraint(row.get("constraint")), _because(row)]
                for row in ruled_out
            ],
            caption="Ruled out",
            texts=("Ruled out by", "Because"),
            cards=True,
        ),
        elements.table(
            ["File", "Never better than", "Because"],
            [[row["name"], row["by"], _because(row)] for row in dominated],
            caption="Within the budgets, but in nothing better than another",
            texts=("Never better than", "Because"),
            cards=True,
        ),
    )


def _because(row):
    return row.get("sentence") or elements.NOTHING


def _constraint(constraint):
    if constraint in KINDS:
        return KINDS[constraint].what
    return elements.words(constraint) if constraint else elements.NOTHING
