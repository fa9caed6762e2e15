"""Weights as small integers: five ways to choose the scale, one function for all.

A weight `w` is kept as an integer `q` and read back as `q * scale + offset`. The
strategies differ in how many weights share a scale, and in whether their mean is
taken off first. Vectors, gains and biases, stay float32: they are few.

The functions of arrays need NumPy only, and the export uses the same ones, so that
an artefact holds the integers that were measured here.
"""

import dataclasses

import numpy as np

from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.quantization.modes import SMALLEST_SCALE
from gpt_tf.settings import arguments

BLOCK_SIZE = 32

# Stored as (outputs, inputs); every other kernel is (inputs, outputs).
_OUTPUTS_FIRST = ("embedding/token_table", "embedding/position_table", "head/kernel")


# Arrays


def quantize_array(values, bits=8, axis=None, block_size=None, name="the array"):
    """Quantise an array to symmetric integers, 0 exactly to 0.

    `scale = max|w| / (2**(bits - 1) - 1)` over the values that share it and
    `q = round(w / scale)`, computed in float32, halves to the even neighbour as
    TensorFlow rounds. The range is narrow: of 8 bits, -127 to 127. Where all values
    are 0 the scale is 1.

    Args:
        values: Finite numbers, any shape that is not empty.
        bits: 2 to 8.
        axis: Axis whose every index, a channel, has a scale of its own; None gives
            the whole array one.
        block_size: Number of values along the other axis of a matrix that share a
            scale within a channel, at least 1; the last block may be shorter. None
            gives the whole channel one.
        name: What an error calls the array.

    Returns:
        integers: int8, shaped as `values`.
        scales: float32, above 0, of the same rank. Its length is 1 along axes that
            share a scale, and the number of blocks along an axis cut in blocks.

    Raises:
        InputError: A value is NaN or infinite, or an argument is out of its range.

    Example:
        >>> integers, scales = quantize_array([[1.0, 4.0], [-3.0, 3.0]], axis=1)
        >>> integers.tolist()
        [[42, 127], [-127, 95]]

    Reference: Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877; the narrow range
    and the axis are those of LiteRT's 8-bit specification.
    """
    limit = _limit(bits)
    values = _finite(values, name)
    if axis is not None:
        last = values.ndim - 1
        axis = arguments.integer("axis", axis, -last - 1, last) % values.ndim
    largest = _largest(np.abs(values), axis, block_size)
    scales = _scale(largest, limit)
    return _round(values, _spread(scales, values.shape, block_size), limit), scales


def dequantize(integers, scales, offset=0.0, block_size=None):
    """Return the float32 numbers that integers stand for: `q * scale + offset`.

    Args:
        integers: As `quantize_array` returns them.
        scales: As `quantize_array` returns them.
        offset: What was taken off before; it broadcasts against the integers.
        block_size: As `quantize_array` was given it.

    Returns:
        float32, shaped as `integers`.

    Raises:
        InputError: The scales do not fit the integers.

    Example:
        >>> dequantize(*quantize_array([1.0, -2.0, 0.0])).tolist()
        [1.0078740119934082, -2.0, 0.0]
    """
    integers = np.asarray(integers)
    scales = _spread(np.asarray(scales, np.float32), integers.shape, block_size)
    return integers.astype(np.float32) * scales + np.float32(offset)


def snr_db(values, approximations):
    """Return the signal-to-noise ratio of an approximation in decibels.

    `10 * log10(sum(w**2) / sum((w - approximation)**2))`: 6 dB more halve the error.

    Args:
        values: What was approximated.
        approximations: The same shape.

    Returns:
        A float; infinity where the approximation is exact.
    """
    return _decibels(*_signal_and_noise(values, approximations))


def channel_axis(name):
    """Return the axis of the output channels of a GPTModel's matrix.

    Args:
        name: The weight's name, such as `"block_0/qkv_kernel"`.

    Returns:
        0 for the token table `(V, C)`, the position table and the kernel `(V, C)` of
        an untied head, each row of which is one; 1 for kernels `(inputs, outputs)`.
    """
    return 0 if name in _OUTPUTS_FIRST else 1


