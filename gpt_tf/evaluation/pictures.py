"""The pictures of a report: what was measured, drawn for phones and for paper.

Each is 5 inches wide and grows downwards, so that its smallest text is legible where a
page is 390 pixels wide. The colours are those of Okabe and Ito, told apart by people
who see few colours; nothing is said by colour alone.

Reference: Okabe and Ito, Color Universal Design, 2008.
"""

import functools
import itertools
import math
import os
import re
import warnings
from pathlib import Path

from gpt_tf import files
from gpt_tf.evaluation.budgets import SCENARIOS
from gpt_tf.evaluation.candidates import Candidate, candidates_of

# Okabe and Ito's, but for yellow, which is too light for a line on white.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
)
_BLUE, _VERMILION, _GREEN = PALETTE[0], PALETTE[1], PALETTE[2]
_INK, _GREY, _PALE = "#1f2933", "#6b7785", "#b4bdc8"
_STYLES = ("-", "--", ":")
_MARKERS = "osD^vPX"

_WIDTH = 5.0  # inches
_DPI = 180
_TEXT, _SMALL = 9, 8  # points
_STYLE = {
    "font.size": _TEXT,
    "axes.titlesize": _TEXT + 1,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}
_LONGEST_NAME = 44
_MOST_NAMES = 10  # more points than this are numbered
_LARGEST_AREA = 700.0  # of a point, in square points
# Beyond this ratio of the largest to the smallest an axis is logarithmic.
_LOG_RATIO = 8.0
_INCREASES = (
    *(-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0),
)


def draw_pareto(report: dict, path: str | os.PathLike) -> bool:
    """Draw accuracy against latency, size as area, with the frontier.

    A point stands at the median inter-token latency; its whisker ends at the 95th
    percentile, the latency that a budget is about. Upwards it is the perplexity's
    increase over the reference, where every file has one, and perplexity otherwise.
    Files that were ruled out are pale, the recommended one is marked.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where no file has both accuracy and latency.

    Example:
        >>> draw_pareto(read_report("runs/optimized"), "pareto.png")
    """
    drawn = _pareto(report)
    if drawn is None:
        return False
    _save(drawn[0], path)
    return True


