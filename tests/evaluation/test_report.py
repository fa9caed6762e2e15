import pytest

from gpt_tf.advisor.ranking import recommend
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.report import (
    BUDGETS,
    join_reports,
    new_entry,
    new_report,
    read_report,
    write_report,
)


def entry(file, name=None, increase=None, p95=None):
    """An entry of a file, which its letter tells from others."""
    described = {
        "name": name or f"{file}.litertlm",
        "path": f"{file}.litertlm",
        "kind": "litertlm",
        "size_bytes": 4_000_000,
        "sha256": file * 64,
    }
    accuracy = latency = None
    if increase is not None:
        value = {"value": increase, "low": increase, "high": increase}
        accuracy = {"perplexity_increase": value}
    if p95 is not None:
        latency = {"inter_token_latency_ms": {"median": p95, "p95": p95, "p99": p95}}
    return new_entry(described, accuracy=accuracy, latency=latency)


INCREASE = {"value": 0.1, "low": 0.1, "high": 0.1}
CORPUS = {"name": "python-stdlib", "split": "validation", "tokens": 9, "bytes": 30}
# As `evaluate` writes it on a computer, and `benchmark` on a device.
ACCURACY = new_report(
    [entry("a", "exact", 0.0), entry("b", "small", 0.02)],
    corpus=CORPUS,
    reference="exact",
    budgets={"max_perplexity_increase": 0.03, "max_latency_ms": 9},
    notes=["evaluated"],
)
SPEED = new_report(
    [entry("b", p95=3.0), entry("a", p95=5.0)],
    machine={"cpu": "a board's"},
    budgets={"max_latency_ms": 4},
    notes=["timed"],
)


@pytest.mark.parametrize("reports", [[ACCURACY, SPEED], [SPEED, ACCURACY]])
def test_accuracy_and_speed_of_the_same_bytes_come_together(reports, tmp_path):
    write_report(tmp_path / "report.json", join_reports(reports))
    joined = read_report(tmp_path)
    assert [one["name"] for one in joined["entries"]] == ["b.litertlm", "a.litertlm"]
    for one in joined["entries"]:
        assert one["accuracy"] and one["latency"]
    assert joined["reference"] == "a.litertlm"
    assert (joined["corpus"], joined["machine"]) == (CORPUS, SPEED["machine"])
    assert sorted(joined["notes"]) == ["evaluated", "timed"]
    budgets = dict.fromkeys(BUDGETS) | {"max_perplexity_increase": 0.03}
    last = reports[-1]["budgets"]["max_latency_ms"]
    assert joined["budgets"] == {**budgets, "max_latency_ms": last}
    assert recommend(joined, {"max_latency_ms": 4})["choice"] == "b.litertlm"
    assert ACCURACY["entries"][0]["latency"] is None


def test_a_task_goes_with_accuracy_and_older_reports_have_none(tmp_path):
    facts = {"name": "tasks.jsonl", "kind": "exact", "rows": 9}
    judged = ACCURACY | {"task": facts}
    assert join_reports([judged, SPEED])["task"] == facts
    older = {name: part for name, part in ACCURACY.items() if name != "task"}
    write_report(tmp_path / "report.json", older)
    assert join_reports([read_report(tmp_path), SPEED])["task"] is None
    score = {"rows": 9, "score": INCREASE, "difference": {"value": 0.1}}
    wrong = entry("a") | {"accuracy": {"task": score}}
    write_report(tmp_path / "report.json", new_report([wrong]))
    with pytest.raises(DamagedFileError, match=r"task\.difference"):
        read_report(tmp_path)


def test_speed_of_the_last_report_replaces_that_of_the_first():
    entries = [entry(file, increase=0.0, p95=0.1) for file in "ab"]
    whole = new_report(entries, machine={"cpu": "a computer's"})
    joined = join_reports([whole, new_report([entry("a", p95=7.0)])])
    timed, other = joined["entries"]
    assert (timed["name"], other["name"]) == ("a.litertlm", "b.litertlm")
    assert timed["latency"]["inter_token_latency_ms"]["p95"] == 7
    assert other["accuracy"] and other["latency"] is None
    assert joined["machine"] is None
    result = recommend(joined, {"max_latency_ms": 9})
    assert result["choice"] == "a.litertlm"
    assert result["ruled_out"][0]["constraint"] == "not measured"


def test_a_file_that_two_engines_ran_has_one_accuracy_and_two_speeds():
    speed = new_report([entry("a", "ours", p95=3.0), entry("a", "theirs", p95=6.0)])
    joined = join_reports([ACCURACY, speed])
    found = {entry["name"]: entry for entry in joined["entries"]}
    ours, theirs = found["ours"], found["theirs"]
    assert ours["accuracy"] == theirs["accuracy"] == ACCURACY["entries"][0]["accuracy"]
    assert ours["latency"] != theirs["latency"] and joined["reference"] == "ours"
    assert found["small"]["latency"] is None


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("perplexity_increase", {"accuracy": {"perplexity_increase": {"low": 0.1}}}),
        ("value", {"accuracy": {"perplexity_increase": INCREASE | {"value": -1.5}}}),
        ("value", {"accuracy": {"perplexity": INCREASE | {"value": 0}}}),
        ("p95", {"latency": {"inter_token_latency_ms": {"p95": True}}}),
        ("size_bytes", {"size_bytes": 0}),
    ],
)
def test_a_part_of_another_type_or_range_is_damage_that_is_named(
    tmp_path, part, changes
):
    write_report(tmp_path / "report.json", new_report([entry("a") | changes]))
    with pytest.raises(DamagedFileError, match=rf"entries\.0\..*{part}"):
        read_report(tmp_path)


def test_entries_of_one_name_are_damage(tmp_path):
    report = ACCURACY | {"entries": [ACCURACY["entries"][0]] * 2}
    write_report(tmp_path / "report.json", report)
    with pytest.raises(DamagedFileError, match="'exact'"):
        read_report(tmp_path)


def test_an_older_report_with_estimates_still_opens(tmp_path):
    older = entry("a") | {"estimate": {"latency_ms": 0.2, "basis": "estimated"}}
    write_report(tmp_path / "report.json", new_report([older]))
    assert read_report(tmp_path)["entries"] == [older]


@pytest.mark.parametrize("versions", [{"gpt-tf": "0.1"}, "none"])
def test_a_report_of_another_format_is_refused(tmp_path, versions):
    report = ACCURACY | {"format": 99, "versions": versions}
    write_report(tmp_path / "report.json", report)
    with pytest.raises(InputError, match=r"format 99, of gpt_tf (0\.1|unknown)"):
        read_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_what_is_no_report_is_damage(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DamagedFileError):
        read_report(tmp_path)


def test_what_cannot_be_joined_or_made_is_refused():
    with pytest.raises(InputError, match=r"'exact' for two that differ"):
        join_reports([ACCURACY, new_report([entry("c", "exact", p95=3.0)])])
    with pytest.raises(InputError, match="at least one"):
        join_reports([])
    for make in (new_report, new_entry):
        with pytest.raises(InputError, match="Received: 'unknown'"):
            make({}, unknown=1)
