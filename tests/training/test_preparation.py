"""Which text is held out, and where documents end."""

import shutil

import pytest

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.text import held_out_text
from gpt_tf.text.chat import ChatTemplate
from gpt_tf.text.dataset import TokenFile
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer, load_tokenizer
from gpt_tf.training import loop, preparation
from gpt_tf.training.config import TrainingConfig
from gpt_tf.training.run_folder import OWN_ENTRIES, load_model, read_run, save_model


def texts_of(out, split):
    """Return the documents of a run's tokens, as text."""
    tokenizer, tokens = load_tokenizer(out), []
    documents = [tokens]
    for token in TokenFile.open(out / "data" / f"{split}.tokens").tokens.tolist():
        if token == tokenizer.end_of_text_id:
            documents.append(tokens := [])
        else:
            tokens.append(token)
    return [tokenizer.decode(document) for document in documents]


def prepared(out, **settings):
    config = TrainingConfig(vocab_size=260, context_length=8, batch_size=2, **settings)
    preparation.prepare(config, out, False)
    return out


@pytest.fixture
def chats(tmp_path):
    """A file of a hundred documents."""
    path = tmp_path / "chats.txt"
    texts = [f"question {index}?\nanswer {index}!\n" for index in range(100)]
    path.write_text("<|endoftext|>".join(texts))
    return path, texts


@pytest.mark.parametrize("tokenizer", ["bpe", "character"])
def test_each_document_of_a_file_is_followed_by_the_end_of_text(
    chats, tmp_path, tokenizer
):
    path, texts = chats
    out = prepared(
        tmp_path / "run",
        corpus=str(path),
        tokenizer=tokenizer,
        separator="<|endoftext|>",
    )
    train, validation = texts_of(out, "train"), texts_of(out, "validation")
    # Behind the last end of text there is nothing.
    assert (train.pop(), validation.pop()) == ("", "")
    assert train + validation == texts and len(validation) == 10
    assert read_run(out).separator == "<|endoftext|>"


def test_the_chat_template_of_a_tokenizer_stays_with_the_run(
    chats, tmp_path, make_model
):
    path, _ = chats
    folder = tmp_path / "tokenizer"
    tokenizer = BPETokenizer.train(["question answer "], 257)
    tokenizer.chat_template = ChatTemplate("{{ eos_token }}", {"eos_token": "!"})
    tokenizer.save(folder)
    out = prepared(tmp_path / "run", corpus=str(path), tokenizer=str(folder))
    assert load_tokenizer(out).chat_template == tokenizer.chat_template
    assert {entry.name for entry in out.iterdir()} <= set(OWN_ENTRIES)
    model = make_model(vocab_size=tokenizer.vocab_size, num_layers=1)
    save_model(model, tokenizer, tmp_path / "model")
    assert load_model(tmp_path / "model")[1].chat_template == tokenizer.chat_template
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("eos_token }}", "bos_token }}"))
    with pytest.raises(DamagedFileError, match=r"tokenizer_config\.json"):
        load_model(tmp_path / "model")


def test_without_a_separator_its_text_is_learnt_as_it_stands(chats, tmp_path):
    path, _ = chats
    train, rest = texts_of(prepared(tmp_path / "run", corpus=str(path)), "train")
    assert "!\n<|endoftext|>question 1?" in train and rest == ""


def test_a_separator_expects_an_end_of_text(chats, tmp_path):
    path, _ = chats
    text = path.read_text()
    CharacterTokenizer.train([text], end_of_text=False).save(tmp_path / "own")
    settings = {"corpus": str(path), "tokenizer": str(tmp_path / "own")}
    with pytest.raises(InputError, match="separator"):
        prepared(tmp_path / "run", separator="<|endoftext|>", **settings)
    assert not (tmp_path / "run").exists()


def test_the_text_that_was_named_is_held_out(chats, corpus_folder, tmp_path):
    path, _ = chats
    out = prepared(tmp_path / "run", corpus=str(corpus_folder), validation=path)
    assert texts_of(out, "validation") == [path.read_text(), ""]
    assert len(texts_of(out, "train")) == 12 + 1
    assert held_out_text(out).documents[0].text == path.read_text()
    assert read_run(out).validation == str(path)


def test_a_student_takes_over_how_the_text_was_divided(
    chats, trained, prepared_only, tmp_path
):
    path, _ = chats
    other, same, new = (tmp_path / name for name in ("other", "same", "new"))
    wanted = {"num_layers": 1}
    loop.distil(trained.out, other, wanted, validation=str(path))
    assert texts_of(other, "validation") == [path.read_text(), ""]
    shutil.copytree(trained.out / "model", other / "model")  # as if it were trained
    loop.distil(other, same, wanted)
    assert read_run(same).validation == str(path)
    # What belongs to the text goes with it.
    loop.distil(other, new, wanted, corpus=read_run(trained.out).corpus)
    assert read_run(new).validation is None
    tokens = [
        artifacts.sha256_of(out / "data" / "train.tokens")
        for out in (other, same, trained.out, new)
    ]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
