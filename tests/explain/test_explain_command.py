"""`gpt-tf explain`."""

import functools
import json
import sys

import pytest


@pytest.fixture
def explain(command):
    """Run `gpt-tf explain`."""
    return functools.partial(command, "explain")


def test_it_shows_the_strongest_tokens_and_writes_page_picture_and_numbers(
    explain, file, tmp_path
):
    options = (file, "--prompt", "abc <b>", "--target", "p", "--samples", 20)
    result = explain(*options, "--seed", 4, "--out", tmp_path / "why")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("abc <b>\n-> 'p'  probability ")
    rows = [line for line in result.out.splitlines() if line.startswith("\u2502")]
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
    result = explain(file, *options)
    assert (result.status, result.out) == (2, "")
    assert message in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("package", ["lime", "shap"])
def test_a_missing_package_is_named_with_its_extra(explain, file, monkeypatch, package):
    for name in (package, "lime.lime_text"):
        monkeypatch.setitem(sys.modules, name, None)
    result = explain(file, "--prompt", "abc", "--method", package)
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"package {package}" in result.err
    assert "pip install 'gpt-tf[explain]'" in result.err


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_a_run_is_looked_into(explain, trained, method):
    result = explain(trained.out, "--prompt", "the quick ", "--method", method)
    assert (result.status, result.err) == (0, "")
    assert f"{method}: " in result.out and "Strongest tokens" in result.out
