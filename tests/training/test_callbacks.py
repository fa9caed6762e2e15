import dataclasses
import io
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tf_keras as keras
from rich.console import Console

from gpt_tf.training.callbacks import TrainingProgress
from gpt_tf.training.config import PRESETS


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def progress_of(console):
    """Make the callback of a run of 20 steps, as far as its progress is shown."""
    made = []

    def make(**changes):
        facts = {
            "config": PRESETS["tiny"],
            "trained": SimpleNamespace(count_params=lambda: 12345),
            "step": 0,
            "tokens_per_step": 256,
            "own_loss": "loss",
            "distillation": None,
            "knowledge": None,
        }
        progress = TrainingProgress(SimpleNamespace(**{**facts, **changes}), console)
        progress.on_train_begin()
        made.append(progress)
        return progress

    yield make
    for progress in made:
        progress.close()


def take_steps(progress, count):
    for batch in range(count):
        progress.run.step += 1
        progress.on_train_batch_end(batch, {"loss": 2.5})


def is_drawing():
    """Whether a bar is redrawn, once one that was stopped has had time to end."""
    threads = [t for t in threading.enumerate() if type(t).__module__ == "rich.live"]
    for thread in threads:
        if thread.done.is_set():
            thread.join(10)
    return any(thread.is_alive() for thread in threads)


def test_progress_shows_loss_steps_and_speed(progress_of, console):
    progress = progress_of(step=12)
    take_steps(progress, 2)
    progress.on_train_begin()  # of the next call of `fit`
    take_steps(progress, 1)
    assert is_drawing()
    progress.close()
    assert not is_drawing()
    text = console.file.getvalue()
    assert text.count("12,345 parameters on 5,120 tokens; the first step") == 1
    for part in ("loss  2.500", "15/20", "tokens/s", "left"):
        assert part in text, part


@pytest.mark.parametrize("loss", [1.5, float("nan"), 12.0])
def test_a_validation_is_one_line(progress_of, console, loss):
    progress = progress_of(step=10)
    logs = {"loss": 2.0, "val_loss": loss, "val_token_accuracy": 0.125}
    progress.on_epoch_end(0, logs)
    progress.on_epoch_end(1, {"loss": 2.0})
    (line,) = (s for s in console.file.getvalue().splitlines() if "validation" in s)
    perplexity = math.exp(min(loss, 700.0))
    for part in ("step     10", f"validation {loss:.3f}", f"{perplexity:.2f}"):
        assert part in line


def test_a_distilled_students_validation_is_its_own_loss(progress_of, console):
    progress = progress_of(own_loss="student_loss", distillation=object())
    logs = {"loss": 0.5, "val_loss": 0.4, "val_student_loss": 2.0}
    logs |= {"val_token_accuracy": 0.25, "val_teacher_agreement": 0.75}
    progress.on_epoch_end(0, logs)
    for part in ("validation 2.000", "perplexity 7.39", "agreement 75.0%"):
        assert part in console.file.getvalue()


def test_the_bar_stops_when_training_is_interrupted(
    tiny, run, tmp_path, interrupt_after, capsys
):
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", callbacks=[interrupt_after(1)], verbose=True)
    assert not is_drawing()
    assert "1/20" in capsys.readouterr().out


def test_samples_are_written_while_training(tiny, run, tmp_path, notices):
    config = dataclasses.replace(tiny, sample_every=10, sample_prompt="the")
    run(config, tmp_path / "run")
    assert sum(line.startswith("step 10 writes:\nthe") for line in notices) == 1


def test_recorded_losses_are_means_since_the_last_record(tiny, run, tmp_path):
    losses = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(
            (batch + 1) * float(logs["loss"])
        )
    )
    config = dataclasses.replace(tiny, steps=30, validate_every=30)
    result = run(config, tmp_path / "run", callbacks=[note])
    expected = [losses[0], (losses[9] - losses[0]) / 9]
    expected += [(losses[19] - losses[9]) / 10, (losses[29] - losses[19]) / 10]
    found = [row["loss"] for row in result.history["steps"]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
