"""What every picture is drawn on: its width, colours and style, and how it is saved.

Each is 5 inches wide and grows downwards, so that its smallest text is legible where a
page is 390 pixels wide. The colours are those of Okabe and Ito, told apart by people
who see few colours; nothing is said by colour alone.

Reference: Okabe and Ito, Color Universal Design, 2008.
"""

import functools
import warnings
from pathlib import Path

from gpt_tf import artifacts

# Okabe and Ito's, but for yellow, which is too light for a line on white.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
)
BLUE, VERMILION, GREEN = PALETTE[0], PALETTE[1], PALETTE[2]
INK, GREY, PALE = "#1f2933", "#5c6773", "#b4bdc8"
# As a line style: that of budgets.
DASHED = (0, (5, 3))

WIDTH = 5.0  # inches
TEXT, SMALL = 9, 8  # points
_DPI = 180
_STYLE = {
    "font.size": TEXT,
    "axes.titlesize": TEXT + 1,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
}


def in_house_style(draw):
    """Let a function draw with matplotlib's defaults and a few of ours, not a user's.

    Args:
        draw: A function that makes a figure.

    Returns:
        The same with the house style.
    """

    @functools.wraps(draw)
    def styled(*arguments, **options):
        from matplotlib import style

        with style.context(["default", _STYLE]), warnings.catch_warnings():
            _allow_missing_glyphs()
            return draw(*arguments, **options)

    return styled


def new_figure(height):
    """Return an empty figure as wide as all others and so many inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    with warnings.catch_warnings(), artifacts.atomic_file(Path(path)) as file:
        _allow_missing_glyphs()
        # Without the version of matplotlib the same numbers give the same bytes.
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})


def halo(width):
    """Return a text's white border, so that it is legible upon lines.

    Args:
        width: In points.
    """
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=width, foreground="white")]


def _allow_missing_glyphs():
    # A name may be in a script that the font lacks; it is drawn as boxes.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
