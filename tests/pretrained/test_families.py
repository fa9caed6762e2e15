import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_tf
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.tflite import export_tflite
from gpt_tf.models import cached_forward
from gpt_tf.pretrained import build
from tests.oracles import numpy_families, numpy_gpt
from tests.pretrained.folders import (
    CONFIGS,
    FAMILIES,
    SCALING,
    assert_same_logits,
    ids_of,
    random_tensors,
    write_folder,
)

pytestmark = pytest.mark.usefixtures("eagerly")
IDS = ids_of()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")
    for name, config in CONFIGS.items():
        write_folder(place / name, config, random_tensors(config))
    return place


@pytest.fixture(scope="module")
def opened(folders):
    """Each family's model, opened once."""
    return {name: gpt_tf.open_model(folders / name).model for name in CONFIGS}


@pytest.fixture(scope="module")
def expected():
    """Logits `(2, 30, V)` by the oracle."""
    found = {}
    for name, config in CONFIGS.items():
        tensors = random_tensors(config)
        rows = [numpy_families.forward(config, tensors, row) for row in IDS]
        found[name] = np.stack(rows)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_the_numpy_oracle(opened, expected, name):
    assert_same_logits(opened[name](IDS), expected[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decode_matches_the_numpy_oracle(opened, expected, name):
    model = opened[name]
    caches = cached_forward.empty_cache(model, 2, 32)
    found = []
    for begin in (0, 10, 20):  # a trace for all, as they are of one length
        tokens = IDS[:, begin : begin + 10]
        logits, caches = cached_forward.append(model, tokens, begin, caches)
        found.append(logits)
    assert_same_logits(np.concatenate(found, axis=1), expected[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_altered_weight_breaks_parity(opened, expected, name):
    altered = {n: t.copy() for n, t in random_tensors(CONFIGS[name]).items()}
    products = re.compile(r"\.1\..*(o_proj|out_proj|dense\.|c_proj)")
    altered[next(filter(products.search, altered))].flat[0] += 0.1
    found = numpy_families.forward(CONFIGS[name], altered, IDS[0])
    with pytest.raises(AssertionError):
        assert_same_logits(found, expected[name][0])


def test_llama_gradients_match_finite_differences_of_the_oracle(opened, tmp_path):
    config, model = CONFIGS["llama"], opened["llama"]
    tensors = random_tensors(config)
    direction = random_tensors(config, seed=1)
    write_folder(tmp_path, config, direction)
    towards = build.variables_of(gpt_tf.open_model(tmp_path).model)
    tokens, labels = IDS[0, :12], IDS[0, 1:13]

    variables = build.variables_of(model)
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, model(tokens[None])[0]
        )
        loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, variables)

    def loss_at(step, part):
        moved = {
            name: np.float64(t) + (step * direction[name] if part.search(name) else 0)
            for name, t in tensors.items()
        }
        logits = numpy_families.forward(config, moved, tokens)
        return numpy_gpt.mean_loss(logits, labels)

    parts = {
        "token_table": "embed_tokens",
        "attention_norm": "input_layernorm",
        "qkv_kernel": "[qkv]_proj",
        "output_kernel": "o_proj",
        "feedforward_norm": "post_attention_layernorm",
        "up_kernel": "gate_proj|up_proj",
        "down_kernel": "down_proj",
        "final_norm": r"model\.norm",
        "head/": "lm_head",
    }
    assert all(any(ours in name for ours in parts) for name in variables)
    for ours, theirs in parts.items():
        found = sum(
            float(tf.reduce_sum(tf.convert_to_tensor(gradients[name]) * towards[name]))
            for name in variables
            if ours in name
        )
        part = re.compile(theirs)
        slope = (loss_at(1e-5, part) - loss_at(-1e-5, part)) / 2e-5
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-5), ours


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_files_choose_the_tokens_that_keras_chooses(opened, tmp_path, name):
    model, path = opened[name], tmp_path / "gpt.tflite"
    options = {"prefill_lengths": (1, 8), "verify_on": IDS[0]}
    export_tflite(model, path, "float32", **options)
    prompt = IDS[0, :5].tolist()
    with EdgeGPT(path) as gpt:
        new = gpt.generate(prompt, max_new_tokens=12, temperature=0)
    logits = model(np.array([prompt + new])).numpy()[0, 4:-1]
    assert new == logits.argmax(axis=1).tolist()
    size = path.stat().st_size
    manifest = export_tflite(model, path, "int8_full", representative=IDS, **options)
    assert manifest["verification"]["top1_agreement"] > 0.5
    assert path.stat().st_size < size


# Forms of a configuration


def arguments_of(opened):
    return {n: v for n, v in opened.get_config().items() if n != "name"}


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "llama3"])
def test_rope_parameters_say_what_the_older_fields_say(opened, tmp_path, name):
    config = dict(CONFIGS[name])
    newer = {"rope_type": "default", **(config.pop("rope_scaling", None) or {})}
    if name == "gpt_neox":
        newer["partial_rotary_factor"] = config.pop("rotary_pct")
    newer["rope_theta"] = config.pop(
        "rotary_emb_base" if name == "gpt_neox" else "rope_theta"
    )
    config["rope_parameters"] = newer
    write_folder(tmp_path, config, random_tensors(CONFIGS[name]))
    found = gpt_tf.open_model(tmp_path).model
    assert arguments_of(found) == arguments_of(opened[name])


def test_names_without_prefix_and_tensors_of_no_use_are_taken(expected, tmp_path):
    # As openai-community/gpt2 and Pythia have them.
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in random_tensors(CONFIGS["gpt2"]).items()
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 40, 40), bool)
    write_folder(tmp_path, CONFIGS["gpt2"], tensors)
    assert_same_logits(gpt_tf.open_model(tmp_path).model(IDS), expected["gpt2"])


