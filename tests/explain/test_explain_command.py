"""`gpt-tf explain`."""

import json
import subprocess
import sys

import pytest


@pytest.fixture
def explain(command):
    """Run `gpt-tf explain`; return status, output and errors."""

    def run(*options):
        result = command("explain", *options)
        return result.status, result.out, result.err

    return run


def test_it_shows_the_strongest_tokens_and_writes_page_picture_and_numbers(
    explain, file, tmp_path
):
    options = (file, "--prompt", "abc <b>", "--target", "p", "--samples", 20)
    status, output, errors = explain(*options, "--seed", 4, "--out", tmp_path / "why")
    assert (status, errors) == (0, "")
    assert output.startswith("abc <b>\n-> 'p'  probability ")
    rows = [line for line in output.splitlines() if line.startswith("\u2502")]
    assert len(rows) == 7
    names = sorted(path.name for path in (tmp_path / "why").iterdir())
    assert names == ["explanation.html", "explanation.json", "explanation.png"]
    facts = json.loads((tmp_path / "why" / "explanation.json").read_text("utf-8"))
    assert (facts["seed"], facts["num_samples"], len(facts["scores"])) == (4, 20, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "--prompt expects a value"),
        (["--prompt", "abc", "--target", "de"], "It begins with 'd'"),
        (["--prompt", "abc", "--method", "magic"], "Received: 'magic'"),
        (["--prompt", "abc", "--method", "attention"], "Name the Keras model"),
        (["--prompt", "abc", "--out", f"{__file__}/why.png"], "Not a directory"),
    ],
)
def test_what_it_cannot_use_is_one_line_and_status_2(explain, file, options, message):
    status, output, errors = explain(file, *options)
    assert (status, output) == (2, "")
    assert message in errors and errors.count("\n") == 1


@pytest.mark.parametrize("package", ["lime", "shap"])
def test_a_missing_package_is_named_with_its_extra(explain, file, monkeypatch, package):
    for name in (package, "lime.lime_text"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, errors = explain(file, "--prompt", "abc", "--method", package)
    assert status == 2 and errors.count("\n") == 1
    assert f"package {package}" in errors and "pip install 'gpt-tf[explain]'" in errors


CODE = """
import json, sys
from gpt_tf import cli
try:
    cli.main()
finally:
    heavy = {"tensorflow", "tf_keras", "torch"} & set(sys.modules)
    print("\\0", json.dumps(sorted(heavy)))
"""


@pytest.mark.parametrize(
    "method", ["lime", pytest.param("shap", marks=pytest.mark.slow)]
)
def test_a_file_is_explained_without_tensorflow_and_without_remarks(file, method):
    options = [file, "--prompt", "abc", "--samples", 20, "--method", method]
    result = subprocess.run(
        [sys.executable, "-c", CODE, "explain", *map(str, options)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1"},
    )
    output, _, imported = result.stdout.rpartition("\0")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(imported) == [] and "Strongest tokens" in output


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_a_run_is_looked_into(explain, trained, method):
    status, output, errors = explain(
        *(trained.out, "--prompt", "the quick ", "--method", method)
    )
    assert (status, errors) == (0, "")
    assert f"{method}: " in output and "Strongest tokens" in output
