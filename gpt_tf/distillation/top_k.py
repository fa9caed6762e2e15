"""Quantised top-k log-probabilities of a teacher, and the way back to distributions.

A record is the teacher's `k` most probable next tokens and `k + 1` codes: one byte for
each of their probabilities and one for what remains of the mass. `SameVocabulary`,
`DerivedVocabulary` and `SortedProbabilities` make records; `logits_from_top_k` and
`logits_from_sorted` complete what was read to whole distributions.
"""

import numpy as np
import tensorflow as tf

from gpt_tf.distillation.tokenizer_alignment import Alignment, VocabularyMap
from gpt_tf.errors import InputError
from gpt_tf.models import ops

# A code is this times the square root of a probability's surprise in nats.
_SCALE = 64.0

# The code of what is too improbable to be told: e ** -15.8 and less.
_IMPROBABLE = 255
# Log-probabilities from here down say that nothing is known of an entry.
_UNKNOWN = -1e8


def codes_of(probabilities) -> np.ndarray:
    """Return the bytes that stand for probabilities.

    `round(64 * sqrt(-ln p))`: steps are fine where a probability is near 1 and grow
    with its surprise. `ln p` is met within `sqrt(-ln p) / 64 + 1 / 16384`: a
    probability of a half within 1.4 %, one of a thousandth within 4.2 %.

    Args:
        probabilities: `(...)`, 0 to 1.

    Returns:
        `(...)` uint8; 255 says that it is next to nothing.

    Raises:
        InputError: A probability is not a number.
    """
    probabilities = np.asarray(probabilities)
    if np.isnan(probabilities).any():
        raise InputError(
            "A teacher's probabilities are numbers. Received: NaN. Its training "
            "diverged, or its file is damaged; take another teacher."
        )
    with np.errstate(divide="ignore"):
        surprise = -np.log(np.clip(probabilities, 0.0, 1.0))
    return np.minimum(np.rint(_SCALE * np.sqrt(surprise)), _IMPROBABLE).astype(np.uint8)


def log_probabilities_of(codes) -> tf.Tensor:
    """Read codes `(..., k + 1)`, eagerly or in a graph.

    Returns:
        Log-probabilities `(..., k + 1)` float32 that make up 1. Next to nothing is
        -1e9, which `logits_from_top_k` takes for not known; the remaining mass
        of a record that knows nothing is exactly 0.
    """
    codes = tf.convert_to_tensor(codes)
    roots = tf.cast(codes, tf.float32) / _SCALE
    values = tf.where(codes == _IMPROBABLE, ops.MASKED, -roots * roots)
    return values - tf.reduce_logsumexp(values, axis=-1, keepdims=True)


