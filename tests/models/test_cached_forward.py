import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.models import cached_forward, xla
from gpt_tf.text.tokenizer import CharacterTokenizer

PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]


@pytest.fixture(autouse=True)
def with_xla(monkeypatch):
    """Decode as users do."""
    monkeypatch.setattr(xla, "ON_BY_DEFAULT", True)


def spread(model):
    """Move weights, so that logits are far from each other."""
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    return model


@pytest.fixture(scope="module")
def model():
    """One model for all, so that each shape is compiled once."""
    keras.utils.set_random_seed(3)
    return spread(gpt_tf.GPTModel(31, 12, 2, 3, context_length=16))


def append_eagerly(model, tokens, position, caches):
    tokens, starts = tf.constant(tokens), tf.zeros(len(tokens), tf.int32)
    return cached_forward.forward_cached(model, tokens, position, starts, caches)


def assert_most_likely(model, prompt, new, tolerance=0.0):
    """Compare with the logits of the whole text, computed without a cache."""
    ids = np.array([[*prompt, *new[:-1]]])
    logits = model(ids).numpy()[0, len(prompt) - 1 :]
    chosen = logits[range(len(new)), new]
    assert (logits.max(axis=1) - chosen <= tolerance).all()


def assert_greedy(model, prompt, new):
    """As above, and of a window that is full the newest half is kept."""
    fitting = 16 - len(prompt) + 1
    assert_most_likely(model, prompt, new[:fitting])
    if len(new) > fitting:
        window = (prompt + new[:fitting])[-8:]
        assert_greedy(model, window, new[fitting:])


@pytest.mark.parametrize(
    ("append", "length"),
    [(cached_forward.append, 4), (append_eagerly, 1), (append_eagerly, 9)],
)
def test_cached_decode_equals_full_forward(model, windows_of, append, length):
    tokens, _ = windows_of(2, 14)
    caches = cached_forward.empty_cache(model, 2, 16)
    found, caches = append(model, tokens[:, :length], 0, caches)
    found = [found]
    for position in range(length, 14):
        token = tokens[:, position : position + 1]
        logits, caches = append(model, token, position, caches)
        found.append(logits)
    np.testing.assert_allclose(tf.concat(found, axis=1), model(tokens), atol=1e-5)


def test_a_spoilt_cache_breaks_the_equality(model, windows_of):
    tokens, _ = windows_of(1, 9)
    caches = cached_forward.empty_cache(model, 1, 16)
    _, caches = append_eagerly(model, tokens[:, :8], 0, caches)
    caches[1] = caches[1] + 0.05
    logits, _ = append_eagerly(model, tokens[:, 8:], 8, caches)
    assert np.abs(logits[:, 0] - model(tokens)[:, 8]).max() > 1e-4


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        pytest.param("mixed_bfloat16", 0.15, marks=pytest.mark.slow),
        ("mixed_float16", 0.02),
    ],
)
def test_a_model_of_16_bits_generates(make_model, policy, tolerance):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = spread(make_model(num_layers=1))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    # What is padded on the left would spoil a row where it is not hidden.
    found = cached_forward.generate(model, PROMPTS, max_new_tokens=9, temperature=0)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert_most_likely(model, prompt, new, tolerance)


@pytest.mark.parametrize("built", ["device", "mirrored"])
def test_a_model_generates_on_the_device_where_it_was_built(make_model, built):
    scopes = {
        "device": tf.device("CPU:1"),
        "mirrored": tf.distribute.MirroredStrategy(["CPU:2", "CPU:1"]).scope(),
    }
    with scopes[built]:
        model = make_model(num_layers=1)
    assert "CPU:0" not in model.weights[0].device
    options = {"temperature": 0, "max_new_tokens": 4}
    found = cached_forward.generate(model, [1, 2, 3], **options)
    assert_most_likely(model, [1, 2, 3], found)
    with tf.device("CPU:3"):
        assert list(cached_forward.stream(model, [1, 2, 3], **options)) == found


def test_each_of_several_prompts_is_continued_as_if_it_were_alone(model):
    found = cached_forward.generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert len(new) == 20
        assert_greedy(model, prompt, new)


def test_generation_goes_on_beyond_the_context(model):
    ids = cached_forward.generate(model, [1, 2, 3], max_new_tokens=40, temperature=0)
    assert len(ids) == 40
    assert_greedy(model, [1, 2, 3], ids)


def test_stop_texts_end_the_generation_and_are_cut_off(model):
    letters = CharacterTokenizer.train(["abcdefghijklmnopqrstuvwxyz .\né"])
    options = {"tokenizer": letters, "max_new_tokens": 16, "seed": 5}
    whole = cached_forward.generate(model, "abc", **options)
    stop = whole[6:8]
    cut = cached_forward.generate(model, "abc", stop=[stop], **options)
    assert cut == whole[: whole.index(stop)]
    assert "".join(cached_forward.stream(model, "abc", stop=[stop], **options)) == cut


def test_a_long_prompt_is_cut_on_the_left_with_a_notice(model):
    prompt = [i % 31 for i in range(40)]
    with pytest.warns(GenerationNotice, match="cut off"):
        ids = cached_forward.generate(model, prompt, max_new_tokens=1, temperature=0)
    assert_most_likely(model, prompt[-16:], ids)


def test_a_model_of_other_layers_is_refused():
    with pytest.raises(InputError, match="TokenAndPositionEmbedding"):
        cached_forward.generate(keras.Sequential([keras.layers.Dense(2)]), [1])


def test_lengths_share_what_is_compiled_and_many_shapes_bring_no_remark(
    make_model, monkeypatch
):
    monkeypatch.setattr(xla, "ON_BY_DEFAULT", False)  # tracing is the subject
    said = []
    monkeypatch.setattr(
        tf.get_logger(), "warning", lambda line, *rest: said.append(line % rest)
    )
    model = make_model(num_layers=1)
    for rows, length in [(1, 1), (1, 5), (1, 12), *((rows, 1) for rows in range(2, 7))]:
        cached_forward.generate(model, [[1] * length] * rows, max_new_tokens=1)
    assert not said
    assert len(model.__dict__["_decoding_functions"]) == 6
