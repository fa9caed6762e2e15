"""The plots of a report, as PNG files and as SVG within its page.

Each is 5 inches wide and grows downwards, so that its smallest text is legible where a
page is 390 pixels wide. The colours are those of Okabe and Ito, told apart by people
who see few colours; nothing is said by colour alone. matplotlib is imported where
something is drawn, since a device does without it.

Reference: Okabe and Ito, Color Universal Design, 2008.
"""

import contextlib
import functools
import io
import math
import os
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from gpt_tf import artifacts, formatting
from gpt_tf.advisor.frontier import budgets_of, frontier_of, pareto_points

# Okabe and Ito's, but for yellow, which is too light for a line on white.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
INK, GREY, PALE = "#1f2933", "#5c6773", "#b4bdc8"
_PALETTE = (BLUE, VERMILION, GREEN, "#cc79a7", "#56b4e9", "#e69f00", INK)
# What the page's style sheet calls the colours that differ in the dark.
_CSS_COLOURS = {
    INK: "var(--ink)",
    GREY: "var(--soft)",
    PALE: "var(--pale)",
    BLUE: "var(--blue)",
    VERMILION: "var(--vermilion)",
    "#ffffff": "var(--paper)",
}
_WIDTH = 5.0  # inches
_TEXT, _SMALL = 9, 8  # points
_LARGEST_AREA = 700.0  # of a point, in square points
# More points than this are numbered, or names longer than this, with a key below.
_MOST_NAMES, _LONGEST_LABEL = 10, 30
_LONGEST_NAME = 44  # characters
_LOG_RATIO = 8.0  # beyond this ratio of largest to smallest an axis is logarithmic
_TOOLTIP = "tooltip:"
_DASHED = (0, (5, 3))
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
    "svg.hashsalt": "gpt_tf",
}


def draw(name: str, report: dict, path: str | os.PathLike) -> bool:
    """Draw one of `PLOTS` as PNG.

    Args:
        name: `"pareto"`, `"latency"`, `"sizes"` or `"accuracy"`.
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write, whole or not at all.

    Returns:
        Whether it was written; False where nothing was measured that it shows.

    Example:
        >>> draw("pareto", read_report("runs/optimized"), "pareto.png")
    """
    figure = figure_of(name, report)
    if figure is not None:
        save(figure, path)
    return figure is not None


def figure_of(name: str, report: dict):
    """Return one of `PLOTS` as a matplotlib `Figure`, or None; see `draw`."""
    with house_style():
        return PLOTS[name](report)


def save(figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG, whole or not at all."""
    with house_style(), artifacts.atomic_file(Path(path)) as file:
        # Without the version of matplotlib the same numbers give the same bytes.
        figure.savefig(file, format="png", dpi=180, metadata={"Software": None})


def svg_of(figure, name: str, title: str) -> str:
    """Return a figure as an SVG element for a page, in the page's colours.

    Args:
        figure: As `figure_of` returns it.
        name: What ids in it begin with, so that a page can have several.
        title: What is read out instead of it.
    """
    file = io.StringIO()
    with house_style():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root.find("{*}metadata"))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {
            key.rpartition("}")[2]: _in_page(value, name)
            for key, value in element.items()
        }
        found = attributes.pop("id", "")
        if found.startswith(_TOOLTIP):
            tooltip = ElementTree.Element("title")
            tooltip.text = found.removeprefix(_TOOLTIP)
            element.insert(0, tooltip)
        elif found:
            attributes["id"] = f"{name}-{found}"
        element.attrib.clear()
        element.attrib.update(attributes)
    for part in ("width", "height"):
        del root.attrib[part]
    root.attrib.update({"role": "img", "aria-label": title})
    return ElementTree.tostring(root, "unicode")


def _in_page(value, name):
    """Return an attribute with the page's colours, and references to its own ids."""
    if value.startswith(_TOOLTIP):
        return value
    for colour, css in _CSS_COLOURS.items():
        value = value.replace(colour, css)
    value = value.replace("url(#", f"url(#{name}-")
    return f"#{name}-{value[1:]}" if value.startswith("#") else value


@contextlib.contextmanager
def house_style():
    """Draw with matplotlib's defaults and a few of ours, not with a user's."""
    from matplotlib import style

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name may be in a script that the font lacks; it is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height: float, width: float = _WIDTH):
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


# Axes