def _limit(bits):
    bits = arguments.integer(
        "bits", bits, 2, 8, repair="Devices compute with 8; 4 halve the file."
    )
    return 2 ** (bits - 1) - 1


def _finite(values, name):
    try:
        values = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        arguments.refuse("values", values, f"{name} as numbers")
    if not values.size:
        raise InputError(
            f"Quantisation expects at least one value in {name}. "
            f"Received: the shape {values.shape}."
        )
    broken = values.size - np.count_nonzero(np.isfinite(values))
    if broken:
        raise InputError(
            f"Quantisation expects finite weights. Received: {broken} of "
            f"{values.size} values of {name} are NaN or infinite. The model's weights "
            "contain NaN or Inf, as after a training that diverged: go back to an "
            "earlier checkpoint, or train with a lower learning rate."
        )
    return values


def _largest(magnitudes, axis, block_size):
    """Return the largest magnitude of each group that shares a scale."""
    if block_size is None:
        shared = tuple(a for a in range(magnitudes.ndim) if a != axis)
        return magnitudes.max(axis=shared, keepdims=True)
    if magnitudes.ndim != 2 or axis is None or block_size < 1:
        raise InputError(
            "Blocks expect a matrix, an axis of channels and a `block_size` of at "
            f"least 1. Received: the shape {magnitudes.shape}, axis {axis}, "
            f"`block_size` {block_size}."
        )
    starts = np.arange(0, magnitudes.shape[1 - axis], block_size)
    return np.maximum.reduceat(magnitudes, starts, axis=1 - axis)


def _scale(largest, limit):
    scales = np.maximum(largest / np.float32(limit), SMALLEST_SCALE)
    return np.where(largest > 0, scales, np.float32(1.0)).astype(np.float32)


