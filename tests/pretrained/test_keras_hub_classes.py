"""A preset's JSON names classes; only those of a GPT-2 reach KerasHub."""

import json

import pytest

from gpt_tf.errors import DamagedFileError
from gpt_tf.pretrained import keras_hub

DTYPE = {
    "module": "keras",
    "class_name": "DTypePolicy",
    "config": {"name": "float32"},
    "registered_name": None,
}
CONFIG = {
    "module": "keras_nlp.src.models.gpt2.gpt2_backbone",
    "class_name": "GPT2Backbone",
    "registered_name": "keras_nlp>GPT2Backbone",
    "config": {
        "dtype": DTYPE,
        "vocabulary_size": 7,
        "hidden_dim": 8,
        "num_layers": 1,
        "num_heads": 2,
        "max_sequence_length": 5,
        "intermediate_dim": 16,
    },
}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def test_the_sizes_of_a_preset_are_read_without_keras_hub(tmp_path):
    write(tmp_path, CONFIG)
    found = keras_hub.describe(tmp_path).check()
    assert (found["vocab_size"], found["feedforward_dim"]) == (7, 16)


@pytest.mark.parametrize(
    "part",
    [
        {"module": "os", "class_name": "system", "config": {}},
        {"module": "keras.layers", "class_name": "Lambda", "config": {}},
        {"class_name": "DTypePolicy", "module": "builtins"},
        {"class_name": "DTypePolicy", "registered_name": "x>Lambda"},
    ],
)
def test_other_classes_are_refused_wherever_they_stand(tmp_path, part):
    write(tmp_path, {**CONFIG, "config": {**CONFIG["config"], "dtype": [part]}})
    with pytest.raises(DamagedFileError):
        keras_hub.describe(tmp_path)
