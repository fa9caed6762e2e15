"""The labels of the plane: each beside its point, none on another or on a point."""

import math

from gpt_tf.reporting.pictures import canvas
from gpt_tf.reporting.pictures.points import area_of
from gpt_tf.reporting.pictures.texts import format_percent, shorten, wrap

_GAPS = (4, 9, 16, 26, 40, 58)  # from a point to its label, in points
_DIRECTIONS = 16


def place_labels(figure, axes, points, numbered, segments, y_budget):
    """Write a label beside every point so that none covers another.

    Args:
        figure: The figure, for its pixels.
        axes: The plane, drawn but for its labels.
        points: As `pareto_points` returns them.
        numbered: Whether labels are numbers, which may stand anywhere, or names.
        segments: What to avoid, as `plane.draw_points` returns it.
        y_budget: The horizontal line that gets a label too, or None.

    Returns:
        `(name, Text)` of every point, or None where there is no room.
    """
    ground = _Ground(figure, axes, points, segments)
    if y_budget is not None:
        ground.taken.append(_label_budget(axes, y_budget, ground))
    labels = {}
    for index in ground.innermost_first():
        point = points[index]
        text = _write(axes, point, str(index + 1) if numbered else _name_of(point))
        area = area_of(point["size_mb"], points)
        box = _place(text, ground, ground.centres[index], area, anywhere=numbered)
        if box is None:
            return None
        _lead(axes, ground, ground.centres[index], box)
        labels[index] = (point["name"], text)
    return [labels[index] for index in range(len(points))]


class _Ground:
    """What labels are placed upon, in pixels: where something is, and where nothing."""

    def __init__(self, figure, axes, points, segments):
        from matplotlib.transforms import Bbox

        self.renderer = figure.canvas.get_renderer()
        self.pixels = figure.dpi / 72  # of a point
        self.frame = axes.get_window_extent(self.renderer)
        to_display = axes.transData.transform
        self.centres = [to_display((point["x"], point["y"])) for point in points]
        self.dots = [
            Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
            for point, (x, y) in zip(points, self.centres, strict=True)
            for reach in [(6 if point["is_choice"] else 3) * self.pixels]
        ]
        self.segments = [
            (to_display(begin), to_display(end), weight)
            for begin, end, weight in segments
        ]
        self.taken = []

    def innermost_first(self):
        """Indices of points: those at the edge have more places to go to."""

        def crowd(index):
            return sum(math.dist(self.centres[index], other) for other in self.centres)

        return sorted(range(len(self.centres)), key=crowd)

    def is_free(self, box):
        frame = self.frame
        return (
            frame.x0 <= box.x0
            and box.x1 <= frame.x1
            and frame.y0 <= box.y0
            and box.y1 <= frame.y1
            and not any(box.overlaps(other) for other in self.taken)
            and not any(box.overlaps(dot) for dot in self.dots)
        )

    def crossed(self, box):
        """How much is to be avoided of what goes through a box."""
        near = box.padded(2 * self.pixels)
        return sum(
            weight * _crosses(near, begin, end) for begin, end, weight in self.segments
        )


def _crosses(box, begin, end):
    """Whether a horizontal or vertical segment goes through a box."""
    return (
        min(begin[0], end[0]) <= box.x1
        and max(begin[0], end[0]) >= box.x0
        and min(begin[1], end[1]) <= box.y1
        and max(begin[1], end[1]) >= box.y0
    )


def _label_budget(axes, y_budget, ground):
    """Name the horizontal line of a budget where it covers least; return the box."""
    best = None
    for va in ("bottom", "top"):
        for x, ha in ((0.99, "right"), (0.01, "left"), (0.5, "center")):
            text = axes.text(
                *(x, y_budget, f"budget {format_percent(y_budget - 1)}"),
                transform=axes.get_yaxis_transform(),
                ha=ha,
                va=va,
                fontsize=canvas.SMALL,
                color=canvas.GREY,
                zorder=7,
            )
            box = text.get_window_extent(ground.renderer)
            cost = sum(box.overlaps(dot) for dot in ground.dots)
            cost += sum(_crosses(box, begin, end) for begin, end, _ in ground.segments)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
    return best[2]


def _name_of(point):
    name = wrap(shorten(point["name"]))
    return f"{name} (reference)" if point["is_reference"] else name


def _write(axes, point, label):
    """Write a label that has no place yet."""
    colour = canvas.GREY if point["is_outside"] else canvas.INK
    return axes.text(
        *(0, 0, label),
        fontsize=canvas.SMALL,
        fontweight="bold" if point["is_choice"] else "normal",
        color=canvas.VERMILION if point["is_choice"] else colour,
        ha="center",
        va="center",
        multialignment="left",
        linespacing=1.05,
        zorder=8,
        transform=None,
        parse_math=False,
        path_effects=canvas.halo(2),
    )


def _place(text, ground, centre, area, anywhere):
    """Put a label near its point; return the box that it takes, None if none is free.

    Args:
        text: The label.
        ground: Where it is to be free; the box is noted there.
        centre: Of the point.
        area: Of the point, in square points.
        anywhere: Whether it may stand far away, where nothing near is free.
    """
    pixels = ground.pixels
    size = text.get_window_extent(ground.renderer)
    width, height = size.width + 3 * pixels, size.height + 2 * pixels
    radius = math.sqrt(area / math.pi) * pixels
    place = _best_place_around(centre, width, height, ground, radius)
    if place is None and anywhere:
        place = _nearest_place(centre, width, height, ground)
    if place is None:
        return None
    text.set_position(place)
    box = text.get_window_extent(ground.renderer)
    margins = 1 + 3 * pixels / box.width, 1 + pixels / box.height
    ground.taken.append(box.expanded(*margins))
    return box


def _box_at(x, y, width, height):
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _best_place_around(centre, width, height, ground, radius):
    """Where a label's centre goes: near its point, on nothing, or None."""
    best, best_cost = None, math.inf
    for gap in _GAPS:
        for step in range(_DIRECTIONS):
            angle = step * 2 * math.pi / _DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            away = min(radius, 9 * ground.pixels) + gap * ground.pixels
            x = centre[0] + across * (away + width / 2)
            y = centre[1] + up * (away + height / 2)
            box = _box_at(x, y, width, height)
            if not ground.is_free(box):
                continue
            # To the right reads best.
            cost = gap + ground.crossed(box) + 3 * (1 - across)
            if cost < best_cost:
                best, best_cost = (x, y), cost
    return best


def _nearest_place(centre, width, height, ground):
    """The free place that is nearest to a point, or None."""
    frame = ground.frame
    places = [
        (x, y)
        for x in _steps(frame.x0 + width / 2, frame.x1 - width / 2, width / 3)
        for y in _steps(frame.y0 + height / 2, frame.y1 - height / 2, height / 3)
        if ground.is_free(_box_at(x, y, width, height))
    ]
    return min(places, key=lambda place: math.dist(place, centre), default=None)


def _steps(first, last, step):
    count = max(1, math.ceil((last - first) / step))
    return [first + (last - first) * index / count for index in range(count + 1)]


def _lead(axes, ground, centre, box):
    """Draw a thin line from a point to a label that is not right beside it."""
    from matplotlib.lines import Line2D

    nearest = (
        min(max(centre[0], box.x0), box.x1),
        min(max(centre[1], box.y0), box.y1),
    )
    if math.dist(nearest, centre) > 12 * ground.pixels:
        line = Line2D(
            [centre[0], nearest[0]],
            [centre[1], nearest[1]],
            color=canvas.GREY,
            lw=0.6,
            zorder=5,
            transform=None,
        )
        axes.add_artist(line)
