"""GPTQ: each weight rounded so that the ones after it make up for its error.

Rounded one by one to the nearest integer, weights err independently. Of what a product
reads, channels go together, and an error in the weight of one can be taken back in the
weights of the others. How they go together is the matrix of second moments
`X^T X` of the product's input, measured on text.

Needs NumPy only, but for `moments_of`, which runs the model.

Reference: Frantar et al., "GPTQ", arXiv:2210.17323.
"""

import numpy as np

from gpt_tf.errors import InputError

# Kernels of the products with weights, by the activation that each reads.
READ_BY = {
    "attention_norm_activation": "qkv_kernel",
    "context_activation": "output_kernel",
    "feedforward_norm_activation": "up_kernel",
    "hidden_activation": "down_kernel",
    "norm_activation": "kernel",
}
_DAMPING = 0.01  # of the mean of the moments' diagonal, added to it
_TOGETHER = 128  # channels after which the rest of a matrix is updated


def moments_of(model, inputs, *, batch_size=8):
    """Measure the second moments of what every product with weights reads.

    Args:
        model: A float `GPTModel`.
        inputs: Text like that which the model will meet, as for `calibrate`; some
            thousand positions.
        batch_size: Rows of an array that are computed at once.

    Returns:
        `X^T X`, float32 `(C, C)`, by the name of the kernel that reads `X (N, C)`, such
        as `"block_0/qkv_kernel"`; of the head as `"head/kernel"`.

    Raises:
        InputError: There is no data, or as for `calibrate`.
    """
    # Here and not above: rounding does without TensorFlow.
    import tensorflow as tf

    from gpt_tf.models.cached_forward import parts_of
    from gpt_tf.models.layers import observed
    from gpt_tf.quantization import calibration

    calibration.check_float(model, "moments_of")
    moments = {}

    def see(layer, name, x):
        x = tf.reshape(tf.cast(x, tf.float32), [-1, x.shape[-1]])
        owner = "head" if name == "norm_activation" else layer.name
        key = f"{owner}/{READ_BY[name]}"
        found = tf.matmul(x, x, transpose_a=True).numpy()
        moments[key] = moments[key] + found if key in moments else found

    parts = parts_of(model)
    with observed(model.layers, see, READ_BY):
        for ids in calibration.batches_of(inputs, batch_size, model):
            parts.before_head(ids)
    if not moments:
        raise InputError("GPTQ expects token ids (N, T) of some text. Received: none.")
    return moments


def round_weights(values, scales, limit, moments):
    """Round a matrix to integers, each channel's error made up for by later ones.

    Channels come in the order of their size, the largest first.

    Args:
        values: `(M, C)` float32, as many outputs by inputs.
        scales: `(M, C)` or `(M, 1)` float32, above 0: what an integer is multiplied by.
        limit: Largest integer.
        moments: `(C, C)`, as from `moments_of`.

    Returns:
        int8 `(M, C)`.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    factors = _inverse_root(moments[np.ix_(order, order)].astype(np.float64))
    scales = np.broadcast_to(scales, values.shape)[:, order].T
    rest = values[:, order].T.astype(np.float32)  # (C, M): a channel is a row
    integers = np.zeros(rest.shape, np.int8)
    for begin in range(0, len(rest), _TOGETHER):
        end = min(begin + _TOGETHER, len(rest))
        errors = np.zeros((end - begin, rest.shape[1]), np.float32)
        for row in range(begin, end):
            steps = np.clip(np.rint(rest[row] / scales[row]), -limit, limit)
            integers[row] = steps
            error = (rest[row] - steps * scales[row]) / factors[row, row]
            rest[row:end] -= np.outer(factors[row, row:end], error)
            errors[row - begin] = error
        rest[end:] -= factors[begin:end, end:].T @ errors
    return np.ascontiguousarray(integers[np.argsort(order)].T)


def _inverse_root(moments):
    """Return the upper Cholesky factor of the inverse of damped moments."""
    diagonal = np.diag(moments)
    damping = _DAMPING * diagonal.mean()
    # Of a channel that is always 0 any weight is as good.
    moments = moments + np.diag(np.where(diagonal > 0, damping, damping + 1))
    return np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
