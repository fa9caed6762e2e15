import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.errors import InputError
from gpt_tf.export.constants import MODES, Constants, outline
from gpt_tf.export.tflite_writer import Type

FINITE = st.floats(-1e3, 1e3, width=32)


def params_of(low, high, mode="int8", name="block_0/up_activation"):
    ranges = {"block_0/up_activation": (low, high)}
    return Constants(MODES[mode], {}, {}, {}, ranges).activation_params(name)


# Activations


@given(FINITE, FINITE, st.lists(FINITE, min_size=1, max_size=20))
def test_quantisation_is_that_of_tensorflows_fake_quantisation(low, high, values):
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    if high - low < 1e-3:
        return
    quant = params_of(low, high)
    assert -128 <= quant.zero_point <= 127
    values = np.array(values, np.float32)
    integers = np.rint(values / quant.scale) + quant.zero_point
    found = (np.clip(integers, -128, 127) - quant.zero_point) * quant.scale
    expected = tf.quantization.fake_quant_with_min_max_vars(values, low, high).numpy()
    # A value between two steps may be rounded to either, and where 0 lies between
    # two integers zero may be shifted to either: one step, not more.
    steps = np.abs(found - expected) / quant.scale
    assert steps.max() < 1.01
    middle = abs(abs(-low / quant.scale) % 1 - 0.5) < 1e-3
    halves = np.abs(np.abs(values / quant.scale) % 1 - 0.5) < 1e-3
    edges = (values < low) | (values > high)
    assert middle or (steps[~halves & ~edges] < 1e-2).all()


@given(FINITE, FINITE)
def test_the_quantisation_of_int16_is_symmetric(low, high):
    low, high = min(low, high), max(low, high)
    quant = params_of(low, high, "int16x8")
    assert quant.zero_point == 0
    assert quant.scale > 0
    assert quant.scale * 32767 >= max(-low, high, 0.0) * (1 - 1e-6)
    if max(-low, high) > 1e-30:
        assert quant.scale * 32767 == pytest.approx(max(-low, high), rel=1e-5)


@pytest.mark.parametrize("mode", ["int8", "int16x8"])
@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-40])
def test_an_activation_that_is_always_zero_is_quantised(mode, high):
    assert params_of(0.0, high, mode).scale == 1.0


def test_residuals_and_embedding_have_sixteen_bits():
    constants = Constants(MODES["int8_full"], {}, {}, {}, {})
    for name in (
        "embedding/embedding_activation",
        "block_0/attention_residual_activation",
        "block_0/feedforward_residual_activation",
    ):
        assert constants.integer_of(name) == Type.INT16
    assert constants.integer_of("block_0/up_activation") == Type.INT8


def test_a_range_that_is_missing_or_none_is_named():
    with pytest.raises(InputError, match=r"block_0/down_activation.*calibrate"):
        params_of(0.0, 1.0, name="block_0/down_activation")
    for limits in ((np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0), (1.0, -1.0)):
        with pytest.raises(InputError, match="block_0/up_activation"):
            params_of(*limits)


def test_an_outline_of_any_size_takes_no_memory():
    sizes = {
        "vocab_size": 10**9,
        "embedding_dim": 10**6,
        "num_layers": 1,
        "num_heads": 10**3,
        "head_dim": 10**3,
        "context_length": 10**9,
        "feedforward_dim": 10**9,
        "tie_embeddings": True,
    }
    found = outline("int8", sizes, True, True)
    quant = found.activation_params("block_0/up_activation")
    bias, _ = found.integer_bias(
        found.vectors["block_0/up_bias"],
        quant,
        found.matrices["block_0/up_kernel"].quant,
    )
    assert bias.nbytes == 4 * 10**9
    assert bias.strides == (0,)
