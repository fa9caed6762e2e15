"""Panels with a row for each file: spreads of latency, bars, and intervals."""

from gpt_tf.reporting.pictures import canvas, scales
from gpt_tf.reporting.pictures.texts import format_interval, format_number, shorten


def rows_height(rows):
    """Return the height of a panel of so many rows, in inches."""
    return 0.62 + 0.37 * len(rows)


def draw_spreads(axes, title, rows, budget):
    """Draw median, p95 and p99 of each file.

    Args:
        axes: Where.
        title: What was measured.
        rows: `(name, (median, p95, p99))`, in ms.
        budget: In ms, or None.
    """
    values = [value for _, marks in rows for value in marks]
    _scale(axes, title, "ms", values, budget)
    colour = canvas.BLUE
    for index, (name, (median, p95, p99)) in enumerate(rows):
        axes.plot([median, p99], [index, index], color=colour, lw=1, zorder=2)
        axes.plot(
            [median, p95], [index, index], color=colour, lw=4, alpha=0.4, zorder=2
        )
        axes.plot([median], [index], "o", color=colour, ms=6, zorder=3)
        axes.plot([p95], [index], "|", color=colour, ms=9, mew=2, zorder=3)
        axes.plot([p99], [index], "x", color=colour, ms=5, mew=1.2, zorder=3)
        shown = " / ".join(format_number(value) for value in (median, p95, p99))
        _write(axes, index, name, shown)
    _head(axes, "● median / ❘ p95 / \N{MULTIPLICATION SIGN} p99, ms")
    _end(axes, len(rows))


def draw_bars(axes, title, rows, budget, colour):
    """Draw a bar for each file.

    Args:
        axes: Where.
        title: What was measured.
        rows: `(name, value)`, in MB.
        budget: In MB, or None.
        colour: Of the bars.
    """
    _scale(axes, title, "MB", [value for _, value in rows], budget, from_zero=True)
    for index, (name, value) in enumerate(rows):
        axes.barh(index, value, height=0.34, color=colour, alpha=0.85, zorder=2)
        _write(axes, index, name, f"{format_number(value)} MB")
    _end(axes, len(rows))


def draw_intervals(axes, title, rows, budget, unit, is_percent):
    """Draw the value of each file and its 95 % interval.

    Args:
        axes: Where.
        title: What was measured.
        rows: `(name, interval)`, as `gpt_tf.evaluation.report` states it.
        budget: A number like theirs, or None.
        unit: Of what is drawn.
        is_percent: Whether the numbers are fractions, to be drawn in percent.
    """
    scale, sign, suffix = (100.0, "+", " %") if is_percent else (1.0, "", "")
    drawn = [
        (name, [interval[part] * scale for part in ("low", "value", "high")])
        for name, interval in rows
    ]
    ends = [value for _, values in drawn for value in values]
    _scale(axes, title, unit, ends, None if budget is None else budget * scale)
    if is_percent and axes.get_xscale() == "linear":
        axes.axvline(0, color=canvas.INK, lw=0.8, zorder=1)
    for index, (name, (low, value, high)) in enumerate(drawn):
        axes.plot([low, high], [index, index], color=canvas.BLUE, lw=2, zorder=2)
        axes.plot([low, high], [index, index], "|", color=canvas.BLUE, ms=8, mew=1.5)
        axes.plot([value], [index], "o", color=canvas.BLUE, ms=6, zorder=3)
        value, low, high = format_interval(rows[index][1], scale, sign)
        _write(axes, index, name, f"{value}{suffix} ({low} to {high}{suffix})")
    _head(axes, "value (95 % interval)")
    _end(axes, len(rows))


def _scale(axes, title, unit, values, budget, from_zero=False):
    """Set title, limits and ticks, and draw the budget where it is not far away."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.set_title(title, loc="left", fontsize=canvas.TEXT + 1)
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > scales.LOG_RATIO and not from_zero
    is_far = budget is not None and budget > 4 * high
    if budget is not None and not is_far:
        low, high = min(low, budget), max(high, budget)
    if is_log and low > 0:
        axes.set_xscale("log")
        limits = (low / 1.25, high * 1.25)
        axes.xaxis.set_major_locator(FixedLocator(scales.decades(*limits)))
        unit = f"{unit} (log scale)".lstrip()
    else:
        room = (high - min(low, 0)) * 0.06 or 0.05 * abs(high) or 1.0
        limits = (min(0, low - room) if low < 0 else 0, max(high, 0) + room)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.set_xlim(limits)
    axes.set_xlabel(_unit_and_budget(unit, budget, is_far))
    if budget is not None and not is_far:
        dashes = canvas.DASHED
        axes.axvline(budget, color=canvas.VERMILION, lw=1.2, ls=dashes, zorder=1)


def _unit_and_budget(unit, budget, is_far):
    if budget is None:
        return unit
    if is_far:
        return f"{unit}; budget {format_number(budget)} is to the right".strip()
    return f"{unit}; dashed: budget {format_number(budget)}".lstrip("; ")


def _write(axes, index, name, shown):
    """Write above a row its name at the left, and what was measured at the right."""
    for x, text, side in ((0, shorten(name), "left"), (1, shown, "right")):
        axes.annotate(
            text,
            (x, index),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 6),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=canvas.SMALL,
            color=canvas.INK,
            parse_math=False,
            path_effects=canvas.halo(2.5),
            zorder=5,
        )


def _head(axes, text):
    """Say above the right what the numbers are."""
    axes.set_title(text, loc="right", fontsize=canvas.SMALL, color=canvas.GREY)


def _end(axes, count):
    axes.set_ylim(count - 0.6, -0.85)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.25)
    axes.spines["left"].set_visible(False)
