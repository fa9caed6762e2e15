"""Files are measured, explained and chosen where TensorFlow is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_tf.evaluation.report import read_report

SAVED = Path(__file__).parents[2] / "saved_models"
COMMANDS = """
benchmark gpt.litertlm --quick --prompt-tokens 4 --new-tokens 3 --repetitions 2 \
--requests 1,2 --contexts 8 --threads 1 --out out
evaluate gpt.litertlm --corpus text.py --whole --max-tokens 200 --out accuracy.json
recommend accuracy.json out --max-size-mb 9
recommend --estimate gpt.litertlm
recommend --estimate python-small
"""
EXPLAIN = "explain gpt.litertlm --prompt abc --samples 20"
CODE = """
import json, sys
from gpt_tf import cli
for line in sys.stdin:
    sys.argv = ["gpt-tf", *line.split()]
    try:
        cli.main()
    except SystemExit as error:
        assert not error.code, error.code
    heavy = {"tensorflow", "tf_keras", "torch", "matplotlib", "scipy"}
    print("\\0" + json.dumps(sorted(heavy & set(sys.modules))) + "\\0", end="")
"""


def run(folder, commands):
    """Run commands in one process; return what each printed and had imported."""
    for name in ("tensorflow", "tf_keras"):  # whoever imports them fails
        (folder / f"{name}.py").write_text("raise SystemError('was imported')\n")
    shutil.copy(SAVED / "python-small.litertlm", folder / "gpt.litertlm")
    path = os.pathsep.join([str(folder), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        input=commands.strip(),
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": path, "PYTHONUTF8": "1", "COLUMNS": "100"},
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    *parts, rest = result.stdout.split("\0")
    assert rest == ""
    return parts[::2], [json.loads(part) for part in parts[1::2]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    (folder / "python-small").symlink_to(SAVED / "python-small")
    (folder / "text.py").write_text("def f(x):\n    return x + 1\n" * 40)
    return folder, *run(folder, COMMANDS + f"{EXPLAIN} --method lime")


@pytest.mark.slow
def test_shap_needs_no_tensorflow_either(tmp_path):
    (output,), (imported,) = run(tmp_path, f"{EXPLAIN} --method shap")
    assert "Strongest tokens" in output
    assert not {"tensorflow", "tf_keras", "torch"} & set(imported)


def test_commands_for_devices_import_nothing_heavy(ran):
    _, outputs, imported = ran
    assert imported[0] == []  # of the benchmark
    for names in imported:
        assert not {"tensorflow", "tf_keras", "torch"} & set(names)
    measured, _, *recommended, explained = outputs
    assert "first token, prompt 8" in measured
    assert "report: out/report.json" in measured
    assert "Ship gpt.litertlm" in recommended[0]
    assert "940,800" in recommended[1] and "940,800" in recommended[2]
    assert "Strongest tokens" in explained


def test_a_benchmark_states_what_it_measured(ran):
    folder = ran[0]
    report = read_report(folder / "out")
    (entry,) = report["entries"]
    assert entry["name"] == "gpt.litertlm"
    # It does not lie below the report.
    assert entry["path"] == str((folder / "gpt.litertlm").resolve())
    found = entry["latency"]
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 3)
    assert (found["threads"], found["repetitions"]) == (1, 2)
    assert found["inter_token_latency_ms"]["count"] == 2 * (3 - 1)
    assert found["cold_start_ms"]["median"] > found["load_ms"]["median"] > 0
    assert 20 << 20 < found["peak_memory_bytes"] < 200 << 20
    assert all(row["tokens_per_s"] > 0 for row in found["throughput"])
    assert [row["requests"] for row in found["throughput"]] == [1, 2]
    assert [row["context"] for row in found["by_context"]] == [8]
    assert report["command"].startswith("gpt-tf benchmark gpt.litertlm --quick")
    assert report["machine"]["read_bytes_per_s"]
