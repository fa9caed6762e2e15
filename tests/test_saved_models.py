"""The models that the repository brings along load, and know what they learnt."""

import functools
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tf_keras as keras

import gpt_tf
from gpt_tf import artifacts, bundled_model
from gpt_tf.errors import InputError

FOLDER = Path(__file__).parent.parent / "saved_models"
pytestmark = pytest.mark.usefixtures("eagerly")

SNIPPET = """
class Reader:
    def __init__(self, path):
        self.path = path

    def read(self):
        with open(self.path) as file:
            return file.read()
"""


@functools.cache
def load(name):
    return gpt_tf.load_model(FOLDER / name)


@pytest.fixture(
    scope="module",
    params=[path.parent.name for path in sorted(FOLDER.glob("*/manifest.json"))],
)
def saved(request):
    return load(request.param)


def loss_of(model, ids):
    logits = model(np.array([ids[:-1]]), training=False)[0]  # (T, V)
    return (
        keras.losses.sparse_categorical_crossentropy(ids[1:], logits, from_logits=True)
        .numpy()
        .mean()
    )


def test_it_expects_python_and_not_python_backwards(saved):
    model, tokenizer = saved
    ids = tokenizer.encode(SNIPPET)
    blind = np.log(tokenizer.vocab_size)
    assert loss_of(model, ids) < 0.5 * blind
    assert loss_of(model, ids[::-1]) > 0.8 * blind


def test_it_closes_a_bracket_and_goes_on(saved, traced):
    model, tokenizer = saved
    text = gpt_tf.generate(
        model,
        "class Reader:\n    def read(self",
        tokenizer=tokenizer,
        max_new_tokens=12,
        temperature=0,
    )
    assert "):\n        " in text


@pytest.mark.parametrize(
    # A file that was trained on for integers is not its folder's model to the last.
    ("name", "furthest"),
    [("python-small", 0.02), ("python-student", 0.15)],
)
def test_its_file_predicts_what_its_model_predicts(name, furthest):
    model, tokenizer = load(name)
    ids = tokenizer.encode(SNIPPET)
    with gpt_tf.EdgeGPT(FOLDER / f"{name}.litertlm") as gpt:
        loss = -gpt.score(ids).mean()
        backwards = -gpt.score(ids[::-1]).mean()
    assert abs(loss - loss_of(model, ids)) < furthest
    assert backwards > 0.8 * np.log(tokenizer.vocab_size)


def manifests():
    for path in sorted(FOLDER.iterdir()):
        if path.name.startswith("_"):
            continue  # Python's own
        if path.is_dir():
            yield path.name, artifacts.check_manifest(path, "model")
        elif path.suffix == ".litertlm":
            yield path.name, artifacts.check_file_manifest(path)


def test_there_are_a_teacher_its_student_and_their_files_and_they_are_small():
    assert [name for name, _ in manifests()] == [
        *("python-small", "python-small.litertlm"),
        *("python-student", "python-student.litertlm"),
    ]
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 15e6


def test_each_says_by_which_commands_it_was_made_and_what_was_measured():
    found = dict(manifests())
    for name, manifest in found.items():
        assert all(line.startswith("gpt-tf ") for line in manifest["commands"]), name
        assert manifest["commands"][0].startswith("gpt-tf train --corpus python-stdlib")
        assert manifest["measured"]["inter_token_latency_ms"]["median"] > 0, name
        assert manifest["versions"]["python"]
    losses = {name: m["measured"]["perplexity"] for name, m in found.items()}
    assert losses["python-student.litertlm"] < 1.03 * losses["python-small"]


def test_the_commands_are_those_that_would_make_them_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module("make")
    stated = {name: manifest["commands"] for name, manifest in manifests()}
    trained = {run: f"gpt-tf {line} --out {run}" for run, line in made.TRAINING.items()}
    for name, run in made.FOLDERS.items():
        assert stated[name][-1] == trained[run]
    for name, (run, mode) in made.FILES.items():
        assert stated[name][-2] == trained[run]
        assert f"--mode {mode} " in stated[name][-1]


def test_the_readme_states_what_the_manifests_state(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module("make")
    assert made.table(dict(manifests())) in (FOLDER / "README.md").read_text("utf-8")


def test_the_first_sentence_needs_no_model_and_no_tensorflow():
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys\n"
            "sys.modules['tensorflow'] = None\n"
            "from gpt_tf import cli\n"
            "sys.argv = ['gpt-tf', 'generate', '--prompt', 'def', '--seed', '1']\n"
            "cli.main()\n",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def") and len(result.stdout) > 20


def test_a_wheel_brings_the_shipped_model_and_the_reports_templates(tmp_path):
    root = FOLDER.parent
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "gpt_tf", tmp_path / "gpt_tf")
    (tmp_path / "saved_models").mkdir()
    for path in FOLDER.glob("python-*.litertlm*"):
        shutil.copy(path, tmp_path / "saved_models")
    shutil.copytree(FOLDER / "python-small", tmp_path / "saved_models/python-small")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    built = tmp_path / "built" / "gpt_tf" / "saved_models"
    names = ("python-student.litertlm", "python-small.litertlm")
    small = [
        f"python-small/{path.name}" for path in (FOLDER / "python-small").iterdir()
    ]
    assert bundled_model.NAME in names and "python-small/model.keras" in small
    for name in (*names, *(f"{name}.json" for name in names), *small):
        assert (built / name).read_bytes() == (FOLDER / name).read_bytes()
    reporting = root / "gpt_tf" / "reporting"
    shown = [path for path in reporting.rglob("*") if path.suffix in (".j2", ".css")]
    assert len(shown) > 3
    for path in shown:
        assert (tmp_path / "built" / path.relative_to(root)).is_file()


def test_a_missing_shipped_model_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(
        bundled_model, "__file__", str(tmp_path / "gpt_tf" / "shipped.py")
    )
    with pytest.raises(InputError, match="--model"):
        bundled_model.shipped_model()
