import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import safetensors.numpy
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.errors import (
    DamagedFileError,
    InputError,
    InputTypeError,
    TrainingDivergedError,
)
from gpt_tf.models import cached_forward
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.training.loop import distil, quantize, train
from gpt_tf.training.run_folder import load_model, read_run
from gpt_tf.training.schedule import WarmupCosine

NOT_BOUNDED = (
    *("learning_rate", "final_learning_rate", "weight_decay", "global_clipnorm"),
    *("steps", "warmup_steps", "dropout"),
)
NOT_FINITE = (float("inf"), float("nan"), np.float32("inf"))

AUGMENTATION = {
    "bpe_dropout": 0.2,
    "token_dropout": 0.1,
    "token_replacement": 0.1,
    "mix_documents": 0.3,
}


@pytest.fixture(scope="module")
def tiny(corpus_folder):
    """A configuration that takes seconds."""
    return dataclasses.replace(
        PRESETS["tiny"],
        num_layers=1,
        corpus=str(corpus_folder),
        vocab_size=270,
        context_length=16,
        batch_size=4,
        strategy="one_device",
        dropout=0.1,
    )


def run(config, out, **options):
    return train(config, out, **{"verbose": False, **options})


def test_training_lowers_the_loss_and_leaves_a_complete_folder(trained):
    validations = trained.history["validations"]
    assert [row["step"] for row in validations] == [10, 20]
    assert validations[-1]["loss"] < np.log(300)
    assert trained.validation_perplexity == pytest.approx(
        np.exp(validations[1]["loss"])
    )
    for name in ("run.json", "tokenizer.json", "history.json", "loss.png", "logs"):
        assert (trained.out / name).exists(), name
    assert (trained.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = artifacts.check_manifest(trained.out / "model", "model")
    assert manifest["config"]["vocab_size"] == 300


def test_a_loaded_model_gives_the_same_logits(trained):
    model, tokenizer = load_model(trained.out)
    tokens = np.array([tokenizer.encode("the quick brown fox")], "int32")
    np.testing.assert_array_equal(model(tokens), trained.model(tokens))
    assert load_model(trained.out / "model" / "model.keras")[1] is not None


def test_a_trained_model_speaks(trained):
    text = cached_forward.generate(
        trained.model, "the", tokenizer=trained.tokenizer, max_new_tokens=8, seed=1
    )
    assert isinstance(text, str) and text


@pytest.mark.parametrize("step", [3, pytest.param(14, marks=pytest.mark.slow)])
def test_resumed_weights_are_bit_equal(tiny, tmp_path, interrupt_after, step):
    config = dataclasses.replace(tiny, checkpoint_every=4)
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", callbacks=[interrupt_after(step)])
    again = run(None, tmp_path / "cut", resume=True)
    for one, other in zip(
        whole.model.get_weights(), again.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(
        whole.history["validations"], again.history["validations"], strict=True
    ):
        # The mean training loss is since the last validation or resume, and the
        # speed is the clock's.
        for row in (one, other):
            del row["train_loss"], row["tokens_per_second"]
        assert one == other


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"precision": "mixed_float16"}, marks=pytest.mark.slow),
        pytest.param({"augmentation": AUGMENTATION}, marks=pytest.mark.slow),
    ],
    ids=["float32", "mixed_float16", "augmented"],
)
def test_resume_after_kill_9_is_bit_equal(tiny, tmp_path, notices, changes):
    settings = {"checkpoint_every": 3, "steps": 60, "validate_every": 60}
    settings |= {"jit_compile": "on", **changes}  # as in the other process
    config = dataclasses.replace(tiny, **settings)
    whole = run(config, tmp_path / "whole")
    out = tmp_path / "cut"
    code = (
        "import dataclasses, gpt_tf.training.loop as t\n"
        f"config = t.TrainingConfig(**{dataclasses.asdict(config)!r})\n"
        f"t.train(config, {str(out)!r}, verbose=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("checkpoints/step-*"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    again = run(None, out, resume=True)
    assert any("going on from step" in line for line in notices)
    for one, other in zip(
        whole.model.get_weights(), again.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def assert_same_weights(one, other):
    for mine, others in zip(
        one.model.get_weights(), other.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(mine, others)


def test_a_finished_run_goes_on_to_more_steps_when_asked_for_by_name(
    tiny, tmp_path, interrupt_after
):
    config = dataclasses.replace(
        tiny, steps=6, validate_every=3, checkpoint_every=2, jit_compile="off"
    )
    first = run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    longer = run(None, tmp_path / "whole", resume=True, steps=10)
    assert read_run(tmp_path / "whole") == dataclasses.replace(config, steps=10)
    validated = [row["step"] for row in longer.history["validations"]]
    assert validated == [3, 6, 9, 10]
    assert longer.history["validations"][:2] == first.history["validations"]
    # It may be killed and told again, with the same words or without the steps.
    with pytest.raises(KeyboardInterrupt):
        run(
            None,
            tmp_path / "cut",
            resume=True,
            steps=10,
            callbacks=[interrupt_after(3)],
        )
    assert_same_weights(run(None, tmp_path / "cut", resume=True, steps=10), longer)
    assert_same_weights(run(None, tmp_path / "cut", resume=True), longer)
    with pytest.raises(InputError, match=r"`steps`.*10.*Received: 9"):
        run(None, tmp_path / "cut", resume=True, steps=9)


def test_from_where_it_was_resumed_the_rate_is_that_of_a_longer_run(tiny, tmp_path):
    config = dataclasses.replace(tiny, steps=2, warmup_steps=0, jit_compile="off")
    rates = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(
            float(note.model.optimizer.learning_rate)
        )
    )
    run(config, tmp_path / "run", callbacks=[note])
    run(None, tmp_path / "run", resume=True, steps=4, callbacks=[note])
    peak = config.learning_rate
    short, long = (WarmupCosine(peak, peak / 10, 0, steps) for steps in (2, 4))
    wanted = [short(0), short(1), long(2), long(3)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6)


def test_little_text_trains_with_the_vocabulary_that_it_supports(
    tiny, tmp_path, notices
):
    text = (tmp_path / "some.txt", "One two three. Two three four.\n" * 800)
    text[0].write_text(text[1])  # 25 kB
    config = dataclasses.replace(
        tiny, corpus=str(text[0]), vocab_size=4096, steps=2, jit_compile="off"
    )
    result = run(config, tmp_path / "run")
    size = result.tokenizer.vocab_size
    assert 257 < size < 300 and result.model.vocab_size == size
    assert any(f"a vocabulary of {size} tokens" in line for line in notices)
    # The configuration is still the one that was asked for.
    assert run(config, tmp_path / "run", resume_or_start=True).model is not None


def test_another_seed_gives_other_weights(tiny, tmp_path):
    quick = dataclasses.replace(tiny, steps=2, jit_compile="off")
    first = run(quick, tmp_path / "one")
    second = run(dataclasses.replace(quick, seed=1), tmp_path / "two")
    differences = [
        np.abs(a - b).max()
        for a, b in zip(
            first.model.get_weights(), second.model.get_weights(), strict=True
        )
    ]
    assert max(differences) > 1e-3


@pytest.fixture(scope="module")
def cut(tiny, tmp_path_factory, interrupt_after):
    """A run with checkpoints at 4, 8 and 12."""
    config = dataclasses.replace(tiny, checkpoint_every=4)
    out = tmp_path_factory.mktemp("interrupted") / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(config, out, callbacks=[interrupt_after(14)])
    folders = sorted((out / "checkpoints").iterdir())
    assert [f.name[-2:] for f in folders] == ["04", "08", "12"]
    return out


@pytest.fixture
def interrupted(cut, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(cut, tmp_path / "cut")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("truncate", marks=pytest.mark.slow),
        "flip",
        pytest.param("manifest", marks=pytest.mark.slow),
        pytest.param("remove", marks=pytest.mark.slow),
    ],
)
def test_the_newest_good_checkpoint_is_used(interrupted, notices, damage):
    newest = interrupted / "checkpoints" / "step-00000012"
    state = newest / "state.safetensors"
    data = bytearray(state.read_bytes())
    if damage == "truncate":
        state.write_bytes(data[:-7])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        state.unlink()
    run(None, interrupted, resume=True)
    assert any("damaged checkpoint" in line for line in notices)
    assert "going on from step 8" in notices


def test_when_no_checkpoint_is_good_it_says_so(interrupted):
    for folder in (interrupted / "checkpoints").iterdir():
        (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match="None of the 3"):
        run(None, interrupted, resume=True)


def test_a_checkpoint_of_another_shape_is_refused(interrupted):
    run_json = artifacts.read_json(interrupted / "run.json")
    run_json["config"]["num_layers"] = 2
    artifacts.write_sealed_json(interrupted / "run.json", run_json)
    with pytest.raises(InputError, match="num_layers=1 instead of 2"):
        run(None, interrupted, resume=True)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_token_files_are_refused(interrupted, damage):
    path = interrupted / "data" / "train.tokens"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[10] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-2])
    with pytest.raises(DamagedFileError, match=r"train\.tokens"):
        run(None, interrupted, resume=True)


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(
    tiny, tmp_path, monkeypatch
):
    save, calls = safetensors.numpy.save_file, []

    def full(state, path, **options):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path, **options)

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        run(dataclasses.replace(tiny, checkpoint_every=4), tmp_path / "run")
    left = os.listdir(tmp_path / "run" / "checkpoints")
    assert left == ["step-00000004"]
    artifacts.check_manifest(tmp_path / "run" / "checkpoints" / left[0], "checkpoint")