@pytest.mark.parametrize(("name", "family"), [("gpt2", "gpt2"), ("llama", None)])
def test_what_is_saved_opens_again_and_is_called_gpt2_only_if_it_is(
    opened, tmp_path, name, family
):
    opened[name].save(tmp_path / "gpt.keras")
    again, _, facts = gpt_tf.open_model(tmp_path / "gpt.keras")
    assert facts["family"] == family
    np.testing.assert_array_equal(again(IDS), opened[name](IDS))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_a_shorter_context_can_be_asked_for(folders, opened, name):
    short = gpt_tf.open_model(folders / name, context_length=12).model
    assert short.context_length == 12
    assert_same_logits(short(IDS[:, :12]), opened[name](IDS[:, :12]))


def test_learned_positions_end_where_the_table_does(folders):
    with pytest.raises(DamagedFileError, match=r"wpe\.weight"):
        gpt_tf.open_model(folders / "gpt2", context_length=10_000)


# Refusals


@pytest.fixture
def nothing_is_built(monkeypatch):
    def fail(**arguments):
        raise AssertionError("a model was built")

    monkeypatch.setattr("gpt_tf.models.gpt.GPTModel", fail)


REFUSED = [
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "activation_function", "silu"),
    ("gpt2", "n_embd", None),
    ("gpt2", "n_head", 0),
    ("gpt2", "layer_norm_epsilon", -1.0),
    ("opt", "word_embed_proj_dim", 12),
    ("opt", "do_layer_norm_before", False),
    ("opt", "_remove_final_layer_norm", True),
    ("opt", "enable_bias", False),
    ("opt", "layer_norm_elementwise_affine", False),
    ("gpt_neox", "attention_bias", False),
    ("gpt_neox", "num_attention_heads", 5),
    ("gpt_neox", "rotary_pct", 2),
    ("gpt_neox", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "hidden_act", "gelu"),
    ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
    ("llama", "rope_scaling", "llama3"),
    ("llama", "rope_parameters", [1]),
    ("llama", "rope_theta", "a"),
    ("llama", "num_key_value_heads", "2"),
    ("qwen2", "use_sliding_window", True),
    ("qwen3", "attention_bias", True),
    ("qwen3", "tie_word_embeddings", "yes"),
]


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(("name", "switch", "value"), REFUSED)
def test_what_a_gpt_model_cannot_be_is_refused_by_its_name(
    tmp_path, name, switch, value
):
    config = {**CONFIGS[name], switch: value}
    write_folder(tmp_path, config, random_tensors(CONFIGS[name]))
    with pytest.raises(InputError, match=switch):
        gpt_tf.open_model(tmp_path)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("kind", "lacking"),
    [
        ("mixtral", "mixture of experts"),
        ("bloom", "ALiBi"),
        ("gemma3_text", "sliding windows"),
        ("mistral", "sliding windows"),
        ("mamba", "mamba"),
        (None, "None"),
        (["llama"], "llama"),
    ],
)
def test_an_unknown_family_is_refused_by_what_is_missing(tmp_path, kind, lacking):
    write_folder(tmp_path, {"model_type": kind}, {})
    with pytest.raises(InputError, match=lacking):
        gpt_tf.open_model(tmp_path)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("name", "value"),
    [*itertools.product(FAMILIES, (3, 10**9, 10**30)), ("llama", 1), ("llama", 1024)],
)
def test_a_configuration_that_does_not_fit_is_refused_unbuilt(tmp_path, name, value):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    is_gpt2 = name == "gpt2"
    fields = ["n_layer" if is_gpt2 else "num_hidden_layers"] if value > 2 else []
    fields += ["vocab_size", "n_embd" if is_gpt2 else "hidden_size"]
    for field in fields:
        write_folder(tmp_path, {**config, field: value}, tensors)
        with pytest.raises(InputError):
            gpt_tf.open_model(tmp_path)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_missing_tensor_is_named(tmp_path, name):
    tensors = random_tensors(CONFIGS[name])
    for missing in tensors:
        write_folder(
            tmp_path,
            CONFIGS[name],
            {n: t for n, t in tensors.items() if n != missing},
        )
        with pytest.raises(DamagedFileError, match=missing.split(".")[-2]):
            gpt_tf.open_model(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from([*SCALING, "rope_theta"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=50)
@given(data=st.data())
def test_any_configuration_opens_or_is_refused(tmp_path_factory, data):
    # Without tensors none can open, and nothing else may be raised.
    config = dict(CONFIGS[data.draw(st.sampled_from(FAMILIES))])
    more = ["rope_parameters", "rope_scaling", "head_dim", "n_inner"]
    for field in data.draw(st.lists(st.sampled_from([*config, *more]), max_size=3)):
        config[field] = data.draw(values)
    folder = tmp_path_factory.getbasetemp() / "any"
    write_folder(folder, config, {})
    with pytest.raises(InputError):
        gpt_tf.open_model(folder)


@pytest.mark.slow
def test_the_oracle_matches_transformers(folders, expected):
    program = """
import sys
from pathlib import Path
import numpy, torch, transformers
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(numpy.load(sys.argv[2]))
    with torch.no_grad():
        numpy.save(folder / "logits.npy", model(ids).logits.numpy())
"""
    ids = folders.parent / "ids.npy"
    np.save(ids, IDS)
    missing = subprocess.run(
        [sys.executable, "-c", "import torch, transformers"], capture_output=True
    )
    if missing.returncode:
        pytest.skip("transformers is not installed")
    subprocess.run(
        [sys.executable, "-c", program, str(folders), str(ids)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    for name in CONFIGS:
        found = np.load(Path(folders) / name / "logits.npy")
        assert_same_logits(found, expected[name], 1e-5)
