"""`gpt-tf benchmark`: progress, tables, the report, the baseline and exit statuses."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gpt_tf import cli
from gpt_tf.evaluation import latency
from gpt_tf.evaluation.harness import spread
from gpt_tf.evaluation.report import new_entry, new_report, read_report, write_report
from gpt_tf.reporting import tables

SAVED = Path(__file__).parents[2] / "saved_models"
FILE = SAVED / "python-small.litertlm"
CODE = """
import json, sys
from gpt_tf import cli
try:
    cli.main()
finally:
    heavy = {"tensorflow", "tf_keras", "matplotlib", "scipy"} & set(sys.modules)
    print("\\0", json.dumps(sorted(heavy)))
"""


def made_report(*names, scale=1.0):
    times = spread([[0.99 * scale, scale, 1.01 * scale]] * 5)
    measured = {
        **dict.fromkeys(
            ("time_to_first_token_ms", "inter_token_latency_ms", "response_time_ms"),
            times,
        ),
        "load_ms": None,
        "cold_start_ms": None,
        "engine": "gpt_tf",
        "threads": 2,
        "prompt_tokens": 64,
        "new_tokens": 64,
        "repetitions": 30,
        "tokens_per_s": 100.0,
        "peak_memory_bytes": 50_000_000,
        "bandwidth_share": 0.5,
        "energy_j_per_token": None,
        "by_context": [
            {
                "context": 16,
                "time_to_first_token_ms": times,
                "inter_token_latency_ms": times,
            }
        ],
        "by_threads": [{"threads": 1, "inter_token_latency_ms": times}],
        "throughput": [
            {"requests": 4, "tokens_per_s": 70.0, "q1": 69.0, "q3": 71.0, "count": 5}
        ],
    }
    entries = [
        new_entry({"name": name, "size_bytes": 1_000_000}, latency=measured)
        for name in names
    ]
    machine = {"cpu": "one", "cores": 2, "read_bytes_per_s": {"1": 5e9, "2": 9e9}}
    return new_report(entries, machine=machine, notes=["a note [about] it"])


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process, what is measured given; return status, output,
    errors and what was asked for."""

    def run(*options, measured=None):
        asked = {}

        def measure(paths, *, on_progress, **options):
            asked.update(options, paths=[str(path) for path in paths])
            on_progress(0, 1, "round 1 of 1: gpt")
            return measured

        if measured is not None:
            monkeypatch.setattr(latency, "measure_files", measure)
        arguments = ["gpt-tf", "benchmark", *map(str, options)]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr(), asked

    return run


