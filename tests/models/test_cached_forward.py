import numpy as np
import pytest
import tensorflow as tf

from gpt_tf.errors import InputError
from gpt_tf.models import cached_forward, xla
from gpt_tf.text.tokenizer import CharacterTokenizer


@pytest.fixture(autouse=True)
def with_xla(monkeypatch):
    """Decode as users do."""
    monkeypatch.setattr(xla, "ON_BY_DEFAULT", True)


@pytest.fixture
def model(make_model):
    model = make_model()
    generator = np.random.default_rng(8)
    for weight in model.weights:
        weight.assign_add(generator.normal(0, 0.3, weight.shape))
    return model


@pytest.fixture
def letters():
    return CharacterTokenizer.train(["abcdefghijklmnopqrstuvwxyz .\né"])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_cached_decode_equals_full_forward(model, windows_of, length, compiled):
    tokens, _ = windows_of(2, 14)
    starts = tf.zeros(2, tf.int32)

    def append(tokens, position, caches):
        if compiled:
            return cached_forward.append(model, tokens, position, caches)
        tokens = tf.constant(tokens)
        return cached_forward.forward_cached(model, tokens, position, starts, caches)

    caches = cached_forward.empty_cache(model, 2, 16)
    found, caches = append(tokens[:, :length], 0, caches)
    found = [found]
    for position in range(length, 14):
        logits, caches = append(tokens[:, position : position + 1], position, caches)
        found.append(logits)
    np.testing.assert_allclose(tf.concat(found, axis=1), model(tokens), atol=1e-5)


def test_a_spoilt_cache_breaks_the_equality(model, windows_of):
    tokens, _ = windows_of(1, 9)
    caches = cached_forward.empty_cache(model, 1, 16)
    _, caches = cached_forward.append(model, tokens[:, :8], 0, caches)
    caches[1] = caches[1] + 0.05
    logits, _ = cached_forward.append(model, tokens[:, 8:], 8, caches)
    assert np.abs(logits[:, 0] - model(tokens)[:, 8]).max() > 1e-4


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        pytest.param("mixed_bfloat16", 0.15, marks=pytest.mark.slow),
        ("mixed_float16", 0.02),
    ],
)
def test_a_model_of_16_bits_generates(make_model, policy, tolerance):
    import tf_keras as keras

    keras.mixed_precision.set_global_policy(policy)
    try:
        model = make_model()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for weight in model.weights:
        weight.assign_add(np.random.default_rng(8).normal(0, 0.3, weight.shape))
    rows = [[3], [1, 4, 1, 5, 9, 2, 6]]
    options = {"max_new_tokens": 20, "temperature": 0}
    # What is padded on the left would spoil the row where it is not hidden.
    for row, new in zip(
        rows, cached_forward.generate(model, rows, **options), strict=True
    ):
        assert new == list(cached_forward.stream(model, row, **options))
        for count in range(min(20, 16 - len(row))):
            logits = model(np.array([row + new[:count]])).numpy()[0, -1]
            assert logits.max() - logits[new[count]] <= tolerance


@pytest.mark.parametrize("built", ["device", "mirrored"])
def test_a_model_generates_on_the_device_where_it_was_built(make_model, built):
    wanted = cached_forward.generate(make_model(), [1, 2, 3], temperature=0)
    scopes = {
        "device": tf.device("CPU:1"),
        "strategy": tf.distribute.OneDeviceStrategy("CPU:1").scope(),
        "mirrored": tf.distribute.MirroredStrategy(["CPU:2", "CPU:1"]).scope(),
    }
    with scopes[built]:
        model = make_model()
    assert "CPU:0" not in model.weights[0].device
    assert cached_forward.generate(model, [1, 2, 3], temperature=0) == wanted
    assert list(cached_forward.stream(model, [1, 2, 3], temperature=0)) == wanted
    with tf.device("CPU:3"):
        assert cached_forward.generate(model, [1, 2, 3], temperature=0) == wanted


def greedy(model, prompt, count):
    """Generate without a cache: the slow and obvious way."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(np.array([ids], "int32")).numpy()
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_equals_the_uncached_loop(model):
    prompt = [3, 1, 4, 1, 5]
    ids = cached_forward.generate(model, prompt, max_new_tokens=11, temperature=0)
    assert ids == greedy(model, prompt, 11)


def test_prompts_of_unequal_length_do_not_influence_each_other(model):
    prompts = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
    together = cached_forward.generate(model, prompts, max_new_tokens=6, temperature=0)
    alone = [greedy(model, prompt, 6) for prompt in prompts]
    assert together == alone


def test_stop_texts_end_the_generation_and_are_cut_off(model, letters):
    options = {"tokenizer": letters, "max_new_tokens": 30, "seed": 5}
    whole = cached_forward.generate(model, "abc", **options)
    stop = whole[6:8]
    cut = cached_forward.generate(model, "abc", stop=[stop], **options)
    assert cut == whole[: whole.index(stop)]
    assert "".join(cached_forward.stream(model, "abc", stop=[stop], **options)) == cut


def test_generation_goes_on_beyond_the_context(model):
    ids = cached_forward.generate(model, [1, 2, 3], max_new_tokens=40, temperature=0)
    assert len(ids) == 40
    # Up to the context nothing is dropped; then the last half of it is kept.
    assert ids[:14] == greedy(model, [1, 2, 3], 14)
    assert ids[14:17] == greedy(model, ([1, 2, 3] + ids[:14])[-8:], 3)


def test_a_long_prompt_is_cut_on_the_left_with_a_notice(model):
    prompt = [i % 31 for i in range(40)]
    with pytest.warns(cached_forward.GenerationNotice, match="cut off"):
        ids = cached_forward.generate(model, prompt, max_new_tokens=1, temperature=0)
    assert ids == greedy(model, prompt[-16:], 1)


def test_a_model_of_other_layers_is_refused():
    import tf_keras as keras

    with pytest.raises(InputError, match="TokenAndPositionEmbedding"):
        cached_forward.generate(keras.Sequential([keras.layers.Dense(2)]), [1])


def test_many_shapes_are_compiled_without_a_remark_on_retracing(model, monkeypatch):
    said = []
    monkeypatch.setattr(
        tf.get_logger(), "warning", lambda line, *rest: said.append(line % rest)
    )
    for length in (1, 5, 12):
        for rows in (1, 2, 3):
            cached_forward.generate(model, [[1] * length] * rows, max_new_tokens=1)
    assert not said
