import numpy as np
import pytest

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.harness import spread
from gpt_tf.evaluation.regression import compare_with_baseline, read_baseline
from gpt_tf.evaluation.report import new_entry, new_report, write_report

TIMES = (
    *("time_to_first_token_ms", "inter_token_latency_ms", "response_time_ms"),
    *("load_ms", "cold_start_ms"),
)


def times(scale=1.0, rounds=5, width=0.02):
    """A spread around `scale`, of four measurements in each round."""
    values = scale * (1 + width * np.linspace(-0.5, 0.5, 4 * rounds))
    return spread(np.random.default_rng(rounds).permuted(values).reshape(rounds, 4))


def latency(**changes):
    return {
        **dict.fromkeys(TIMES, times()),
        "engine": "gpt_tf",
        "threads": 2,
        "prompt_tokens": 64,
        "new_tokens": 64,
        "peak_memory_bytes": 50_000_000,
        **changes,
    }


def interval(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def entry(name="gpt", size_bytes=1000, **parts):
    return new_entry({"name": name, "size_bytes": size_bytes}, **parts)


def compare(before, after, **parts):
    """Compare two entries; return the changes by metric and the whole answer."""
    before, after = (
        new_report(part if isinstance(part, list) else [part], **parts)
        for part in (before, after)
    )
    found = compare_with_baseline(after, before)
    return {row["metric"]: row["change"] for row in found["rows"]}, found


def changed(before=None, **after):
    """Compare two latencies."""
    before, after = (latency(**changes) for changes in (before or {}, after))
    return compare(entry(latency=before), entry(latency=after))


def test_a_time_that_grew_by_a_fifth_is_worse_and_the_reverse_better():
    for metric in TIMES:
        for factor, change in ((1.2, "worse"), (1 / 1.2, "better")):
            found, whole = changed(**{metric: times(factor)})
            assert found.pop(metric) == change
            assert set(found.values()) == {"none", None}
            assert whole["regressed"] == (change == "worse")
    assert not changed()[1]["regressed"]


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        # At least 5 % is asked of the narrowest spread.
        (times(width=1e-6), times(1.049, width=1e-6), "none"),
        (times(width=1e-6), times(1.051, width=1e-6), "worse"),
        (times(width=1e-6), times(1 / 1.051, width=1e-6), "better"),
        # Medians of rounds that lie among each other.
        (times(width=2.0), times(1.1, width=2.0), "none"),
        # Fewer than five rounds say nothing.
        (times(rounds=4), times(9.0), None),
        (times(), times(9.0, rounds=2), None),
        # A report that was written before rounds were kept.
        ({k: v for k, v in times().items() if k != "rounds"}, times(9.0), None),
    ],
)
def test_a_change_is_beyond_noise_if_the_rounds_differ(before, after, change):
    found, _ = changed({"response_time_ms": before}, response_time_ms=after)
    assert found["response_time_ms"] == change


def test_equal_processes_are_rarely_a_change_and_a_third_more_nearly_always_is():
    generator = np.random.default_rng(4)

    def changes(noise, factor, trials):
        """How a second draw, times a factor, is judged."""
        own = noise * generator.normal(size=(2, trials, 5, 1))
        draws = np.exp(own + 0.03 * generator.normal(size=(2, trials, 5, 12)))
        reports = [
            [
                entry(str(trial), latency=latency(response_time_ms=spread(rounds)))
                for trial, rounds in enumerate(drawn)
            ]
            for drawn in draws * np.reshape([1, factor], (2, 1, 1, 1))
        ]
        rows = compare(*reports)[1]["rows"]
        return [row["change"] for row in rows if row["metric"] == "response_time_ms"]

    assert changes(0.2, 1.0, trials=300).count("none") >= 0.98 * 300
    found = changes(0.05, 4 / 3, trials=100)
    assert found.count("worse") > 0.9 * 100 and not found.count("better")


def test_the_tail_energy_and_few_rounds_are_shown_and_not_judged():
    tail = times(rounds=2) | {"p95": 7.0, "p99": 9.0}
    energy = "energy_j_per_token"
    found, whole = changed({energy: 1.0}, inter_token_latency_ms=tail, **{energy: 9.0})
    for part in ("", " p95", " p99"):
        assert found[f"inter_token_latency_ms{part}"] is None
    assert found[energy] is None
    assert not whole["regressed"] and "fewer than 5 rounds" in whole["notes"][0]
    (row,) = [row for row in whole["rows"] if row["metric"].endswith("p95")]
    assert row["after"] == 7.0 and row["ratio"] == pytest.approx(7.0, rel=0.02)


def test_contexts_threads_and_requests_are_compared_where_both_have_them():
    def with_rows(*keys, scale=1.0):
        rate = spread([[10 / scale]] * 5)
        rates = {"tokens_per_s": rate["median"], "rounds": rate["rounds"]}
        gaps = {"inter_token_latency_ms": times(scale)}
        first = {"time_to_first_token_ms": times()}
        return dict(
            by_context=[{"context": key, **first, **gaps} for key in keys],
            by_threads=[{"threads": key, **gaps} for key in keys],
            throughput=[{"requests": key, **rates} for key in keys],
        )

    found, _ = changed(with_rows(1, 4, 8), **with_rows(2, 4, scale=1.5))
    assert {name: found[name] for name in found if ", " in name} == {
        "inter_token_latency_ms, prompt 4": "worse",
        "time_to_first_token_ms, prompt 4": "none",
        "inter_token_latency_ms, threads 4": "worse",
        "tokens_per_s, requests 4": "worse",  # fewer of them
    }
    # A list that only one report has is left out.
    assert not any(", " in name for name in changed(with_rows(4))[0])


