"""One optimisation step: the same whatever the replicas and micro-batches.

Losses and gradients are carried as sums over tokens, added up over micro-batches
and replicas, and divided once by the weight of all tokens. So a global batch gives
one gradient, however it is cut, and a token of weight 0 has no influence at all.
"""

import tensorflow as tf


def split_batch(tensors, parts):
    """Cut every `(B, ...)` tensor into `parts` equal ones: `(parts, B/parts, ...)`.

    Rows of zeros, and so of weight 0, fill the last part where `parts` does not
    divide `B`, as in the last batch of an epoch.
    """

    def cut(x):
        shape = tf.shape(x)
        missing = -shape[0] % parts
        rest = tf.zeros(tf.concat([[missing], shape[1:]], 0), x.dtype)
        sizes = tf.concat([[parts, (shape[0] + missing) // parts], shape[1:]], 0)
        return tf.reshape(tf.concat([x, rest], 0), sizes)

    return tf.nest.map_structure(cut, tensors)


def sums_and_gradients(values, variables, batch, micro_batches=1):
    """Differentiate a sum over tokens, micro-batch by micro-batch.

    Args:
        values: Function of `batch` that returns two tuples: float32 scalars, sums
            over tokens, the first of which is differentiated; and tensors of which
            the largest values over the micro-batches are wanted.
        variables: What to differentiate with respect to.
        batch: Structure of tensors `(B, ...)`, the weights of the tokens among
            them; rows of zeros may be added.
        micro_batches: Number of equal parts that are computed one after the other,
            so that only one part's activations are in memory.

    Returns:
        The sums over the whole batch, the gradients of the first of them, and the
        maxima.
    """

    def once(part):
        with tf.GradientTape() as tape:
            sums, maxima = values(part)
        gradients = tape.gradient(
            sums[0], variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        return tuple(sums), gradients, tuple(maxima)

    if micro_batches == 1:
        return once(batch)
    parts = split_batch(batch, micro_batches)

    def part(index):
        return tf.nest.map_structure(lambda x: x[index], parts)

    def more(index, sums, gradients, maxima):
        new_sums, new_gradients, new_maxima = once(part(index))
        sums, gradients = tf.nest.map_structure(
            tf.add, (sums, gradients), (new_sums, new_gradients)
        )
        maxima = tf.nest.map_structure(tf.maximum, maxima, new_maxima)
        return index + 1, sums, gradients, maxima

    _, sums, gradients, maxima = tf.while_loop(
        lambda index, *_: index < micro_batches,
        more,
        (tf.constant(1), *once(part(0))),
        maximum_iterations=micro_batches - 1,
    )
    return sums, gradients, maxima


def add_over_replicas(tensors):
    """Add up a structure of tensors over all replicas, inside a replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
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
    return tf.reduce_max(context.all_reduce(tf.distribute.ReduceOp.SUM, spread), axis=0)


def mean_of(total, weight):
    """Divide a sum over tokens by their weight; 0 where no token counts."""
    return tf.math.divide_no_nan(total, weight)
