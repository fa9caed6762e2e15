from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_tf.advisor.frontier import frontier_of, pareto_points
from tests.reporting.samples import report_of


def test_a_point_stands_at_its_median_and_increase_and_its_whisker_at_p95():
    report = report_of(4)
    points, is_increase = pareto_points(report)
    assert is_increase
    for point, entry in zip(points, report["entries"], strict=True):
        spread = entry["latency"]["inter_token_latency_ms"]
        increase = entry["accuracy"]["perplexity_increase"]
        assert (point["x"], point["p95"]) == (spread["median"], spread["p95"])
        assert point["y"] == (1 + increase["value"] if increase else 1)


def test_without_a_reference_perplexity_itself_is_the_accuracy():
    report = report_of(3, reference=None)
    points, is_increase = pareto_points(report)
    assert not is_increase
    assert points[0]["y"] == report["entries"][0]["accuracy"]["perplexity"]["value"]


def test_what_breaks_a_budget_dominates_nothing_unless_nothing_keeps_them():
    def frontier(outside):
        points = [{"x": x, "y": y, "is_outside": (x, y) in outside} for x, y in places]
        return [(point["x"], point["y"]) for point in frontier_of(points)]

    places = [(1, 5), (2, 5), (2, 3), (3, 4), (4, 1), (4, 2)]
    assert frontier([(2, 3), (4, 1)]) == [(1, 5), (3, 4), (4, 2)]
    assert frontier(places) == frontier([]) == [(1, 5), (2, 3), (4, 1)]


@settings(max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), max_size=9))
def test_a_point_is_on_the_frontier_unless_one_dominates_it(places):
    points = [
        {"x": x, "y": y, "name": name, "is_outside": False}
        for name, (x, y) in enumerate(places)
    ]
    expected = [
        point
        for point in points
        if not any(
            other[0] <= point["x"]
            and other[1] <= point["y"]
            and other != (point["x"], point["y"])
            for other in places
        )
    ]
    assert frontier_of(points) == sorted(expected, key=lambda point: point["x"])


def test_budgets_rule_files_out_where_nothing_is_recommended():
    def outside():
        points, _ = pareto_points(report)
        return {point["name"] for point in points if point["is_outside"]}

    report = report_of(2)
    p95s = {
        entry["latency"]["inter_token_latency_ms"]["p95"]: entry["name"]
        for entry in report["entries"]
    }
    slow = max(p95s)
    for limit, expected in ((1.0001 * slow, set()), (0.9999 * slow, {p95s[slow]})):
        report["budgets"]["max_latency_ms"] = limit
        assert outside() == expected
    fast = p95s[min(p95s)]
    report["recommendation"] = {"ruled_out": [{"name": fast}], "budgets": {}}
    assert outside() == {fast}
