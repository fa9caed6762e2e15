"""The programs on the page of other languages."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt_tf.edge import EdgeGPT

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/how_to/other_languages.md"
MODEL = ROOT / "saved_models/python-small.litertlm"
COMPILER = shutil.which("g++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_the_program_in_cpp_writes_what_python_writes(tmp_path):
    litert_lm = pytest.importorskip("litert_lm")
    folder = Path(litert_lm.__path__[0])
    (code,) = re.findall(r"^```cpp\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "generate.cc").write_text(code)
    flags = ["-std=c++17", "-Wall", "-Werror", "generate.cc", "-o", "generate"]
    library = [folder / "liblitert-lm.so", f"-Wl,-rpath,{folder}"]
    subprocess.run([COMPILER, *flags, *library], cwd=tmp_path, check=True)
    prompt = "    def __init__(self"
    done = subprocess.run(
        [tmp_path / "generate", MODEL, prompt, "24"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with EdgeGPT(MODEL) as gpt:
        expected = gpt.generate(prompt, max_new_tokens=24, temperature=0)
    assert done.stdout == expected
    shown = re.search(r"^\$ \./generate .*\n((?:.*\n)*?)```", PAGE.read_text(), re.M)
    assert shown[1] == expected + "\n"
    wrong = subprocess.run(
        [tmp_path / "generate", tmp_path / "none", "x"], capture_output=True
    )
    assert wrong.returncode == 1
