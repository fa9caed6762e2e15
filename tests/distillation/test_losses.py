"""Every loss against its formula in NumPy, its gradient against finite differences."""

import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from gpt_tf.distillation import losses
from gpt_tf.distillation.losses import Outputs
from gpt_tf.errors import InputError, InputTypeError

TEACHER = {"vocab_size": 7, "embedding_dim": 6, "num_layers": 4}
STUDENT = {"vocab_size": 7, "embedding_dim": 4, "num_layers": 2}


# The formulas, in float64


def softmax(x, temperature=1.0):
    return special.softmax(np.asarray(x, np.float64) / temperature, axis=-1)


def kl(p, q):
    return special.rel_entr(p, q).sum(-1)


def stated_forward_kl(a, b, t):
    return t**2 * kl(softmax(a, t), softmax(b, t))


def stated_reverse_kl(a, b, t):
    return t**2 * kl(softmax(b, t), softmax(a, t))


def stated_jensen_shannon(a, b, t, weight=0.5):
    p, q = softmax(a, t), softmax(b, t)
    m = weight * p + (1 - weight) * q
    return t**2 * (weight * kl(p, m) + (1 - weight) * kl(q, m))


def stated_total_variation(a, b, t):
    return t * np.abs(softmax(a, t) - softmax(b, t)).sum(-1) / 2


def stated_skewed_kl(a, b, t, skew=0.1):
    p, q = softmax(a, t), softmax(b, t)
    return t**2 * kl(p, skew * p + (1 - skew) * q)


def stated_skewed_reverse_kl(a, b, t, skew=0.1):
    p, q = softmax(a, t), softmax(b, t)
    return t**2 * kl(q, (1 - skew) * p + skew * q)


def stated_universal_logit(a, b, t):
    p, q = (-np.sort(-softmax(x, t), -1) for x in (a, b))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (np.pad(x, [(0, 0), (0, width - x.shape[-1])]) for x in (p, q))
    return t * np.abs(p - q).sum(-1)


STATED = {
    losses.forward_kl: stated_forward_kl,
    losses.reverse_kl: stated_reverse_kl,
    losses.jensen_shannon: stated_jensen_shannon,
    losses.total_variation: stated_total_variation,
    losses.skewed_kl: stated_skewed_kl,
    losses.skewed_reverse_kl: stated_skewed_reverse_kl,
    losses.universal_logit_distance: stated_universal_logit,
}
EVERY = pytest.mark.parametrize("loss", STATED, ids=lambda loss: loss.__name__)
# Without a corner where the two are equal.
SMOOTH = [*STATED][:3] + [losses.skewed_kl, losses.skewed_reverse_kl]


def pair_of(seed, rows=5, width=7, size=2.0):
    generator = np.random.default_rng(seed)
    return generator.normal(0, size, (2, rows, width))


@EVERY
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    size=st.floats(0.1, 8.0),
    temperature=st.floats(0.5, 10.0),
)
def test_it_is_what_its_formula_says(loss, seed, width, size, temperature):
    teacher, student = pair_of(seed, 3, width, size)
    found = loss(tf.constant(teacher), tf.constant(student), temperature).numpy()
    assert found.dtype == np.float32
    wanted = STATED[loss](teacher, student, temperature)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5 * temperature**2)


@EVERY
def test_the_formula_would_notice_another_temperature(loss):
    teacher, student = pair_of(1, size=6.0)
    found = loss(teacher, student, 1.0).numpy()
    assert np.abs(found - STATED[loss](teacher, student, 1.3)).max() > 1e-2


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_is_that_of_finite_differences_and_the_students_alone(
    loss, temperature
):
    teacher, student = pair_of(2)
    logits = [tf.constant(x, tf.float32) for x in (teacher, student)]
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = tf.reduce_sum(loss(*logits, temperature))
    of_teacher, found = tape.gradient(value, logits)
    assert of_teacher is None
    wanted = np.zeros_like(student)
    for place in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[place] = 1e-5
        high, low = (
            STATED[loss](teacher, student + sign * step, temperature).sum()
            for sign in (1, -1)
        )
        wanted[place] = (high - low) / 2e-5
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)
    assert np.abs(found).max() > 1e-2


