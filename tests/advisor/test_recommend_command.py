import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.advisor.estimate import estimate_modes, print_estimates, read_sizes
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation import hardware
from gpt_tf.evaluation.report import new_entry, new_report, write_report

MACHINE = {
    "read_bytes_per_s": {"1": 20e9, "2": 30e9},
    "physical_cores": 2,
    "cache_bytes": 32 << 20,
}
SIZES = {
    "vocab_size": 1024,
    "embedding_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "context_length": 128,
    "feedforward_dim": 512,
    "tie_embeddings": True,
}


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

    def entry(name, increase, p95, mb):
        described = {
            "name": name,
            "path": f"{name}.litertlm",
            "kind": "litertlm",
            "mode": "dynamic_int8",
            "parameters": 940800,
            "size_bytes": round(mb * 1e6),
            "sha256": "0" * 64,
            "context_length": 128,
            "config": SIZES,
        }
        latency = {
            "inter_token_latency_ms": {"median": p95, "p95": p95, "p99": p95},
            "time_to_first_token_ms": {"median": 4 * p95},
            "tokens_per_s": 1000 / p95,
            "peak_memory_bytes": 9e7,
        }
        accuracy = {
            "perplexity_increase": {
                "value": increase,
                "low": increase,
                "high": increase,
            }
        }
        return new_entry(described, accuracy=accuracy, latency=latency)

    entries = [entry("exact", 0.001, 9.0, 7.5), entry("quick", 0.02, 3.0, 4.0)]
    budgets = {"max_perplexity_increase": 0.03, "max_latency_ms": 8}
    write_report(tmp_path / "report.json", new_report(entries, budgets=budgets))
    return tmp_path


def test_the_budgets_of_the_command_line_decide(recommend, report):
    found = recommend(report, *"--max-size-mb 8 --max-latency-ms 15".split())
    assert found.status == 0
    assert "Ship exact" in found.out
    assert "would be less accurate (2 % instead of 0.1 %)" in found.out
    found = recommend(report / "report.json", "--max-perplexity-increase", "3%")
    assert "Ship quick" in found.out


def test_what_is_preferred_decides_among_those_that_keep_them(recommend, report):
    budgets = "--max-perplexity-increase 50% --max-size-mb 80 --max-latency-ms 90"
    choices = set()
    for prefer, reason in (("accuracy", "perplexity increase"), ("latency", "median")):
        found = recommend(report, *budgets.split(), "--prefer", prefer, "--json")
        result = json.loads(found.out)
        assert reason in result["why"][0]
        choices.add(result["choice"])
    assert choices == {"exact", "quick"}


def test_accuracy_and_speed_may_be_in_reports_of_their_own(recommend, report):
    whole = json.loads((report / "report.json").read_text("utf-8"))
    for number, entry in enumerate(whole["entries"]):
        entry["sha256"] = f"{number:064}"
    for name, left_out in (("accuracy", "latency"), ("device", "accuracy")):
        entries = [{**entry, left_out: None} for entry in whole["entries"]]
        write_report(report / f"{name}.json", {**whole, "entries": entries})
    paths = report / "accuracy.json", report / "device.json"
    budgets = "--max-perplexity-increase 3% --max-latency-ms 5".split()
    for path in paths:
        assert recommend(path, *budgets).status == 3
    found = recommend(*paths, *budgets)
    assert found.status == 0, found.err
    assert "Ship quick" in found.out


def test_without_budgets_those_of_the_report_decide(recommend, report):
    found = recommend(report)
    assert "Ship quick" in found.out
    assert "9 ms, is above 8 ms" in found.out


def test_a_scenario_brings_budgets_and_the_command_line_changes_them(recommend, report):
    found = recommend(report, "--scenario", "server", "--json")
    assert json.loads(found.out)["choice"] == "exact"
    found = recommend(
        report, *"--scenario server --max-perplexity-increase 0.05 --json".split()
    )
    result = json.loads(found.out)
    assert result["choice"] == "quick"
    assert result["budgets"]["max_first_token_ms"] == 500
    assert result["budgets"]["max_perplexity_increase"] == 0.05


