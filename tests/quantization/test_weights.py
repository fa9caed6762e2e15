"""Claims about weights as integers: what the strategies do, and what they cost."""

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpt_tf
from gpt_tf.errors import InputError
from gpt_tf.quantization.weights import (
    STRATEGIES,
    channel_axis,
    dequantize,
    quantize_array,
    quantize_weights,
)

any_bits = st.integers(2, 8)
# Subnormal numbers too, whose scales could not be told apart from 0.
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
matrices = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.one_of(numbers, st.floats(-1, 1, width=32), st.just(0.0)),
)
# How an array is cut into groups that share a scale: axis and block size.
groupings = st.sampled_from([(None, None), (0, None), (1, None), (0, 4), (1, 4)])

MATRICES = {
    "embedding/token_table": (31, 12),
    "embedding/position_table": (16, 12),
    "block_0/qkv_kernel": (12, 36),
    "block_0/output_kernel": (12, 12),
    "block_0/up_kernel": (12, 48),
    "block_0/down_kernel": (48, 12),
}


def matrices_of(model):
    return {w.name.split(":")[0]: w.numpy() for w in model.weights if w.shape.rank == 2}


def spread_model(embedding_dim=12, **changes):
    """Return a model whose weights have means, and channels of unequal size."""
    keras.utils.set_random_seed(3)
    model = gpt_tf.GPTModel(31, embedding_dim, 1, 4, 16, **changes)
    generator = np.random.default_rng(7)
    for weight in model.weights:
        gains = np.exp(generator.normal(0, 1.0, weight.shape[-1:]))
        values = generator.normal(0.02, 0.1, weight.shape) * gains
        weight.assign(values)
    return model


@pytest.fixture(scope="module")
def model():
    return spread_model()


# Arrays


@given(matrices, any_bits, groupings)
@example(np.full((1, 2), 1e-44, np.float32), 8, (None, None))
@example(np.array([[2e-43, 1e-45]], np.float32), 8, (0, None))
def test_the_error_is_at_most_half_a_step(values, bits, grouping):
    axis, block_size = grouping
    integers, scales = quantize_array(values, bits, axis, block_size)
    assert integers.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(integers.astype(int)).max() <= 2 ** (bits - 1) - 1
    assert np.isfinite(scales).all() and (scales > 0).all()
    back = dequantize(integers, scales, block_size=block_size)
    assert (back[values == 0] == 0).all()
    again, _ = quantize_array(back, bits, axis, block_size)
    np.testing.assert_array_equal(again, integers)
    # The scale of every value is the dequantised value of the integer 1.
    ones = np.ones(values.shape, np.int8)
    steps = dequantize(ones, scales, block_size=block_size)
    error = np.abs(back.astype(np.float64) - values)
    assert (error <= 0.5001 * steps).all()


def test_half_a_step_is_reached_and_an_integer_further_breaks_it():
    values = np.random.default_rng(1).normal(0, 1, (64, 64)).astype(np.float32)
    integers, scales = quantize_array(values, 8)
    error = np.abs(dequantize(integers, scales) - values) / scales
    assert error.max() > 0.49
    integers[5, 6] += 1
    error = np.abs(dequantize(integers, scales) - values) / scales
    assert error.max() > 0.5001


def test_a_channel_of_zeros_has_the_scale_1():
    integers, scales = quantize_array([[0.0, 3.0], [0.0, -1.0]], axis=1)
    assert scales[0, 0] == 1.0 and scales[0, 1] == np.float32(3.0) / np.float32(127)
    assert integers.tolist() == [[0, 127], [0, -42]]


def test_halves_are_rounded_to_the_even_neighbour():
    values = np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    integers, scales = quantize_array(values)
    assert scales == 1.0
    assert integers.tolist() == [127, 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("up_kernel", np.nan), ("down_kernel", np.inf), ("up_bias", -np.inf)],
)
def test_weights_that_are_not_finite_are_named(name, value):
    model = spread_model()
    variable = getattr(model.get_layer("block_0"), name)
    values = variable.numpy()
    values.flat[3] = value
    variable.assign(values)
    message = f"1 of {values.size} values of block_0/{name}"
    with pytest.raises(InputError, match=message):
        quantize_weights(model)


# The strategies, each against a statement of its own in plain NumPy


def expected_weights(weights, strategy, bits):
    """Dequantised matrices in float64, from the definitions of the strategies."""
    top = 2 ** (bits - 1) - 1

    def around(values, mean, largest):
        step = largest / top
        return np.round((values - mean) / step) * step + mean

    def per_row(rows):
        return np.stack([around(row, 0.0, np.abs(row).max()) for row in rows])

    def of_blocks(rows):
        parts = [rows[:, i : i + 32] for i in range(0, rows.shape[1], 32)]
        return np.concatenate([per_row(part) for part in parts], axis=1)

    def by_output(values, name, quantize_rows):
        is_table = name.startswith(("embedding/", "head/"))
        return quantize_rows(values) if is_table else quantize_rows(values.T).T

    def together(names):
        everything = np.concatenate([weights[name].ravel() for name in names])
        mean = everything.mean()
        largest = np.abs(everything - mean).max()
        return {name: around(weights[name], mean, largest) for name in names}

    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    if strategy == "global_mean":
        return together(weights)
    if strategy == "layer_mean":
        layers = {name.split("/")[0] for name in weights}
        found = {}
        for layer in layers:
            found.update(together([n for n in weights if n.startswith(f"{layer}/")]))
        return found
    if strategy == "per_tensor":
        return {n: around(w, 0.0, np.abs(w).max()) for n, w in weights.items()}
    rows = {"per_channel": per_row, "blockwise": of_blocks}[strategy]
    return {n: by_output(w, n, rows) for n, w in weights.items()}


