"""The verbs: what a run leaves, how it goes on, and what is refused."""

import dataclasses
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError, InputTypeError
from gpt_tf.training import loop
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.training.run_folder import load_model, read_run
from gpt_tf.training.schedule import WarmupCosine

pytestmark = pytest.mark.usefixtures("eagerly")


def test_training_lowers_the_loss_and_leaves_a_complete_folder(trained):
    validations = trained.history["validations"]
    assert [row["step"] for row in validations] == [10, 20]
    assert validations[-1]["loss"] < np.log(300)
    assert validations[0]["tokens_per_second"] > 0
    perplexity = np.exp(validations[1]["loss"])
    assert trained.validation_perplexity == pytest.approx(perplexity)
    # Losses are means since the last record, and those of validations since the last.
    steps = {row["step"]: row["loss"] for row in trained.history["steps"]}
    assert list(steps) == [1, 10, 20]
    first, second = (row["train_loss"] for row in validations)
    assert first == pytest.approx((steps[1] + 9 * steps[10]) / 10, rel=1e-5)
    assert second == pytest.approx(steps[20], rel=1e-5)
    for name in ("run.json", "tokenizer.json", "history.json", "loss.png", "logs"):
        assert (trained.out / name).exists(), name
    manifest = artifacts.check_manifest(trained.out / "model", "model")
    assert manifest["config"]["vocab_size"] == 300


def test_a_loaded_model_gives_the_same_logits(trained):
    model, tokenizer = load_model(trained.out)
    tokens = np.array([tokenizer.encode("the quick brown fox")], "int32")
    np.testing.assert_array_equal(model(tokens), trained.model(tokens))
    assert load_model(trained.out / "model" / "model.keras")[1] is not None


def test_a_tampered_model_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained.out / "model", tmp_path / "model")
    data = bytearray((folder / "model.keras").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.keras").write_bytes(data)
    with pytest.raises(DamagedFileError, match="SHA-256"):
        load_model(folder)


def test_a_finished_run_goes_on_to_more_steps_when_asked_for_by_name(
    tiny, run, finished, copy_of_finished, have_same_weights, tmp_path, interrupt_after
):
    rates = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(
            float(note.model.optimizer.learning_rate)
        )
    )
    whole, cut = copy_of_finished, shutil.copytree(finished.out, tmp_path / "cut")
    longer = run(None, whole, resume=True, steps=7, callbacks=[note])
    assert read_run(whole) == dataclasses.replace(tiny, steps=7)
    validated = [row["step"] for row in longer.history["validations"]]
    assert validated == [2, 4, 6, 7]
    assert longer.history["validations"][:2] == finished.history["validations"]
    # From where it was resumed, the rate is that of a longer run.
    schedule = WarmupCosine(tiny.learning_rate, tiny.learning_rate / 10, 2, 7)
    np.testing.assert_allclose(rates, [schedule(s) for s in range(4, 7)], rtol=1e-6)
    # It may be killed and told again, with the same words or without the steps.
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            callbacks = [interrupt_after(1)]
            run(None, cut, resume=True, steps=7, callbacks=callbacks)
    assert have_same_weights(run(None, cut, resume=True), longer)
    with pytest.raises(InputError, match=r"`steps`.*7.*Received: 6"):
        run(None, cut, resume=True, steps=6)
    with pytest.raises(InputError, match="keeps its own"):
        run(None, cut, resume=True, batch_size=9)


def test_little_text_trains_with_the_vocabulary_that_it_supports(
    tiny, run, tmp_path, notices
):
    text = tmp_path / "some.txt"
    text.write_text("One two three. Two three four.\n" * 800)  # 25 kB
    config = dataclasses.replace(tiny, corpus=str(text), vocab_size=4096, steps=1)
    result = run(config, tmp_path / "run")
    size = result.tokenizer.vocab_size
    assert 257 < size < 300 and result.model.vocab_size == size
    assert any(f"a vocabulary of {size} tokens" in line for line in notices)
    # The configuration is still the one that was asked for.
    assert run(config, tmp_path / "run", resume_or_start=True).model is not None


