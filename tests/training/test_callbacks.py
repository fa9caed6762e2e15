import io
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from gpt_tf.training.callbacks import Recorder, TrainingProgress
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


def test_recorded_losses_are_means_since_the_last_record():
    """Keras's logs are means since its epoch began: here, at steps 1 and 13."""
    run = SimpleNamespace(step=0, own_loss="loss", history={"steps": []})
    recorder = Recorder(run)
    losses = np.random.default_rng(1).uniform(1, 9, 30)
    for epoch in losses[:12], losses[12:]:
        for batch in range(len(epoch)):
            recorder.on_train_batch_end(batch, {"loss": epoch[: batch + 1].mean()})
    found = {row["step"]: row["loss"] for row in run.history["steps"]}
    expected = {
        1: losses[0],
        10: losses[1:10].mean(),
        20: losses[12:20].mean(),
        30: losses[20:].mean(),
    }
    assert found == pytest.approx(expected)


@pytest.mark.usefixtures("eagerly")
def test_the_bar_stops_when_training_is_interrupted(
    tiny, run, tmp_path, interrupt_after, capsys
):
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", callbacks=[interrupt_after(1)], verbose=True)
    assert not is_drawing()
    assert "1/4" in capsys.readouterr().out


@pytest.mark.usefixtures("eagerly")
def test_samples_are_written_while_training(
    tiny, run, tmp_path, notices, interrupt_after
):
    changes = {"sample_every": 2, "sample_prompt": "the", "checkpoint_every": 0}
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", callbacks=[interrupt_after(3)], **changes)
    assert sum(line.startswith("step 2 writes:\nthe") for line in notices) == 1
