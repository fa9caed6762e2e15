"""A small model, its tokenizer and its exported files, made once for all tests."""

import argparse
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

import gpt_tf
from gpt_tf.export.tflite import export_tflite
from gpt_tf.quantization.calibration import calibrate
from gpt_tf.quantization.modes import MODES
from gpt_tf.text.tokenizer import BPETokenizer
from tests.export.runner import Runner

VOCAB_SIZE = 288
CONTEXT = 40
PREFILL_LENGTHS = (1, 4, 16)
FIXED_MODES = ("int8", "int8_full", "int16x8")


@dataclasses.dataclass
class Exported:
    """A file, what was said of it, and the model that it was made of."""

    path: Path
    manifest: dict
    model: gpt_tf.GPTModel

    def runner(self):
        return Runner(self.path)


@pytest.fixture(scope="session")
def build_model():
    """Make a small GPTModel in which every weight matters."""
    import tf_keras as keras

    def build(**changes):
        keras.utils.set_random_seed(3)
        arguments = {
            "vocab_size": VOCAB_SIZE,
            "embedding_dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "context_length": CONTEXT,
            **changes,
        }
        model = gpt_tf.GPTModel(**arguments)
        generator = np.random.default_rng(11)
        for weight in model.weights:
            weight.assign_add(generator.normal(0, 0.1, weight.shape))
        return model

    return build


def with_four_bits(model):
    """Give a model kernels as a GGUF's Q4_1 has them: blocks of 32 with 16 values."""
    draw = np.random.default_rng(7)
    blocks = [layer for layer in model.layers if layer.name.startswith("block_")]
    for block in blocks:
        for name in block.weight_names:
            if name.endswith("_kernel"):
                kernel = getattr(block, name)
                inputs, outputs = kernel.shape
                q = draw.integers(0, 16, (inputs, outputs))
                q[::32], q[1::32] = 0, 15
                steps = draw.uniform(0.01, 0.06, (inputs // 32, outputs))
                steps = steps.astype(np.float16).astype(np.float32)
                low = -steps * draw.uniform(4, 12, steps.shape)
                steps[0, ::3] = low[0, ::3] = 0  # blocks that are all 0
                steps, low = (np.repeat(x, 32, axis=0) for x in (steps, low))
                kernel.assign(steps * q + low)
    return model


@pytest.fixture(scope="session")
def model(build_model):
    """The small model; who changes it makes one of their own."""
    return build_model()


@pytest.fixture(scope="session")
def text_ids():
    """A text that fills the model's context."""
    return np.random.default_rng(4).integers(0, VOCAB_SIZE, CONTEXT).astype("int32")


@pytest.fixture(scope="session")
def representative():
    """Texts to calibrate on."""
    shape = (8, CONTEXT)
    return np.random.default_rng(6).integers(0, VOCAB_SIZE, shape).astype("int32")


@pytest.fixture(scope="session")
def ranges_of(representative):
    """The ranges of a model's activations for a mode, measured once."""

    @functools.cache
    def measured(model, dtype):
        return calibrate(model, representative % model.vocab_size, dtype=dtype)

    return lambda model, mode: measured(model, MODES[mode].activations)


@pytest.fixture(scope="session")
def tokenizer(corpus_folder):
    """A byte-level tokenizer with fewer tokens than the small model."""
    texts = [path.read_text("utf-8") for path in sorted(corpus_folder.glob("*.txt"))]
    return BPETokenizer.train(texts, 280)


@pytest.fixture(scope="session")
def python_small():
    """A model that was trained, with its tokenizer and ids of a text of its kind."""
    root = Path(gpt_tf.__file__).parents[1]
    model, tokenizer = gpt_tf.load_model(root / "saved_models" / "python-small")
    text = Path(argparse.__file__).read_text("utf-8")
    return model, tokenizer, np.array(tokenizer.encode(text), np.int32)


@pytest.fixture(scope="session")
def python_ranges(python_small):
    """The ranges of the trained model's activations."""
    model, _, ids = python_small
    return calibrate(model, ids[:1024].reshape(8, 128))


@pytest.fixture(scope="session")
def export(tmp_path_factory, ranges_of):
    """Export a model in a mode."""

    def export(model, mode="float32", **options):
        if mode in FIXED_MODES:
            options.setdefault("ranges", ranges_of(model, mode))
        options.setdefault("prefill_lengths", PREFILL_LENGTHS)
        path = tmp_path_factory.mktemp(mode) / "small.tflite"
        return Exported(path, export_tflite(model, path, mode, **options), model)

    return export


@pytest.fixture(scope="session")
def exported(model, export):
    """The small model's file of a mode, written once."""
    return functools.cache(lambda mode: export(model, mode))