def test_overwriting_replaces_our_files_and_leaves_others(
    tiny, run, copy_of_finished, tmp_path
):
    (copy_of_finished / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        run(tiny, copy_of_finished)
    changes = {"num_layers": 2, "steps": 1}
    again = run(tiny, copy_of_finished, overwrite=True, **changes)
    assert again.model.num_layers == 2
    assert (copy_of_finished / "thesis.txt").read_text() == "precious"
    assert os.listdir(copy_of_finished / "checkpoints") == ["step-00000001"]


def test_a_bad_corpus_leaves_an_existing_run_alone(
    tiny, run, finished, copy_of_finished, tmp_path
):
    before = sorted(tmp_path.rglob("*"))
    for changes, message in (
        ({"corpus": str(tmp_path / "missing")}, "missing"),
        ({"context_length": 10**6}, "longer than the text"),
    ):
        with pytest.raises(InputError, match=message):
            run(tiny, copy_of_finished, overwrite=True, **changes)
    assert sorted(tmp_path.rglob("*")) == before, "a half-written folder was left"
    hashes = [
        artifacts.sha256_of(out / "model" / "model.keras")
        for out in (copy_of_finished, finished.out)
    ]
    assert hashes[0] == hashes[1]


def test_a_run_in_use_by_another_process_is_refused(trained, run):
    before = sorted(trained.out.rglob("*"))
    with (
        artifacts.locked(trained.out),
        pytest.raises(InputError, match="in use by another process"),
    ):
        run(PRESETS["tiny"], trained.out, overwrite=True)
    assert sorted(trained.out.rglob("*")) == before


def test_resume_needs_a_run(run, tmp_path):
    with pytest.raises(InputError, match="interrupted run"):
        run(None, tmp_path, resume=True)


def test_a_run_of_before_there_was_augmentation_can_be_read(trained, tmp_path):
    run_json = artifacts.read_json(trained.out / "run.json")
    assert run_json["config"].pop("augmentation") is None
    del run_json["sha256"]  # there was none either
    artifacts.write_json(tmp_path / "run.json", run_json)
    assert read_run(tmp_path) == read_run(trained.out)


# Starting from a trained model


@pytest.fixture
def asked_for(tmp_path, monkeypatch):
    """Let a verb start from a run of some settings; return what `train` is given."""
    seen = []
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: seen.append(config))

    def ask(verb, before, **options):
        config = {"config": dataclasses.asdict(before), "kind": "run"}
        artifacts.write_json(tmp_path / "run.json", config)
        getattr(loop, verb)(tmp_path, tmp_path / "new", **options)
        return seen.pop()

    return ask


def test_what_is_quantised_is_trained_in_float32(asked_for):
    before = TrainingConfig(precision="mixed_bfloat16")
    assert asked_for("quantize", before).precision == "float32"
    assert asked_for("distil", before, quantization={}).precision == "float32"
    assert asked_for("distil", before).precision == "mixed_bfloat16"


@pytest.mark.parametrize("verb", ["quantize", "distil"])
def test_what_starts_from_an_augmented_run_reads_the_text_as_it_stands(asked_for, verb):
    before = TrainingConfig(augmentation={"bpe_dropout": 0.3})
    assert asked_for(verb, before).augmentation is None
    other = asked_for(verb, before, augmentation={"bpe_dropout": 0.1})
    assert other.augmentation["bpe_dropout"] == 0.1


def quantize(*arguments, **options):
    return loop.quantize(*arguments, **{"verbose": False, **options})


@pytest.fixture(scope="module")
def quantized(finished, tmp_path_factory):
    """A finished quantisation-aware run of three steps, with their checkpoints."""
    out = tmp_path_factory.mktemp("qat") / "whole"
    tf.config.run_functions_eagerly(False)
    result = quantize(finished.out, out, {"calibration_batches": 2}, steps=3)
    tf.config.run_functions_eagerly(True)
    return result


def test_a_quantised_run_starts_from_the_model_and_its_text(
    finished, quantized, have_same_weights
):
    from gpt_tf.quantization.qat import activation_ranges, to_float

    config = read_run(quantized.out)
    assert config.corpus == read_run(finished.out).corpus
    assert config.learning_rate == PRESETS["tiny"].learning_rate / 20
    for split in ("train", "validation"):
        name = f"data/{split}.tokens"
        same = [(r.out / name).read_bytes() for r in (finished, quantized)]
        assert same[0] == same[1]
    initial, _ = load_model(quantized.out / "initial")
    assert all(low < high for low, high in activation_ranges(initial).values())
    assert have_same_weights(SimpleNamespace(model=to_float(initial)), finished)
    assert quantized.validation_loss < finished.validation_loss + 0.05


