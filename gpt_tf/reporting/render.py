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
from gpt_tf.reporting.tables import TASKS

_TITLES = {
    "pareto": "Perplexity against latency of the files",
    "latency": "Latency of each file; the numbers are in the table below",
    "accuracy": "Accuracy of each file with intervals, as in the table",
}


def publish(report: dict, folder: str | os.PathLike) -> None:
    """Write a report for programs and for people into a folder.

    Each file is written whole or not at all. A plot of an earlier report for which this
    one has no numbers is removed.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        folder: Where `report.json`, the plots as PNG and `report.html` go.

    Raises:
        InputError: A number in the report is not finite.

    Example:
        >>> publish(report, "runs/optimized")
    """
    folder = Path(folder)
    write_report(folder / "report.json", report)
    figures = {name: plots.figure_of(name, report) for name in plots.PLOTS}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            plots.save(figure, path)
    with artifacts.atomic_file(folder / "report.html", "w") as file:
        file.write(page_of(report, figures))


def page_of(report: dict, figures: dict) -> str:
    """Return report.html.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        figures: The plots by name, as `plots.figure_of` returns them.
    """
    points, _ = pareto_points(report)
    return render(
        "report.html.j2",
        report=report,
        plots={
            name: Markup(plots.svg_of(figure, name, _TITLES[name]))
            for name, figure in figures.items()
            if figure is not None
        },
        frontier=[point["name"] for point in frontier_of(points)],
        rule=RULE,
    )


def render(template: str, **context) -> str:
    """Return a page of `templates/`.

    Args:
        template: Name of the template.
        context: What it shows; texts are escaped.
    """
    return _environment().get_template(template).render(context)


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
    environment.globals.update(
        style=Markup(style), NOT_MEASURED=NOT_MEASURED, TASKS=TASKS
    )
    for function in (
        *(formatting.number, formatting.quantity, formatting.percent),
        *(formatting.megabytes, formatting.milliseconds, formatting.duration),
        *(formatting.count, formatting.moment),
        *(_interval, _spread, _plain, _facts, _change),
    ):
        environment.filters[function.__name__.lstrip("_")] = _filter(function)
    environment.filters["shell"] = shlex.join
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
        return ", ".join(f"{name} {_plain(v)}" for name, v in _facts(value).items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _facts(values):
    """Facts by their names in words, sizes in megabytes; what is None is left out."""
    facts = {}
    for key, value in (values or {}).items():
        if key == "read_bytes_per_s" and isinstance(value, dict):
            facts["memory bandwidth"] = formatting.bandwidth(value)
        elif key.endswith("bytes") and isinstance(value, int | float):
            name = key.removesuffix("_bytes").replace("_", " ")
            facts[name] = formatting.megabytes(value)
        elif value is not None:
            facts[str(key).replace("_", " ")] = value
    return facts


def _change(after, before, more, less):
    """How many times as much it is, where both were measured."""
    return formatting.times(after / before, more, less) if before and after else ""
