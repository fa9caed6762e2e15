"""How far a student is from its teacher, token by token.

Every loss is a value per token, `(B, T)`, so that `Distiller` can weigh tokens and
leave out padding. The teacher gets no gradient. Losses of logits are functions with a
small Keras object around each, which has a name and can be saved; those of hidden
states and attention have weights or a layer map.
"""

import math
import operator
from typing import NamedTuple

import tensorflow as tf
import tf_keras as keras

from gpt_tf.distillation.config import LARGEST_TEMPERATURE
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.models.checks import refuse_keras_3
from gpt_tf.settings import arguments


class Outputs(NamedTuple):
    """What a GPT computes, to be compared.

    Attributes:
        logits: `(B, T, V)` float32.
        hidden_states: `L + 1` of `(B, T, C)`: after the embedding and each block.
        attentions: `L` of `(B, H, T, T)`, probabilities.
    """

    logits: tf.Tensor
    hidden_states: tuple = ()
    attentions: tuple = ()


# Logits


def _log_probabilities(teacher_logits, student_logits, temperature):
    if not tf.is_tensor(temperature):
        check_temperature(temperature)
    teacher = tf.stop_gradient(tf.cast(teacher_logits, tf.float32))
    student = tf.cast(student_logits, tf.float32)
    return (
        tf.nn.log_softmax(teacher / temperature),
        tf.nn.log_softmax(student / temperature),
    )


def _divergence(log_p, log_q):
    """KL(p || q) over the last axis; where p is 0, its share is 0."""
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)


def _mixture(gap, share):
    """Return log(m / p), `m = share * p + (1 - share) * q`, from log(q / p).

    The ratio, not m itself: where p and q are near each other it is near 0, and so is
    its rounding error, which `T²` multiplies.
    """
    one, other = math.log(share), gap + math.log(1.0 - share)
    high = tf.stop_gradient(tf.maximum(one, other))
    return high + tf.math.log(tf.exp(one - high) + tf.exp(other - high))


def forward_kl(teacher_logits, student_logits, temperature=1.0):
    """`T² KL(p || q)`, `p = softmax(teacher / T)`, `q = softmax(student / T)`.

    The factor `T²` keeps the gradient's size as `T` grows.

    Args:
        teacher_logits: `(..., V)`, any float type, finite: -1e9 hides a token where
            an infinity would give NaN. No gradient.
        student_logits: `(..., V)`, likewise.
        temperature: `T`, above 0.

    Returns:
        `(...)` float32, in nats times `T²`, at least 0.

    Example:
        >>> float(forward_kl([0.0, 0.0], [0.0, math.log(3.0)]))  # log(4 / 3) / 2
        0.1438410...

    Reference: Hinton, Vinyals and Dean, arXiv:1503.02531, section 2.
    """
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    return temperature**2 * _divergence(log_p, log_q)


def reverse_kl(teacher_logits, student_logits, temperature=1.0):
    """`T² KL(q || p)`: the student keeps to what the teacher finds likely.

    Args and returns: as for `forward_kl`.

    Reference: Gu et al., "MiniLLM", arXiv:2306.08543.
    """
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    return temperature**2 * _divergence(log_q, log_p)


def jensen_shannon(teacher_logits, student_logits, temperature=1.0, weight=0.5):
    """`T² (w KL(p || m) + (1 - w) KL(q || m))`, `m = w p + (1 - w) q`.

    Args and returns: as for `forward_kl`, and
        weight: `w`, in (0, 1): near 0 its gradient is that of the forward KL times
            `w`, near 1 that of the reverse KL times `1 - w`.

    Reference: Agarwal et al. (GKD), arXiv:2306.13649, section 3.
    """
    weight = arguments.number("weight", weight, above=0, below=1)
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    gap = log_q - log_p
    above = _mixture(gap, weight)
    of_p = weight * tf.reduce_sum(tf.exp(log_p) * -above, axis=-1)
    of_q = (1.0 - weight) * tf.reduce_sum(tf.exp(log_q) * (gap - above), axis=-1)
    return temperature**2 * (of_p + of_q)