def _scale(axes, side, values, write=formatting.number, log_ratio=_LOG_RATIO):
    """Make an axis logarithmic where its values differ much; write its numbers.

    Args:
        side: `"x"` or `"y"`.
        values: All that is drawn along this axis.
        write: How its numbers are written.
        log_ratio: Ratio of largest to smallest beyond which it is logarithmic.

    Returns:
        What its label ends with.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    lowest, highest = min(values), max(values)
    is_log = lowest > 0 and highest / lowest > log_ratio
    axes.set(**{f"{side}scale": "log" if is_log else "linear"})
    axis = getattr(axes, f"{side}axis")
    if is_log:
        steps = (1, 2, 5) if highest / lowest < 1000 else (1,)
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    return " (log scale)" if is_log else ""


def _draw_budget(line, limit, values, least_reach, text):
    """Draw a budget's line unless it is far off; return what is to be said of it.

    Args:
        line: `axes.axvline` or `axes.axhline`.
        limit: The budget, or None.
        values: All that is drawn along this axis.
        least_reach: What is near even where all values are equal, as a part of them.
        text: The budget as it is written.
    """
    if limit is None:
        return ""
    low, high = min(values), max(values)
    reach = 2 * max(high - low, least_reach * abs(high))
    if not low - reach <= limit <= high + reach:
        return f"budget {text} is beyond"
    line(limit, color=GREY, lw=1.1, ls=_DASHED, zorder=1)
    return f"dashed: budget {text}"


# Accuracy against latency


def _pareto(report):
    """Draw accuracy against latency, the size as area, with the frontier.

    A point stands at the median inter-token latency; its whisker ends at the 95th
    percentile, the latency that a budget is about. Upwards it is the perplexity's
    increase over the reference, where every file has one, and perplexity otherwise.
    """
    points, is_increase = pareto_points(report)
    if not points:
        return None
    longest = max(len(point["name"]) for point in points)
    is_numbered = len(points) > _MOST_NAMES or longest > _LONGEST_LABEL
    figure = new_figure(4.9 + (0.17 * len(points) if is_numbered else 0))
    axes = figure.add_subplot(title="Accuracy against latency: lower left is better")
    for point in points:
        _draw_point(axes, point, points, is_increase)
    frontier = frontier_of(points)
    axes.step(
        *zip(*((point["x"], point["y"]) for point in frontier), strict=True),
        where="post",
        color=INK,
        lw=1.1,
        zorder=2,
    )
    budgets = _scale_pareto(axes, points, is_increase, budgets_of(report))
    figure.legend(
        handles=_pareto_key(points, frontier, budgets, is_numbered),
        loc="outside lower left",
        ncols=1 if is_numbered else 2,
    )
    _label_points(figure, axes, points, is_numbered)
    return figure


def _colour_of(point):
    if point["is_choice"]:
        return VERMILION
    return PALE if point["is_outside"] else BLUE


def _draw_point(axes, point, points, is_increase):
    """Draw a point with its whiskers, on a disc that is the file's size."""
    x, y, colour = point["x"], point["y"], _colour_of(point)
    axes.plot([x, point["p95"]], [y, y], color=colour, lw=1.6, zorder=3)
    axes.plot([point["p95"]], [y], marker="|", ms=7, mew=1.6, color=colour, zorder=3)
    axes.plot([x, x], point["interval"], color=colour, lw=0.8, zorder=3)
    area = _area_of(point, points)
    disc = axes.scatter([x], [y], s=area, color=colour, alpha=0.28, lw=0, zorder=4)
    dashes = "--" if point["is_outside"] else "-"
    rim = axes.scatter([x], [y], s=area, c="none", edgecolors=colour, ls=dashes)
    (mark,) = axes.plot([x], [y], "*" if point["is_choice"] else "o", color=colour)
    mark.set(ms=11 if point["is_choice"] else 4, mec="white", mew=0.6, zorder=6)
    for artist in (disc, rim, mark):
        artist.set_gid(_TOOLTIP + _tooltip(point, is_increase))


def _area_of(point, points):
    """Return the area of a disc, proportional to the file's size, in square points."""
    largest = max(other["size_mb"] for other in points) or 1.0
    return _LARGEST_AREA * point["size_mb"] / largest


def _tooltip(point, is_increase):
    y = point["y"]
    if is_increase:
        accuracy = f"perplexity {formatting.percent(y - 1, signed=True)}"
    else:
        accuracy = f"perplexity {formatting.number(y)}"
    return (
        f"{_shorten(point['name'])}: {formatting.quantity(point['size_mb'], 'MB')}, "
        f"{formatting.milliseconds(point['x'])} between tokens "
        f"(p95 {formatting.milliseconds(point['p95'])}), {accuracy}"
    )


