"""A small run, to be divided in many ways."""

import dataclasses

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
