import dataclasses
import io
import math
import os
import struct
import threading
from types import SimpleNamespace

import pytest
import tf_keras as keras
from rich.console import Console

from gpt_tf.progress import (
    StepProgress,
    TrainingProgress,
    draw_history,
    print_knowledge,
    print_result,
)
from gpt_tf.training.config import PRESETS
from gpt_tf.training.loop import TrainingResult, train


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


def test_steps_are_shown_once_their_number_is_known(console):
    with StepProgress("windows", console) as progress:
        progress.notice("[5] tokens")
        progress.update(3, 10)
    assert not is_drawing()
    assert "[5] tokens" in text_of(console)
    assert "windows" in text_of(console)
    assert "3/10" in text_of(console)


def test_a_store_of_knowledge_is_a_table(console, tmp_path):
    store = SimpleNamespace(
        path=tmp_path / "knowledge",
        manifest={"count": 1234, "mapping": "derived"},
        passes=2,
        top_k=32,
        size_bytes=5_000_000,
        bytes_per_token=97,
    )
    print_knowledge(store, console)
    for part in ("1,234, 2 times", "the 32 likeliest", "5.0 MB", "97 bytes", "derived"):
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
            on_notice=lambda line: None,
        )
    assert not is_drawing()
    assert "1/20" in capsys.readouterr().out


def test_the_result_is_a_table(trained, console):
    print_result(trained, console)
    text = text_of(console)
    for part in (
        f"{trained.model.count_params():,}",
        "300 tokens",
        f"{trained.validation_loss:.4f}",
        f"{trained.validation_perplexity:.2f}",
        "loss.png",
    ):
        assert part in text, part


def test_a_result_without_validation_says_nothing_of_it(trained, console, tmp_path):
    out = tmp_path / "a [bold]name[/x]"
    result = TrainingResult(trained.model, trained.tokenizer, {}, out, None)
    print_result(result, Console(file=console.file, width=300))
    assert "validation" not in text_of(console)
    assert str(out / "model") in text_of(console)


STEPS = [{"step": step, "loss": 5.0 / step} for step in (1, 10, 20)]
VALIDATIONS = [{"step": step, "loss": 2.0, "perplexity": 7.4} for step in (10, 20)]


@pytest.mark.parametrize("steps", [STEPS, []])
@pytest.mark.parametrize("validations", [VALIDATIONS, VALIDATIONS[:1], []])
def test_the_history_is_drawn_as_a_png(tmp_path, steps, validations):
    path = tmp_path / "loss.png"
    draw_history({"steps": steps, "validations": validations}, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (880, 495)
    assert os.listdir(tmp_path) == ["loss.png"]


def test_a_history_of_nan_is_drawn_too(tmp_path):
    nan = float("nan")
    rows = [{"step": step, "loss": nan, "perplexity": nan} for step in (1, 2)]
    path = tmp_path / "loss.png"
    draw_history({"steps": rows, "validations": rows}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_of_the_history(tmp_path):
    pictures = []
    for index, loss in enumerate((2.0, 2.0, 3.0)):
        rows = [{**row, "loss": loss} for row in VALIDATIONS]
        path = tmp_path / f"{index}.png"
        draw_history({"steps": STEPS, "validations": rows}, path)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
