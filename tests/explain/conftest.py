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


class Counted(Known):
    """A model that likes "p" the more, the more of certain letters are there.

    A space counts nothing; where they stand makes no difference.
    """

    def __init__(self, seed=1, sign=1):
        super().__init__()
        self.weights = sign * np.random.default_rng(seed).normal(
            0.3, 1.0, self.tokenizer.vocab_size
        )
        self.weights[self.tokenizer.encode(" ")[0]] = 0

    def logits(self, ids):
        logits = np.zeros((len(ids), self.config["vocab_size"]))
        logits[:, self.target] = self.weights[ids].sum()
        return logits


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A small float32 file, and the model it was made of, whose weights all matter."""
    import tf_keras as keras

    import gpt_tf
    from gpt_tf.export.tflite import export_tflite

    keras.utils.set_random_seed(3)
    tokenizer = CharacterTokenizer.train([LETTERS])
    model = gpt_tf.GPTModel(tokenizer.vocab_size, 12, 2, 3, context_length=16)
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    path = tmp_path_factory.mktemp("file") / "gpt.tflite"
    options = {"prefill_lengths": (1, 4), "allow_untrained": True}
    export_tflite(model, path, "float32", tokenizer=tokenizer, **options)
    return path, model


@pytest.fixture
def file(exported):
    """The file alone."""
    return exported[0]
