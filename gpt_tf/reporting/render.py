"""report.html: the report as people read it, one file that needs nothing else.

Style and plots are inside it; it asks no network for anything and runs no script. What
is shown stands in `templates/`; here is what the templates are given. Jinja escapes
whatever comes from outside, such as names and generated text.
"""

import functools
import os
import shlex
from pathlib import Path

import jinja2
from markupsafe import Markup

from gpt_tf import artifacts, formatting
from gpt_tf.advisor.frontier import frontier_of, pareto_points
from gpt_tf.advisor.ranking import RULE
from gpt_tf.evaluation.report import write_report
from gpt_tf.formatting import NOT_MEASURED
from gpt_tf.reporting import plots


def publish(report: dict, folder: str | os.PathLike) -> list[Path]:
    """Write a report for programs and for people into a folder.

    Each file is written whole or not at all. A plot of an earlier report for which this
    one has no numbers is removed.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        folder: Where `report.json`, the plots as PNG and `report.html` go.

    Returns:
        The paths of what was written.

    Raises:
        InputError: A number in the report is not finite.

    Example:
        >>> publish(report, "runs/optimized")
    """
    folder = Path(folder)
    written = [folder / "report.json"]
    write_report(written[0], report)
    figures = _figures(report)
    for name in plots.PLOTS:
        path = folder / f"{name}.png"
        if name in figures:
            plots.save(figures[name], path)
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    write_page(report, folder / "report.html", figures)
    return [*written, folder / "report.html"]


def write_page(
    report: dict, path: str | os.PathLike, figures: dict | None = None
) -> None:
    """Write report.html, whole or not at all.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: The file.
        figures: The plots by name, as `plots.figure_of` returns them; None draws them.

    Example:
        >>> write_page(read_report("runs/optimized"), "report.html")
    """
    if figures is None:
        figures = _figures(report)
    context = _context(report, figures, Path(path).parent)
    with artifacts.atomic_file(path, "w") as file:
        file.write(render("report.html.j2", **context))


def render(template: str, **context) -> str:
    """Return a page of `templates/`.

    Args:
        template: Name of the template.
        context: What it shows; texts are escaped.
    """
    return _environment().get_template(template).render(context)


def _figures(report):
    figures = {name: plots.figure_of(name, report) for name in plots.PLOTS}
    return {name: figure for name, figure in figures.items() if figure is not None}


@functools.cache
def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # what was not measured may be missing
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    environment.globals.update(style=Markup(style), NOT_MEASURED=NOT_MEASURED)
    for function in (
        *(formatting.number, formatting.quantity, formatting.percent),
        *(formatting.megabytes, formatting.milliseconds, formatting.duration),
        *(formatting.count, formatting.moment),
        *(_interval, _spread, _plain, _sentence, _command),
    ):
        environment.filters[function.__name__.lstrip("_")] = _filter(function)
    environment.filters["anchor"] = lambda text: "-".join(text.lower().split())
    return environment


def _filter(function):
    """Return a filter to which what is undefined is None; its numbers do not break."""

    @functools.wraps(function)
    def filtered(value, *arguments, **options):
        if isinstance(value, jinja2.Undefined):
            value = None
        text = function(value, *arguments, **options)
        is_number = function.__module__ == formatting.__name__
        return text.replace(" ", "\N{NO-BREAK SPACE}") if is_number else text

    return filtered


def _interval(found, unit="", signed=False):
    """A value with its interval beneath; a share of 1 in percent."""
    if not isinstance(found, dict):
        return NOT_MEASURED
    is_percent = unit == "%"
    scale = 100.0 if is_percent else 1.0
    behind = f"\N{NO-BREAK SPACE}{unit}" if unit else ""
    if found["low"] == found["high"]:
        # As of the reference against itself.
        return formatting.number(found["value"] * scale) + behind
    value, low, high = formatting.interval(found, scale, signed)
    return Markup("{} <small>({} to {}{})</small>").format(
        value + behind, low, high, behind if is_percent else ""
    )


def _spread(found):
    """A median in ms with its 95th percentile beneath."""
    if not found:
        return NOT_MEASURED
    median, p95 = (
        formatting.milliseconds(found.get(part)).replace(" ", "\N{NO-BREAK SPACE}")
        for part in ("median", "p95")
    )
    return Markup("{} <small>(p95 {})</small>").format(median, p95)


def _plain(value):
    """Any JSON value, for people."""
    if value is None or value == {} or value == []:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return formatting.number(value)
    if isinstance(value, dict):
        parts = (f"{_words(key)} {_plain(part)}" for key, part in value.items())
        return ", ".join(parts)
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _words(key):
    return str(key).replace("_", " ")


def _sentence(said):
    """A sentence, of a text or of a dict that has one."""
    if not isinstance(said, dict):
        return str(said or "")
    return str(said.get("sentence") or said.get("name") or "")


def _command(command):
    if not command:
        return NOT_MEASURED
    return shlex.join(command) if isinstance(command, list) else command


