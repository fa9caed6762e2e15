"""Equalisation: what makes activations hard to round is moved into the weights.

Some channels of a trained GPT's activations are a hundred times as large as the others.
Rounded together, row by row, these leave few steps to the rest. A channel divided by a
factor where it is written and multiplied where it is read changes nothing in float32,
and the product's weights, rounded per output channel, bear a larger input channel well.

| written by | read by |
|---|---|
| gain and shift of a normalisation | the QKV product, the up product, an untied head |
| the values' columns of the QKV product | the output product |
| the up product: all of it before ReLU, the gated half of SwiGLU | the down product |

GELU's output is not proportional to its input, so it stays as it is. Neither can a head
that is tied to the token table take factors: the few channels of its input that stand
out are named, for the file to multiply them apart.
"""

import itertools

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.layers import observed
from gpt_tf.quantization.calibration import batches_of, check_float
from gpt_tf.quantization.gptq import READ_BY
from gpt_tf.quantization.weights import BLOCK_SIZE, dequantize, quantize_array

# Rows of each activation on which factors are compared, and batches they are from.
_ROWS, _BATCHES = 512, 8
# How much of the difference between channels the weights take over.
_SHARES = (0.35, 0.5, 0.65, 0.8)
# One of so many channels can be an outlier. They are worth a row of their own where
# rounding without them makes at most this share of the squared error.
_PER_OUTLIER, _WORTH = 32, 0.5
_BLOCKS = {8: None, 4: BLOCK_SIZE}
_READ = {kernel: activation for activation, kernel in READ_BY.items()}


def equalize(model, inputs, *, bits=8, batch_size=8):
    """Give a GPT weights of the same function, with which it is rounded better.

    A channel's factor is `max|x|**a / max|w|**(1 - a)`, taken to a power of two, so
    that float32 results stay the same bit for bit. Each product takes the `a`, or no
    factor, with the smallest squared error of what it writes, its input rounded to 8
    bits row by row and its weights to `bits`.

    Args:
        model: A `GPTModel`, whose weights are changed.
        inputs: Text like that which the model will meet, as for `calibrate`. Of its
            first 8 batches 512 positions are used, spread evenly.
        bits: 8, weights with a scale per output channel; or 4, in blocks of 32.
        batch_size: Rows of an array that are computed at once.

    Returns:
        Channels of what the head reads that are still much larger than the others, in
        order, for the exports' `head_outliers`; often none.

    Raises:
        InputError: There is no data, or an id is not below `vocab_size`.

    Reference: Xiao et al., "SmoothQuant", arXiv:2211.10438; for the outliers Dettmers
    et al., "LLM.int8()", arXiv:2208.07339.
    """
    check_float(model, "equalize")
    read = _inputs_of_products(model, batches_of(inputs, batch_size, model), READ_BY)
    parts = parts_of(model)
    for block in parts.blocks:
        _equalize_block(block, read[block.name], bits)
    normed = read[parts.norm.name]["norm_activation"]
    if parts.head.kernel is not None:
        kernel = parts.head.kernel.numpy().T
        factors = _factors(normed, kernel, bits)
        normed = normed / factors
        for name in parts.norm.weight_names:
            weight = getattr(parts.norm, name)
            weight.assign(weight / factors)
        parts.head.kernel.assign((kernel * factors[:, None]).T)
    return _outliers(normed)


def head_outliers(model, inputs, *, batch_size=8):
    """Find channels of what the head reads that are much larger than the others.

    For a model that is not equalised; `equalize` returns them too.

    Args:
        model: A `GPTModel`.
        inputs: As for `equalize`.
        batch_size: Rows of an array that are computed at once.

    Returns:
        The channels in order, for the exports' `head_outliers`; often none.

    Raises:
        InputError: As for `equalize`.
    """
    check_float(model, "head_outliers")
    batches = batches_of(inputs, batch_size, model)
    read = _inputs_of_products(model, batches, ["norm_activation"])
    return _outliers(read[parts_of(model).norm.name]["norm_activation"])