def total_variation(teacher_logits, student_logits, temperature=1.0):
    """`T * sum |p - q| / 2`: half the distance, in [0, T].

    Its gradient shrinks with `1 / T`, not with its square, hence the factor.

    Args and returns: as for `forward_kl`.

    Reference: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge
    Distillation", arXiv:2307.15190.
    """
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    gaps = tf.abs(tf.exp(log_p) - tf.exp(log_q))
    return 0.5 * temperature * tf.reduce_sum(gaps, axis=-1)


def skewed_kl(teacher_logits, student_logits, temperature=1.0, skew=0.1):
    """`T² KL(p || s p + (1 - s) q)`: finite, however unlikely the student finds it.

    Args and returns: as for `forward_kl`, and
        skew: `s`, in (0, 1): near 0 it is the forward KL, near 1 nothing is left.

    Reference: Ko et al., "DistiLLM", arXiv:2402.03898, section 3.1.
    """
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    above = _mixture(log_q - log_p, arguments.number("skew", skew, above=0, below=1))
    return temperature**2 * tf.reduce_sum(tf.exp(log_p) * -above, axis=-1)


def skewed_reverse_kl(teacher_logits, student_logits, temperature=1.0, skew=0.1):
    """`T² KL(q || (1 - s) p + s q)`.

    Args and returns: as for `skewed_kl`; near 0 it is the reverse KL.
    """
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    above = _mixture(log_p - log_q, arguments.number("skew", skew, above=0, below=1))
    return temperature**2 * tf.reduce_sum(tf.exp(log_q) * -above, axis=-1)


def universal_logit_distance(teacher_logits, student_logits, temperature=1.0):
    """`T * sum_i |p_(i) - q_(i)|` of probabilities sorted from the largest down.

    The order alone says which are compared, so the vocabularies may differ; the
    shorter one is filled up with zeros.

    Args: as for `forward_kl`. Returns: `(...)` float32, in [0, 2 T].

    Reference: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal
    Logit Distillation Loss for LLMs", arXiv:2402.12030, equation 3.
    """
    log_p, log_q = _log_probabilities(teacher_logits, student_logits, temperature)
    p, q = (tf.sort(tf.exp(x), direction="DESCENDING") for x in (log_p, log_q))
    missing = p.shape[-1] - q.shape[-1]
    p, q = _lengthened(p, -missing), _lengthened(q, missing)
    return temperature * tf.reduce_sum(tf.abs(p - q), axis=-1)


def _lengthened(x, count):
    ends = [[0, 0]] * (x.shape.rank - 1) + [[0, max(0, count)]]
    return tf.pad(x, ends)


# Hidden states and attention


def hidden_state_distance(teacher, student):
    """Mean squared error of hidden states `(B, T, C)`, of the teacher's mean square.

    Returns:
        `(B, T)` float32; 1 for a student that says 0 throughout.

    Reference: Jiao et al., "TinyBERT", arXiv:1909.10351, equation 8; the division
    by the teacher's scale is ours.
    """
    teacher = tf.stop_gradient(tf.cast(teacher, tf.float32))
    error = tf.reduce_mean((tf.cast(student, tf.float32) - teacher) ** 2, axis=-1)
    return error / (tf.reduce_mean(teacher**2, axis=-1) + 1e-6)


def attention_distance(teacher, student):
    """KL divergence of attention `(B, H, T, T)`, averaged over heads, which may differ.

    Returns:
        `(B, T)` float32, in nats, at least 0.

    Reference: Wang et al., "MiniLM", arXiv:2002.10957, section 3.1, with heads
    averaged as in Zagoruyko and Komodakis, arXiv:1612.03928.
    """
    p = tf.stop_gradient(tf.reduce_mean(tf.cast(teacher, tf.float32), axis=1))
    q = tf.reduce_mean(tf.cast(student, tf.float32), axis=1)  # (B, T, T)
    # Hidden keys are 0 in both, and log(1) - log(1) there.
    logs = tf.math.log(tf.maximum(p, 1e-9)) - tf.math.log(tf.maximum(q, 1e-9))
    return tf.reduce_sum(p * logs, axis=-1)


# Keras objects


def _registered(kind):
    return keras.saving.register_keras_serializable(package="gpt_tf")(kind)