def _context(report, figures, folder):
    """Return what report.html.j2 shows."""
    points, _ = pareto_points(report)
    titles = {
        "pareto": f"Perplexity against latency of {len(points)} files",
        "latency": "Latency of each file; the numbers are in the table below",
        "sizes": "Size and peak memory of each file, as in the table",
        "accuracy": "Accuracy of each file with intervals, as in the table",
    }
    corpus, machine = (
        {_words(key): value for key, value in (report[part] or {}).items()}
        for part in ("corpus", "machine")
    )
    rates = machine.pop("read bytes per s", None)
    for facts, part, name in (
        (corpus, "bytes", "bytes"),
        (machine, "memory bytes", "memory"),
        (machine, "cache bytes", "cache"),
    ):
        if isinstance(facts.get(part), int | float):
            facts[name] = formatting.megabytes(facts.pop(part))
    if isinstance(rates, dict):
        machine["memory bandwidth"] = formatting.bandwidth(rates)
    return {
        "report": report,
        "answer": _answer(report, folder),
        "plots": {
            name: Markup(plots.svg_of(figure, name, titles[name]))
            for name, figure in figures.items()
        },
        "frontier": [point["name"] for point in frontier_of(points)],
        "rule": RULE,
        "corpus": corpus,
        "machine": machine,
    }


def _answer(report, folder):
    """Return the first thing that is read: the recommended file, before and after."""
    entries, said = report["entries"], report["recommendation"]
    by_name = {entry["name"]: entry for entry in entries}
    answer = {"eyebrow": "gpt-tf report"}
    if said:
        chosen = by_name.get(said.get("choice"))
        if chosen:
            answer["eyebrow"] = "Recommended file"
        if said.get("scenario") not in (None, "custom"):
            answer["eyebrow"] += f" for a {said['scenario']}"
        if not chosen:
            files = formatting.count(len(entries), "file")
            return answer | {
                "title": "Nothing fits the budgets",
                "what": f"Of {files} no one is within all budgets.",
                "warning": _sentence(said.get("nearest_miss")),
            }
        if said.get("basis") not in (None, "measured"):
            answer["warning"] = f"The choice is {said['basis']}."
    elif len(entries) == 1:
        answer["eyebrow"], chosen = "Measured file", entries[0]
    else:
        title = f"{formatting.count(len(entries), 'file')} measured"
        return answer | {"title": title, "bests": _bests(entries)}
    before = by_name.get(report["reference"])
    before = None if before is chosen else before
    path = str(chosen["path"] or chosen["name"])
    prompt = ((said or {}).get("sample") or {}).get("prompt") or "def"
    command = ["gpt-tf", "generate", "--model", path, "--prompt", prompt]
    return answer | {
        "title": chosen["name"],
        "entry": chosen,
        "names": [f"before: {before['name']}", "after"] if before else ["measured"],
        "compared": _compared(before, chosen),
        "command": shlex.join(command),
        # Paths of what lies elsewhere are as they were given.
        "is_below": not os.path.isabs(path) and (folder / path).exists(),
    }


# What the answer compares: how it is read off an entry and written, and what more and
# less of it are called.
_QUANTITIES = (
    (
        "Size",
        lambda entry: entry["size_bytes"],
        *(formatting.megabytes, "larger", "smaller"),
    ),
    (
        "Tokens per second",
        lambda entry: (entry["latency"] or {}).get("tokens_per_s"),
        *(formatting.number, "faster", "slower"),
    ),
    (
        "Perplexity",
        lambda entry: (entry["accuracy"] or {}).get("perplexity"),
        _interval,
    ),
)


def _compared(before, after):
    """Return size, speed and perplexity of two files, the first of which may be None.

    Each is a dict of `label`, `before` and `after` as they are written, and, where both
    were measured, `change` and whether it `is_better`.
    """
    rows = []
    for label, value_of, write, *words in _QUANTITIES:
        values = [entry and value_of(entry) for entry in (before, after)]
        written = [
            "not measured" if value is None else write(value) for value in values
        ]
        row = {"label": label, "before": written[0], "after": written[1]}
        if words and all(values):
            ratio = values[1] / values[0]
            row["change"] = formatting.times(ratio, *words)
            row["is_better"] = ratio > 1 if "faster" in words else ratio < 1
        rows.append(row)
    increase = before and (after["accuracy"] or {}).get("perplexity_increase")
    if increase:
        rows[-1]["change"] = _interval(increase, "%", signed=True)
        rows[-1]["is_better"] = increase["value"] <= 0
    return rows


def _bests(entries):
    """Return rows of what is best in each way, where nothing is recommended."""

    def key(row):
        value, _ = row
        return value["value"] if isinstance(value, dict) else value

    rows = []
    for label, value_of, write, *words in _QUANTITIES:
        measured = [(value_of(entry), entry["name"]) for entry in entries]
        measured = [row for row in measured if row[0] is not None]
        if measured:
            best = max if "faster" in words else min
            value, name = best(measured, key=key)
            rows.append([label.lower(), name, write(value)])
    return rows