def draw_latency(report: dict, path: str | os.PathLike) -> bool:
    """Draw the time to the first token and between tokens.

    By file with median, p95 and p99; and by context length, threads and concurrent
    requests where these were measured.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where no file has a latency.
    """
    entries = [entry for entry in report["entries"] if entry["latency"]]
    panels = []
    for part, title in (
        ("inter_token_latency_ms", "Between two tokens"),
        ("time_to_first_token_ms", "Until the first token"),
    ):
        rows = [
            _spread_row(entry["name"], entry["latency"][part])
            for entry in entries
            if entry["latency"].get(part)
        ]
        budget = None
        if part == "inter_token_latency_ms":
            budget = budgets_of(report).get("max_latency_ms")
        if rows:
            panels.append((_panel_height(rows), _draw_spreads, (title, rows, budget)))
    styles = {
        entry["name"]: (
            PALETTE[index % len(PALETTE)],
            _STYLES[index // len(PALETTE) % len(_STYLES)],
            _MARKERS[index % len(_MARKERS)],
        )
        for index, entry in enumerate(entries)
    }
    shown = []
    for part, of, value, title, across, up in (
        *(
            ("by_context", "context", measured, title, "tokens in the context", "ms")
            for measured, title in (
                ("inter_token_latency_ms", "Between two tokens, by context"),
                ("time_to_first_token_ms", "Until the first token, by context"),
            )
        ),
        (
            *("by_threads", "threads", "inter_token_latency_ms"),
            *("Between two tokens, by threads", "threads", "ms"),
        ),
        (
            *("throughput", "requests", "tokens_per_s"),
            *("Throughput of all together", "concurrent requests", "tokens/s"),
        ),
    ):
        lines = []
        for entry in entries:
            measured = [
                (row[of], _middle(row[value]))
                for row in entry["latency"].get(part) or []
                if row.get(value) is not None
            ]
            if measured:
                lines.append((entry["name"], sorted(measured)))
        if lines:
            shown.extend(name for name, _ in lines if name not in shown)
            panels.append((2.3, _draw_lines, (title, across, up, lines, styles)))
    if not panels:
        return False
    figure = _draw_panels(panels, [(name, styles[name]) for name in shown])
    _save(figure, path)
    return True


def draw_sizes(report: dict, path: str | os.PathLike) -> bool:
    """Draw the size of every file and the memory of a process that runs it.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where there is neither.
    """
    sizes, memories = [], []
    for entry in report["entries"]:
        if entry["size_bytes"]:
            sizes.append((entry["name"], entry["size_bytes"] / 1e6))
        memory = (entry["latency"] or {}).get("peak_memory_bytes")
        if memory:
            memories.append((entry["name"], memory / 1e6))
    budget = budgets_of(report).get("max_size_mb")
    panels = [
        (_panel_height(rows), _draw_bars, (title, rows, limit, colour))
        for title, rows, limit, colour in (
            ("Size of the file", sizes, budget, _BLUE),
            ("Peak memory of a process that runs it", memories, None, _GREEN),
        )
        if rows
    ]
    if not panels:
        return False
    _save(_draw_panels(panels), path)
    return True


def draw_accuracy(report: dict, path: str | os.PathLike) -> bool:
    """Draw perplexity and divergence from the reference with 95 % intervals.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where no file has an accuracy.
    """
    panels = []
    for part, title, unit, is_percent in (
        ("perplexity_increase", "Perplexity above the reference's", "%", True),
        ("perplexity", "Perplexity", "", False),
        ("divergence_nats", "Divergence from the reference", "nats a token", False),
    ):
        rows = [
            (entry["name"], entry["accuracy"][part])
            for entry in report["entries"]
            if (entry["accuracy"] or {}).get(part)
            # Its distance from itself says nothing.
            and (part == "perplexity" or entry["name"] != report["reference"])
        ]
        if not rows:
            continue
        if part == "perplexity" and panels:
            continue  # the same points on another scale
        budget = None
        if part == "perplexity_increase":
            budget = budgets_of(report).get("max_perplexity_increase")
        drawn = (title, rows, budget, unit, is_percent)
        panels.append((_panel_height(rows), _draw_intervals, drawn))
    if not panels:
        return False
    _save(_draw_panels(panels), path)
    return True


def budgets_of(report: dict) -> dict:
    """Return the budgets that the choice was made by, those that are numbers."""
    budgets = (report.get("recommendation") or {}).get("budgets") or report["budgets"]
    return {name: value for name, value in budgets.items() if value is not None}


def candidates_by_name(report: dict) -> dict[str, Candidate]:
    """Return the entries as the advisor saw them, by name."""
    scenario = (report.get("recommendation") or {}).get("scenario")
    is_concurrent = scenario in SCENARIOS and SCENARIOS[scenario].objective == "server"
    return {one.name: one for one in candidates_of(report, is_concurrent)}


def outside_of(report: dict) -> set[str]:
    """Return the names of the files that the budgets exclude.

    These are what the recommendation rules out or, without one, the files whose
    measured numbers exceed a budget.
    """
    recommendation = report.get("recommendation")
    if recommendation:
        return {row["name"] for row in recommendation.get("ruled_out") or []}
    budgets = budgets_of(report)
    candidates = candidates_by_name(report)
    return {name for name, one in candidates.items() if one.broken(budgets)}


def frontier_of(points) -> list:
    """Return the points than which no other is at least as good in both ways.

    Args:
        points: Tuples that begin with x and y, both better when smaller.

    Returns:
        Those on the frontier, by x.
    """
    frontier, lowest = [], math.inf
    for point in sorted(points, key=lambda point: point[:2]):
        if point[1] < lowest:
            frontier.append(point)
            lowest = point[1]
    return frontier


def _in_house_style(draw):
    """Draw with matplotlib's own defaults and a few of ours, not with a user's."""

    @functools.wraps(draw)
    def styled(*arguments, **options):
        from matplotlib import style

        with style.context(["default", _STYLE]), warnings.catch_warnings():
            _allow_missing_glyphs()
            return draw(*arguments, **options)

    return styled


# Accuracy against latency


@_in_house_style
def _pareto(report, numbered=None):
    """The figure and its labels `[(name, Text)]`, or None where nothing is to draw."""
    points, is_increase = pareto_points(report)
    if not points:
        return None
    if numbered is None:
        drawn = None
        if len(points) <= _MOST_NAMES:
            drawn = _pareto(report, numbered=False)
        return drawn or _pareto(report, numbered=True)

    budgets = budgets_of(report)
    key = _pareto_key(points, budgets)
    figure, axes = _pareto_axes(_key_height(key, points, numbered))
    x_budget = budgets.get("max_latency_ms")
    y_budget = budgets.get("max_perplexity_increase")
    y_budget = 1 + y_budget if is_increase and y_budget is not None else None
    x_drawn, y_drawn = _scale_plane(axes, points, x_budget, y_budget, is_increase)
    _draw_budgets(axes, x_budget, y_budget, x_drawn, y_drawn)
    crossed = _draw_points(axes, points)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if x_drawn:
        crossed.append(((x_budget, bottom), (x_budget, top), 3))
    if y_drawn:
        crossed.append(((left, y_budget), (right, y_budget), 3))
    _draw_key(figure, key, points, numbered)
    labels = _place_labels(
        *(figure, axes, points, numbered, crossed, y_budget if y_drawn else None)
    )
    return None if labels is None else (figure, labels)


def _pareto_axes(key_height):
    """A figure with the plane above and room for the key below."""
    plane, left, right, head, foot = 3.75, 0.82, 0.1, 0.5, 0.55
    height = head + plane + foot + key_height
    figure = _new_figure(height)
    figure.set_layout_engine("none")
    axes = figure.add_axes(
        (
            left / _WIDTH,
            (foot + key_height) / height,
            (_WIDTH - left - right) / _WIDTH,
            plane / height,
        )
    )
    axes.set_title("Accuracy against latency: lower left is better", loc="left", pad=16)
    return figure, axes


def _scale_plane(axes, points, x_budget, y_budget, is_increase):
    """Set limits, scales and ticks; return whether the budgets lie within them."""
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        MaxNLocator,
        NullLocator,
    )

    x_reach = [value for point in points for value in (point["x"], point["p95"])]
    y_reach = [value for point in points for value in point["interval"]]
    x_log = max(x_reach) / min(x_reach) > _LOG_RATIO
    y_log = min(y_reach) > 0 and max(y_reach) / min(y_reach) > 3
    x_limits, x_drawn = _limits(x_reach, x_budget, x_log, 0.05)
    y_limits, y_drawn = _limits(
        y_reach, y_budget, y_log, 0.005 if is_increase else 0.05
    )
    axes.set_xscale("log" if x_log else "linear")
    axes.set_yscale("log" if y_log else "linear")
    axes.set_xlim(x_limits)
    axes.set_ylim(y_limits)
    axes.xaxis.set_major_locator(
        FixedLocator(_decades(*x_limits))
        if x_log
        else MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    if y_log:
        ticks = _increases_within if is_increase else _decades
        axes.yaxis.set_major_locator(FixedLocator(ticks(*y_limits)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(
            lambda value, _: (
                format_percent(value - 1) if is_increase else format_number(value)
            )
        )
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("inter-token latency, ms (point: median, whisker: p95)")
    axes.set_ylabel("perplexity above the reference's" if is_increase else "perplexity")
    return x_drawn, y_drawn


def pareto_points(report):
    outside = outside_of(report)
    choice = (report.get("recommendation") or {}).get("choice")
    measured = []
    for entry in report["entries"]:
        spread = (entry["latency"] or {}).get("inter_token_latency_ms")
        accuracy = entry["accuracy"] or {}
        if spread and accuracy.get("perplexity") and spread["median"] > 0:
            measured.append((entry, spread, accuracy))
    increases = {
        entry["name"]: accuracy.get("perplexity_increase")
        or (_INCREASE_OF_REFERENCE if entry["name"] == report["reference"] else None)
        for entry, _, accuracy in measured
    }
    is_increase = bool(increases) and all(increases.values())
    points = []
    for entry, spread, accuracy in measured:
        name = entry["name"]
        interval = increases[name] if is_increase else accuracy["perplexity"]
        value, low, high = (
            interval[part] + is_increase for part in ("value", "low", "high")
        )
        points.append(
            {
                "name": name,
                "x": spread["median"],
                "p95": max(spread["p95"], spread["median"]),
                "y": value,
                "interval": (min(low, value), max(high, value)),
                "size_mb": (entry["size_bytes"] or 0) / 1e6,
                "is_outside": name in outside,
                "is_choice": name == choice,
                "is_reference": name == report["reference"],
            }
        )
    return points, is_increase


_INCREASE_OF_REFERENCE = {"value": 0.0, "low": 0.0, "high": 0.0}


def plane(points):
    return [(point["x"], point["y"], point["name"]) for point in points]


def _what_of(point):
    words = []
    if point["is_choice"]:
        words.append("recommended")
    if point["is_reference"]:
        words.append("reference")
    return f" ({', '.join(words)})" if words else ""


def _area(size_mb, points):
    """Area of a point: proportional to the file's size, the largest as given."""
    largest = max(point["size_mb"] for point in points) or 1.0
    return _LARGEST_AREA * size_mb / largest


def _colour_of(point):
    if point["is_choice"]:
        return _VERMILION
    return _PALE if point["is_outside"] else _BLUE


def _draw_points(axes, points):
    """Draw frontier, whiskers and points; return segments that labels should avoid.

    Of each: where it begins and ends, and how much it is to be avoided.
    """
    segments = []
    frontier = frontier_of(plane(points))
    for (x, y, _), (next_x, next_y, _) in itertools.pairwise(frontier):
        axes.plot([x, next_x, next_x], [y, y, next_y], color=_INK, lw=1.1, zorder=2)
        corner = (next_x, y)
        segments += [((x, y), corner, 8), (corner, (next_x, next_y), 8)]
    for point in points:
        x, y, colour = point["x"], point["y"], _colour_of(point)
        low, high = point["interval"]
        whiskers = [([x, point["p95"]], [y, y]), ([x, x], [low, high])]
        for (xs, ys), width in zip(whiskers, (1.6, 0.8), strict=True):
            axes.plot(xs, ys, color=colour, lw=width, zorder=3, solid_capstyle="butt")
            segments.append(((xs[0], ys[0]), (xs[1], ys[1]), 8))
        axes.plot(
            [point["p95"]], [y], marker="|", ms=7, mew=1.6, color=colour, zorder=3
        )
        axes.scatter(
            [x],
            [y],
            s=_area(point["size_mb"], points),
            facecolor=colour,
            edgecolor=colour,
            alpha=0.28 if not point["is_outside"] else 0.22,
            lw=0,
            zorder=4,
        )
        axes.scatter(
            [x],
            [y],
            s=_area(point["size_mb"], points),
            facecolor="none",
            edgecolor=colour,
            lw=1.0,
            ls="--" if point["is_outside"] else "-",
            zorder=4,
        )
        axes.plot(
            [x],
            [y],
            marker="*" if point["is_choice"] else "o",
            ms=11 if point["is_choice"] else 4,
            color=colour,
            mec="white",
            mew=0.6,
            zorder=6,
        )
    return segments


def _draw_budgets(axes, x_budget, y_budget, x_drawn, y_drawn):
    """Draw the budgets' lines, and above the plane what is said of them."""
    style = {"color": _GREY, "lw": 1.1, "ls": (0, (5, 3)), "zorder": 1}
    shade = {"color": _GREY, "alpha": 0.07, "lw": 0, "zorder": 0}
    y_side = 1.0
    if x_budget is not None:
        text = f"budget {format_number(x_budget)} ms"
        if x_drawn:
            axes.axvline(x_budget, **style)
            axes.axvspan(x_budget, axes.get_xlim()[1], **shade)
            place = axes.transData.transform((x_budget, axes.get_ylim()[0]))
            place = axes.transAxes.inverted().transform(place)[0]
        elif x_budget > axes.get_xlim()[1]:
            place, text = 1.0, f"{text} \N{RIGHTWARDS ARROW}"
        else:
            place, text = 0.0, f"\N{LEFTWARDS ARROW} {text}"
        _head(axes, place, text)
        y_side = 0.0 if place > 0.5 else 1.0
    if y_budget is None:
        return
    if y_drawn:
        axes.axhline(y_budget, **style)
        axes.axhspan(y_budget, axes.get_ylim()[1], **shade)
        return
    is_above = y_budget > axes.get_ylim()[1]
    arrow = "\N{UPWARDS ARROW}" if is_above else "\N{DOWNWARDS ARROW}"
    _head(axes, y_side, f"{arrow} budget {format_percent(y_budget - 1)}")


def _head(axes, x, text):
    """Write just above the plane, within its width."""
    axes.annotate(
        text,
        (x, 1),
        xycoords="axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="left" if x < 0.12 else "right" if x > 0.88 else "center",
        fontsize=_SMALL,
        color=_GREY,
    )


def _pareto_key(points, budgets):
    """What the marks mean: handles and texts."""
    from matplotlib.lines import Line2D

    def mark(**style):
        return Line2D([], [], ls="none", **style)

    key = []
    if any(point["is_choice"] for point in points):
        key.append((mark(marker="*", ms=11, color=_VERMILION, mec="w"), "recommended"))
    if any(not point["is_choice"] and not point["is_outside"] for point in points):
        text = "within the budgets" if budgets else "measured file"
        key.append((mark(marker="o", ms=5, color=_BLUE), text))
    if any(point["is_outside"] for point in points):
        key.append((mark(marker="o", ms=5, color=_PALE), "ruled out (dashed)"))
    if len(frontier_of(plane(points))) > 1:
        line = Line2D([], [], color=_INK, lw=1.1)
        key.append((line, "frontier: none better in both"))
    if any(low < high for low, high in (point["interval"] for point in points)):
        line = mark(marker="|", ms=10, color=_BLUE, mew=0.8)
        key.append((line, "upright: 95 % interval"))
    return key


_KEY_ROW, _SIZES_ROW, _NAME_ROW = 15.0, 38.0, 12.0  # points


def _key_height(key, points, numbered):
    """Inches."""
    rows = math.ceil(len(key) / 2) * _KEY_ROW + 4
    sizes = _SIZES_ROW if any(point["size_mb"] for point in points) else 0
    names = len(points) * _NAME_ROW + 4 if numbered else 0
    return (rows + sizes + names + 4) / 72


def _draw_key(figure, key, points, numbered):
    """Below the plane: what marks mean, sizes as area, names of numbered points."""
    height = _key_height(key, points, numbered) * 72
    width = _WIDTH * 72
    strip = figure.add_axes((0, 0, 1, height / 72 / figure.get_figheight()))
    strip.set_xlim(0, width)
    strip.set_ylim(height, 0)
    strip.axis("off")

    def write(x, y, text):
        strip.text(x, y, text, va="center", fontsize=_SMALL, parse_math=False)

    y = _KEY_ROW / 2
    for index, (handle, text) in enumerate(key):
        x = 14 + index % 2 * width * 0.46
        is_line = handle.get_marker() in ("None", None, "")
        handle.set_data([x, x + 18] if is_line else [x + 9], [y, y] if is_line else [y])
        strip.add_line(handle)
        write(x + 26, y, text)
        y += _KEY_ROW * (index % 2)
    y = math.ceil(len(key) / 2) * _KEY_ROW + 4
    sizes = sorted({point["size_mb"] for point in points if point["size_mb"]})
    if sizes:
        y += _SIZES_ROW / 2
        write(14, y, "area: size")
        x = 74
        shown = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
        for size in shown:
            area = _area(size, points)
            radius = math.sqrt(area / math.pi)
            strip.scatter(
                [x + radius], [y], s=area, facecolor="#e8ecf0", edgecolor=_GREY, lw=1
            )
            write(x + 2 * radius + 5, y, f"{format_number(size)} MB")
            x += 2 * radius + 62
        y += _SIZES_ROW / 2
    if numbered:
        y += 4 + _NAME_ROW / 2
        for index, point in enumerate(points, 1):
            strip.text(24, y, str(index), va="center", ha="right", fontsize=_SMALL)
            write(30, y, f"{_label(point['name'])}{_what_of(point)}")
            y += _NAME_ROW


def _limits(reach, budget, is_log, least):
    """Limits of an axis with room for labels, and whether the budget lies in them.

    Args:
        reach: All numbers that are drawn.
        budget: A number, or None.
        is_log: Whether the axis is logarithmic.
        least: Room on either side that there is at least, as a part of the number.
    """
    forward, back = (math.log, math.exp) if is_log else (float, float)
    low, high = forward(min(reach)), forward(max(reach))
    at = None
    if budget is not None and (budget > 0 or not is_log):
        at = forward(budget)
        both = max(high, at) - min(low, at)
        # A far budget would press the points into a corner.
        if both > 0 and (high - low) / both > 0.3:
            low, high = min(low, at), max(high, at)
    # One point, or equal ones, get some room too.
    smallest = least if is_log else max(abs(low), abs(high), 1e-9) * least
    room = max((high - low) * 0.16, smallest)
    lower, upper = low - room, high + room
    if not is_log and low >= 0 > lower:
        lower = -0.04 * upper
    return (back(lower), back(upper)), at is not None and lower <= at <= upper


def _decades(low, high):
    """Ticks 1, 2, 5 of each power of ten between two numbers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [
        digit * 10.0**exponent
        for exponent in exponents
        for digit in (1, 2, 5)
        if low <= digit * 10.0**exponent <= high
    ]
    return ticks if len(ticks) <= 8 else ticks[:: math.ceil(len(ticks) / 8)]


def _increases_within(low, high):
    """Ticks of a logarithmic axis of 1 + increase that do not touch each other."""
    low, high = math.log(low), math.log(high)
    ticks = []
    # Zero first: the reference's own place.
    for increase in sorted(_INCREASES, key=abs):
        at = math.log1p(increase)
        if low <= at <= high and all(
            abs(at - math.log(tick)) > (high - low) * 0.055 for tick in ticks
        ):
            ticks.append(1 + increase)
    return sorted(ticks)


def _place_labels(figure, axes, points, numbered, crossed, y_budget):
    """Write a label beside every point so that none covers another, or return None."""
    from matplotlib import patheffects
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    pixels = figure.dpi / 72  # of a point
    to_display = axes.transData.transform
    frame = axes.get_window_extent(renderer)
    centres = [to_display((point["x"], point["y"])) for point in points]
    dots = [
        Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
        for point, (x, y) in zip(points, centres, strict=True)
        for reach in [(6 if point["is_choice"] else 3) * pixels]
    ]
    segments = [
        (to_display(begin), to_display(end), weight) for begin, end, weight in crossed
    ]

    taken = []
    if y_budget is not None:
        taken.append(_label_budget(axes, y_budget, dots, segments, renderer))

    def crowd(index):
        return sum(math.dist(centres[index], centre) for centre in centres)

    labels = {}
    # The innermost first: those at the edge have more places to go to.
    for index in sorted(range(len(points)), key=crowd):
        point = points[index]
        text = axes.text(
            *(0, 0),
            str(index + 1) if numbered else _name_of(point),
            fontsize=_SMALL,
            fontweight="bold" if point["is_choice"] else "normal",
            color=_VERMILION
            if point["is_choice"]
            else _GREY
            if point["is_outside"]
            else _INK,
            ha="center",
            va="center",
            multialignment="left",
            linespacing=1.05,
            zorder=8,
            transform=None,
            parse_math=False,
        )
        text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])
        size = text.get_window_extent(renderer)
        place = _best_place(
            *(centres[index], size.width + 3 * pixels, size.height + 2 * pixels),
            *(frame, taken, dots, segments, pixels),
            radius=math.sqrt(_area(point["size_mb"], points) / math.pi) * pixels,
            anywhere=numbered,
        )
        if place is None:
            return None
        x, y = place
        text.set_position((x, y))
        box = text.get_window_extent(renderer)
        taken.append(box.expanded(1 + 3 * pixels / box.width, 1 + pixels / box.height))
        _lead(axes, centres[index], box, pixels)
        labels[index] = (point["name"], text)
    return [labels[index] for index in range(len(points))]


def _label_budget(axes, y_budget, dots, segments, renderer):
    """Name the horizontal line of a budget where it covers least; return the box."""
    best = None
    for va in ("bottom", "top"):
        for x, ha in ((0.99, "right"), (0.01, "left"), (0.5, "center")):
            text = axes.text(
                *(x, y_budget, f"budget {format_percent(y_budget - 1)}"),
                transform=axes.get_yaxis_transform(),
                ha=ha,
                va=va,
                fontsize=_SMALL,
                color=_GREY,
                zorder=7,
            )
            box = text.get_window_extent(renderer)
            cost = sum(box.overlaps(dot) for dot in dots)
            cost += sum(_crosses(box, begin, end) for begin, end, _ in segments)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
    return best[2]


def _name_of(point):
    name = _wrap(_label(point["name"]))
    return f"{name} (reference)" if point["is_reference"] else name


def _best_place(
    centre, width, height, frame, taken, dots, segments, pixels, radius, anywhere
):
    """Where a label's centre goes: near its point, on nothing, or None."""
    from matplotlib.transforms import Bbox

    def box_at(x, y):
        return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)

    def is_free(box):
        return (
            frame.x0 <= box.x0
            and box.x1 <= frame.x1
            and frame.y0 <= box.y0
            and box.y1 <= frame.y1
            and not any(box.overlaps(other) for other in taken)
            and not any(box.overlaps(dot) for dot in dots)
        )

    best, best_cost = None, math.inf
    for gap in (4, 9, 16, 26, 40, 58):
        for step in range(16):
            angle = step * math.pi / 8
            across, up = math.cos(angle), math.sin(angle)
            away = min(radius, 9 * pixels) + gap * pixels
            x = centre[0] + across * (away + width / 2)
            y = centre[1] + up * (away + height / 2)
            box = box_at(x, y)
            if not is_free(box):
                continue
            near = box.padded(2 * pixels)
            crossings = sum(
                weight * _crosses(near, begin, end) for begin, end, weight in segments
            )
            # To the right reads best.
            cost = gap + crossings + 3 * (1 - across)
            if cost < best_cost:
                best, best_cost = (x, y), cost
    if best is None and anywhere:
        places = [
            (x, y)
            for x in _range(frame.x0 + width / 2, frame.x1 - width / 2, width / 3)
            for y in _range(frame.y0 + height / 2, frame.y1 - height / 2, height / 3)
            if is_free(box_at(x, y))
        ]
        best = min(places, key=lambda place: math.dist(place, centre), default=None)
    return best


def _range(first, last, step):
    count = max(1, math.ceil((last - first) / step))
    return [first + (last - first) * index / count for index in range(count + 1)]


def _crosses(box, begin, end):
    """Whether a horizontal or vertical segment goes through a box."""
    return (
        min(begin[0], end[0]) <= box.x1
        and max(begin[0], end[0]) >= box.x0
        and min(begin[1], end[1]) <= box.y1
        and max(begin[1], end[1]) >= box.y0
    )


def _lead(axes, centre, box, pixels):
    """Draw a thin line from a point to a label that is not right beside it."""
    from matplotlib.lines import Line2D

    nearest = (
        min(max(centre[0], box.x0), box.x1),
        min(max(centre[1], box.y0), box.y1),
    )
    if math.dist(nearest, centre) > 12 * pixels:
        line = Line2D(
            [centre[0], nearest[0]],
            [centre[1], nearest[1]],
            color=_GREY,
            lw=0.6,
            zorder=5,
            transform=None,
        )
        axes.add_artist(line)


# Rows of files


def _spread_row(name, spread):
    marks = [spread["median"], spread["p95"], spread["p99"]]
    return name, marks


def _panel_height(rows):
    return 0.62 + 0.37 * len(rows)


def _draw_spreads(axes, title, rows, budget):
    values = [value for _, marks in rows for value in marks]
    _row_axis(axes, title, "ms", values, budget)
    for index, (name, (median, p95, p99)) in enumerate(rows):
        axes.plot([median, p99], [index, index], color=_BLUE, lw=1, zorder=2)
        axes.plot([median, p95], [index, index], color=_BLUE, lw=4, alpha=0.4, zorder=2)
        axes.plot([median], [index], "o", color=_BLUE, ms=6, zorder=3)
        axes.plot([p95], [index], "|", color=_BLUE, ms=9, mew=2, zorder=3)
        axes.plot([p99], [index], "x", color=_BLUE, ms=5, mew=1.2, zorder=3)
        shown = " / ".join(format_number(value) for value in (median, p95, p99))
        _row_text(axes, index, name, shown)
    _row_head(axes, "● median / ❘ p95 / \N{MULTIPLICATION SIGN} p99, ms")
    _end_rows(axes, len(rows))


def _draw_bars(axes, title, rows, budget, colour):
    _row_axis(axes, title, "MB", [value for _, value in rows], budget, from_zero=True)
    for index, (name, value) in enumerate(rows):
        axes.barh(index, value, height=0.34, color=colour, alpha=0.85, zorder=2)
        _row_text(axes, index, name, f"{format_number(value)} MB")
    _end_rows(axes, len(rows))


def _draw_intervals(axes, title, rows, budget, unit, is_percent):
    scale = 100.0 if is_percent else 1.0
    ends = [
        interval[part] * scale
        for _, interval in rows
        for part in ("low", "value", "high")
    ]
    shown_budget = None if budget is None else budget * scale
    _row_axis(axes, title, unit, ends, shown_budget)
    if is_percent and axes.get_xscale() == "linear":
        axes.axvline(0, color=_INK, lw=0.8, zorder=1)
    for index, (name, interval) in enumerate(rows):
        low, value, high = (interval[part] * scale for part in ("low", "value", "high"))
        axes.plot([low, high], [index, index], color=_BLUE, lw=2, zorder=2)
        axes.plot([low, high], [index, index], "|", color=_BLUE, ms=8, mew=1.5)
        axes.plot([value], [index], "o", color=_BLUE, ms=6, zorder=3)
        sign, unit = ("+", " %") if is_percent else ("", "")
        value, low, high = format_interval(interval, scale, sign)
        _row_text(axes, index, name, f"{value}{unit} ({low} to {high}{unit})")
    _row_head(axes, "value (95 % interval)")
    _end_rows(axes, len(rows))


def format_interval(interval: dict, scale: float = 1.0, sign: str = "") -> tuple:
    """Return value, low and high, with as many digits as their width is worth.

    Args:
        interval: As `gpt_tf.evaluation.report` states it.
        scale: What they are multiplied by, 100 for percent.
        sign: `"+"` to write it always.

    Example:
        >>> format_interval({"value": 5.8312, "low": 5.7712, "high": 5.8912})
        ('5.83', '5.77', '5.89')
    """
    numbers = [interval[part] * scale for part in ("value", "low", "high")]
    width = abs(numbers[2] - numbers[1]) or abs(numbers[0]) / 10 or 1.0
    digits = min(max(1 - math.floor(math.log10(width)), 0), 9)
    texts = [f"{number:{sign},.{digits}f}" for number in numbers]
    return tuple(text.replace("-", "\N{MINUS SIGN}") for text in texts)


def _row_axis(axes, title, unit, values, budget, from_zero=False):
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.set_title(title, loc="left", fontsize=_TEXT + 1)
    positive = min(values) > 0
    is_log = positive and max(values) / min(values) > _LOG_RATIO and not from_zero
    low, high = min(values), max(values)
    far = budget is not None and budget > 4 * high
    if budget is not None and not far:
        low, high = min(low, budget), max(high, budget)
    if is_log and low > 0:
        axes.set_xscale("log")
        limits = (low / 1.25, high * 1.25)
        axes.xaxis.set_major_locator(FixedLocator(_decades(*limits)))
        unit = f"{unit} (log scale)".lstrip()
    else:
        room = (high - min(low, 0)) * 0.06 or 0.05 * abs(high) or 1.0
        limits = (min(0, low - room) if low < 0 else 0, max(high, 0) + room)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.set_xlim(limits)
    axes.set_xlabel(unit)
    if budget is not None:
        if far:
            axes.set_xlabel(
                f"{unit}; budget {format_number(budget)} is to the right".strip()
            )
        else:
            axes.axvline(budget, color=_VERMILION, lw=1.2, ls=(0, (5, 3)), zorder=1)
            axes.set_xlabel(
                f"{unit}; dashed: budget {format_number(budget)}".lstrip("; ")
            )


def _row_text(axes, index, name, shown):
    from matplotlib import patheffects

    for x, text, side in ((0, _label(name), "left"), (1, shown, "right")):
        axes.annotate(
            text,
            (x, index),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 6),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=_SMALL,
            color=_INK,
            parse_math=False,
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            zorder=5,
        )


def _row_head(axes, text):
    axes.set_title(text, loc="right", fontsize=_SMALL, color=_GREY)


def _end_rows(axes, count):
    axes.set_ylim(count - 0.6, -0.85)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.25)
    axes.spines["left"].set_visible(False)