def _inputs_of_products(model, batches, names):
    """Return what products with weights read, `(N, C)` by layer and activation."""
    batches = [*itertools.islice(batches, _BATCHES)]
    if not batches:
        raise InputError(
            "Equalisation expects token ids (N, T) of some text. Received: no data."
        )
    most = -(-_ROWS // len(batches))
    found = {layer.name: {} for layer in model.layers}

    def see(layer, name, x):
        rows = x.numpy().reshape(-1, x.shape[-1])
        taken = rows[:: -(-len(rows) // most)].astype(np.float32)  # a copy of these
        found[layer.name].setdefault(name, []).append(taken)

    parts = parts_of(model)
    with observed(model.layers, see, names):
        for ids in batches:
            parts.before_head(ids)
    return {
        layer: {name: np.concatenate(rows) for name, rows in read.items()}
        for layer, read in found.items()
    }


def _equalize_block(block, read, bits):
    """Divide channels where a block writes them, and multiply where it reads them."""
    weights = {name: getattr(block, name).numpy() for name in block.weight_names}

    def multiply(name, shared=None):
        kernel = weights[name]
        factors = _factors(read[_READ[name]], kernel, bits, shared)
        weights[name] = kernel * factors[:, None]
        return factors

    def divide(name, columns, factors):
        for kind in ("kernel", "bias"):
            if f"{name}_{kind}" in weights:
                weights[f"{name}_{kind}"][..., columns] /= factors

    _divide_norm(weights, "attention_norm_", multiply("qkv_kernel"))
    # A key-value head's values are read by all query heads of its group.
    heads = block.num_kv_heads, block.num_heads // block.num_kv_heads, block.head_dim
    factors = multiply("output_kernel", heads).reshape(heads)[:, 0]
    divide("qkv", slice(-factors.size, None), factors.reshape(-1))
    _divide_norm(weights, "feedforward_norm_", multiply("up_kernel"))
    if block.form["activation"] in ("relu", "swiglu"):
        factors = multiply("down_kernel")
        divide("up", slice(-factors.size, None), factors)
    for name, values in weights.items():
        getattr(block, name).assign(values)


def _divide_norm(weights, prefix, factors):
    for name in weights:
        if name.startswith(prefix):
            weights[name] /= factors


def _factors(x, kernel, bits, shared=None):
    """Return the factors of a product's input channels, powers of two.

    Args:
        x: `(N, C)`, its input.
        kernel: `(C, M)`.
        bits: Of its weights.
        shared: Shape of the channels whose second axis has factors in common.
    """
    largest = np.abs(x).max(axis=0), np.abs(kernel).max(axis=1)
    if shared is not None:
        largest = [
            np.broadcast_to(v.reshape(shared).max(1, keepdims=True), shared).ravel()
            for v in largest
        ]
    known = (largest[0] > 0) & (largest[1] > 0)
    logs = [np.log2(values, where=known, out=np.zeros(len(x.T))) for values in largest]
    wanted = x @ kernel

    def error(factors):
        rounded = quantize_array(kernel * factors[:, None], bits, 1, _BLOCKS[bits])
        weights = dequantize(*rounded, block_size=_BLOCKS[bits])
        return np.square(_round_rows(x / factors) @ weights - wanted).sum()

    best = np.ones(len(kernel), np.float32)
    smallest = error(best)
    for share in _SHARES:
        exponents = share * logs[0] - (1 - share) * logs[1]
        exponents -= exponents[known].mean() if known.any() else 0
        factors = np.exp2(np.rint(np.where(known, exponents, 0))).astype(np.float32)
        if (found := error(factors)) < smallest:
            smallest, best = found, factors
    return best


def _outliers(x):
    """Return the channels of `(N, C)` that had better be rounded apart."""
    largest = np.abs(x).max(axis=0)
    count = x.shape[1] // _PER_OUTLIER
    channels = np.sort(np.argsort(-largest, kind="stable")[:count])
    apart = np.zeros_like(x)
    apart[:, channels] = x[:, channels]
    error = np.square(_round_rows(apart) + _round_rows(x - apart) - x).sum()
    is_worth = error <= _WORTH * np.square(_round_rows(x) - x).sum()
    return channels.tolist() if is_worth else []


def _round_rows(x):
    """Round each row to 256 steps of its own, as LiteRT does while it computes."""
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    high = np.maximum(x.max(axis=1, keepdims=True), 0)
    scale = np.maximum((high - low) / 255, np.finfo(np.float32).tiny)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
