import copy

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
        "repetitions": 20,
        "tokens_per_s": 100.0,
        "peak_memory_bytes": 50_000_000,
        "bandwidth_share": 0.5,
        "energy_j_per_token": None,
        "by_context": [],
        "by_threads": [],
        "throughput": [],
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


def changed(**changes):
    found, whole = compare(entry(latency=latency()), entry(latency=latency(**changes)))
    return found, whole["regressed"]


@pytest.mark.parametrize("metric", TIMES)
def test_a_time_that_grew_by_a_fifth_is_worse_and_the_reverse_better(metric):
    slower, faster = {metric: times(1.2)}, {metric: times(1 / 1.2)}
    found, regressed = changed(**slower)
    assert found[metric] == "worse" and regressed
    assert set(found.values()) - {"worse"} == {"none", None}
    found, regressed = changed(**faster)
    assert found[metric] == "better" and not regressed


def test_the_same_report_has_not_changed():
    found, whole = compare(entry(latency=latency()), entry(latency=latency()))
    assert set(found.values()) == {"none", None} and not whole["regressed"]
    assert {row["ratio"] for row in whole["rows"]} == {1.0}
    assert {row["entry"] for row in whole["rows"]} == {"gpt"}


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
    found, _ = compare(
        entry(latency=latency(response_time_ms=before)),
        entry(latency=latency(response_time_ms=after)),
    )
    assert found["response_time_ms"] == change


def shares_of(draw, factor, trials=200):
    """How often a second draw, times a factor, is called worse, or better."""
    before, after = (
        [
            entry(str(trial), latency=latency(response_time_ms=spread(scale * draw())))
            for trial in range(trials)
        ]
        for scale in (1, factor)
    )
    _, whole = compare(before, after)
    rows = [row for row in whole["rows"] if row["metric"] == "response_time_ms"]
    found = [row["change"] for row in rows]
    return found.count("worse") / trials, found.count("better") / trials


def test_equal_processes_are_rarely_a_change_and_a_third_more_nearly_always_is():
    generator = np.random.default_rng(4)

    def draw(noise):
        own = noise * generator.normal(size=(5, 1))
        return np.exp(own + 0.03 * generator.normal(size=(5, 12)))

    assert sum(shares_of(lambda: draw(0.2), 1.0, trials=600)) <= 0.02
    worse, better = shares_of(lambda: draw(0.05), 4 / 3)
    assert worse > 0.9 and better == 0


def test_reports_of_too_few_rounds_are_named():
    parts = {name: times(rounds=2) for name in TIMES}
    _, found = compare(entry(latency=latency(**parts)), entry(latency=latency()))
    assert any("fewer than 5 rounds" in note for note in found["notes"])


def test_percentiles_in_the_tail_are_shown_and_not_judged():
    tail = times() | {"p95": 7.0, "p99": 9.0}
    found, regressed = changed(inter_token_latency_ms=tail)
    assert found["inter_token_latency_ms p95"] is None
    assert found["inter_token_latency_ms p99"] is None and not regressed
    _, whole = compare(
        entry(latency=latency()),
        entry(latency=latency(inter_token_latency_ms=tail)),
    )
    (row,) = [row for row in whole["rows"] if row["metric"].endswith("p95")]
    assert row["after"] == 7.0 and row["ratio"] == pytest.approx(7.0, rel=0.02)


