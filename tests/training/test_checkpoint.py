"""Exact resume, damaged checkpoints, and runs that diverge."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError, TrainingDivergedError
from gpt_tf.models.next_token import NextTokenLoss
from gpt_tf.text.dataset import TokenFile
from gpt_tf.training.run_folder import windows_of

pytestmark = pytest.mark.usefixtures("eagerly")

AUGMENTATION = {
    "bpe_dropout": 0.2,
    "token_dropout": 0.1,
    "token_replacement": 0.1,
    "mix_documents": 0.3,
}


def test_an_augmented_run_is_resumed_bit_for_bit(
    tiny, run, finished, have_same_weights, cut, tmp_path
):
    config = dataclasses.replace(tiny, augmentation=AUGMENTATION)
    whole = run(config, tmp_path / "whole")
    assert not have_same_weights(whole, finished)
    shutil.copytree(whole.out, tmp_path / "cut")
    again = run(None, cut(tmp_path / "cut", keep=[2, 3]), resume=True)
    assert have_same_weights(whole, again)
    for one, other in zip(
        whole.history["validations"], again.history["validations"], strict=True
    ):
        # The mean training loss is since the last validation or resume, and the
        # speed is the clock's.
        for row in (one, other):
            del row["train_loss"], row["tokens_per_second"]
        assert one == other
    # Validation has read the text as it stands.
    held_out = TokenFile.open(whole.out / "data" / "validation.tokens")
    windows = windows_of(held_out, config, shuffle=False)
    batches = [windows.batch(step) for step in range(config.validation_batches)]
    losses = [NextTokenLoss()(labels, whole.model(ids)) for ids, labels, _ in batches]
    assert whole.validation_loss == pytest.approx(np.mean(losses), rel=1e-5)


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
    tiny, run, have_same_weights, tmp_path, notices, traced, changes
):
    config = dataclasses.replace(tiny, checkpoint_every=2, **changes)
    whole = run(config, tmp_path / "whole")
    code = textwrap.dedent(f"""
        import os, signal
        from gpt_tf.training import loop
        import tensorflow as tf
        import tf_keras as keras

        def kill(batch, logs):
            if callback.model.optimizer.iterations == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=kill)
        # As in this process.
        options = {tf.config.optimizer.get_experimental_options()}
        tf.config.optimizer.set_experimental_options(options)
        config = loop.TrainingConfig(**{dataclasses.asdict(config)})
        out = {str(tmp_path / "cut")!r}
        loop.train(config, out, callbacks=[callback], verbose=False)
    """)
    process = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    again = run(None, tmp_path / "cut", resume=True)
    assert "going on from step 2" in notices
    assert have_same_weights(whole, again)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_weights_across_a_resume(
    tiny, run, have_same_weights, cut, tmp_path, traced
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
    shutil.copytree(whole.out, tmp_path / "cut")
    cut(tmp_path / "cut", keep=[2 * len(losses) - 2])
    again = run(None, tmp_path / "cut", resume=True)
    assert again.validation_loss == whole.validation_loss
    assert have_same_weights(whole, again)


def test_old_checkpoints_make_room(tiny, finished):
    names = sorted(os.listdir(finished.out / "checkpoints"))
    assert names == ["step-00000002", "step-00000003", "step-00000004"]
    assert len(names) == tiny.keep_checkpoints < tiny.steps


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
        run(tiny, tmp_path / "run")
    left = os.listdir(tmp_path / "run" / "checkpoints")
    assert left == ["step-00000001"]
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
def test_the_newest_good_checkpoint_is_used(
    copy_of_finished, cut, run, notices, interrupt_after, damage
):
    """Whatever its hash says: versions before wrote NaN, and others may forge."""
    cut(copy_of_finished, keep=[2, 3, 4])
    damage(copy_of_finished / "checkpoints" / "step-00000004")
    with pytest.raises(KeyboardInterrupt):
        run(None, copy_of_finished, resume=True, callbacks=[interrupt_after(1)])
    assert any("damaged checkpoint" in line for line in notices)
    assert "going on from step 3" in notices


def test_when_no_checkpoint_is_good_it_says_so(copy_of_finished, run):
    for folder in (copy_of_finished / "checkpoints").iterdir():
        (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match="None of the 3"):
        run(None, copy_of_finished, resume=True)


def test_a_checkpoint_of_another_shape_or_type_is_refused(copy_of_finished, run):
    newest = copy_of_finished / "checkpoints" / "step-00000004"
    change_state(newest, lambda array: array.astype("int64"))
    with pytest.raises(InputError, match=r"model/0003.*int64"):
        run(None, copy_of_finished, resume=True)
    run_json = artifacts.read_json(copy_of_finished / "run.json")
    run_json["config"]["num_layers"] = 2
    artifacts.write_sealed_json(copy_of_finished / "run.json", run_json)
    with pytest.raises(InputError, match="num_layers=1 instead of 2"):
        run(None, copy_of_finished, resume=True)


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


@pytest.mark.parametrize(
    ("step", "seen_at"),
    [
        pytest.param(2, 2, marks=pytest.mark.slow, id="checkpoint"),
        pytest.param(3, 4, id="between"),
        pytest.param(6, 6, marks=pytest.mark.slow, id="last step"),
    ],
)
def test_no_checkpoint_is_written_of_weights_that_are_nan(
    tiny, run, tmp_path, spoiling, step, seen_at
):
    changes = {"steps": 6, "checkpoint_every": 2, "validate_every": 6}
    callback = spoiling(step)
    with pytest.raises(TrainingDivergedError, match=rf"step {seen_at}\b"):
        run(tiny, tmp_path / "run", callbacks=[callback], **changes)
    assert np.isfinite(callback.loss)
    assert finite_checkpoints(tmp_path / "run") == [*range(2, step, 2)]
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_a_callback_ends_keeps_no_model_of_nan(
    tiny, run, tmp_path, spoiling
):
    ending = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(
            ending.model, "stop_training", True
        )
    )
    changes = {"validate_every": 4, "checkpoint_every": 0}
    with pytest.raises(TrainingDivergedError, match=r"step 1\b"):
        run(tiny, tmp_path / "run", callbacks=[spoiling(1), ending], **changes)
    assert not (tmp_path / "run" / "model").exists()
