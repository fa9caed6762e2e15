import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.layers import TransformerBlock, _identity
from gpt_tf.quantization import calibration
from gpt_tf.quantization.calibration import calibrate
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.quantization.qat import quantize_aware, quantize_gpt_model, to_float
from gpt_tf.quantization.weights import quantize_weights
from gpt_tf.text.dataset import Windows

pytestmark = pytest.mark.usefixtures("eagerly")


def hooks_of(model):
    return [
        getattr(layer, name)
        for layer in model.layers
        for name in getattr(layer, "ACTIVATIONS", ())
    ]


def test_every_activation_of_the_model_has_a_range(make_model, windows_of):
    ranges = calibrate(make_model(), windows_of(4, 8)[0])
    expected = ["embedding/embedding_activation"]
    for index in range(2):
        expected += [f"block_{index}/{name}" for name in TransformerBlock.ACTIVATIONS]
    expected += ["final_norm/norm_activation", "head/logits_activation"]
    assert list(ranges) == expected
    for low, high in ranges.values():
        assert isinstance(low, float) and low <= 0.0 <= high and low < high


def test_minmax_is_the_extremes_over_all_batches(make_model, windows_of, traced):
    model, x = make_model(num_layers=1), windows_of(10, 8)[0]

    def measure(**options):
        ranges = calibrate(model, x, batch_size=3, method="minmax", **options)
        return ranges["head/logits_activation"]

    logits, measured = model(x).numpy(), measure()
    assert measured == pytest.approx((logits.min(), logits.max()), abs=1e-6)
    assert measure(num_batches=1) != measured


def test_every_kind_of_input_gives_the_same_ranges(make_model, windows_of):
    model, x = make_model(num_layers=1), windows_of(6, 8)[0]
    expected = calibrate(model, x, batch_size=2)
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(2)
    kinds = {
        "tensor": tf.constant(x),
        "lists": x.tolist(),
        "dataset": data,
        "list of batches": [x[:2], x[2:4], x[4:]],
        "iterator": iter([x[:2], x[2:4], x[4:]]),
    }
    for kind, inputs in kinds.items():
        assert calibrate(model, inputs, batch_size=2) == expected, kind
    assert calibrate(model, data.repeat(), num_batches=3) == expected
    windows = Windows(np.arange(97) % 31, 8, 4, shuffle=False)
    rows = (np.arange(96) % 31).reshape(12, 8)
    assert calibrate(model, windows) == calibrate(model, rows, batch_size=4)


def test_the_model_is_left_as_it_was(make_model, windows_of):
    model, x = make_model(num_layers=1), windows_of(4, 8)[0]
    before, weights = model(x).numpy(), model.get_weights()
    calibrate(model, x, method="mse")
    assert all(hook is _identity for hook in hooks_of(model))
    np.testing.assert_array_equal(model(x), before)
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="at most 16 positions"):
        calibrate(model, windows_of(2, 17)[0])
    assert all(hook is _identity for hook in hooks_of(model))


def test_percentile_and_mse_cut_off_an_outlier_and_minmax_does_not():
    values = np.random.default_rng(0).normal(size=100_000)
    values[7] = 50.0
    counts, edges = np.histogram(values, calibration._BINS)
    low, high = edges[0], edges[-1]
    one, other = calibration._percentile_range(counts, low, high, 1e-4)
    assert -5.0 < one < -3.5
    assert 3.5 < other < 5.0
    assert calibration._percentile_range(counts, low, high, 0.0) == (low, high)
    # An error of 50 - 43.6 once is less than coarser steps for all others.
    assert 30.0 < calibration._mse_range(counts, low, high, "int8")[1] < 49.0


@pytest.mark.parametrize("method", calibration.METHODS)
def test_an_activation_that_is_always_0_has_the_narrowest_range(
    make_model, windows_of, method
):
    model = make_model(num_layers=1)
    kernel = model.get_layer("block_0").down_kernel
    kernel.assign(tf.zeros_like(kernel))
    ranges = calibrate(model, windows_of(4, 8)[0], method=method)
    always_0 = [name for name, range_ in ranges.items() if range_[1] < 1e-30]
    assert always_0 == ["block_0/down_activation"]
    assert ranges[always_0[0]] == (0.0, calibration.NARROWEST)


def test_finer_steps_cut_off_less():
    counts = np.histogram(np.random.default_rng(0).normal(size=100_000), 2048)[0]
    counts[-1] = 1  # at 4 standard deviations more than the rest
    coarse = calibration._mse_range(counts, -8.0, 8.0, "int8")
    assert coarse[1] < 7.0
    assert calibration._mse_range(counts, -8.0, 8.0, "int16") == (-8.0, 8.0)


def test_each_activation_is_calibrated_for_its_own_type(make_model, windows_of):
    model, x = make_model(num_layers=1), windows_of(64, 16)[0]
    config = QuantizationConfig.full(outputs="int16")
    ranges = calibrate(model, x, dtype=config.dtype_of)
    narrow, wide = (calibrate(model, x, dtype=dtype) for dtype in ("int8", "int16"))
    assert wide == calibrate(model, x, method="minmax")
    for name, range_ in ranges.items():
        is_wide = config.dtype_of(name.partition("/")[2]) == "int16"
        assert range_ == (wide if is_wide else narrow)[name]
    cut = {name.partition("/")[2] for name in wide if wide[name] != narrow[name]}
    types = {config.dtype_of(name) for name in cut}
    assert types == {"int8", "int16"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no data"),
        (tf.data.Dataset.from_tensor_slices(np.zeros((0, 8))).batch(2), "no data"),
        (np.full((2, 8), 31), "from 0 to 30"),
        (np.full((2, 8), -1), "from 0 to 30"),
        ([np.zeros(8, "int32")], r"\(B, T\)"),
        (tf.data.Dataset.from_tensors(np.zeros((2, 8), "int32")).repeat(), "for ever"),
        (5, "`inputs` expects token ids"),
    ],
)
def test_data_that_cannot_be_used_is_refused(make_model, inputs, message):
    with pytest.raises(InputError, match=message):
        calibrate(make_model(num_layers=1), inputs)


def test_weights_that_are_not_finite_are_refused(make_model, windows_of):
    model = make_model(num_layers=1)
    model.get_layer("block_0").up_bias.assign(np.full(48, np.nan))
    with pytest.raises(InputError, match="block_0/up_activation"):
        calibrate(model, windows_of(2, 8)[0])


def test_what_is_no_float_gpt_is_refused(make_model, windows_of):
    import keras as keras_3

    x, _ = windows_of(2, 8)
    aware = quantize_aware(make_model(num_layers=1))
    for model, message in (
        (keras_3.Sequential([keras_3.layers.Dense(2)]), "Keras 3"),
        (keras.Sequential([keras.layers.Dense(2)]), r"gpt_tf.GPTModel\(...\)"),
        (aware, "already"),
    ):
        for call, data in (
            (calibrate, [x]),
            (quantize_gpt_model, [x]),
            (quantize_aware, []),
            (quantize_weights, []),
        ):
            with pytest.raises(InputTypeError, match=message):
                call(model, *data)
    with pytest.raises(InputTypeError, match="quantize_aware"):
        to_float(make_model(num_layers=1))
