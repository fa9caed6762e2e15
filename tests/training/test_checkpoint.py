"""Exact resume, damaged checkpoints, and runs that diverge."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError, TrainingDivergedError
from gpt_tf.training.loop import distil

AUGMENTATION = {
    "bpe_dropout": 0.2,
    "token_dropout": 0.1,
    "token_replacement": 0.1,
    "mix_documents": 0.3,
}


@pytest.mark.parametrize(
    ("step", "changes"), [(3, {}), (14, {"augmentation": AUGMENTATION})]
)
def test_resumed_weights_are_bit_equal(
    tiny, run, have_same_weights, tmp_path, interrupt_after, step, changes
):
    config = dataclasses.replace(tiny, checkpoint_every=4, **changes)
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", callbacks=[interrupt_after(step)])
    again = run(None, tmp_path / "cut", resume=True)
    assert have_same_weights(whole, again)
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
def test_resume_after_kill_9_is_bit_equal(
    tiny, run, have_same_weights, tmp_path, notices, changes
):
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
    assert have_same_weights(whole, again)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_weights_across_a_resume(
    tiny, run, have_same_weights, tmp_path, interrupt_after
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
    assert have_same_weights(whole, again)


def test_old_checkpoints_make_room(tiny, run, tmp_path):
    config = dataclasses.replace(tiny, checkpoint_every=2, keep_checkpoints=2)
    run(config, tmp_path / "run")
    names = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert names == ["step-00000018", "step-00000020"]


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(
    tiny, run, tmp_path, monkeypatch
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


# Damaged and forged checkpoints


def flip(folder):
    state = folder / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)


def describe_anew(folder):
    facts = artifacts.read_json(folder / "manifest.json")
    facts = {key: facts[key] for key in ("step", "best", "config")}
    names = ["state.safetensors", "history.json"]
    artifacts.write_manifest(folder, "checkpoint", names, **facts)


def change_state(folder, change):
    state = safetensors.numpy.load_file(folder / "state.safetensors")
    state["model/0003"] = change(state["model/0003"])
    safetensors.numpy.save_file(state, folder / "state.safetensors")
    describe_anew(folder)


def write(folder, name, data):
    (folder / name).write_bytes(data)
    describe_anew(folder)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda folder: change_state(folder, lambda array: array * np.nan),
        lambda folder: write(folder, "history.json", b'{"loss": NaN}'),
        lambda folder: write(folder, "state.safetensors", b"\xff" * 99),
    ],
    ids=["flip", "NaN", "history", "no tensors"],
)
def test_the_newest_good_checkpoint_is_used(interrupted, run, notices, damage):
    """Whatever its hash says: versions before wrote NaN, and others may forge."""
    damage(interrupted / "checkpoints" / "step-00000012")
    run(None, interrupted, resume=True)
    assert any("damaged checkpoint" in line for line in notices)
    assert "going on from step 8" in notices


def test_when_no_checkpoint_is_good_it_says_so(interrupted, run):
    for folder in (interrupted / "checkpoints").iterdir():
        (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match="None of the 3"):
        run(None, interrupted, resume=True)


def test_a_checkpoint_of_another_shape_or_type_is_refused(interrupted, run):
    newest = interrupted / "checkpoints" / "step-00000012"
    change_state(newest, lambda array: array.astype("int64"))
    with pytest.raises(InputError, match=r"model/0003.*int64"):
        run(None, interrupted, resume=True)
    run_json = artifacts.read_json(interrupted / "run.json")
    run_json["config"]["num_layers"] = 2
    artifacts.write_sealed_json(interrupted / "run.json", run_json)
    with pytest.raises(InputError, match="num_layers=1 instead of 2"):
        run(None, interrupted, resume=True)


# Divergence


def finite_checkpoints(out):
    """The steps whose checkpoints a run left, all of finite numbers."""
    folders = sorted((out / "checkpoints").iterdir())
    for folder in folders:
        artifacts.check_manifest(folder, "checkpoint")
        state = safetensors.numpy.load_file(folder / "state.safetensors")
        assert all(np.isfinite(array).all() for array in state.values()), folder
    return [int(folder.name[-8:]) for folder in folders]


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(tiny, run, tmp_path):
    config = dataclasses.replace(
        tiny, learning_rate=1e30, warmup_steps=0, checkpoint_every=1
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
    tiny, run, tmp_path, step, seen_at
):
    config = dataclasses.replace(tiny, checkpoint_every=2, validate_every=20)
    spoiling = Spoiling(step)
    with pytest.raises(TrainingDivergedError, match=rf"step {seen_at}\b"):
        run(config, tmp_path / "run", callbacks=[spoiling])
    assert np.isfinite(spoiling.loss)
    before = range(2, step, 2)
    assert finite_checkpoints(tmp_path / "run") == [*before][-3:]
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_a_callback_ends_keeps_no_model_of_nan(tiny, run, tmp_path):
    class Ending(Spoiling):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == self.step - 1

    config = dataclasses.replace(tiny, steps=6, validate_every=6, checkpoint_every=0)
    with pytest.raises(TrainingDivergedError, match=r"step 3\b"):
        run(config, tmp_path / "run", callbacks=[Ending(3)])
    assert not (tmp_path / "run" / "model").exists()


def test_a_student_that_diverges_stops_too(trained, tmp_path):
    options = {"steps": 6, "jit_compile": "off", "verbose": False}
    with pytest.raises(TrainingDivergedError, match=r"loss of nan at step 3\b"):
        distil(
            trained.out,
            tmp_path / "student",
            {"num_layers": 1},
            callbacks=[Spoiling(2)],
            **options,
        )
    assert not (tmp_path / "student" / "model").exists()