def _draw_lines(axes, title, across, up, lines, styles):
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for name, measured in lines:
        colour, style, marker = styles[name]
        xs, ys = zip(*measured, strict=True)
        axes.plot(xs, ys, color=colour, ls=style, marker=marker, ms=4.5, lw=1.4)
    values = [value for _, measured in lines for _, value in measured]
    places = sorted({x for _, measured in lines for x, _ in measured})
    if places[0] > 0 and places[-1] / places[0] > _LOG_RATIO / 2:
        axes.set_xscale("log", base=2)
    shown = places if len(places) <= 8 else places[:: math.ceil(len(places) / 8)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    if min(values) > 0 and max(values) / min(values) > _LOG_RATIO:
        axes.set_yscale("log")
        limits = (min(values) / 1.3, max(values) * 1.3)
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(FixedLocator(_decades(*limits)))
        axes.yaxis.set_minor_locator(NullLocator())
        up = f"{up} (log scale)"
    else:
        axes.set_ylim(0, (max(values) or 1.0) * 1.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.set_title(title, loc="left", fontsize=_TEXT + 1)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.25)


@_in_house_style
def _draw_panels(panels, keyed=()):
    """Put panels `(height, draw, arguments)` below each other, a key at the end."""
    from matplotlib.lines import Line2D

    key_height = 0.2 * len(keyed) + 0.1 if keyed else 0
    heights = [height + 0.35 for height, _, _ in panels]
    figure = _new_figure(sum(heights) + key_height)
    grid = figure.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (_, draw, arguments), axes in zip(panels, grid[:, 0], strict=True):
        draw(axes, *arguments)
    if keyed:
        handles = [
            Line2D([], [], color=colour, ls=style, marker=marker, ms=4.5, lw=1.4)
            for _, (colour, style, marker) in keyed
        ]
        legend = figure.legend(
            handles,
            [str(index) for index in range(len(keyed))],
            loc="outside lower left",
            frameon=False,
            fontsize=_SMALL,
            handlelength=3,
        )
        _set_texts(legend, [_label(name) for name, _ in keyed])
    return figure


# What all of them share


def _new_figure(height):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    with warnings.catch_warnings(), files.atomic_file(Path(path)) as file:
        _allow_missing_glyphs()
        # Without the version of matplotlib the same numbers give the same bytes.
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})


