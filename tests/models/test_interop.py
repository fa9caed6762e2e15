import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import gpt_tf
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models import interop
from gpt_tf.models.gpt import GPTModel
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def model():
    model = GPTModel(31, 12, 2, 3, context_length=16)
    generator = np.random.default_rng(4)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.1, weight.shape))
    return model


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop") / "hf"
    interop.to_huggingface(model, folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the model's files that a test may change."""
    return shutil.copytree(written, tmp_path / "hf")


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def change_config(folder, **changes):
    config = {**read(folder, "config.json"), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def test_logits_match_keras_hub_both_ways(model, windows_of, tmp_path):
    import keras_nlp

    tokens, _ = windows_of(2, 9)
    backbone = interop.to_keras_hub(model)
    mask = np.ones_like(tokens, dtype=bool)
    hidden = backbone({"token_ids": tokens, "padding_mask": mask})
    expected = np.asarray(backbone.token_embedding(hidden, reverse=True))
    assert np.abs(model(tokens).numpy() - expected).max() < 1e-4
    causal = keras_nlp.models.GPT2CausalLM(backbone=backbone)
    causal.save_to_preset(str(tmp_path / "preset"))
    for again in (
        gpt_tf.open_model(backbone).model,
        gpt_tf.open_model(causal, dropout=0.25).model,
        GPTModel.from_preset(str(tmp_path / "preset"), dropout=0.25),
    ):
        np.testing.assert_allclose(again(tokens), model(tokens), atol=1e-5)
    assert again.dropout == 0.25
    again.get_layer("block_1").down_bias.assign_add(np.full(12, 0.01) * np.arange(12))
    assert np.abs(again(tokens).numpy() - expected).max() > 1e-4


def test_hugging_face_files_round_trip(model, written):
    tensors = safetensors.numpy.load_file(written / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (12, 36)
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (48, 12)
    assert read(written, "config.json")["model_type"] == "gpt2"
    again = GPTModel.from_huggingface(written)
    assert again.get_config() == model.get_config()
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_untied_head_and_another_epsilon_round_trip(make_model, tmp_path):
    changes = {"tie_embeddings": False, "layer_norm_epsilon": 1e-3, "num_layers": 1}
    model = make_model(**changes)
    interop.to_huggingface(model, tmp_path / "hf")
    again = GPTModel.from_huggingface(tmp_path / "hf")
    assert again.get_config() == model.get_config()
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# Hugging Face: the tokenizer, and where a text ends

TEXT = "the quick brown fox, na\u00efve  \n\t<|"


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(["the quick brown fox " * 50], 270)


def test_without_a_tokenizer_no_token_ends_a_text(written):
    assert {path.name for path in written.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }
    for name in ("config.json", "generation_config.json"):
        found = read(written, name)
        # Absent, they are read as 50256.
        assert found["eos_token_id"] is found["bos_token_id"] is None


@pytest.mark.parametrize("end", [0, None])
def test_the_tokenizer_and_its_end_of_text_are_written(make_model, tmp_path, bpe, end):
    tokenizer = bpe
    if end is None:
        tokenizer = CharacterTokenizer.train([TEXT], end_of_text=False)
    folder = tmp_path / "hf"
    model = make_model(vocab_size=tokenizer.vocab_size, num_layers=1)
    interop.to_huggingface(model, folder, tokenizer)
    for name in ("config.json", "generation_config.json"):
        found = read(folder, name)
        assert (found["bos_token_id"], found["eos_token_id"]) == (end, end)
    assert "suppress_tokens" not in read(folder, "generation_config.json")
    config = read(folder, "tokenizer_config.json")
    assert config["model_max_length"] == 16
    special = {}
    if end is not None:
        special = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    assert read(folder, "special_tokens_map.json") == special
    assert special.items() <= config.items()
    # As transformers reads it: by the `tokenizers` library.
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode(TEXT).ids == tokenizer.encode(TEXT)
    if end is not None:
        assert theirs.token_to_id(special["eos_token"]) == end
        assert theirs.encode("t<|endoftext|>").ids == [*tokenizer.encode("t"), end]
    again = load_tokenizer(folder)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_ids_without_a_token_are_not_generated(make_model, tmp_path, bpe):
    folder = tmp_path / "hf"
    interop.to_huggingface(make_model(vocab_size=275, num_layers=1), folder, bpe)
    assert read(folder, "config.json")["vocab_size"] == 275
    found = read(folder, "generation_config.json")
    assert found["suppress_tokens"] == [270, 271, 272, 273, 274]
    with pytest.raises(InputError, match="270"):
        small = make_model(vocab_size=269, num_layers=1)
        interop.to_huggingface(small, tmp_path / "small", bpe)
    assert not (tmp_path / "small").exists()


def test_heads_that_do_not_divide_are_refused(make_model, tmp_path):
    model = make_model(num_heads=5, num_layers=1)
    with pytest.raises(InputError, match="divide"):
        interop.to_huggingface(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "changes",
    [{"layer_norm_epsilon": 1e-2}, {"tie_embeddings": False}, {"num_heads": 5}],
)
def test_what_keras_hub_cannot_express_is_refused(make_model, changes):
    with pytest.raises(InputError, match="Received"):
        interop.to_keras_hub(make_model(num_layers=1, **changes))


def test_transformers_reads_what_was_written(model, written, windows_of):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokens, _ = windows_of(2, 9)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(written).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens.astype("int64"))).logits.numpy()
    assert np.abs(model(tokens).numpy() - logits).max() < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"n_positions": "many"},
        {"n_positions": 17},
        {"layer_norm_epsilon": "small"},
        {"n_head": True},
        {"vocab_size": 10**12},
        {"n_embd": 1 << 20},
    ],
)
def test_a_configuration_that_the_tensors_are_not_of_is_refused(folder, change):
    change_config(folder, **change)
    with pytest.raises(InputError):
        GPTModel.from_huggingface(folder)


def header(dtype="F32", shape=(1,), end=4):
    """Return a safetensors file of one tensor in four bytes, as its header says."""
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    text = json.dumps({"wte.weight": tensor}).encode()
    return len(text).to_bytes(8, "little") + text + b"1234"


@pytest.mark.parametrize(
    "data",
    [
        header(shape=[10**9], end=4 * 10**9),
        header(shape=[2**62, 4], end=0),
        header(dtype="F8_E4M3", shape=[4]),
        (1 << 62).to_bytes(8, "little") + header()[8:],
        b"",
    ],
)
def test_headers_that_lie_are_refused(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DamagedFileError):
        GPTModel.from_huggingface(folder)


def test_keys_that_are_null_or_absent_have_gpt2s_values(model, folder):
    names = ("n_inner", "layer_norm_epsilon", "tie_word_embeddings", "n_positions")
    change_config(folder, **dict.fromkeys(names))
    again = GPTModel.from_huggingface(folder)
    assert again.get_config() == model.get_config()