def test_contexts_threads_and_requests_are_compared_where_both_have_them():
    def with_rows(*keys, scale=1.0):
        rate = spread([[10 / scale]] * 5)
        rates = {"tokens_per_s": rate["median"], "rounds": rate["rounds"]}
        gaps = {"inter_token_latency_ms": times(scale)}
        first = {"time_to_first_token_ms": times()}
        return latency(
            by_context=[{"context": key, **first, **gaps} for key in keys],
            by_threads=[{"threads": key, **gaps} for key in keys],
            throughput=[{"requests": key, **rates} for key in keys],
        )

    found, _ = compare(
        entry(latency=with_rows(1, 4, 8)), entry(latency=with_rows(2, 4, scale=1.5))
    )
    expected = {
        "inter_token_latency_ms, prompt 4": "worse",
        "time_to_first_token_ms, prompt 4": "none",
        "inter_token_latency_ms, threads 4": "worse",
        "tokens_per_s, requests 4": "worse",  # fewer of them
    }
    assert {name: found[name] for name in expected} == expected
    assert sum(", " in name for name in found) == len(expected)
    found, _ = compare(
        entry(latency=with_rows(4, scale=1.5)), entry(latency=with_rows(4))
    )
    assert found["tokens_per_s, requests 4"] == "better"


@pytest.mark.parametrize(
    ("part", "least"), [("size_bytes", 0.01), ("peak_memory_bytes", 0.10)]
)
def test_bytes_may_grow_a_little(part, least):
    def change(factor):
        size = round(1_000_000 * factor)
        if part == "size_bytes":
            before, after = entry(size_bytes=1_000_000), entry(size_bytes=size)
        else:
            before, after = (
                entry(latency=latency(peak_memory_bytes=bytes_))
                for bytes_ in (1_000_000, size)
            )
        return compare(before, after)[0][part]

    assert change(1 + 0.9 * least) == "none" and change(1 + 1.1 * least) == "worse"
    assert change(1 / (1 + 0.9 * least)) == "none"
    assert change(1 / (1 + 1.1 * least)) == "better"


def test_energy_is_judged_beside_the_noise_of_the_times():
    def change(factor, width):
        gaps = times() | {"q1": 1 - width / 2, "median": 1.0, "q3": 1 + width / 2}
        before, after = (
            latency(energy_j_per_token=joules, inter_token_latency_ms=gaps)
            for joules in (1.0, factor)
        )
        found, _ = compare(entry(latency=before), entry(latency=after))
        return found["energy_j_per_token"]

    assert change(1.14, 0.01) == "none" and change(1.16, 0.01) == "worse"
    # Quartiles 20 % apart in both: 28 % together.
    assert change(1.27, 0.2) == "none" and change(1.3, 0.2) == "worse"
    assert change(1 / 1.3, 0.2) == "better"
    found, _ = changed()  # the machine does not tell
    assert "energy_j_per_token" not in found


def test_accuracy_changes_if_its_intervals_do_not_overlap():
    def accuracy(perplexity, agreement, parsed=0.5):
        return {
            "perplexity": interval(perplexity),
            "bits_per_byte": interval(2.0),
            "token_accuracy": interval(0.4),
            "perplexity_increase": None,
            "divergence_nats": None,
            "top1_agreement": interval(agreement),
            "parsed": {"share": interval(parsed), "of_true_text": 0.9, "count": 64},
        }

    before = entry(accuracy=accuracy(10.0, 0.5))
    found, whole = compare(before, entry(accuracy=accuracy(10.19, 0.5)))
    assert found["perplexity"] == "none" and not whole["regressed"]
    assert "divergence_nats" not in found
    right = {"token_accuracy": interval(0.61)}
    found, _ = compare(before, entry(accuracy=accuracy(10.0, 0.5) | right))
    assert found["token_accuracy"] == "better"
    after = entry(accuracy=accuracy(10.21, 0.71, parsed=0.29))
    found, whole = compare(before, after)
    assert found["perplexity"] == "worse" and whole["regressed"]
    assert found["top1_agreement"] == "better" and found["token_accuracy"] == "none"
    assert found["parsed share"] == "worse"
    found, _ = compare(after, before)
    assert found["perplexity"] == "better" and found["top1_agreement"] == "worse"