def test_bytes_may_grow_a_little():
    def change(part, factor):
        before, after = (
            entry(size_bytes=size, latency=latency(peak_memory_bytes=size))
            for size in (1_000_000, round(1_000_000 * factor))
        )
        return compare(before, after)[0][part]

    for part, least in (("size_bytes", 0.01), ("peak_memory_bytes", 0.10)):
        factors = (1 + 0.9 * least, 1 + 1.1 * least)
        assert [change(part, factor) for factor in factors] == ["none", "worse"]
        assert [change(part, 1 / factor) for factor in factors] == ["none", "better"]


def test_accuracy_changes_if_its_intervals_do_not_overlap():
    def accuracy(perplexity, agreement, parsed=0.5):
        return {
            "perplexity": interval(perplexity),
            "token_accuracy": interval(0.4),
            "top1_agreement": interval(agreement),
            "parsed": {"share": interval(parsed), "of_true_text": 0.9, "count": 64},
        }

    before = entry(accuracy=accuracy(10.0, 0.5))
    found, whole = compare(before, entry(accuracy=accuracy(10.19, 0.5)))
    assert found["perplexity"] == "none" and not whole["regressed"]
    assert "divergence_nats" not in found
    after = entry(accuracy=accuracy(10.21, 0.71, parsed=0.29))
    found, whole = compare(before, after)
    assert found["perplexity"] == "worse" and whole["regressed"]
    assert found["top1_agreement"] == "better" and found["token_accuracy"] == "none"
    assert found["parsed share"] == "worse"
    found, _ = compare(after, before)
    assert found["perplexity"] == "better" and found["top1_agreement"] == "worse"


def test_accuracy_beside_another_reference_or_text_is_not_compared():
    relative = ("perplexity_increase", "divergence_nats", "top1_agreement")
    part = dict.fromkeys((*relative, "perplexity"), interval(0.2))
    worse = part | dict.fromkeys(relative[:2], interval(9.0))
    stored = new_report([entry(accuracy=part)], reference="teacher")

    def compared(**parts):
        new = new_report([entry(accuracy=worse)], **{"reference": "teacher"} | parts)
        found = compare_with_baseline(new, stored)
        return {row["metric"] for row in found["rows"]}, found

    metrics, found = compared()
    assert found["regressed"] and not found["notes"] and metrics >= set(relative)
    metrics, found = compared(reference="student")
    assert not found["regressed"] and "student" in found["notes"][0]
    assert metrics == {"size_bytes", "perplexity"}
    metrics, found = compared(corpus={"name": "two"})
    assert metrics == {"size_bytes"} and len(found["notes"]) == 1


def test_entries_are_matched_by_name_and_others_are_named():
    _, found = compare(
        [entry("a", 1000), entry("b", 500)], [entry("b", 600), entry("c", 1)]
    )
    (row,) = found["rows"]
    assert row == {
        "entry": "b",
        "metric": "size_bytes",
        "before": 500,
        "after": 600,
        "ratio": 1.2,
        "change": "worse",
    }
    assert [note[0] for note in found["notes"]] == ["c", "a"]
    with pytest.raises(InputError, match=r"has entries a\. Received: b\."):
        compare(entry("a"), entry("b"))


def test_another_machine_is_said():
    ours = {"cpu": "one", "cores": 2}
    before = new_report([entry()], machine=ours)
    after = new_report([entry()], machine=ours | {"cpu": "other"})
    (note,) = compare_with_baseline(after, before)["notes"]
    assert "cpu one" in note and "other" in note


@pytest.mark.parametrize(
    ("part", "value"),
    [("threads", 1), ("engine", "keras")],
)
def test_other_settings_are_refused(part, value):
    with pytest.raises(InputError, match=f"{part} = {value}. Received: "):
        changed({part: value})


def test_a_baseline_is_read_and_seen_to_fit_before_anything_is_measured(tmp_path):
    path = tmp_path / "report.json"
    report = new_report([entry(latency=latency()), entry("unmeasured")])
    write_report(path, report)
    sizes = {"prompt_tokens": 64, "new_tokens": 64}
    assert read_baseline(path, **sizes) == report
    with pytest.raises(InputError, match=r"prompt_tokens = 64\. Received: 16"):
        read_baseline(path, prompt_tokens=16, new_tokens=64)
    altered = latency(inter_token_latency_ms={"median": -1.0})
    write_report(path, new_report([entry(latency=altered)]))
    with pytest.raises(DamagedFileError, match=r"-1\.0 at .*median"):
        read_baseline(path, **sizes)
    for entries in ([entry("unmeasured")], []):
        write_report(path, new_report(entries))
        with pytest.raises(InputError, match=r"report\.json"):
            read_baseline(path, **sizes)


def test_what_a_report_does_not_have_is_not_compared():
    few = entry(latency=latency(inter_token_latency_ms={"median": 1.0}, load_ms=None))
    found, _ = compare(few, entry(latency=latency(energy_j_per_token=1.0)))
    assert found["inter_token_latency_ms"] is None
    missing = ("load_ms", "inter_token_latency_ms p95", "energy_j_per_token")
    assert not {*missing} & found.keys() and "response_time_ms" in found
    assert list(compare(entry(), few)[0]) == ["size_bytes"]