class DistillationLoss(keras.layers.Layer):
    """A distance between teacher and student that has a name and can be saved.

    Attributes:
        wants: What it compares, of `"logits"`, `"hidden_states"`, `"attentions"`.
        across_vocabularies: Whether teacher and student may differ in theirs.

    Call arguments:
        teacher: `Outputs`.
        student: `Outputs`.
        temperature: Above 0; losses that compare no logits do not look at it.

    Returns:
        `(B, T)` float32.
    """

    wants = frozenset({"logits"})
    across_vocabularies = False

    def __init__(self, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        self._built_for = None

    def build_for(self, teacher_config, student_config):
        """Check that the loss fits a pair, and make the weights that it needs.

        Args:
            teacher_config: The teacher's `GPTModel.get_config()`, or None where its
                knowledge was stored.
            student_config: The student's.

        Raises:
            InputError: It does not fit.
        """
        kind = type(self).__name__
        if teacher_config is None and self.wants != {"logits"}:
            hidden = ", ".join(sorted(self.wants - {"logits"}))
            raise InputError(
                f"{kind} compares {hidden}, which stored knowledge does not have. "
                "Received: no teacher. Pass `teacher=`, or choose a loss of logits."
            )
        theirs = (teacher_config or student_config)["vocab_size"]
        ours = student_config["vocab_size"]
        if theirs != ours and not self.across_vocabularies:
            raise InputError(
                f"{kind} compares probabilities of the same tokens. Received: "
                f"vocabularies of {theirs:,} tokens for the teacher and {ours:,} for "
                "the student. Use `UniversalLogit()`, or derive the student's "
                "tokenizer with `derive_tokenizer(teacher's, vocab_size)` and extract "
                "the teacher's knowledge for it: `gpt-tf distil --student-vocab-size` "
                "does both."
            )
        pair = repr((teacher_config, student_config))
        if self.built and self._built_for == pair:
            return
        if self.weights:
            raise InputError(
                f"A {kind} that has learned projections belongs to one teacher and one "
                "student. Received: another pair. Make a new one."
            )
        self._make_weights(teacher_config, student_config)
        self._built_for = pair
        self.built = True

    def _make_weights(self, teacher_config, student_config):
        """Make weights, where a loss has any."""

    def get_config(self):
        return {"name": self.name}


def _of_logits(function, own=None):
    """Return the `call` of a loss that is a function of both logits."""

    def call(self, teacher, student, temperature):
        options = {} if own is None else {own: getattr(self, own)}
        return function(teacher.logits, student.logits, temperature, **options)

    return call


@_registered
class ForwardKL(DistillationLoss):
    """See `forward_kl`."""

    call = _of_logits(forward_kl)


@_registered
class ReverseKL(DistillationLoss):
    """See `reverse_kl`."""

    call = _of_logits(reverse_kl)


@_registered
class TotalVariation(DistillationLoss):
    """See `total_variation`."""

    call = _of_logits(total_variation)


@_registered
class UniversalLogit(DistillationLoss):
    """See `universal_logit_distance`."""

    across_vocabularies = True
    call = _of_logits(universal_logit_distance)


@_registered
class JensenShannon(DistillationLoss):
    """See `jensen_shannon`."""

    def __init__(self, weight=0.5, **kwargs):
        super().__init__(**kwargs)
        self.weight = arguments.number("weight", weight, above=0, below=1)

    call = _of_logits(jensen_shannon, "weight")

    def get_config(self):
        return {**super().get_config(), "weight": self.weight}


class _Skewed(DistillationLoss):
    def __init__(self, skew=0.1, **kwargs):
        super().__init__(**kwargs)
        self.skew = arguments.number("skew", skew, above=0, below=1)

    def get_config(self):
        return {**super().get_config(), "skew": self.skew}


@_registered
class SkewedKL(_Skewed):
    """See `skewed_kl`."""

    call = _of_logits(skewed_kl, "skew")


@_registered
class SkewedReverseKL(_Skewed):
    """See `skewed_reverse_kl`."""

    call = _of_logits(skewed_reverse_kl, "skew")


@_registered
class OnProbabilities(DistillationLoss):
    """A loss of tf_keras on the softened probabilities of both, `KLDivergence()`, say.

    No power of the temperature is multiplied in, since the right one depends on the
    loss: `KLDivergence()` is `ForwardKL()` without its `T²`.

    Raises:
        InputTypeError: It is none, or one of Keras 3.
    """

    def __init__(self, loss, **kwargs):
        super().__init__(**kwargs)
        if isinstance(loss, dict):
            loss = keras.saving.deserialize_keras_object(loss)
        refuse_keras_3(loss, "loss")
        if not isinstance(loss, keras.losses.Loss):
            raise InputTypeError(
                "`OnProbabilities` expects a loss of tf_keras. "
                f"Received: {loss!r}. Use `keras.losses.KLDivergence()`, for example."
            )
        self.loss = loss

    def call(self, teacher, student, temperature):
        log_p, log_q = _log_probabilities(teacher.logits, student.logits, temperature)
        return tf.cast(self.loss.call(tf.exp(log_p), tf.exp(log_q)), tf.float32)

    def get_config(self):
        loss = keras.saving.serialize_keras_object(self.loss)
        return {**super().get_config(), "loss": loss}


class _OfLayers(DistillationLoss):
    across_vocabularies = True
    first = 0  # number of the first layer that can be named

    def __init__(self, layer_map="evenly", **kwargs):
        super().__init__(**kwargs)
        self.layer_map = _normal_map(layer_map)

    def _make_weights(self, teacher_config, student_config):
        counts = {
            role: config["num_layers"] + 1 - self.first
            for role, config in (
                ("student", student_config),
                ("teacher", teacher_config),
            )
        }
        if self.layer_map == "evenly":
            spaced = evenly_spaced(counts["teacher"], counts["student"])
            self.pairs = list(enumerate(spaced))
            return
        for pair in self.layer_map:
            for layer, (role, count) in zip(pair, counts.items(), strict=True):
                if not 0 <= layer < count:
                    raise InputError(
                        f"`layer_map` expects layers of the {role} from 0 to "
                        f"{count - 1}. Received: {layer}. Count them anew."
                    )
        self.pairs = [tuple(pair) for pair in self.layer_map]

    def get_config(self):
        return {**super().get_config(), "layer_map": self.layer_map}


@_registered
class HiddenStates(_OfLayers):
    """Mean `hidden_state_distance` over layers, from learned projections.

    Args:
        layer_map: `"evenly"`, or pairs of a student's and a teacher's layer, or a
            dict of them: 0 is the embedding, `n` the output of block `n - 1`. Evenly
            spaced, the last stands beside the last.

    Raises:
        InputError: The map names no layer.
    """

    wants = frozenset({"logits", "hidden_states"})

    def _make_weights(self, teacher_config, student_config):
        super()._make_weights(teacher_config, student_config)
        wide = teacher_config["embedding_dim"]
        narrow = student_config["embedding_dim"]
        initializer = keras.initializers.RandomNormal(stddev=narrow**-0.5, seed=1)
        if narrow == wide:
            initializer = keras.initializers.Identity()
        self.projections = [
            self.add_weight(
                f"projection_{index}", (narrow, wide), initializer=initializer
            )
            for index in range(len(self.pairs))
        ]

    def call(self, teacher, student, temperature):
        found = []
        for kernel, (ours, theirs) in zip(self.projections, self.pairs, strict=True):
            states = student.hidden_states[ours]
            projected = tf.matmul(states, tf.cast(kernel, states.dtype))
            found.append(
                hidden_state_distance(teacher.hidden_states[theirs], projected)
            )
        return tf.add_n(found) / len(found)


@_registered
class AttentionTransfer(_OfLayers):
    """Mean `attention_distance` over blocks.

    Args:
        layer_map: `"evenly"`, or pairs of a student's and a teacher's block, or a
            dict of them, counted from 0. Evenly spaced, each stands beside the block
            that `make_student` takes for it by `layers="evenly"`.

    Raises:
        InputError: The map names no block.
    """

    wants = frozenset({"logits", "attentions"})
    first = 1

    def call(self, teacher, student, temperature):
        found = [
            attention_distance(teacher.attentions[theirs], student.attentions[ours])
            for ours, theirs in self.pairs
        ]
        return tf.add_n(found) / len(found)


@_registered
class WeightedSum(DistillationLoss):
    """Several losses, each times its weight.

    Args:
        terms: Pairs of a loss, as for `get`, and a weight above 0.

    Raises:
        InputError: There are none, they are no pairs, or a weight is not above 0.

    Example:
        >>> loss = WeightedSum([("forward_kl", 1.0), (HiddenStates(), 0.1)])
    """

    def __init__(self, terms, **kwargs):
        super().__init__(**kwargs)
        try:
            pairs = [(loss, weight) for loss, weight in terms]
        except (TypeError, ValueError):
            pairs = []
        if not pairs:
            raise InputError(
                "A sum of distillation losses expects pairs of a loss and a weight, "
                "[('forward_kl', 1.0)] for example. Received: "
                f"{arguments.shown(terms)}."
            )
        self.factors = [
            arguments.number("weight", weight, above=0) for _, weight in pairs
        ]
        self.terms = [get(loss) for loss, _ in pairs]
        self.wants = frozenset().union(*(term.wants for term in self.terms))
        self.across_vocabularies = all(term.across_vocabularies for term in self.terms)

    def build_for(self, teacher_config, student_config):
        for term in self.terms:
            term.build_for(teacher_config, student_config)
        self.built = True

    def call(self, teacher, student, temperature):
        return tf.add_n(
            [
                factor * term(teacher, student, temperature)
                for factor, term in zip(self.factors, self.terms, strict=True)
            ]
        )

    def get_config(self):
        terms = [
            [keras.saving.serialize_keras_object(term), factor]
            for term, factor in zip(self.terms, self.factors, strict=True)
        ]
        return {**super().get_config(), "terms": terms}


NAMES = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "total_variation": TotalVariation,
    "skewed_kl": SkewedKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "universal_logit": UniversalLogit,
    "hidden_states": HiddenStates,
    "attention_transfer": AttentionTransfer,
}


