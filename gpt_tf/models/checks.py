"""What may be handed to a language model, and what is said where it may not.

Errors name what was expected, what came, and the line that mends it.
"""

import contextlib
import re

import numpy as np
import tensorflow as tf
import tf_keras as keras

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.next_token import IGNORED, NextTokenLoss

# Names of losses and metrics, without case and underscores.
_OF_PROBABILITIES = (
    "binarycrossentropy",
    "binaryfocalcrossentropy",
    "categoricalcrossentropy",
    "categoricalfocalcrossentropy",
    "ce",
    "crossentropy",
    "kld",
    "kldivergence",
    "kullbackleiblerdivergence",
    "sparsecategoricalcrossentropy",
)
# Marks a message from inside a graph, which TensorFlow surrounds with its own.
_BAD_IDS = "gpt_tf: "


@contextlib.contextmanager
def telling_bad_ids():
    """Tell what `check_range` found in a graph as the `InputError` that it is."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = re.search(f"{_BAD_IDS}([^\\]'\"]*)", str(error))
        if found is None:
            raise
        raise InputError(found[1].strip()) from None


# Data


def as_arrays(data):
    """Return nested lists of numbers as an array, and anything else as it is."""
    first = data
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    is_list = isinstance(data, (list, tuple)) and data
    if not is_list or not isinstance(first, (int, float, str, bytes, np.number)):
        return data
    try:
        return np.asarray(data)
    except ValueError:
        raise InputError(
            "Token ids are expected as (B, T), rows of one length. Received: rows of "
            "several lengths. Pad them, and set the labels of the padding to "
            f"{IGNORED}."
        ) from None


def check_there_are_labels(method, y):
    if y is None:
        raise InputError(
            f"`{method}` expects labels, the next tokens (B, T). Received: inputs "
            f"only. Pass `{method}(inputs, labels)` or a dataset of both."
        )


def check_shape_of_ids(ids, role):
    """Refuse what cannot be token ids `(B, T)`, by its shape and type alone."""
    dtype = tf.as_dtype(ids.dtype)
    ragged = isinstance(ids, (tf.RaggedTensor, tf.RaggedTensorSpec))
    known = ids.shape.rank if isinstance(ids.shape, tf.TensorShape) else len(ids.shape)
    is_number = dtype.is_integer or dtype.is_floating
    if is_number and not ragged and known in (2, None):
        return
    kind = "ragged " if ragged else ""
    mend = "Encode text with a tokenizer and cut it into windows first."
    if is_number and known == 1:
        mend = "Batch the dataset, or write `ids[np.newaxis]` for a single row."
    elif ragged:
        mend = f"Pad with `to_tensor()`, and the labels with `to_tensor({IGNORED})`."
    raise InputError(
        f"The {role} expect token ids (B, T). Received: {kind}{dtype.name} "
        f"{tuple(ids.shape)}. {mend}"
    )


def weights_by_row(sample_weight):
    """Return weights `(B,)` or `(B, T)` as `(B, 1)` or `(B, T)`.

    A step that has seen both is traced for a weight of any rank.
    """

    def by_row(weights):
        if weights.shape.rank == 2:
            return weights
        rows = tf.shape(weights)[0]
        columns = tf.where(rows > 0, tf.size(weights) // tf.maximum(rows, 1), 1)
        return tf.reshape(weights, [rows, columns])

    if sample_weight is None:
        return None
    return tf.nest.map_structure(by_row, sample_weight)


def check_range(ids, vocab_size, role, ignored=None):
    """Refuse ids that the vocabulary does not have, but for one that is `ignored`.

    Args:
        ids: Any shape, in a graph too.
        vocab_size: `V`.
        role: What they are, in the plural.
        ignored: An id that is none and yet allowed, or None.

    Returns:
        In a graph, an operation that fails with what `telling_bad_ids` finds.

    Raises:
        InputError: Outside a graph, there is such an id.
    """
    is_good = (ids >= 0) & (ids < vocab_size)
    expected = f"expect token ids from 0 to {vocab_size - 1}"
    if ignored is not None:
        is_good |= ids == ignored
        expected += f", or {ignored} where they do not count"
    text = f"The {role} {expected}. Received: {{}}. "
    text += "Use the tokenizer that the model was built for."

    def refuse():
        bad = tf.boolean_mask(ids, ~is_good)[0]
        return tf.debugging.Assert(False, [tf.strings.format(_BAD_IDS + text, bad)])

    if not tf.executing_eagerly():
        return tf.cond(tf.reduce_all(is_good), tf.no_op, refuse)
    if not np.all(is_good):
        raise InputError(text.format(np.asarray(ids)[~np.asarray(is_good)][0]))
    return tf.no_op()


def check_of_labels(loss):
    """Return the check of labels and `vocab_size` that a loss asks for, or None.

    XLA would compute NaN of a label that there is none of, and say nothing.
    """
    ignored = IGNORED
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        ignored = loss.get_config().get("ignore_class")
    elif not isinstance(loss, NextTokenLoss):
        return None
    return lambda labels, size: check_range(labels, size, "labels", ignored)


def check_takes_logits(value, role):
    """Refuse a loss or a metric that takes probabilities; the models give logits."""
    of_logits = True
    if isinstance(value, (keras.losses.Loss, keras.metrics.Metric)):
        config = {} if type(value).get_config is None else value.get_config()
        of_logits = config.get("from_logits", True) and not isinstance(
            value, (keras.losses.KLDivergence, keras.metrics.KLDivergence)
        )
    elif isinstance(value, str) or callable(value):
        name = value if isinstance(value, str) else getattr(value, "__name__", "")
        is_kerass = isinstance(value, str) or value.__module__.startswith("tf_keras.")
        of_logits = (
            not is_kerass or name.lower().replace("_", "") not in _OF_PROBABILITIES
        )
    if of_logits:
        return
    kind = "losses" if role.endswith("loss") else "metrics"
    line = f"keras.{kind}.SparseCategoricalCrossentropy(from_logits=True)"
    line = line if kind == "losses" else f"[{line}]"
    raise InputError(
        f"`{role}` expects a function of logits, which the model gives. Received: "
        f"{value if isinstance(value, str) else getattr(value, 'name', value)}, of "
        f"probabilities. Write `{role}={line}`, or leave it out for the default."
    )


def check_is_a_mean(losses):
    means = (keras.losses.Reduction.AUTO, keras.losses.Reduction.SUM_OVER_BATCH_SIZE)
    for loss in tf.nest.flatten(losses):
        reduction = getattr(loss, "reduction", means[0])
        if reduction not in means:
            raise InputError(
                "`gradient_accumulation_steps` expects a loss that is a mean over the "
                f"batch. Received: a loss with the reduction {reduction!r}. Leave its "
                "reduction out, or compile with `gradient_accumulation_steps=1`."
            )


def refuse_keras_3(value, role):
    """Raise an error that teaches where a Keras 3 object was handed in."""
    for kind in type(value).__mro__:
        module = kind.__module__.split(".")
        if module[0] in ("keras", "keras_hub", "keras_nlp"):
            raise InputTypeError(
                f"`{role}` expects an object of tf_keras (Keras 2), which TF-MOT "
                f"works on. Received: {type(value).__module__}."
                f"{type(value).__name__}, of Keras 3. {_mend(value, role)}"
            )


def _mend(value, role):
    """Say what to write instead of an object of Keras 3."""
    homes = {
        "optimizer": "optimizers",
        "loss": "losses",
        "student_loss": "losses",
        "metrics": "metrics",
        "callbacks": "callbacks",
    }
    if role not in homes:
        return (
            "Build it after `import tf_keras as keras`; a GPT is a `gpt_tf.GPTModel`, "
            "whose `from_preset` takes KerasHub's weights."
        )
    name = f"keras.{homes[role]}.{type(value).__name__}(...)"
    return f"Write `import tf_keras as keras` and `{name}`."
