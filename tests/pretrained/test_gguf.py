import gguf
import numpy as np
import pytest

import gpt_tf
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.pretrained.gguf_file import read_gguf
from gpt_tf.text.tokenizer import BPETokenizer
from tests.oracles import numpy_families
from tests.pretrained.folders import (
    SCALING,
    assert_same_logits,
    ids_of,
    random_tensors,
    write_folder,
)
from tests.pretrained.gguf_writer import config_of, small_tokenizer, write_gguf

pytestmark = pytest.mark.usefixtures("eagerly")
IDS = ids_of(280, rows=1, length=20)
TEXTS = [
    "the quick brown fox's 12345 jumps\n\n  over it ALL",
    "I'LL don't  2024\r\n\tdéjà 漢字 \U0001f600 a1b22 __init__(self):\n    return 7",
]


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "gpt_neox_sequential", "llama", "qwen2", "qwen3"]
)
def test_logits_equal_those_of_the_hugging_face_folder(tmp_path, name):
    config = config_of(name)
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "gpt.gguf", config, tensors)
    model, tokenizer, facts = gpt_tf.open_model(path)
    assert facts["format"] == "gguf"
    assert facts["family"] == config["model_type"]
    folder = gpt_tf.open_model(write_folder(tmp_path, config, tensors)).model
    np.testing.assert_array_equal(model(IDS), folder(IDS))
    small = small_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == small.encode(text)
    assert tokenizer.end_of_text_id == small.end_of_text_id


@pytest.mark.parametrize(
    ("types", "step"),
    [
        ("F16", 2**-11),
        ("BF16", 2**-8),
        ("Q8_0", 1 / 250),
        ("Q4_0", 1 / 7),
        ("Q4_1", 1 / 12),
    ],
)
def test_quantised_tensors_are_read_as_floats(tmp_path, types, step):
    config = config_of("llama", num_hidden_layers=1)
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "gpt.gguf", config, tensors, types)
    file = read_gguf(path)
    for theirs, ours in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight"),
    ):
        values = file.tensors[ours].read()
        assert values.dtype == np.float32
        assert values.shape == file.tensors[ours].shape
        error = np.abs(values - tensors[theirs]).max()
        assert 0 < error <= step * np.abs(tensors[theirs]).max()


# Blocks as ggml's `ggml-quants.c` describes them: of each its bytes, and its numbers.


def q5_0(block, is_1=False):
    d = block[:2].view(np.float16)[0].astype(float)
    m = block[2:4].view(np.float16)[0].astype(float) if is_1 else -16 * d
    high = int(block[-20:-16].view(np.uint32)[0])
    low = [*(block[-16:] & 15), *(block[-16:] >> 4)]
    return [d * (int(q) + 16 * (high >> i & 1)) + m for i, q in enumerate(low)]


def q5_1(block):
    return q5_0(block, is_1=True)


