import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from gpt_tf import artifacts
from gpt_tf.evaluation.report import new_entry, new_report
from gpt_tf.reporting import pictures
from gpt_tf.reporting.pictures import canvas, plane
from gpt_tf.reporting.pictures.pareto import pareto_figure
from gpt_tf.reporting.pictures.points import area_of
from gpt_tf.reporting.pictures.scales import limits

DRAWS = {
    "pareto": pictures.draw_pareto,
    "latency": pictures.draw_latency,
    "sizes": pictures.draw_sizes,
    "accuracy": pictures.draw_accuracy,
}
LONG_NAME = "student-of-four-layers-distilled-int8-{:02d}"  # 40 characters


def spread(median):
    """Measurements around a median."""
    return {
        "median": median,
        "p95": 1.2 * median,
        "p99": 1.3 * median,
        "worst": 2.5 * median,
        "q1": 0.95 * median,
        "q3": 1.05 * median,
        "count": 640,
    }


def interval(value, width=0.01):
    return {"value": value, "low": value - width, "high": value + width}


def latency_of(median, with_details=True):
    """The latency of a file whose tokens come every so many milliseconds."""
    latency = {
        "engine": "gpt_tf",
        "threads": 2,
        "prompt_tokens": 64,
        "new_tokens": 32,
        "repetitions": 20,
        "time_to_first_token_ms": spread(7 * median),
        "inter_token_latency_ms": spread(median),
        "response_time_ms": spread(39 * median),
        "tokens_per_s": 1000 / median,
        "load_ms": spread(31.7),
        "cold_start_ms": spread(417.0),
        "peak_memory_bytes": 81_300_000,
        "bandwidth_share": 0.437,
        "energy_j_per_token": None,
        "by_context": [],
        "by_threads": [],
        "throughput": [],
    }
    if with_details:
        latency["by_context"] = [
            {
                "context": context,
                "time_to_first_token_ms": spread(median * context / 8),
                "inter_token_latency_ms": spread(median * (1 + context / 999)),
            }
            for context in (16, 64, 112)
        ]
        latency["by_threads"] = [
            {
                "threads": threads,
                "inter_token_latency_ms": spread(median * 1.9 / threads),
            }
            for threads in (1, 2)
        ]
        latency["throughput"] = [
            {"requests": requests, "tokens_per_s": 1000 / median * requests**0.3}
            for requests in (1, 4)
        ]
    return latency


def accuracy_of(perplexity, reference=None):
    """The accuracy of a file; without a reference's perplexity, of the reference."""
    accuracy = {
        "tokens": 20_000,
        "bytes": 61_234,
        "blocks": 97,
        "perplexity": interval(perplexity, 0.083),
        "bits_per_byte": interval(1.2345, 0.012),
        "token_accuracy": interval(0.4567, 0.005),
        "perplexity_increase": None,
        "divergence_nats": None,
        "top1_agreement": None,
        "parsed": None,
    }
    if reference is not None:
        increase = perplexity / reference - 1
        accuracy["perplexity_increase"] = interval(increase, 0.0041)
        accuracy["divergence_nats"] = interval(0.0321 + increase / 9, 0.0013)
        accuracy["top1_agreement"] = interval(0.9123, 0.0071)
    return accuracy


def entry_of(name, size_mb=1.5, accuracy=None, latency=None, **parts):
    described = {
        "name": name,
        "path": f"files/{name}.litertlm",
        "kind": "litertlm",
        "mode": "dynamic_int8",
        "parameters": 1_234_567,
        "size_bytes": round(size_mb * 1e6),
        "sha256": "0" * 64,
        "context_length": 128,
        "config": {"vocab_size": 512, "num_layers": 2, "tie_embeddings": True},
    }
    return new_entry(described, accuracy=accuracy, latency=latency, **parts)


def report_of(count, seed=0, name=LONG_NAME, **parts):
    """A report of so many files, the first of which is the reference."""
    random = np.random.default_rng(seed)
    entries = []
    for index in range(count):
        perplexity = 5.0 * (1 + float(random.random()) ** 3) if index else 5.0
        entries.append(
            entry_of(
                name.format(index),
                float(10 ** random.uniform(-0.3, 1.2)),
                accuracy_of(perplexity, 5.0 if index else None),
                latency_of(float(10 ** random.uniform(0, 0.8))),
            )
        )
    return new_report(entries, **{"reference": name.format(0), **parts})


