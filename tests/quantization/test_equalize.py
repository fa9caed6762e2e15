import numpy as np
import pytest

from gpt_tf.errors import InputError
from gpt_tf.quantization import equalize as equalization
from gpt_tf.quantization.equalize import equalize, head_outliers
from gpt_tf.quantization.weights import dequantize, quantize_array

pytestmark = pytest.mark.usefixtures("eagerly")

FORMS = {
    "gpt2": {},
    "untied head": {"tie_embeddings": False},
    "relu": {"activation": "relu", "feedforward_dim": 20},
    "llama": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "positions": "rotary",
        "norm": "rms",
        "activation": "swiglu",
        "biases": "none",
        "feedforward_dim": 20,
    },
    "qwen": {
        "num_heads": 2,
        "num_kv_heads": 1,
        "norm": "rms",
        "positions": "rotary",
        "activation": "swiglu",
        "biases": "qkv",
        "query_key_norm": True,
    },
    "parallel": {"parallel_residual": True, "activation": "gelu"},
}


def with_outliers(model):
    """Give a model weights like a trained one's: some channels are much larger."""
    draw = np.random.default_rng(2)
    for layer in model.layers:
        for name in getattr(layer, "weight_names", ()):
            weight = getattr(layer, name)
            values = draw.normal(0, 0.3, weight.shape)
            if name.endswith("gamma"):
                values = 1 + values
                values[::5] *= 40
            weight.assign(values)
    return model


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_logits_stay_bit_for_bit(make_model, windows_of, form):
    model, ids = with_outliers(make_model(**form)), windows_of(4, 8)[0]
    wanted, weights = model(ids).numpy(), model.get_weights()
    equalize(model, ids)
    changed = [
        np.any(new != old)
        for new, old in zip(model.get_weights(), weights, strict=True)
    ]
    assert sum(changed) >= 6
    np.testing.assert_array_equal(model(ids).numpy(), wanted)


def test_a_product_with_large_channels_is_rounded_better():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(64, 32)).astype(np.float32)
    x[:, ::8] *= 60
    kernel = draw.normal(size=(32, 24)).astype(np.float32)
    factors = equalization._factors(x, kernel, 8)
    np.testing.assert_array_equal(np.exp2(np.rint(np.log2(factors))), factors)
    assert factors[::8].min() > factors[1:8].max()

    def error(factors):
        weights = dequantize(*quantize_array(kernel * factors[:, None], 8, axis=1))
        rounded = equalization._round_rows(x / factors) @ weights
        return np.square(rounded - x @ kernel).mean()

    assert error(factors) < error(np.ones(32, np.float32)) / 3


def test_a_channel_that_is_always_0_keeps_its_weights():
    x = np.array([[8.0, 0.0, 1.0], [-8.0, 0.0, 0.7]], np.float32)
    kernel = np.array([[0.3, 0.5], [0.9, -1.0], [0.8, 0.6]], np.float32)
    assert equalization._factors(x, kernel, 8)[1] == 1
    assert equalization._factors(0 * x, kernel, 8).tolist() == [1, 1, 1]


def test_query_heads_that_share_values_share_factors(make_model, windows_of):
    model, ids = with_outliers(make_model(**FORMS["llama"])), windows_of(4, 8)[0]
    block = model.get_layer("block_0")
    before = block.output_kernel.numpy()
    equalize(model, ids)
    # (G, H / G, D, C): 2 key-value heads of 2 query heads each.
    factors = (block.output_kernel.numpy() / before).reshape(2, 2, 6, -1)
    np.testing.assert_array_equal(factors[:, :1], factors[:, 1:])
    assert np.ptp(factors)


def test_channels_that_a_tied_head_cannot_even_out_are_named(make_model, windows_of):
    model, ids = make_model(embedding_dim=64), windows_of(4, 8)[0]
    norm = model.get_layer("final_norm")
    assert head_outliers(model, ids) == equalize(model, ids) == []
    gamma = np.ones(64, np.float32)
    gamma[[9, 40]] = 50.0
    norm.gamma.assign(gamma)
    assert head_outliers(model, ids) == equalize(model, ids) == [9, 40]


def test_outliers_are_rounded_apart_where_that_halves_the_error():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    assert equalization._outliers(x) == []
    x[:, 5] *= 1.5
    assert equalization._outliers(x) == []
    x[:, 5] *= 4
    assert equalization._outliers(x) == [5]


@pytest.mark.parametrize("function", [equalize, head_outliers])
def test_a_text_is_needed(make_model, function):
    with pytest.raises(InputError, match="no data"):
        function(make_model(), np.zeros((0, 8), np.int32))