def q4_k(block):
    d, dmin = block[:4].view(np.float16).astype(float)
    packed, found = block[4:16].astype(int), []
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            both = packed[part + 4]
            scale = both & 15 | packed[part - 4] >> 6 << 4
            least = both >> 4 | packed[part] >> 6 << 4
        start = 16 + 32 * (part // 2)
        for byte in block[start : start + 32].astype(int):
            found.append(d * scale * (byte >> 4 * (part % 2) & 15) - dmin * least)
    return found


def q6_k(block):
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8), block[208:].view(np.float16)[0]
    found = []
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        four = low[64 * half + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        two = high[32 * half + place] >> 2 * quarter & 3
        found.append(float(d) * int(scales[i // 16]) * (four + 16 * two - 32))
    return found


@pytest.fixture(params=[q5_0, q5_1, q4_k, q6_k], ids=lambda of: of.__name__)
def stored(request, tmp_path):
    """A file of one tensor of random blocks, its numbers, and its bytes."""
    kind = gguf.GGMLQuantizationType[request.param.__name__.upper()]
    count, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, size), np.uint8)
    # Floats of 16 bits stand first, or last in Q6_K; none is NaN or infinite.
    ends = slice(-2, None) if kind.name == "Q6_K" else slice(0, 4)
    blocks[:, ends][:, 1::2] &= 0xBF
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", blocks.reshape(2, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = np.array([request.param(block) for block in blocks])
    return tmp_path / "a.gguf", expected.reshape(2, 3 * count), blocks.size


def test_blocks_hold_the_numbers_that_their_format_says(stored):
    path, expected, _ = stored
    tensor = read_gguf(path).tensors["a"]
    assert tensor.shape == expected.shape
    largest = np.abs(expected).max()
    np.testing.assert_allclose(tensor.read(), expected, atol=1e-6 * largest)


def test_a_file_that_is_cut_within_blocks_is_refused_in_one_line(stored):
    path, _, size = stored
    start = gguf.GGUFReader(path).tensors[0].data_offset
    content = path.read_bytes()
    for end in range(start, start + size, 7):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedFileError) as found:
            read_gguf(path)
        assert "\n" not in str(found.value)


def test_a_quantised_model_has_the_logits_of_its_dequantised_weights(tmp_path):
    config = config_of("qwen2")
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "gpt.gguf", config, tensors, "Q8_0")
    q8 = gguf.GGMLQuantizationType.Q8_0
    stored = {
        name: gguf.dequantize(gguf.quants.quantize(t, q8), q8) if t.ndim == 2 else t
        for name, t in tensors.items()
    }
    expected = numpy_families.forward(config, stored, IDS[0])
    assert_same_logits(gpt_tf.open_model(path).model(IDS)[0], expected)


def llama3_factors(size, base):
    plain = base ** (-np.arange(0, size, 2) / size)
    scaling = {**SCALING, "original_max_position_embeddings": 8192}
    return plain / numpy_families.llama3(plain, scaling), scaling


def test_llama_3_rotary_frequencies_are_found_in_their_tensor(tmp_path):
    config = config_of("llama", num_attention_heads=2, num_key_value_heads=1)
    config |= {"rope_theta": 500000.0, "max_position_embeddings": 20000}
    factors, scaling = llama3_factors(32, 500000.0)
    tensors = random_tensors(config)
    stored = {**tensors, "rope_freqs.weight": factors.astype("float32")}
    path = write_gguf(tmp_path / "gpt.gguf", config, stored)
    model = gpt_tf.open_model(path).model
    config["rope_scaling"] = scaling
    expected = gpt_tf.open_model(write_folder(tmp_path, config, tensors)).model
    assert model.rotary_scaling == pytest.approx(expected.rotary_scaling)
    np.testing.assert_allclose(model(IDS), expected(IDS), atol=1e-5)


def test_other_rotary_frequencies_are_refused(tmp_path):
    config = config_of("llama")
    for factors in (np.linspace(1, 9, 8), np.zeros(8), np.full(8, np.nan), np.ones(0)):
        tensors = {**random_tensors(config), "rope_freqs.weight": np.float32(factors)}
        path = write_gguf(tmp_path / "gpt.gguf", config, tensors)
        with pytest.raises(InputError, match="rotary"):
            gpt_tf.open_model(path)


# The tokenizer

