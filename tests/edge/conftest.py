"""A small model and its exported files, made once for all tests of the edge."""

import types

import numpy as np
import pytest

import gpt_tf
from gpt_tf.edge import EdgeGPT, session
from gpt_tf.export.litertlm import export_litertlm
from gpt_tf.export.tflite import export_tflite
from gpt_tf.text.tokenizer import CharacterTokenizer

CONTEXT = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n\u00e9"
VOCAB_SIZE = len(LETTERS) + 1


def small_model(**changes):
    """A model in which every weight matters."""
    import tf_keras as keras

    keras.utils.set_random_seed(3)
    arguments = {
        "vocab_size": VOCAB_SIZE,
        "embedding_dim": 12,
        "num_layers": 2,
        "num_heads": 3,
        "context_length": CONTEXT,
    }
    model = gpt_tf.GPTModel(**arguments | changes)
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    return model


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The model and its tokenizer; `tflite` and `litertlm` are its files."""
    folder = tmp_path_factory.mktemp("exported")
    model = small_model()
    tokenizer = CharacterTokenizer.train([LETTERS])
    options = {"mode": "float32", "prefill_lengths": (1, 4, 8)}
    export_tflite(model, folder / "gpt.tflite", tokenizer=tokenizer, **options)
    export_litertlm(model, tokenizer, folder / "gpt.litertlm", **options)
    return types.SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        tflite=folder / "gpt.tflite",
        litertlm=folder / "gpt.litertlm",
    )


@pytest.fixture(scope="module")
def gpt(exported):
    """The opened file, whose cache grows early and often."""
    before, session.GROWTH = session.GROWTH, 4
    with EdgeGPT(exported.litertlm) as opened:
        yield opened
    session.GROWTH = before


@pytest.fixture
def copied(exported, tmp_path):
    """Copy one of the files, with what stands beside it, to be damaged."""

    def copy(kind, *beside):
        source = getattr(exported, kind)
        for name in (source.name, *(beside or (source.name + ".json",))):
            (tmp_path / name).write_bytes((exported.folder / name).read_bytes())
        return tmp_path / source.name

    return copy
