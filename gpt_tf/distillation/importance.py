"""How much each layer, channel, head and unit of a GPT does, so the rest can go.

Measured on text where there is any, else read off the weights.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from gpt_tf.errors import InputError
from gpt_tf.models import operations
from gpt_tf.models.decoding import parts_of

# Logits that are in memory at once: 128 MiB of float32.
_VALUES_AT_ONCE = 1 << 25

_SEEN = (
    "attention_norm_activation",
    "qkv_activation",
    "context_activation",
    "attention_residual_activation",
    "feedforward_norm_activation",
    "hidden_activation",
)


class Importance(NamedTuple):
    """Scores of `n` blocks of a GPT, larger for what does more.

    Attributes:
        channels: Of the residual stream, the same for all blocks, `(C,)`.
        heads: `(n, H)`.
        score_dims: Of each head's queries and keys together, `(n, H, D)`.
        value_dims: Of each head's values, `(n, H, D)`.
        units: Of the feed-forward part, `(n, F)`.
    """

    channels: np.ndarray
    heads: np.ndarray
    score_dims: np.ndarray
    value_dims: np.ndarray
    units: np.ndarray


def layer_importance(teacher, inputs, labels=None) -> np.ndarray:
    """Measure how much worse a GPT predicts without each of its blocks.

    Args:
        teacher: A `GPTModel`; it is not changed.
        inputs: Token ids `(B, T)`.
        labels: The next tokens `(B, T)`. None: those within `inputs`, so that `T` is
            at least 2.

    Returns:
        Growth of the loss in nats per token, `(L,)`. It is negative for a block that
        does harm.

    Raises:
        InputError: The ids are none of the model's.

    Example:
        >>> layer_importance(teacher, inputs).argmin()
        3

    Reference: Muralidharan et al., "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), arXiv:2407.14679, section 2.2, depth.
    """
    inputs = checked_ids(teacher, inputs)
    if labels is None:
        if inputs.shape[1] < 2:
            raise InputError(
                "Without `labels`, windows of at least 2 tokens are expected, whose "
                f"next tokens are known. Received: {inputs.shape}. Pass `labels`."
            )
        inputs, labels = inputs[:, :-1], inputs[:, 1:]
    labels = checked_ids(teacher, labels, "labels")
    if labels.shape != inputs.shape:
        raise InputError(
            "`labels` expects a next token for each of `inputs`. "
            f"Received: {labels.shape} for {inputs.shape}. Cut both alike."
        )
    totals = np.zeros(teacher.num_layers + 1)
    for rows in _batches(teacher, inputs):
        totals += _losses_without_each(parts_of(teacher), inputs[rows], labels[rows])
    return (totals[1:] - totals[0]) / labels.size


def _losses_without_each(parts, tokens, labels):
    """Return the loss sum of all blocks, and then those without each, `(1 + L,)`."""
    x, table = _embed(parts, tokens)
    stream = [x]
    for block in parts.blocks:
        stream.append(block(stream[-1], training=False))

    def loss_sum(x, blocks):
        for block in blocks:
            x = block(x, training=False)
        x = parts.norm(x)
        logits = parts.head(x if table is None else [x, table])
        ones = tf.ones(labels.shape)
        return operations.token_sums(logits, labels, ones)[0].numpy()

    without = [
        loss_sum(stream[index], parts.blocks[index + 1 :])
        for index in range(len(parts.blocks))
    ]
    return np.array([loss_sum(stream[-1], ()), *without], np.float64)


def importance_on(teacher, blocks, inputs) -> Importance:
    """Measure what the parts of a stack of blocks do with a text.

    Channels by the size of the normalised stream that the blocks and the head read;
    heads by the size of what they add to the stream; units by their activation times
    the size of their row in the down product; dimensions within a head by what they
    contribute to scores or to what the head adds.

    Args:
        teacher: A `GPTModel`; it is not changed.
        blocks: Indices of the blocks, which are run one after the other.
        inputs: Token ids `(B, T)`.

    Reference: Minitron (see `layer_importance`), section 2.2, width.
    """
    parts = parts_of(teacher)
    sums = None
    for rows in _batches(teacher, inputs):
        found = _sums_over_tokens(parts, blocks, inputs[rows])
        sums = found if sums is None else [a + b for a, b in zip(sums, found)]
    channels, heads, query, key, value, hidden = [total / inputs.size for total in sums]
    rows = [_row_sizes(parts.blocks[index]) for index in blocks]
    value_dims = value * np.stack([output for output, _ in rows])
    units = hidden * np.stack([down for _, down in rows])
    return Importance(channels, heads, query * key, value_dims, units)


def _sums_over_tokens(parts, blocks, tokens):
    """Sum the sizes of activations over a batch, float64.

    Returns:
        Of the normalised stream over all norms `(C,)`, of what heads add `(n, H)`, of
        query, key and value `(n, H, D)` each, of the hidden units `(n, F)`.
    """
    x, _ = _embed(parts, tokens)
    channels, by_block = 0.0, []
    for index in blocks:
        block = parts.blocks[index]
        with _seeing(block) as seen:
            x = block(x, training=False)
        channels = channels + _size(seen["attention_norm_activation"])
        channels = channels + _size(seen["feedforward_norm_activation"])
        shape = [-1, 3, block.num_heads, block.head_dim]
        qkv = _size(tf.reshape(seen["qkv_activation"], shape))  # (3, H, D)
        heads = _sizes_of_heads(block, seen["context_activation"])
        by_block.append((heads, *qkv, _size(seen["hidden_activation"])))
    channels = channels + _size(tf.reshape(parts.norm(x), [-1, x.shape[-1]]))
    return [channels, *map(np.stack, zip(*by_block, strict=True))]


def _sizes_of_heads(block, context):
    """Return the summed norm of what each head adds to the stream, `(H,)`."""
    heads, width = block.num_heads, block.head_dim
    context = tf.reshape(tf.cast(context, tf.float32), [-1, heads, width])
    kernel = tf.reshape(block.output_kernel, [heads, width, -1])
    kernel = tf.cast(kernel, tf.float32)
    added = tf.einsum("nhd,hdc->nhc", context, kernel)
    return _size(tf.norm(added, axis=-1))


def _size(x):
    """Sum absolute values over the first axis."""
    return tf.reduce_sum(tf.abs(tf.cast(x, tf.float32)), axis=0).numpy().astype("f8")


@contextlib.contextmanager
def _seeing(block):
    """Give what a block's hooks see while it is called, as a dict by their names."""
    before = {name: getattr(block, name) for name in _SEEN}
    seen = {}

    def seer(name):
        def see(x):
            seen[name] = before[name](x)
            return seen[name]

        return see

    for name in _SEEN:
        setattr(block, name, seer(name))
    try:
        yield seen
    finally:
        for name, hook in before.items():
            setattr(block, name, hook)


