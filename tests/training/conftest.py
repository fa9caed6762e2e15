"""A run that takes seconds, and one that was interrupted."""

import dataclasses
import shutil

import numpy as np
import pytest

from gpt_tf.training.config import PRESETS
from gpt_tf.training.loop import train


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


@pytest.fixture(scope="session")
def have_same_weights():
    """Whether two results have the same weights, bit for bit."""

    def compare(one, other):
        pairs = zip(one.model.get_weights(), other.model.get_weights(), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    return compare


@pytest.fixture(scope="session")
def cut(tiny, run, tmp_path_factory, interrupt_after):
    """A run that was killed after step 14, with checkpoints at 4, 8 and 12."""
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
