"""A small exported file, and a model whose weights all matter."""

import numpy as np
import pytest

from gpt_tf.text.tokenizer import CharacterTokenizer

LETTERS = "abcdefghijklmnop <>&\n"


class Known:
    """A model of which the answer is known, with what explaining asks for."""

    mode = "made"
    context_length = 12

    def __init__(self):
        self.tokenizer = CharacterTokenizer.train([LETTERS])
        self.config = {"vocab_size": self.tokenizer.vocab_size}
        self.target = self.tokenizer.encode("p")[0]

    def reset(self):
        pass


def jolted(model):
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    return model


def export(folder, change=lambda model: model):
    """Export a small model as float32; return the file's path and the model."""
    import tf_keras as keras

    import gpt_tf
    from gpt_tf.export.tflite import export_tflite

    keras.utils.set_random_seed(3)
    tokenizer = CharacterTokenizer.train([LETTERS])
    model = gpt_tf.GPTModel(tokenizer.vocab_size, 12, 2, 3, context_length=16)
    path = folder / "gpt.tflite"
    export_tflite(
        change(model),
        path,
        "float32",
        tokenizer=tokenizer,
        prefill_lengths=(1, 4),
        allow_untrained=True,
    )
    return path, model


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    """A small file with its tokenizer."""
    return export(tmp_path_factory.mktemp("file"))[0]
