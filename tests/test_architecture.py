"""The house stands as it was drawn: who imports whom, and what loads what."""

import email
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpt_tf

ROOT = Path(__file__).parent.parent
HEAVY = (
    "keras",
    "keras_hub",
    "keras_nlp",
    "tensorflow",
    "tensorflow_model_optimization",
    "tf_keras",
)
# What a device needs, and the command line that installs without TensorFlow.
LIGHT = (
    "gpt_tf",
    "gpt_tf.cli",
    "gpt_tf.export.integrity",
    "gpt_tf.export.signatures",
    "gpt_tf.generation.conversation",
    "gpt_tf.generation.sequence",
    "gpt_tf.generation.sampler",
    "gpt_tf.quantization.weights",
    "gpt_tf.text.augment",
    "gpt_tf.text.corpus",
    "gpt_tf.text.tokenizer",
    "gpt_tf.edge",
)
LINT = (
    "import sys; from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports(no_cache=True))"
)


def run_python(code, folder=ROOT):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )


def answer_of(code, folder=ROOT):
    """Run code in a fresh interpreter and return the JSON that it prints last."""
    result = run_python(code, folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def loaded_by(modules, folder=ROOT):
    """The first module that brings each heavy package into `sys.modules`."""
    return answer_of(
        "import importlib, json, sys\n"
        "found = {}\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    for name in {HEAVY!r}:\n"
        "        if name in sys.modules:\n"
        "            found.setdefault(name, module)\n"
        "print(json.dumps(found))",
        folder,
    )


def copy_house(folder):
    """Copy the package and its settings, to be changed."""
    shutil.copytree(
        ROOT / "gpt_tf", folder / "gpt_tf", ignore=shutil.ignore_patterns("*.pyc")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_import_contracts_hold():
    result = run_python(LINT)
    assert result.returncode == 0, result.stdout + result.stderr


# A file, a line for it, and the contract that it breaks.
FORBIDDEN = [
    ("models/gpt.py", "import gpt_tf.training.loop", "run downwards"),
    ("elsewhere.py", "", "run downwards"),
    ("edge/runtime.py", "import tensorflow", "device needs"),
]


def test_an_import_against_the_drawing_breaks_a_contract(tmp_path):
    house = copy_house(tmp_path)
    for path, line, _ in FORBIDDEN:
        with (house / "gpt_tf" / path).open("a") as stream:
            stream.write(f"\n{line}\n")
    result = run_python(LINT, house)
    assert result.returncode == 1, result.stdout + result.stderr
    for path, line, contract in FORBIDDEN:
        said = result.stdout.rpartition(contract)[2]
        module = "gpt_tf." + path.removesuffix(".py").replace("/", ".")
        imported = line.rpartition("import ")[2]
        assert (f"{module} -> {imported} (" if imported else f"- {module}\n") in said


@pytest.mark.parametrize("room", sorted(ROOT.glob("gpt_tf/*/__init__.py")))
def test_every_room_is_on_the_map_of_the_code(room):
    assert f"| `{room.parent.name}` |" in (ROOT / "docs/code.md").read_text("utf-8")


def test_json_is_read_and_written_in_one_place():
    calls = re.compile(r"\bjson\.(dumps?|loads?|JSON)|(import|from) json\b")
    found = {
        path.relative_to(ROOT / "gpt_tf").as_posix()
        for path in ROOT.glob("gpt_tf/**/*.py")
        if calls.search(path.read_text("utf-8"))
    }
    # The process that renders chat templates imports nothing of the package.
    assert found == {"artifacts.py", "text/template_process.py"}


def test_imports_without_tensorflow():
    assert loaded_by(LIGHT) == {}


def test_the_import_check_notices_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").touch()
    (tmp_path / "late.py").write_text("import tensorflow")
    assert loaded_by(("json", "late"), tmp_path) == {"tensorflow": "late"}


@pytest.mark.parametrize("name", gpt_tf.__all__)
def test_every_public_name_resolves(name):
    assert getattr(gpt_tf, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GPTModle'"):
        gpt_tf.GPTModle  # noqa: B018


@pytest.mark.parametrize(
    ("public", "package", "extra"),
    [("GPTModel", "tensorflow", "train"), ("EdgeGPT", "ai_edge_litert", "edge")],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    public, package, extra
):
    code = (
        "import json, sys\n"
        f"sys.modules['{package}'] = None\n"
        "import gpt_tf\n"
        "try:\n"
        f"    gpt_tf.{public}\n"
        "except ModuleNotFoundError as error:\n"
        "    print(json.dumps([error.name, str(error)]))"
    )
    name, message = answer_of(code)
    assert name == package
    assert f"`gpt_tf.{public}`" in message and f"gpt-tf[{extra}]" in message


def test_setup_reads_the_version_without_importing_and_needs_no_tensorflow(tmp_path):
    house = copy_house(tmp_path)
    with (house / "gpt_tf/__init__.py").open("a") as stream:
        stream.write('\nraise RuntimeError("setup.py imported the package")\n')
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info"],
        cwd=house,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    built = house / "gpt_tf.egg-info"
    about = email.message_from_string((built / "PKG-INFO").read_text("utf-8"))
    base, *extras = (built / "requires.txt").read_text("utf-8").split("\n[")
    base = base.lower().split()
    assert about["Version"] == gpt_tf.__version__
    assert any("\ntensorflow<" in extra for extra in extras)
    assert any(need.startswith("tokenizers") for need in base)
    assert not [need for need in base if need.startswith(("tensor", "tf", "k"))]
