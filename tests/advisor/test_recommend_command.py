import functools
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.advisor.estimate import estimate_modes, print_estimates, read_sizes
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation import hardware
from gpt_tf.evaluation.report import new_report, write_report
from tests.advisor.samples import MACHINE, SIZES, entry


@pytest.fixture
def recommend(command, monkeypatch):
    """Run `gpt-tf recommend`, on a machine that is the same everywhere."""
    monkeypatch.setattr(hardware, "describe_machine", lambda: MACHINE)
    monkeypatch.setenv("COLUMNS", "160")
    return functools.partial(command, "recommend")


@pytest.fixture
def artefact():
    """The bundled file, of the sizes above."""
    return Path(gpt_tf.__file__).parents[1] / "saved_models" / "python-small.litertlm"


@pytest.fixture
def report(tmp_path):
    """Write a report of two files; return its folder."""
    entries = [
        entry("exact", 0.001, 9.0, 7.5, first=36, speed=111),
        entry("quick", 0.02, 3.0, 4.0, first=12, speed=333),
    ]
    budgets = {"max_perplexity_increase": 0.03, "max_latency_ms": 8}
    write_report(tmp_path / "report.json", new_report(entries, budgets=budgets))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ("", "quick"),  # the report's own budgets
        ("--max-size-mb 8 --max-latency-ms 15", "exact"),
        ("--max-latency-ms 90 --prefer accuracy", "exact"),
        ("--scenario server", "exact"),
        ("--scenario server --max-perplexity-increase 0.05", "quick"),
    ],
)
def test_budgets_scenario_and_preference_decide(recommend, report, options, choice):
    assert f"Ship {choice}" in recommend(report, *options.split()).out
    found = recommend(report / "report.json", *options.split(), "--json")
    result = json.loads(found.out)
    assert result["choice"] == choice
    is_server = result["scenario"] == "server"
    assert result["budgets"]["max_first_token_ms"] == (500 if is_server else None)


def test_accuracy_and_speed_may_be_in_reports_of_their_own(recommend, report):
    whole = json.loads((report / "report.json").read_text("utf-8"))
    for number, one in enumerate(whole["entries"]):
        one["sha256"] = f"{number:064}"
    for name, left_out in (("accuracy", "latency"), ("device", "accuracy")):
        entries = [{**one, left_out: None} for one in whole["entries"]]
        write_report(report / f"{name}.json", {**whole, "entries": entries})
    paths = report / "accuracy.json", report / "device.json"
    budgets = "--max-perplexity-increase 3% --max-latency-ms 5".split()
    for path in paths:
        assert recommend(path, *budgets).status == 3
    found = recommend(*paths, *budgets)
    assert found.status == 0, found.err
    assert "Ship quick" in found.out


@pytest.mark.parametrize(
    ("options", "miss"),
    [
        ("--max-memory-mb 80", "--max-memory-mb 90"),
        ("--max-first-token-ms 10", "--max-first-token-ms 12"),
        ("--min-tokens-per-s 400", "--min-tokens-per-s 333"),
        ("--max-perplexity-increase 0.05%", "--max-perplexity-increase 0.1%"),
    ],
)
def test_nothing_fits_is_status_3_with_the_nearest_miss(
    recommend, report, options, miss
):
    found = recommend(report, *options.split())
    assert found.status == 3
    assert "Nothing fits" in found.out
    assert miss in " ".join(found.out.split())
    assert recommend(report, *miss.split()).status == 0
    found = recommend(report, *options.split(), "--json")
    assert json.loads(found.out)["choice"] is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--max-size-mb -1", "--max-size-mb"),
        ("--prefer taste", "taste"),
        ("--estimate run", "both"),
    ],
)
def test_an_option_that_cannot_be_used_is_status_2(recommend, report, options, named):
    found = recommend(report, *options.split())
    assert found.status == 2
    assert named in found.err
    assert len(found.err.splitlines()) == 1


def test_a_report_or_something_to_estimate_is_expected(recommend, tmp_path):
    for arguments, named in (
        ((), "neither"),
        ((tmp_path,), "report.json"),
        (("--estimate", tmp_path, "--prefer", "size"), "prefer"),
        (("--estimate", tmp_path / "none.tflite"), "none.tflite"),
    ):
        found = recommend(*arguments)
        assert found.status == 2 and named in found.err


# Estimates


def test_estimates_say_what_cannot_fit(recommend, artefact):
    found = recommend("--estimate", artefact)
    assert found.status == 0
    assert "940,800" in found.out
    assert "1.08" in found.out and "0.717" in found.out  # dynamic_int8 and int4, MB
    options = ["--estimate", artefact, "--max-size-mb"]
    result = json.loads(recommend(*options, 1.5, "--json").out)
    fits = {mode["mode"]: mode["fits"] for mode in result["modes"]}
    assert fits["float32"] == "no" and fits["int4"] == "yes"
    assert result["basis"] == "estimated"
    assert recommend(*options, 0.5).status == 3


def test_what_may_fit_is_told_from_what_fits(artefact):
    console = Console(file=io.StringIO(), width=120)
    machine = MACHINE | {"cache_bytes": 0}
    for limits, fits in (
        ({"max_size_mb": 100}, "yes"),
        ({"max_size_mb": 100, "max_latency_ms": 100}, "perhaps"),
        ({"max_latency_ms": 1e-3}, "no"),
    ):
        result = estimate_modes(artefact, machine, limits)
        assert {mode["fits"] for mode in result["modes"]} == {fits}
        print_estimates(result, console)
    assert "breaks p95 latency" in console.file.getvalue()
    print_estimates(estimate_modes(artefact, MACHINE), console)
    assert "in the cache" in console.file.getvalue()


def test_sizes_are_read_wherever_they_are_stated(trained):
    run = Path(trained.out)
    sizes = read_sizes(run)
    assert sizes["num_layers"] == 2
    assert sizes["vocab_size"] == trained.tokenizer.vocab_size
    for path in (run / "model", run / "model" / "model.keras"):
        assert read_sizes(path) == sizes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.keras", b"PK no archive"),
        ("gpt.keras", b"PK no archive"),
        ("gpt.litertlm", b"LITERTLM but short"),
    ],
)
def test_what_states_no_sizes_is_damaged(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError):
        read_sizes(tmp_path if name == "model.keras" else tmp_path / name)


def test_where_there_is_no_model_that_is_said(tmp_path):
    artifacts.write_json(tmp_path / "run.json", {"config": SIZES})
    for path in (tmp_path, tmp_path / "none.tflite", tmp_path / "none.keras"):
        with pytest.raises(InputError, match=path.name):
            read_sizes(path)
