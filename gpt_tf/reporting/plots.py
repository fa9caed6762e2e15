"""The plots of a report, as PNG files and as SVG within its page.

Each is 5 inches wide and grows downwards, so that its smallest text is legible where a
page is 390 pixels wide. Nothing is said by colour alone. matplotlib is imported where
something is drawn, since a device does without it.
"""

import contextlib
import io
import os
import re
import warnings
from html import escape
from pathlib import Path

import numpy as np

from gpt_tf import artifacts, formatting
from gpt_tf.advisor.frontier import budgets_of, frontier_of, pareto_points

# Told apart by people who see few colours: Okabe and Ito, Color Universal Design, 2008.
BLUE, VERMILION = "#0072b2", "#d55e00"
INK, GREY, PALE = "#1f2933", "#5c6773", "#929da9"
_TEXT, _SMALL = 9, 8  # points
_LARGEST_AREA = 700.0  # of a point, in square points
# More points than this are numbered, or names longer than this, with a key below.
_MOST_NAMES, _LONGEST_LABEL = 10, 30
_LONGEST_NAME = 44  # characters
_PLATE = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5}  # under a label
_STYLE = {
    "font.size": _TEXT,
    "axes.titlesize": _TEXT + 1,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollars
    "legend.frameon": False,
    "legend.fontsize": _SMALL,
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def house_style(**changes):
    """Draw with matplotlib's defaults and a few of ours, not with a user's."""
    from matplotlib import style

    settings = ["default", _STYLE | changes]
    with style.context(settings), warnings.catch_warnings():
        # A name may be in a script that the font lacks; it is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@house_style()
def figure_of(name: str, report: dict):
    """Return one of `PLOTS` as a matplotlib `Figure`.

    Args:
        name: `"pareto"`, `"latency"` or `"accuracy"`.
        report: As `gpt_tf.evaluation.report` states it.

    Returns:
        It, or None where nothing was measured that it shows.
    """
    return PLOTS[name](report)


@house_style()
def save(figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG, whole or not at all."""
    with artifacts.atomic_file(Path(path)) as file:
        # Without the version of matplotlib the same numbers give the same bytes.
        figure.savefig(file, format="png", dpi=180, metadata={"Software": None})


def svg_of(figure, name: str, title: str) -> str:
    """Return a figure as an SVG element for a page.

    Args:
        figure: As `figure_of` returns it.
        name: What sets its ids apart, so that a page can have several.
        title: What is read out instead of it.
    """
    file = io.StringIO()
    with house_style(**{"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub("(?s)<metadata>.*</metadata>", "", file.getvalue())
    # In texts and attributes "<" is escaped, so this finds elements alone.
    text = re.sub('<g id="tooltip:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub('<g id="[^"]*"', "<g", text)  # to which nothing refers
    text = text.replace(' xlink:href="#', ' href="#')  # needs no name space
    box, content = re.search('(?s)<svg [^>]*(viewBox="[^"]*")[^>]*>(.*)', text).groups()
    return f'<svg {box} role="img" aria-label="{escape(title)}">{content}'


def new_figure(height: float, width: float = 5.0):
    """Return an empty figure, its sides in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shorten(name):
    """Return a name as it is drawn: one line, not too long."""
    name = "".join(char if char.isprintable() else " " for char in str(name))
    half = _LONGEST_NAME // 2
    return name if len(name) <= 2 * half else f"{name[: half - 1]}…{name[-half:]}"


def _scale(axes, side, values, write=formatting.number):
    """Make an axis logarithmic where its values differ much; write its numbers.

    Args:
        side: `"x"` or `"y"`.
        values: All that is drawn along this axis.
        write: How its numbers are written.

    Returns:
        What its label ends with.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    lowest, highest = min(values), max(values)
    is_log = lowest > 0 and highest / lowest > 8
    axes.set(**{f"{side}scale": "log" if is_log else "linear"})
    locator = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    if is_log:
        steps = (1, 2, 5) if highest / lowest < 1000 else (1,)
        locator = LogLocator(subs=steps, numticks=12)
    axis = getattr(axes, f"{side}axis")
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    return " (log scale)" if is_log else ""


def _draw_budget(line, limit, values, text):
    """Draw a budget's line unless it is far off; return what is to be said of it.

    Args:
        line: `axes.axvline` or `axes.axhline`.
        limit: The budget, or None.
        values: All that is drawn along this axis.
        text: The budget as it is written.
    """
    if limit is None:
        return []
    low, high = min(values), max(values)
    reach = 2 * max(high - low, 0.05 * abs(high))
    if not low - reach <= limit <= high + reach:
        return [f"budget {text} is beyond"]
    line(limit, color=GREY, lw=1.1, ls=(0, (5, 3)), zorder=1)
    return [f"dashed: budget {text}"]


# Accuracy against latency


def _pareto(report):
    """Draw accuracy against latency, the size as area, with the frontier.

    A point stands at the median inter-token latency; its whisker ends at the 95th
    percentile, the latency that a budget is about. Upwards it is the perplexity's
    increase over the reference, where every file has one, and perplexity otherwise.
    """
    from matplotlib.lines import Line2D

    points, is_increase = pareto_points(report)
    if not points:
        return None
    longest = max(len(point["name"]) for point in points)
    is_numbered = len(points) > _MOST_NAMES or longest > _LONGEST_LABEL
    figure = new_figure(4.9 + (0.17 * len(points) if is_numbered else 0))
    axes = figure.add_subplot(title="Accuracy against latency: lower left is better")

    def percent(value):
        return formatting.percent(value - 1, signed=True)

    write = percent if is_increase else formatting.number
    sizes = [point["size_mb"] for point in points]
    areas = [_LARGEST_AREA * size / (max(sizes) or 1.0) for size in sizes]
    for point, area in zip(points, areas, strict=True):
        _draw_point(axes, point, area, write)
    frontier = [(point["x"], point["y"]) for point in frontier_of(points)]
    label = "frontier: none better in both"
    places = zip(*frontier, strict=True)
    axes.step(*places, where="post", color=INK, lw=1.1, zorder=2, label=label)

    xs = [value for point in points for value in (point["x"], point["p95"])]
    ys = [value for point in points for value in point["interval"]]
    axes.margins(0.16)
    end = _scale(axes, "x", xs)
    axes.set_xlabel(f"inter-token latency, ms: median, bar to p95{end}")
    end = _scale(axes, "y", ys, write)
    what = "perplexity above the reference's" if is_increase else "perplexity"
    axes.set_ylabel(f"{what}{end}")
    ends = dict.fromkeys(map(formatting.number, (min(sizes), max(sizes))))
    notes = [f"area: size, {' to '.join(ends)} MB", "upright bar: 95 % interval"]
    budgets = budgets_of(report)
    limit = budgets.get("max_latency_ms")
    notes += _draw_budget(axes.axvline, limit, xs, formatting.quantity(limit, "ms"))
    if is_increase and "max_perplexity_increase" in budgets:
        limit = 1 + budgets["max_perplexity_increase"]
        notes += _draw_budget(axes.axhline, limit, ys, percent(limit))
    if is_numbered:
        names = [_shorten(point["name"]) for point in points]
        notes += [f"{index}  {name}" for index, name in enumerate(names, 1)]
    handles, labels = axes.get_legend_handles_labels()
    key = dict(zip(labels, handles, strict=True))  # one of each kind of point
    figure.legend(
        handles=[*key.values(), *(Line2D([], [], ls="", label=note) for note in notes)],
        loc="outside lower left",
        ncols=1 if is_numbered else 2,
    )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is labelled stays in its place
    _label_points(axes, points, areas, is_numbered)
    return figure


def _draw_point(axes, point, area, write):
    """Draw a point with its whiskers, on a disc that is the file's size."""
    x, y, is_choice = point["x"], point["y"], point["is_choice"]
    colour, label = BLUE, "measured file"
    if is_choice:
        colour, label = VERMILION, "recommended"
    elif point["is_outside"]:
        colour, label = PALE, "ruled out (dashed)"
    low, high = point["interval"]
    x_ends, y_ends = [[0], [point["p95"] - x]], [[y - low], [high - y]]
    axes.errorbar(x, y, y_ends, x_ends, "none", ecolor=colour, elinewidth=1, capsize=3)
    dashes = "--" if point["is_outside"] else "-"
    style = {"facecolor": (colour, 0.28), "edgecolor": colour, "ls": dashes}
    disc = axes.scatter([x], [y], s=area, zorder=4, **style)
    marker = {"marker": "*", "ms": 11} if is_choice else {"marker": "o", "ms": 4}
    style = {"color": colour, "mec": "white", "mew": 0.6, "ls": "", "zorder": 6}
    (mark,) = axes.plot([x], [y], label=label, **marker, **style)
    median, p95 = map(formatting.milliseconds, (x, point["p95"]))
    tooltip = (
        f"{_shorten(point['name'])}: {formatting.quantity(point['size_mb'], 'MB')}, "
        f"{median} between tokens (p95 {p95}), perplexity {write(y)}"
    )
    for artist in (disc, mark):
        artist.set_gid(f"tooltip:{tooltip}")


def _label_points(axes, points, areas, is_numbered):
    """Write a name or a number beside every point so that none covers another."""
    import adjustText

    xs, ys, ends = ([point[of] for point in points] for of in ("x", "y", "p95"))
    texts = []
    for index, point in enumerate(points, 1):
        name = _shorten(point["name"]) + " (reference)" * point["is_reference"]
        texts.append(
            axes.text(
                *(point["x"], point["y"], str(index) if is_numbered else name),
                fontsize=_SMALL,
                fontweight="bold" if point["is_choice"] else "normal",
                color=GREY if point["is_outside"] else INK,
                bbox=_PLATE,
                zorder=7,
            )
        )
    taken = axes.scatter(xs, ys, s=np.maximum(areas, 80), alpha=0)
    before = np.random.get_state()
    np.random.seed(0)  # it moves labels of equal points at random
    try:
        adjustText.adjust_text(
            texts,
            x=ends,
            y=ys,
            objects=taken,
            ax=axes,
            expand=(1.05, 1.4),
            force_text=(0.2, 0.5),
            iter_lim=500,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6},
        )
    finally:
        np.random.set_state(before)
        taken.remove()


# Panels below each other, in which each file has a row


def _latency(report):
    """Draw the latency of every file: median and tail."""
    entries = [entry for entry in report["entries"] if entry["latency"]]
    limit = budgets_of(report).get("max_latency_ms")
    panels = []
    for part, title, budget in (
        ("inter_token_latency_ms", "Between two tokens", limit),
        ("time_to_first_token_ms", "Until the first token", None),
    ):
        rows = []
        for entry in entries:
            if spread := entry["latency"].get(part):
                numbers = [spread[mark] for mark in ("median", "p95", "p99")]
                shown = " / ".join(map(formatting.number, numbers))
                rows.append((entry["name"], shown, numbers))
        panels.append((title, "ms", budget, rows))
    head = "● median / ❘ p95 / \N{MULTIPLICATION SIGN} p99, ms"
    return _figure_of_rows(panels, "o|x", head)


def _accuracy(report):
    """Draw perplexity and divergence from the reference with 95 % intervals."""
    limit = budgets_of(report).get("max_perplexity_increase")
    kinds = [
        ("Perplexity above the reference's", "perplexity_increase", "%"),
        ("Divergence from the reference", "divergence_nats", "nats"),
    ]
    entries = [entry for entry in report["entries"] if entry["accuracy"]]
    if not any(entry["accuracy"].get("perplexity_increase") for entry in entries):
        kinds.insert(0, ("Perplexity", "perplexity", ""))
    panels = []
    for title, part, unit in kinds:
        is_percent = unit == "%"
        scale, suffix = (100.0, " %") if is_percent else (1.0, "")
        budget = limit * scale if is_percent and limit is not None else None
        rows = []
        for entry in entries:
            found = entry["accuracy"].get(part)
            # The reference's distance from itself says nothing.
            is_itself = part != "perplexity" and entry["name"] == report["reference"]
            if found and not is_itself:
                value, low, high = formatting.interval(found, scale, is_percent)
                shown = f"{value}{suffix} ({low} to {high}{suffix})"
                numbers = [found[mark] * scale for mark in ("low", "value", "high")]
                rows.append((entry["name"], shown, numbers))
        panels.append((title, unit, budget, rows))
    return _figure_of_rows(panels, "|o|", "value (95 % interval)")


def _figure_of_rows(panels, markers, head):
    """Return panels of rows; None where nothing was measured.

    Args:
        panels: Of each its title, the unit, the budget in this unit or None, and its
            rows: of each file its name, its numbers as they are written, and those
            that are drawn. Panels without rows are left out.
        markers: How the numbers of a row are drawn.
        head: What the written numbers are.
    """
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return None
    heights = [0.97 + 0.37 * len(rows) for *_, rows in panels]
    figure = new_figure(sum(heights))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, unit, budget, rows) in zip(grid[:, 0], panels, strict=True):
        axes.set_title(title)
        axes.set_title(head, loc="right", fontsize=_SMALL, color=GREY)
        for place, (name, shown, numbers) in enumerate(rows):
            ends = [min(numbers), max(numbers)]
            axes.plot(ends, [place] * 2, color=BLUE, lw=3, alpha=0.4)
            for number, marker in zip(numbers, markers, strict=True):
                axes.plot([number], [place], marker, color=BLUE, ms=6, mew=1.5)
            for x, text, side in ((0, _shorten(name), "left"), (1, shown, "right")):
                axes.annotate(
                    text,
                    (x, place),
                    xycoords=axes.get_yaxis_transform(),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha=side,
                    fontsize=_SMALL,
                    bbox=_PLATE,
                    zorder=5,
                )
        values = [value for *_, numbers in rows for value in numbers]
        end = _scale(axes, "x", values)
        text = formatting.quantity(budget, unit)
        said = _draw_budget(axes.axvline, budget, [0, *values], text)
        axes.set_xlabel("; ".join(filter(None, (unit + end, *said))))
        if min(values) < 0:
            axes.axvline(0, color=INK, lw=0.8, zorder=1)
        elif not end:
            axes.set_xlim(left=0)
        axes.set_ylim(len(rows) - 0.6, -0.85)
        axes.set_yticks([])
        axes.grid(axis="x", alpha=0.25)
        axes.spines["left"].set_visible(False)
    return figure


# How each plot of a report is drawn, by the name of its file.
PLOTS = {"pareto": _pareto, "latency": _latency, "accuracy": _accuracy}
