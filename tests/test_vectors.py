"""The test vectors hold here, and in the scripts for browsers."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "vectors"
SCRIPTS = Path(__file__).parents[1] / "gpt_tf/edge/web"
NODE = shutil.which("node")

spec = importlib.util.spec_from_file_location("vectors", FOLDER / "make.py")
vectors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vectors)


def stored(name):
    return json.loads((FOLDER / name).read_text("utf-8"))


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", ["sampling.json", "detokenizing.json"])
def test_python_computes_the_vectors(name):
    assert as_json(vectors.VECTORS[name]()) == stored(name)


def test_the_bundled_model_computes_its_vectors():
    found, expected = as_json(vectors.model()), stored("model.json")
    for one, other in zip(found["prompts"], expected["prompts"], strict=True):
        # Another CPU rounds otherwise; ids of nearly equal logits may change places.
        logits = [[logit for _, logit in x.pop("most_likely")] for x in (one, other)]
        assert logits[0] == pytest.approx(logits[1], abs=0.1)
        assert one == other


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_javascript_computes_the_vectors(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "web")
    checked = subprocess.run(
        [NODE, FOLDER / "check.mjs", tmp_path / "web"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(checked.stdout)
    assert found == {
        "sampling": stored("sampling.json"),
        "detokenizing": stored("detokenizing.json"),
    }