@pytest.mark.parametrize(
    ("options", "miss"),
    [
        ("--max-size-mb 3", "--max-size-mb 4"),
        ("--max-memory-mb 80", "--max-memory-mb 90"),
        ("--max-first-token-ms 10", "--max-first-token-ms 12"),
        ("--min-tokens-per-s 400", "--min-tokens-per-s 333"),
        ("--max-latency-ms 2", "--max-latency-ms 3"),
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
    assert (
        json.loads(recommend(report, *options.split(), "--json").out)["choice"] is None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-perplexity-increase 3", "Did you mean 3%?"),
        ("--max-size-mb -1", "`--max-size-mb` expects a number above 0"),
        ("--scenario fridge", "phone, board, server, custom"),
        ("--prefer taste", "accuracy, latency, size"),
    ],
)
def test_a_budget_that_cannot_be_used_is_status_2(recommend, report, options, message):
    found = recommend(report, *options.split())
    assert found.status == 2
    assert message in found.err
    assert len(found.err.splitlines()) == 1


def test_a_missing_report_is_refused(recommend, tmp_path):
    found = recommend(tmp_path)
    assert found.status == 2 and "report.json" in found.err


def test_either_a_report_or_something_to_estimate_is_expected(recommend, report):
    assert "Received: neither" in recommend().err
    assert "Received: both" in recommend(report, "--estimate", report).err


# Estimates


def test_an_estimate_lists_all_and_prefers_none(recommend, artefact):
    found = recommend("--estimate", artefact, "--prefer", "size")
    assert found.status == 2 and "expects a report to choose from" in found.err


def test_estimates_are_printed_as_such(recommend, artefact):
    found = recommend("--estimate", artefact)
    assert found.status == 0
    assert "Estimates: 940,800 parameters, 2 threads" in found.out
    assert "1.08" in found.out and "0.717" in found.out  # dynamic_int8 and int4, MB


def test_estimates_say_what_cannot_fit(recommend, artefact):
    options = ["--estimate", artefact, "--max-size-mb"]
    result = json.loads(recommend(*options, 1.5, "--json").out)
    fits = {mode["mode"]: mode["fits"] for mode in result["modes"]}
    assert fits["float32"] == "no" and fits["int4"] == "yes"
    assert result["basis"] == "estimated"
    found = recommend(*options, 0.5)
    assert found.status == 3
    assert "breaks size" in found.out


@pytest.mark.parametrize(
    ("name", "possible", "impossible"),
    [
        ("max_latency_ms", 100, 1e-3),
        ("max_size_mb", 100, 0.1),
        ("max_memory_mb", 1000, 0.1),
        ("max_first_token_ms", 1000, 1e-3),
        ("min_tokens_per_s", 1, 1e9),
    ],
)
def test_every_budget_but_perplexity_is_compared(tmp_path, name, possible, impossible):
    artifacts.write_manifest(tmp_path, "model", [], config=SIZES)
    machine = MACHINE | {"cache_bytes": 0}
    modes = estimate_modes(tmp_path, machine, {name: possible})["modes"]
    fits = "yes" if name == "max_size_mb" else "perhaps"
    assert {mode["fits"] for mode in modes} == {fits}
    modes = estimate_modes(tmp_path, machine, {name: impossible})["modes"]
    assert {mode["fits"] for mode in modes} == {"no"}
    assert modes[0]["breaks"] == [name]


def test_estimates_are_printed_without_a_budget_too(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    artifacts.write_manifest(tmp_path, "model", [], config=SIZES)
    print_estimates(estimate_modes(tmp_path, MACHINE), console)
    assert "perhaps" not in console.file.getvalue()
    print_estimates(estimate_modes(tmp_path, MACHINE, None, "board"), console)
    assert "perhaps" in console.file.getvalue()


def test_sizes_are_read_wherever_they_are_stated(trained, tmp_path):
    run = Path(trained.out)
    sizes = read_sizes(run)
    assert sizes["num_layers"] == 2
    assert sizes["vocab_size"] == trained.tokenizer.vocab_size
    for path in (run / "run.json", run / "model", run / "model" / "model.keras"):
        found = read_sizes(path)
        assert {name: found[name] for name in SIZES} == {
            name: sizes[name] for name in SIZES
        }
    # A run that is not finished has no model yet.
    for name in ("run.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    found = read_sizes(tmp_path)
    for name in SIZES.keys() - {"feedforward_dim"}:
        assert found[name] == sizes[name]
    one = estimate_modes(tmp_path, MACHINE)["modes"]
    assert one == estimate_modes(run, MACHINE)["modes"]


def test_a_run_that_waits_for_another_models_sizes_is_refused(tmp_path):
    config = {**SIZES, "init_from": "elsewhere"}
    artifacts.write_json(tmp_path / "run.json", {"config": config})
    with pytest.raises(InputError, match="Name that model"):
        read_sizes(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b"[1]"),
        ("manifest.json", b"{}"),
        ("gpt.keras", b"PK no archive"),
        ("gpt.tflite", b""),
        ("gpt.litertlm", b"LITERTLM but short"),
    ],
)
def test_what_states_no_sizes_is_damaged(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    folder = name in ("run.json", "manifest.json")
    with pytest.raises(DamagedFileError):
        read_sizes(tmp_path if folder else tmp_path / name)


def test_where_there_is_no_model_that_is_said(tmp_path, recommend):
    with pytest.raises(InputError, match=r"neither run\.json"):
        read_sizes(tmp_path)
    found = recommend("--estimate", tmp_path / "none.tflite")
    assert found.status == 2
    assert "there is none" in found.err
    artifacts.write_json(tmp_path / "run.json", {"config": {"num_layers": 3}})
    with pytest.raises(InputError, match="vocab_size"):
        read_sizes(tmp_path)


def test_tensorflow_is_not_needed(report, artefact):
    artifacts.write_manifest(report, "model", [], config=SIZES)
    program = f"""
import sys
from gpt_tf import cli
from gpt_tf.evaluation import hardware
hardware.describe_machine = lambda: {MACHINE!r}
for arguments in (
    [{str(report)!r}],
    ["--estimate", {str(report)!r}],
    ["--estimate", {str(artefact)!r}],
):
    sys.argv = ["gpt-tf", "recommend", *arguments]
    try:
        cli.main()
    except SystemExit as error:
        assert not error.code, error.code
loaded = {{"tensorflow", "keras", "tf_keras"}} & sys.modules.keys()
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