def test_old_checkpoints_make_room(tiny, tmp_path):
    config = dataclasses.replace(tiny, checkpoint_every=2, keep_checkpoints=2)
    run(config, tmp_path / "run")
    names = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert names == ["step-00000018", "step-00000020"]


@pytest.mark.slow
def test_early_stopping_keeps_the_best_weights_across_a_resume(
    tiny, tmp_path, interrupt_after
):
    config = dataclasses.replace(
        tiny,
        learning_rate=0.5,  # far too high: it gets worse
        warmup_steps=6,
        validate_every=2,
        checkpoint_every=2,
        patience=2,
        steps=40,
    )
    whole = run(config, tmp_path / "whole")
    losses = [row["loss"] for row in whole.history["validations"]]
    assert len(losses) < 20
    assert whole.validation_loss == min(losses)
    with pytest.raises(KeyboardInterrupt):
        stop = 2 * len(losses) - 1
        run(config, tmp_path / "cut", callbacks=[interrupt_after(stop)])
    again = run(None, tmp_path / "cut", resume=True)
    assert again.validation_loss == whole.validation_loss
    for one, other in zip(
        whole.model.get_weights(), again.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_any_tf_keras_callback_works(tiny, tmp_path):
    seen = []
    counter = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((epoch, "val_loss" in logs))
    )
    logger = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    run(tiny, tmp_path / "run", callbacks=[counter, logger])
    assert seen == [(0, True), (1, True)]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_a_keras_3_callback_gets_the_teaching_error(tiny, tmp_path):
    import keras as keras_3

    with pytest.raises(InputTypeError, match="tf_keras"):
        run(tiny, tmp_path / "run", callbacks=[keras_3.callbacks.History()])
    assert not (tmp_path / "run").exists()


