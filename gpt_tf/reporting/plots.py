"""The plots of a report, as PNG files and as SVG within its page.

Each is 5 inches wide and grows downwards, so that its smallest text is legible where a
page is 390 pixels wide. The colours are those of Okabe and Ito, told apart by people
who see few colours; nothing is said by colour alone. matplotlib is imported where
something is drawn, since a device does without it.

Reference: Okabe and Ito, Color Universal Design, 2008.
"""

import contextlib
import io
import math
import os
import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from gpt_tf import artifacts, formatting
from gpt_tf.advisor.frontier import budgets_of, frontier_of, pareto_points

# Okabe and Ito's, but for yellow, which is too light for a line on white.
BLUE, VERMILION = "#0072b2", "#d55e00"
INK, GREY, PALE = "#1f2933", "#5c6773", "#b4bdc8"
_PALETTE = (BLUE, VERMILION, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", INK)
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
_PLATE = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5}  # under a label
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


@contextlib.contextmanager
def house_style():
    """Draw with matplotlib's defaults and a few of ours, not with a user's."""
    from matplotlib import style

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name may be in a script that the font lacks; it is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@house_style()
def figure_of(name: str, report: dict):
    """Return one of `PLOTS` as a matplotlib `Figure`, or None; see `draw`."""
    return PLOTS[name](report)


