"""Calibration: the range of every activation, from a float model and some data.

An activation is rounded to 256 steps between a minimum and a maximum, or to 65,535,
and the two must be known before. Here they are measured on data like that which the
model will meet: two passes, the first for the extremes, the second for a histogram of
each activation between them, from which a method chooses where to cut.
"""

import itertools
from typing import get_args

import numpy as np
import tensorflow as tf

from gpt_tf.errors import InputError
from gpt_tf.models import checks
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.layers import observed
from gpt_tf.quantization.config import Method
from gpt_tf.quantization.modes import SMALLEST_SCALE
from gpt_tf.settings import arguments
from gpt_tf.text.dataset import Windows

METHODS = get_args(Method)

# What softmax writes lies in [0, 1); its integers have the scale 1/256 by contract.
FIXED_RANGES = {"probabilities_activation": (0.0, 255.0 / 256.0)}

# Upper end of the range of an activation that was measured and is always 0. It tells
# it from one that was never measured, (0, 0); its scale is below the smallest that
# integers can have, so that none is made of it.
NARROWEST = float(SMALLEST_SCALE)

# The residual, whose few largest values carry much (Sun et al., "Massive
# Activations in Large Language Models", arXiv:2402.17762).
_WIDE = ("embedding_activation", "residual_activation")

_BINS = 2048
_CANDIDATES = 64  # cuts that "mse" tries


def calibrate(
    model,
    inputs,
    *,
    batch_size=8,
    method="mse",
    percentile=99.999,
    num_batches=None,
    dtype="int8",
):
    """Measure the range of every activation of a float model.

    Args:
        model: A `GPTModel`; it is not changed.
        inputs: Data like that which the model will meet: token ids `(N, T)`, or
            batches of ids `(B, T)` or of tuples that begin with ids: a
            `tf.data.Dataset`, `Windows` or a list.
        batch_size: Rows of an array that are computed at once, at least 1.
        method: `"minmax"` takes the extremes; `"percentile"` cuts off the rarest
            values on either side; `"mse"` cuts where the squared error of rounding
            to `dtype` is smallest, but not the residual, which has 16 bits where it
            is quantised well.
        percentile: For `"percentile"`: share of the values that is kept, in percent,
            above 50 and at most 100.
        num_batches: Largest number of batches to use; None takes all. A dataset
            that repeats without end needs it.
        dtype: Integers that activations become, `"int8"` or `"int16"`, or a function
            that says which from an activation's name in its layer, such as
            `QuantizationConfig().dtype_of`.

    Returns:
        A dict from `"block_0/qkv_activation"` and the like to (minimum, maximum),
        floats with minimum <= 0 <= maximum and minimum < maximum, in the order of the
        data. The probabilities' range is fixed: (0, 255/256). An activation that was
        always 0 has the narrowest range, (0, 1.2e-38): of any scale 0 is 0.

    Raises:
        InputError: There is no data, an id is not below `vocab_size`, an option is
            out of its range, an activation is not finite, or the model is no GPTModel.

    Example:
        >>> ranges = calibrate(model, np.zeros((4, 8), "int32"))
        >>> ranges["block_0/probabilities_activation"]
        (0.0, 0.99609375)
    """
    check_float(model, "calibrate")
    arguments.one_of("method", method, METHODS)
    percentile = arguments.number("percentile", percentile, above=50, most=100)
    if not callable(dtype):
        arguments.one_of("dtype", dtype, ("int8", "int16"))
    batch_size = arguments.integer("batch_size", batch_size, 1)
    num_batches = arguments.integer("num_batches", num_batches, 1, or_none=True)
    is_endless = (
        isinstance(inputs, tf.data.Dataset)
        and inputs.cardinality() == tf.data.INFINITE_CARDINALITY
    )
    if is_endless and num_batches is None:
        raise InputError(
            "Calibration expects a dataset that ends, or `num_batches`. Received: one "
            "that repeats for ever. Pass `num_batches=100`, for example."
        )
    batches = batches_of(inputs, batch_size, model)
    batches = list(itertools.islice(batches, num_batches))
    if not batches:
        raise InputError(
            "Calibration expects at least one batch of token ids (B, T). Received: "
            "no data. Pass some hundred windows of text like that which the model "
            "will meet."
        )
    names, extremes = _extremes(model, batches)
    if method != "minmax":
        edges = tf.constant(extremes, tf.float32)
        counts = _histograms(model, batches, edges)

        def choose(name, count, low, high):
            if method == "percentile":
                return _percentile_range(count, low, high, 1.0 - percentile / 100.0)
            if name.endswith(_WIDE):
                return low, high
            own = dtype(name.partition("/")[2]) if callable(dtype) else dtype
            return _mse_range(count, low, high, own)

        extremes = [
            choose(name, count, *edge)
            for name, count, edge in zip(names, counts, extremes, strict=True)
        ]
    ranges = {}
    for name, (low, high) in zip(names, extremes, strict=True):
        fixed = FIXED_RANGES.get(name.partition("/")[2])
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        ranges[name] = fixed or (low, high if low < high else NARROWEST)
    return ranges


