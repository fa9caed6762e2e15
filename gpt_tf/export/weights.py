"""A model's weights in the form in which a file of each mode stores them."""

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.export import signatures
from gpt_tf.export.constants import (
    INT4_BLOCK,
    Constants,
    Matrix,
    offsets_of,
    qkv_pieces,
)
from gpt_tf.export.types import QuantParams, Type
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.sizes import weight_shapes
from gpt_tf.quantization import four_bits, gptq
from gpt_tf.quantization.modes import MODES
from gpt_tf.quantization.weights import quantize_array

_INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def store(
    values: np.ndarray, form: str, name: str, per_channel=True, moments=None
) -> Matrix:
    """Return a matrix `(outputs, inputs)` in a form of `Mode.kernels`.

    Args:
        values: Its numbers.
        form: A form.
        name: What an error calls it.
        per_channel: Whether an int8 matrix has a scale per output channel, or one.
        moments: Those of its inputs, as from `gptq.moments_of`, to round integers by;
            without, each goes to the nearest.

    Raises:
        InputError: A value is NaN, infinite or too large, or the shape does not fit.
    """
    values = np.ascontiguousarray(values, np.float32)
    _refuse_infinite(values, name)
    if form in ("float16", "int4"):
        _refuse_large(values, form, name)
    if form == "float32":
        return Matrix(values, Type.FLOAT32, values.shape, None)
    if form == "float16":
        return Matrix(values.astype(np.float16), Type.FLOAT16, values.shape, None)
    if form == "int8":
        axis = 0 if per_channel else None
        integers, scales = quantize_array(values, 8, axis=axis, name=name)
        if moments is not None:
            integers = gptq.round_weights(values, scales, 127, moments)
        scales = scales.reshape(-1)
        quant = QuantParams(scales, np.zeros(len(scales), np.int64))
        return Matrix(integers, Type.INT8, values.shape, quant)
    _refuse_ragged(values, name)
    return _int4(values, moments)


def _refuse_large(values, form, name):
    largest, most = np.abs(values).max(initial=0.0), float(np.finfo(np.float16).max)
    if largest > most:
        raise InputError(
            f"The mode {form} expects weights up to {most:.0f}, the largest number of "
            f"float16. Received: {largest:.3g} in {name}. Use float32 or dynamic_int8."
        )


def _refuse_ragged(values, name):
    if values.shape[1] % INT4_BLOCK:
        raise InputError(
            f"The mode int4 stores blocks of {INT4_BLOCK} inputs. Received: {name} "
            f"with {values.shape[1]} inputs. Use a model whose embedding_dim, heads "
            f"together and feedforward_dim are multiples of {INT4_BLOCK}, or "
            "dynamic_int8."
        )


def _with_offsets(values, name):
    """Return a matrix in blocks of 16 values, and its blocks' offsets as another."""
    _refuse_infinite(values, name)
    _refuse_large(values, "int4", name)
    _refuse_ragged(values, name)
    integers, steps, offsets, _ = four_bits.take_apart(values)
    return _packed(integers, steps), store(offsets, "int8", name)


def _refuse_infinite(values, name):
    if not np.isfinite(values).all():
        raise InputError(
            f"Exporting expects finite weights. Received: NaN or infinity in {name}. "
            "Train with a lower learning rate, or in float32."
        )


def _rows_times(matrix, rows, factors):
    """Return rows of an int8 matrix, multiplied through their scales."""
    scales = matrix.quant.scales
    scales = scales[rows] * factors if len(scales) > 1 else scales * factors[:1]
    values = matrix.values[rows]
    quant = QuantParams(scales, np.zeros(len(scales), np.int64))
    return Matrix(values, matrix.kind, values.shape, quant)


