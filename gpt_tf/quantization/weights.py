"""Weights as small integers: five strategies, one function for all.

A weight `w` is kept as an integer `q` and read back as `q * scale + offset`. With
`limit = 2**(bits - 1) - 1`, the strategies are:

| strategy | granularity | offset | scale |
|---|---|---|---|
| `global_mean` | the whole model | mean(w) | max abs(w - offset) / limit |
| `layer_mean` | the matrices of one Keras layer | mean(w) | the same |
| `per_tensor` | a matrix | 0 | max abs(w) / limit |
| `per_channel` | an output channel of a matrix | 0 | the same |
| `blockwise` | 32 successive inputs of an output channel | 0 | the same |

The first two are the article's: the largest weight of all decides the step of every
other, and exact zeros are not kept. Symmetric scales per channel cost a matrix product
nothing in its inner loop, and LiteRT's int8 kernels take them. A float32 scale per
block is one bit more per weight: worth it at 4 bits, where 15 levels have to span the
largest weight of the group. Vectors, gains and biases, stay float32: they are few.

The functions of arrays need NumPy only, and the export uses the same ones, so that
an artefact holds the integers that were measured here.

Reference: article 3.2, steps 1 to 3; Dettmers and Zettlemoyer, "The case for 4-bit
precision", arXiv:2212.09720, for blocks.
"""

import dataclasses

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.quantization.modes import SMALLEST_SCALE
from gpt_tf.settings import arguments

STRATEGIES = ("global_mean", "layer_mean", "per_tensor", "per_channel", "blockwise")
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
    magnitudes = np.abs(values)
    if block_size is None:
        shared = tuple(a for a in range(values.ndim) if a != axis)
        largest = magnitudes.max(axis=shared, keepdims=True)
    else:
        starts = np.arange(0, values.shape[1 - axis], block_size)
        largest = np.maximum.reduceat(magnitudes, starts, axis=1 - axis)
    scales = _scale(largest, limit)
    return _round(values, _spread(scales, values.shape, block_size), limit), scales


def dequantize(integers, scales, offset=0.0, block_size=None):
    """Return the float32 numbers that integers stand for: `q * scale + offset`.

    Args:
        integers: As `quantize_array` returns them.
        scales: As `quantize_array` returns them.
        offset: What was taken off before; it broadcasts against the integers.
        block_size: As `quantize_array` was given it.

    Example:
        >>> dequantize(*quantize_array([1.0, -2.0, 0.0])).tolist()
        [1.0078740119934082, -2.0, 0.0]
    """
    scales = _spread(np.asarray(scales, np.float32), integers.shape, block_size)
    return integers.astype(np.float32) * scales + np.float32(offset)


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
    repair = "Devices compute with 8; 4 halve the file."
    return 2 ** (arguments.integer("bits", bits, 2, 8, repair=repair) - 1) - 1


def _finite(values, name):
    values = np.asarray(values, np.float32)
    broken = values.size - np.count_nonzero(np.isfinite(values))
    if broken:
        raise InputError(
            f"Quantisation expects finite weights. Received: {broken} of "
            f"{values.size} values of {name} are NaN or infinite. The model's weights "
            "contain NaN or Inf, as after a training that diverged: go back to an "
            "earlier checkpoint, or train with a lower learning rate."
        )
    return values


def _scale(largest, limit):
    scales = np.maximum(largest / np.float32(limit), SMALLEST_SCALE)
    return np.where(largest > 0, scales, np.float32(1.0)).astype(np.float32)


def _spread(scales, shape, block_size):
    """Repeat the scales of blocks until they broadcast against an array."""
    for axis, size in enumerate(shape if block_size else ()):
        if scales.shape[axis] == -(-size // block_size):
            scales = np.repeat(scales, block_size, axis).take(range(size), axis)
    return scales


def _round(values, scales, limit):
    return np.clip(np.rint(values / scales), -limit, limit).astype(np.int8)


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
        snr_db: Signal-to-noise ratio by name, `10 * log10(sum(w**2) / sum(error**2))`
            decibels: 6 more halve the error. Infinity where nothing was lost.
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
        strategy: One of `STRATEGIES`; the module states their formulas.
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
    from gpt_tf.quantization.calibration import check_float

    check_float(model, "quantize_weights")
    arguments.one_of("strategy", strategy, STRATEGIES)
    weights = {
        _name(variable): _finite(variable.numpy(), _name(variable))
        for variable in model.weights
        if variable.dtype.is_floating
    }
    matrices = {name: w for name, w in weights.items() if w.ndim == 2}
    kept = {name: w for name, w in weights.items() if w.ndim != 2}
    block_size = BLOCK_SIZE if strategy == "blockwise" else None
    integers, scales, offsets = _by_strategy(matrices, strategy, bits, block_size)
    approximations = {
        name: dequantize(values, scales[name], offsets[name], block_size)
        for name, values in integers.items()
    }
    powers = {
        name: _signal_and_noise(values, approximations[name])
        for name, values in matrices.items()
    }
    copy = type(model).from_config(model.get_config())
    for ours, theirs in zip(copy.weights, model.weights, strict=True):
        ours.assign(approximations.get(_name(theirs), theirs.numpy()))
    # By identity: weights of one mean and scale hold the same two arrays.
    constants = {
        id(array): array.nbytes
        for array in (*scales.values(), *offsets.values())
        if array.any()
    }
    packed = sum(-(-values.size * bits // 8) for values in integers.values())
    vectors = sum(values.nbytes for values in kept.values())
    return QuantizedWeights(
        strategy=strategy,
        bits=int(bits),
        integers=integers,
        scales=scales,
        offsets=offsets,
        block_size=block_size,
        kept=kept,
        model=copy,
        size_bytes=packed + sum(constants.values()) + vectors,
        snr_db={name: _decibels(*both) for name, both in powers.items()},
        overall_snr_db=_decibels(*np.sum(list(powers.values()), axis=0)),
    )


def _by_strategy(matrices, strategy, bits, block_size):
    """Return integers, scales and offsets by name."""
    found = {}
    if strategy in ("global_mean", "layer_mean"):
        groups = {}
        for name, values in matrices.items():
            group = "" if strategy == "global_mean" else name.split("/")[0]
            groups.setdefault(group, {})[name] = values
        for group in groups.values():
            found.update(_centred(group, _limit(bits)))
    else:
        for name, values in matrices.items():
            axis = None if strategy == "per_tensor" else channel_axis(name)
            symmetric = quantize_array(values, bits, axis, block_size, name)
            found[name] = (*symmetric, np.zeros((1, 1), np.float32))
    return [{name: parts[i] for name, parts in found.items()} for i in range(3)]


def _centred(weights, limit):
    """Quantise matrices around their common mean, with a common scale."""
    total = sum(np.sum(values, dtype=np.float64) for values in weights.values())
    count = sum(values.size for values in weights.values())
    mean = np.full((1, 1), total / count, np.float32)
    centred = {name: values - mean for name, values in weights.items()}
    largest = max(np.abs(values).max() for values in centred.values())
    scale = _scale(np.full((1, 1), largest, np.float32), limit)
    return {
        name: (_round(values, scale, limit), scale, mean)
        for name, values in centred.items()
    }


def _name(variable):
    return variable.name.partition(":")[0]


def _signal_and_noise(values, approximations):
    error = np.subtract(values, approximations, dtype=np.float64)
    return np.sum(np.square(values, dtype=np.float64)), np.sum(np.square(error))


def _decibels(signal, noise):
    if not noise:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")