def check_float(model, function):
    """Refuse what is no float `GPTModel`, by an `InputTypeError`."""
    checks.refuse_keras_3(model, "model")
    expected = (
        "a float GPTModel, as `gpt_tf.GPTModel(...)` builds it and `to_float(model)` "
        "makes it of one that is quantisation-aware already"
    )
    arguments.instance(f"{function}(model)", model, GPTModel, expected)


def batches_of(inputs, batch_size, model):
    """Yield the batches of ids `(B, T)` int32 that have any."""
    inputs = checks.as_arrays(inputs)
    if isinstance(inputs, Windows):
        inputs = map(inputs.batch, range(inputs.steps_per_epoch))
    elif isinstance(inputs, (np.ndarray, tf.Tensor)):
        starts = range(0, len(inputs), batch_size)
        inputs = [inputs[start : start + batch_size] for start in starts]
    if not hasattr(inputs, "__iter__"):
        arguments.refuse("inputs", inputs, "token ids (N, T) or batches of them")
    for batch in inputs:
        ids = np.asarray(batch[0] if isinstance(batch, (tuple, list)) else batch)
        checks.check_shape_of_ids(ids, "inputs")
        checks.check_range(ids, model.vocab_size, "inputs")
        if ids.size:
            yield ids.astype(np.int32)


# Passes over the data


def _observer(model, measure):
    """Return a compiled function of ids, and names that its first call fills in."""
    names = []

    @tf.function(reduce_retracing=True, autograph=False)
    def observe(ids):
        names.clear()
        found = []

        def see(layer, name, x):
            names.append(f"{layer.name}/{name}")
            found.append(measure(len(found), tf.cast(x, tf.float32)))

        with observed(model.layers, see):
            model(ids, training=False)
        return tf.stack(found)

    return observe, names


def _extremes(model, batches):
    """Return the names of all activations and their extremes, `(number, 2)`."""
    observe, names = _observer(
        model, lambda index, x: tf.stack([tf.reduce_min(x), tf.reduce_max(x)])
    )
    extremes = None
    for ids in batches:
        found = observe(tf.constant(ids)).numpy()
        if extremes is None:
            extremes = found
        extremes[:, 0] = np.minimum(extremes[:, 0], found[:, 0])
        extremes[:, 1] = np.maximum(extremes[:, 1], found[:, 1])
        if not np.isfinite(found).all():
            name = names[int(np.argmin(np.isfinite(found).all(axis=1)))]
            raise InputError(
                f"Calibration expects finite activations. Received: NaN or infinity "
                f"in {name}. The model's weights contain NaN or Inf: go back to an "
                "earlier checkpoint."
            )
    return list(names), extremes


def _histograms(model, batches, edges):
    """Count every activation's values in equal bins between its extremes."""
    observe, _ = _observer(
        model,
        lambda index, x: tf.histogram_fixed_width(
            x, edges[index] + tf.constant([0.0, 1e-30]), nbins=_BINS
        ),
    )
    return sum(observe(tf.constant(ids)).numpy().astype(np.int64) for ids in batches)


# Where to cut


def _percentile_range(counts, low, high, cut):
    """Cut off the share `cut` of the values on either side."""
    cumulative = np.cumsum(counts) / counts.sum()
    first = int(np.searchsorted(cumulative, cut, side="right"))
    last = int(np.searchsorted(cumulative, 1.0 - cut, side="left"))
    edges = np.linspace(low, high, _BINS + 1)
    return edges[first], edges[min(last, _BINS - 1) + 1]


def _mse_range(counts, low, high, dtype):
    """Shrink the range while the squared error of rounding falls."""
    edges = np.linspace(low, high, _BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    best = (np.inf, low, high)
    for share in np.linspace(1.0, 0.1, _CANDIDATES):
        one, other = min(low * share, 0.0), max(high * share, 0.0)
        scale = max(-one, other) / 32767 if dtype == "int16" else (other - one) / 255
        clipped = np.clip(centres, one, other)
        # Rounding within the range adds scale**2 / 12 on average.
        error = np.sum(counts * ((centres - clipped) ** 2 + scale**2 / 12))
        best = min(best, (error, one, other))
    return best[1], best[2]
