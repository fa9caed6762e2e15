"""A run that takes seconds, finished, and copies of it that were interrupted."""

import dataclasses
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf.training import loop, preparation
from gpt_tf.training.config import PRESETS
from gpt_tf.training.loop import train


class Counter(keras.callbacks.Callback):
    """Count the steps that are trained."""

    steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1


@pytest.fixture(scope="session")
def tiny(corpus_folder):
    """A configuration that takes seconds."""
    return dataclasses.replace(
        PRESETS["tiny"],
        num_layers=1,
        corpus=str(corpus_folder),
        vocab_size=270,
        context_length=16,
        batch_size=4,
        steps=4,
        validate_every=2,
        checkpoint_every=1,
        strategy="one_device",
        dropout=0.1,
        jit_compile="off",
    )


@pytest.fixture(scope="session")
def run():
    """Train silently."""

    def start(config, out, **options):
        return train(config, out, **{"verbose": False, **options})

    return start


@pytest.fixture
def start(notices):
    """Train, or go on; return the result, the steps trained and the notices."""

    def start(config, out, function=train, callbacks=(), **options):
        counter = Counter()
        notices.clear()
        options |= {"resume_or_start": True, "verbose": False}
        result = function(config, out, callbacks=[counter, *callbacks], **options)
        return result, counter.steps, notices

    return start


@pytest.fixture(scope="session")
def have_same_weights():
    """Whether two results have the same weights, bit for bit."""

    def compare(one, other):
        pairs = zip(one.model.get_weights(), other.model.get_weights(), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    return compare


@pytest.fixture(scope="session")
def finished(tiny, run, tmp_path_factory):
    """A run of four steps, made eagerly, with the checkpoints of steps 2, 3 and 4."""
    was = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    result = run(tiny, tmp_path_factory.mktemp("runs") / "finished")
    tf.config.run_functions_eagerly(was)
    return result


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return shutil.copytree(finished.out, tmp_path / "run")


@pytest.fixture
def cut():
    """Leave of a finished run what one has that was killed."""

    def cut(out, *, keep):
        shutil.rmtree(out / "model")
        for folder in (out / "checkpoints").iterdir():
            if folder.name not in [f"step-{step:08d}" for step in keep]:
                shutil.rmtree(folder)
        return out

    return cut


@pytest.fixture
def prepared_only(monkeypatch):
    """Let the verbs prepare a run, and not train it."""

    def prepare(config, out, **options):
        preparation.prepare(config, out, False)

    monkeypatch.setattr(loop, "train", prepare)


@pytest.fixture(scope="session")
def spoiling():
    """Make a callback after which a step's weights are NaN; the next loss shows it."""

    class Spoiling(keras.callbacks.Callback):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def on_train_batch_begin(self, batch, logs=None):
            if self.model.optimizer.iterations == self.step - 1:
                moment = self.model.optimizer.variables[-1]
                moment.assign(np.full(moment.shape, np.nan))

        def on_train_batch_end(self, batch, logs=None):
            self.loss = logs["loss"]

    return Spoiling