@EVERY
def test_equal_logits_have_no_distance_and_a_gradient_of_nothing(loss):
    logits = tf.constant(pair_of(4)[0], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = loss(logits, logits)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    gradient = tape.gradient(value, logits).numpy()
    assert np.isfinite(gradient).all()
    if loss in SMOOTH:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@EVERY
def test_the_distance_of_many_softened_tokens_is_that_of_their_logits(loss):
    logits = tf.constant(pair_of(10, rows=3, width=20_000, size=3.0)[0], tf.float32)
    np.testing.assert_allclose(loss(logits, logits, 20.0), 0, atol=5e-5)
    assert loss(logits, 1.1 * logits, 20.0).numpy().min() > 5e-4


@EVERY
@pytest.mark.parametrize("jit_compile", [False, True])
def test_extreme_and_masked_logits_stay_finite(loss, jit_compile):
    teacher = np.array([[1e4, 0, -1e4, 3], [0, -1e9, 1, -1e9], [5, 5, 5, 5]])
    student = np.array([[-1e4, 0, 1e4, 3], [-1e9, 0, 1, -1e9], [5, 5, 5, 5.1]])

    def both(teacher, student):
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = loss(teacher, student, 2.0)
        return value, tape.gradient(value, student)

    run = tf.function(both, jit_compile=jit_compile, autograph=False)
    for found in run(*(tf.constant(x, tf.float32) for x in (teacher, student))):
        assert np.isfinite(found).all()


@EVERY
def test_half_precision_is_computed_in_float32(loss):
    teacher, student = (tf.constant(x, tf.float16) for x in pair_of(6))
    found = loss(teacher, student)
    assert found.dtype == tf.float32
    wanted = STATED[loss](teacher.numpy(), student.numpy(), 1.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_sorted_probabilities_do_not_ask_for_their_tokens():
    teacher, student = pair_of(9)
    found = losses.universal_logit_distance(teacher, student)
    other = losses.universal_logit_distance(teacher[:, ::-1], np.roll(student, 2, -1))
    np.testing.assert_allclose(found, other, rtol=1e-5)
    wider = np.pad(teacher, [(0, 0), (0, 4)], constant_values=-1e9)
    other = losses.universal_logit_distance(wider, student)
    np.testing.assert_allclose(found, other, rtol=1e-5)


# Hidden states and attention


def outputs(seed, layers, width, heads=2, vocab_size=7):
    generator = np.random.default_rng(seed)
    attention = np.tril(generator.uniform(0.1, 1, (layers, 2, heads, 5, 5)))
    attention /= attention.sum(-1, keepdims=True)
    return Outputs(
        tf.constant(generator.normal(size=(2, 5, vocab_size)), tf.float32),
        tuple(
            tf.constant(x, tf.float32)
            for x in generator.normal(size=(layers + 1, 2, 5, width))
        ),
        tuple(tf.constant(x, tf.float32) for x in attention),
    )


def test_hidden_states_are_compared_by_relative_error():
    generator = np.random.default_rng(1)
    teacher, student = generator.normal(size=(2, 2, 5, 6))
    found = losses.hidden_state_distance(teacher, student)
    wanted = ((teacher - student) ** 2).mean(-1) / ((teacher**2).mean(-1) + 1e-6)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(
        losses.hidden_state_distance(9 * teacher, 9 * student), found, rtol=1e-4
    )


def test_attention_is_compared_with_heads_averaged():
    teacher, student = outputs(1, 1, 4, heads=3), outputs(2, 1, 4, heads=2)
    p, q = (np.mean(x.attentions[0], axis=1) for x in (teacher, student))
    wanted = kl(p.astype(np.float64), np.maximum(q, 1e-30))
    found = losses.attention_distance(teacher.attentions[0], student.attentions[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert found.shape == (2, 5)


INNER = pytest.mark.parametrize(
    ("distance", "kind"),
    [
        (losses.hidden_state_distance, "hidden_states"),
        (losses.attention_distance, "attentions"),
    ],
)


@INNER
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_inside_the_model_too_only_the_student_gets_a_finite_gradient(
    distance, kind, equal, jit_compile
):
    teacher = getattr(outputs(1, 1, 4), kind)[0]  # the future holds zeros
    student = teacher if equal else getattr(outputs(2, 1, 4), kind)[0]

    def both(teacher, student):
        teacher, student = tf.identity(teacher), tf.identity(student)
        with tf.GradientTape() as tape:
            tape.watch([teacher, student])
            value = tf.reduce_sum(distance(teacher, student))
        return value, tape.gradient(value, [teacher, student])

    run = tf.function(both, jit_compile=jit_compile, autograph=False)
    value, (of_teacher, of_student) = run(teacher, student)
    assert of_teacher is None
    assert np.isfinite(of_student).all()
    assert (value.numpy() == 0) == equal


def test_hidden_states_pass_through_learned_projections():
    loss = losses.HiddenStates([(0, 0), (2, 4)])
    loss.build_for(TEACHER, STUDENT)
    assert [w.shape.as_list() for w in loss.trainable_weights] == [[4, 6], [4, 6]]
    teacher, student = outputs(1, 4, 6), outputs(2, 2, 4)
    found = loss(teacher, student, 1.0)
    wanted = np.mean(
        [
            losses.hidden_state_distance(
                teacher.hidden_states[theirs],
                student.hidden_states[ours].numpy() @ kernel.numpy(),
            )
            for kernel, (ours, theirs) in zip(
                loss.trainable_weights, [(0, 0), (2, 4)], strict=True
            )
        ],
        axis=0,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_projections_belong_to_one_pair():
    loss = losses.HiddenStates()
    loss.build_for(TEACHER, STUDENT)
    before = loss.trainable_weights
    loss.build_for(TEACHER, STUDENT)  # compiled again
    assert all(a is b for a, b in zip(before, loss.trainable_weights, strict=True))
    with pytest.raises(InputError, match="another pair"):
        loss.build_for(TEACHER, {**STUDENT, "num_layers": 3})


@pytest.mark.parametrize(
    ("total", "count", "taken"),
    [
        (6, 3, [0, 3, 5]),
        (1, 1, [0]),
        (3, 2, [0, 2]),
        (12, 5, [0, 3, 6, 8, 11]),
    ],
)
def test_layers_are_evenly_spaced(total, count, taken):
    attention, states = losses.AttentionTransfer(), losses.HiddenStates()
    attention.build_for(
        {**TEACHER, "num_layers": total}, {**STUDENT, "num_layers": count}
    )
    assert attention.pairs == [*enumerate(taken)]
    # Hidden states are one more: there is the embedding, too.
    states.build_for(
        {**TEACHER, "num_layers": total - 1}, {**STUDENT, "num_layers": count - 1}
    )
    assert states.pairs == [*enumerate(taken)]


def test_projections_between_equal_widths_begin_as_the_identity():
    states = losses.HiddenStates()
    states.build_for(TEACHER, {**STUDENT, "embedding_dim": 6})
    np.testing.assert_array_equal(states.trainable_weights[0], np.eye(6))


@pytest.mark.parametrize(
    ("kind", "layer_map", "message"),
    [
        (losses.HiddenStates, [(3, 0)], "student from 0 to 2. Received: 3"),
        (losses.HiddenStates, {0: 5}, "teacher from 0 to 4. Received: 5"),
        (losses.AttentionTransfer, {1: 4}, "teacher from 0 to 3. Received: 4"),
        (losses.HiddenStates, "oddly", "`layer_map` expects"),
        (losses.HiddenStates, [(0.6, 1.7)], "`layer_map` expects"),
        (losses.HiddenStates, [(0, 1, 2)], "`layer_map` expects"),
        (losses.AttentionTransfer, 1, "`layer_map` expects"),
    ],
)
def test_a_map_that_names_no_layer_is_refused(kind, layer_map, message):
    with pytest.raises(InputError, match=message):
        kind(layer_map).build_for(TEACHER, STUDENT)


# Keras objects


OBJECTS = [
    losses.ForwardKL(),
    losses.ReverseKL(),
    losses.JensenShannon(0.3),
    losses.TotalVariation(),
    losses.SkewedKL(0.2),
    losses.SkewedReverseKL(0.2),
    losses.UniversalLogit(),
    losses.HiddenStates([(2, 4)]),
    losses.AttentionTransfer(),
    losses.OnProbabilities(keras.losses.KLDivergence()),
    losses.WeightedSum([("forward_kl", 2.0), (losses.HiddenStates(), 0.5)]),
]


@pytest.mark.parametrize("loss", OBJECTS, ids=lambda loss: type(loss).__name__)
def test_a_saved_loss_is_the_same_loss(loss):
    teacher, student = outputs(1, 4, 6), outputs(2, 2, 4)
    written = json.dumps(keras.saving.serialize_keras_object(loss))
    again = losses.get(json.loads(written))
    found = []
    for one in (loss, again):
        one.build_for(TEACHER, STUDENT)
        found.append(one(teacher, student, 2.0).numpy())
    assert found[0].shape == (2, 5)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("loss", "function", "options"),
    [
        (None, losses.forward_kl, {}),
        *(
            (name, getattr(losses, name), {})
            for name in (
                *("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"),
                *("skewed_kl", "skewed_reverse_kl"),
            )
        ),
        ("universal_logit", losses.universal_logit_distance, {}),
        (losses.JensenShannon(0.3), losses.jensen_shannon, {"weight": 0.3}),
        (losses.SkewedKL(0.2), losses.skewed_kl, {"skew": 0.2}),
        (losses.SkewedReverseKL(0.2), losses.skewed_reverse_kl, {"skew": 0.2}),
        (
            keras.losses.KLDivergence(),
            lambda a, b, t: kl(softmax(a, t), softmax(b, t)),
            {},
        ),
    ],
)
def test_objects_compute_their_functions(loss, function, options):
    teacher, student = outputs(1, 4, 6), outputs(2, 2, 4)
    found = losses.get(loss)(teacher, student, 2.0)
    wanted = function(teacher.logits, student.logits, 2.0, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_sum_weighs_its_terms():
    teacher, student = outputs(1, 4, 6), outputs(2, 2, 4)
    terms = [("forward_kl", 2.0), ("total_variation", 0.5)]
    found = losses.get(terms)(teacher, student, 1.0)
    wanted = sum(
        factor * losses.get(name)(teacher, student, 1.0) for name, factor in terms
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.JensenShannon(1.0), "`weight`"),
        (lambda: losses.SkewedReverseKL(float("nan")), "`skew`"),
        (lambda: losses.WeightedSum([("forward_kl", 0.0)]), "`weight`"),
        (lambda: losses.jensen_shannon([0.0], [0.0], weight=0.0), "`weight`"),
        (lambda: losses.skewed_kl([0.0], [0.0], skew=1.0), "`skew`"),
        (lambda: losses.forward_kl([0.0], [0.0], 0.0), "`temperature`"),
        (lambda: losses.WeightedSum([]), "pairs of a loss and a weight"),
        (lambda: losses.get(["forward_kl", "reverse_kl"]), "pairs of a loss"),
        (lambda: losses.get({"name": "forward_kl"}), "`class_name`"),
        (lambda: losses.get("no_loss"), "'no_loss'"),
        (lambda: losses.get(3), "Received: int"),
        (lambda: losses.OnProbabilities("kl"), "a loss of tf_keras"),
    ],
)
def test_what_is_no_loss_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("take", [losses.get, losses.OnProbabilities])
def test_a_loss_of_keras_3_gets_the_teaching_error(take):
    import keras as keras_3

    with pytest.raises(InputTypeError, match=r"keras\.losses\.KLDivergence\(\.\.\.\)"):
        take(keras_3.losses.KLDivergence())


def test_other_vocabularies_are_refused_with_what_to_use():
    other = {**STUDENT, "vocab_size": 5}
    with pytest.raises(InputError, match="7 tokens for the teacher and 5") as caught:
        losses.ForwardKL().build_for(TEACHER, other)
    assert "UniversalLogit" in str(caught.value)
    assert "derive_tokenizer" in str(caught.value)
    losses.UniversalLogit().build_for(TEACHER, other)
    losses.HiddenStates().build_for(TEACHER, other)


def test_stored_knowledge_has_no_hidden_states():
    losses.ForwardKL().build_for(None, STUDENT)
    with pytest.raises(InputError, match="compares hidden_states, which stored"):
        losses.HiddenStates().build_for(None, STUDENT)