def test_samples_are_written_while_training(tiny, tmp_path, notices):
    config = dataclasses.replace(tiny, sample_every=10, sample_prompt="the")
    run(config, tmp_path / "run")
    assert sum(line.startswith("step 10 writes:\nthe") for line in notices) == 1


def test_recorded_losses_are_means_since_the_last_record(tiny, tmp_path):
    losses = []

    class PerStep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append((batch, float(logs["loss"])))

    config = dataclasses.replace(tiny, steps=30, validate_every=30)
    result = run(config, tmp_path / "run", callbacks=[PerStep()])
    sums = np.array([(batch + 1) * mean for batch, mean in losses])
    expected = [sums[0], (sums[9] - sums[0]) / 9]
    expected += [(sums[19] - sums[9]) / 10, (sums[29] - sums[19]) / 10]
    found = [row["loss"] for row in result.history["steps"]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert result.history["validations"][0]["tokens_per_second"] > 0


# Divergence


def finite_checkpoints(out):
    """The steps whose checkpoints a run left, all of finite numbers."""
    folders = sorted((out / "checkpoints").iterdir())
    for folder in folders:
        artifacts.check_manifest(folder, "checkpoint")
        state = safetensors.numpy.load_file(folder / "state.safetensors")
        assert all(np.isfinite(array).all() for array in state.values()), folder
    return [int(folder.name[-8:]) for folder in folders]


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, learning_rate=1e30, warmup_steps=0, checkpoint_every=1, jit_compile="off"
    )
    with pytest.raises(TrainingDivergedError, match=r"loss of \w+ at step [12]\b"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "history.json").exists()
    assert len(finite_checkpoints(tmp_path / "run")) <= 1


