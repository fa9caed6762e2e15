"""Weights that have 4 bits already, as those of many GGUF files.

Their formats Q4_0, Q4_1 and Q4_K hold blocks of 32 weights as `step * q + offset`, with
16 values of `q`. Rounded to other steps they would be rounded twice: so they are taken
apart into what they were made of.

Needs NumPy only.

Reference: the formats of https://github.com/ggml-org/llama.cpp, `ggml-common.h`.
"""

import numpy as np

from gpt_tf.quantization.weights import BLOCK_SIZE

_LEVELS = 15  # steps between the smallest and the largest of 16 values
_SAME = 1e-4  # of a block's largest weight: a difference that is only rounding
_NEAR = 0.02  # of a step
_SAMPLE = 8  # one row of so many is looked at


def take_apart(values):
    """Return a matrix as 16 values in each block of 32 inputs.

    A block whose weights lie on 16 values, equally far from each other, gives these.
    The weights of another go to the nearest of 16 between its smallest and its largest.

    Args:
        values: `(M, C)` float32, as many outputs by inputs; 32 divides `C`.

    Returns:
        integers: int8 `(M, C)`, from -8 to 7.
        steps: float16 `(M, C / 32)`, above 0.
        offsets: float32 `(M, C / 32)`: a weight is `step * integer + offset`.
        exact: bool `(M, C / 32)`, which blocks had such values.
    """
    blocks = np.asarray(values, np.float32).reshape(len(values), -1, BLOCK_SIZE)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    gaps = np.diff(np.sort(blocks, axis=2), axis=2)
    least = _SAME * np.maximum(-low, high)[..., None]
    smallest = np.where(gaps > least, gaps, np.inf).min(axis=2)
    levels = np.rint((high - low) / smallest)  # 0 where all are the same
    steps = (high - low) / np.where((levels > 0) & (levels < _LEVELS), levels, _LEVELS)
    steps = steps.astype(np.float16)
    is_flat = steps == 0
    steps[is_flat] = 1
    wide = steps.astype(np.float32)[..., None]
    places = (blocks - low[..., None]) / wide
    counted = np.clip(np.rint(places), 0, _LEVELS)
    exact = np.abs(places - counted).max(axis=2) < _NEAR
    # What is the same everywhere is all offset, and that is no larger than it.
    integers = np.where(is_flat[..., None], 0, counted - 8).astype(np.int8)
    offsets = (blocks - integers * wide).mean(axis=2)
    return integers.reshape(np.shape(values)), steps, offsets, exact


def has_four_bits(matrices) -> bool:
    """Return whether most blocks of some matrices `(M, C)` have 16 values."""
    found = [
        take_apart(matrix[::_SAMPLE])[3].ravel()
        for matrix in matrices
        if matrix.shape[1] % BLOCK_SIZE == 0
    ]
    return bool(found) and bool(np.concatenate(found).mean() > 0.5)