@house_style()
def save(figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG, whole or not at all."""
    with artifacts.atomic_file(Path(path)) as file:
        # Without the version of matplotlib the same numbers give the same bytes.
        figure.savefig(file, format="png", dpi=180, metadata={"Software": None})


def svg_of(figure, name: str, title: str) -> str:
    """Return a figure as an SVG element for a page, in the page's colours.

    Args:
        figure: As `figure_of` returns it.
        name: What sets its ids apart, so that a page can have several.
        title: What is read out instead of it.
    """
    file = io.StringIO()
    with house_style():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root.find("{*}metadata"))
    # Matplotlib's ids are hashes of addresses too: another one for the same figure.
    given = [e.get("id") for e in root.iter() if e.get("id") and e.tag[-2:] != "}g"]
    own = {f"#{old}": f"#{name}-{index}" for index, old in enumerate(given)}
    own |= {old: own[f"#{old}"][1:] for old in given}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: text for key, text in element.items()}
        # Nothing refers to a group.
        group = attributes.pop("id", "") if element.tag == "g" else ""
        if group.startswith(_TOOLTIP):
            tooltip = ElementTree.Element("title")
            tooltip.text = group.removeprefix(_TOOLTIP)
            element.insert(0, tooltip)
        element.attrib.clear()
        for key, text in attributes.items():
            for colour, css in _CSS_COLOURS.items():
                text = text.replace(colour, css)
            element.set(key, re.sub(r"#?[\w-]+", lambda m: own.get(m[0], m[0]), text))
    for part in ("width", "height"):
        del root.attrib[part]
    root.attrib.update({"role": "img", "aria-label": title})
    return ElementTree.tostring(root, "unicode")


def new_figure(height: float, width: float = _WIDTH):
    """Return an empty figure, its sides in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lay_out(figure):
    """Lay a figure out once, and not for each file that it is saved to."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


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
    locator = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    if is_log:
        steps = (1, 2, 5) if highest / lowest < 1000 else (1,)
        locator = LogLocator(subs=steps, numticks=12)
    axis = getattr(axes, f"{side}axis")
    axis.set_major_locator(locator)
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

    def percent(value):
        return formatting.percent(value - 1, signed=True)

    write = percent if is_increase else formatting.number
    largest = max(point["size_mb"] for point in points) or 1.0
    areas = [_LARGEST_AREA * point["size_mb"] / largest for point in points]
    for point, area in zip(points, areas, strict=True):
        size = formatting.quantity(point["size_mb"], "MB")
        median, p95 = map(formatting.milliseconds, (point["x"], point["p95"]))
        tooltip = (
            f"{_shorten(point['name'])}: {size}, {median} between tokens (p95 {p95}), "
            f"perplexity {write(point['y'])}"
        )
        _draw_point(axes, point, area, tooltip)
    frontier = [(point["x"], point["y"]) for point in frontier_of(points)]
    axes.step(*zip(*frontier, strict=True), where="post", color=INK, lw=1.1, zorder=2)

    xs = [value for point in points for value in (point["x"], point["p95"])]
    ys = [value for point in points for value in point["interval"]]
    axes.margins(0.16)
    end = _scale(axes, "x", xs)
    axes.set_xlabel(f"inter-token latency, ms: median, bar to p95{end}")
    end = _scale(axes, "y", ys, write, log_ratio=3)
    what = "perplexity above the reference's" if is_increase else "perplexity"
    axes.set_ylabel(f"{what}{end}")
    budgets = budgets_of(report)
    limit = budgets.get("max_latency_ms")
    text = formatting.quantity(limit, "ms")
    said = [_draw_budget(axes.axvline, limit, xs, 0.05, text)]
    if is_increase and "max_perplexity_increase" in budgets:
        limit = 1 + budgets["max_perplexity_increase"]
        said.append(_draw_budget(axes.axhline, limit, ys, 0.02, percent(limit)))
    names = []
    if is_numbered:
        names = [f"{i}  {_shorten(point['name'])}" for i, point in enumerate(points, 1)]
    figure.legend(
        handles=_pareto_key(points, frontier, [*filter(None, said), *names]),
        loc="outside lower left",
        ncols=1 if is_numbered else 2,
    )
    _lay_out(figure)
    _label_points(axes, points, areas, is_numbered)
    return figure


def _draw_point(axes, point, area, tooltip):
    """Draw a point with its whiskers, on a disc that is the file's size."""
    x, y, is_choice = point["x"], point["y"], point["is_choice"]
    colour = VERMILION if is_choice else PALE if point["is_outside"] else BLUE
    axes.plot([x, point["p95"]], [y, y], color=colour, lw=1.6, zorder=3)
    axes.plot([point["p95"]], [y], marker="|", ms=7, mew=1.6, color=colour, zorder=3)
    axes.plot([x, x], point["interval"], color=colour, lw=0.8, zorder=3)
    disc = axes.scatter([x], [y], s=area, color=colour, alpha=0.28, lw=0, zorder=4)
    dashes = "--" if point["is_outside"] else "-"
    rim = axes.scatter([x], [y], s=area, c="none", edgecolors=colour, ls=dashes)
    (mark,) = axes.plot([x], [y], "*" if is_choice else "o", color=colour)
    mark.set(ms=11 if is_choice else 4, mec="white", mew=0.6, zorder=6)
    for artist in (disc, rim, mark):
        artist.set_gid(_TOOLTIP + tooltip)


def _pareto_key(points, frontier, texts):
    """Return what the marks mean, and further texts, as handles of a legend."""
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
    if len(set(frontier)) > 1:
        add("frontier: none better in both", ls="-", color=INK, lw=1.1)
    if any(low < high for low, high in (point["interval"] for point in points)):
        add("upright: 95 % interval", marker="|", ms=10, color=BLUE, mew=0.8)
    if sizes := sorted(point["size_mb"] for point in points if point["size_mb"]):
        ends = dict.fromkeys(map(formatting.number, (sizes[0], sizes[-1])))
        label = f"area: size, {' to '.join(ends)} MB"
        add(label, marker="o", ms=9, mfc="none", mec=GREY)
    for text in texts:
        is_drawn = text.startswith("dashed")
        add(text, ls=_DASHED if is_drawn else "none", color=GREY, lw=1.1)
    return handles


def _label_points(axes, points, areas, is_numbered):
    """Write a name or a number beside every point so that none covers another."""
    import adjustText
    from matplotlib.transforms import Bbox

    to_data = axes.transData.inverted()
    texts, taken = [], []
    for index, (point, area) in enumerate(zip(points, areas, strict=True), 1):
        place = point["x"], point["y"]
        name = _shorten(point["name"])
        if point["is_reference"]:
            name += " (reference)"
        texts.append(
            axes.text(
                *place,
                str(index) if is_numbered else name,
                fontsize=_SMALL,
                fontweight="bold" if point["is_choice"] else "normal",
                color=GREY if point["is_outside"] else INK,
                bbox=_PLATE,
                zorder=7,
            )
        )
        reach = max(math.sqrt(area / math.pi), 5) * axes.figure.dpi / 72
        disc = Bbox([axes.transData.transform(place)] * 2).padded(reach)
        taken.append(disc.transformed(to_data))
        taken.append(Bbox([place, (point["p95"], point["y"])]))
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


def _figure_of_panels(panels):
    """Return panels below each other; None where nothing was measured.

    Args:
        panels: Of each its title, its rows, a function that draws them on axes, and
            its height in inches. Those without rows are left out.
    """
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    heights = [height for *_, height in panels]
    figure = new_figure(sum(heights))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    key = {}
    for axes, (title, rows, draw_rows, _) in zip(grid[:, 0], panels, strict=True):
        axes.set_title(title)
        draw_rows(axes, rows)
        key.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if key:
        figure.set_figheight(sum(heights) + 0.2 * len(key))
        figure.legend(handles=key.values(), loc="outside lower left", handlelength=3)
    _lay_out(figure)
    return figure


def _rows_panel(title, rows, draw_row, unit, budget=None, head=""):
    """Return a panel in which each file has a row.

    Args:
        title: Of the panel.
        rows: Of each file its name, its numbers as they are written, and the three
            numbers that are drawn.
        draw_row: Draws these on axes, at a height.
        unit: Theirs.
        budget: In the same unit; None without one.
        head: What the written numbers are.
    """

    def draw_rows(axes, rows):
        values = [value for *_, numbers in rows for value in numbers]
        for index, (name, shown, numbers) in enumerate(rows):
            draw_row(axes, index, *numbers)
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
                    bbox=_PLATE,
                    zorder=5,
                )
        end = _scale(axes, "x", values)
        text = formatting.quantity(budget, unit)
        said = _draw_budget(axes.axvline, budget, values, 1, text)
        axes.set_xlabel("; ".join(filter(None, (unit + end, said))))
        if min(values) < 0:
            axes.axvline(0, color=INK, lw=0.8, zorder=1)
        elif not end:
            axes.set_xlim(left=0)
        axes.set_ylim(len(rows) - 0.6, -0.85)
        axes.set_yticks([])
        axes.grid(axis="x", alpha=0.25)
        axes.spines["left"].set_visible(False)
        axes.set_title(head, loc="right", fontsize=_SMALL, color=GREY)

    return title, rows, draw_rows, 0.97 + 0.37 * len(rows)


