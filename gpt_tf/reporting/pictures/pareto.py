"""Accuracy against latency, size as area: the picture that a choice is made by."""

import os

from gpt_tf.reporting.pictures import canvas
from gpt_tf.reporting.pictures.key import draw_key, key_height, marks_of
from gpt_tf.reporting.pictures.labels import place_labels
from gpt_tf.reporting.pictures.plane import (
    draw_budgets,
    draw_points,
    new_plane,
    scale_plane,
)
from gpt_tf.reporting.pictures.points import pareto_points
from gpt_tf.reporting.pictures.verdict import budgets_of

_MOST_NAMES = 10  # more points than this are numbered


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
    drawn = pareto_figure(report)
    if drawn is None:
        return False
    canvas.save(drawn[0], path)
    return True


@canvas.in_house_style
def pareto_figure(report):
    """Return the figure and its labels `[(name, Text)]`, or None without points."""
    points, is_increase = pareto_points(report)
    if not points:
        return None
    budgets = budgets_of(report)
    drawn = None
    if len(points) <= _MOST_NAMES:
        drawn = _figure_of(points, is_increase, budgets, numbered=False)
    # Where the names find no room there is some for numbers.
    return drawn or _figure_of(points, is_increase, budgets, numbered=True)


def _figure_of(points, is_increase, budgets, numbered):
    """The figure and its labels, or None where a label finds no room."""
    marks = marks_of(points, budgets)
    figure, axes = new_plane(key_height(marks, points, numbered))
    x_budget = budgets.get("max_latency_ms")
    y_budget = budgets.get("max_perplexity_increase")
    y_budget = 1 + y_budget if is_increase and y_budget is not None else None
    x_drawn, y_drawn = scale_plane(axes, points, x_budget, y_budget, is_increase)
    segments = draw_budgets(axes, x_budget, y_budget, x_drawn, y_drawn)
    segments += draw_points(axes, points)
    draw_key(figure, marks, points, numbered)
    labels = place_labels(
        *(figure, axes, points, numbered, segments, y_budget if y_drawn else None)
    )
    return None if labels is None else (figure, labels)
