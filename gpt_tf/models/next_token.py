"""The loss and the metrics of predicting the next token, as Keras objects.

They take labels `(B, T)` or `(B, T, 1)` and logits `(B, T, V)` in any model, under
any strategy, in `fit` and in a training step of one's own. A label of `IGNORED`
does not count, as in Hugging Face's libraries.
"""

import tensorflow as tf
import tf_keras as keras

from gpt_tf.models.ops import is_top_1
from gpt_tf.text.dataset import IGNORED


def counted(labels):
    """Return which labels, any integers, count; bool in their shape."""
    return tf.not_equal(tf.cast(labels, tf.int32), IGNORED)


def share_that_counts(labels):
    """Return the share of the labels that count, `()` float32; 0 of no labels."""
    counts = tf.cast(counted(labels), tf.float32)
    return tf.math.divide_no_nan(
        tf.reduce_sum(counts), tf.cast(tf.size(counts), tf.float32)
    )


def cross_entropies(labels, logits):
    """Return the cross-entropy of every token in nats, 0 where it does not count.

    Args:
        labels: `(..., T)`, integers from 0 to V - 1, or `IGNORED`.
        logits: `(..., T, V)`, any float type.
    """
    counts = counted(labels)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(counts, labels, tf.zeros_like(labels)),
        tf.cast(logits, tf.float32),
    )
    return tf.where(counts, losses, 0.0)


def _aligned(labels, logits):
    """Return labels `(B, T)`, which may be `(B, T, 1)`, and logits, as tensors."""
    labels, logits = tf.cast(labels, tf.int32), tf.convert_to_tensor(logits)
    if labels.shape.rank == logits.shape.rank:
        labels = tf.squeeze(labels, -1)
    return labels, logits


@keras.saving.register_keras_serializable(package="gpt_tf")
class NextTokenLoss(keras.losses.Loss):
    """Cross-entropy of the next token in nats, averaged over the labels that count.

    Like `SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)`, and 0
    where no label counts.

    Args:
        reduction: As for every Keras loss. Weights multiply the losses of the tokens
            and do not change their number, which the sum is divided by.

    Call arguments:
        y_true: Token ids `(B, T)` or `(B, T, 1)`; -100 does not count.
        y_pred: Logits `(B, T, V)`.
        sample_weight: `(B, T)` or `(B,)`; None is 1 everywhere.
    """

    def __init__(self, reduction=keras.losses.Reduction.AUTO, name="next_token_loss"):
        super().__init__(reduction=reduction, name=name)

    def call(self, y_true, y_pred):
        return cross_entropies(*_aligned(y_true, y_pred))

    def __call__(self, y_true, y_pred, sample_weight=None):
        loss = super().__call__(y_true, y_pred, sample_weight)
        if self._get_reduction() != keras.losses.Reduction.SUM_OVER_BATCH_SIZE:
            return loss
        # Keras has divided by the number of all labels.
        return tf.math.divide_no_nan(loss, share_that_counts(y_true))


class TokenMean(keras.metrics.Mean):
    """A mean over the tokens that count, which can be given as a sum."""

    def values(self, labels, logits):
        """Return what the mean is of, `(B, T)` float32."""
        raise NotImplementedError

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Take labels `(B, T)`, logits `(B, T, V)` and weights `(B, T)` or `(B,)`."""
        labels, logits = _aligned(y_true, y_pred)
        weights = token_weights(labels, sample_weight)
        return super().update_state(self.values(labels, logits), weights)

    def add(self, total, weight):
        """Take a sum over tokens and their weight, float32 scalars."""
        mean = tf.math.divide_no_nan(total, weight)
        return super().update_state(mean, sample_weight=weight)


@keras.saving.register_keras_serializable(package="gpt_tf")
class Perplexity(TokenMean):
    """Exponential of the mean cross-entropy in nats per token that counts."""

    def __init__(self, name="perplexity", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def values(self, labels, logits):
        return cross_entropies(labels, logits)

    def result(self):
        return tf.exp(super().result())


@keras.saving.register_keras_serializable(package="gpt_tf")
class TokenAccuracy(TokenMean):
    """Share of the tokens that count whose label is the most likely token."""

    def __init__(self, name="token_accuracy", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def values(self, labels, logits):
        return tf.cast(is_top_1(labels, logits), tf.float32)


def token_weights(labels, sample_weight=None):
    """Return a weight per label, `(B, T)` float32, 0 where it does not count.

    Args:
        labels: `(B, T)`, integers.
        sample_weight: `(B, T)`, `(B, T, 1)` or `(B,)`; None is 1 everywhere.
    """
    counts = tf.cast(counted(labels), tf.float32)
    if sample_weight is None:
        return counts
    weights = tf.cast(sample_weight, tf.float32)
    if weights.shape.rank == 1:
        weights = weights[:, tf.newaxis]
    elif weights.shape.rank == 3:
        weights = tf.squeeze(weights, -1)
    return counts * weights