def test_it_measures_a_file_on_a_device(tmp_path):
    """Neither it nor its processes can import TensorFlow, and none of them tries."""
    for name in ("tensorflow", "tf_keras"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('was imported')\n")
    (tmp_path / "gpt.litertlm").write_bytes(FILE.read_bytes())
    result = subprocess.run(
        [
            *(sys.executable, "-c", CODE, "benchmark", "gpt.litertlm", "--quick"),
            *("--prompt-tokens", "4", "--new-tokens", "3", "--repetitions", "2"),
            *("--requests", "1,2", "--contexts", "8", "--threads", "1"),
            *("--out", "out"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
            "PYTHONUTF8": "1",
            "COLUMNS": "100",
        },
    )
    output, _, imported = result.stdout.rpartition("\0")
    assert (result.returncode, result.stderr) == (0, ""), output
    assert json.loads(imported) == []
    report = read_report(tmp_path / "out")
    (entry,) = report["entries"]
    assert entry["name"] == "gpt.litertlm"
    # It does not lie below the report.
    assert entry["path"] == str((tmp_path / "gpt.litertlm").resolve())
    found = entry["latency"]
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 3)
    assert (found["threads"], found["repetitions"]) == (1, 2)
    assert [row["requests"] for row in found["throughput"]] == [1, 2]
    assert [row["context"] for row in found["by_context"]] == [8]
    assert report["command"].startswith("gpt-tf benchmark gpt.litertlm --quick")
    assert report["machine"]["read_bytes_per_s"]
    assert "first token, prompt 8" in output and "report: out/report.json" in output


def test_without_options_it_measures_what_the_help_says(run):
    status, _, errors, asked = run("a.tflite", "b", measured=made_report("a", "b"))
    assert (status, errors) == (0, "")
    assert asked["paths"] == ["a.tflite", "b"] and asked["engine"] == "gpt_tf"
    assert (asked["prompt_tokens"], asked["new_tokens"]) == (64, 64)
    assert (asked["repetitions"], asked["rounds"]) == (20, 5)
    # Chosen by what the files and the machine can do.
    assert asked["contexts"] is asked["thread_counts"] is asked["threads"] is None
    assert asked["requests"] == (1, 2, 4, 8)
    *_, asked = run("a.tflite", "--quick", measured=made_report("a"))
    assert (asked["prompt_tokens"], asked["new_tokens"]) == (16, 16)
    assert (asked["repetitions"], asked["rounds"]) == (10, 2)
    assert asked["contexts"] == asked["thread_counts"] == ()
    *_, asked = run(
        *("a.tflite", "--quick", "--new-tokens", 5, "--contexts", "8,32"),
        *("--by-threads", "1,2", "--requests", "", "--engine", "both"),
        measured=made_report("a"),
    )
    assert asked["new_tokens"] == 5 and asked["contexts"] == [8, 32]
    assert asked["thread_counts"] == [1, 2] and asked["requests"] == []
    assert asked["engine"] == "both"


def test_the_status_says_whether_something_got_worse(run, tmp_path):
    report = made_report("gpt")
    write_report(tmp_path / "report.json", report)
    for scale, status, mark in ((1.0, 0, "="), (1.3, 1, "worse"), (0.7, 0, "better")):
        found, output, errors, _ = run(
            *("gpt.tflite", "--baseline", tmp_path),
            measured=made_report("gpt", scale=scale),
        )
        assert (found, errors) == (status, "")
        assert "gpt beside the baseline" in output
        (line,) = [line for line in output.splitlines() if "response, ms" in line]
        assert line.split()[-1] == mark and f"{scale:.3f}" in line
    # The report is written all the same.
    found, *_ = run(
        *("gpt.tflite", "--baseline", tmp_path, "--out", tmp_path / "new.json"),
        measured=made_report("gpt", scale=1.3),
    )
    assert found == 1 and read_report(tmp_path / "new.json")["entries"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.tflite"], "Received: nothing"),
        (["no-model.litertlm"], "no-model.litertlm"),
        ([FILE, "--prompt-tokens", 128], "Received: 128 + 64"),
        ([FILE, "--threads", 0], "`--threads` expects"),
        (["gpt.tflite", "--engine", "litert-lm"], "expects a .litertlm"),
        ([FILE, "--contexts", "4,x"], "--contexts expects whole numbers with commas"),
        ([FILE, "--out", f"{__file__}/today"], "report.json cannot be written"),
        ([FILE, "--baseline", "other.json"], "format 99, of gpt_tf"),
        ([FILE, "--baseline", "stored.json", "--quick"], "prompt_tokens = 64"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("no-model.litertlm").write_bytes(b"no model at all" * 10)
    write_report("stored.json", made_report("gpt"))
    write_report("other.json", made_report("gpt") | {"format": 99})
    status, _, errors, _ = run(*options)
    assert status == 2
    assert errors.startswith("gpt-tf: ") and errors.count("\n") == 1
    assert message in errors


def test_a_process_that_breaks_down_is_one_line(run, tmp_path, monkeypatch):
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\necho out of memory >&2\nkill -9 $$\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    status, _, errors, _ = run(FILE)
    assert status == 137 and errors.count("\n") == 1
    assert "was killed by SIGKILL; its last line was: out of memory" in errors


# Tables


def printed(show, value, width=100):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        show(value, console)
        return console.export_text()


def test_files_stand_side_by_side_and_names_are_no_markup():
    report = made_report("a[b]", "other")
    report["entries"][1] = copy.deepcopy(report["entries"][1])
    report["entries"][1]["latency"]["throughput"] = []
    text = printed(tables.print_latency, report)
    (names,) = [line.split() for line in text.splitlines() if "a[b]" in line]
    assert names == ["a[b]", "other"]
    (rates,) = [line.split() for line in text.splitlines() if "4 requests" in line]
    assert rates[-2:] == ["70", "\N{EN DASH}"]
    assert "1 (0.99-1.01)" in text and "share of bandwidth" in text and "50 %" in text
    assert "5 GB/s to 1 thread, 9 GB/s to 2 threads" in text
    assert "a note [about] it" in text
    # What no file has is left out.
    assert "cold start" not in text and "joules" not in text


def test_more_files_than_have_room_go_below(width=80):
    names = [f"file{index}" for index in range(5)]
    text = printed(tables.print_latency, made_report(*names), width)
    heads = [line.split() for line in text.splitlines() if "file" in line]
    assert heads == [names[:2], names[2:4], names[4:]]
    assert all(len(line) <= width for line in text.splitlines())