class Spoiling(keras.callbacks.Callback):
    """Let the update of a step write NaN; the loss shows it one step later."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.step - 1:
            moment = self.model.optimizer.variables[-1]
            moment.assign(np.full(moment.shape, np.nan))

    def on_train_batch_end(self, batch, logs=None):
        self.loss = logs["loss"]


@pytest.mark.parametrize(
    ("step", "seen_at"),
    [
        pytest.param(4, 4, marks=pytest.mark.slow, id="checkpoint"),
        pytest.param(5, 6, id="between"),
        pytest.param(20, 20, marks=pytest.mark.slow, id="last step"),
    ],
)
def test_no_checkpoint_is_written_of_weights_that_are_nan(
    tiny, tmp_path, step, seen_at
):
    config = dataclasses.replace(
        tiny, checkpoint_every=2, validate_every=20, jit_compile="off"
    )
    spoiling = Spoiling(step)
    with pytest.raises(TrainingDivergedError, match=rf"step {seen_at}\b"):
        run(config, tmp_path / "run", callbacks=[spoiling])
    assert np.isfinite(spoiling.loss)
    before = range(2, step, 2)
    assert finite_checkpoints(tmp_path / "run") == [*before][-3:]
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_a_callback_ends_keeps_no_model_of_nan(tiny, tmp_path):
    class Ending(Spoiling):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == self.step - 1

    config = dataclasses.replace(
        tiny, steps=6, validate_every=6, checkpoint_every=0, jit_compile="off"
    )
    with pytest.raises(TrainingDivergedError, match=r"step 3\b"):
        run(config, tmp_path / "run", callbacks=[Ending(3)])
    assert not (tmp_path / "run" / "model").exists()


def test_a_student_that_diverges_stops_too(trained, tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"loss of nan at step 3\b"):
        distil(
            trained.out,
            tmp_path / "student",
            {"num_layers": 1},
            steps=6,
            jit_compile="off",
            callbacks=[Spoiling(2)],
            verbose=False,
        )
    assert not (tmp_path / "student" / "model").exists()


def forge_newest(run, change):
    """Let `change` do what it likes to the newest checkpoint, and describe it anew."""
    newest = run / "checkpoints" / "step-00000012"
    change(newest)
    facts = artifacts.read_json(newest / "manifest.json")
    facts = {key: facts[key] for key in ("step", "best", "config")}
    names = ["state.safetensors", "history.json"]
    artifacts.write_manifest(newest, "checkpoint", names, **facts)


def in_state(change):
    def forge(folder):
        state = safetensors.numpy.load_file(folder / "state.safetensors")
        state["model/0003"] = change(state["model/0003"])
        safetensors.numpy.save_file(state, folder / "state.safetensors")

    return forge


@pytest.mark.parametrize(
    "change",
    [
        in_state(lambda array: array * np.nan),
        lambda folder: (folder / "history.json").write_text('{"loss": NaN}'),
        lambda folder: (folder / "state.safetensors").write_bytes(b"\xff" * 99),
    ],
    ids=["NaN in the state", "NaN in the history", "no tensors"],
)
def test_a_checkpoint_that_is_no_good_is_passed_over(interrupted, notices, change):
    """Whatever its hash says: versions before wrote NaN, and others may forge."""
    forge_newest(interrupted, change)
    run(None, interrupted, resume=True)
    assert "going on from step 8" in notices


def test_a_checkpoint_of_another_type_is_refused(interrupted):
    forge_newest(interrupted, in_state(lambda array: array.astype("int64")))
    with pytest.raises(InputError, match=r"model/0003.*int64"):
        run(None, interrupted, resume=True)


def test_an_existing_run_is_not_overwritten_unasked(trained, tiny):
    before = (trained.out / "run.json").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        run(tiny, trained.out)
    assert (trained.out / "run.json").read_bytes() == before


def test_overwriting_replaces_our_files_and_leaves_others(tiny, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="something else"):
        run(tiny, out)
    run(tiny, out, overwrite=True)
    again = run(dataclasses.replace(tiny, num_layers=2), out, overwrite=True)
    assert again.model.num_layers == 2
    assert (out / "thesis.txt").read_text() == "precious"


def test_a_bad_corpus_leaves_an_existing_run_alone(tiny, tmp_path):
    first = run(tiny, tmp_path / "run")
    names = sorted(os.listdir(tmp_path / "run"))
    bad = dataclasses.replace(tiny, corpus=str(tmp_path / "missing"))
    with pytest.raises(InputError, match="missing"):
        run(bad, tmp_path / "run", overwrite=True)
    too_long = dataclasses.replace(tiny, context_length=10**6)
    with pytest.raises(InputError, match="longer than the text"):
        run(too_long, tmp_path / "run", overwrite=True)
    assert sorted(os.listdir(tmp_path / "run")) == names
    assert sorted(os.listdir(tmp_path)) == ["run"], "a half-written folder was left"
    np.testing.assert_array_equal(
        load_model(tmp_path / "run")[0].get_weights()[0], first.model.get_weights()[0]
    )


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(InputError, match="interrupted run"):
        run(None, tmp_path, resume=True)


def test_a_tampered_model_is_refused(tiny, tmp_path):
    run(tiny, tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.keras"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="SHA-256"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"dropout": 1.5},
        {"precision": "float8"},
        {"strategy": "telepathy"},
        {"learning_rate": -1},
        {"batch_size": 6, "gradient_accumulation_steps": 4},
        {"validation_fraction": 1.0},
        {"augmentation": {"bpe_dropout": 1.0}},
        {"augmentation": {"dropout": 0.1}},
        {"init_from": "runs/a", "quantization": {}, "precision": "mixed_float16"},
        *({name: value} for name in NOT_BOUNDED for value in NOT_FINITE),
    ],
)
def test_impossible_configurations_are_refused(changes):
    with pytest.raises(InputError, match="Received"):
        TrainingConfig(**changes)


def test_what_is_quantised_is_trained_in_float32(tmp_path, monkeypatch):
    from gpt_tf.training import loop

    before = TrainingConfig(precision="mixed_bfloat16")
    config = {"config": dataclasses.asdict(before), "kind": "run"}
    artifacts.write_json(tmp_path / "run.json", config)
    seen = []
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: seen.append(config))
    quantize(tmp_path, tmp_path / "new")
    distil(tmp_path, tmp_path / "new", quantization={})
    distil(tmp_path, tmp_path / "new")
    found = [config.precision for config in seen]
    assert found == ["float32", "float32", "mixed_bfloat16"]


def test_the_learning_rate_rises_and_falls():
    schedule = WarmupCosine(1.0, 0.1, warmup_steps=10, total_steps=110)
    rates = [float(schedule(step)) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55, abs=1e-3)
    assert rates[110] == rates[119] == pytest.approx(0.1)
    again = WarmupCosine.from_config(schedule.get_config())
    assert float(again(37)) == rates[37]


def test_training_is_silent_when_asked(tiny, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny, tmp_path / "run")
    assert capsys.readouterr().out == ""


# Augmentation


@pytest.fixture
def augmented(tiny):
    """An augmented configuration of twelve steps."""
    return dataclasses.replace(
        tiny,
        augmentation=AUGMENTATION,
        steps=12,
        validate_every=6,
        checkpoint_every=2,
        jit_compile="off",
    )


def test_an_augmented_run_is_resumed_bit_for_bit(augmented, tmp_path, interrupt_after):
    whole = run(augmented, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(augmented, tmp_path / "cut", callbacks=[interrupt_after(5)])
    again = run(None, tmp_path / "cut", resume=True)
    for one, other in zip(
        whole.model.get_weights(), again.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_validation_reads_the_text_as_it_stands(augmented, tmp_path):
    """Of weights that hardly move, so that only what is read makes a difference."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "dropout": 0.0}
    still |= {"steps": 6, "checkpoint_every": 0}
    config = dataclasses.replace(augmented, **still)
    noisy = run(config, tmp_path / "noisy").history["validations"][0]
    config = dataclasses.replace(config, augmentation=None)
    plain = run(config, tmp_path / "plain").history["validations"][0]
    assert noisy["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert abs(noisy["train_loss"] - plain["train_loss"]) > 1e-5


def test_a_run_of_before_there_was_augmentation_can_be_read(trained, tmp_path):
    run_json = artifacts.read_json(trained.out / "run.json")
    assert run_json["config"].pop("augmentation") is None
    del run_json["sha256"]  # there was none either
    artifacts.write_json(tmp_path / "run.json", run_json)
    assert read_run(tmp_path) == read_run(trained.out)


def test_an_augmented_run_is_told_from_another(augmented, tmp_path):
    short = dataclasses.replace(augmented, steps=2, validate_every=2)
    run(short, tmp_path / "run")
    again = run(short, tmp_path / "run", resume_or_start=True)
    assert again.history["validations"][0]["step"] == 2
    other = dataclasses.replace(short, augmentation={"bpe_dropout": 0.3})
    with pytest.raises(InputError, match="augmentation"):
        run(other, tmp_path / "run", resume_or_start=True)


def test_what_starts_from_an_augmented_run_reads_the_text_as_it_stands(
    augmented, tmp_path, monkeypatch
):
    from gpt_tf.training import loop

    artifacts.write_json(
        tmp_path / "run.json", {"config": dataclasses.asdict(augmented), "kind": "run"}
    )
    seen = []
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: seen.append(config))
    for start in (loop.quantize, loop.distil):
        start(tmp_path, tmp_path / "new")
        start(tmp_path, tmp_path / "new", augmentation={"bpe_dropout": 0.1})
    found = [config.augmentation for config in seen]
    assert found[0] is found[2] is None
    assert [fields["bpe_dropout"] for fields in found[1::2]] == [0.1, 0.1]


