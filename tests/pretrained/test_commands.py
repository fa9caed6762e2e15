"""Every command, straight on a Hugging Face folder whose context is a short one."""

import pytest

from gpt_tf.training.run_folder import began_elsewhere, read_run
from tests.pretrained.folders import CONTEXT, random_tensors, write_folder
from tests.pretrained.gguf_writer import config_of, small_tokenizer

pytestmark = pytest.mark.usefixtures("eagerly")
TRAIN = "--steps 1 --batch-size 8 --validate-every 1 --strategy one_device".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = config_of("llama")
    folder = tmp_path_factory.mktemp("commands") / "llama"
    write_folder(folder, config, random_tensors(config))
    small_tokenizer().save(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--init-from"),
        ("quantize", "--model"),
        ("distil", "--student-layers", "1", "--teacher"),
    ],
    ids=lambda words: words[0],
)
def test_windows_are_no_longer_than_the_context(
    command, folder, corpus_folder, tmp_path, words
):
    words = (*words, folder, *TRAIN, "--corpus", corpus_folder, "--out")
    result = command(*words, tmp_path / "run")
    assert result.status == 0, result.err
    assert read_run(tmp_path / "run").context_length == CONTEXT
    assert began_elsewhere(tmp_path / "run")
    longer = command(*words, tmp_path / "longer", "--context-length", CONTEXT + 1)
    assert longer.status == 2
    assert "`--context-length`" in longer.err and f"at most {CONTEXT}" in longer.err


def test_a_run_of_ours_is_gone_on_from_with_its_windows(command, trained, tmp_path):
    words = ("--init-from", trained.out, "--out", tmp_path / "run")
    texts = ("--corpus", read_run(trained.out).corpus)
    result = command("train", *words, *TRAIN, *texts)
    assert result.status == 0, result.err
    assert read_run(tmp_path / "run").context_length == 32
    assert not began_elsewhere(tmp_path / "run")


def test_other_commands_take_it_as_it_is(command, folder, corpus_folder, tmp_path):
    file = tmp_path / "gpt.litertlm"
    prompt = ("--prompt", "the quick brown fox")
    for words in (
        ("export", "--model", folder, "--out", file),
        ("generate", "--model", folder, *prompt, "--max-new-tokens", 60),
        ("explain", folder, *prompt, "--samples", 32),
        ("evaluate", file, "--reference", folder, "--corpus", corpus_folder)
        + ("--max-tokens", 100),
    ):
        result = command(*words)
        assert result.status == 0, result.err
    assert "perplexity" in result.out


def test_its_weights_are_prepared_before_they_are_rounded(
    command, folder, trained, tmp_path, notices
):
    def written(model, name, *words):
        file = tmp_path / name
        notices.clear()
        result = command("export", "--model", model, "--out", file, *words)
        assert result.status == 0, result.err
        said = " ".join(notices)
        return file.read_bytes(), "equalising" in said, "GPTQ" in said

    data, *steps = written(folder, "usual.litertlm")
    assert steps == [True, False]
    again, *steps = written(folder, "said.litertlm", "--prepare")
    assert again == data and steps == [True, False]
    # Random weights have no large channels: there is nothing to even out.
    plain, *steps = written(folder, "plain.litertlm", "--no-prepare")
    assert plain == data and steps == [False, False]
    assert written(folder, "half.litertlm", "--mode", "float16")[1:] == (False, False)
    # A model of ours is rounded to the nearest, as it was trained to be.
    data, *steps = written(trained.out, "ours.litertlm", "--mode", "int4")
    assert steps == [False, False]
    words = ("--mode", "int4", "--prepare")
    prepared, *steps = written(trained.out, "prepared.litertlm", *words)
    assert len(prepared) == len(data) and prepared != data and steps == [True, True]