SPLITS = {
    "smollm": [" fox", "'s", " ", "1", "2"],
    "qwen2": [" fox", "'s", " ", "1", "2"],
    "llama-bpe": [" fox", "'s", " ", "123", "45"],
    "gpt-2": [" fox", "'s", " 12345"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_as_the_file_says_and_comes_back(tmp_path, pre):
    config = config_of("gpt2", n_layer=1)
    path = write_gguf(tmp_path / "gpt.gguf", config, random_tensors(config), pre=pre)
    tokenizer = gpt_tf.open_model(path).tokenizer
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(" fox's 12345")
    found = [piece.replace("Ġ", " ") for piece, _ in pieces]
    assert found[: len(SPLITS[pre])] == SPLITS[pre]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer.end_of_text_id
    assert tokenizer.encode("<|endoftext|>", special=True) == [end]
    assert len(tokenizer.encode("<|endoftext|>")) > 1


@pytest.mark.parametrize(
    "changes",
    [{"model": "llama"}, {"model": "bert"}, {"pre": "deepseek-v3"}, {"pre": "chatglm"}],
    ids=lambda changes: next(iter(changes.values())),
)
def test_an_unknown_tokenizer_is_refused_by_its_name(tmp_path, changes):
    config = config_of("gpt2", n_layer=1)
    path = write_gguf(tmp_path / "gpt.gguf", config, random_tensors(config), **changes)
    with pytest.raises(InputError, match=next(iter(changes.values()))):
        gpt_tf.open_model(path)


# Refusals


def test_an_unknown_architecture_is_refused_by_its_name(tmp_path):
    config = config_of("llama", num_hidden_layers=1)
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "a.gguf", config, tensors, architecture="gemma3")
    with pytest.raises(InputError, match="gemma3"):
        gpt_tf.open_model(path)


def test_an_unknown_quantisation_is_refused_by_its_name(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    writer.add_tensor("a", np.zeros((1, 66), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="IQ2_XXS"):
        gpt_tf.open_model(path)


def test_metadata_and_tensors_that_do_not_fit_are_refused(tmp_path):
    config = config_of("llama", num_hidden_layers=1)
    tensors = random_tensors(config)
    for changes in (
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 2**31},
        {"hidden_size": 32},
        {"num_key_value_heads": 4},
    ):
        path = write_gguf(tmp_path / "a.gguf", {**config, **changes}, tensors)
        with pytest.raises(InputError):
            gpt_tf.open_model(path)
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(DamagedFileError, match="token_embd"):
        gpt_tf.open_model(write_gguf(tmp_path / "a.gguf", config, tensors))


@pytest.mark.parametrize("value", ["a", [4, 4]], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        *("general.architecture", "llama.embedding_length", "llama.block_count"),
        *("llama.attention.head_count", "llama.attention.key_length"),
        *("llama.rope.dimension_count", "llama.rope.freq_base"),
        *("llama.rope.scaling.type", "tokenizer.ggml.model", "tokenizer.ggml.pre"),
        *("tokenizer.ggml.merges", "tokenizer.ggml.token_type"),
    ],
)
def test_metadata_of_another_type_are_refused(tmp_path, key, value):
    config = config_of("llama")
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "a.gguf", config, tensors, metadata={key: value})
    with pytest.raises(InputError):
        gpt_tf.open_model(path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    config = config_of("llama", num_hidden_layers=1, vocab_size=260)
    tokenizer = BPETokenizer.train(["a"], vocab_size=260)
    path = tmp_path / "a.gguf"
    write_gguf(path, config, random_tensors(config), "Q8_0", tokenizer)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    ends = [*range(0, 64, 3), *generator.integers(64, len(content), 40)]
    for end in [*ends, len(content) // 2, len(content) - 33]:
        path.write_bytes(content[:end])
        with pytest.raises(DamagedFileError):
            gpt_tf.open_model(path)


def test_what_is_no_gguf_is_refused(tmp_path):
    for content in (b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"GGML" * 20, b"\0" * 4096):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(DamagedFileError):
            gpt_tf.open_model(tmp_path / "a.gguf")
    with pytest.raises(InputError):
        gpt_tf.open_model(tmp_path / "none.gguf")


def test_the_chat_template_comes_with_the_tokens_that_it_names(tmp_path):
    config = config_of("llama")
    tensors, small = random_tensors(config), small_tokenizer()
    end = small.end_of_text_id
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.ggml.bos_token_id": 60,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": 61,
        "tokenizer.ggml.padding_token_id": 10**6,
    }
    path = write_gguf(tmp_path / "chat.gguf", config, tensors, metadata=metadata)
    found = gpt_tf.open_model(path).tokenizer
    tokens = [small.backend.id_to_token(one) for one in (60, 61, end)]
    special = {"bos_token": tokens[0], "eos_token": tokens[2]}
    assert found.chat_template.special_tokens == special
    assert found.chat_template.end_tokens == (tokens[1], tokens[2])
    assert found.end_ids == (end, 61)
    messages = [{"role": "user", "content": " x"}]
    assert found.chat_template.render(messages) == f"{tokens[0]} x"
    path = write_gguf(tmp_path / "plain.gguf", config, tensors)
    assert gpt_tf.open_model(path).tokenizer.chat_template is None