def _int4(values, moments):
    """Quantise in blocks, each with the scale of the smallest squared error.

    With 15 steps only, cutting off a block's largest value often costs less than
    making all steps coarser.
    """
    rows, width = values.shape
    blocks = values.reshape(rows, width // INT4_BLOCK, INT4_BLOCK)
    largest = np.abs(blocks).max(axis=2) / 7
    best = np.full(largest.shape, np.inf, np.float32)
    scales = np.zeros(largest.shape, np.float16)
    integers = np.zeros(blocks.shape, np.int8)
    for share in _INT4_SHARES:
        # The file holds scales as float16, so the integers are chosen for those.
        tried = (largest * share).astype(np.float16)
        divisor = np.where(tried == 0, np.float16(1), tried).astype(np.float32)
        steps = np.clip(np.rint(blocks / divisor[..., None]), -7, 7)
        errors = ((steps * divisor[..., None] - blocks) ** 2).sum(axis=2)
        better = errors < best
        best[better], scales[better] = errors[better], tried[better]
        integers[better] = steps[better]
    scales[scales == 0] = 1  # of a block of zeros, as LiteRT wants it
    if moments is not None:
        spread = np.repeat(scales.astype(np.float32), INT4_BLOCK, axis=1)
        integers = gptq.round_weights(values, spread, 7, moments)
    return _packed(integers.reshape(values.shape), scales)


def _packed(integers, scales):
    """Return int4 blocks as a matrix `(M, C)`."""
    halves = (integers.view(np.uint8) & 15).reshape(-1, 2)
    packed = halves[:, 0] | (halves[:, 1] << 4)  # the first in the low half
    quant = QuantParams(scales, np.zeros(1, np.int64), 0, INT4_BLOCK)
    return Matrix(packed, Type.INT4, integers.shape, quant)


def constants_of(
    model,
    mode: str,
    ranges=None,
    per_channel=True,
    suppressed=(),
    moments=None,
    outliers=(),
    has_offsets=False,
) -> Constants:
    """Take the weights out of a `GPTModel`, in the form of a mode.

    The queries' share of the QKV product, or their normalisation, is divided by the
    root of the head width here, so that no graph has to.

    Args:
        model: The model.
        mode: A key of `MODES`.
        ranges: (minimum, maximum) by activation, for modes with fixed activations.
        per_channel: As for `store`.
        suppressed: Token ids that the file is to rule out.
        moments: As from `gptq.moments_of`, to round kernels by.
        outliers: Channels that the head is to multiply apart from the others.
        has_offsets: Whether blocks of int4 have an offset beside their step.

    Raises:
        InputError: A weight is not finite, or does not fit the mode.
    """
    form = MODES[mode]
    blocks = parts_of(model).blocks
    sizes = model.get_config() | {"head_dim": blocks[0].head_dim}
    del sizes["name"]
    matrices, vectors = {}, {}
    root = np.sqrt(blocks[0].head_dim)
    pieces = qkv_pieces(sizes, form, per_channel)
    moments = moments or {}

    def stored(name, values, kind=form.kernels, source=None):
        if kind == "int4" and has_offsets:
            matrix, offsets = _with_offsets(values, name)
            matrices[offsets_of(name)] = offsets
            return matrix
        return store(values, kind, name, per_channel, moments.get(source or name))

    for name in weight_shapes(sizes):
        layer, _, weight = name.partition("/")
        values = getattr(model.get_layer(layer), weight).numpy()
        if layer in ("embedding", "head"):
            matrices[name] = stored(name, values, form.tables)
        elif weight.startswith("qkv_"):
            scale = np.ones(values.shape[-1], np.float32)
            if not sizes.get("query_key_norm"):
                scale[: blocks[0].num_heads * blocks[0].head_dim] /= root
            kind = weight.removeprefix("qkv")
            if weight == "qkv_bias":
                for piece, rows in pieces.items():
                    vectors[f"{layer}/{piece}{kind}"] = (values * scale)[rows]
                continue
            if form.kernels == "int8":
                whole = stored(name, values.T)
            for piece, rows in pieces.items():
                key = f"{layer}/{piece}{kind}"
                if form.kernels == "int8":
                    # The integers are those of the model's own kernel.
                    matrices[key] = _rows_times(whole, rows, scale[rows])
                else:
                    own = (values.T * scale[:, None])[rows]
                    matrices[key] = stored(key, own, source=name)
        elif weight.endswith("_kernel"):
            matrices[name] = stored(name, values.T)
        else:
            scale = root if weight == "query_norm_gamma" else 1.0
            vectors[name] = (values / scale).astype(np.float32)
    if len(suppressed):
        vectors["head/mask"] = np.zeros(sizes["vocab_size"], np.float32)
        vectors["head/mask"][suppressed] = signatures.MASKED
    if len(outliers):
        vectors["head/outliers"] = np.zeros(sizes["embedding_dim"], np.float32)
        vectors["head/outliers"][outliers] = 1.0
    for name, vector in vectors.items():
        _refuse_infinite(vector, name)
    return Constants(form, sizes, matrices, vectors, dict(ranges or {}))
