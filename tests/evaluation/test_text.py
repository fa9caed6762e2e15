"""Text to judge by is text that training did not see."""

import shutil

import numpy as np
import pytest

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.text import HeldOutText, held_out_text, is_run
from gpt_tf.text.corpus import open_corpus
from gpt_tf.text.tokenizer import CharacterTokenizer


def texts_of(documents):
    return [document.text for document in documents]


def test_a_runs_own_text_is_what_it_validated_on(trained, corpus_folder):
    assert is_run(trained.out) and not is_run(corpus_folder)
    found = held_out_text(trained.out)
    corpus = open_corpus(corpus_folder)
    assert texts_of(found.documents) == texts_of(corpus.documents("validation"))
    assert not set(texts_of(found.documents)) & set(texts_of(corpus.documents("train")))
    assert (found.name, found.split) == (corpus.name, "validation")
    assert found.size_bytes == sum(len(t.encode()) for t in texts_of(found.documents))
    assert not found.is_python


def test_a_run_without_end_of_text_tokens_gives_its_text_too(tmp_path):
    from gpt_tf.text.corpus import Document
    from gpt_tf.text.dataset import write_token_file

    text = "caf\u00e9\n" * 30_000
    tokenizer = CharacterTokenizer.train([text], end_of_text=False)
    tokenizer.save(tmp_path)
    path = tmp_path / "data" / "validation.tokens"
    write_token_file(path, [Document("a", text)], tokenizer, facts={"corpus": "x"})
    found = held_out_text(tmp_path)
    assert "".join(texts_of(found.documents)) == text and found.name == "x"


def test_tokens_of_another_tokenizer_are_refused(trained, tmp_path):
    shutil.copytree(trained.out / "data", tmp_path / "data")
    CharacterTokenizer.train(["abc"]).save(tmp_path)
    with pytest.raises(DamagedFileError, match="another tokenizer"):
        held_out_text(tmp_path)
    tokens = tmp_path / "data" / "validation.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DamagedFileError, match="truncated"):
        held_out_text(tmp_path)


def test_the_standard_library_is_there_without_a_network():
    found = held_out_text()
    assert found.is_python
    assert (found.name, found.split) == ("python-stdlib", "validation")
    held = texts_of(open_corpus("python-stdlib").documents("validation"))
    assert set(texts_of(found.documents)) <= set(held)


def test_a_file_is_judged_by_its_held_out_part_or_whole(tmp_path):
    path = tmp_path / "some.txt"
    lines = [f"line {number}\n" for number in range(100)]
    path.write_text("".join(lines))
    found = held_out_text(path)
    assert texts_of(found.documents) == ["".join(lines[-10:])]
    whole = held_out_text(str(path), whole=True)
    assert "".join(texts_of(whole.documents)) == "".join(lines)
    assert (whole.name, whole.split) == ("some.txt", "all")
    half = held_out_text(path, validation_fraction=0.5)
    assert half.size_bytes > 4 * found.size_bytes


def test_training_and_judging_divide_a_corpus_alike(tmp_path):
    for name in ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"):
        (tmp_path / name).write_text(f"text of {name}\n---\nand more\n")
    said = []
    options = {"separator": "---\n", "notes": said}
    expected = ["text of wiki.valid.txt\n", "and more\n"]
    assert texts_of(held_out_text(tmp_path, **options).documents) == expected
    given = {"validation": tmp_path / "wiki.train.txt", "separator": "---\n"}
    found = texts_of(held_out_text(tmp_path, **given).documents)
    assert found == texts_of(open_corpus(tmp_path, **given).documents("validation"))
    assert found == ["text of wiki.train.txt\n", "and more\n"]
    # Of a text that no model has seen, all counts, whatever the names.
    said.clear()
    assert len(held_out_text(tmp_path, whole=True, **options).documents) == 6
    assert not said


def test_too_much_text_is_thinned_evenly(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{number:07}\n" for number in range(400_000)))
    notices = []
    # What fits is kept whole, and in order.
    everything = held_out_text(path, whole=True, notes=notices)
    assert notices == []
    assert "".join(texts_of(everything.documents)) == path.read_text()
    monkeypatch.setattr("gpt_tf.evaluation.text.MOST_BYTES", 1_000_000)
    found = held_out_text(path, whole=True, notes=notices)
    assert 500_000 <= found.size_bytes <= 1_000_000
    assert len(notices) == 1 and "3.2 MB" in notices[0] and "one in 4" in notices[0]
    begins = np.array([int(text[:7]) for text in texts_of(found.documents)])
    assert np.ptp(np.diff(begins)) < 0.3 * np.diff(begins).mean()
    assert begins.min() == 0 and begins.max() > 250_000


def test_what_holds_no_text_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        held_out_text(tmp_path / "nowhere")
    with pytest.raises(InputError, match="model without the text"):
        held_out_text(trained.out / "model")
    (tmp_path / "bytes.tflite").write_bytes(bytes(100))
    with pytest.raises(InputError, match="binary"):
        held_out_text(tmp_path / "bytes.tflite")
    with pytest.raises(InputError, match="which holds none"):
        HeldOutText.of(["", " \n"])


def test_texts_and_documents_are_taken_as_they_are():
    found = HeldOutText.of(["a", "", "b"])
    assert texts_of(found.documents) == ["a", "b"]
    assert HeldOutText.of(found) is found
    assert HeldOutText.of(found.documents[1]).documents == found.documents[1:]
    python = HeldOutText("mine", "all", (found.documents[0]._replace(name="a.py"),))
    assert python.is_python and not found.is_python
