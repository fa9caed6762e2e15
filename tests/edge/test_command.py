"""`gpt-tf generate` on exported files."""

import json
import subprocess
import sys

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


def test_it_continues_a_prompt_without_tensorflow(gpt, exported):
    status, output, errors, imported = run(
        *("--model", exported.tflite, "--prompt", "abc"),
        *("--max-new-tokens", 30, "--seed", 7),
    )
    assert (status, errors, imported) == (0, "", [])
    expected = gpt.generate("abc", max_new_tokens=30, seed=7, temperature=0.8)
    assert output == f"abc{expected}"


def test_a_file_it_cannot_use_is_one_line_and_status_2(copied, command):
    path = copied("tflite")
    status, output, errors, imported = run("--model", path, "--prompt", "abc")
    assert (status, output, imported) == (2, "", [])
    assert errors.startswith("gpt-tf: Expected tokenizer.json") and str(path) in errors
    path.write_bytes(path.read_bytes()[:-1])
    result = command("generate", "--model", path, "--prompt", "abc")
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1 and str(path) in result.err
