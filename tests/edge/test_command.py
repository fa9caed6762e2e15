"""`gpt-tf generate` on exported files."""

import json
import subprocess
import sys

import pytest

import gpt_tf

CODE = """
import json, sys
from gpt_tf import cli
try:
    cli.main()
finally:
    heavy = {"tensorflow", "tf_keras"} & set(sys.modules)
    print("\\0", json.dumps(sorted(heavy)))
"""


def run(*options):
    """Run `gpt-tf generate`; return status, output, errors and what it imported."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, "generate", *map(str, options)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1"},
    )
    output, _, imported = result.stdout.rpartition("\0")
    return result.returncode, output.rstrip("\n"), result.stderr, json.loads(imported)


@pytest.mark.parametrize("kind", ["tflite", "litertlm"])
def test_it_continues_a_prompt_without_tensorflow(exported, kind):
    options = {"max_new_tokens": 30, "seed": 7, "temperature": 0.8}
    expected = gpt_tf.generate(
        exported.model, "abc", tokenizer=exported.tokenizer, **options
    )
    status, output, errors, imported = run(
        *("--model", getattr(exported, kind), "--prompt", "abc"),
        *("--max-new-tokens", 30, "--seed", 7),
    )
    assert (status, errors, imported) == (0, "", [])
    assert output == f"abc{expected}"


def test_a_file_it_cannot_use_is_one_line_and_status_2(copied, tmp_path):
    path = copied("tflite")
    status, output, errors, imported = run("--model", path, "--prompt", "abc")
    assert (status, output, imported) == (2, "", [])
    assert errors.startswith("gpt-tf: Expected tokenizer.json") and str(path) in errors
    path.write_bytes(path.read_bytes()[:-1])
    status, output, errors, imported = run("--model", path, "--prompt", "abc")
    assert (status, output, imported) == (2, "", [])
    assert errors.count("\n") == 1 and str(path) in errors
