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


def sums_and_gradients(sums, variables, batch, micro_batches=1):
    """Differentiate a sum over tokens, micro-batch by micro-batch.

    Args:
        sums: Function of `batch` that returns a tuple of float32 scalars, sums over
            tokens; the first one is differentiated.
        variables: What to differentiate with respect to.
        batch: Structure of tensors `(B, ...)`, the weights of the tokens among
            them; rows of zeros may be added.
        micro_batches: Number of equal parts that are computed one after the other,
            so that only one part's activations are in memory.

    Returns:
        The sums over the whole batch, and the gradients of the first of them.
    """

    def once(part):
        with tf.GradientTape() as tape:
            values = sums(part)
        gradients = tape.gradient(
            values[0], variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return tuple(values), [tf.convert_to_tensor(g) for g in gradients]

    if micro_batches == 1:
        return once(batch)
    parts = split_batch(batch, micro_batches)

    def part(index):
        return tf.nest.map_structure(lambda x: x[index], parts)

    def more(index, values, gradients):
        added = once(part(index))
        return index + 1, *tf.nest.map_structure(tf.add, (values, gradients), added)

    _, values, gradients = tf.while_loop(
        lambda index, values, gradients: index < micro_batches,
        more,
        (tf.constant(1), *once(part(0))),
        maximum_iterations=micro_batches - 1,
    )
    return values, gradients


def add_over_replicas(tensors):
    """Add up a structure of tensors over all replicas, inside a replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def mean_of(total, weight):
    """Divide a sum over tokens by their weight; 0 where no token counts."""
    return tf.math.divide_no_nan(total, weight)