def _draw_spread(axes, y, median, p95, p99):
    axes.plot([median, p99], [y, y], color=BLUE, lw=1)
    axes.plot([median, p95], [y, y], color=BLUE, lw=4, alpha=0.4)
    axes.plot([median], [y], "o", color=BLUE, ms=6)
    axes.plot([p95], [y], "|", color=BLUE, ms=9, mew=2)
    axes.plot([p99], [y], "x", color=BLUE, ms=5, mew=1.2)


def _draw_interval(axes, y, low, value, high):
    axes.plot([low, high], [y, y], "|-", color=BLUE, lw=2, ms=8, mew=1.5)
    axes.plot([value], [y], "o", color=BLUE, ms=6)


def _draw_bar(axes, y, *ends):
    axes.barh(y, max(ends), height=0.34, color=BLUE, alpha=0.85)


_FIRST, _BETWEEN = "time_to_first_token_ms", "inter_token_latency_ms"
# Title, part of an entry's latency, by what, what was measured, and the latter's unit.
_CURVES = (
    ("Between two tokens, by context", "by_context", "context", _BETWEEN, "ms"),
    ("Until the first token, by context", "by_context", "context", _FIRST, "ms"),
    ("Between two tokens, by threads", "by_threads", "threads", _BETWEEN, "ms"),
    (
        "Throughput of all requests",
        "throughput",
        "requests",
        "tokens_per_s",
        "tokens/s",
    ),
)
_ACROSS = {"context": "tokens in the context", "requests": "concurrent requests"}