def _scale_pareto(axes, points, is_increase, budgets):
    """Scale and name the axes, draw the budgets; return what is to be said of these."""

    def percent(value):
        return formatting.percent(value - 1, signed=True)

    xs = [value for point in points for value in (point["x"], point["p95"])]
    ys = [value for point in points for value in point["interval"]]
    axes.margins(0.16)
    end = _scale(axes, "x", xs)
    axes.set_xlabel(f"inter-token latency, ms: median, bar to p95{end}")
    write = percent if is_increase else formatting.number
    end = _scale(axes, "y", ys, write, log_ratio=3)
    what = "perplexity above the reference's" if is_increase else "perplexity"
    axes.set_ylabel(f"{what}{end}")
    limit = budgets.get("max_latency_ms")
    said = [
        _draw_budget(axes.axvline, limit, xs, 0.05, formatting.quantity(limit, "ms"))
    ]
    limit = budgets.get("max_perplexity_increase") if is_increase else None
    if limit is not None:
        limit = 1 + limit
        said.append(_draw_budget(axes.axhline, limit, ys, 0.02, percent(limit)))
    return [text for text in said if text]


def _pareto_key(points, frontier, budgets, is_numbered):
    """Return what the marks mean, as handles of a legend."""
    from matplotlib.lines import Line2D

    handles = []

    def add(label, **style):
        handles.append(Line2D([], [], label=label, **{"ls": "none", **style}))

    if any(point["is_choice"] for point in points):
        add("recommended", marker="*", ms=11, color=VERMILION, mec="w")
    if any(not point["is_choice"] and not point["is_outside"] for point in points):
        add("measured file", marker="o", ms=5, color=BLUE)
    if any(point["is_outside"] for point in points):
        add("ruled out (dashed)", marker="o", ms=5, color=PALE)
    if len({(point["x"], point["y"]) for point in frontier}) > 1:
        add("frontier: none better in both", ls="-", color=INK, lw=1.1)
    if any(low < high for low, high in (point["interval"] for point in points)):
        add("upright: 95 % interval", marker="|", ms=10, color=BLUE, mew=0.8)
    if sizes := sorted(point["size_mb"] for point in points if point["size_mb"]):
        ends = dict.fromkeys(map(formatting.number, (sizes[0], sizes[-1])))
        add(
            f"area: size, {' to '.join(ends)} MB",
            **{"marker": "o", "ms": 9, "mfc": "none", "mec": GREY},
        )
    for text in budgets:
        is_drawn = text.startswith("dashed")
        add(text, ls=_DASHED if is_drawn else "none", color=GREY, lw=1.1)
    if is_numbered:
        for index, point in enumerate(points, 1):
            add(f"{index}  {_shorten(point['name'])}")
    return handles


def _label_points(figure, axes, points, is_numbered):
    """Write a name or a number beside every point so that none covers another."""
    import adjustText
    from matplotlib.transforms import Bbox

    texts = []
    for index, point in enumerate(points, 1):
        name = _shorten(point["name"])
        if point["is_reference"]:
            name += " (reference)"
        texts.append(
            axes.text(
                *(point["x"], point["y"], str(index) if is_numbered else name),
                fontsize=_SMALL,
                fontweight="bold" if point["is_choice"] else "normal",
                color=GREY if point["is_outside"] else INK,
                bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
                zorder=7,
            )
        )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    to_data = axes.transData.inverted()
    taken = []
    for point in points:
        x, y = axes.transData.transform((point["x"], point["y"]))
        reach = max(math.sqrt(_area_of(point, points) / math.pi), 5) * figure.dpi / 72
        disc = Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
        taken.append(disc.transformed(to_data))
        x, y = point["x"], point["y"]
        taken.append(Bbox.from_extents(x, y, point["p95"], y))
    before = np.random.get_state()
    np.random.seed(0)  # it moves labels of equal points at random
    try:
        adjustText.adjust_text(
            texts,
            objects=taken,
            ax=axes,
            expand=(1.05, 1.4),
            force_text=(0.2, 0.5),
            iter_lim=500,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6},
        )
    finally:
        np.random.set_state(before)


# Panels below each other: latency, sizes and accuracy


def _panels(panels, key=()):
    """Return panels below each other and a key; None where nothing was measured.

    Args:
        panels: Of each its title, its rows, the function that draws them on axes, and
            its height in inches. Those without rows are left out.
        key: Handles of a legend.
    """
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    heights = [height for *_, height in panels]
    figure = new_figure(sum(heights) + 0.2 * len(key))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, rows, draw_rows, _) in zip(grid[:, 0], panels, strict=True):
        axes.set_title(title)
        draw_rows(axes, rows)
    if key:
        figure.legend(handles=key, loc="outside lower left", handlelength=3)
    # Laid out once, and not for each file that it is saved to.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _rows_height(rows):
    return 0.97 + 0.37 * len(rows)


