"""Fake quantisation: rounding to the numbers that integers can stand for.

The numbers stay float32, but only those values occur that the device's integers have.
The gradient passes as if nothing had been rounded, and is 0 where a value was cut off.
XLA cannot compile TensorFlow's own fake quantisers, which know no 16 bits either.
"""

import tensorflow as tf

from gpt_tf.models import ops
from gpt_tf.quantization.modes import SMALLEST_SCALE


def fake_quantize(x, minimum, maximum, dtype="int8"):
    """Round an activation to integers of a range.

    int8: 256 steps from `minimum` to `maximum`, moved so that 0 is one of them.
    int16: symmetric, `scale = max(|minimum|, |maximum|) / 32767`. Both are
    TFLite's.

    Args:
        x: Any shape and float type.
        minimum: `()` float32, at most 0.
        maximum: `()` float32, at least 0. Where both are 0, or so near it that float32
            has no scale for them, no range is known yet and `x` stays as it is.
        dtype: `"int8"` or `"int16"`.

    Returns:
        The shape and type of `x`.

    Reference: Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.
    """
    if dtype == "int8":
        scale = (maximum - minimum) / 255.0
    else:
        scale = tf.maximum(-minimum, maximum) / 32767.0
    known = scale >= SMALLEST_SCALE
    scale = tf.where(known, scale, 1.0)
    if dtype == "int8":
        zero = tf.clip_by_value(tf.round(-minimum / scale), 0.0, 255.0)
        lowest, highest = -zero, 255.0 - zero
    else:
        lowest, highest = tf.constant(-32767.0), tf.constant(32767.0)

    @ops.custom_gradient
    def round_within(x):
        steps = x / scale

        def gradient(dy):
            inside = tf.logical_and(steps >= lowest, steps <= highest)
            passes = tf.logical_or(inside, tf.logical_not(known))
            return tf.where(passes, dy, tf.zeros_like(dy))

        rounded = tf.clip_by_value(tf.round(steps), lowest, highest) * scale
        return ops.keep(tf.where(known, rounded, x)), gradient

    return tf.cast(round_within(tf.cast(x, tf.float32)), x.dtype)


def fake_quantize_weights(weights, bits=8, axis=None, block_size=None):
    """Round a matrix to symmetric integers: `quantize_array` that can be trained.

    Args:
        weights: `(N, M)`, any float type.
        bits: 2 to 8.
        axis: Axis whose every index has a scale of its own; None gives one to all.
        block_size: Of axis 1, how many of its `N` values share a scale, a divisor of
            `N`; None lets all.

    Returns:
        The shape and type of `weights`; the gradient passes unchanged, as no value
        is cut off.
    """
    limit = 2.0 ** (bits - 1) - 1.0

    @ops.custom_gradient
    def round_all(w):
        shape, shared = w.shape, [a for a in range(w.shape.rank) if a != axis]
        if block_size is not None:
            w, shared = tf.reshape(w, (-1, block_size, shape[1])), [1]
        largest = tf.reduce_max(tf.abs(w), axis=shared, keepdims=True)
        scale = tf.maximum(largest / limit, SMALLEST_SCALE)
        scale = tf.where(largest > 0.0, scale, 1.0)
        rounded = tf.reshape(tf.round(w / scale) * scale, shape)
        return ops.keep(rounded), lambda dy: dy

    return tf.cast(round_all(tf.cast(weights, tf.float32)), weights.dtype)
