"""Students from teachers' runs: what is prepared, trained, resumed and refused."""

import dataclasses
import shutil

import numpy as np
import pytest

from gpt_tf import artifacts
from gpt_tf.distillation.distiller import DistillationWarning
from gpt_tf.distillation.teacher_cache import KnowledgeStore
from gpt_tf.errors import InputError, TrainingDivergedError
from gpt_tf.text.dataset import TokenFile
from gpt_tf.text.tokenizer import BPETokenizer, load_tokenizer
from gpt_tf.training import loop, preparation
from gpt_tf.training.config import PRESETS
from gpt_tf.training.run_folder import load_model, read_run, save_model
from gpt_tf.training.start import run_with_text

pytestmark = pytest.mark.usefixtures("eagerly")

SETTINGS = {
    "steps": 4,
    "batch_size": 4,
    "validate_every": 2,
    "validation_batches": 2,
    "checkpoint_every": 2,
    "jit_compile": "off",
    "strategy": "one_device",
    "verbose": False,
}
SMALL = {"num_layers": 1}


def distil(trained, out, distillation=SMALL, **changes):
    return loop.distil(trained.out, out, distillation, **{**SETTINGS, **changes})


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
    # The history tells the student's own loss, and how near it is.
    validation = student.history["validations"][-1]
    assert validation["loss"] == student.validation_loss
    assert 0 <= validation["teacher_agreement"] <= 1
    assert validation["kl_divergence"] > 0


def test_a_student_that_diverged_stops_and_ends_as_the_same_when_resumed(
    trained, student, have_same_weights, tmp_path, spoiling
):
    out = tmp_path / "student"
    with pytest.raises(TrainingDivergedError, match=r"loss of nan at step 4\b"):
        distil(trained, out, callbacks=[spoiling(3)])
    assert not (out / "model").exists()
    resumed = loop.distil(None, out, resume=True, verbose=False)
    assert have_same_weights(resumed, student)
    for ours, theirs in zip(
        resumed.history["validations"], student.history["validations"], strict=True
    ):
        for name in ("loss", "teacher_agreement", "kl_divergence"):
            assert ours[name] == theirs[name]


def test_a_student_of_the_store_needs_no_teacher(
    trained, knowledge, have_same_weights, cut, tmp_path
):
    home = shutil.copytree(trained.out, tmp_path / "teacher")
    wanted = {**SMALL, "knowledge": str(knowledge.path)}
    changes = {"corpus": read_run(trained.out).corpus}
    changes |= {"steps": 2, "checkpoint_every": 1}
    out = tmp_path / "student"
    result = loop.distil(home, out, wanted, **{**SETTINGS, **changes})
    # Going on works when the teacher is gone.
    shutil.rmtree(home)
    again = loop.distil(None, cut(out, keep=[1]), resume=True, verbose=False)
    assert have_same_weights(result, again)


def test_a_smaller_vocabulary_brings_its_own_tokenizer_and_knowledge(trained, tmp_path):
    wanted = {**SMALL, "vocab_size": 280}
    result = distil(trained, tmp_path / "student", wanted, steps=1)
    assert result.tokenizer.vocab_size == result.model.vocab_size == 280
    store = KnowledgeStore.open(result.out / "knowledge")
    assert store.mapping == "derived"
    text = "the quick brown fox"
    assert result.tokenizer.decode(result.tokenizer.encode(text)) == text


def test_a_store_for_a_smaller_vocabulary_can_be_extracted_first(
    trained, prepared_only, tmp_path
):
    store = loop.extract_knowledge(
        trained.out, tmp_path / "knowledge", vocab_size=280, top_k=8
    )
    assert store.mapping == "derived"
    wanted = {**SMALL, "vocab_size": 280, "knowledge": str(store.path)}
    out = tmp_path / "student"
    distil(trained, out, wanted)
    assert not (out / "knowledge").exists()
    assert load_model(out / "initial")[0].vocab_size == 280


@pytest.mark.slow
def test_importance_is_measured_on_the_teachers_tokens(
    trained, prepared_only, tmp_path
):
    """Whatever the student reads: the same blocks are cut, and equally narrow."""
    kernels = []
    for vocab_size in (None, 280):
        wanted = {**SMALL, "layers": "importance", "embedding_dim": 8, "num_heads": 1}
        out = tmp_path / str(vocab_size)
        distil(trained, out, {**wanted, "vocab_size": vocab_size})
        student, _ = load_model(out / "initial")
        kernels.append(student.get_layer("block_0").up_kernel.numpy())
    np.testing.assert_array_equal(*kernels)


def test_any_two_tokenizers_go_together_with_sorted_probabilities(
    trained, corpus_folder, make_model, tmp_path
):
    # A tokenizer that has nothing to do with the teacher's.
    texts = [path.read_text("utf-8")[:900] for path in corpus_folder.glob("*.txt")]
    own = BPETokenizer.train([text[::-1] for text in texts], 270)
    model = make_model(vocab_size=own.vocab_size, num_layers=1, context_length=32)
    save_model(model, own, tmp_path / "other")
    options = {"init_from": str(tmp_path / "other"), "steps": 1}
    with pytest.raises(InputError, match="universal_logit"):
        distil(trained, tmp_path / "student", {}, **options)
    wanted = {"loss": "universal_logit", "alpha": 0.5}
    result = distil(trained, tmp_path / "student", wanted, **options)
    assert KnowledgeStore.open(result.out / "knowledge").mapping == "sorted"
    assert result.history["steps"][-1]["distillation_loss"] > 0


