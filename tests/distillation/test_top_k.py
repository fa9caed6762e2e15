import numpy as np
import pytest
import tensorflow as tf

from gpt_tf.distillation.top_k import logits_from_sorted, logits_from_top_k

SHAPE = (2, 3, 11)


@pytest.fixture
def pair():
    generator = np.random.default_rng(4)
    teacher, student = generator.normal(size=(2, *SHAPE)).astype(np.float32)
    return log_softmax(teacher * 2), log_softmax(student)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def top_k(log_probs, k):
    ids = np.argsort(-log_probs, axis=-1)[..., :k]
    largest = np.take_along_axis(log_probs, ids, -1)
    rest = np.log1p(-np.exp(largest).sum(-1, keepdims=True))
    return ids.astype("int32"), np.concatenate([largest, rest], -1).astype("float32")


def kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def test_the_largest_are_as_they_were_and_the_whole_sums_to_one(pair):
    teacher, student = pair
    ids, values = top_k(teacher, 4)
    found = logits_from_top_k(ids, values, student.astype("float32")).numpy()
    np.testing.assert_allclose(
        np.take_along_axis(found, ids, -1), values[..., :-1], rtol=1e-6
    )
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, rtol=1e-5)


def test_the_loss_is_smaller_by_the_divergence_of_the_tails_exactly(pair):
    teacher, student = pair
    ids, values = top_k(teacher, 4)
    found = logits_from_top_k(ids, values, student.astype("float32")).numpy()
    tail = np.ones(SHAPE, bool)
    np.put_along_axis(tail, ids, False, -1)
    rest = (np.exp(teacher) * tail).sum(-1)
    tails = [
        log_softmax(np.where(tail, values_of, -1e9)) for values_of in (teacher, student)
    ]
    left_out = rest * np.where(tail, np.exp(tails[0]) * (tails[0] - tails[1]), 0).sum(
        -1
    )
    assert left_out.min() > 1e-4
    np.testing.assert_allclose(
        kl(log_softmax(found), student), kl(teacher, student) - left_out, atol=1e-5
    )


def test_what_was_left_out_moves_nothing_in_the_tail(pair):
    teacher, student = pair
    ids, values = top_k(teacher, 4)
    logits = tf.constant(student, tf.float32)
    target = logits_from_top_k(ids, values, logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = -tf.reduce_sum(tf.exp(target) * tf.nn.log_softmax(logits))
    slope = tape.gradient(loss, logits).numpy()
    q = np.exp(student)
    tail = np.ones(SHAPE, bool)
    np.put_along_axis(tail, ids, False, -1)
    # In proportion to q: the tail as a whole moves, its shape stays.
    share = np.where(tail, slope / q, np.nan)
    assert (np.nanmax(share, -1) - np.nanmin(share, -1)).max() < 1e-4


def test_where_nothing_is_known_the_student_is_its_own_teacher(pair):
    _, student = pair
    ids = np.zeros((2, 3, 4), "int32")
    values = np.full((2, 3, 5), -1e9, "float32")
    values[..., -1] = 0.0
    found = logits_from_top_k(ids, values, student.astype("float32")).numpy()
    np.testing.assert_allclose(found, student, atol=1e-5)


def test_entries_without_mass_may_repeat_others(pair):
    teacher, student = pair
    ids, values = top_k(teacher, 4)
    wanted = logits_from_top_k(ids, values, student.astype("float32"))
    more = np.concatenate([ids, np.repeat(ids[..., :1], 2, -1)], -1)
    padded = np.insert(values, [4, 4], -1e9, axis=-1)
    found = logits_from_top_k(more, padded, student.astype("float32"))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_it_works_under_xla(pair):
    teacher, student = pair
    ids, values = top_k(teacher, 4)
    student = student.astype("float32")
    compiled = tf.function(logits_from_top_k, jit_compile=True)
    np.testing.assert_allclose(
        compiled(ids, values, student),
        logits_from_top_k(ids, values, student),
        atol=1e-5,
    )


def test_sorted_probabilities_keep_their_mass(pair):
    teacher, _ = pair
    _, values = top_k(teacher, 4)
    found = logits_from_sorted(values, 11).numpy()
    assert found.shape == SHAPE
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, rtol=1e-5)
    assert (np.diff(found[..., :4], axis=-1) <= 0).all()
    assert logits_from_sorted(values, 3).shape[-1] == 5
