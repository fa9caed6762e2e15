"""Claims about a teacher's top-k log-probabilities: bytes, records, completion."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from gpt_tf.distillation import top_k as records
from gpt_tf.distillation.top_k import (
    codes_of,
    log_probabilities_of,
    logits_from_sorted,
    logits_from_top_k,
)
from gpt_tf.errors import InputError
from gpt_tf.models import ops


def error_of_codes(probabilities):
    """Return the error of ln p, as a share of what is promised."""
    surprise = -np.log(probabilities)
    read = (codes_of(probabilities) / 64.0) ** 2
    return np.abs(read - surprise) / (np.sqrt(surprise) / 64 + 1 / 16384)


def logits_of(rows, width, seed=0, sharpness=3.0):
    return np.random.default_rng(seed).normal(0, sharpness, (rows, width))


def compiled(mapping, logits):
    def run(logits):
        with ops.inside_xla():
            return mapping.outputs(logits)

    tensors = tf.function(run, jit_compile=True)(tf.constant(logits, tf.float32))
    return [tensor.numpy() for tensor in tensors]


# Codes


@given(st.lists(st.floats(2e-7, 1.0), min_size=1, max_size=50))
def test_a_probability_is_met_within_the_promised_error(probabilities):
    assert error_of_codes(np.array(probabilities)).max() <= 1.0 + 1e-9


def test_codes_fall_with_the_probability_and_use_all_bytes():
    codes = codes_of(np.geomspace(1e-9, 1.0, 100_000))
    assert (np.diff(codes.astype(int)) <= 0).all()
    assert set(codes) == set(range(256))
    assert codes_of([0.0, 1e-9, 1.0, 1.0 + 1e-7]).tolist() == [255, 255, 0, 0]


def test_probabilities_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="Received: NaN"):
        codes_of([0.5, float("nan")])


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.1, 10.0))
def test_what_is_read_makes_up_one_and_is_near_what_was_written(seed, sharpness):
    p = softmax(logits_of(4, 9, seed, sharpness), axis=-1)
    read = np.exp(log_probabilities_of(codes_of(p)).numpy().astype(float))
    np.testing.assert_allclose(read.sum(axis=-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(read, p, rtol=0.15, atol=1e-6)
    assert np.abs(read - p).max() < 0.02


def test_a_record_that_knows_nothing_leaves_all_to_the_rest():
    ids, codes = records.unknown(3, 5)
    assert ids.shape == (3, 5)
    read = log_probabilities_of(codes).numpy()
    assert (read[:, :-1] <= -1e8).all()
    assert (read[:, -1] == 0.0).all()


# One tokenizer


def test_the_largest_and_the_sum_of_the_others_are_kept():
    logits, mapping = logits_of(50, 40), records.SameVocabulary(6, 40)
    ids, codes = mapping.records(0, *compiled(mapping, logits))
    p = softmax(logits, axis=-1)
    order = np.argsort(-p, axis=-1)
    np.testing.assert_array_equal(ids, order[:, :6])
    sorted_ = np.take_along_axis(p, order, -1)
    rest = sorted_[:, 6:].sum(-1, keepdims=True)
    expected = codes_of(np.concatenate([sorted_[:, :6], rest], -1))
    assert np.abs(codes.astype(int) - expected).max() <= 1
    assert (codes == expected).mean() > 0.99


def test_a_small_remainder_is_not_lost_in_rounding():
    logits = np.array([[30.0, 29.0, 10.0, 9.0, 8.0]])
    _, values, rest = compiled(records.SameVocabulary(2, 5), logits)
    expected = softmax(logits, axis=-1)[0, 2:].sum()
    assert rest[0] == pytest.approx(expected, rel=1e-4)
    assert 1 - values.sum() != pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_equal_probabilities_are_counted_once_each(k):
    logits = np.log([[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]])
    ids, values, rest = compiled(records.SameVocabulary(k, 6), logits)
    assert values.sum() + rest[0] == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_array_equal(ids[0], [1, 3, 0, 2, 4, 5][:k])


def test_rows_are_not_sorted_for_it():
    mapping = records.SameVocabulary(6, 1000)

    def run(logits):
        with ops.inside_xla():
            return mapping.outputs(logits)

    logits = tf.zeros([16, 1000])
    compiled = tf.function(run, jit_compile=True, autograph=False)
    code = compiled.experimental_get_compiler_ir(logits)(stage="optimized_hlo")
    assert "TopK" in code
    assert " sort(" not in code


# Completion

SHAPE = (2, 3, 11)


@pytest.fixture
def pair():
    generator = np.random.default_rng(4)
    teacher, student = generator.normal(size=(2, *SHAPE))
    return log_softmax(teacher * 2, axis=-1), log_softmax(student, axis=-1)


def top_k(log_probs, k):
    ids = np.argsort(-log_probs, axis=-1)[..., :k]
    largest = np.take_along_axis(log_probs, ids, -1)
    rest = np.log1p(-np.exp(largest).sum(-1, keepdims=True))
    return ids.astype("int32"), np.concatenate([largest, rest], -1).astype("float32")


def tail_of(ids):
    """Tell which tokens are not among the largest."""
    tail = np.ones(SHAPE, bool)
    np.put_along_axis(tail, ids, False, -1)
    return tail


def kl(p, q):
    return rel_entr(np.exp(p), np.exp(q)).sum(-1)


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
    tail = tail_of(ids)
    rest = (np.exp(teacher) * tail).sum(-1)
    tails = [softmax(np.where(tail, log_probs, -1e9), axis=-1) for log_probs in pair]
    left_out = rest * rel_entr(*tails).sum(-1)
    assert left_out.min() > 1e-4
    np.testing.assert_allclose(
        kl(found, student), kl(teacher, student) - left_out, atol=1e-5
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
    # In proportion to q: the tail as a whole moves, its shape stays.
    share = np.where(tail_of(ids), slope / q, np.nan)
    assert (np.nanmax(share, -1) - np.nanmin(share, -1)).max() < 1e-4


def test_where_nothing_is_known_the_student_is_its_own_teacher(pair):
    _, student = pair
    ids = np.zeros((2, 3, 4), "int32")
    values = np.full((2, 3, 5), -1e9, "float32")
    values[..., -1] = 0.0
    found = logits_from_top_k(ids, values, student.astype("float32")).numpy()
    np.testing.assert_allclose(found, student, atol=1e-5)


def test_sorted_probabilities_keep_their_mass(pair):
    teacher, _ = pair
    _, values = top_k(teacher, 4)
    found = logits_from_sorted(values, 11).numpy()
    assert found.shape == SHAPE
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, rtol=1e-5)
    assert (np.diff(found[..., :4], axis=-1) <= 0).all()
    assert logits_from_sorted(values, 3).shape[-1] == 5
