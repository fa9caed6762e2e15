"""The tutorials run, and the notebooks that are kept show what they did."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest

from gpt_tf.edge.web_bundle import install_command

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
TUTORIALS = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.py"))
SMALL = {
    "vocab_size": 300,
    "context_length": 32,
    "batch_size": 4,
    "embedding_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "steps": 10,
    "jit_compile": "off",
}
TINY = {
    "01_make_it_fast": {
        "model": str(ROOT / "saved_models" / "python-small"),
        **{"max_new_tokens": 4, "repeats": 1, "num_windows": 4},
    },
    "02_train_with_fit": {
        **{"vocab_size": 300, "context_length": 32, "batch_size": 4, "num_heads": 2},
        **{"embedding_dim": 32, "num_layers": 1, "epochs": 3, "steps_per_epoch": 2},
        **{"augmented_steps": 4, "seeds": (0,), "max_new_tokens": 8, "repeats": 1},
        "jit_compile": False,
    },
    "03_quantise": {
        **{"bits_to_try": (8, 4), "num_windows": 4, "steps": 2, "batch_size": 2},
        **{"seeds": (0,), "max_new_tokens": 4, "repeats": 1},
    },
    "04_distil": {
        **{"every": 1, "steps": 2, "label_steps": 2, "batch_size": 2, "seeds": (0,)},
        **{"rates": (1e-3,), "num_windows": 4, "max_new_tokens": 4, "repeats": 1},
    },
    "05_export_and_run": {"max_new_tokens": 8},
    "06_measure_and_choose": {
        "model": str(ROOT / "saved_models" / "python-small"),
        **{"modes": ("float32", "int4"), "evaluated_tokens": 400, "context_length": 32},
        **{"prompt_tokens": 4, "new_tokens": 4, "rounds": 2, "requests": 1},
    },
    "07_explain": {"num_prompts": 50, "prompt_tokens": 4, "num_samples": 10},
    "08_train_in_parallel": {
        "model": {
            **{"vocab_size": 300, "embedding_dim": 16, "num_layers": 2},
            **{"num_heads": 4, "context_length": 16},
        },
        **{"batch_size": 8, "steps": 4, "steps_per_epoch": 2},
    },
    "09_fit_to_browser": {
        **{"vocab_size": 300, "context_length": 32, "batch_size": 4, "num_heads": 2},
        **{"embedding_dim": 32, "num_layers": 1, "epochs": 2, "steps_per_epoch": 2},
        **{"evaluated_tokens": 200, "max_new_tokens": 8, "repeats": 1},
        "jit_compile": False,
        # The page is opened where npm's packages and a browser are.
        "node_modules": os.environ.get(
            "GPT_TF_NODE_MODULES", str(ROOT / "node_modules")
        ),
    },
}
# They train, quantise or explain several models each, or open a browser.
LONG = (
    *("02_train_with_fit", "03_quantise", "04_distil", "06_measure_and_choose"),
    *("07_explain", "08_train_in_parallel", "09_fit_to_browser"),
)
# A path of a machine, in a text or a link: `/home/...`, `C:\Users\...`.
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:root|home|tmp|usr|opt|mnt|Users|private|var)/|[A-Z]:\\\\?Users"
)
# How TensorFlow, Python and the kernel begin a remark.
LOG_NOISE = re.compile(r"WARNING|[A-Z]\w*Warning\b|^[IWEF]\d{4} ", re.MULTILINE)


def run_execute(*arguments, folder=NOTEBOOKS):
    # In a process of its own: the kernel's client leaves sockets and event loops.
    return subprocess.run(
        [sys.executable, str(folder / "execute.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def outputs_of(notebook):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def sources_of(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def first_cell(name, cell_type):
    cells = jupytext.read(NOTEBOOKS / f"{name}.py").cells
    return next(cell.source for cell in cells if cell.cell_type == cell_type)


def _results(name):
    """Return what the last cell of a kept notebook printed as its results."""
    kept = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for output in code[-1].outputs)
    return json.loads(printed.partition("results: ")[2])


def assert_shows_a_good_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not LOG_NOISE.search("".join(output.get("text", "") for output in outputs))


# The tutorials


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name in TUTORIALS
    ],
)
def test_tutorial_runs_from_top_to_bottom(name, corpus_folder, tmp_path):
    parameters = dict(TINY[name])
    if "\ncorpus = " in (NOTEBOOKS / f"{name}.py").read_text("utf-8"):
        parameters["corpus"] = str(corpus_folder)
    changes = [f"--set={key}={value}" for key, value in parameters.items()]
    result = run_execute(name, *changes, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert_shows_a_good_run(nbformat.read(tmp_path / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", TUTORIALS)
def test_kept_notebook_shows_a_good_run_of_its_source(name):
    kept = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert sources_of(kept) == sources_of(jupytext.read(NOTEBOOKS / f"{name}.py"))
    assert kept.metadata.jupytext.formats == "ipynb,py:percent"
    assert_shows_a_good_run(kept)
    for output in outputs_of(kept):
        # The letters of an encoded picture may look like anything.
        output.get("data", {}).pop("image/png", None)
    kept.cells[0].pop("attachments", None)
    assert not MACHINE_PATH.search(nbformat.writes(kept))


def test_tutorials_open_with_their_end_and_chapter_and_are_in_the_index():
    text = (NOTEBOOKS / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d) \| \[(.+?)\]\((\w+)\.ipynb\) (.+)$", text, re.M)
    assert [name for _, _, name, _ in rows] == TUTORIALS == list(TINY)
    for number, title, name, rest in rows:
        opening = first_cell(name, "markdown")
        assert opening.splitlines()[0] == f"# {number}. {title}"
        _, end, article = re.split(r"\*\*At the end you|\*\*The article", opening)
        assert end and re.search(r"chapter \d\.\d", article)
        # A chapter that the index names is one that the tutorial names.
        assert set(re.findall(r"\d\.\d", rest)) <= set(re.findall(r"\d\.\d", article))


# The cell that installs


def run_installing_cell(folder, path=()):
    """Return what the cell asks pip for, in a Python without installed packages."""
    code = (
        "import sys, types\n"
        "class Shell:\n"
        "    def run_line_magic(self, *asked): print(*asked)\n"
        "module = types.ModuleType('IPython')\n"
        "module.get_ipython = Shell\n"
        "sys.modules['IPython'] = module\n" + first_cell("05_export_and_run", "code")
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# `import gpt_tf` finds something beside a clone: an empty namespace.
@pytest.mark.parametrize(
    ("beside", "source"),
    [
        ("gpt_tf-0.1.0-py3-none-any.whl", "./gpt_tf-0.1.0-py3-none-any.whl"),
        ("gpt_tf/gpt_tf/__init__.py", "./gpt_tf/"),
        ("notebook.ipynb", ".."),
    ],
)
def test_installing_cell_takes_what_is_beside_the_notebook(tmp_path, beside, source):
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).touch()
    said = run_installing_cell(tmp_path)
    assert said == f"pip install -q {source}[train,explain]\n"
    assert run_installing_cell(tmp_path, path=[ROOT]) == ""  # it is installed


# What they found


@pytest.mark.parametrize("name", [*list(TINY)[:4], "09_fit_to_browser"])
def test_two_quiet_cores_need_no_longer_than_the_tutorial_states(name):
    stated = re.search(r"\*\*Time:\*\* (\d+) minutes", first_cell(name, "markdown"))
    assert _results(name)["cpu_minutes"] / 2 <= int(stated[1])


def test_tutorial_1_the_int8_file_is_three_times_as_fast_and_nearly_as_good():
    found = _results("01_make_it_fast")
    speed = found["tokens_per_second"]
    assert found["size_mb"]["Keras"] > 500  # SmolLM2, not its stand-in
    assert speed["int8 file"] > 3 * speed["Keras"]
    assert found["size_mb"]["int8 file"] < 0.26 * found["size_mb"]["Keras"]
    assert found["perplexity_change_percent"]["int8 file"] < 3
    assert found["texts"]["float32 file"] == found["texts"]["Keras"]


def test_tutorial_2_beats_the_published_loss_and_augmentation_helps_every_seed():
    found = _results("02_train_with_fit")
    assert found["corpus"] == "shakespeare"
    assert found["nats_per_character"] < 1.75 < found["mark"] == 1.88
    pairs = zip(found["augmented"], found["plain"], strict=True)
    assert len(found["plain"]) == 3
    assert all(augmented < plain for augmented, plain in pairs)


def test_tutorial_3_strategies_matter_at_4_bits_and_qat_wins_there():
    found = _results("03_quantise")
    cost = found["strategy_cost_percent"]
    assert all(row["8"] < 1 for row in cost.values())
    assert cost["global_mean"]["4"] > 100 > 10 > cost["blockwise"]["4"]
    for name in ("output", "matrix", "32 weights"):
        name = f"4 bits, a scale per {name}"
        rounded, aware = found["rounded_percent"][name], found["qat_percent"][name]
        assert len(aware) == 3
        assert all(a < 0.7 * r for a, r in zip(aware, rounded, strict=True))
    perplexity = {name: row["perplexity"] for name, row in found["files"].items()}
    others = perplexity["int4"], perplexity["int4, float32 trained as long"]
    assert perplexity["float32"] < perplexity["int4, QAT"] < min(others)


def test_tutorial_4_distillation_wins_by_more_than_the_seeds_differ():
    found = _results("04_distil")
    alone = "teacher's layers, labels"
    taught = "teacher's layers, teacher's probabilities"
    labels, distilled = found["perplexity"][alone], found["perplexity"][taught]
    assert len(labels) == len(distilled) == 3
    difference = np.mean(labels) - np.mean(distilled)
    assert difference > max(np.ptp(labels), np.ptp(distilled), 0.05 * np.mean(labels))
    assert max(np.ptp(labels), np.ptp(distilled)) < 0.3
    fresh_labels, fresh_taught = (
        found["perplexity"][f"fresh weights, {source}"]
        for source in ("labels", "teacher's probabilities")
    )
    assert 3 * max(labels) < max(fresh_labels) < min(fresh_taught)
    assert min(found["agreement"][taught]) > max(found["agreement"][alone])
    assert max(found["divergence"][taught]) < min(found["divergence"][alone])
    assert found["step_ms"]["teacher, stored"] < found["step_ms"]["teacher, running"]


def test_tutorial_5_every_program_that_runs_a_file_writes_the_same_tokens():
    files = _results("05_export_and_run")["files"]
    assert set(files["float32"]["tokens"]) == {"Keras", "LiteRT, by hand", "EdgeGPT"}
    assert {"LiteRT-LM", "LiteRT-LM's server"} < set(files["dynamic_int8"]["texts"])
    for found in files.values():
        reference = found["tokens"]["EdgeGPT"]
        assert len(reference) >= 40
        assert all(tokens == reference for tokens in found["tokens"].values())
        assert len(set(found["texts"].values())) == 1


def test_tutorial_6_the_second_p95_lies_within_the_interval_of_the_first():
    found = _results("06_measure_and_choose")
    assert found["model"] == "smollm2"
    assert set(found["second_p95_ms"]) == {"dynamic_int8", "int4"}
    for mode, p95 in found["second_p95_ms"].items():
        low, high = found["interval_ms"][mode]
        assert low < found["first_p95_ms"][mode] < high
        assert low < p95 < high < 2 * low
    assert min(found["median_ms"].values()) > 1
    first, second = found["choices"]
    assert first == second is not None


def test_tutorial_7_shap_beats_the_nearest_tokens_and_attention_does_not():
    found = _results("07_explain")
    assert found["shap_over_nearest"]["low"] > 0
    assert found["attention_over_nearest"]["high"] < 0
    assert found["rank_correlation"]["high"] >= found["ceiling"]["low"]


def test_tutorial_8_the_losses_are_equal_and_the_memory_is_divided():
    found = _results("08_train_in_parallel")
    apart = found["apart"]
    other = apart.pop("other order")
    assert max(apart.values()) < 1e-3 < 0.01 < other
    whole = found["held_mb"]["one device"][0]
    assert found["held_mb"]["data"] == [whole] * 4
    assert max(found["held_mb"]["layers"]) < 0.6 * whole
    assert max(found["held_mb"]["weights"]) < 0.6 * whole
    assert all(curve == sorted(curve) for curve in found["predicted"].values())


def test_tutorial_8_shows_what_the_study_of_scaling_predicts():
    found = _results("08_train_in_parallel")
    path = ROOT / "benchmarks" / "results" / "scaling_model.json"
    study = json.loads(path.read_text("utf-8"))["study"]
    tokens = study["batch"] * study["model"]["context_length"]
    fast, slow = study["networks"].values()
    ways = (fast["best mix"], slow["best mix"], slow["data"])
    for way, curve in zip(ways, found["predicted"].values(), strict=True):
        assert [point["devices"] for point in way] == found["accelerators"]
        assert curve == [round(tokens / point["step_s"] / 1e3) for point in way]


def test_tutorial_9_the_browser_and_the_server_write_the_text_of_edge_gpt():
    found = _results("09_fit_to_browser")
    assert found["missing"] == []
    texts = found["texts"]
    assert set(texts) == {"Keras", "EdgeGPT", "desktop", "phone", "server"}
    assert len(texts["EdgeGPT"]) > 100
    assert all(texts[one] == texts["EdgeGPT"] for one in ("desktop", "phone", "server"))
    assert min(found["tokens_per_second"][one] for one in ("desktop", "phone")) > 100


def test_tutorial_9_the_file_is_small_and_as_good_as_the_keras_model():
    found = _results("09_fit_to_browser")
    assert found["size_mb"]["file"] < found["size_mb"]["Keras"] / 3
    assert -0.01 < found["increase"]["low"] <= found["increase"]["high"] < 0.01
    losses = found["loss"]["val_loss"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * found["uniform_loss"]


def test_tutorial_9_says_what_to_install_where_the_page_cannot_be_opened(
    corpus_folder, tmp_path
):
    name = "09_fit_to_browser"
    nothing = {"browser": None, "node_modules": str(tmp_path / "none")}
    parameters = TINY[name] | {"corpus": str(corpus_folder)} | nothing
    changes = [f"--set={key}={value}" for key, value in parameters.items()]
    result = run_execute(name, *changes, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
    assert_shows_a_good_run(notebook)
    last = [output.get("text", "") for output in outputs_of(notebook)][-2]
    assert "Missing: " in last and "Chromium" in last
    assert f"{install_command()} playwright-core" in last


# execute.py


@pytest.fixture
def house(tmp_path):
    """A checkout with `execute.py` and the tutorials that a test writes there."""
    (tmp_path / "gpt_tf").symlink_to(ROOT / "gpt_tf")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "execute.py").write_bytes((NOTEBOOKS / "execute.py").read_bytes())
    return folder


def test_a_failing_cell_stops_and_leaves_the_old_notebook(house):
    tutorial = '# %%\nprint("began")\n\n# %%\nraise ValueError("on purpose")\n'
    (house / "07_fails.py").write_text(tutorial, "utf-8")
    (house / "07_fails.ipynb").write_text("old", "utf-8")
    result = run_execute(folder=house)
    assert result.returncode == 1
    assert "07_fails failed" in result.stderr
    assert "on purpose" in result.stderr
    assert (house / "07_fails.ipynb").read_text("utf-8") == "old"
    names = sorted(path.name for path in house.glob("*07*"))
    assert names == ["07_fails.ipynb", "07_fails.py"]


def test_kernel_is_this_python_and_the_same_run_gives_the_same_bytes(house):
    tutorial = (
        '# %% tags=["parameters"]\nnumber = 1\n\n'
        "# %%\nimport sys\n\nprint(sys.executable, number)\n"
    )
    (house / "07_python.py").write_text(tutorial, "utf-8")
    written = []
    for out in ("once", "again"):
        result = run_execute("--set", "number=2", "--out", house / out, folder=house)
        assert result.returncode == 0, result.stderr
        written.append((house / out / "07_python.ipynb").read_bytes())
    notebook = nbformat.reads(written[0].decode("utf-8"), as_version=4)
    assert outputs_of(notebook)[0].text == f"{sys.executable} 2\n"
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "stepz=4", "--out", "{out}"], r"parameters are .*prompt.*stepz"),
        (["--set", "steps=4"], "--set expects --out"),
        (["02_no_such"], "tutorials are .*02_no_such"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path, arguments, message):
    result = run_execute(*(text.format(out=tmp_path) for text in arguments))
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