def _allow_missing_glyphs():
    # A name may be in a script that the font lacks; it is drawn as boxes.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")


def _set_texts(legend, texts):
    for drawn, text in zip(legend.get_texts(), texts, strict=True):
        drawn.set_parse_math(False)
        drawn.set_text(text)


def _label(name):
    """A name as it is drawn: one line, not too long."""
    name = "".join(char if char.isprintable() else " " for char in str(name))
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def _wrap(name):
    """Break a long name in two lines, after the mark nearest to its middle."""
    if len(name) <= 20:
        return name
    breaks = [found.end() for found in re.finditer(r"[-_ .,/]", name[:-1])]
    at = min(breaks, key=lambda place: abs(place - len(name) / 2), default=None)
    if at is None or not len(name) / 4 < at < len(name) * 3 / 4:
        return name
    return f"{name[:at]}\n{name[at:]}"


def _middle(value):
    return value["median"] if isinstance(value, dict) else value


def format_number(value):
    """Three significant digits, without an exponent where it can be avoided."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    digits = 2 - math.floor(math.log10(abs(value)))
    if digits > 6:
        return f"{value:.1e}".replace("-", "\N{MINUS SIGN}")
    text = f"{value:.{max(digits, 0)}f}".rstrip("0").rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}")


def format_percent(value):
    """0.031 as +3.1 %."""
    percent = value * 100
    if abs(percent) < 5e-4:
        return "0 %"
    digits = 0 if abs(percent) >= 100 else 1 if abs(percent) >= 10 else 2
    text = f"{percent:+,.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}") + " %"
