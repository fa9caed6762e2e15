"""How the files came about, as the page tells it: explanations, stages, notes."""

import shlex

from gpt_tf.reporting.page import elements


def explanations(explanations):
    """The deletion test, and what compression does to explanations."""
    if not explanations:
        return None
    methods = explanations.get("methods") or {}
    compression = explanations.get("compression") or {}
    prompts, fraction = explanations.get("prompts"), explanations.get("fraction")
    said = (
        "An explanation says which tokens of a prompt made the model expect the next "
        "one. If it is right, taking away its highest tokens lowers that probability "
        "more than taking away as many random ones."
    )
    if fraction is not None:
        said += f" Here {elements.share(fraction)} of the tokens were taken away"
        said += (
            f" from each of {elements.count(prompts, 'prompt')}." if prompts else "."
        )
    nearest = explanations.get("nearest_drop")
    known = (
        *("methods", "compression", "prompts", "prompt_tokens", "fraction"),
        "nearest_drop",
    )
    others = {
        name: value
        for name, value in explanations.items()
        if name not in known and value is not None
    }
    return elements.section(
        "explanations",
        "Are explanations worth anything?",
        elements.tag(
            "p",
            said,
            [
                " Without as many of the last tokens, which takes no explanation, the "
                "probability falls by ",
                elements.any_value(nearest),
                ".",
            ]
            if nearest
            else None,
        ),
        elements.table_of_dicts(
            "Method", methods, "Deletion test; probabilities from 0 to 1"
        ),
        elements.table_of_dicts(
            "Method",
            compression,
            "Does compression change the explanation? 1 is the same order of tokens, "
            "0 an unrelated one",
        ),
        _facts(others),
    )


_PACKAGES = ("tf_keras",)


def _facts(facts):
    """A list of names and values."""
    # Versions are by the names of packages, which may have an underscore.
    rows = [
        (key if key in _PACKAGES else elements.words(key), elements.any_value(value))
        for key, value in facts.items()
        if value is not None
    ]
    if not rows:
        return None
    return elements.tag(
        "dl",
        [
            elements.tag("div", elements.tag("dt", key), elements.tag("dd", value))
            for key, value in rows
        ],
        class_="facts",
    )


def making(report):
    stages = report["stages"] or []
    command = report["command"]
    command = shlex.join(command) if isinstance(command, list) else command
    seconds = [stage.get("seconds") or 0 for stage in stages]
    rows = [
        [
            stage.get("name") or elements.NOTHING,
            elements.seconds(stage.get("seconds")),
            "kept from before" if stage.get("reused") else "done",
            elements.tag("code", elements.line(stage["command"]))
            if stage.get("command")
            else elements.NOTHING,
        ]
        for stage in stages
    ]
    if len(stages) > 1:
        rows.append(["all", elements.seconds(sum(seconds)), "", ""])
    made = [
        [
            entry["name"],
            entry["path"] or elements.NOTHING,
            entry["made_from"] or elements.NOTHING,
            _config(entry["config"]),
            elements.tag("code", entry["sha256"], class_="hash")
            if entry["sha256"]
            else elements.NOTHING,
        ]
        for entry in report["entries"]
    ]
    return elements.section(
        "making",
        "How it was made",
        elements.tag("pre", elements.tag("code", command), class_="command")
        if command
        else None,
        elements.table(
            ["Stage", "Time", "This time", "Command"],
            rows,
            texts=("This time", "Command"),
            cards=True,
        ),
        elements.titled("Text that accuracy was measured on", _facts(_corpus(report))),
        elements.titled("Machine", _facts(_machine(report["machine"]))),
        elements.titled("Versions", _facts(report["versions"] or {})),
        elements.folded(
            "The files and their hashes",
            elements.table(
                ["File", "Path", "Made from", "Sizes", "SHA-256"],
                made,
                texts=("Path", "Made from", "Sizes", "SHA-256"),
                cards=True,
            ),
        ),
    )


def _config(config):
    if not config:
        return elements.NOTHING
    return ", ".join(
        f"{elements.words(key)} {_plain_value(value)}" for key, value in config.items()
    )


def _plain_value(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _corpus(report):
    corpus = dict(report["corpus"] or {})
    if isinstance(corpus.get("bytes"), int | float):
        corpus["size"] = elements.megabytes(corpus.pop("bytes"))
    return corpus


def _machine(machine):
    facts = dict(machine or {})
    rates = facts.pop("read_bytes_per_s", None)
    if facts.get("memory_bytes"):
        facts["memory"] = elements.unit(facts.pop("memory_bytes") / 1e9, "GB")
    if isinstance(rates, dict) and rates:
        facts["memory is read at"] = ", ".join(
            f"{elements.unit(rate / 1e9, 'GB/s')} "
            f"by {elements.count(int(threads), 'thread')}"
            for threads, rate in rates.items()
            if rate
        )
    return facts


def notes(report):
    notes = report["notes"] or []
    return elements.section(
        "notes",
        "What to keep in mind",
        elements.tag(
            "ul", [elements.tag("li", elements.sentence(note)) for note in notes]
        )
        if notes
        else None,
    )