def _latency(report):
    """Draw latency by file, and by context, threads and concurrent requests."""
    entries = [entry for entry in report["entries"] if entry["latency"]]
    head = "● median / ❘ p95 / \N{MULTIPLICATION SIGN} p99, ms"
    panels = []
    for part, title, budget in (
        (_BETWEEN, "Between two tokens", budgets_of(report).get("max_latency_ms")),
        (_FIRST, "Until the first token", None),
    ):
        rows = []
        for entry in entries:
            if spread := entry["latency"].get(part):
                numbers = [spread[mark] for mark in ("median", "p95", "p99")]
                shown = " / ".join(map(formatting.number, numbers))
                rows.append((entry["name"], shown, numbers))
        panels.append(_rows_panel(title, rows, _draw_spread, "ms", budget, head))
    panels += [_curves_panel(entries, *curve) for curve in _CURVES]
    return _figure_of_panels(panels)


def _curves_panel(entries, title, part, by, quantity, unit):
    """Return a panel with a curve for each file that has one."""
    curves = {}
    for index, entry in enumerate(entries):
        curve = sorted(
            (row[by], value["median"] if isinstance(value, dict) else value)
            for row in entry["latency"].get(part) or []
            if (value := row.get(quantity)) is not None
        )
        if curve:
            curves[index] = curve

    def draw_rows(axes, curves):
        from matplotlib.ticker import FixedLocator

        for index, curve in curves.items():
            axes.plot(
                *zip(*curve, strict=True),
                color=_PALETTE[index % len(_PALETTE)],
                ls=("-", "--", ":")[index // len(_PALETTE) % 3],
                marker="osD^vPX"[index % 7],
                ms=4.5,
                lw=1.4,
                # A legend leaves out what begins with `_`.
                label=f" {_shorten(entries[index]['name'])}",
            )
        xs = sorted({x for curve in curves.values() for x, _ in curve})
        ys = [y for curve in curves.values() for _, y in curve]
        _scale(axes, "x", xs, log_ratio=4)
        # Ticks stand where something was measured.
        axes.xaxis.set_major_locator(FixedLocator(xs[:: math.ceil(len(xs) / 8)]))
        end = _scale(axes, "y", ys)
        if not end:
            axes.set_ylim(0, max(ys) * 1.12 or 1.0)
        axes.set(xlabel=_ACROSS.get(by, by), ylabel=unit + end)
        axes.grid(alpha=0.25)

    return title, curves, draw_rows, 2.65


def _sizes(report):
    """Draw the size of every file and the memory of a process that runs it."""
    entries, limit = report["entries"], budgets_of(report).get("max_size_mb")
    sizes = [entry["size_bytes"] for entry in entries]
    peaks = [(entry["latency"] or {}).get("peak_memory_bytes") for entry in entries]
    panels = []
    for title, found, budget in (
        ("Size of the file", sizes, limit),
        ("Peak memory of a process that runs it", peaks, None),
    ):
        # Bars begin at 0, and are never logarithmic.
        rows = [
            (entry["name"], formatting.quantity(size / 1e6, "MB"), (0, size / 1e6))
            for entry, size in zip(entries, found, strict=True)
            if size
        ]
        panels.append(_rows_panel(title, rows, _draw_bar, "MB", budget))
    return _figure_of_panels(panels)


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
        head = "value (95 % interval)"
        panels.append(_rows_panel(title, rows, _draw_interval, unit, budget, head))
    return _figure_of_panels(panels)


# How each plot of a report is drawn, by the name of its file.
PLOTS = {
    "pareto": _pareto,
    "latency": _latency,
    "sizes": _sizes,
    "accuracy": _accuracy,
}