def labels_of(report):
    """The figure of the Pareto picture, and the boxes of its labels by name."""
    figure, labels = pareto_figure(report)
    renderer = figure.canvas.get_renderer()
    return figure, {name: text.get_window_extent(renderer) for name, text in labels}


def png_size(path):
    """Width and height that a PNG states."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("name", DRAWS)
def test_a_picture_is_a_png_as_wide_as_all_others(name, tmp_path):
    path = tmp_path / "folder" / "picture.png"
    assert DRAWS[name](report_of(3), path)
    width, height = png_size(path)
    assert width == 900
    assert 400 < height < 5000
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", DRAWS)
def test_where_there_is_nothing_to_draw_nothing_is_written(name, tmp_path):
    entry = entry_of("bare")
    entry["size_bytes"] = None
    assert not DRAWS[name](new_report([entry]), tmp_path / "picture.png")
    assert not DRAWS[name](new_report([]), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_what_was_measured_decides_what_is_drawn(tmp_path):
    def drawn(**parts):
        report = new_report([entry_of("one", **parts)])
        return {
            name for name, draw in DRAWS.items() if draw(report, tmp_path / "p.png")
        }

    assert drawn() == {"sizes"}
    assert drawn(latency=latency_of(2.0, False)) == {"sizes", "latency"}
    assert drawn(accuracy=accuracy_of(5.0)) == {"sizes", "accuracy"}
    assert drawn(accuracy=accuracy_of(5.0), latency=latency_of(2.0)) == set(DRAWS)


@pytest.mark.parametrize(
    ("count", "name"), [(1, LONG_NAME), (6, LONG_NAME), (9, "int8-{}"), (20, LONG_NAME)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_neither_overlap_nor_leave_the_plane(count, name, seed):
    report = report_of(count, seed, name)
    figure, boxes = labels_of(report)
    assert list(boxes) == [entry["name"] for entry in report["entries"]]
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    frame = figure.axes[0].get_window_extent(figure.canvas.get_renderer())
    for box in boxes.values():
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert box.width > 0


def test_labels_of_equal_files_do_not_overlap_either():
    accuracy, latency = accuracy_of(5.0), latency_of(2.0)
    for count in (3, 20):
        entries = [entry_of(f"same-{n}", 2, accuracy, latency) for n in range(count)]
        _, boxes = labels_of(new_report(entries))
        assert len(boxes) == count
        for one, other in itertools.combinations(boxes.values(), 2):
            assert not one.overlaps(other)


def test_many_files_are_numbered_and_named_below():
    report = report_of(20)
    figure, labels = pareto_figure(report)
    assert [text.get_text() for _, text in labels] == [str(n) for n in range(1, 21)]
    key = [text.get_text() for text in figure.axes[1].texts]
    for entry in report["entries"]:
        assert any(text.startswith(entry["name"]) for text in key)


def test_few_files_are_named_where_they_stand():
    _, labels = pareto_figure(report_of(5, name="int8-{}"))
    texts = [text.get_text() for _, text in labels]
    assert texts == ["int8-0 (reference)", "int8-1", "int8-2", "int8-3", "int8-4"]


def test_a_point_stands_at_its_median_and_increase_and_its_whisker_at_p95():
    report = report_of(4)
    points, is_increase = pictures.pareto_points(report)
    assert is_increase
    for point, entry in zip(points, report["entries"], strict=True):
        spread = entry["latency"]["inter_token_latency_ms"]
        increase = entry["accuracy"]["perplexity_increase"]
        assert (point["x"], point["p95"]) == (spread["median"], spread["p95"])
        assert point["y"] == (1 + increase["value"] if increase else 1)


def test_without_a_reference_perplexity_itself_is_drawn():
    report = report_of(3, reference=None)
    points, is_increase = pictures.pareto_points(report)
    assert not is_increase
    assert points[0]["y"] == report["entries"][0]["accuracy"]["perplexity"]["value"]


def test_the_area_of_a_point_is_proportional_to_the_files_size():
    points = [{"size_mb": size} for size in (2.0, 8.0)]
    areas = [area_of(point["size_mb"], points) for point in points]
    assert areas[1] == pytest.approx(4 * areas[0])


def test_the_frontier_is_what_none_beats():
    def frontier(places, outside=()):
        points = [{"x": x, "y": y, "is_outside": (x, y) in outside} for x, y in places]
        return [(point["x"], point["y"]) for point in pictures.frontier_of(points)]

    places = [(1, 5), (2, 5), (2, 3), (3, 4), (4, 1), (4, 2)]
    assert frontier(places) == [(1, 5), (2, 3), (4, 1)]
    # What breaks a budget beats nobody, unless nothing keeps them.
    assert frontier(places, [(2, 3), (4, 1)]) == [(1, 5), (3, 4), (4, 2)]
    assert frontier(places, places) == frontier(places)


@settings(max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), max_size=9))
def test_a_point_is_on_the_frontier_unless_one_beats_it_equal_ones_together(places):
    points = [
        {"x": x, "y": y, "name": name, "is_outside": False}
        for name, (x, y) in enumerate(places)
    ]
    unbeaten = [
        point
        for point in points
        if not any(
            other[0] <= point["x"]
            and other[1] <= point["y"]
            and other != (point["x"], point["y"])
            for other in places
        )
    ]
    frontier = pictures.frontier_of(points)
    assert frontier == sorted(unbeaten, key=lambda point: point["x"])


def test_the_line_of_the_frontier_is_the_same_where_two_files_are_equal():
    def lines_of(entries):
        figure, _ = pareto_figure(new_report(entries))
        axes, key = figure.axes
        steps = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 3]
        words = [text.get_text() for text in key.texts]
        return np.array(steps), any(word.startswith("frontier") for word in words)

    fast = [entry_of(name, 1, accuracy_of(6.0), latency_of(2.0)) for name in "ab"]
    exact = [entry_of(name, 1, accuracy_of(5.0), latency_of(3.0)) for name in "cd"]
    one, is_in_key = lines_of([fast[0], exact[0]])
    two, is_still_in_key = lines_of([*fast, *exact])
    assert is_in_key and is_still_in_key
    assert one.shape == (1, 3, 2)
    np.testing.assert_array_equal(one, two)
    # Equal files alone are one place, and no line.
    alone, is_in_key = lines_of(fast)
    assert not alone.size and not is_in_key


def test_budgets_rule_files_out_where_nobody_recommends():
    report = report_of(2)
    first, second = (entry["name"] for entry in report["entries"])
    assert pictures.outside_of(report) == set()
    slow = max(
        report["entries"],
        key=lambda entry: entry["latency"]["inter_token_latency_ms"]["p95"],
    )
    limit = slow["latency"]["inter_token_latency_ms"]["p95"]
    report["budgets"]["max_latency_ms"] = limit * 1.0001
    assert pictures.outside_of(report) == set()
    report["budgets"]["max_latency_ms"] = limit * 0.9999
    assert pictures.outside_of(report) == {slow["name"]}
    report["recommendation"] = {"ruled_out": [{"name": first}], "budgets": {}}
    assert pictures.outside_of(report) == {first} != {second}


def test_the_recommended_file_and_budgets_are_marked():
    report = report_of(3, name="file-{}")
    report["budgets"].update(max_latency_ms=4.0, max_perplexity_increase=0.05)
    report["recommendation"] = {
        "choice": "file-1",
        "budgets": report["budgets"],
        "ruled_out": [{"name": "file-2"}],
    }
    figure, labels = pareto_figure(report)
    bold = [name for name, text in labels if text.get_fontweight() == "bold"]
    assert bold == ["file-1"]
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any(word.startswith("budget 4 ms") for word in words)
    assert any("budget +5 %" in word for word in words)
    assert {"recommended", "within the budgets", "ruled out (dashed)"} <= set(words)


def test_a_far_budget_does_not_press_the_points_into_a_corner():
    report = report_of(4, name="file-{}")
    before = pareto_figure(report)[0].axes[0].get_xlim()
    report["budgets"]["max_latency_ms"] = 500.0
    figure, _ = pareto_figure(report)
    assert figure.axes[0].get_xlim() == before
    words = [text.get_text() for text in figure.axes[0].texts]
    assert any(word.startswith("budget 500 ms") for word in words)


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["$x^2$ {", "_hidden", "模型-int8", "a\nb\tc", "<b>"]
    report = new_report(
        [
            entry_of(name, 1 + place, accuracy_of(5.0 + place), latency_of(2.0 + place))
            for place, name in enumerate(names)
        ]
    )
    for draw in DRAWS.values():
        assert draw(report, tmp_path / "picture.png")
    _, labels = pareto_figure(report)
    assert [text.get_text() for _, text in labels] == [*names[:3], "a b c", names[4]]
    assert not any(text.get_parse_math() for _, text in labels)


def test_a_budget_is_drawn_where_it_lies_within_the_plane():
    near = limits([1.0, 2.0], 2.1, False, 0.05)
    assert near[0][0] < 1.0 < 2.1 < near[0][1] and near[1]
    far = limits([1.0, 2.0], 20.0, False, 0.05)
    assert far[0] == limits([1.0, 2.0], None, False, 0.05)[0] and not far[1]
    # Of one point the room decides.
    assert limits([1.0], 1.01, False, 0.05)[1]
    assert not limits([1.0], 1.06, False, 0.05)[1]


def test_the_key_shows_each_size_once():
    entries = [
        entry_of(f"of-{size}", size, accuracy_of(5.0), latency_of(2.0))
        for size in (1, 4)
    ]
    for files_shown, sizes in ((1, ["1 MB"]), (2, ["1 MB", "4 MB"])):
        figure, _ = pareto_figure(new_report(entries[:files_shown]))
        words = [text.get_text() for text in figure.axes[1].texts]
        assert [word for word in words if word.endswith("MB")] == sizes


def test_grey_text_is_legible_where_two_budgets_shade_the_plane():
    grey = np.array(to_rgb(canvas.GREY))
    share = plane._SHADE["alpha"]
    ground = np.ones(3)
    for _ in range(2):
        ground = (1 - share) * ground + share * grey

    def luminance(colour):  # of sRGB, as WCAG 2 defines it
        linear = np.where(
            colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    assert (luminance(ground) + 0.05) / (luminance(grey) + 0.05) >= 4.5


def test_a_users_style_does_not_change_a_picture(tmp_path):
    import matplotlib

    report = report_of(2)
    assert pictures.draw_accuracy(report, tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert pictures.draw_accuracy(report, tmp_path / "other.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    report["entries"][1]["accuracy"]["divergence_nats"]["value"] *= 1.1
    assert pictures.draw_accuracy(report, tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_an_interrupted_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "sizes.png"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.draw_sizes(report_of(1), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["sizes.png"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345.6, "12,346"),
        (99.96, "100"),
        (15.04, "15"),
        (0.071234, "0.0712"),
        (-2.5, "\N{MINUS SIGN}2.5"),
        (1e-9, "1.0e\N{MINUS SIGN}09"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert pictures.format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (0.03, "+3 %"),
        (0.0123, "+1.23 %"),
        (-0.0021, "\N{MINUS SIGN}0.21 %"),
        (0.1234, "+12.3 %"),
        (3.5, "+350 %"),
    ],
)
def test_increases_are_in_percent_with_their_sign(value, text):
    assert pictures.format_percent(value) == text


def test_intervals_have_the_digits_that_their_width_is_worth():
    wide = {"value": 5.83124, "low": 5.2, "high": 6.4}
    narrow = {"value": 5.83124, "low": 5.8300, "high": 5.8325}
    change = {"value": 0.0213, "low": -0.0031, "high": 0.0457}
    assert pictures.format_interval(wide) == ("5.8", "5.2", "6.4")
    assert pictures.format_interval(narrow) == ("5.8312", "5.8300", "5.8325")
    expected = ("+2.1", "\N{MINUS SIGN}0.3", "+4.6")
    assert pictures.format_interval(change, 100, "+") == expected
