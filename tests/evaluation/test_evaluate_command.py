"""`gpt-tf evaluate`: the accuracy of files, as a table and as a report."""

import functools
import json
from pathlib import Path

import pytest

from gpt_tf import formatting
from gpt_tf.cli import evaluate as commands
from gpt_tf.evaluation.accuracy import evaluate_files
from gpt_tf.evaluation.code_validity import wilson_interval
from gpt_tf.evaluation.report import read_report
from gpt_tf.evaluation.tasks import newcombe_interval

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
    assert report["entries"][1]["path"] == "again.litertlm"
    found = report["entries"][1]["accuracy"]
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


@pytest.fixture
def task(tmp_path):
    """A file of three choices, of which a model of Python knows two."""
    rows = [
        {"prompt": "import", "choices": [" os", " zzzz"], "answer": 0},
        {"prompt": "def __init__(", "choices": ["qqqq", "self"], "answer": 1},
        {"prompt": "for i in", "choices": [" range", " zebra"], "answer": 1},
    ]
    path = tmp_path / "choices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_task_is_scored_and_compared_on_its_own(evaluate, task, tmp_path):
    other = SAVED / "python-student.litertlm"
    out = ("--out", tmp_path / "scores")
    result = evaluate(FILE, "--reference", other, "--task", task, *out)
    assert (result.status, result.err) == (0, "")
    report = read_report(tmp_path / "scores")
    assert report["task"]["name"] == "choices.jsonl" and report["corpus"] is None
    assert (report["task"]["kind"], report["task"]["rows"]) == ("choice", 3)
    assert [entry["name"] for entry in report["entries"]] == [other.name, FILE.name]
    for entry in report["entries"]:
        accuracy = entry["accuracy"]
        assert accuracy["perplexity"] is None
        assert accuracy["task"]["score"] == wilson_interval(2, 3)
        assert accuracy["task"]["by_sum"] == 2 / 3
        assert accuracy["task"]["wrong"]["answered"] == " range"
    assert accuracy["task"]["difference"] == newcombe_interval(2, 0, 0, 1)
    for told in ("3 rows", "67", "gained", "line 3: expected ' zebra'"):
        assert told in result.out
    assert "perplexity" not in result.out


def test_text_is_judged_beside_a_task_where_it_is_named(evaluate, task, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 9)
    options = ("--corpus", text, "--whole", "--max-tokens", 60, "--out", tmp_path)
    result = evaluate(FILE, "--task", task, *options)
    assert (result.status, result.err) == (0, "")
    (entry,) = read_report(tmp_path)["entries"]
    assert entry["accuracy"]["perplexity"] and entry["accuracy"]["task"]
    assert entry["accuracy"]["task"]["difference"] is None
    assert "perplexity" in result.out and "by sum" in result.out


def test_options_are_those_of_rows_that_do_not_say(evaluate, tmp_path):
    path = tmp_path / "exact.jsonl"
    row = {"prompt": "def __init__(", "answer": "SELF"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "stop": ["l"]}))
    options = ("--stop", ",", "--stop", ")", "--max-new-tokens", 2, "--ignore-case")
    assert evaluate(FILE, "--task", path, *options, "--out", tmp_path).status == 0
    (entry,) = read_report(tmp_path)["entries"]
    assert entry["accuracy"]["task"]["score"]["value"] == 0.5
    assert entry["accuracy"]["task"]["wrong"]["line"] == 2
    assert entry["accuracy"]["task"]["wrong"]["answered"] == "se"


@pytest.mark.parametrize(
    "line", ["", '{"prompt": "a"}', '{"prompt": "a", "answer": 3}']
)
def test_a_task_that_cannot_be_scored_leaves_nothing(evaluate, tmp_path, line):
    (tmp_path / "t.jsonl").write_text(line)
    options = ("--task", tmp_path / "t.jsonl", "--out", tmp_path / "out" / "a.json")
    result = evaluate(FILE, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "t.jsonl" in result.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((FILE, "--task", "nowhere.jsonl"), "nowhere.jsonl"),
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
