"""The arithmetic of the model as plain functions of tensors.

Every function works eagerly, in a graph and under XLA, in float32 and in the
16-bit types: normalisation, softmax and the loss are always computed in float32.
The letters for shapes are `B` batch, `T` positions in this call, `S` cached
positions, `H` heads, `D` head width, `C` embedding width, `V` vocabulary.
"""

import contextlib
import contextvars
import math

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

MASKED = -1e9

_INSIDE_XLA = contextvars.ContextVar("inside_xla", default=False)


@contextlib.contextmanager
def inside_xla():
    """Say that what is traced in this block will be compiled by XLA."""
    token = _INSIDE_XLA.set(True)
    try:
        yield
    finally:
        _INSIDE_XLA.reset(token)


def layer_norm(x, gamma, beta, epsilon):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift.

    Args:
        x: `(..., C)`, any float type.
        gamma: `(C,)`, scale.
        beta: `(C,)`, shift.
        epsilon: Added to the variance, above 0.

    Returns:
        `(..., C)` in the type of `x`.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    inputs = tf.cast(x, tf.float32)
    centred = inputs - tf.reduce_mean(inputs, axis=-1, keepdims=True)
    variance = tf.reduce_mean(centred * centred, axis=-1, keepdims=True)
    normal = centred * tf.math.rsqrt(variance + epsilon)
    outputs = normal * tf.cast(gamma, tf.float32) + tf.cast(beta, tf.float32)
    return tf.cast(outputs, x.dtype)


def gelu(x):
    """GELU in GPT-2's tanh form.

    Reference: Hendrycks and Gimpel, "Gaussian Error Linear Units",
    arXiv:1606.08415.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + tf.tanh(inner))


def causal_mask(num_positions):
    """Return the additive mask that hides the future, `(1, 1, T, T)` float32."""
    visible = tf.linalg.band_part(tf.ones([num_positions, num_positions]), -1, 0)
    return ((1.0 - visible) * MASKED)[tf.newaxis, tf.newaxis]


def attention(query, key, value, mask, on_probabilities=None):
    """Scaled dot-product attention.

    Args:
        query: `(B, H, T, D)`.
        key: `(B, H, S, D)`.
        value: `(B, H, S, D)`.
        mask: Additive, float32, broadcastable to `(B, H, T, S)`: 0 where a
            position may be seen and a large negative number where not.
        on_probabilities: Function applied to the probabilities `(B, H, T, S)`
            before they weigh the values, or None.

    Returns:
        `(B, H, T, D)` in the type of `query`.

    Reference: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.
    """
    scale = 1.0 / math.sqrt(query.shape[-1])
    scores = tf.matmul(query * scale, key, transpose_b=True)  # (B, H, T, S)
    scores = tf.cast(scores, tf.float32) + mask
    probabilities = tf.cast(tf.nn.softmax(scores), query.dtype)
    if on_probabilities is not None:
        probabilities = on_probabilities(probabilities)
    return tf.matmul(probabilities, value)  # (B, H, T, D)


def token_sums(logits, labels, weights):
    """Sum loss, correct predictions and weights over all tokens.

    Sums rather than means, so that replicas and micro-batches add up to exactly
    the mean over the whole batch, and so that a token of weight 0 counts nowhere.

    Args:
        logits: `(..., V)`, any float type.
        labels: `(...)`, integers from 0 to V - 1.
        weights: `(...)`, float32, at least 0.

    Returns:
        `(loss_sum, correct_sum, weight_sum)`, float32 scalars: the weighted
        cross-entropy in nats, the weight of the tokens whose label has the
        largest logit, and the weight of all tokens.
    """
    width = logits.shape[-1]
    logits = tf.cast(tf.reshape(logits, [-1, width]), tf.float32)
    labels = tf.reshape(labels, [-1])
    weights = tf.reshape(weights, [-1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    detached = tf.stop_gradient(logits)
    chosen = tf.gather(detached, labels, batch_dims=1)
    correct = tf.cast(chosen >= tf.reduce_max(detached, axis=-1), tf.float32)
    # A masked token may hold anything, infinities included.
    losses = tf.where(weights > 0.0, losses * weights, tf.zeros_like(losses))
    return (
        tf.reduce_sum(losses),
        tf.reduce_sum(correct * weights),
        tf.reduce_sum(weights),
    )


def write_rows(cache, rows, position):
    """Put new keys or values into a cache.

    Args:
        cache: `(B, H, S, D)`.
        rows: `(B, H, T, D)`, with `position + T` at most `S`.
        position: `()` int32, the cache row that takes the first new one.

    Returns:
        `(B, H, S, D)`. Inside `inside_xla()` the rows are written in place, by
        DYNAMIC_UPDATE_SLICE, which TensorFlow has no kernel for outside XLA.
    """
    rows = tf.cast(rows, cache.dtype)
    if _INSIDE_XLA.get():
        start = tf.stack([0, 0, position, 0])
        return gen_xla_ops.xla_dynamic_update_slice(cache, rows, start)
    after = position + tf.shape(rows)[2]
    return tf.concat([cache[:, :, :position], rows, cache[:, :, after:]], axis=2)
