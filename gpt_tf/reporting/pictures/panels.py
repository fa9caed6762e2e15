"""The pictures that are panels below each other: latency, sizes, and accuracy.

A panel is a tuple `(height in inches, function that draws, its arguments)`.
"""

import os

from gpt_tf.reporting.pictures import canvas
from gpt_tf.reporting.pictures.curves import CURVES_HEIGHT, draw_curves, styles_of
from gpt_tf.reporting.pictures.rows import (
    draw_bars,
    draw_intervals,
    draw_spreads,
    rows_height,
)
from gpt_tf.reporting.pictures.texts import shorten
from gpt_tf.reporting.pictures.verdict import budgets_of

# Part of an entry's latency, its title, and the budget that is about it.
_SPREADS = (
    ("inter_token_latency_ms", "Between two tokens", "max_latency_ms"),
    ("time_to_first_token_ms", "Until the first token", None),
)
# Part of an entry's latency, by what and what was measured there, title and axes.
_CURVES = (
    (
        *("by_context", "context", "inter_token_latency_ms"),
        *("Between two tokens, by context", "tokens in the context", "ms"),
    ),
    (
        *("by_context", "context", "time_to_first_token_ms"),
        *("Until the first token, by context", "tokens in the context", "ms"),
    ),
    (
        *("by_threads", "threads", "inter_token_latency_ms"),
        *("Between two tokens, by threads", "threads", "ms"),
    ),
    (
        *("throughput", "requests", "tokens_per_s"),
        *("Throughput of all together", "concurrent requests", "tokens/s"),
    ),
)
_DIVERGENCE = "Divergence from the reference"


def draw_latency(report: dict, path: str | os.PathLike) -> bool:
    """Draw the time to the first token and between tokens.

    By file with median, p95 and p99; and by context length, threads and concurrent
    requests where these were measured.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where no file has a latency.

    Example:
        >>> draw_latency(read_report("runs/optimized"), "latency.png")
    """
    entries = [entry for entry in report["entries"] if entry["latency"]]
    styles = styles_of([entry["name"] for entry in entries])
    panels = _spread_panels(entries, budgets_of(report))
    shown = {}
    for part, by, quantity, *titles in _CURVES:
        curves = _curves_of(entries, part, by, quantity)
        if curves:
            shown.update((name, styles[name]) for name, _ in curves)
            panels.append((CURVES_HEIGHT, draw_curves, (*titles, curves, styles)))
    return _draw_panels(panels, path, keyed=shown)


def _spread_panels(entries, budgets):
    panels = []
    for part, title, budget in _SPREADS:
        rows = [
            (entry["name"], [spread[mark] for mark in ("median", "p95", "p99")])
            for entry in entries
            if (spread := entry["latency"].get(part))
        ]
        if rows:
            drawn = (title, rows, budgets.get(budget))
            panels.append((rows_height(rows), draw_spreads, drawn))
    return panels


def _curves_of(entries, part, by, quantity):
    """Of each file that has it the name and `(x, y)` by x."""
    curves = []
    for entry in entries:
        measured = sorted(
            (row[by], _middle(row[quantity]))
            for row in entry["latency"].get(part) or []
            if row.get(quantity) is not None
        )
        if measured:
            curves.append((entry["name"], measured))
    return curves


def _middle(value):
    return value["median"] if isinstance(value, dict) else value


def draw_sizes(report: dict, path: str | os.PathLike) -> bool:
    """Draw the size of every file and the memory of a process that runs it.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where there is neither.

    Example:
        >>> draw_sizes(read_report("runs/optimized"), "sizes.png")
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
        (rows_height(rows), draw_bars, (title, rows, limit, colour))
        for title, rows, limit, colour in (
            ("Size of the file", sizes, budget, canvas.BLUE),
            ("Peak memory of a process that runs it", memories, None, canvas.GREEN),
        )
        if rows
    ]
    return _draw_panels(panels, path)


def draw_accuracy(report: dict, path: str | os.PathLike) -> bool:
    """Draw perplexity and divergence from the reference with 95 % intervals.

    Args:
        report: As `gpt_tf.evaluation.report` states it.
        path: PNG to write.

    Returns:
        Whether it was written; False where no file has an accuracy.

    Example:
        >>> draw_accuracy(read_report("runs/optimized"), "accuracy.png")
    """
    budget = budgets_of(report).get("max_perplexity_increase")
    increases, perplexities, divergences = (
        _intervals_of(report, part)
        for part in ("perplexity_increase", "perplexity", "divergence_nats")
    )
    if increases:
        perplexities = []  # the same points on another scale
    panels = [
        (rows_height(rows), draw_intervals, (title, rows, *drawn))
        for title, rows, *drawn in (
            ("Perplexity above the reference's", increases, budget, "%", True),
            ("Perplexity", perplexities, None, "", False),
            (_DIVERGENCE, divergences, None, "nats a token", False),
        )
        if rows
    ]
    return _draw_panels(panels, path)


def _intervals_of(report, part):
    """Of each file that has it the name and the interval."""
    return [
        (entry["name"], entry["accuracy"][part])
        for entry in report["entries"]
        if (entry["accuracy"] or {}).get(part)
        # Its distance from itself says nothing.
        and (part == "perplexity" or entry["name"] != report["reference"])
    ]


def _draw_panels(panels, path, keyed=None):
    """Draw panels below each other, a key at the end; return whether there are any.

    Args:
        panels: Tuples, as this file's docstring says.
        path: PNG to write.
        keyed: Styles of curves by name, for the key.
    """
    if not panels:
        return False
    canvas.save(_figure_of(panels, keyed or {}), path)
    return True


@canvas.in_house_style
def _figure_of(panels, keyed):
    key_height = 0.2 * len(keyed) + 0.1 if keyed else 0
    heights = [height + 0.35 for height, _, _ in panels]
    figure = canvas.new_figure(sum(heights) + key_height)
    grid = figure.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (_, draw, arguments), axes in zip(panels, grid[:, 0], strict=True):
        draw(axes, *arguments)
    if keyed:
        _draw_key(figure, keyed)
    return figure


def _draw_key(figure, keyed):
    from matplotlib.lines import Line2D

    legend = figure.legend(
        [Line2D([], [], **style) for style in keyed.values()],
        [str(index) for index in range(len(keyed))],
        loc="outside lower left",
        frameon=False,
        fontsize=canvas.SMALL,
        handlelength=3,
    )
    # A legend leaves out what begins with `_`, and reads `$` as mathematics: numbers
    # stand in for the names until it is made.
    for drawn, name in zip(legend.get_texts(), keyed, strict=True):
        drawn.set_parse_math(False)
        drawn.set_text(shorten(name))
