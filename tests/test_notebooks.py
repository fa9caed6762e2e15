"""The tutorials run, and the notebooks that are kept show what they did."""

import os
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
    "01_text_and_tokens": {
        **SMALL,
        **{"other_vocab_sizes": (257, 280), "num_layers": 1, "embedding_dim": 16},
        **{"steps": 4, "validate_every": 2, "max_new_tokens": 12},
    },
    "02_train_in_parallel": {
        **{"vocab_size": 300, "context_length": 16, "batch_size": 8},
        **{"embedding_dim": 16, "num_layers": 2, "num_heads": 4},
        **{"steps": 4, "steps_per_epoch": 2, "timed_rounds": 1},
    },
    "03_quantise": {
        **SMALL,
        **{"num_layers": 1, "qat_steps": 4, "bits_to_try": (8, 4), "num_windows": 4},
    },
    "04_distil": {
        **SMALL,
        **{"embedding_dim": 16, "student_layers": 1, "student_steps": 5},
        "max_new_tokens": 8,
    },
    "05_export_and_run": {**SMALL, "max_new_tokens": 8},
    "06_measure_and_choose": {
        **SMALL,
        **{"students": (1,), "student_steps": 4, "modes": ("dynamic_int8",)},
        **{"evaluated_tokens": 400, "prompt_tokens": 4, "new_tokens": 4},
        "repetitions": 1,
    },
    "07_explain": {"num_prompts": 50, "prompt_tokens": 4, "num_samples": 10},
}
# They train, quantise or explain several models each.
LONG = ("02_train_in_parallel", "03_quantise", "04_distil", "07_explain")
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
    parameters = {"corpus": str(corpus_folder), **TINY[name]}
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


def run_installing_cell(folder, answer="", path=()):
    """Run the first cell beside a pip that only says what it was asked for.

    The Python that runs it knows no installed packages (`-S`), as in Colab.
    """
    stand_in = folder / "stand-in"
    stand_in.mkdir(parents=True, exist_ok=True)
    (stand_in / "pip.py").write_text('import sys\n\nprint("pip", sys.argv[1:])\n')
    places = [str(stand_in), *map(str, path)]
    result = subprocess.run(
        [sys.executable, "-S", "-c", first_cell(TUTORIALS[0], "code")],
        cwd=folder,
        input=answer,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# In the second, `import gpt_tf` finds something: an empty namespace.
@pytest.mark.parametrize(
    ("clone", "place"), [("clone", "clone/notebooks"), ("content/gpt_tf", "content")]
)
def test_installing_cell_takes_the_clone_that_is_there(tmp_path, clone, place):
    clone = tmp_path / clone
    (clone / "gpt_tf").mkdir(parents=True)
    (clone / "gpt_tf" / "__init__.py").touch()
    wanted = f"gpt-tf[train,explain] @ {clone.resolve().as_uri()}"
    said = run_installing_cell(tmp_path / place)
    assert said == f"pip {['install', '--quiet', wanted]}\n"
    # What is installed is left alone.
    assert run_installing_cell(tmp_path / place, path=[clone]) == ""


def test_installing_cell_asks_for_an_address_where_there_is_no_clone(tmp_path):
    said = run_installing_cell(tmp_path, "https://a.example/gpt_tf.git\n")
    assert "@ git+https://a.example/gpt_tf.git'" in said
    assert len({first_cell(name, "code") for name in TUTORIALS}) == 1


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
        (["--set", "stepz=4", "--out", "{out}"], r"parameters are .*steps.*stepz"),
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
