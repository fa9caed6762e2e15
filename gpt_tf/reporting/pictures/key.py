"""The key below the plane: what the marks mean, sizes as area, names of numbers."""

import math

from gpt_tf.reporting.pictures import canvas
from gpt_tf.reporting.pictures.points import area_of, corners_of
from gpt_tf.reporting.pictures.texts import format_number, shorten

_MARKS_ROW, _SIZES_ROW, _NAME_ROW = 15.0, 38.0, 12.0  # points
_GAP = 4  # points


def marks_of(points, budgets):
    """Return what the marks mean: `(handle, text)`."""
    from matplotlib.lines import Line2D

    def mark(**style):
        return Line2D([], [], ls="none", **style)

    marks = []
    if any(point["is_choice"] for point in points):
        star = mark(marker="*", ms=11, color=canvas.VERMILION, mec="w")
        marks.append((star, "recommended"))
    if any(not point["is_choice"] and not point["is_outside"] for point in points):
        text = "within the budgets" if budgets else "measured file"
        marks.append((mark(marker="o", ms=5, color=canvas.BLUE), text))
    if any(point["is_outside"] for point in points):
        dot = mark(marker="o", ms=5, color=canvas.PALE)
        marks.append((dot, "ruled out (dashed)"))
    if len(corners_of(points)) > 1:
        line = Line2D([], [], color=canvas.INK, lw=1.1)
        marks.append((line, "frontier: none better in both"))
    if any(low < high for low, high in (point["interval"] for point in points)):
        line = mark(marker="|", ms=10, color=canvas.BLUE, mew=0.8)
        marks.append((line, "upright: 95 % interval"))
    return marks


def key_height(marks, points, numbered):
    """Return the height of the key in inches.

    Args:
        marks: As `marks_of` returns them.
        points: As `pareto_points` returns them.
        numbered: Whether the points are numbered, and named in the key.
    """
    sizes = _SIZES_ROW if any(point["size_mb"] for point in points) else 0
    names = len(points) * _NAME_ROW + _GAP if numbered else 0
    return (_marks_height(marks) + sizes + names + _GAP) / 72


def _marks_height(marks):
    return math.ceil(len(marks) / 2) * _MARKS_ROW + _GAP


def draw_key(figure, marks, points, numbered):
    """Draw the key into the foot of a figure; see `key_height` for the arguments."""
    height = key_height(marks, points, numbered) * 72
    strip = figure.add_axes((0, 0, 1, height / 72 / figure.get_figheight()))
    strip.set_xlim(0, canvas.WIDTH * 72)
    strip.set_ylim(height, 0)
    strip.axis("off")
    _draw_marks(strip, marks)
    y = _draw_sizes(strip, points, _marks_height(marks))
    if numbered:
        _draw_names(strip, points, y + _GAP)


def _write(strip, x, y, text):
    strip.text(x, y, text, va="center", fontsize=canvas.SMALL, parse_math=False)


def _draw_marks(strip, marks):
    """Draw what the marks mean in two columns."""
    y = _MARKS_ROW / 2
    for index, (handle, text) in enumerate(marks):
        x = 14 + index % 2 * canvas.WIDTH * 72 * 0.46
        is_line = handle.get_marker() in ("None", None, "")
        handle.set_data([x, x + 18] if is_line else [x + 9], [y, y] if is_line else [y])
        strip.add_line(handle)
        _write(strip, x + 26, y, text)
        y += _MARKS_ROW * (index % 2)


def _draw_sizes(strip, points, y):
    """Draw the smallest, the middle and the largest size; return what is below."""
    sizes = sorted({point["size_mb"] for point in points if point["size_mb"]})
    if not sizes:
        return y
    y += _SIZES_ROW / 2
    _write(strip, 14, y, "area: size")
    x = 74
    for size in sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}):
        area = area_of(size, points)
        radius = math.sqrt(area / math.pi)
        strip.scatter(
            [x + radius], [y], s=area, facecolor="#e8ecf0", edgecolor=canvas.GREY, lw=1
        )
        _write(strip, x + 2 * radius + 5, y, f"{format_number(size)} MB")
        x += 2 * radius + 62
    return y + _SIZES_ROW / 2


def _draw_names(strip, points, y):
    for index, point in enumerate(points):
        middle = y + (index + 0.5) * _NAME_ROW
        number = str(index + 1)
        strip.text(24, middle, number, va="center", ha="right", fontsize=canvas.SMALL)
        _write(strip, 30, middle, f"{shorten(point['name'])}{_what_of(point)}")


def _what_of(point):
    words = []
    if point["is_choice"]:
        words.append("recommended")
    if point["is_reference"]:
        words.append("reference")
    return f" ({', '.join(words)})" if words else ""
