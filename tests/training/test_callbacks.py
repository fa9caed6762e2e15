import dataclasses
import io
import math
import threading
from types import SimpleNamespace

import pytest
import tf_keras as keras
from rich.console import Console

from gpt_tf.training.callbacks import TrainingProgress
from gpt_tf.training.config import PRESETS
from gpt_tf.training.loop import train


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def run_of(**changes):
    """A run as far as its progress is shown."""
    facts = {
        "config": PRESETS["tiny"],
        "trained": SimpleNamespace(count_params=lambda: 12345),
        "step": 0,
        "tokens_per_step": 256,
        "own_loss": "loss",
        "distillation": None,
        "knowledge": None,
    }
    return SimpleNamespace(**{**facts, **changes})


@pytest.fixture
def progress(console):
    """The callback of a run of 20 steps that is at its start."""
    run = run_of()
    progress = TrainingProgress(run, console)
    progress.set_model(SimpleNamespace(stop_training=False))
    progress.on_train_begin()
    yield progress
    progress.close()


def take_steps(progress, count, loss=2.5):
    for batch in range(count):
        progress.run.step += 1
        progress.on_train_batch_end(batch, {"loss": loss})


def text_of(console):
    return console.file.getvalue()


def is_drawing():
    """Whether a bar is redrawn, once one that was stopped has had time to end."""
    threads = [t for t in threading.enumerate() if type(t).__module__ == "rich.live"]
    for thread in threads:
        if thread.done.is_set():
            thread.join(10)
    return any(thread.is_alive() for thread in threads)


def test_progress_shows_loss_steps_and_speed(progress, console):
    take_steps(progress, 3)
    assert is_drawing()
    progress.close()
    assert not is_drawing()
    text = text_of(console)
    assert "12,345 parameters on 5,120 tokens; the first step" in text
    for part in ("loss  2.500", "3/20", "tokens/s", "left"):
        assert part in text, part


def test_the_bar_goes_on_where_every_step_is_validated(progress, console):
    for _ in range(2):
        progress.on_train_begin()
        take_steps(progress, 1)
        progress.on_epoch_end(0, {"loss": 2.5})
    progress.close()
    assert "2/20" in text_of(console)
    assert text_of(console).count("parameters") == 1


def test_a_resumed_run_begins_at_its_step(console):
    progress = TrainingProgress(run_of(step=12), console)
    progress.on_train_begin()
    progress.close()
    assert "12/20" in text_of(console)


def test_the_bar_stops_with_the_last_step(progress):
    take_steps(progress, 19)
    assert is_drawing()
    take_steps(progress, 1)
    assert not is_drawing()


@pytest.mark.parametrize("loss", [1.5, float("nan"), 12.0])
def test_a_validation_is_one_line(progress, console, loss):
    take_steps(progress, 10)
    logs = {"loss": 2.0, "val_loss": loss, "val_token_accuracy": 0.125}
    progress.on_epoch_end(0, logs)
    (line,) = (s for s in text_of(console).splitlines() if "validation" in s)
    perplexity = math.exp(min(loss, 700.0))
    for part in ("step     10", f"validation {loss:.3f}", f"{perplexity:.2f}"):
        assert part in line
    progress.on_epoch_end(1, {"loss": 2.0})
    assert text_of(console).count("validation") == 1


def test_a_distilled_students_validation_is_its_own_loss(console):
    run = run_of(own_loss="student_loss", distillation=object(), step=7)
    progress = TrainingProgress(run, console)
    logs = {"loss": 0.5, "val_loss": 0.4, "val_student_loss": 2.0}
    logs |= {"val_token_accuracy": 0.25, "val_teacher_agreement": 0.75}
    progress.on_epoch_end(0, logs)
    for part in ("validation 2.000", "perplexity 7.39", "agreement 75.0%"):
        assert part in text_of(console)


def test_the_bar_stops_when_training_is_interrupted(corpus_folder, tmp_path, capsys):
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            dataclasses.replace(PRESETS["tiny"], vocab_size=270, num_layers=1),
            tmp_path / "run",
            corpus=str(corpus_folder),
            strategy="one_device",
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)],
        )
    assert not is_drawing()
    assert "1/20" in capsys.readouterr().out
