"""The plane of accuracy against latency: its axes, budgets, frontier and points."""

import itertools

from gpt_tf.reporting.pictures import canvas, scales
from gpt_tf.reporting.pictures.points import area_of, colour_of, corners_of
from gpt_tf.reporting.pictures.texts import format_number, format_percent

_LINE = {"color": canvas.GREY, "lw": 1.1, "ls": canvas.DASHED, "zorder": 1}
_SHADE = {"color": canvas.GREY, "alpha": 0.07, "lw": 0, "zorder": 0}


def new_plane(key_height):
    """Return a figure and its axes: the plane above, and room for the key below.

    Args:
        key_height: In inches.
    """
    plane, left, right, head, foot = 3.75, 0.82, 0.1, 0.5, 0.55
    height = head + plane + foot + key_height
    figure = canvas.new_figure(height)
    figure.set_layout_engine("none")
    axes = figure.add_axes(
        (
            left / canvas.WIDTH,
            (foot + key_height) / height,
            (canvas.WIDTH - left - right) / canvas.WIDTH,
            plane / height,
        )
    )
    axes.set_title("Accuracy against latency: lower left is better", loc="left", pad=16)
    return figure, axes


def scale_plane(axes, points, x_budget, y_budget, is_increase):
    """Set limits, scales and ticks; return whether the budgets lie within them."""
    from matplotlib.ticker import NullLocator

    x_drawn = _scale_across(axes, points, x_budget)
    y_drawn = _scale_up(axes, points, y_budget, is_increase)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    return x_drawn, y_drawn


def _scale_across(axes, points, budget):
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    reach = [value for point in points for value in (point["x"], point["p95"])]
    is_log = max(reach) / min(reach) > scales.LOG_RATIO
    limits, is_drawn = scales.limits(reach, budget, is_log, 0.05)
    axes.set_xscale("log" if is_log else "linear")
    axes.set_xlim(limits)
    axes.xaxis.set_major_locator(
        FixedLocator(scales.decades(*limits))
        if is_log
        else MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.set_xlabel("inter-token latency, ms (point: median, whisker: p95)")
    return is_drawn


def _scale_up(axes, points, budget, is_increase):
    from matplotlib.ticker import FixedLocator, FuncFormatter

    reach = [value for point in points for value in point["interval"]]
    is_log = min(reach) > 0 and max(reach) / min(reach) > 3
    least = 0.005 if is_increase else 0.05
    limits, is_drawn = scales.limits(reach, budget, is_log, least)
    axes.set_yscale("log" if is_log else "linear")
    axes.set_ylim(limits)
    if is_log:
        ticks = scales.increases if is_increase else scales.decades
        axes.yaxis.set_major_locator(FixedLocator(ticks(*limits)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(
            lambda value, _: (
                format_percent(value - 1) if is_increase else format_number(value)
            )
        )
    )
    axes.set_ylabel("perplexity above the reference's" if is_increase else "perplexity")
    return is_drawn


# Budgets


def draw_budgets(axes, x_budget, y_budget, x_drawn, y_drawn):
    """Draw the budgets' lines, and above the plane what is said of them.

    Returns:
        Segments that labels should avoid; see `draw_points`.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    segments, side = [], 1.0
    if x_budget is not None:
        place = _head_x_budget(axes, x_budget, x_drawn)
        side = 0.0 if place > 0.5 else 1.0
    if x_drawn:
        axes.axvline(x_budget, **_LINE)
        axes.axvspan(x_budget, right, **_SHADE)
        segments.append(((x_budget, bottom), (x_budget, top), 3))
    if y_drawn:
        axes.axhline(y_budget, **_LINE)
        axes.axhspan(y_budget, top, **_SHADE)
        segments.append(((left, y_budget), (right, y_budget), 3))
    elif y_budget is not None:
        arrow = "\N{UPWARDS ARROW}" if y_budget > top else "\N{DOWNWARDS ARROW}"
        _head(axes, side, f"{arrow} budget {format_percent(y_budget - 1)}")
    return segments


def _head_x_budget(axes, budget, is_drawn):
    """Name the budget of latency above the plane; return where, as a part of it."""
    text = f"budget {format_number(budget)} ms"
    if is_drawn:
        place = axes.transData.transform((budget, axes.get_ylim()[0]))
        place = axes.transAxes.inverted().transform(place)[0]
    elif budget > axes.get_xlim()[1]:
        place, text = 1.0, f"{text} \N{RIGHTWARDS ARROW}"
    else:
        place, text = 0.0, f"\N{LEFTWARDS ARROW} {text}"
    _head(axes, place, text)
    return place


def _head(axes, x, text):
    """Write just above the plane, within its width."""
    axes.annotate(
        text,
        (x, 1),
        xycoords="axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="left" if x < 0.12 else "right" if x > 0.88 else "center",
        fontsize=canvas.SMALL,
        color=canvas.GREY,
    )


# Points


def draw_points(axes, points):
    """Draw frontier, whiskers and points.

    Returns:
        Segments that labels should avoid: of each where it begins and ends, and how
        much it is to be avoided.
    """
    segments = _draw_frontier(axes, points)
    for point in points:
        segments += _draw_whiskers(axes, point)
        _draw_area(axes, point, area_of(point["size_mb"], points))
        axes.plot(
            [point["x"]],
            [point["y"]],
            marker="*" if point["is_choice"] else "o",
            ms=11 if point["is_choice"] else 4,
            color=colour_of(point),
            mec="white",
            mew=0.6,
            zorder=6,
        )
    return segments


def _draw_frontier(axes, points):
    segments = []
    for (x, y), (next_x, next_y) in itertools.pairwise(corners_of(points)):
        axes.plot(
            [x, next_x, next_x], [y, y, next_y], color=canvas.INK, lw=1.1, zorder=2
        )
        corner = (next_x, y)
        segments += [((x, y), corner, 8), (corner, (next_x, next_y), 8)]
    return segments


def _draw_whiskers(axes, point):
    """Draw latency up to p95, and accuracy with its interval."""
    segments = []
    x, y, colour = point["x"], point["y"], colour_of(point)
    low, high = point["interval"]
    whiskers = [([x, point["p95"]], [y, y]), ([x, x], [low, high])]
    for (xs, ys), width in zip(whiskers, (1.6, 0.8), strict=True):
        axes.plot(xs, ys, color=colour, lw=width, zorder=3, solid_capstyle="butt")
        segments.append(((xs[0], ys[0]), (xs[1], ys[1]), 8))
    axes.plot([point["p95"]], [y], marker="|", ms=7, mew=1.6, color=colour, zorder=3)
    return segments


def _draw_area(axes, point, area):
    """Draw the disc that is the file's size, and its rim."""
    colour = colour_of(point)
    place = {"x": [point["x"]], "y": [point["y"]], "s": area, "zorder": 4}
    alpha = 0.22 if point["is_outside"] else 0.28
    axes.scatter(**place, facecolor=colour, edgecolor=colour, alpha=alpha, lw=0)
    dashes = "--" if point["is_outside"] else "-"
    axes.scatter(**place, facecolor="none", edgecolor=colour, lw=1.0, ls=dashes)
