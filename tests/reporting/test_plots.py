"""The plots: what is drawn where, labels that do not overlap, whole files."""

import itertools

import matplotlib
import numpy as np
import pytest

from gpt_tf.evaluation.report import new_report
from gpt_tf.reporting import plots
from tests.reporting.samples import (
    LONG_NAME,
    accuracy_of,
    entry_of,
    latency_of,
    report_of,
)


def labels_of(figure):
    """The labels of the Pareto plot, and their boxes."""
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    renderer = figure.canvas.get_renderer()
    return texts, [text.get_window_extent(renderer) for text in texts]


def words_of(figure):
    words = [text.get_text() for key in figure.legends for text in key.get_texts()]
    for axes in figure.axes:
        words += [text.get_text() for text in axes.texts]
    return words


def test_what_was_measured_decides_what_is_drawn():
    def drawn(report):
        return {name for name in plots.PLOTS if plots.figure_of(name, report)}

    latency, accuracy = latency_of(2.0, False), accuracy_of(5.0)
    assert drawn(new_report([])) == drawn(new_report([entry_of("one")])) == set()
    assert drawn(new_report([entry_of("one", latency=latency)])) == {"latency"}
    assert drawn(new_report([entry_of("one", accuracy=accuracy)])) == {"accuracy"}
    both = entry_of("one", accuracy=accuracy, latency=latency)
    assert drawn(new_report([both])) == set(plots.PLOTS)


@pytest.mark.parametrize(
    ("count", "name", "is_numbered"),
    [(9, "int8-{}", False), (11, "int8-{}", True), (3, LONG_NAME, True)],
)
def test_labels_do_not_overlap_and_many_or_long_ones_are_numbered(
    count, name, is_numbered
):
    report = report_of(count, 1, name)
    figure = plots.figure_of("pareto", report)
    texts, boxes = labels_of(figure)
    labels = [text.get_text() for text in texts]
    names = [entry["name"] for entry in report["entries"]]
    if is_numbered:
        assert labels == [str(number) for number in range(1, count + 1)]
        words = words_of(figure)
        assert all(f"{n}  {name}" in words for n, name in enumerate(names, start=1))
    else:
        assert labels == [f"{names[0]} (reference)", *names[1:]]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    frame = figure.axes[0].get_window_extent()
    for box in boxes:
        assert frame.x0 - 1 <= box.x0 < box.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= box.y0 < box.y1 <= frame.y1 + 1


def test_the_recommended_file_and_budgets_are_marked():
    report = report_of(3, name="file-{}")
    report["budgets"].update(max_latency_ms=4.0, max_perplexity_increase=0.05)
    report["recommendation"] = {
        "choice": "file-1",
        "budgets": report["budgets"],
        "ruled_out": [{"name": "file-2"}],
    }
    figure = plots.figure_of("pareto", report)
    bold = [t.get_text() for t in labels_of(figure)[0] if t.get_fontweight() == "bold"]
    assert bold == ["file-1"]
    words = " ".join(words_of(figure))
    assert "budget 4 ms" in words and "budget +5 %" in words and "recommended" in words
    # A far budget does not press the points into a corner.
    near = figure.axes[0].get_xlim()[1]
    report["budgets"]["max_latency_ms"] = 500.0
    figure = plots.figure_of("pareto", report)
    assert figure.axes[0].get_xlim()[1] <= near
    assert any("budget 500 ms" in word for word in words_of(figure))


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["$x^2$ {", "_hidden", "模型-int8", "a\nb\tc", "<b>"]
    report = new_report(
        [
            entry_of(name, 1 + place, accuracy_of(5.0 + place), latency_of(2.0 + place))
            for place, name in enumerate(names)
        ]
    )
    for name in plots.PLOTS:
        plots.save(plots.figure_of(name, report), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    figure = plots.figure_of("pareto", report)
    texts = [text.get_text() for text in labels_of(figure)[0]]
    assert texts == [*names[:3], "a b c", names[4]]
    svg = plots.svg_of(figure, "pareto", 'a "title" <b>')
    assert "&lt;b&gt;" in svg and "<b>" not in svg and "xmlns" not in svg


def test_neither_a_users_style_nor_the_plots_randomness_gets_through(tmp_path):
    report, paths = report_of(2, name="{}"), [tmp_path / "one", tmp_path / "other"]
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    plots.save(plots.figure_of("pareto", report), paths[0])
    assert np.array_equal(np.random.get_state()[1], state)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        plots.save(plots.figure_of("pareto", report), paths[1])
        assert matplotlib.rcParams["font.size"] == 30
    assert paths[0].read_bytes() == paths[1].read_bytes()
    report["entries"][1]["latency"]["inter_token_latency_ms"]["median"] *= 0.9
    plots.save(plots.figure_of("pareto", report), paths[1])
    assert paths[0].read_bytes() != paths[1].read_bytes()