def get(identifier=None):
    """Return a distillation loss.

    Args:
        identifier: A `DistillationLoss`, a name of `NAMES`, a loss of tf_keras for
            probabilities, pairs of these and a weight, the configuration of a saved
            one, or None for `ForwardKL()`.

    Raises:
        InputError: There is none of this name.
        InputTypeError: It is nothing of these.

    Example:
        >>> get([("forward_kl", 1.0), (HiddenStates({2: 4}), 0.1)])
    """
    if identifier is None:
        return ForwardKL()
    if isinstance(identifier, DistillationLoss):
        return identifier
    refuse_keras_3(identifier, "loss")
    if isinstance(identifier, dict):
        if "class_name" not in identifier:
            raise InputError(
                "The configuration of a distillation loss expects `class_name`. "
                f"Received: {arguments.shown(identifier)}. Take it from "
                "`keras.saving.serialize_keras_object(loss)`."
            )
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, keras.losses.Loss):
        return OnProbabilities(identifier)
    if isinstance(identifier, (list, tuple)):
        return WeightedSum(identifier)
    if isinstance(identifier, str):
        if identifier in NAMES:
            return NAMES[identifier]()
        arguments.refuse("loss", identifier, f"one of {', '.join(NAMES)}")
    raise InputTypeError(
        "`distillation_loss` expects a DistillationLoss, a name, a tf_keras loss or "
        f"pairs of these and a weight. Received: {type(identifier).__name__}."
    )


def check_temperature(value):
    """Return a temperature, or refuse what is none."""
    return arguments.number("temperature", value, above=0, most=LARGEST_TEMPERATURE)


def _normal_map(layer_map):
    if isinstance(layer_map, str) and layer_map == "evenly":
        return layer_map
    found = layer_map.items() if isinstance(layer_map, dict) else layer_map
    try:
        pairs = [[operator.index(layer) for layer in (a, b)] for a, b in found]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise InputError(
            "`layer_map` expects 'evenly', or pairs of a student's and a teacher's "
            f"layer. Received: {arguments.shown(layer_map)}."
        )
    return pairs


def evenly_spaced(total, count):
    """Return which of a teacher's `total` layers stand for a student's `count`, rising.

    The first and the last are among them; a single one is the first, since others
    cannot read the bare embedding. Halves go to the later layer.

    Example:
        >>> evenly_spaced(6, 3)
        [0, 3, 5]
    """
    gaps = max(1, count - 1)
    # In whole numbers, so that a half is a half.
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count)]
