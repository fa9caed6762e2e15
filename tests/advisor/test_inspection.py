"""What `gpt-tf inspect` says, and that it is what happens later."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt_tf.advisor.inspection import inspect_source, print_inspection
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models import sizes
from tests.pretrained.folders import shapes_of, write_folder

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "saved_models"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 5000,
}


@pytest.fixture
def llama(tmp_path):
    """Write a Llama's folder, of zeros."""
    zeros = {n: np.zeros(s, np.float16) for n, s in shapes_of(LLAMA).items()}
    return write_folder(tmp_path / "small llama", LLAMA, zeros)


def reasons(found):
    return {use["what"]: use["why"] for use in found["uses"]}


def test_a_folder_is_described_from_its_configuration_and_shapes(llama):
    found = inspect_source(llama)
    assert (found["format"], found["family"]) == ("huggingface", "llama")
    assert found["stored_types"] == ["F16"]
    assert found["size_bytes"] == (llama / "model.safetensors").stat().st_size
    assert found["parameters"] == sizes.count_parameters(found["config"])
    assert found["memory_bytes"]["open"] == 4 * found["parameters"]
    assert found["tokenizer"] is None


def test_what_cannot_be_done_is_said_in_the_words_that_refuse_it(llama):
    found = inspect_source(llama)
    why = reasons(found)
    with pytest.raises(InputError) as refused:
        sizes.refuse_mesh(found["config"])
    assert why["train on a mesh"] == str(refused.value)
    assert "32" in why["export int4"]  # the feed-forward's width is 48
    assert why["export dynamic_int8"] is None
    assert why["generate, evaluate, explain"] is not None
    assert "--template" in why["chat"]


def test_the_first_command_names_the_folder_and_shortens_a_long_context(llama):
    command = inspect_source(llama)["begin"]
    assert f"'{llama}'" in command
    assert "--context-length" in command and command.endswith(".tflite'")


@pytest.mark.parametrize("name", ["python-small", "python-small.litertlm"])
def test_what_gpt_tf_wrote_is_described(name):
    found = inspect_source(SAVED / name)
    assert found["family"] == "gpt2"
    assert found["tokenizer"] == {"kind": "bpe", "vocab_size": 1024}
    can_train = "train, distil, quantise" in reasons(found)
    assert can_train == (name == "python-small")


def test_it_is_printed_whole(llama, capsys):
    print_inspection(inspect_source(llama))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("llama", "begin with: gpt-tf export", "no"))


def test_tensors_that_do_not_fit_are_refused_without_a_model(llama):
    config = {**LLAMA, "intermediate_size": 50}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError, match="50"):
        inspect_source(llama)


@pytest.mark.parametrize("name", ["nothing", "notes.txt"])
def test_what_cannot_be_opened_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(InputError):
        inspect_source(tmp_path / name)


def test_the_command_prints_json_and_needs_no_tensorflow(llama):
    code = (
        "import sys; sys.argv = ['gpt-tf', 'inspect', sys.argv[1], '--json']\n"
        "import atexit, gpt_tf.cli\n"
        "atexit.register(lambda: print('tensorflow' in sys.modules, file=sys.stderr))\n"
        "gpt_tf.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, llama], capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(done.stdout)["family"] == "llama"
    assert done.stderr.strip() == "False"
