"""Randomness without a state: each number is a function of a key and a counter.

So that any batch can be made by itself, in any worker, and a resumed run sees what an
uninterrupted one does.

Reference: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014, whose SplitMix64 this is; Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw(keys, counters) -> np.ndarray:
    """Return uint64s, which may be keys of further streams.

    Args:
        keys: uint64s, each the key of a stream.
        counters: Places in them, integers from 0, of a shape that goes with `keys`.

    Example:
        >>> rolls = draw(np.uint64(7), np.arange(100)) % np.uint64(6)
        >>> int(rolls.max())
        5
    """
    with np.errstate(over="ignore"):
        places = np.asarray(counters).astype(np.uint64) + np.uint64(1)
        return mix(np.asarray(keys, np.uint64) + places * _GOLDEN)


def uniform(keys, counters) -> np.ndarray:
    """Return numbers in [0, 1) at places of streams, float64, as `draw` does."""
    return (draw(keys, counters) >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(values: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Map 0..size-1 onto itself in a random order, without a table.

    A Feistel network over the next even power of two, applied again where the
    result falls outside. `key` holds random uint32s, the rounds' keys.

    Reference: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    CT-RSA 2002.
    """
    half = max(1, ((int(size) - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    bits = np.uint64(half)
    result = np.asarray(values, np.uint64).copy()
    outside = np.ones(result.shape, bool)
    while outside.any():
        x = result[outside]
        left, right = x >> bits, x & mask
        for k in key:
            left, right = right, left ^ (mix(right + np.uint64(k)) & mask)
        result[outside] = (left << bits) | right
        outside = result >= size
    return result