def furthest(found, expected):
    """The largest share of values that differ by more than rounding of float32."""
    shares = []
    for name, values in expected.items():
        scale = np.abs(values).max()
        shares.append(np.mean(np.abs(found[name] - values) > 1e-5 * scale))
    return max(shares)


@pytest.mark.parametrize(
    ("strategy", "bits", "tied"),
    [
        ("global_mean", 8, True),
        ("layer_mean", 4, False),
        ("per_tensor", 4, True),
        ("per_channel", 8, False),
        ("blockwise", 4, True),
    ],
)
def test_a_strategy_does_what_its_definition_says(strategy, bits, tied):
    # 40 wide, so that blocks of 32 are not the whole of a channel.
    model = spread_model(embedding_dim=40, tie_embeddings=tied)
    weights = matrices_of(model)
    assert len(weights) == 6 + (not tied)
    found = matrices_of(quantize_weights(model, strategy, bits).model)
    # A value may lie on a border between two integers.
    assert furthest(found, expected_weights(weights, strategy, bits)) < 0.002
    for other in set(STRATEGIES) - {strategy}:
        assert furthest(found, expected_weights(weights, other, bits)) > 0.2


@pytest.mark.parametrize(
    ("strategy", "bits", "means", "constants"),
    [
        ("global_mean", 8, 1, 2),
        ("layer_mean", 4, 2, 4),
        ("per_tensor", 6, 0, 6),
        ("per_channel", 8, 0, 31 + 16 + 36 + 12 + 48 + 12),
        ("blockwise", 4, 0, 31 + 16 + 36 + 12 + 48 + 2 * 12),
    ],
)
def test_integers_scales_and_offsets_are_the_models_weights(
    model, strategy, bits, means, constants
):
    quantized = quantize_weights(model, strategy, bits)
    found = matrices_of(quantized.model)
    assert {n: q.shape for n, q in quantized.integers.items()} == MATRICES
    for name, integers in quantized.integers.items():
        assert integers.dtype == np.int8
        scales, offset = quantized.scales[name], quantized.offsets[name]
        back = dequantize(integers, scales, offset, quantized.block_size)
        np.testing.assert_array_equal(back, found[name])
    offsets = {offset.item() for offset in quantized.offsets.values()}
    assert len(offsets - {0.0}) == means
    # Integers are packed, and a constant that matrices share counts once.
    matrices = sum(rows * columns for rows, columns in MATRICES.values())
    vectors = 4 * 12 + 36 + 12 + 48 + 12 + 2 * 12
    assert quantized.size_bytes == matrices * bits // 8 + 4 * (constants + vectors)


def test_a_table_has_a_scale_per_row_and_a_kernel_per_column():
    model = spread_model(tie_embeddings=False)
    scales = quantize_weights(model, "per_channel").scales
    for name, shape in {**MATRICES, "head/kernel": (31, 12)}.items():
        axis = 1 if name.startswith("block_0/") else 0
        assert channel_axis(name) == axis
        assert scales[name].shape[axis] == shape[axis]
        assert scales[name].size == shape[axis]


def test_vectors_and_the_given_model_are_kept_as_they_are():
    model = spread_model(dropout=0.1)
    weights = model.get_weights()
    quantized = quantize_weights(model, bits=4)
    assert not set(quantized.kept) & set(quantized.integers)
    floats = [w for w in model.weights if w.dtype.is_floating]
    assert len(quantized.kept) + len(quantized.integers) == len(floats)
    for ours, theirs in zip(quantized.model.weights, model.weights, strict=True):
        if theirs.shape.rank != 2:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    for name, values in quantized.kept.items():
        assert values.ndim == 1 and values.dtype == np.float32, name
        values[...] = 0
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_decibels_are_those_of_the_weights(model):
    def power(one, other=0.0):
        return np.sum(np.square(np.subtract(one, other, dtype=np.float64)))

    quantized = quantize_weights(model, "layer_mean", 6)
    before, after = matrices_of(model), matrices_of(quantized.model)
    signal = {name: power(before[name]) for name in MATRICES}
    noise = {name: power(before[name], after[name]) for name in MATRICES}
    expected = {name: 10 * np.log10(signal[name] / noise[name]) for name in MATRICES}
    assert quantized.snr_db == pytest.approx(expected)
    whole = 10 * np.log10(sum(signal.values()) / sum(noise.values()))
    assert quantized.overall_snr_db == pytest.approx(whole)
    six, eight = (quantize_weights(model, bits=b).overall_snr_db for b in (6, 8))
    assert eight - six == pytest.approx(2 * 6.02, abs=0.7)  # 6 decibels a bit


def test_nothing_is_lost_of_weights_that_are_integers_already():
    model = spread_model()
    for weight in model.weights:
        if weight.shape.rank == 2:
            weight.assign(np.resize([1.0, -1.0], weight.shape))
    quantized = quantize_weights(model, "global_mean", 2)
    assert quantized.overall_snr_db == np.inf
    assert not any(offset.any() for offset in quantized.offsets.values())
