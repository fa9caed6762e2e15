"""The contract between the file and whatever runs it, written down once.

It is LiteRT-LM's own, so that one file runs in Google's runtime and in ours. Neither
TensorFlow nor LiteRT is needed to read it. The letters for shapes are `T` positions
in this call, `S` cached positions (the capacity), `G` heads of keys and values,
`D` head width, `V` vocabulary; the batch is always 1.

A file has the signatures

- `decode`: one token in, the logits of the next one out;
- `prefill_<T>` for several T: T tokens in, only the caches out;
- `score_<T>` for several T: as `prefill_<T>`, and the logits of all T positions. They
  are ours: LiteRT-LM does not look at them. Short ones verify proposed tokens, and a
  runtime does without those that a file does not have;
- `decode_batch_<N>` for several N, in files that are asked for: a token of each of N
  texts. Ours too. See below.

and each of the first three

    in   tokens          int32 (1, T)
    in   input_pos       int32 (T,)           positions of the tokens, consecutive
    in   mask            float32 (1, 1, T, S) additive: 0 visible, MASKED hidden
    in   kv_cache_k_<i>  (1, G, S, D)         keys of block i, from 0
    in   kv_cache_v_<i>  (1, G, S, D)         values of block i
    out  kv_cache_k_<i>, kv_cache_v_<i>       the same with T rows written
    out  logits          float32 (1, T, V)    of decode and score; about MASKED
                                              where the tokenizer has no token

The caches are float32, or int8 in a file of mode `int8_full`. The rows are written
from `input_pos[0]` on, by DYNAMIC_UPDATE_SLICE, which is safe in place: the same
memory may be bound as cache input and output. A last chunk may be filled up with
any tokens; their rows lie behind the text and are overwritten as it grows, so only
`input_pos[0] + T <= S` has to hold. Every shape follows `S`, so a runtime may resize
`mask` and the caches to the capacity that a text needs: speed then follows the
context in use and not the largest one.

`decode_batch_<N>` has

    in   tokens                  int32 (1, N)          one of each text
    in   input_pos               int32 (N,)            their positions, any
    in   mask_row_<n>            float32 (1, 1, 1, S)  of text n, from 0
    in   kv_cache_k_<i>_row_<n>  (1, G, S, D)          keys of block i, and values
    out  kv_cache_k_<i>_row_<n>  the same with a row written, and values
    out  logits                  float32 (1, N, V)

so any texts may be put together in any step, by binding their caches. All have the
same `S`. Rows that are free take a cache that nobody reads.

Reference: LiteRT-LM's executor, github.com/google-ai-edge/LiteRT-LM.
"""

import re

import numpy as np

from gpt_tf.quantization import modes

# Signatures that score more tokens than these cost too much to verify proposals.
LONGEST_VERIFIED = 16

DECODE = "decode"
TOKENS = "tokens"
POSITIONS = "input_pos"
MASK = "mask"
LOGITS = "logits"
ROW = "_row_"  # between a name and its text's number in a batch
MASKED = -1e9
DEFAULT_PREFILL_LENGTHS = (1, 8, 64, 256)
# Texts that one call may decode, and the capacity that its caches are declared with:
# whoever runs it makes them larger, so that nobody else pays for them.
BATCH_SIZES = (2, 4, 8, 16)
DEFAULT_BATCH_SIZES = (4, 8)
BATCH_CAPACITY = 64

MODES = tuple(modes.MODES)

# The metadata entry of a `.tflite` that describes it, as JSON that begins so; the 64
# hexadecimal digits that follow are the SHA-256 of the whole file with these digits
# written as zeros.
METADATA_NAME = "gpt_tf"
SEAL_PREFIX = b'{"format": "gpt_tf.tflite/1", "sha256": "'
SEAL_DIGITS = 64
# The same in the header of a `.litertlm`, of all of that file.
BUNDLE_PREFIX = b'{"format": "gpt_tf.litertlm/1", "sha256": "'
# The chat template in a `.litertlm` of a model that has none: LiteRT-LM asks for one.
# Whatever the conversation is, the model sees the bare text of its messages.
BARE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for item in message.content %}{{ item.text }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def prefill(length: int) -> str:
    """Return the name of the signature that prefills `length` tokens."""
    return f"prefill_{length}"


def score(length: int) -> str:
    """Return the name of the signature that scores `length` tokens."""
    return f"score_{length}"


def decode_batch(size: int) -> str:
    """Return the name of the signature that decodes a token of each of `size` texts."""
    return f"decode_batch_{size}"


def of_row(name: str, row: int | None) -> str:
    """Return the name that a mask or cache has for a text of a batch; None: alone."""
    return name if row is None else f"{name}{ROW}{row}"


def lengths_of(names, kind: str = "prefill") -> tuple[int, ...]:
    """Return the lengths, ascending, for which there is a signature of a kind.

    Args:
        names: Names of a file's signatures.
        kind: `"prefill"`, `"score"` or `"decode_batch"`.

    Example:
        >>> lengths_of(["decode", "prefill_64", "prefill_8"])
        (8, 64)
    """
    found = (re.fullmatch(rf"{kind}_([1-9][0-9]*)", name) for name in names)
    return tuple(sorted(int(match[1]) for match in found if match))


def key_cache(block: int) -> str:
    """Return the name of a block's key cache."""
    return f"kv_cache_k_{block}"


def value_cache(block: int) -> str:
    """Return the name of a block's value cache."""
    return f"kv_cache_v_{block}"


def caches(num_layers: int) -> list[str]:
    """Return the names of all caches: key, value, key, value, ...

    Args:
        num_layers: Number of blocks.
    """
    blocks = range(num_layers)
    return [name(block) for block in blocks for name in (key_cache, value_cache)]


def mask(positions: np.ndarray, capacity: int) -> np.ndarray:
    """Return the additive mask for tokens at these positions.

    Args:
        positions: `(T,)` integers.
        capacity: `S`, rows of the caches.

    Returns:
        `(1, 1, T, S)` float32: each token sees the rows up to its own.
    """
    visible = np.arange(capacity) <= np.asarray(positions)[:, None]  # (T, S)
    return np.where(visible, np.float32(0), np.float32(MASKED))[None, None]