def test_the_finished_quantised_model_is_loaded_with_its_ranges(finished, quantized):
    from gpt_tf.quantization.qat import activation_ranges

    model, tokenizer = load_model(quantized.out)
    assert activation_ranges(model) == activation_ranges(quantized.model)
    tokens = np.array([tokenizer.encode("the quick")], "int32")
    np.testing.assert_array_equal(model(tokens), quantized.model(tokens))
    assert np.abs(model(tokens) - finished.model(tokens)).max() > 1e-4
    manifest = artifacts.check_manifest(quantized.out / "model", "model")
    source = artifacts.sha256_of(finished.out / "model" / "model.keras")
    assert manifest["made_from"]["model"] == source


def test_a_quantised_run_is_recognised_and_resumed_bit_for_bit(
    start, finished, quantized, have_same_weights, cut, tmp_path, traced
):
    out = cut(shutil.copytree(quantized.out, tmp_path / "cut"), keep=[1, 2])
    wanted = {"function": loop.quantize, "quantization": {"calibration_batches": 2}}
    again, steps, _ = start(finished.out, out, steps=3, **wanted)
    assert steps == 1
    assert have_same_weights(again, quantized)
    states = [
        (folder / f"checkpoints/step-0000000{step}/state.safetensors").read_bytes()
        for folder, step in ((quantized.out, 3), (out, 3), (out, 2))
    ]
    assert states[0] == states[1] != states[2]
    with pytest.raises(InputError, match="steps=3 instead of 5"):
        start(finished.out, out, steps=5, **wanted)


@pytest.mark.slow
def test_a_quantised_run_is_the_same_on_four_devices(trained, tmp_path):
    from gpt_tf.quantization.qat import activation_ranges

    one, four = (
        quantize(
            trained.out,
            tmp_path / name,
            {"ema_decay": 0.5},
            steps=6,
            strategy=name,
            jit_compile="off",
        )
        for name in ("one_device", "mirrored")
    )
    pairs = zip(one.model.get_weights(), four.model.get_weights(), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-4)
    initial, _ = load_model(one.out / "initial")
    name = "block_0/qkv_activation"
    moved = [activation_ranges(model)[name] for model in (initial, one.model)]
    assert np.abs(np.subtract(*moved)).max() > 1e-3


def test_a_float_model_is_trained_further(tiny, run, finished, tmp_path, traced):
    config = dataclasses.replace(
        tiny,
        init_from=finished.out,
        steps=1,
        learning_rate=1e-9,
        embedding_dim=999,  # the model's is taken
    )
    further = run(config, tmp_path / "further")
    # The one is what graphs compute, the other was computed eagerly.
    assert further.validation_loss == pytest.approx(finished.validation_loss, abs=1e-4)
    assert type(further.model) is type(finished.model)


def test_what_cannot_be_quantised_is_refused(finished, quantized, tmp_path):
    for source, options, message in (
        (tmp_path, {"corpus": "shakespeare"}, "there is none"),
        (finished.out / "model", {}, "`corpus`"),
        (quantized.out, {}, "already"),
        (finished.out, {"context_length": 64}, "at most 16"),
        (None, {}, "Received: None"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(source, tmp_path / "out", **options)
    with pytest.raises(InputError, match="keeps its own"):
        quantize(None, quantized.out, {"weight_bits": 4}, resume=True)
    assert not (tmp_path / "out").exists()


# Callbacks


def test_any_tf_keras_callback_works(tiny, run, tmp_path, capsys):
    seen = []
    counter = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((epoch, "val_loss" in logs))
    )
    logger = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    run(tiny, tmp_path / "run", callbacks=[counter, logger])
    assert seen == [(0, True), (1, True)]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().out == "", "training was asked to be silent"


def test_a_keras_3_callback_gets_the_teaching_error(tiny, run, tmp_path):
    import keras as keras_3

    with pytest.raises(InputTypeError, match="tf_keras"):
        run(tiny, tmp_path / "run", callbacks=[keras_3.callbacks.History()])
    assert not (tmp_path / "run").exists()
