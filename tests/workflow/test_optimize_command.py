"""`gpt-tf optimize`: options arrive, and the status says whether a file fits."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_tf import artifacts
from gpt_tf.advisor.constraints import Budgets
from gpt_tf.advisor.ranking import recommend
from gpt_tf.evaluation.report import new_report, read_report
from gpt_tf.workflow import optimization
from tests.advisor.samples import entry


@pytest.fixture
def given(monkeypatch):
    """What `optimize` is called with; it recommends a file, or none above `limits`."""
    found = {"limits": None}

    def take(config, out, **options):
        found.update(options, config=config, out=out)
        chosen_by = found["limits"], options["scenario"], options["prefer"]
        result = recommend(new_report([entry("student-1-int8")]), *chosen_by)
        sample = {"prompt": "def it's[1]", "text": "(self):"}
        return {"recommendation": result | {"sample": sample}}

    monkeypatch.setattr(optimization, "optimize", take)
    return found


def test_budgets_and_what_to_do_with_the_folder_arrive(command, given, tmp_path):
    result = command(
        *("optimize", "--max-perplexity-increase", "3%", "--max-latency-ms", 15),
        *("--max-size-mb", 8, "--scenario", "phone", "--prefer", "size"),
        *("--update", "--out", tmp_path),
    )
    assert result.status == 0, result.err
    assert given["budgets"] == Budgets(0.03, 15, 8)
    assert (given["scenario"], given["out"]) == ("phone", tmp_path)
    assert given["prefer"] == "size" and "size first" in result.out
    assert given["update"] and not given["overwrite"]
    assert given["command"].startswith("gpt-tf optimize --max-perplexity-increase 3%")


def test_it_ends_with_the_reason_the_report_and_a_command_to_copy(
    command, given, tmp_path
):
    out = tmp_path / "my runs" / "best"
    result = command("optimize", "--out", out)
    assert "Ship student-1-int8" in result.out
    assert str(out / "report.html") in result.out.replace("\n", "")
    assert result.out.endswith("\ndef it's[1](self):\n")
    line = next(line for line in result.out.splitlines() if line.startswith("$ "))
    options = ["--model", str(out / "gpt.litertlm"), "--prompt", "def it's[1]"]
    assert shlex.split(line) == ["$", "gpt-tf", "generate", *options]


def test_where_nothing_fits_the_status_is_3(command, given):
    given["limits"] = {"max_size_mb": 1}
    result = command("optimize")
    assert result.status == 3 and "Nothing fits" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-perplexity-increase", "3"], "Did you mean 3%?"),
        (["--max-size-mb", "-1"], "`--max-size-mb`"),
        (["--preset", "huge"], "`--preset`"),
        (["--scenario", "moon"], "`--scenario`"),
        (["--prefer", "moon"], "`--prefer`"),
        (["--update", "--overwrite"], "Choose one"),
        (["--corpus", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, arguments, message):
    result = command("optimize", *arguments, "--out", tmp_path / "out")
    assert result.status == 2
    assert message in result.err and result.err.count("\n") == 1
    assert result.err.startswith("gpt-tf: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_optimisation_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out"
    corpus = Path(optimization.__file__).parent  # text enough for a tokenizer
    line = [
        *(sys.executable, "-m", "gpt_tf.cli", "optimize", "--corpus", corpus),
        *("--preset", "tiny", "--steps", 40, "--student-layers", 1, "--mode", "int4"),
        *("--evaluated-tokens", 500, "--prompt-tokens", 4, "--new-tokens", 4),
        *("--repetitions", 1, "--explained-prompts", 0, "--out", out),
    ]
    line = [str(word) for word in line]
    checkpoint = out / "runs" / "teacher" / "checkpoints" / "step-00000010"
    for waits_for in (checkpoint, out / "stages" / "file-teacher-int4.json"):
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        until = time.monotonic() + 300
        while not waits_for.exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (out / "report.json").exists()
    before = artifacts.sha256_of(out / "runs" / "teacher" / "model" / "model.keras")
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stages = {stage["name"]: stage["reused"] for stage in read_report(out)["stages"]}
    assert stages["teacher"] and stages["student-1"]
    assert not stages["accuracy"] and not stages["latency"]
    after = artifacts.sha256_of(out / "runs" / "teacher" / "model" / "model.keras")
    assert after == before
