import numpy as np
import pytest
import tensorflow as tf

from gpt_tf.quantization.calibration import NARROWEST
from gpt_tf.quantization.fake import fake_quantize, fake_quantize_weights
from gpt_tf.quantization.weights import dequantize, quantize_array


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def value_and_gradient(function, x, compiled):
    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x, output_gradients=tf.range(1.0, y.shape[0] + 1))

    both = tf.function(both, jit_compile=True) if compiled else both
    return [value.numpy() for value in both(tf.constant(x))]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("range_", [(-1.0, 2.0), (-0.17, 3.1), (0.0, 4.0), (-2.0, 0.0)])
def test_int8_is_tensorflows_own_fake_quantiser(range_, compiled):
    x = 1.5 * normal(5000)
    ours = value_and_gradient(lambda x: fake_quantize(x, *range_), x, compiled)
    theirs = value_and_gradient(
        lambda x: tf.quantization.fake_quant_with_min_max_vars(x, *range_), x, False
    )
    scale = (range_[1] - range_[0]) / 255
    # Halves may be rounded to the other side, and cut off a hair later.
    assert np.mean(np.abs(ours[0] - theirs[0]) > 1e-5) < 1e-3
    assert np.abs(ours[0] - theirs[0]).max() < 1.01 * scale
    assert np.mean(ours[1] != theirs[1]) < 1e-3
    another = fake_quantize(x, range_[0], range_[1] + scale).numpy()
    assert np.mean(np.abs(another - theirs[0]) > 1e-5) > 0.4


def test_int16_has_steps_256_times_finer_and_keeps_zero():
    x = np.concatenate([normal(1000), [0.0, 9.0]]).astype("float32")
    y = fake_quantize(x, -2.0, 4.0, "int16").numpy()
    steps = y / (4.0 / 32767)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-2)
    assert np.abs(y - x)[:-1].max() <= 0.51 * 4.0 / 32767
    assert y[-2] == 0.0 and y[-1] == pytest.approx(4.0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("high", [0.0, NARROWEST])
def test_a_range_without_a_scale_changes_nothing(high, dtype, compiled):
    x = normal(50)
    x[7] = 0.0
    y, gradient = value_and_gradient(
        lambda x: fake_quantize(x, 0.0, tf.constant(high), dtype), x, compiled
    )
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(gradient, np.arange(1, 51))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("axis", "block_size"), [(None, None), (0, None), (1, None), (1, 10)]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_to_the_integers_of_the_export(
    bits, axis, block_size, compiled
):
    w = normal(30, 20)
    w[:, 3] = w[4] = 0.0
    rounding = lambda w: fake_quantize_weights(w, bits, axis, block_size)  # noqa: E731
    y = (tf.function(rounding, jit_compile=True) if compiled else rounding)(w).numpy()
    integers, scales = quantize_array(w, bits, axis, block_size)
    expected = dequantize(integers, scales, block_size=block_size)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    again = quantize_array(y, bits, axis, block_size)
    np.testing.assert_array_equal(again[0], integers)
    other = dequantize(*quantize_array(w, bits, {None: 0, 0: 1, 1: None}[axis]))
    assert np.abs(y - other).max() > 1e-3


def test_the_gradient_passes_the_rounding_of_weights_unchanged():
    w, slope = tf.constant(normal(4, 5)), normal(4, 5, seed=1)
    with tf.GradientTape() as tape:
        tape.watch(w)
        loss = tf.reduce_sum(fake_quantize_weights(w, 8, 1) * slope)
    np.testing.assert_array_equal(tape.gradient(loss, w), slope)