def command_line(monkeypatch, *arguments):
    """Return the changes of a course that a command asks for."""
    from typer.testing import CliRunner

    from gpt_tf.cli import app
    from gpt_tf.training import loop

    class Told(Exception):
        pass

    def tell(*_, **options):
        raise Told(options)

    monkeypatch.setattr(loop, arguments[0], tell)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, Told), result.output
    return result.exception.args[0]


COMMON = (
    *("--bpe-dropout", "0.1", "--token-dropout", "0.2", "--token-replacement", "0.3"),
    *("--replacement", "uniform", "--mix-documents", "0.4", "--no-random-offsets"),
)
FIELDS = {
    "bpe_dropout": 0.1,
    "token_dropout": 0.2,
    "token_replacement": 0.3,
    "replacement": "uniform",
    "mix_documents": 0.4,
    "random_offsets": False,
}


def test_the_command_line_has_every_switch(monkeypatch):
    writer = ("--teacher", "runs/t", "--written-tokens", "50")
    found = command_line(monkeypatch, "train", *COMMON, *writer)
    assert found["augmentation"] == {
        **FIELDS,
        "teacher": "runs/t",
        "written_tokens": 50,
    }
    assert not {*FIELDS, "teacher", "written_tokens"} & found.keys()
    found = command_line(monkeypatch, "distil", "--teacher", "runs/t", *COMMON)
    assert found["augmentation"] == FIELDS
    for name in ("train", "distil"):
        assert "augmentation" not in command_line(monkeypatch, name)


