"""`gpt-tf benchmark`: progress, tables, the report, the baseline and exit statuses."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gpt_tf.evaluation import latency
from gpt_tf.evaluation.harness import spread
from gpt_tf.evaluation.report import new_entry, new_report, read_report, write_report
from gpt_tf.reporting import tables
from tests.reporting.samples import latency_of

SAVED = Path(__file__).parents[2] / "saved_models"
FILE = SAVED / "python-small.litertlm"


def made_report(*names, scale=1.0):
    times = spread([[0.99 * scale, scale, 1.01 * scale]] * 5)
    measured = latency_of(1.0) | {
        "time_to_first_token_ms": times,
        "inter_token_latency_ms": times,
        "response_time_ms": times,
        "cold_start_ms": None,
        "new_tokens": 64,
        "throughput": [{"requests": 4, "tokens_per_s": 70.0}],
    }
    entries = [
        new_entry({"name": name, "size_bytes": 1_000_000}, latency=measured)
        for name in names
    ]
    machine = {"cpu": "one", "cores": 2, "read_bytes_per_s": {"1": 5e9, "2": 9e9}}
    return new_report(entries, machine=machine, notes=["a note [about] it"])


@pytest.fixture
def run(command, monkeypatch):
    """Run the command, what is measured given; return its result and what was asked."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*options, measured=None):
        asked = {}

        def measure(paths, *, on_progress, **options):
            asked.update(options, paths=[str(path) for path in paths])
            on_progress(0, 1, "round 1 of 1: gpt")
            return measured

        if measured is not None:
            monkeypatch.setattr(latency, "measure_files", measure)
        return command("benchmark", *options), asked

    return run


def test_without_options_it_measures_what_the_help_says(run):
    for options, expected in (
        (
            ("a.tflite", "b"),
            {
                **{"engine": "gpt_tf", "requests": (1, 2, 4, 8)},
                **{"repetitions": 20, "rounds": 5},
                # Chosen by what the files and the machine can do.
                **dict.fromkeys(("contexts", "thread_counts", "threads")),
                **dict.fromkeys(("prompt_tokens", "new_tokens")),
            },
        ),
        (
            ("a", "--quick", "--new-tokens", 5, "--contexts", "8,32", "--requests", ""),
            {
                **{"prompt_tokens": 16, "new_tokens": 5, "repetitions": 10},
                **{"rounds": 2, "contexts": [8, 32], "requests": []},
                "thread_counts": (),
            },
        ),
    ):
        result, asked = run(*options, measured=made_report("a", "b"))
        assert (result.status, result.err) == (0, "")
        assert asked.items() >= expected.items()


def test_the_status_says_whether_something_got_worse(run, tmp_path):
    write_report(tmp_path / "report.json", made_report("gpt"))
    for scale, status, mark in ((1.0, 0, "="), (1.3, 1, "worse"), (0.7, 0, "better")):
        result, _ = run(
            *("gpt.tflite", "--baseline", tmp_path, "--out", tmp_path / "new.json"),
            measured=made_report("gpt", scale=scale),
        )
        assert (result.status, result.err) == (status, "")
        (line,) = [
            line for line in result.out.splitlines() if "response time ms" in line
        ]
        assert line.split()[-1] == mark and f"{scale:.3f}" in line
        # The report is written all the same.
        assert read_report(tmp_path / "new.json")["entries"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.tflite"], "Received: nothing"),
        (["no-model.litertlm"], "no-model.litertlm"),
        ([FILE, "--threads", 0], "`--threads` expects"),
        ([FILE, "--contexts", "4,x"], "`--contexts` expects whole numbers"),
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
    result, _ = run(*options)
    assert result.status == 2
    assert result.err.startswith("gpt-tf: ") and result.err.count("\n") == 1
    assert message in result.err


def test_a_process_that_breaks_down_is_one_line(run, tmp_path, monkeypatch):
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\necho out of memory >&2\nkill -9 $$\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    result, _ = run(FILE)
    assert result.status == 137 and result.err.count("\n") == 1
    assert "was killed by SIGKILL; its last line was: out of memory" in result.err


def test_files_stand_side_by_side_or_below_and_names_are_no_markup():
    names = ["a[b]", *(f"file{index}" for index in range(4))]
    report = made_report(*names)
    console = Console(width=80, record=True, file=io.StringIO())
    tables.print_latency(report, console)
    text = console.export_text()
    heads = [line.split() for line in text.splitlines() if "file" in line]
    assert heads == [names[:2], names[2:4], names[4:]]
    assert "1 (0.99-1.01)" in text and "share of bandwidth" in text and "43.7 %" in text
    assert "5 GB/s to 1 thread, 9 GB/s to 2 threads" in text
    assert "a note [about] it" in text
    # What no file has is left out.
    assert "cold start" not in text and "joules" not in text
