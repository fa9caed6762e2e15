"""`gpt-tf evaluate`: the accuracy of files, as a table and as a report."""

import functools
from pathlib import Path

import pytest

from gpt_tf import formatting
from gpt_tf.cli import evaluate as commands
from gpt_tf.evaluation.accuracy import evaluate_files
from gpt_tf.evaluation.report import entry_of, read_report

SAVED = Path(__file__).parent.parent.parent / "saved_models"
FILE = SAVED / "python-small.litertlm"


@pytest.fixture
def evaluate(command, monkeypatch):
    """Run `gpt-tf evaluate` in a terminal of the same width everywhere."""
    monkeypatch.setenv("COLUMNS", "80")
    return functools.partial(command, "evaluate")


def test_a_file_is_evaluated_on_python_that_no_model_has_seen(evaluate, tmp_path):
    options = ("--max-tokens", 600, "--completions", 5, "--out", tmp_path / "a.json")
    result = evaluate(FILE, *options)
    assert (result.status, result.err) == (0, "")
    report = read_report(tmp_path / "a.json")
    (entry,) = report["entries"]
    found = entry["accuracy"]
    assert (entry["name"], entry["mode"]) == (FILE.name, "dynamic_int8")
    assert report["command"].startswith("gpt-tf evaluate ")
    assert report["corpus"]["name"] == "python-stdlib"
    assert report["corpus"]["tokens"] == found["tokens"] <= 600
    perplexity = found["perplexity"]
    # It knows Python: of 1024 tokens a blind model is at a loss for all.
    assert 5 < perplexity["low"] < perplexity["value"] < perplexity["high"] < 60
    assert found["parsed"]["count"] == 5 and found["perplexity_increase"] is None
    assert all(number in result.out for number in formatting.interval(perplexity))
    assert "parsed" in result.out and "increase" not in result.out


def test_files_are_compared_with_the_reference(evaluate, tmp_path):
    other = tmp_path / "again.litertlm"
    other.write_bytes(FILE.read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    options = ("--corpus", text, "--whole", "--max-tokens", 200, "--out", tmp_path)
    result = evaluate(other, "--reference", FILE, *options)
    assert (result.status, result.err) == (0, "")
    report = read_report(tmp_path)
    assert report["reference"] == FILE.name
    assert [entry["name"] for entry in report["entries"]] == [FILE.name, other.name]
    # Beside the report a path is relative, so that both can be moved.
    assert entry_of(report, other.name)["path"] == "again.litertlm"
    found = entry_of(report, other.name)["accuracy"]
    assert found["perplexity_increase"] == {"value": 0, "low": 0, "high": 0}
    assert found["top1_agreement"]["value"] == 1 and found["parsed"] is None
    assert report["corpus"]["split"] == "all"
    for heading in ("increase", "agreed", "KL"):
        assert heading in result.out
    assert "parsed" not in result.out and "compared with" in result.out


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    functions = [f"def f{i}(x):\n    y = x + {i}\n    return y\n" for i in range(99)]
    (tmp_path / "code.py").write_text("\n".join(functions))
    options = {"corpus": tmp_path / "code.py", "whole": True}
    options |= {"max_tokens": 150, "completions": 3}
    first, again, other = (
        evaluate_files([FILE], seed=seed, **options)["entries"] for seed in (3, 3, 4)
    )
    assert first[0]["accuracy"]["parsed"]["count"] == 3
    assert first == again != other


def test_a_run_is_judged_by_its_own_text(trained, notices):
    report = evaluate_files([trained.out], max_tokens=150, parse=False)
    (entry,) = report["entries"]
    assert entry["kind"] == "keras" and entry["accuracy"]["parsed"] is None
    assert report["corpus"]["split"] == "validation"
    assert 100 < report["corpus"]["tokens"] <= 150
    assert report["notes"] == notices and str(trained.out) in notices[0]


def test_tensorflow_is_silent_where_it_reads_a_runs_text(
    evaluate, trained, monkeypatch
):
    calls = []
    monkeypatch.setattr(commands, "import_tensorflow", lambda: calls.append("quietly"))
    options = ("--max-tokens", 60, "--no-parse")
    assert evaluate(FILE, "--corpus", trained.out, *options).status == 0
    assert calls == ["quietly"]


def test_what_is_no_python_is_parsed_only_if_asked(corpus_folder):
    options = {"corpus": corpus_folder, "max_tokens": 60}
    assert evaluate_files([FILE], **options)["notes"] == []
    (note,) = evaluate_files([FILE], parse=True, **options)["notes"]
    assert "has no Python functions" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((FILE, "--corpus", "nowhere"), "nowhere"),
        ((FILE, "--completions", 0), "at least 1"),
        ((FILE, "--reference", "missing.tflite"), "missing.tflite"),
        ((FILE, "--out", f"{FILE}/a.json"), "a.json cannot be written"),
    ],
)
def test_what_it_cannot_use_is_one_line_and_status_2(evaluate, options, message):
    result = evaluate(*options)
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("gpt-tf: ") and result.err.count("\n") == 1
    assert message in result.err
