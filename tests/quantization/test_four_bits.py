import numpy as np
import pytest

from gpt_tf.quantization.four_bits import has_four_bits, take_apart


def blocks_of(kind, rows=6, blocks=3):
    """Weights as llama.cpp's formats have them, and the integers that they are from."""
    draw = np.random.default_rng(5)
    q = draw.integers(0, 16, (rows, blocks, 32))
    q[..., 0], q[..., 1] = (15, 0) if kind == "Q4_1" else (14, 0)
    step = draw.uniform(1e-3, 0.1, (rows, blocks, 1)).astype(np.float16)
    offset = -8.0 * step.astype(np.float32)
    if kind == "Q4_1":
        offset = draw.uniform(-0.5, 0.1, step.shape).astype(np.float16)
    weights = step.astype(np.float32) * q + offset.astype(np.float32)
    return weights.reshape(rows, -1).astype(np.float32), q.reshape(rows, -1)


def whole(integers, steps, offsets):
    steps, offsets = (np.repeat(x.astype(np.float32), 32, 1) for x in (steps, offsets))
    return integers * steps + offsets


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_what_has_16_values_comes_back_as_it_was(kind):
    weights, q = blocks_of(kind)
    if kind == "Q4_0":
        weights, q = np.minimum(weights, 0), np.minimum(q, 8)
    integers, steps, offsets, exact = take_apart(weights)
    assert exact.all() and has_four_bits([weights])
    np.testing.assert_array_equal(integers + 8, q)
    np.testing.assert_allclose(
        whole(integers, steps, offsets), weights, atol=1e-3 * steps.min()
    )


def test_a_step_that_is_no_float16_costs_what_rounding_it_costs():
    weights = blocks_of("Q4_1")[0] * np.float32(1 / 3)
    integers, steps, offsets, exact = take_apart(weights)
    assert exact.all()
    error = np.abs(whole(integers, steps, offsets) - weights).max()
    assert 0 < error < 8 * 2**-11 * steps.max()


def test_other_weights_go_to_the_nearest_of_16():
    weights = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    integers, steps, offsets, exact = take_apart(weights)
    assert not exact.any() and not has_four_bits([weights])
    error = np.abs(whole(integers, steps, offsets) - weights)
    # Half a step, and what the offset moves for a smaller error of the whole block.
    assert (error <= 0.65 * np.repeat(steps, 32, axis=1)).all()
    assert np.sqrt(np.square(error).mean()) < 0.3 * steps.mean()
    assert integers.min() == -8 and integers.max() == 7


def test_a_block_of_one_value_is_that_value():
    for value in (0.0, -0.25):
        integers, steps, offsets, exact = take_apart(np.full((2, 32), value))
        assert exact.all() and (steps > 0).all() and not integers.any()
        np.testing.assert_allclose(whole(integers, steps, offsets), value, atol=1e-6)


def test_matrices_that_are_no_blocks_have_none():
    assert not has_four_bits([np.ones((4, 33), np.float32)])
    assert not has_four_bits([])
