"""The tutorials run, and the notebooks that are kept show what they did."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
TUTORIALS = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.py"))
TINY = {
    "01_train_and_generate": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "steps": 4,
        "validate_every": 2,
        "max_new_tokens": 12,
    },
    "02_quantise_and_export": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 32,
        "num_layers": 1,
        "num_heads": 2,
        "steps": 10,
        "qat_steps": 4,
        "num_windows": 4,
        "max_new_tokens": 8,
    },
    "03_distil": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 16,
        "num_layers": 2,
        "student_layers": 1,
        "num_heads": 2,
        "steps": 10,
        "student_steps": 5,
        "max_new_tokens": 8,
    },
    "04_train_in_parallel": {
        "vocab_size": 300,
        "context_length": 16,
        "batch_size": 8,
        "embedding_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "steps": 4,
        "steps_per_epoch": 2,
        "timed_rounds": 1,
    },
}
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


def sources_of(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs_of(notebook):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def assert_shows_a_good_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not LOG_NOISE.search("".join(output.get("text", "") for output in outputs))


@pytest.fixture
def house(tmp_path):
    """A checkout with `execute.py` and the tutorials that a test writes there."""
    (tmp_path / "gpt_tf").symlink_to(ROOT / "gpt_tf")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "execute.py").write_bytes((NOTEBOOKS / "execute.py").read_bytes())
    return folder


def test_every_tutorial_has_tiny_parameters():
    assert TUTORIALS
    assert set(TUTORIALS) == set(TINY)


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_runs_from_top_to_bottom(name, corpus_folder, tmp_path):
    parameters = {"corpus": str(corpus_folder), **TINY[name]}
    changes = [f"--set={key}={value}" for key, value in parameters.items()]
    result = run_execute(name, *changes, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert_shows_a_good_run(nbformat.read(tmp_path / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", TUTORIALS)
def test_kept_notebook_has_the_cells_of_its_source(name):
    source = jupytext.read(NOTEBOOKS / f"{name}.py")
    kept = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert sources_of(kept) == sources_of(source)
    assert kept.metadata.jupytext.formats == "ipynb,py:percent"


@pytest.mark.parametrize("name", TUTORIALS)
def test_kept_notebook_shows_a_good_run(name):
    assert_shows_a_good_run(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", TUTORIALS)
def test_kept_notebook_names_no_path_of_a_machine(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            # The letters of an encoded picture may look like anything.
            output.get("data", {}).pop("image/png", None)
    assert not MACHINE_PATH.search(nbformat.writes(notebook))


@pytest.mark.parametrize(
    "text", ["in /home/me/gpt", '"/tmp/x"', "File:/opt/me/a.py", r"C:\Users\me"]
)
def test_paths_of_machines_are_recognised(text):
    assert MACHINE_PATH.search(json.dumps(text))
    assert not MACHINE_PATH.search("runs/work/home/ and https://a.example/home/")


def test_a_failing_cell_stops_and_leaves_the_old_notebook(house):
    tutorial = '# %%\nprint("began")\n\n# %%\nraise ValueError("on purpose")\n'
    (house / "07_fails.py").write_text(tutorial, "utf-8")
    (house / "07_fails.ipynb").write_text("old", "utf-8")
    result = run_execute(folder=house)
    assert result.returncode == 1
    assert "07_fails failed" in result.stderr
    assert "on purpose" in result.stderr
    assert (house / "07_fails.ipynb").read_text("utf-8") == "old"
    assert sorted(path.name for path in house.glob("*07*")) == [
        "07_fails.ipynb",
        "07_fails.py",
    ]


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
        (["--set", "stepz=4", "--out", "{out}"], r"parameters are .*steps.*stepz"),
        (["--set", "steps", "--out", "{out}"], "expected name=value"),
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