def _latency(report):
    """Draw latency by file, and by context, threads and concurrent requests."""
    from matplotlib.lines import Line2D

    entries = [entry for entry in report["entries"] if entry["latency"]]
    panels = []
    for part, title, budget in (
        ("inter_token_latency_ms", "Between two tokens", "max_latency_ms"),
        ("time_to_first_token_ms", "Until the first token", None),
    ):
        rows = [
            (entry["name"], [spread[mark] for mark in ("median", "p95", "p99")])
            for entry in entries
            if (spread := entry["latency"].get(part))
        ]
        draw_rows = functools.partial(
            _draw_spreads, budget=budgets_of(report).get(budget)
        )
        panels.append((title, rows, draw_rows, _rows_height(rows)))
    styles = {
        entry["name"]: {
            "color": _PALETTE[index % len(_PALETTE)],
            "ls": ("-", "--", ":")[index // len(_PALETTE) % 3],
            "marker": "osD^vPX"[index % 7],
            "ms": 4.5,
            "lw": 1.4,
        }
        for index, entry in enumerate(entries)
    }
    keyed = {}
    for title, part, by, quantity, *labels in _CURVES:
        curves = _curves_of(entries, part, by, quantity)
        keyed.update((name, styles[name]) for name, _ in curves)
        draw_rows = functools.partial(_draw_curves, styles=styles, labels=labels)
        panels.append((title, curves, draw_rows, 2.65))
    # A legend leaves out what begins with `_`.
    key = [
        Line2D([], [], label=f" {_shorten(name)}", **style)
        for name, style in keyed.items()
    ]
    return _panels(panels, key)


# Title, part of an entry's latency, by what, what was measured, and names of the axes.
_BETWEEN, _FIRST = "inter_token_latency_ms", "time_to_first_token_ms"
_CURVES = (
    (
        *("Between two tokens, by context", "by_context", "context", _BETWEEN),
        *("tokens in the context", "ms"),
    ),
    (
        *("Until the first token, by context", "by_context", "context", _FIRST),
        *("tokens in the context", "ms"),
    ),
    (
        *("Between two tokens, by threads", "by_threads", "threads", _BETWEEN),
        *("threads", "ms"),
    ),
    (
        *("Throughput of all together", "throughput", "requests", "tokens_per_s"),
        *("concurrent requests", "tokens/s"),
    ),
)


def _curves_of(entries, part, by, quantity):
    """Return of each file that has it the name and `(x, y)` by x."""
    curves = []
    for entry in entries:
        measured = sorted(
            (row[by], value["median"] if isinstance(value, dict) else value)
            for row in entry["latency"].get(part) or []
            if (value := row.get(quantity)) is not None
        )
        if measured:
            curves.append((entry["name"], measured))
    return curves


def _draw_curves(axes, curves, styles, labels):
    """Draw a curve for each file."""
    from matplotlib.ticker import FixedLocator

    for name, measured in curves:
        axes.plot(*zip(*measured, strict=True), **styles[name])
    xs = sorted({x for _, measured in curves for x, _ in measured})
    ys = [y for _, measured in curves for _, y in measured]
    _scale(axes, "x", xs, log_ratio=4)
    # Ticks stand where something was measured.
    axes.xaxis.set_major_locator(FixedLocator(xs[:: math.ceil(len(xs) / 8)]))
    end = _scale(axes, "y", ys)
    if not end:
        axes.set_ylim(0, max(ys) * 1.12 or 1.0)
    across, up = labels
    axes.set(xlabel=across, ylabel=up + end)
    axes.grid(alpha=0.25)


def _draw_spreads(axes, rows, budget):
    """Draw median, p95 and p99 of each file, in ms."""
    for index, (name, (median, p95, p99)) in enumerate(rows):
        axes.plot([median, p99], [index] * 2, color=BLUE, lw=1)
        axes.plot([median, p95], [index] * 2, color=BLUE, lw=4, alpha=0.4)
        axes.plot([median], [index], "o", color=BLUE, ms=6)
        axes.plot([p95], [index], "|", color=BLUE, ms=9, mew=2)
        axes.plot([p99], [index], "x", color=BLUE, ms=5, mew=1.2)
        shown = " / ".join(map(formatting.number, (median, p95, p99)))
        _write_row(axes, index, name, shown)
    _finish_rows(axes, [value for _, marks in rows for value in marks], "ms", budget)
    head = "● median / ❘ p95 / \N{MULTIPLICATION SIGN} p99, ms"
    axes.set_title(head, loc="right", fontsize=_SMALL, color=GREY)


def _sizes(report):
    """Draw the size of every file and the memory of a process that runs it."""
    entries = report["entries"]
    sizes = [(entry["name"], entry["size_bytes"]) for entry in entries]
    memories = [
        (entry["name"], (entry["latency"] or {}).get("peak_memory_bytes"))
        for entry in entries
    ]
    panels = []
    for title, found, budget, colour in (
        ("Size of the file", sizes, budgets_of(report).get("max_size_mb"), BLUE),
        ("Peak memory of a process that runs it", memories, None, GREEN),
    ):
        rows = [(name, value / 1e6) for name, value in found if value]
        draw_rows = functools.partial(_draw_bars, budget=budget, colour=colour)
        panels.append((title, rows, draw_rows, _rows_height(rows)))
    return _panels(panels)


def _draw_bars(axes, rows, budget, colour):
    """Draw a bar for each file, in MB."""
    for index, (name, value) in enumerate(rows):
        axes.barh(index, value, height=0.34, color=colour, alpha=0.85)
        _write_row(axes, index, name, formatting.quantity(value, "MB"))
    # Bars begin at 0, and are never logarithmic.
    _finish_rows(axes, [0, *(value for _, value in rows)], "MB", budget)


def _accuracy(report):
    """Draw perplexity and divergence from the reference with 95 % intervals."""
    budget = budgets_of(report).get("max_perplexity_increase")
    panels = [
        ("Perplexity above the reference's", "perplexity_increase", budget, "%"),
        ("Divergence from the reference", "divergence_nats", None, "nats"),
    ]
    entries = [entry for entry in report["entries"] if entry["accuracy"]]
    if not any(entry["accuracy"].get("perplexity_increase") for entry in entries):
        panels.insert(0, ("Perplexity", "perplexity", None, ""))
    drawn = []
    for title, part, limit, unit in panels:
        rows = [
            (entry["name"], entry["accuracy"][part])
            for entry in entries
            if entry["accuracy"].get(part)
            # Its distance from itself says nothing.
            and (part == "perplexity" or entry["name"] != report["reference"])
        ]
        draw_rows = functools.partial(_draw_intervals, budget=limit, unit=unit)
        drawn.append((title, rows, draw_rows, _rows_height(rows)))
    return _panels(drawn)


def _draw_intervals(axes, rows, budget, unit):
    """Draw the value of each file and its 95 % interval."""
    is_percent = unit == "%"
    scale, suffix = (100.0, " %") if is_percent else (1.0, "")
    ends = []
    for index, (name, found) in enumerate(rows):
        low, value, high = (found[part] * scale for part in ("low", "value", "high"))
        ends += [low, value, high]
        axes.plot([low, high], [index] * 2, color=BLUE, lw=2)
        axes.plot([low, high], [index] * 2, "|", color=BLUE, ms=8, mew=1.5)
        axes.plot([value], [index], "o", color=BLUE, ms=6)
        value, low, high = formatting.interval(found, scale, signed=is_percent)
        _write_row(axes, index, name, f"{value}{suffix} ({low} to {high}{suffix})")
    if is_percent and min(ends) <= 0:
        axes.axvline(0, color=INK, lw=0.8, zorder=1)
    _finish_rows(axes, ends, unit, None if budget is None else budget * scale)
    head = "value (95 % interval)"
    axes.set_title(head, loc="right", fontsize=_SMALL, color=GREY)


def _write_row(axes, index, name, shown):
    """Write above a row its name at the left, and what was measured at the right."""
    for x, text, side in ((0, _shorten(name), "left"), (1, shown, "right")):
        axes.annotate(
            text,
            (x, index),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 6),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=_SMALL,
            bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
            zorder=5,
        )


def _finish_rows(axes, values, unit, budget):
    """Scale the axis of a panel of rows, and draw the budget where it is not far."""
    end = _scale(axes, "x", values)
    text = formatting.quantity(budget, unit)
    said = _draw_budget(axes.axvline, budget, values, 1, text)
    axes.set_xlabel("; ".join(filter(None, (unit + end, said))))
    if not end:
        axes.set_xlim(left=min(0, axes.get_xlim()[0]) if min(values) < 0 else 0)
    rows = len(axes.texts) // 2
    axes.set_ylim(rows - 0.6, -0.85)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.25)
    axes.spines["left"].set_visible(False)


# How each plot of a report is drawn, by the name of its file.
PLOTS = {
    "pareto": _pareto,
    "latency": _latency,
    "sizes": _sizes,
    "accuracy": _accuracy,
}