def _spread(scales, shape, block_size):
    """Repeat the scales of blocks until they broadcast against an array."""
    for axis, size in enumerate(shape if block_size else ()):
        if scales.shape[axis : axis + 1] == (-(-size // block_size),):
            scales = np.repeat(scales, block_size, axis).take(range(size), axis)
    fits = zip(scales.shape, shape, strict=False)
    if scales.ndim != len(shape) or any(have not in (1, n) for have, n in fits):
        raise InputError(
            "`scales` expects, along each axis of the integers, 1, their number or "
            f"the number of blocks. Received: {scales.shape} for {shape} and "
            f"`block_size` {block_size}. Use the scales that `quantize_array` gave."
        )
    return scales


def _round(values, scales, limit):
    return np.clip(np.rint(values / scales), -limit, limit).astype(np.int8)


def _signal_and_noise(values, approximations):
    error = np.subtract(values, approximations, dtype=np.float64)
    return np.sum(np.square(values, dtype=np.float64)), np.sum(np.square(error))


def _decibels(signal, noise):
    if not noise:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")


# Strategies: from a model's matrices by name to what stands for them.


@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """Integers and what turns them back into weights.

    Attributes:
        integers: int8.
        scales: float32, as `quantize_array` returns them.
        offset: float32 that broadcasts against the integers, 0 where symmetric.
        block_size: As for `quantize_array`.
    """

    integers: np.ndarray
    scales: np.ndarray
    offset: np.ndarray
    block_size: int | None = None

    def dequantize(self):
        return dequantize(self.integers, self.scales, self.offset, self.block_size)


def global_mean(weights, bits):
    """Global mean normalisation: one mean and one scale for the whole model.

    `mu = mean(w)` and `s = max|w - mu| / (2**(bits - 1) - 1)` over all matrices of
    the model together; `q = round((w - mu) / s)`, read back as `q * s + mu`.

    Two numbers for all weights, and the largest weight of the model decides the
    step of every other. Exact zeros are not kept.
    """
    return _centred(weights, bits)


def layer_mean(weights, bits):
    """Layer-wise mean normalisation: one mean and one scale for every layer.

    The formula of `global_mean`, with `mu` and `s` over the matrices of one Keras
    layer: the four kernels of a TransformerBlock, or the two embedding tables.
    """
    layers = {}
    for name, values in weights.items():
        layers.setdefault(name.split("/")[0], {})[name] = values
    quantized = {}
    for layer in layers.values():
        quantized.update(_centred(layer, bits))
    return quantized


def per_tensor(weights, bits):
    """Per tensor, symmetric: a scale for every matrix, and no mean.

    `s = max|w| / (2**(bits - 1) - 1)` over a matrix; `q = round(w / s)`.
    """
    return {
        name: _symmetric(name, values, bits, axis=None)
        for name, values in weights.items()
    }


def per_channel(weights, bits):
    """Per channel, symmetric: a scale for every output channel of every matrix.

    `s[j] = max|w[:, j]| / (2**(bits - 1) - 1)` over a column of a kernel
    `(inputs, outputs)`, or over a row of a table; `q[i, j] = round(w[i, j] / s[j])`.
    A matrix product applies such a scale once to each of its results, so it costs
    nothing in the inner loop. LiteRT's int8 kernels take such scales.
    """
    return {
        name: _symmetric(name, values, bits, axis=channel_axis(name))
        for name, values in weights.items()
    }


def blockwise(weights, bits):
    """Block by block, symmetric: a scale for every 32 inputs of every output channel.

    The formula of `per_channel`, with `max|w|` over 32 successive input values of a
    channel. A float32 scale per block is one bit more per weight: worth it at 4
    bits, where 15 levels have to span the largest weight of the group.

    Reference: Dettmers and Zettlemoyer, "The case for 4-bit precision",
    arXiv:2212.09720.
    """
    return {
        name: _symmetric(
            name, values, bits, axis=channel_axis(name), block_size=BLOCK_SIZE
        )
        for name, values in weights.items()
    }


_STRATEGIES = {
    function.__name__: function
    for function in (global_mean, layer_mean, per_tensor, per_channel, blockwise)
}
STRATEGIES = tuple(_STRATEGIES)


def _symmetric(name, values, bits, axis, block_size=None):
    integers, scales = quantize_array(values, bits, axis, block_size, name)
    offset = np.zeros((1,) * integers.ndim, np.float32)
    return QuantizedArray(integers, scales, offset, block_size)


def _centred(weights, bits):
    """Quantise matrices around their common mean, with a common scale."""
    limit = _limit(bits)
    weights = {name: _finite(values, name) for name, values in weights.items()}
    total = sum(np.sum(values, dtype=np.float64) for values in weights.values())
    count = sum(values.size for values in weights.values())
    mean = np.full((1, 1), total / count, np.float32)
    centred = {name: values - mean for name, values in weights.items()}
    largest = max(np.abs(values).max() for values in centred.values())
    scale = _scale(np.full((1, 1), largest, np.float32), limit)
    return {
        name: QuantizedArray(_round(values, scale, limit), scale, mean)
        for name, values in centred.items()
    }


# Models


@dataclasses.dataclass(frozen=True)
class QuantizedWeights:
    """A model's weights as integers, and what that cost.

    Attributes:
        strategy: One of `STRATEGIES`.
        bits: Bits per integer.
        integers: int8 arrays by the weight's name, such as `"block_0/qkv_kernel"`.
        scales: float32 arrays by name, of the same rank.
        offsets: float32 arrays by name; 0 for the symmetric strategies.
        block_size: Values that share a scale within a channel, or None for all.
        kept: float32 vectors by name, not quantised: gains and biases.
        model: A new GPTModel with the dequantised weights.
        size_bytes: Bytes of integers, packed to `bits` each, of scales and offsets,
            of which a shared one counts once, and of the kept weights.
        snr_db: Signal-to-noise ratio in decibels by name.
        overall_snr_db: The same over all quantised weights together.
    """

    strategy: str
    bits: int
    integers: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    block_size: int | None
    kept: dict[str, np.ndarray]
    model: "gpt_tf.GPTModel"  # noqa: F821
    size_bytes: int
    snr_db: dict[str, float]
    overall_snr_db: float


def quantize_weights(model, strategy="per_channel", bits=8):
    """Quantise a model's matrices to integers, and give the model that they stand for.

    Every matrix is quantised: the kernels, the token table and the position table.
    Vectors stay float32. No data is needed, and no activation is quantised.

    Args:
        model: A `GPTModel`; it is not changed.
        strategy: One of `STRATEGIES`, each a function here that states its formula.
        bits: 2 to 8.

    Returns:
        `QuantizedWeights`.

    Raises:
        InputError: There is no such strategy, `bits` is out of its range, or a
            weight is NaN or infinite.
        InputTypeError: The model is no GPTModel.

    Example:
        >>> quantized = quantize_weights(model, "per_channel", bits=8)
        >>> quantized.integers["block_0/qkv_kernel"].dtype
        dtype('int8')
        >>> quantized.model.evaluate(windows)

    Reference: article 3.2, steps 1 to 3.
    """
    # Here and not above: the functions of arrays do without TensorFlow.
    from gpt_tf.models.gpt import GPTModel

    if not isinstance(model, GPTModel):
        raise InputTypeError(
            "`quantize_weights` expects a GPTModel. "
            f"Received: {type(model).__module__}.{type(model).__name__}. Build it with "
            "`gpt_tf.GPTModel(...)`; of a model that TF-MOT wrapped, hand in the "
            "GPTModel that it was made of."
        )
    arguments.one_of("strategy", strategy, STRATEGIES)
    weights, kept = _matrices_and_vectors(model)
    quantized = _STRATEGIES[strategy](weights, bits)
    approximations = {name: array.dequantize() for name, array in quantized.items()}
    powers = {
        name: _signal_and_noise(values, approximations[name])
        for name, values in weights.items()
    }
    return QuantizedWeights(
        strategy=strategy,
        bits=int(bits),
        integers={name: array.integers for name, array in quantized.items()},
        scales={name: array.scales for name, array in quantized.items()},
        offsets={name: array.offset for name, array in quantized.items()},
        block_size=next(iter(quantized.values())).block_size,
        kept=kept,
        model=_copy_with(model, approximations),
        size_bytes=_size_bytes(quantized, bits, kept),
        snr_db={name: _decibels(*both) for name, both in powers.items()},
        overall_snr_db=_decibels(*np.sum(list(powers.values()), axis=0)),
    )


def _name(variable):
    return variable.name.partition(":")[0]


def _matrices_and_vectors(model):
    """Return a model's matrices and its float vectors, float32 arrays by name."""
    weights = {
        _name(variable): np.asarray(variable.numpy(), np.float32)
        for variable in model.weights
        if variable.dtype.is_floating
    }
    for name, values in weights.items():
        _finite(values, name)
    matrices = {name: w for name, w in weights.items() if w.ndim == 2}
    return matrices, {name: w for name, w in weights.items() if w.ndim != 2}


def _copy_with(model, replaced):
    copy = type(model).from_config(model.get_config())
    for ours, theirs in zip(copy.weights, model.weights, strict=True):
        ours.assign(replaced.get(_name(theirs), theirs.numpy()))
    return copy


def _size_bytes(quantized, bits, kept):
    packed = sum(-(-q.integers.size * bits // 8) for q in quantized.values())
    # By identity: weights of one mean and scale hold the same two arrays.
    constants = {
        id(array): array.nbytes
        for q in quantized.values()
        for array in (q.scales, q.offset)
        if array.any()
    }
    return packed + sum(constants.values()) + sum(w.nbytes for w in kept.values())