# Starting from a trained model, quantisation-aware


def quantize_quietly(*arguments, **options):
    return quantize(*arguments, **{"verbose": False, **options})


@pytest.fixture(scope="module")
def quantized(trained, tmp_path_factory):
    """A finished quantisation-aware run of six steps, with checkpoints."""
    return quantize_quietly(
        trained.out,
        tmp_path_factory.mktemp("qat") / "whole",
        {"calibration_batches": 3},
        steps=6,
        checkpoint_every=2,
        keep_checkpoints=9,
        jit_compile="off",
    )


def test_a_quantised_run_starts_from_the_model_and_its_text(trained, quantized):
    from gpt_tf.quantization.qat import activation_ranges, to_float

    config = artifacts.read_json(quantized.out / "run.json")["config"]
    assert config["corpus"] == str(trained_corpus(trained))
    assert config["learning_rate"] == PRESETS["tiny"].learning_rate / 20
    for split in ("train", "validation"):
        same = [
            (r.out / "data" / f"{split}.tokens").read_bytes()
            for r in (trained, quantized)
        ]
        assert same[0] == same[1]
    initial, _ = load_model(quantized.out / "initial")
    assert all(low < high for low, high in activation_ranges(initial).values())
    for one, other in zip(
        to_float(initial).get_weights(), trained.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert quantized.validation_loss < trained.validation_loss + 0.05


def trained_corpus(run):
    return artifacts.read_json(run.out / "run.json")["config"]["corpus"]


def test_the_finished_quantised_model_is_loaded_with_its_ranges(trained, quantized):
    from gpt_tf.quantization.qat import activation_ranges

    model, tokenizer = load_model(quantized.out)
    assert activation_ranges(model) == activation_ranges(quantized.model)
    tokens = np.array([tokenizer.encode("the quick brown fox")], "int32")
    np.testing.assert_array_equal(model(tokens), quantized.model(tokens))
    assert np.abs(model(tokens) - trained.model(tokens)).max() > 1e-4
    manifest = artifacts.check_manifest(quantized.out / "model", "model")
    source = artifacts.sha256_of(trained.out / "model" / "model.keras")
    assert manifest["made_from"]["model"] == source
    text = cached_forward.generate(model, "the", tokenizer=tokenizer, max_new_tokens=4)
    assert isinstance(text, str)


def test_a_quantised_run_is_resumed_bit_for_bit(quantized, tmp_path):
    # As a process leaves it that was killed after step 3.
    cut = tmp_path / "cut"
    shutil.copytree(quantized.out, cut)
    for name in ("model", "checkpoints/step-00000004", "checkpoints/step-00000006"):
        shutil.rmtree(cut / name)
    again = quantize_quietly(None, cut, resume=True)
    states = [
        (folder / "checkpoints/step-00000006/state.safetensors").read_bytes()
        for folder in (quantized.out, cut)
    ]
    assert states[0] == states[1]
    for one, other in zip(
        again.model.get_weights(), quantized.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    earlier = cut / "checkpoints/step-00000002/state.safetensors"
    assert earlier.read_bytes() != states[0]


@pytest.mark.slow
def test_a_quantised_run_is_the_same_on_four_devices(trained, tmp_path):
    from gpt_tf.quantization.qat import activation_ranges

    one, four = (
        quantize_quietly(
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


def test_a_float_model_is_trained_further(trained, tmp_path):
    config = dataclasses.replace(
        PRESETS["tiny"],
        corpus=trained_corpus(trained),
        init_from=trained.out,
        steps=1,
        learning_rate=1e-9,
        embedding_dim=999,  # the model's is taken
        strategy="one_device",
        jit_compile="off",
    )
    further = run(config, tmp_path / "further")
    assert further.validation_loss == pytest.approx(trained.validation_loss, abs=1e-4)
    assert type(further.model) is type(trained.model)


def test_what_cannot_be_quantised_is_refused(trained, quantized, tmp_path):
    with pytest.raises(InputError, match="there is none"):
        quantize_quietly(tmp_path, tmp_path / "out", corpus="shakespeare")
    with pytest.raises(InputError, match="`corpus`"):
        quantize_quietly(trained.out / "model", tmp_path / "out")
    with pytest.raises(InputError, match="already"):
        quantize_quietly(quantized.out, tmp_path / "out")
    with pytest.raises(InputError, match="at most 32"):
        quantize_quietly(trained.out, tmp_path / "out", context_length=64)
    with pytest.raises(InputError, match="Received: none"):
        quantize_quietly(None, tmp_path / "out")
    with pytest.raises(InputError, match="names a trained model"):
        TrainingConfig(quantization={})
    with pytest.raises(InputError, match="keeps its own"):
        quantize_quietly(None, quantized.out, {"weight_bits": 4}, resume=True)
    assert not (tmp_path / "out").exists()


def test_a_run_in_use_by_another_process_is_refused(trained):
    before = sorted(trained.out.rglob("*"))
    with (
        artifacts.locked(trained.out),
        pytest.raises(InputError, match="in use by another process"),
    ):
        train(
            PRESETS["tiny"],
            trained.out,
            overwrite=True,
            verbose=False,
        )
    assert sorted(trained.out.rglob("*")) == before
