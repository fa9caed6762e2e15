"""The pictures of a report: what was measured, drawn for phones and for paper.

The rooms, each of which imports only from those below it:

| room | what is in it |
|---|---|
| `pareto` | accuracy against latency, put together from its parts |
| `panels` | latency, sizes and accuracy: panels below each other |
| `labels` | the names beside the points, none on another |
| `key` | what the marks mean, below the plane |
| `plane` | the plane itself: axes, budgets, frontier, points |
| `rows`, `curves` | the two kinds of panels |
| `points` | the files as points, and which are on the frontier |
| `verdict` | what budgets and recommendation say of the files |
| `scales` | limits and ticks of axes |
| `texts` | numbers, intervals and names as they are written |
| `canvas` | width, colours and style, and how a figure is saved |

matplotlib is imported where something is drawn: numbers are written without it.
"""

from gpt_tf.reporting.pictures.panels import draw_accuracy, draw_latency, draw_sizes
from gpt_tf.reporting.pictures.pareto import draw_pareto
from gpt_tf.reporting.pictures.points import frontier_of, pareto_points
from gpt_tf.reporting.pictures.texts import (
    format_interval,
    format_number,
    format_percent,
)
from gpt_tf.reporting.pictures.verdict import (
    budgets_of,
    candidates_by_name,
    outside_of,
)

__all__ = [
    "budgets_of",
    "candidates_by_name",
    "draw_accuracy",
    "draw_latency",
    "draw_pareto",
    "draw_sizes",
    "format_interval",
    "format_number",
    "format_percent",
    "frontier_of",
    "outside_of",
    "pareto_points",
]