def stream_scales(teacher, blocks, inputs, channels) -> np.ndarray:
    """Measure how much larger the stream is in some channels than in all.

    A norm over fewer channels makes their spread 1 again. Its scale times this number
    makes them what they were.

    Args:
        teacher: A `GPTModel`; it is not changed.
        blocks: Indices of the blocks, which are run one after the other.
        inputs: Token ids `(B, T)`.
        channels: `(C',)`, indices.

    Returns:
        Mean ratio of the two spreads for each norm in the order of the data,
        `(2 * n + 1,)`.
    """
    parts = parts_of(teacher)
    total = np.zeros(2 * len(blocks) + 1)
    for rows in _batches(teacher, inputs):
        x, _ = _embed(parts, inputs[rows])
        ratios = []
        for index in blocks:
            ratios.append(_ratio_of_spreads(x, channels, teacher.layer_norm_epsilon))
            with _seeing(parts.blocks[index]) as seen:
                x = parts.blocks[index](x, training=False)
            x_between = seen["attention_residual_activation"]
            ratios.append(
                _ratio_of_spreads(x_between, channels, teacher.layer_norm_epsilon)
            )
        ratios.append(_ratio_of_spreads(x, channels, teacher.layer_norm_epsilon))
        total += np.array(ratios) * inputs[rows].size
    return total / inputs.size


def _ratio_of_spreads(x, channels, epsilon):
    x = tf.cast(tf.reshape(x, [-1, x.shape[-1]]), tf.float32)
    some = tf.gather(x, channels, axis=1)
    variances = [tf.math.reduce_variance(y, axis=1) + epsilon for y in (some, x)]
    return tf.reduce_mean(tf.sqrt(variances[0] / variances[1])).numpy()


def importance_of_weights(teacher, blocks) -> Importance:
    parts = parts_of(teacher)
    found = [_scores_of_weights(parts.blocks[index]) for index in blocks]
    heads, scores, values, units = map(np.stack, zip(*found, strict=True))
    return Importance(
        np.sqrt(stream_energy(teacher, blocks)), heads, scores, values, units
    )


def stream_energy(teacher, blocks) -> np.ndarray:
    """Sum the squares of all weights that write to a channel, `(C,)`."""
    parts = parts_of(teacher)
    tables = (parts.embedding.token_table, parts.embedding.position_table)
    energy = sum(np.square(_array(table)).mean(axis=0) for table in tables)
    for index in blocks:
        for name in ("output_kernel", "down_kernel"):
            energy += np.square(_array(getattr(parts.blocks[index], name))).sum(axis=0)
    return energy


def _scores_of_weights(block):
    heads, width = block.num_heads, block.head_dim
    qkv = np.vstack([_array(block.qkv_kernel), _array(block.qkv_bias)])
    query, key, value = _norm(qkv, axis=0).reshape(3, heads, width)
    up = np.vstack([_array(block.up_kernel), _array(block.up_bias)])
    output, down = _row_sizes(block)
    return (
        _norm(value * output, axis=-1),
        query * key,
        value * output,
        _norm(up, 0) * down,
    )


def _row_sizes(block):
    """Return the norms of the rows of the two kernels that write to the stream."""
    output = _norm(_array(block.output_kernel), axis=1)
    down = _norm(_array(block.down_kernel), axis=1)
    return output.reshape(block.num_heads, block.head_dim), down


def _norm(x, axis):
    return np.linalg.norm(x, axis=axis)


def _array(variable):
    return variable.numpy().astype(np.float64)


def _embed(parts, tokens):
    outputs = parts.embedding(tokens, training=False)
    return outputs if isinstance(outputs, (list, tuple)) else (outputs, None)


def _batches(teacher, inputs):
    count = max(1, _VALUES_AT_ONCE // (inputs.shape[1] * teacher.vocab_size))
    for start in range(0, len(inputs), count):
        yield slice(start, start + count)


def checked_ids(teacher, ids, role="inputs") -> np.ndarray:
    ids = np.asarray(ids)
    length = teacher.context_length
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or not ids.size:
        raise InputError(
            f"`{role}` expects token ids (B, T). Received: {ids.dtype} {ids.shape}. "
            "Cut the ids of a text into windows first."
        )
    if ids.min() < 0 or ids.max() >= teacher.vocab_size or ids.shape[1] > length:
        raise InputError(
            f"`{role}` expects ids from 0 to {teacher.vocab_size - 1} in windows of at "
            f"most {length}. Received: ids from {ids.min()} to {ids.max()} in windows "
            f"of {ids.shape[1]}. Use the teacher's tokenizer and context."
        )
    return ids.astype(np.int32)
