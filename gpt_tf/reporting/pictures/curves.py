"""Panels with a curve for each file: how speed changes with context and the like."""

from gpt_tf.reporting.pictures import canvas, scales
from gpt_tf.reporting.pictures.texts import format_number

CURVES_HEIGHT = 2.3  # inches
_STYLES = ("-", "--", ":")
_MARKERS = "osD^vPX"


def styles_of(names):
    """Return colour, line style and marker of each name, told apart by all three."""
    return {
        name: {
            "color": canvas.PALETTE[index % len(canvas.PALETTE)],
            "ls": _STYLES[index // len(canvas.PALETTE) % len(_STYLES)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "ms": 4.5,
            "lw": 1.4,
        }
        for index, name in enumerate(names)
    }


def draw_curves(axes, title, across, up, curves, styles):
    """Draw a curve for each file.

    Args:
        axes: Where.
        title: What was measured.
        across: What it was measured by.
        up: Its unit.
        curves: `(name, [(x, y)])`, sorted by x.
        styles: As `styles_of` returns them.
    """
    for name, measured in curves:
        xs, ys = zip(*measured, strict=True)
        axes.plot(xs, ys, **styles[name])
    _scale_across(axes, sorted({x for _, measured in curves for x, _ in measured}))
    is_log = _scale_up(axes, [y for _, measured in curves for _, y in measured])
    for axis in (axes.xaxis, axes.yaxis):
        _write_numbers(axis)
    axes.set_title(title, loc="left", fontsize=canvas.TEXT + 1)
    axes.set_xlabel(across)
    axes.set_ylabel(f"{up} (log scale)" if is_log else up)
    axes.grid(alpha=0.25)


def _scale_across(axes, places):
    """Set ticks where something was measured."""
    from matplotlib.ticker import FixedLocator, NullLocator

    if places[0] > 0 and places[-1] / places[0] > scales.LOG_RATIO / 2:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(scales.thinned(places)))
    axes.xaxis.set_minor_locator(NullLocator())


def _scale_up(axes, values):
    """Set limits and ticks; return whether the axis is logarithmic."""
    from matplotlib.ticker import FixedLocator, NullLocator

    lowest, highest = min(values), max(values)
    if not (lowest > 0 and highest / lowest > scales.LOG_RATIO):
        axes.set_ylim(0, (highest or 1.0) * 1.12)
        return False
    axes.set_yscale("log")
    limits = (lowest / 1.3, highest * 1.3)
    axes.set_ylim(limits)
    axes.yaxis.set_major_locator(FixedLocator(scales.decades(*limits)))
    axes.yaxis.set_minor_locator(NullLocator())
    return True


def _write_numbers(axis):
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
