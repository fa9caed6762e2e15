"""Students from teachers' runs: what is prepared, trained, resumed and refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt_tf import artifacts
from gpt_tf.distillation.distiller import DistillationWarning
from gpt_tf.distillation.teacher_cache import KnowledgeStore
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.text import held_out_text
from gpt_tf.text.dataset import TokenFile
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer, load_tokenizer
from gpt_tf.training import loop, preparation
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.training.run_folder import load_model, read_run, save_model

COURSE = {
    "steps": 6,
    "batch_size": 4,
    "validate_every": 3,
    "validation_batches": 2,
    "checkpoint_every": 2,
    "jit_compile": "off",
    "strategy": "one_device",
    "verbose": False,
}
SMALL = {"num_layers": 1}


def distil(trained, out, distillation=SMALL, **changes):
    return loop.distil(trained.out, out, distillation, **{**COURSE, **changes})


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    """A finished student."""
    return distil(trained, tmp_path_factory.mktemp("students") / "student")


@pytest.fixture(scope="module")
def knowledge(trained, tmp_path_factory):
    """The tiny teacher's knowledge."""
    path = tmp_path_factory.mktemp("stores") / "knowledge"
    return loop.extract_knowledge(trained.out, path, top_k=8, passes=2)


def test_the_student_is_a_gpt_by_itself(trained, student):
    model, tokenizer = load_model(student.out)
    assert type(model).__name__ == "GPTModel"
    assert model.num_layers == 1
    assert tokenizer.fingerprint() == trained.tokenizer.fingerprint()
    for one, two in zip(model.get_weights(), student.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    manifest = artifacts.check_manifest(student.out / "model", "model")
    teacher_file = trained.out / "model" / "model.keras"
    assert manifest["made_from"]["teacher"] == artifacts.sha256_of(teacher_file)


def test_the_history_tells_the_students_own_loss_and_its_nearness(student):
    validation = student.history["validations"][-1]
    assert validation["loss"] == student.validation_loss
    assert 0 <= validation["teacher_agreement"] <= 1
    assert validation["kl_divergence"] > 0
    assert student.validation_perplexity == pytest.approx(np.exp(validation["loss"]))


def test_a_run_that_was_interrupted_ends_with_the_same_student(
    trained, student, tmp_path, interrupt_after
):
    out = tmp_path / "student"
    with pytest.raises(KeyboardInterrupt):
        distil(trained, out, callbacks=[interrupt_after(5)])
    options = {"verbose": False}
    resumed = loop.distil(None, out, resume=True, **options)
    for one, two in zip(
        resumed.model.get_weights(), student.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    for ours, theirs in zip(
        resumed.history["validations"], student.history["validations"], strict=True
    ):
        for name in ("loss", "teacher_agreement", "kl_divergence"):
            assert ours[name] == theirs[name]


def test_a_student_of_the_store_needs_no_teacher(trained, knowledge, tmp_path):
    home = tmp_path / "teacher"
    shutil.copytree(trained.out, home)
    wanted = {**SMALL, "knowledge": str(knowledge.path)}
    options = {**COURSE, "corpus": read_run(trained.out).corpus}
    result = loop.distil(home, tmp_path / "student", wanted, **options)
    # Going on works when the teacher is gone.
    shutil.rmtree(home)
    shutil.rmtree(tmp_path / "student" / "checkpoints" / "step-00000006")
    quiet = {"verbose": False}
    again = loop.distil(None, tmp_path / "student", resume=True, **quiet)
    for one, two in zip(
        result.model.get_weights(), again.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_smaller_vocabulary_brings_its_own_tokenizer_and_knowledge(trained, tmp_path):
    result = distil(trained, tmp_path / "student", {**SMALL, "vocab_size": 280})
    assert result.tokenizer.vocab_size == result.model.vocab_size == 280
    store = KnowledgeStore.open(result.out / "knowledge")
    assert store.mapping == "derived"
    text = "the quick brown fox"
    assert result.tokenizer.decode(result.tokenizer.encode(text)) == text


@pytest.mark.slow
def test_importance_is_measured_on_the_teachers_tokens(trained, tmp_path):
    """Whatever the student reads: the same blocks are cut, and equally narrow."""
    kernels = []
    for vocab_size in (None, 280):
        wanted = {**SMALL, "layers": "importance", "embedding_dim": 8, "num_heads": 1}
        out = tmp_path / str(vocab_size)
        distil(trained, out, {**wanted, "vocab_size": vocab_size})
        student, _ = load_model(out / "initial")
        kernels.append(student.get_layer("block_0").up_kernel.numpy())
    np.testing.assert_array_equal(*kernels)


def test_a_store_for_a_smaller_vocabulary_can_be_extracted_first(trained, tmp_path):
    store = loop.extract_knowledge(
        trained.out, tmp_path / "knowledge", vocab_size=280, top_k=8
    )
    assert store.mapping == "derived"
    wanted = {**SMALL, "vocab_size": 280, "knowledge": str(store.path)}
    result = distil(trained, tmp_path / "student", wanted)
    assert not (result.out / "knowledge").exists()
    assert result.model.vocab_size == 280


def test_text_of_the_teacher_is_added_to_the_real_one(trained, tmp_path):
    result = distil(trained, tmp_path / "student", {**SMALL, "written_tokens": 120})
    path = result.out / "data" / "train.tokens"
    tokens = np.fromfile(path, "<u2")
    real = np.fromfile(trained.out / "data" / "train.tokens", "<u2")
    np.testing.assert_array_equal(tokens[: len(real)], real)
    assert 60 < len(tokens) - len(real) < 400
    manifest = artifacts.read_json(path.with_name("train.tokens.json"))
    assert manifest["written_documents"] > 0


def prepare(trained, out, **changes):
    """Prepare a run on the tiny teacher's text, without training it."""
    config = dataclasses.replace(
        PRESETS["tiny"],
        corpus=read_run(trained.out).corpus,
        **{"vocab_size": 300, **changes},
    )
    preparation.prepare(config, out, False)
    return {
        split: TokenFile.open(out / "data" / f"{split}.tokens").tokens
        for split in ("train", "validation")
    }


@pytest.mark.parametrize("vocab_size", [300, 280], ids=["same", "another"])
def test_text_of_a_teacher_is_read_without_distillation(trained, tmp_path, vocab_size):
    wanted = {"teacher": str(trained.out), "written_tokens": 120}
    runs = [
        prepare(trained, tmp_path / name, vocab_size=vocab_size, augmentation=fields)
        for name, fields in {"real": None, "both": wanted}.items()
    ]
    real, both = (run["train"] for run in runs)
    np.testing.assert_array_equal(both[: len(real)], real)
    assert 60 < len(both) - len(real) < 600
    np.testing.assert_array_equal(*(run["validation"] for run in runs))
    out = tmp_path / "both"
    assert both.max() < load_tokenizer(out).vocab_size == vocab_size
    facts = artifacts.read_json(out / "run.json")["made_from"]
    assert facts["writer"] == artifacts.sha256_of(trained.out / "model" / "model.keras")


def test_text_of_a_teacher_is_not_taken_for_real_text(trained, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    trained.tokenizer.save(source)
    run = artifacts.read_json(trained.out / "run.json")
    config = dataclasses.replace(read_run(trained.out), init_from=str(source))
    found = []
    for fields in (None, {"teacher": str(trained.out), "written_tokens": 9}):
        run["config"]["augmentation"] = fields
        artifacts.write_sealed_json(source / "run.json", run)
        found.append(preparation._source_with_this_text(config, trained.tokenizer))
    assert found == [source, None]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bpe_dropout": 0.1}, "expects a bpe tokenizer, whose merges"),
        ({"written_tokens": 9}, "expects a bpe tokenizer, or the teacher's own"),
        ({"written_tokens": 9, "teacher": "nowhere"}, "trained model at nowhere"),
    ],
)
def test_what_cannot_be_read_by_characters_is_refused_and_nothing_written(
    trained, tmp_path, fields, message
):
    if "written_tokens" in fields:
        fields = {"teacher": str(trained.out), **fields}
    with pytest.raises(InputError, match=message):
        prepare(trained, tmp_path / "run", tokenizer="character", augmentation=fields)
    assert not list(tmp_path.iterdir())


def test_knowledge_is_not_extracted_from_augmented_text(trained, tmp_path):
    with pytest.raises(InputError, match="as it stands"):
        loop.extract_knowledge(
            trained.out, tmp_path / "store", augmentation={"bpe_dropout": 0.1}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_student_may_learn_from_augmented_text(trained, student, tmp_path):
    fields = {"bpe_dropout": 0.2, "token_replacement": 0.2, "mix_documents": 0.5}
    result = distil(trained, tmp_path / "noisy", augmentation=fields)
    pairs = zip(result.model.get_weights(), student.model.get_weights(), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-5
    assert np.isfinite(result.validation_loss)


def test_a_student_may_be_made_ready_for_integers_at_once(trained, tmp_path):
    result = distil(trained, tmp_path / "student", quantization={})
    assert result.model.is_calibrated
    assert type(load_model(result.out)[0]).__name__ == "QuantizationAwareGPT"


def test_a_trained_student_may_go_on(trained, student, tmp_path):
    wanted = {"loss": "reverse_kl"}
    result = distil(trained, tmp_path / "more", wanted, init_from=str(student.out))
    assert result.model.num_layers == 1
    assert set(json.loads((result.out / "run.json").read_text())["made_from"]) == {
        "model",
        "teacher",
    }


def student_of_other_tokens(corpus_folder, out):
    """A trained model whose tokenizer has nothing to do with the teacher's."""
    texts = [path.read_text("utf-8")[:900] for path in corpus_folder.glob("*.txt")]
    BPETokenizer.train([text[::-1] for text in texts], 270).save(out / "own.json")
    return loop.train(
        None,
        out / "other",
        corpus=str(corpus_folder),
        tokenizer=str(out / "own.json"),
        embedding_dim=16,
        num_layers=1,
        num_heads=2,
        context_length=32,
        **COURSE,
    )


def test_any_two_tokenizers_go_together_with_sorted_probabilities(
    trained, corpus_folder, tmp_path
):
    other = student_of_other_tokens(corpus_folder, tmp_path)
    options = {"init_from": str(other.out)}
    with pytest.raises(InputError, match="universal_logit"):
        distil(trained, tmp_path / "student", {}, **options)
    wanted = {"loss": "universal_logit", "alpha": 0.5}
    result = distil(trained, tmp_path / "student", wanted, **options)
    assert KnowledgeStore.open(result.out / "knowledge").mapping == "sorted"
    assert result.history["steps"][-1]["distillation_loss"] > 0


# Bad input


def test_an_untrained_teacher_is_warned_of(trained, make_model, tmp_path):
    sizes = {"vocab_size": trained.tokenizer.vocab_size, "context_length": 32}
    save_model(make_model(**sizes), trained.tokenizer, tmp_path / "new")
    with pytest.warns(DistillationWarning, match="looks untrained"):
        loop.distil(
            tmp_path / "new",
            tmp_path / "student",
            SMALL,
            corpus=read_run(trained.out).corpus,
            context_length=32,
            **COURSE,
        )


def test_another_teacher_in_its_place_is_noticed(trained, student, tmp_path):
    out = tmp_path / "student"
    shutil.copytree(student.out, out)
    run = artifacts.read_json(out / "run.json")
    run["config"]["distillation"]["teacher"] = str(student.out)
    artifacts.write_sealed_json(out / "run.json", run)
    with pytest.raises(InputError, match="the teacher that it began with"):
        loop.distil(None, out, resume=True, verbose=False)


@pytest.mark.parametrize(
    ("distillation", "changes", "message"),
    [
        ({"num_layers": 5}, {}, "`num_layers`"),
        ({"vocab_size": 299, "loss": "no_loss"}, {}, "no_loss"),
        ({"loss": "no_loss"}, {}, "no_loss"),
        ({"vocab_size": 100}, {}, "257"),
        ({"knowledge": "nowhere"}, {}, "nowhere"),
        ({}, {"context_length": 64}, "at most 32, .* model in .*tiny. Received: 64"),
        ({"vocab_size": 280, "written_tokens": 50}, {}, "`written_tokens`"),
        ({"vocab_size": 280, "on_policy_fraction": 0.5}, {}, "`on_policy_fraction`"),
        ({"vocab_size": 280, "loss": "hidden_states"}, {}, "stored knowledge"),
        ({"vocab_size": 280}, {"augmentation": {}}, "two tokenizers"),
        (
            {"knowledge": "nowhere"},
            {"augmentation": {"bpe_dropout": 0.1}},
            "as it stood",
        ),
        (
            {},
            {"augmentation": {"teacher": "a", "written_tokens": 9}},
            "Give it in `distillation`",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    trained, tmp_path, distillation, changes, message
):
    with pytest.raises(InputError, match=message):
        distil(trained, tmp_path / "student", {**SMALL, **distillation}, **changes)
    assert not list(tmp_path.iterdir())


def test_a_store_of_another_text_is_refused(trained, knowledge, tmp_path):
    (tmp_path / "texts").mkdir()
    for index in range(12):
        path = tmp_path / "texts" / f"{index}.txt"
        path.write_text("another text altogether. " * 40, "utf-8")
    wanted = {**SMALL, "knowledge": str(knowledge.path)}
    with pytest.raises(InputError, match="another text"):
        distil(trained, tmp_path / "student", wanted, corpus=str(tmp_path / "texts"))


def test_a_damaged_store_is_refused(trained, knowledge, tmp_path):
    copy = tmp_path / "knowledge"
    shutil.copytree(knowledge.path, copy)
    with open(copy / "codes.bin", "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    wanted = {**SMALL, "knowledge": str(copy)}
    with pytest.raises(DamagedFileError, match=r"codes\.bin"):
        distil(trained, tmp_path / "student", wanted)


def test_distillation_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(InputError, match="expects a trained teacher"):
        loop.distil(None, tmp_path / "student", SMALL)


# Which text is held out, and where documents end


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


def test_a_student_takes_over_how_the_text_was_divided(chats, trained, tmp_path):
    path, _ = chats
    other = distil(trained, tmp_path / "other", validation=str(path), steps=1)
    assert texts_of(other.out, "validation") == [path.read_text(), ""]
    same = distil(other, tmp_path / "same", steps=1)
    assert read_run(same.out).validation == str(path)
    data = Path("data", "train.tokens")
    assert artifacts.sha256_of(same.out / data) == artifacts.sha256_of(other.out / data)
    # What belongs to the text goes with it.
    new = distil(other, tmp_path / "new", steps=1, corpus=read_run(trained.out).corpus)
    assert read_run(new.out).validation is None
    assert artifacts.sha256_of(new.out / data) == artifacts.sha256_of(
        trained.out / data
    )
