import json
import shutil

import kagglehub
import keras_nlp
import numpy as np
import pytest

import gpt_tf
from gpt_tf.errors import DamagedFileError, InputError, InputTypeError
from gpt_tf.models.gpt import GPTModel
from gpt_tf.pretrained import keras_hub
from gpt_tf.text.tokenizer import BPETokenizer
from tests.pretrained.folders import assert_same_logits, ids_of

pytestmark = pytest.mark.usefixtures("eagerly")
VOCAB_SIZE, TEXT = 270, "the quick brown fox, na\u00efve"
IDS = ids_of(VOCAB_SIZE, length=9)
GPT2 = {"num_heads": 3, "max_sequence_length": 16}
LLAMA = {"num_query_heads": 6, "num_key_value_heads": 2}
SCALING = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 16,
}


def backbone_of(kind, **fields):
    """Return a small backbone of KerasHub's, in which all weights matter."""
    found = getattr(keras_nlp.models, f"{kind}Backbone")(
        **{"vocabulary_size": VOCAB_SIZE, "num_layers": 2, "hidden_dim": 24},
        **{"intermediate_dim": 40, **(GPT2 if kind == "GPT2" else LLAMA), **fields},
    )
    generator = np.random.default_rng(0)
    for variable in found.weights:
        noise = generator.normal(0, 0.3, variable.shape)
        variable.assign(np.asarray(variable) + noise)
    return found


def logits_of(backbone):
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    return np.asarray(backbone.token_embedding(backbone(inputs), reverse=True))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("GPT2", {}),
        ("Llama", {}),
        ("Llama3", {**SCALING, "rope_max_wavelength": 500}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    ],
)
def test_an_object_has_the_logits_that_keras_hub_computes(kind, fields):
    backbone = backbone_of(kind, **fields)
    causal = getattr(keras_nlp.models, f"{kind}CausalLM")(backbone=backbone)
    model, tokenizer, facts = gpt_tf.open_model(causal)
    assert facts["format"] == "keras_hub"
    assert tokenizer is None
    is_tied = kind == "GPT2" or "tie_word_embeddings" in fields
    assert model.tie_embeddings == is_tied
    expected = logits_of(backbone)
    assert_same_logits(model(IDS), expected)
    layer = backbone.transformer_layers[1]
    kernel = layer._self_attention_layer._output_dense.kernel
    kernel.assign(1.1 * np.asarray(kernel))
    changed = gpt_tf.open_model(backbone).model
    with pytest.raises(AssertionError):
        assert_same_logits(changed(IDS), expected)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset of a GPT-2 with its tokenizer, and both as they were before."""
    place = tmp_path_factory.mktemp("keras_hub")
    ours = BPETokenizer.train(["the quick brown fox " * 50], VOCAB_SIZE)
    ours.backend.model.save(str(place))
    tokenizer = keras_nlp.models.GPT2Tokenizer(
        vocabulary=str(place / "vocab.json"), merges=str(place / "merges.txt")
    )
    causal = keras_nlp.models.GPT2CausalLM(
        backbone=backbone_of("GPT2"),
        preprocessor=keras_nlp.models.GPT2CausalLMPreprocessor(tokenizer),
    )
    causal.save_to_preset(str(place / "preset"))
    return place / "preset", causal, ours


def assert_is(found, causal, ours):
    assert_same_logits(found.model(IDS), logits_of(causal.backbone))
    assert found.tokenizer.encode(TEXT) == ours.encode(TEXT)
    assert found.tokenizer.end_of_text_id == ours.end_of_text_id


def test_a_preset_and_an_object_bring_their_tokenizer(preset):
    folder, causal, ours = preset
    for source in (folder, causal):
        assert_is(gpt_tf.open_model(source), causal, ours)


def test_a_preset_of_a_llama_opens(tmp_path):
    backbone = backbone_of("Llama")
    backbone.save_to_preset(str(tmp_path / "preset"))
    found = gpt_tf.open_model(tmp_path / "preset", context_length=20)
    assert found.model.context_length == 20
    assert found.facts["family"] == "llama"
    assert_same_logits(found.model(IDS), logits_of(backbone))


def test_a_preset_opens_by_its_name_from_the_cache(preset, tmp_path, monkeypatch):
    folder, causal, ours = preset
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    handle = kagglehub.handle.parse_model_handle("keras/gpt2/keras/gpt2_base_en/3")
    cache = kagglehub.cache.Cache()
    shutil.copytree(folder, cache.get_path(handle))
    for file in ("config.json", "model.weights.h5"):
        cache.mark_as_complete(handle, file)
    for file in ("vocabulary.json", "merges.txt"):
        cache.mark_as_complete(handle, f"assets/tokenizer/{file}")
    assert_is(gpt_tf.open_model("gpt2_base_en"), causal, ours)


def test_without_network_a_name_says_what_to_do(tmp_path, monkeypatch):
    def model_download(handle, path):
        raise OSError("Cannot reach it\nand many lines more")

    monkeypatch.setattr("kagglehub.model_download", model_download)
    for name in ("gpt2_medium_en", "gpt2_unheard_of"):
        with pytest.raises(InputError, match="network") as found:
            GPTModel.from_preset(name)
        assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="nothing"):
        GPTModel.from_preset(str(tmp_path / "nothing"))


def test_what_is_no_gpt_of_keras_hub_is_refused(make_model):
    other = keras_nlp.models.OPTBackbone(31, 1, 3, 12, 24, max_sequence_length=16)
    for value in (other, make_model(), None, 3):
        with pytest.raises(InputTypeError, match=type(value).__name__):
            gpt_tf.open_model(value)


def test_forms_that_a_gpt_model_has_not_are_refused():
    with pytest.raises(InputError, match="rope_scaling"):
        gpt_tf.open_model(backbone_of("Llama", rope_position_scaling_factor=2.0))
    backbone = backbone_of("Llama")
    backbone.transformer_layers[1]._feedforward_gate_dense.quantize("int8")
    with pytest.raises(InputError, match="int8"):
        gpt_tf.open_model(backbone)


# A preset's JSON names classes; only those of a GPT-2 or Llama reach KerasHub


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