def test_accuracy_beside_another_reference_is_not_compared():
    relative = ("perplexity_increase", "divergence_nats", "top1_agreement")
    part = dict.fromkeys((*relative, "perplexity", "bits_per_byte"), interval(0.1))
    part |= {"token_accuracy": interval(0.4), "parsed": None}
    worse = part | dict.fromkeys(relative[:2], interval(9.0))
    stored = new_report([entry(accuracy=part)], reference="teacher")
    found = compare_with_baseline(
        new_report([entry(accuracy=worse)], reference="student"), stored
    )
    assert not found["regressed"]
    assert not {row["metric"] for row in found["rows"]} & set(relative)
    assert "reference is teacher, this one's student" in found["notes"][0]
    found = compare_with_baseline(
        new_report([entry(accuracy=worse)], reference="teacher"), stored
    )
    assert found["regressed"] and not found["notes"]


def test_accuracy_on_another_text_is_not_compared():
    part = {"perplexity": interval(10.0)}
    before = new_report([entry(accuracy=part)], corpus={"name": "one"})
    after = new_report([entry(accuracy=part)], corpus={"name": "two"})
    found = compare_with_baseline(after, before)
    assert [row["metric"] for row in found["rows"]] == ["size_bytes"]
    assert found["notes"] == ["gpt: accuracy is that of another text"]


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
    assert found["notes"] == ["c: not in the baseline", "a: only in the baseline"]
    with pytest.raises(InputError, match=r"has entries a\. Received: b\."):
        compare(entry("a"), entry("b"))


def test_what_only_one_report_measured_is_left_out():
    found, _ = compare(
        entry(latency=latency(load_ms=None, cold_start_ms=None)),
        entry(latency=latency()),
    )
    assert "load_ms" not in found and "response_time_ms" in found
    found, _ = compare(entry(), entry(latency=latency()))
    assert list(found) == ["size_bytes"]


def test_another_machine_is_said():
    ours = {"cpu": "one", "cores": 2}
    before = new_report([entry()], machine=ours)
    after = new_report([entry()], machine=ours | {"cpu": "other"})
    assert compare_with_baseline(after, before)["notes"] == [
        "the baseline's machine had cpu one, this one has other"
    ]
    assert compare_with_baseline(before, copy.deepcopy(before))["notes"] == []


@pytest.mark.parametrize(
    ("part", "value"),
    [("threads", 1), ("prompt_tokens", 16), ("new_tokens", 8), ("engine", "keras")],
)
def test_other_settings_are_refused(part, value):
    message = f"baseline's gpt was measured with {part} = {value}. Received: "
    with pytest.raises(InputError, match=message):
        compare(entry(latency=latency(**{part: value})), entry(latency=latency()))


def test_a_baseline_is_read_and_seen_to_fit_before_anything_is_measured(tmp_path):
    path = tmp_path / "report.json"
    report = new_report([entry(latency=latency()), entry("unmeasured")])
    write_report(path, report)
    sizes = {"prompt_tokens": 64, "new_tokens": 64}
    assert read_baseline(path, **sizes) == report
    with pytest.raises(InputError, match=r"prompt_tokens = 64\. Received: 16"):
        read_baseline(path, prompt_tokens=16, new_tokens=64)
    write_report(path, report | {"format": 99})
    with pytest.raises(InputError, match="format 99, of gpt_tf"):
        read_baseline(path)
    path.write_text("{}")
    with pytest.raises(DamagedFileError, match="other JSON"):
        read_baseline(path)


def test_a_baseline_without_speed_or_with_altered_numbers_is_refused(tmp_path):
    path = tmp_path / "report.json"
    for entries in ([entry("unmeasured")], []):
        write_report(path, new_report(entries))
        with pytest.raises(InputError, match=r"speed was|has entries"):
            read_baseline(path, prompt_tokens=64)
    altered = latency() | {"inter_token_latency_ms": {"median": 1.0}}
    write_report(path, new_report([entry(latency=altered)]))
    with pytest.raises(DamagedFileError, match="was altered"):
        read_baseline(path, prompt_tokens=64)
