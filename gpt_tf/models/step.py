"""What a training step needs beside Keras: parts of a batch, and replicas."""

import tensorflow as tf

from gpt_tf.models import ops


def parts_of_batch(batch, least):
    """Cut every tensor of a batch into equal parts.

    Args:
        batch: Structure of tensors `(B, ...)`; None stays None.
        least: Number of parts, at least 1; where it does not divide `B`, as in the
            last batch of an epoch, the next larger number that does.

    Returns:
        The structure of tensors `(parts, B / parts, ...)`, and `parts`, `()` int32.
    """
    first = next(x for x in tf.nest.flatten(batch) if x is not None)
    rows = tf.shape(first)[0]
    numbers = tf.range(1, rows + 1)
    fits = (rows % numbers == 0) & (numbers >= tf.minimum(least, rows))
    parts = tf.reduce_min(tf.where(fits, numbers, rows))

    def cut(x):
        if x is None:
            return None
        shape = tf.concat([[parts, rows // parts], tf.shape(x)[1:]], 0)
        return tf.ensure_shape(tf.reshape(x, shape), [None, None, *x.shape[1:]])

    return tf.nest.map_structure(cut, batch), parts


def add_over_replicas(tensors):
    """Add up a structure of tensors over all replicas, inside a replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    with ops.graph_owns_gradients():
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def max_over_replicas(tensor):
    """Return the largest values of a float tensor over all replicas, inside one.

    TensorFlow's replicas can add but not compare: each adds its values at a place
    of its own.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensor
    places = tf.range(context.num_replicas_in_sync)
    shape = tf.concat([tf.shape(places), tf.ones([tf.rank(tensor)], tf.int32)], 0)
    own = tf.reshape(places == context.replica_id_in_sync_group, shape)
    spread = tf.where(own, tensor[tf.newaxis], tf.zeros([], tensor.dtype))
    return tf.reduce_max(add_over_replicas(spread), axis=0)