def unknown(count: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and codes of `count` records that know nothing."""
    codes = np.full((count, top_k + 1), _IMPROBABLE, np.uint8)
    codes[:, -1] = 0
    return np.zeros((count, top_k), np.int64), codes


class SameVocabulary:
    """Records of teacher and student with one tokenizer: a position is a position.

    Attributes:
        name: What the manifest calls it.
        top_k: `k`, tokens to keep.
        vocab_size: Number of ids that the records may hold.
    """

    name = "same"

    def __init__(self, top_k: int, vocab_size: int):
        self.top_k = top_k
        self.vocab_size = vocab_size

    def settled(self, position):
        """Return how many records are made of the teacher's positions before one."""
        return position

    def outputs(self, logits):
        """Return of logits `(N, V)` what `records` needs; traced by XLA."""
        return _largest(tf.nn.softmax(logits), self.top_k)

    def records(self, first, ids, values, rest):
        """Return ids `(n, k)` and codes `(n, k + 1)` of the next records.

        The first is of teacher position `first`; the rest is what `outputs` gave.
        """
        return ids, codes_of(np.concatenate([values, rest[:, None]], axis=1))


class _OtherVocabulary:
    """Records of the student's positions, by a teacher of other tokens.

    The methods are those of `SameVocabulary`. `nodes` `(N,)` say what is seen of the
    teacher's token at each student position, -1 where nothing is to be said;
    `teacher_vocab_size` is of its tokenizer, a model may have more logits.
    """

    def __init__(
        self, top_k, alignment: Alignment, nodes, teacher_vocab_size, vocab_size
    ):
        self.top_k = top_k
        self.teacher_vocab_size = teacher_vocab_size
        self.vocab_size = vocab_size
        # The last position predicts what lies beyond the text.
        self._index = alignment.teacher_index[:-1]
        self._nodes = nodes[:-1]
        self._reached = np.maximum.accumulate(self._index)

    def settled(self, position):
        return int(np.searchsorted(self._reached, position))

    def records(self, first, *outputs):
        start, stop = self.settled(first), self.settled(first + len(outputs[0]))
        ids, codes = unknown(stop - start, self.top_k)
        nodes = self._nodes[start:stop]
        known = np.flatnonzero(nodes >= 0)
        rows = self._index[start:stop][known] - first
        ids[known], values, rest = self._told(rows, nodes[known], *outputs)
        codes[known] = codes_of(np.concatenate([values, rest[:, None]], axis=1))
        return ids, codes

    def _probabilities(self, logits):
        """Return probabilities `(N, V_t)` of logits of a possibly padded vocabulary."""
        return tf.nn.softmax(logits[:, : self.teacher_vocab_size])


class DerivedVocabulary(_OtherVocabulary):
    """Records of a student whose tokenizer is derived from the teacher's.

    The teacher's probabilities are carried over to the student's tokens, at the
    start of a teacher token and within one.
    """

    name = "derived"

    def __init__(self, top_k, vocabulary_map: VocabularyMap, student_ids, alignment):
        nodes = vocabulary_map.nodes_for(student_ids, alignment)
        sizes = vocabulary_map.teacher_vocab_size, vocabulary_map.student_vocab_size
        super().__init__(top_k, alignment, nodes, *sizes)
        self._map = vocabulary_map

    def outputs(self, logits):
        return (self._probabilities(logits),)

    def _told(self, rows, nodes, probabilities):
        return self._map.top_k(probabilities, rows, nodes, self.top_k)


class SortedProbabilities(_OtherVocabulary):
    """Records of any two tokenizers: how sure the teacher is, not of what.

    Where both have a token begin, the teacher's largest probabilities, falling.

    Reference: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal
    Logit Distillation Loss", arXiv:2402.12030.
    """

    name = "sorted"

    def __init__(self, top_k, alignment, teacher_vocab_size, vocab_size):
        nodes = np.where(alignment.at_boundary, 0, -1)
        super().__init__(top_k, alignment, nodes, teacher_vocab_size, vocab_size)

    def outputs(self, logits):
        return _largest(self._probabilities(logits), self.top_k)[1:]

    def _told(self, rows, nodes, values, rest):
        return 0, values[rows], rest[rows]


def _largest(probabilities, k):
    """Return ids and values of the `k` largest of `(N, V)`, and the sum of the others.

    `1 - sum` would leave nothing but rounding of a small remainder.
    """
    probabilities = ops.keep(probabilities)
    # XLA would merge the slice below into the search for the largest, and then sort
    # whole rows, which takes fifty times as long.
    values, ids = map(ops.keep, tf.math.top_k(probabilities, k))  # (N, k)
    smallest = values[:, -1:]
    below = tf.where(probabilities < smallest, probabilities, 0.0)
    tied = tf.math.count_nonzero(
        probabilities == smallest, axis=-1, dtype=tf.float32
    ) - tf.math.count_nonzero(values == smallest, axis=-1, dtype=tf.float32)
    return ids, values, tf.reduce_sum(below, axis=-1) + tied * smallest[:, 0]


def logits_from_top_k(ids, log_probs, student_logits):
    """Complete the largest probabilities of a teacher to whole distributions.

    The remaining mass is given the shape that the student's own distribution has over
    the remaining tokens, so that what was left out moves nothing among them: the
    gradient of the forward KL is that of a divergence over `k + 1` outcomes, and the
    loss is smaller than with the whole teacher by exactly
    `rest * KL(teacher || student)` of the two distributions over the remaining tokens.

    Args:
        ids: `(B, T, k)` int32, token ids; those whose log-probability is at or below
            -1e8 count for nothing and may repeat others.
        log_probs: `(B, T, k + 1)` float32, the last of them of the remaining mass.
        student_logits: `(B, T, V)` float32, without gradient.

    Returns:
        `(B, T, V)` float32, log-probabilities.
    """
    count = ids.shape[-1]
    width = student_logits.shape[-1]
    shape = tf.shape(student_logits)
    rows = shape[0] * shape[1]
    entries = tf.reshape(log_probs[..., :-1], [-1])  # (B * T * k,)
    places = tf.stack([tf.repeat(tf.range(rows), count), tf.reshape(ids, [-1])], axis=1)
    blank = tf.fill([rows, width], ops.MASKED * 2)
    known = tf.reshape(tf.tensor_scatter_nd_max(blank, places, entries), shape)
    is_known = known > _UNKNOWN
    own = tf.nn.log_softmax(tf.cast(student_logits, tf.float32))
    left = tf.reduce_logsumexp(
        tf.where(is_known, ops.MASKED, own), axis=-1, keepdims=True
    )
    return tf.where(is_known, known, own - left + log_probs[..., -1:])


def logits_from_sorted(log_probs, width):
    """Complete sorted probabilities to distributions whose order alone counts.

    The remaining mass is spread evenly over the tokens of a vocabulary of `width` that
    are left.

    Args:
        log_probs: `(B, T, k + 1)` float32, falling, the last of the remaining mass.
        width: Size of the vocabulary.

    Returns:
        `(B, T, max(width, k + 1))` float32, log-probabilities.
    """
    left = max(1, width - (log_probs.shape[-1] - 1))
    each = log_probs[..., -1:] - tf.math.log(float(left))
    return tf.concat([log_probs[..., :-1], tf.repeat(each, left, axis=-1)], axis=-1)
