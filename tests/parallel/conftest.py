"""A small run and a small fit, to be divided in many ways."""

import dataclasses

import numpy as np
import pytest

from gpt_tf.training.config import PRESETS
from gpt_tf.training.loop import train


@pytest.fixture
def config(corpus_folder):
    """A configuration of a small run."""
    return dataclasses.replace(
        PRESETS["tiny"], corpus=str(corpus_folder), vocab_size=270, jit_compile="off"
    )


@pytest.fixture
def run():
    """Train silently."""

    def start(config, out, **options):
        return train(config, out, verbose=False, **options)

    return start


@pytest.fixture(scope="session")
def fit():
    """Train a model on windows, in batches of 8; return its history."""

    def start(model, windows, epochs=2, **options):
        x, y = windows
        weights = np.ones(x.shape, "float32")
        weights[::3, 4:] = 0  # parts of a batch get unequal weight
        options |= {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
        return model.fit(x, y, sample_weight=weights, **options).history

    return start


@pytest.fixture(scope="session")
def assert_same():
    """Compare the weights of two models."""

    def compare(one, other, atol):
        for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)

    return compare
