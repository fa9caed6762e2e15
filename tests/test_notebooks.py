"""The tutorials run, and the notebooks that are kept show what they did."""

import json
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
TINY = {
    "01_text_and_tokens": {
        "vocab_size": 300,
        "other_vocab_sizes": (257, 280),
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "steps": 4,
        "validate_every": 2,
        "jit_compile": "off",
        "max_new_tokens": 12,
    },
    "02_train_in_parallel": {
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
    "03_quantise": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 32,
        "num_layers": 1,
        "num_heads": 2,
        "steps": 10,
        "qat_steps": 4,
        "bits_to_try": (8, 4),
        "num_windows": 4,
        "jit_compile": "off",
    },
    "04_distil": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 16,
        "num_layers": 2,
        "student_layers": 1,
        "num_heads": 2,
        "steps": 10,
        "student_steps": 5,
        "jit_compile": "off",
        "max_new_tokens": 8,
    },
    "05_export_and_run": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "steps": 10,
        "jit_compile": "off",
        "max_new_tokens": 8,
    },
    "06_measure_and_choose": {
        "vocab_size": 300,
        "context_length": 32,
        "batch_size": 4,
        "embedding_dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "steps": 10,
        "jit_compile": "off",
        "students": (1,),
        "student_steps": 4,
        "modes": ("dynamic_int8",),
        "evaluated_tokens": 400,
        "prompt_tokens": 4,
        "new_tokens": 4,
        "repetitions": 1,
    },
    "07_explain": {
        "num_prompts": 50,
        "prompt_tokens": 4,
        "num_samples": 10,
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


def read_tutorial(name):
    return jupytext.read(NOTEBOOKS / f"{name}.py")


def first_cell(name, cell_type):
    cells = read_tutorial(name).cells
    return next(cell.source for cell in cells if cell.cell_type == cell_type)


def index_rows():
    """Return title and row of every tutorial in the index, by the notebook's name."""
    text = (NOTEBOOKS / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d) \| \[(.+?)\]\((\w+)\.ipynb\) (.+)$", text, re.M)
    return {name: (number, title, rest) for number, title, name, rest in rows}


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


def make_clone(folder):
    (folder / "gpt_tf").mkdir(parents=True)
    (folder / "gpt_tf" / "__init__.py").touch()
    return folder


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


# They train several models each, and run one after another.
LONG = ("02_train_in_parallel", "04_distil")


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
def test_tutorial_opens_with_its_end_and_the_articles_chapter(name):
    opening = first_cell(name, "markdown")
    assert opening.startswith(f"# {int(name[:2])}. ")
    end, article = (
        opening.index(words)
        for words in ("**At the end you will have**", "**The article**")
    )
    assert end < article
    assert re.search(r"chapter \d\.\d", opening[article:])


@pytest.mark.parametrize("name", TUTORIALS)
def test_index_has_the_tutorial_with_its_title_and_chapter(name):
    number, title, rest = index_rows()[name]
    opening = first_cell(name, "markdown")
    assert opening.splitlines()[0] == f"# {number}. {title}"
    # A chapter that the index names is one that the tutorial names.
    for chapter in re.findall(r"\d\.\d", rest):
        assert chapter in opening


def test_index_lists_seven_tutorials_in_order():
    assert [number for number, *_ in index_rows().values()] == list("1234567")
    assert all(name.startswith(f"0{row[0]}_") for name, row in index_rows().items())


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_tutorial_begins_with_the_same_installing_cell(name):
    assert first_cell(name, "code") == first_cell(TUTORIALS[0], "code")


def test_installing_cell_takes_the_clone_that_the_notebook_lies_in(tmp_path):
    clone = make_clone(tmp_path / "clone")
    wanted = f"gpt-tf[train,explain] @ {clone.resolve().as_uri()}"
    said = run_installing_cell(clone / "notebooks")
    assert said == f"pip {['install', '--quiet', wanted]}\n"


def test_installing_cell_takes_a_clone_beside_the_notebook(tmp_path):
    # Its name makes `import gpt_tf` find something there: an empty namespace.
    clone = make_clone(tmp_path / "content" / "gpt_tf")
    said = run_installing_cell(tmp_path / "content")
    assert f"gpt-tf[train,explain] @ {clone.resolve().as_uri()}" in said


def test_installing_cell_asks_for_an_address_where_there_is_no_clone(tmp_path):
    said = run_installing_cell(tmp_path, "https://a.example/gpt_tf.git\n")
    assert "@ git+https://a.example/gpt_tf.git'" in said


def test_installing_cell_leaves_an_installed_package_alone(tmp_path):
    clone = make_clone(tmp_path / "clone")
    assert run_installing_cell(clone / "notebooks", path=[clone]) == ""


@pytest.mark.parametrize("name", TUTORIALS)
def test_kept_notebook_has_the_cells_of_its_source(name):
    source = read_tutorial(name)
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