def test_a_student_may_be_made_ready_for_integers_at_once(trained, tmp_path):
    result = distil(trained, tmp_path / "student", quantization={}, steps=1)
    assert type(result.model).__name__ == "QuantizationAwareGPT"
    assert result.model.is_calibrated


def test_a_trained_student_may_go_on(trained, student, tmp_path, traced):
    options = {"init_from": str(student.out), "steps": 1, "learning_rate": 1e-9}
    result = distil(trained, tmp_path / "more", {"loss": "reverse_kl"}, **options)
    assert result.model.num_layers == 1
    made_from = artifacts.read_json(result.out / "run.json")["made_from"]
    assert made_from.keys() == {"model", "teacher"}
    # The one is what graphs compute, the other was computed eagerly.
    ours, theirs = (r.history["validations"][-1] for r in (result, student))
    for name in ("loss", "teacher_agreement", "kl_divergence"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)


# Text that a teacher wrote


def prepare(trained, out, **changes):
    """Prepare a run on the tiny teacher's text, without training it."""
    config = dataclasses.replace(
        PRESETS["tiny"],
        corpus=read_run(trained.out).corpus,
        **{"vocab_size": 300, **changes},
    )
    preparation.prepare(config, out, False)
    return tokens_of(out, "train")


def tokens_of(out, split):
    return TokenFile.open(out / "data" / f"{split}.tokens").tokens


def test_text_of_the_teacher_is_added_to_the_real_one(trained, prepared_only, tmp_path):
    out = tmp_path / "student"
    distil(trained, out, {**SMALL, "written_tokens": 120})
    real, both = (tokens_of(folder, "train") for folder in (trained.out, out))
    np.testing.assert_array_equal(both[: len(real)], real)
    assert 60 < len(both) - len(real) < 400
    manifest = artifacts.read_json(out / "data" / "train.tokens.json")
    assert manifest["written_documents"] > 0


@pytest.mark.parametrize("vocab_size", [300, 280], ids=["same", "another"])
def test_text_of_a_teacher_is_read_without_distillation(trained, tmp_path, vocab_size):
    wanted = {"teacher": str(trained.out), "written_tokens": 120}
    real, both = (
        prepare(trained, tmp_path / name, vocab_size=vocab_size, augmentation=fields)
        for name, fields in {"real": None, "both": wanted}.items()
    )
    np.testing.assert_array_equal(both[: len(real)], real)
    assert 60 < len(both) - len(real) < 600
    held_out = [tokens_of(tmp_path / name, "validation") for name in ("real", "both")]
    np.testing.assert_array_equal(*held_out)
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
        found.append(run_with_text(config, trained.tokenizer))
    assert found == [source, None]


# Bad input


def test_an_untrained_teacher_is_warned_of(
    trained, make_model, prepared_only, tmp_path
):
    model = make_model(vocab_size=trained.tokenizer.vocab_size)
    save_model(model, trained.tokenizer, tmp_path / "new")
    options = {"corpus": read_run(trained.out).corpus, "context_length": 16}
    with pytest.warns(DistillationWarning, match="looks untrained"):
        loop.distil(tmp_path / "new", tmp_path / "student", SMALL, **options)


def test_another_teacher_in_its_place_is_noticed(trained, student, tmp_path):
    out = shutil.copytree(student.out, tmp_path / "student")
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
        ({}, {"context_length": 64}, "at most 32, .* model in .*tiny.* Received: 64"),
        ({"vocab_size": 280, "written_tokens": 50}, {}, "`written_tokens`"),
        ({"vocab_size": 280, "on_policy_fraction": 0.5}, {}, "`on_policy_fraction`"),
        ({"vocab_size": 280, "loss": "hidden_states"}, {}, "stored knowledge"),
        ({"vocab_size": 280}, {"augmentation": {}}, "two tokenizers"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    trained, tmp_path, distillation, changes, message
):
    with pytest.raises(InputError, match=message):
        distil(trained, tmp_path / "student", {**SMALL, **distillation}, **changes)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_by_characters_is_refused_and_nothing_written(
    trained, tmp_path
):
    fields = {"augmentation": {"bpe_dropout": 0.1}}
    with pytest.raises(InputError, match="expects a bpe tokenizer, whose merges"):
        prepare(trained, tmp_path / "run", tokenizer="character", **fields)
    fields = {"teacher": "nowhere", "written_tokens": 9}
    with pytest.raises(InputError, match="trained model at nowhere"):
        prepare(trained, tmp_path / "run", augmentation=fields)
    assert not list(tmp_path.iterdir())


def test_a_store_of_another_text_is_refused(trained, knowledge, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("another text altogether. " * 500, "utf-8")
    wanted = {**SMALL, "knowledge": str(knowledge.path)}
    with pytest.raises(InputError, match="another text"):
        distil(trained, tmp_path / "student", wanted, corpus=str(path))


def test_knowledge_expects_a_teacher_and_text_as_it_stands(trained, tmp_path):
    with pytest.raises(InputError, match="expects a trained teacher"):
        loop.distil(None, tmp_path / "student", SMALL)
    fields = {"augmentation": {"bpe_dropout": 0.1}}
    with pytest.raises(InputError, match="as it stands"):
        loop.extract_knowledge(trained.out, tmp_path / "store", **fields)
    assert not list(tmp_path.iterdir())
