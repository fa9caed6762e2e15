"""A teacher's distribution of which only the largest probabilities are known."""

import tensorflow as tf

from gpt_tf.models import ops

# Log-probabilities from here down say that nothing is known of an entry.
NOTHING = -1e8


def logits_from_top_k(ids, log_probs, student_logits):
    """Complete the largest probabilities of a teacher to whole distributions.

    The remaining mass is given the shape that the student's own distribution has over
    the remaining tokens. So what was left out moves nothing among them: the gradient
    of the forward KL is that of a divergence over `k + 1` outcomes, and the loss is
    smaller than with the whole teacher by exactly `rest * KL(teacher || student)` of
    the two distributions over the remaining tokens.

    Args:
        ids: `(B, T, k)` int32, token ids; those whose log-probability is at or below
            `NOTHING` count for nothing and may repeat others.
        log_probs: `(B, T, k + 1)` float32, the last of them of the remaining mass.
        student_logits: `(B, T, V)` float32, without gradient.

    Returns:
        `(B, T, V)` float32, log-probabilities.
    """
    count = ids.shape[-1]
    width = student_logits.shape[-1]
    shape = tf.shape(student_logits)
    rows = shape[0] * shape[1]
    entries = tf.reshape(log_probs[..., :-1], [-1])  # (B * T * k,)
    places = tf.stack([tf.repeat(tf.range(rows), count), tf.reshape(ids, [-1])], axis=1)
    blank = tf.fill([rows, width], ops.MASKED * 2)
    known = tf.reshape(tf.tensor_scatter_nd_max(blank, places, entries), shape)
    is_known = known > NOTHING
    own = tf.nn.log_softmax(tf.cast(student_logits, tf.float32))
    left = tf.reduce_logsumexp(
        tf.where(is_known, ops.MASKED, own), axis=-1, keepdims=True
    )
    return tf.where(is_known, known, own - left + log_probs[..., -1:])


def logits_from_sorted(log_probs, width):
    """Complete sorted probabilities to distributions whose order alone counts.

    The remaining mass is spread evenly over the tokens that are left.

    Args:
        log_probs: `(B, T, k + 1)` float32, falling, the last of the remaining mass.
        width: Size of a vocabulary; at least `k + 1` entries are returned.

    Returns:
        `(B, T, max(width, k + 1))` float32, log-probabilities.
    """
    left = max(1, width - (log_probs.shape[-1] - 1))
    each = log_probs[..., -1:] - tf.math.log(float(left))
    return tf.concat([log_probs[..., :-1], tf.repeat(each, left, axis=-1)], axis=-1)
